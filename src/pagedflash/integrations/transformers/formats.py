"""The format that keys and values are kept in, where it is not the model's dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...interface import kv_paged_write
from ...problem import QUANTIZED
from . import hooks

KV_CACHE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""What ``enable(kv_cache_dtype=...)`` takes. Those of 8 bits have a scale for each token and head, written beside them."""

SCALE_BYTES = torch.float32.itemsize

kv_cache_dtype: torch.dtype | None = None
"""The format in force; None: the model's dtype."""


def install(name: str) -> None:
    """Keep keys and values in the format ``name``, until the changes are taken back."""
    hooks.replace(sys.modules[__name__], "kv_cache_dtype", KV_CACHE_DTYPES[name])


def kv_cache_dtype_name() -> str:
    """The format in force, as ``enable()`` takes it."""
    return next(name for name, dtype in KV_CACHE_DTYPES.items() if dtype is kv_cache_dtype)


def check_device(device: torch.device) -> None:
    """
    Raises:
        ValueError: torch has no tensors of the format in force there.
    """
    if device.type == "mps" and kv_cache_dtype is torch.float8_e4m3fn:
        raise ValueError(
            f"pagedflash: kv_cache_dtype is {kv_cache_dtype_name()!r}, but torch has no float8 on MPS; use 'int8'"
        )


class InFormat(NamedTuple):
    """Keys or values as a cache keeps them."""

    elements: Tensor  # of the format: pages (num_pages, page_size, Hkv, D), or a growing cache (B, Sk, Hkv, D)
    descale: Tensor | None  # float32, elements.shape[:-1]; None for float16 and bfloat16


def descales(k: InFormat, v: InFormat) -> dict[str, Any]:
    """The scales, as arguments of the functions."""
    return {} if k.descale is None or v.descale is None else {"k_descale": k.descale, "v_descale": v.descale}


def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New keys and values as rows of the format in force, which a cache may append, move and copy as it likes.

    Args:
        k: ``(B, Hkv, tokens, D)``.
        v: ``(B, Hkv, tokens, Dv)``.

    Returns:
        ``(B, Hkv, tokens, D)``; where the format has scales, bytes ``(B, 1, tokens, Hkv * (D + 4))``: all heads of a
        token, then their scales.

    Raises:
        ValueError: gradients are tracked, and there are none through a format.
    """
    assert kv_cache_dtype is not None
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise ValueError(
            f"pagedflash: kv_cache_dtype is {kv_cache_dtype_name()!r}, but gradients are tracked, and there are none "
            "through it; use torch.no_grad(), or use_cache=False to train"
        )
    check_device(k.device)
    if kv_cache_dtype not in QUANTIZED:
        return k.to(kv_cache_dtype), v.to(kv_cache_dtype)
    batch, heads, tokens, _ = k.shape
    rows = [x.new_empty(batch, 1, tokens, heads * (x.shape[-1] + SCALE_BYTES), dtype=torch.uint8) for x in (k, v)]
    if tokens:
        k_page, v_page = (of_rows(each, heads) for each in rows)  # each sequence is a page
        table = torch.arange(batch, dtype=torch.int32, device=k.device)[:, None]
        new = k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)  # a norm may leave keys in float32
        kv_paged_write(*new, k_page.elements, v_page.elements, table, 0, **descales(k_page, v_page))
    return rows[0], rows[1]


def of_rows(rows: Tensor, heads: int) -> InFormat:
    """Views of what :func:`store` returned, or of a cache of it."""
    assert kv_cache_dtype is not None
    if kv_cache_dtype not in QUANTIZED:
        return InFormat(rows.transpose(1, 2), None)
    scale_bytes = heads * SCALE_BYTES
    elements, scales = rows[:, 0].split([rows.shape[-1] - scale_bytes, scale_bytes], -1)
    return InFormat(elements.view(kv_cache_dtype).unflatten(-1, (heads, -1)), scales.view(torch.float32))


class Stored(Tensor):
    """Keys or values of a cache, on their way through a model to its attention function, which alone may read them."""

    in_format: InFormat
    model_dtype: torch.dtype  # of the keys or values that came last

    @staticmethod
    def of(rows: Tensor, states: Tensor) -> Stored:
        """``(B, Hkv, tokens, D)``, from rows as :func:`store` returns them for such ``states``."""
        in_format = of_rows(rows, states.shape[1])
        stored = in_format.elements.transpose(1, 2).as_subclass(Stored)
        stored.in_format, stored.model_dtype = in_format, states.dtype
        return stored

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in ("__get__", "size", "dim", "stride"):  # shape, dtype, device, ...
            raise ValueError(
                f"pagedflash: kv_cache_dtype is {kv_cache_dtype_name()!r}, but this model computes with what it has cached "
                f"({name}); call disable(), and enable() without kv_cache_dtype"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
