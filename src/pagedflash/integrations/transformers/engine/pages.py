"""Pages of continuous batching in a format that is not the model's dtype.

Pages of float16 and bfloat16 are laid out as transformers does it. Where elements have scales, these lie in the pages too,
and are shared, copied, offloaded and evicted with the elements:

    [ keys | their scales | values | their scales ]     a page of one layer

with keys ``(page_size, Hkv, D)`` and scales ``(page_size, Hkv)``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from ....problem import QUANTIZED
from .. import formats, hooks
from ..formats import SCALE_BYTES, InFormat


def install() -> None:
    """Caches that are made for "pagedflash" have pages of the format in force, until the changes are taken back."""
    make_elsewhere = PagedAttentionCache.__init__

    @functools.wraps(make_elsewhere)
    def make(self: Any, config: Any, continuous_batching_config: Any, device: Any, *args: Any, **kwargs: Any) -> None:
        if hooks.base_name(config._attn_implementation) == hooks.NAME:
            formats.check_device(torch.device(device))
            if continuous_batching_config.max_blocks_per_request == 0:
                raise ValueError(
                    f"pagedflash: kv_cache_dtype is {formats.kv_cache_dtype_name()!r}, but max_blocks_per_request=0 turns "
                    "block tables off, and without them keys and values are kept in the model's dtype"
                )
            kwargs["dtype"] = formats.kv_cache_dtype
        make_elsewhere(self, config, continuous_batching_config, device, *args, **kwargs)

    hooks.replace(PagedAttentionCache, "__init__", make)
    if formats.kv_cache_dtype in QUANTIZED:
        _install_scales()


def _install_scales() -> None:
    """Allocators of quantized pages, sliding windows or not, make room for scales and hand them out with the elements."""
    allocator = FullAttentionCacheAllocator
    bytes_of_elements, register_elsewhere = allocator.get_bytes_per_page, allocator.register_cache_tensor
    views_elsewhere = allocator.get_cache_for_block_table

    def get_bytes_per_page(
        cls: Any, num_key_value_heads: int, head_dim: int, cache_dtype: torch.dtype, page_size: int
    ) -> int:
        elements: int = bytes_of_elements(num_key_value_heads, head_dim, cache_dtype, page_size)
        return elements + (2 * page_size * num_key_value_heads * SCALE_BYTES if cache_dtype in QUANTIZED else 0)

    @functools.wraps(register_elsewhere)
    def register_cache_tensor(
        self: Any, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any
    ) -> None:
        register_elsewhere(self, bytes_per_sector, non_trash_bytes, cache_tensor, pool)
        if self.cache_dtype in QUANTIZED:
            self.pages_in_format = _views(self, cache_tensor)

    @functools.wraps(views_elsewhere)
    def get_cache_for_block_table(self: Any, layer_idx: int) -> Any:
        return self.pages_in_format[layer_idx] if self.cache_dtype in QUANTIZED else views_elsewhere(self, layer_idx)

    hooks.replace(allocator, "get_bytes_per_page", classmethod(get_bytes_per_page))
    hooks.replace(allocator, "register_cache_tensor", register_cache_tensor)
    hooks.replace(allocator, "get_cache_for_block_table", get_cache_for_block_table)


def _views(allocator: Any, cache_tensor: Tensor) -> dict[int, tuple[InFormat, InFormat]]:
    """Layer -> its keys and values. Block tables count halves of pages from the layer's first on, as in transformers."""
    page_size, heads = allocator.tokens_per_page, allocator.num_key_value_heads
    halves = cache_tensor.view(-1, allocator.bytes_per_page // 2)
    elements, scales = halves.split([halves.shape[1] - page_size * heads * SCALE_BYTES, page_size * heads * SCALE_BYTES], 1)
    elements = elements.view(allocator.cache_dtype).unflatten(1, (page_size, heads, allocator.head_dim))
    scales = scales.view(torch.float32).unflatten(1, (page_size, heads))

    def views(first: int, end: int) -> InFormat:
        return InFormat(elements[first:end], scales[first:end])

    end = len(halves)
    return {layer: (views(2 * i, end - 1), views(2 * i + 1, end)) for i, layer in enumerate(allocator.layer_indices)}
