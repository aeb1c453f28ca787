"""``kv_write``: rotates the new keys and puts new keys and values into the cache."""

import triton
import triton.language as tl

from .kv_format import KVTile, store_kv
from .params import WriteParams, WriteTensors, WriteTile, in_elements
from .rotary import load_rotated


@triton.jit
def append_tokens(tensors, problem, b, kv_head, token, seqlen_cached):
    """Write new tokens (a vector) behind the ``seqlen_cached`` of sequence ``b``; return them as the cache holds them.

    What does not fit the cache, or would go to no page, is not written anywhere.
    """
    # ---- The slot of each token ----
    position = seqlen_cached + token
    fits = seqlen_cached < problem.cache.capacity - token  # in this form no length overflows
    valid = (token < problem.append.seqlen_new) & (seqlen_cached >= 0) & fits
    if tensors.block_table is None:
        page = token * 0 + b
        if tensors.cache_batch_idx is not None:
            page = token * 0 + tl.load(tensors.cache_batch_idx + b)
        slot = position
    else:
        table = tensors.block_table + b.to(tl.int64) * problem.cache.table_width
        page = tl.load(table + position // problem.cache.PAGE_SIZE, valid, other=-1)
        slot = position % problem.cache.PAGE_SIZE
    written = valid & (page >= 0) & (page < problem.cache.num_pages)
    row = token.to(tl.int64)

    # ---- Keys, rotated at the position they take ----
    new = in_elements(problem.append.k_strides)
    source = tensors.k_new + b.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head + row * new.token
    k = load_rotated(tensors, problem, source, valid, position)

    # ---- Values ----
    new = in_elements(problem.append.v_strides)
    d = tl.arange(0, problem.cache.BLOCK_DV)
    source = tensors.v_new + b.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head + row * new.token
    v = tl.load(source[:, None] + d[None, :], valid[:, None] & (d < problem.cache.DV)[None, :], other=0.0)

    k, v, k_scales, v_scales = store_kv(tensors, problem, b, kv_head, page, slot, k, v, written)
    return KVTile(k, v, k_scales, v_scales, position)


@triton.jit
def kv_write(tensors: WriteTensors, problem: WriteParams, tile: WriteTile):
    """A CTA writes BLOCK_NEW new tokens of one KV head of one sequence."""
    kv_head = tl.program_id(0)
    b = tl.program_id(1)
    token = tl.program_id(2) * tile.BLOCK_NEW + tl.arange(0, tile.BLOCK_NEW)
    append_tokens(tensors, problem, b, kv_head, token, tl.load(tensors.seqused_k + b))
