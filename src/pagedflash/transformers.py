"""Hugging Face transformers on pagedflash, for ``generate()`` and for continuous batching (``generate_batch()``).

>>> import pagedflash.transformers
>>> pagedflash.transformers.enable()
>>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="pagedflash")

On the way to an attention kernel transformers (5.17 to 5.23 read) asks four questions. :func:`enable` answers them for the
name "pagedflash", leaves every other name to transformers, and needs no ``kernels`` library:

1. Is the name known, and which mask does it want? It is registered beside "flash_attention_2", with the same wrappers.
2. Where are its functions? In this package.
3. Does the model allow it? Models with attention sinks list the flash kernels that have them; pagedflash has them too.
4. May continuous batching decode through block tables? Yes, on every device; transformers alone says yes on CUDA and XPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, NoReturn

from . import interface

NAME = "pagedflash"
"""What to pass as ``attn_implementation``."""

_PAGED_PREFIX = "paged|"
"""How transformers up to 5.17 names the continuous batching variant of an implementation."""

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

_undo: list[Callable[[], None]] = []
_decodes_through_block_tables: set[str] = set()


def enable(decode_fast_path_for: Iterable[str] = ()) -> None:
    """Make ``attn_implementation="pagedflash"`` known to transformers. Calling it again changes nothing.

    Args:
        decode_fast_path_for: further implementations that continuous batching shall decode through block tables with, on
            any device: Hub names, such as ``"kernels-community/metal-flash-sdpa"`` loaded from what ``pagedflash hub``
            writes. One without ``flash_attn_with_kvcache`` still gets no fast path. Names of several calls add up.

    Warns:
        RuntimeWarning: this transformers decides elsewhere whether to decode through block tables. Generation works, but
            decodes through ``flash_attn_varlen_func``.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: this transformers has no place left where an attention implementation can be added.
    """
    if isinstance(decode_fast_path_for, str):
        raise TypeError("pagedflash: decode_fast_path_for is of type str, expected several names, as a list or tuple")
    if not is_enabled():
        _require_transformers()
        try:
            _add_implementation()
            _allow_where_sinks_are_listed()
        except (AttributeError, ImportError, KeyError) as error:
            disable()
            _refuse_version(error)
        _open_decode_fast_path()
    _decodes_through_block_tables.update(decode_fast_path_for, (NAME,))


def disable() -> None:
    """Put everything in transformers back as it was before :func:`enable`."""
    while _undo:
        _undo.pop()()
    _decodes_through_block_tables.clear()


def is_enabled() -> bool:
    """Whether :func:`enable` is in force."""
    return bool(_undo)


def decode_fast_path_is_open() -> bool:
    """Whether continuous batching would decode through block tables with "pagedflash" now, by transformers' own answer.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = NAME
    batching = ContinuousBatchingConfig(max_blocks_per_request=1)
    try:
        _gate_module().ensure_decode_fast_path_is_available(config, batching, False)
    except (AttributeError, ImportError, TypeError):
        return False
    return bool(batching.max_blocks_per_request == 1)


def _add_implementation() -> None:
    """Questions 1 and 2."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        _register(functions, NAME, functions["flash_attention_2"])
    if _PAGED_PREFIX + "flash_attention_2" in ALL_ATTENTION_FUNCTIONS:
        paged_forward = ALL_ATTENTION_FUNCTIONS[_PAGED_PREFIX + "flash_attention_2"]
        _register(ALL_ATTENTION_FUNCTIONS, _PAGED_PREFIX + NAME, _refusing_what_is_dropped(paged_forward))

    find_elsewhere = flash._lazy_imports

    @functools.wraps(find_elsewhere)
    def find(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if _base_name(implementation) != NAME:
            return find_elsewhere(implementation, *args, **kwargs)
        return (
            interface.flash_attn_func,
            interface.flash_attn_varlen_func,
            interface.flash_attn_with_kvcache,
            flash._pad_input,
            flash._unpad_input,
        )

    _undo.append(functools.partial(_forget_loaded_functions, flash))
    _replace(flash, "_lazy_imports", find)


def _allow_where_sinks_are_listed() -> None:
    """Question 3: a list of flash kernels gets one more name; a list of other kernels (block-sparse) is left alone."""
    from transformers import PreTrainedModel

    check_elsewhere = PreTrainedModel._check_and_adjust_attn_implementation

    @functools.wraps(check_elsewhere)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        listed = self._compatible_flash_implementations or ()
        if _base_name(attn_implementation) == NAME and any("flash" in name for name in listed):
            self._compatible_flash_implementations = [*listed, NAME]
        return check_elsewhere(self, attn_implementation, *args, **kwargs)

    _replace(PreTrainedModel, "_check_and_adjust_attn_implementation", check)


def _open_decode_fast_path() -> None:
    """Question 4: transformers' own check, its other conditions included, with one answer in it changed."""
    try:
        module = _gate_module()
        decide_elsewhere = module.ensure_decode_fast_path_is_available
        decide_on_any_device = _seeing(decide_elsewhere, is_flash_attention_requested=_yes, is_torch_xpu_available=_yes)
    except (AttributeError, ImportError, TypeError):
        _warn_closed()
        return

    @functools.wraps(decide_elsewhere)
    def decide(config: Any, *args: Any, **kwargs: Any) -> None:
        ours = _base_name(config._attn_implementation) in _decodes_through_block_tables
        (decide_on_any_device if ours else decide_elsewhere)(config, *args, **kwargs)

    _replace(module, "ensure_decode_fast_path_is_available", decide)
    _decodes_through_block_tables.add(NAME)
    if not decode_fast_path_is_open():
        _undo.pop()()
        _warn_closed()


def _yes(*args: Any, **kwargs: Any) -> bool:
    return True


def _seeing(function: FunctionType, **names: Any) -> FunctionType:
    """A copy of ``function`` for which ``names`` stand in its module's globals. Module and function stay as they are."""
    scope = {**function.__globals__, **names}
    return FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)


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
                    f"pagedflash: {name} is {value}, but continuous batching of transformers {_version()} drops it; "
                    "use generate(), or a newer transformers"
                )
        return paged_forward(module, *args, **kwargs)

    return forward


def _base_name(implementation: str | None) -> str:
    """The name without what transformers puts around it: ``paged|org/name@revision:function`` is ``org/name``."""
    return (implementation or "").removeprefix(_PAGED_PREFIX).split(":")[0].split("@")[0].strip()


def _register(functions: Any, name: str, function: Callable[..., Any]) -> None:
    functions.register(name, function)
    _undo.append(lambda: functions._global_mapping.pop(name, None))


def _replace(owner: Any, name: str, value: object) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, original))


def _forget_loaded_functions(flash: Any) -> None:
    if _base_name(flash._loaded_implementation) == NAME:
        for name in _LOADED_FUNCTIONS:
            if hasattr(flash, name):
                setattr(flash, name, None)


def _gate_module() -> Any:
    import transformers.generation.continuous_batching.initialization as gate

    return gate


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("pagedflash: transformers is not installed; pip install 'transformers>=5.17'") from error


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _refuse_version(error: Exception) -> NoReturn:
    raise RuntimeError(
        f"pagedflash: transformers {_version()} has no place for it ({error}); 5.17 to 5.23 are known to have one"
    ) from error


def _warn_closed() -> None:
    warnings.warn(
        f"pagedflash: transformers {_version()} decides elsewhere whether to decode through block tables, so continuous "
        "batching decodes through flash_attn_varlen_func, which is slower.",
        RuntimeWarning,
        stacklevel=4,
    )
