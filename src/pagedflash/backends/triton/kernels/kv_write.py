"""``kv_write``: rotates the new keys and puts new keys and values into the cache."""

import triton
import triton.language as tl

from .rotary import load_rotated


@triton.jit
def write_tokens(
    k_new,
    v_new,
    k_cache,
    v_cache,
    b,
    token,
    new_tokens,
    before,
    block_table,
    cache_batch_idx,
    rotary_cos,
    rotary_sin,
    k_token_stride,
    v_token_stride,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    capacity,
    table_width,
    num_pages,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Write new tokens (a vector) of one KV head behind the ``before`` tokens of sequence ``b``; return their tiles.

    The four base pointers point at the sequence (of the new tokens) and the head. What does not fit the table, or
    would go to no page, is not written anywhere.
    """
    # ---- The slot of each token ----
    position = before + token
    valid = (token < new_tokens) & (before >= 0) & (position < capacity)
    if PAGE_SIZE == 0:
        page = token * 0 + b
        if cache_batch_idx is not None:
            page = token * 0 + tl.load(cache_batch_idx + b)
        slot = position
    else:
        page = tl.load(block_table + b.to(tl.int64) * table_width + position // PAGE_SIZE, valid, other=-1)
        slot = position % PAGE_SIZE
    written = valid & (page >= 0) & (page < num_pages)
    page = page.to(tl.int64)
    slot = slot.to(tl.int64)
    token = token.to(tl.int64)

    # ---- Keys, rotated at the position they take ----
    d = tl.arange(0, BLOCK_D)
    source = k_new + token * k_token_stride
    k_tile = load_rotated(source, valid, position, rotary_cos, rotary_sin, D, BLOCK_D, ROTARY_DIM, INTERLEAVED)
    target = k_cache + page * k_page_stride + slot * k_slot_stride
    tl.store(target[:, None] + d[None, :], k_tile, written[:, None] & (d < D)[None, :])

    # ---- Values ----
    d = tl.arange(0, BLOCK_DV)
    source = v_new + token * v_token_stride
    v_tile = tl.load(source[:, None] + d[None, :], valid[:, None] & (d < DV)[None, :], other=0.0)
    target = v_cache + page * v_page_stride + slot * v_slot_stride
    tl.store(target[:, None] + d[None, :], v_tile, written[:, None] & (d < DV)[None, :])
    return k_tile, v_tile


@triton.jit
def kv_write(
    k_new,
    v_new,
    k_cache,
    v_cache,
    seq_lens,
    block_table,
    cache_batch_idx,
    rotary_cos,
    rotary_sin,
    k_batch_stride: tl.int64,
    k_token_stride: tl.int64,
    k_new_head_stride: tl.int64,
    v_batch_stride: tl.int64,
    v_token_stride: tl.int64,
    v_new_head_stride: tl.int64,
    k_page_stride: tl.int64,
    k_slot_stride: tl.int64,
    k_head_stride: tl.int64,
    v_page_stride: tl.int64,
    v_slot_stride: tl.int64,
    v_head_stride: tl.int64,
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
    head = tl.program_id(0).to(tl.int64) * ALIGN
    b = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence = b.to(tl.int64) * ALIGN
    write_tokens(
        k_new + sequence * k_batch_stride + head * k_new_head_stride,
        v_new + sequence * v_batch_stride + head * v_new_head_stride,
        k_cache + head * k_head_stride,
        v_cache + head * v_head_stride,
        b, token, new_tokens, tl.load(seq_lens + b), block_table, cache_batch_idx, rotary_cos, rotary_sin,
        k_token_stride * ALIGN, v_token_stride * ALIGN,
        k_page_stride * ALIGN, k_slot_stride * ALIGN, v_page_stride * ALIGN, v_slot_stride * ALIGN,
        capacity, table_width, num_pages, D, DV, PAGE_SIZE, ROTARY_DIM, INTERLEAVED, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
