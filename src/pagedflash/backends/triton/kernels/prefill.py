# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
r"""``prefill``: many queries a sequence. Bound by the matrix units.

A program takes BLOCK_M queries of one head and walks the tiles of keys that any of them sees. Only the tiles at the
edges of what they see are masked::

    keys        ->
    queries  |  . . / # # # # \ . .        .  no query of the block sees it: not visited
             |  . . . / # # # # \ .        /  left edge of a window, or left padding: masked
             v                             #  seen by every query: no mask
                                           \  the diagonal, or the end of the keys: masked

Blocks with the most keys (the last ones, under a causal mask) start first. Query heads of one KV head run side by side,
so that they find its keys in the L2 cache. Pages are read where they lie.
Source: Dao, "FlashAttention-2" (2023).
"""

import triton
import triton.language as tl

from .keys import first_slot, key_count, load_pages, load_tile, locate_sequence
from .queries import (
    clear_rows_behind,
    load_queries,
    load_slopes,
    query_count,
    query_rows,
    store_result,
    visible_bounds,
)
from .softmax import attend_tile


@triton.jit
def attend_tiles(
    acc,
    row_max,
    row_sum,
    q_tile,
    k_head,
    v_head,
    table,
    cache_row,
    offset,
    first_tile,
    end_tile,
    begin,
    end,
    first,
    last,
    position,
    slope,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tiles ``first_tile`` to ``end_tile`` into the rows' softmax state. Pages are looked up one tile ahead."""
    pages = load_pages(table, cache_row, first_tile, begin, end, PAGE_SIZE, BLOCK_N)
    for tile in range(first_tile, end_tile):
        k_tile = load_tile(
            k_head, pages, tile, offset, begin, end, k_page_stride, k_slot_stride,
            PAGE_SIZE, D, BLOCK_N, BLOCK_D, MASKED,
        )  # fmt: skip
        v_tile = load_tile(
            v_head, pages, tile, offset, begin, end, v_page_stride, v_slot_stride,
            PAGE_SIZE, DV, BLOCK_N, BLOCK_DV, MASKED,
        )  # fmt: skip
        pages = load_pages(table, cache_row, tile + 1, begin, end, PAGE_SIZE, BLOCK_N)
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q_tile, k_tile, v_tile, slots, first, last, position, slope, scale, softcap,
            HAS_SOFTCAP, HAS_ALIBI, MASKED, False, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def prefill(
    out,
    lse,
    q,
    k,
    v,
    k_new,
    v_new,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    cache_batch_idx,
    cache_leftpad,
    block_table,
    rotary_cos,
    rotary_sin,
    alibi_slopes,
    sinks,
    q_batch_stride: tl.int64,
    q_row_stride: tl.int64,
    q_head_stride: tl.int64,
    k_page_stride: tl.int64,
    k_slot_stride: tl.int64,
    k_head_stride: tl.int64,
    v_page_stride: tl.int64,
    v_slot_stride: tl.int64,
    v_head_stride: tl.int64,
    batch: tl.int32,
    total_rows: tl.int32,
    dense_queries: tl.int32,
    capacity: tl.int32,
    new_tokens: tl.int32,
    table_width: tl.int32,
    rotary_rows: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    scale: tl.float32,
    softcap: tl.float32,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SLOPES_PER_SEQUENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    PAGED: tl.constexpr = PAGE_SIZE > 0
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    head = tl.program_id(0)
    b = tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)

    # Strides come divided by ALIGN, so that the compiler sees by what they can be divided.
    q_batch_stride *= ALIGN
    q_row_stride *= ALIGN
    q_head_stride *= ALIGN
    k_page_stride *= ALIGN
    k_slot_stride *= ALIGN
    k_head_stride *= ALIGN
    v_page_stride *= ALIGN
    v_slot_stride *= ALIGN
    v_head_stride *= ALIGN
    if SAME_STRIDES:  # keys and values of a token have the same offset: it is computed once
        v_page_stride = k_page_stride
        v_slot_stride = k_slot_stride
        v_head_stride = k_head_stride

    if cu_seqlens_q is not None:
        if (head == 0) & (b == 0):
            clear_rows_behind(out, lse, cu_seqlens_q, batch, total_rows, block, tl.num_programs(2), HEADS, DV, BLOCK_DV)

    first_row, owned_rows = query_rows(b, cu_seqlens_q, dense_queries)
    if block * BLOCK_M >= owned_rows:
        return

    # ---- The rows ----
    keys = key_count(b, True, cu_seqlens_k, seqused_k, capacity, new_tokens)
    queries = query_count(b, True, cu_seqlens_q, seqused_q, dense_queries)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = (i < queries) & (keys >= 0)
    shift = keys - queries  # query i sits at key position i + shift
    position = i + shift

    # ---- The slots that any of them sees, [begin, end), and those that all of them see, [all_begin, all_end) ----
    first_position = block * BLOCK_M + shift
    last_position = tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1 + shift
    begin = first_slot(b, True, cache_leftpad)
    end = tl.maximum(keys, 0)
    all_begin = begin
    all_end = end
    if HAS_LEFT:
        all_begin = tl.maximum(begin, last_position - window_left)
        begin = tl.maximum(begin, first_position - window_left)
    if HAS_RIGHT:
        all_end = tl.minimum(end, first_position + window_right + 1)
        end = tl.minimum(end, last_position + window_right + 1)
    end = tl.where(block * BLOCK_M < queries, tl.maximum(end, 0), 0)
    begin = tl.minimum(begin, end)
    first, last = visible_bounds(position, begin, end, used, window_left, window_right, HAS_LEFT, HAS_RIGHT)

    slope = load_slopes(alibi_slopes, b, head + i * 0, used, HEADS, SLOPES_PER_SEQUENCE)
    q_tile = load_queries(
        q, b, first_row, i, head, used, seqused_k, cu_seqlens_q, rotary_cos, rotary_sin, rotary_rows,
        q_batch_stride, q_row_stride, q_head_stride,
        D, BLOCK_D, ROTARY_DIM, INTERLEAVED, HAS_LEFT or HAS_RIGHT,
    )  # fmt: skip

    # ---- The keys: left edge, the middle that needs no mask, right edge ----
    kv_head = head // GROUP
    cache_row, offset = locate_sequence(b, cu_seqlens_k, cache_batch_idx, PAGED)
    table = block_table
    if PAGED:
        table += b.to(tl.int64) * table_width
    k_head = k + kv_head * k_head_stride
    v_head = v + kv_head * v_head_stride
    first_tile = begin // BLOCK_N
    end_tile = tl.cdiv(end, BLOCK_N)
    left_end = first_tile
    if HAS_LEFT or cache_leftpad is not None:
        left_end = tl.minimum(tl.maximum(tl.cdiv(all_begin, BLOCK_N), first_tile), end_tile)
    middle_end = tl.minimum(tl.maximum(all_end // BLOCK_N, left_end), end_tile)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_LEFT or cache_leftpad is not None:
        acc, row_max, row_sum = attend_tiles(
            acc, row_max, row_sum, q_tile, k_head, v_head, table, cache_row, offset, first_tile, left_end, begin, end,
            first, last, position, slope, k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, scale, softcap,
            D, DV, PAGE_SIZE, HAS_SOFTCAP, HAS_ALIBI, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q_tile, k_head, v_head, table, cache_row, offset, left_end, middle_end, begin, end,
        first, last, position, slope, k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, scale, softcap,
        D, DV, PAGE_SIZE, HAS_SOFTCAP, HAS_ALIBI, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q_tile, k_head, v_head, table, cache_row, offset, middle_end, end_tile, begin, end,
        first, last, position, slope, k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, scale, softcap,
        D, DV, PAGE_SIZE, HAS_SOFTCAP, HAS_ALIBI, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip

    row_sum = tl.where(used, row_sum, 0.0)  # rows past the used ones saw the middle as if they were there
    store_result(
        out, lse, acc, row_max, row_sum, b, first_row, i, head + i * 0, i < owned_rows, sinks,
        cu_seqlens_q, total_rows, dense_queries, HEADS, DV, BLOCK_DV,
    )  # fmt: skip
