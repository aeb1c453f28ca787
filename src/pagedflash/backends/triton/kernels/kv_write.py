"""``kv_write``: rotates the new keys and puts new keys and values into the cache."""

import triton
import triton.language as tl

from .rotary import load_rotated


@triton.jit
def kv_write(
    k,
    v,
    k_cache,
    v_cache,
    seq_lens,
    block_table,
    cache_batch_idx,
    rotary_cos,
    rotary_sin,
    k_batch_stride: tl.int64,
    k_token_stride: tl.int64,
    k_head_stride: tl.int64,
    v_batch_stride: tl.int64,
    v_token_stride: tl.int64,
    v_head_stride: tl.int64,
    k_page_stride: tl.int64,
    k_slot_stride: tl.int64,
    k_cache_head_stride: tl.int64,
    v_page_stride: tl.int64,
    v_slot_stride: tl.int64,
    v_cache_head_stride: tl.int64,
    new_tokens: tl.int32,
    capacity: tl.int32,
    table_width: tl.int32,
    num_pages: tl.int32,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A program writes BLOCK_T new tokens of one KV head of one sequence."""
    head = tl.program_id(0)
    b = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)

    # ---- The slot of each token. What does not fit the table or names no page is not written anywhere. ----
    before = tl.load(seq_lens + b)
    position = before + token
    written = (token < new_tokens) & (before >= 0) & (position < capacity)
    if PAGE_SIZE == 0:
        page = token * 0 + b
        if cache_batch_idx is not None:
            page = token * 0 + tl.load(cache_batch_idx + b)
        slot = position
    else:
        page = tl.load(block_table + b.to(tl.int64) * table_width + position // PAGE_SIZE, written, other=-1)
        slot = position % PAGE_SIZE
    written = written & (page >= 0) & (page < num_pages)
    page = page.to(tl.int64) * ALIGN
    slot = slot.to(tl.int64) * ALIGN
    token = token.to(tl.int64) * ALIGN
    sequence = b.to(tl.int64) * ALIGN
    head = head.to(tl.int64) * ALIGN

    # ---- Keys, rotated at the position they take ----
    d = tl.arange(0, BLOCK_D)
    source = k + sequence * k_batch_stride + head * k_head_stride + token * k_token_stride
    keys = load_rotated(source, written, position, rotary_cos, rotary_sin, D, BLOCK_D, ROTARY_DIM, INTERLEAVED)
    target = k_cache + page * k_page_stride + slot * k_slot_stride + head * k_cache_head_stride
    tl.store(target[:, None] + d[None, :], keys, written[:, None] & (d < D)[None, :])

    # ---- Values ----
    d = tl.arange(0, BLOCK_DV)
    stored = written[:, None] & (d < DV)[None, :]
    source = v + sequence * v_batch_stride + head * v_head_stride + token * v_token_stride
    target = v_cache + page * v_page_stride + slot * v_slot_stride + head * v_cache_head_stride
    tl.store(target[:, None] + d[None, :], tl.load(source[:, None] + d[None, :], stored, other=0.0), stored)
