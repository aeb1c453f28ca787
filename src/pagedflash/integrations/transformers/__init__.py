"""Hugging Face transformers on pagedflash, for ``generate()`` and for continuous batching (``generate_batch()``)::

    import pagedflash.transformers

    pagedflash.transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="pagedflash")

On the way to an attention kernel transformers (5.17 to 5.24 read) asks four questions. :func:`enable` answers them for the
name "pagedflash", leaves every other name to transformers, and needs no ``kernels`` library:

1. Which function attends, and which one makes the mask? :mod:`.attention` and :mod:`.masks`.
2. Where are the flash-attn functions of that name, for code that asks for them? In this package.
3. Does the model allow it? If transformers runs it with flash attention (:mod:`.models`).
4. May continuous batching decode through block tables? Yes, on every device; transformers alone says yes on CUDA and XPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from ... import interface
from . import engine, formats, gate, hooks, models, tensor_parallel
from .gate import is_open as decode_fast_path_is_open
from .hooks import NAME

__all__ = ["NAME", "decode_fast_path_is_open", "disable", "enable", "is_enabled"]

# Where transformers' modeling_flash_attention_utils keeps the functions of the last implementation; None at first.
_LOADED_FUNCTIONS = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


def enable(decode_fast_path_for: Iterable[str] = (), kv_cache_dtype: str | None = None) -> None:
    """Make ``attn_implementation="pagedflash"`` known to transformers. Calling it again changes nothing.

    Args:
        decode_fast_path_for: further implementations that continuous batching shall decode through block tables with, on
            any device: Hub names, such as ``"kernels-community/metal-flash-sdpa"`` loaded from what ``pagedflash hub``
            writes. One without ``flash_attn_with_kvcache`` still gets no fast path. Names of several calls add up.
        kv_cache_dtype: the format that ``generate_batch()`` and ``generate()`` keep keys and values in: ``"float16"`` or
            ``"bfloat16"`` (for models in float32), ``"int8"`` or ``"fp8_e4m3"`` (a scale for each token and head). None: the
            model's dtype. Once enabled it stays, until ``disable``.

    Warns:
        RuntimeWarning: this transformers decides elsewhere whether to decode through block tables. Generation works, but
            decodes through ``flash_attn_varlen_func``.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: this transformers has no place left where an attention implementation can be added.

    Examples:
        >>> enable()
        >>> is_enabled()
        True
        >>> disable()
        >>> is_enabled()
        False
    """
    if isinstance(decode_fast_path_for, str):
        raise TypeError("pagedflash: decode_fast_path_for is of type str, expected several names, as a list or tuple")
    if kv_cache_dtype is not None:
        _check_kv_cache_dtype(kv_cache_dtype)
    if not is_enabled():
        _require_transformers()
        try:
            _add_implementation()
            models.install()
            tensor_parallel.check_when_split()
        except (AttributeError, ImportError, KeyError) as error:
            disable()
            _refuse_version(error)
        if kv_cache_dtype is not None:
            formats.install(kv_cache_dtype)
        try:
            seen = engine.install()
        except RuntimeError:
            disable()
            raise
        gate.open_gate(seen)
    gate.allow((*decode_fast_path_for, NAME))


def _check_kv_cache_dtype(name: str) -> None:
    """
    Raises:
        ValueError: no such format. RuntimeError: enabled already, or transformers has no place for it.
    """
    _require_transformers()
    if is_enabled():
        raise RuntimeError("pagedflash: kv_cache_dtype is given, but enabled already; call disable() first")
    if hooks.version_numbers() < engine.FIRST_VERSION:
        raise RuntimeError(f"pagedflash: kv_cache_dtype is given, but transformers {hooks.version()} is older than 5.19")
    if name not in formats.KV_CACHE_DTYPES:
        raise ValueError(f"pagedflash: kv_cache_dtype is {name!r}, expected one of {', '.join(formats.KV_CACHE_DTYPES)}")


def disable() -> None:
    """Put everything in transformers back as it was before ``enable``."""
    hooks.undo_all()


def is_enabled() -> bool:
    """Whether ``enable`` is in force."""
    return hooks.any_made()


def _add_implementation() -> None:
    """Questions 1 and 2."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from . import attention, growing, masks

    hooks.register(ALL_ATTENTION_FUNCTIONS, NAME, attention.forward)
    hooks.register(ALL_MASK_ATTENTION_FUNCTIONS, NAME, masks.visible_keys)
    growing.install()
    if hooks.PAGED_PREFIX + "flash_attention_2" in ALL_ATTENTION_FUNCTIONS:
        paged_forward = ALL_ATTENTION_FUNCTIONS[hooks.PAGED_PREFIX + "flash_attention_2"]
        hooks.register(ALL_ATTENTION_FUNCTIONS, hooks.PAGED_PREFIX + NAME, _refusing_what_is_dropped(paged_forward))

    find_elsewhere = flash._lazy_imports

    @functools.wraps(find_elsewhere)
    def find(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if hooks.base_name(implementation) != NAME:
            return find_elsewhere(implementation, *args, **kwargs)
        return (
            interface.flash_attn_func,
            interface.flash_attn_varlen_func,
            interface.flash_attn_with_kvcache,
            flash._pad_input,
            flash._unpad_input,
        )

    hooks.on_undo(functools.partial(_forget_loaded_functions, flash))
    hooks.replace(flash, "_lazy_imports", find)


def _refusing_what_is_dropped(paged_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 5.17 continuous batching has a wrapper of its own, which drops softcap (Gemma 2), and windows that are not an
    attribute of the module (Mistral): wrong tokens, silently. Refuse instead."""

    @functools.wraps(paged_forward)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        dropped = {"softcap": kwargs.get("softcap")}
        if not getattr(module, "sliding_window", None):
            dropped["sliding_window"] = kwargs.get("sliding_window")
        for name, value in dropped.items():
            if value:
                raise ValueError(
                    f"pagedflash: {name} is {value}, but continuous batching of transformers {hooks.version()} drops it; "
                    "use generate(), or a newer transformers"
                )
        return paged_forward(module, *args, **kwargs)

    return forward


def _forget_loaded_functions(flash: Any) -> None:
    if hooks.base_name(flash._loaded_implementation) == NAME:
        for name in _LOADED_FUNCTIONS:
            if hasattr(flash, name):
                setattr(flash, name, None)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("pagedflash: transformers is not installed; pip install 'transformers>=5.17'") from error


def _refuse_version(error: Exception) -> NoReturn:
    raise RuntimeError(
        f"pagedflash: transformers {hooks.version()} has no place for it ({error}); 5.17 to 5.24 are known to have one"
    ) from error
