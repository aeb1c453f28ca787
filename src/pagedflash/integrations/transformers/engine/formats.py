"""The format that continuous batching keeps keys and values in, where it is not the model's dtype."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from ....problem import QUANTIZED
from .. import hooks
from . import KV_CACHE_DTYPES

kv_cache_dtype: torch.dtype | None = None
"""The format in force."""


def install(name: str) -> None:
    """Caches that are made for "pagedflash" have pages of the format ``name``, until the changes are taken back."""
    make_elsewhere = PagedAttentionCache.__init__

    @functools.wraps(make_elsewhere)
    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if hooks.base_name(config._attn_implementation) == hooks.NAME:
            kwargs["dtype"] = kv_cache_dtype
        make_elsewhere(self, config, *args, **kwargs)

    hooks.replace(sys.modules[__name__], "kv_cache_dtype", KV_CACHE_DTYPES[name])
    hooks.replace(PagedAttentionCache, "__init__", make)


def in_format(tensors: tuple[Tensor, ...], cache: Tensor) -> tuple[Tensor, ...]:
    """Queries, new keys and values as they meet pages of another dtype: in that dtype, unless it is the format in force."""
    return tensors if kv_cache_dtype is not None else tuple(tensor.to(cache.dtype) for tensor in tensors)


def descales(k_cache: Tensor, v_cache: Tensor) -> dict[str, Tensor]:
    """The scales of pages, as arguments of the functions."""
    if k_cache.dtype not in QUANTIZED:
        return {}
    return {"k_descale": _one(k_cache.device), "v_descale": _one(v_cache.device)}


@functools.lru_cache(maxsize=8)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
