"""``kv_write``: rotates the new keys and puts new keys and values into the cache."""

import triton
import triton.language as tl

from .kv_format import store_tile
from .params import AppendParams, CacheParams, WriteTile, in_elements
from .rotary import load_rotated


@triton.jit
def append_tokens(cache, append, b, kv_head, token, seqlen_cached):
    """Write new tokens (a vector) behind the ``seqlen_cached`` of sequence ``b``; return their keys and values.

    What does not fit the cache, or would go to no page, is not written anywhere.
    """
    # ---- The slot of each token ----
    position = seqlen_cached + token
    valid = (token < append.seqlen_new) & (seqlen_cached >= 0) & (position < cache.capacity)
    if cache.block_table is None:
        page = token * 0 + b
        if cache.cache_batch_idx is not None:
            page = token * 0 + tl.load(cache.cache_batch_idx + b)
        slot = position
    else:
        table = cache.block_table + b.to(tl.int64) * cache.table_width
        page = tl.load(table + position // cache.PAGE_SIZE, valid, other=-1)
        slot = position % cache.PAGE_SIZE
    written = valid & (page >= 0) & (page < cache.num_pages)
    row = token.to(tl.int64)

    # ---- Keys, rotated at the position they take ----
    new = in_elements(append.k_strides)
    source = append.k_new + b.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head + row * new.token
    k_tile = load_rotated(source, valid, position, append, cache.D, cache.BLOCK_D)
    strides = in_elements(cache.k_strides)
    store_tile(cache.k + kv_head * strides.head, strides, page, slot, k_tile, written, cache.D, cache.BLOCK_D)

    # ---- Values ----
    new = in_elements(append.v_strides)
    d = tl.arange(0, cache.BLOCK_DV)
    source = append.v_new + b.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head + row * new.token
    v_tile = tl.load(source[:, None] + d[None, :], valid[:, None] & (d < cache.DV)[None, :], other=0.0)
    if cache.v_strides is not None:
        strides = in_elements(cache.v_strides)
    store_tile(cache.v + kv_head * strides.head, strides, page, slot, v_tile, written, cache.DV, cache.BLOCK_DV)
    return k_tile, v_tile


@triton.jit
def kv_write(cache: CacheParams, append: AppendParams, tile: WriteTile):
    """A CTA writes BLOCK_NEW new tokens of one KV head of one sequence."""
    kv_head = tl.program_id(0)
    b = tl.program_id(1)
    token = tl.program_id(2) * tile.BLOCK_NEW + tl.arange(0, tile.BLOCK_NEW)
    append_tokens(cache, append, b, kv_head, token, tl.load(cache.seqused_k + b))
