"""``kv_write``: rotates the new keys and puts new keys and values into the cache."""

import triton
import triton.language as tl

from .kv_format import KVTile, store_kv
from .paging import leads_of
from .params import WriteParams, WriteTensors, WriteTile, in_elements
from .rotary import load_rotated_parts
from .sequence import clamp


@triton.jit
def append_tokens(tensors, problem, b, kv_head, row, token, seqlen_cached, valid):
    """Write new tokens behind the ``seqlen_cached`` of sequence ``b``; return them as the cache holds them.

    ``row`` is where they lie among the new tokens, ``token`` which of their sequence's they are (vectors; ``b`` is a number,
    or of packed tokens a vector too). What does not fit the cache, or would go to no page, is not written anywhere.
    """
    position = seqlen_cached + token
    fits = (token >= 0) & (seqlen_cached < problem.cache.capacity - token)  # in this form no length overflows
    valid = valid & (seqlen_cached >= 0) & fits
    if tensors.block_table is None:
        page = token * 0 + b
        if tensors.cache_batch_idx is not None:
            page = token * 0 + tl.load(tensors.cache_batch_idx + b)
        slot = position
    else:
        table = tensors.block_table + b.to(tl.int64) * problem.cache.table_width
        page = tl.load(table + position // problem.cache.PAGE_SIZE, valid, other=-1)
        slot = position % problem.cache.PAGE_SIZE
    return write_tokens(tensors, problem, b, kv_head, row, position, page, slot, valid)


@triton.jit
def write_tokens(tensors, problem, b, kv_head, row, position, page, slot, valid):
    """Rotate the keys of new tokens to their positions, and put keys and values in their slots, if there is such a page."""
    kv_head = kv_head // problem.cache.SHARE
    k_lead, v_lead = leads_of(problem, kv_head)
    rows = row.to(tl.int64)
    new = in_elements(problem.append.k_strides)
    source = tensors.k_new + b.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head + rows * new.token
    k, k_tail = load_rotated_parts(tensors, problem, source, valid, position, k_lead)

    new = in_elements(problem.append.v_strides)
    d = tl.arange(0, problem.cache.BLOCK_DV) - v_lead
    source = tensors.v_new + b.to(tl.int64) * new.batch + kv_head.to(tl.int64) * new.head + rows * new.token
    is_value = (d >= 0) & (d < problem.cache.DV)
    v = tl.load(source[:, None] + d[None, :], valid[:, None] & is_value[None, :], other=0.0)

    written = valid & (page >= 0) & (page < problem.cache.num_pages)
    k, k_tail, v, k_scales, v_scales = store_kv(tensors, problem, b, kv_head, page, slot, k, k_tail, v, written)
    return KVTile(k, k_tail, v, k_scales, v_scales, position)


@triton.jit
def packed_sequence_of(tensors, problem, tile, token):
    """The sequences that packed new tokens (a vector) belong to; behind the last one: the batch size."""
    b = token * 0
    for start in range(0, problem.batch_size, tile.BLOCK_B):
        some = start + tl.arange(0, tile.BLOCK_B)
        ends = tl.load(tensors.cu_seqlens_new + 1 + some, some < problem.batch_size, other=2**31 - 1)
        b += tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), 1)
    return b


@triton.jit
def kv_write(tensors: WriteTensors, problem: WriteParams, tile: WriteTile):
    """A CTA writes BLOCK_NEW new tokens of one KV head: of one sequence, or of all where they are packed."""
    kv_head = tl.program_id(0)
    b = tl.program_id(1)
    token = tl.program_id(2) * tile.BLOCK_NEW + tl.arange(0, tile.BLOCK_NEW)
    valid = token < problem.append.seqlen_new
    if tensors.slot_mapping is not None:  # each token is a sequence of its own
        where = tl.load(tensors.slot_mapping + token, valid, other=-1)
        page = tl.where(where < 0, -1, where // problem.cache.PAGE_SIZE)
        slot = where % problem.cache.PAGE_SIZE
        write_tokens(tensors, problem, token, kv_head, token, token, page, slot, valid)
    elif tensors.cu_seqlens_new is not None:
        of_token = packed_sequence_of(tensors, problem, tile, token)
        valid = valid & (of_token < problem.batch_size)
        seqlen_cached = tl.load(tensors.seqused_k + of_token, valid, other=-1)
        first = clamp(tl.load(tensors.cu_seqlens_new + of_token, valid, other=0), 0, problem.append.seqlen_new)
        append_tokens(tensors, problem, of_token, kv_head, token, token - first, seqlen_cached, valid)
    else:
        append_tokens(tensors, problem, b, kv_head, token, token, tl.load(tensors.seqused_k + b), valid)
