"""``decode``: few queries a sequence, many keys. Bound by how fast the keys and values can be read.

All query rows that share a KV head (its group of query heads, times the queries) are the rows of one tile, so that
each key is read once. The work is a line of tiles of BLOCK_N keys, sequence by sequence, head by head::

    sequence       0               1                  2
    KV head     0     1     0        1        0   1
    tiles      [aaaa][aaaa][bbbbbbb][bbbbbbb][cc][cc]      only the tiles that hold a visible key
    programs   |--0---|---1---|---2---|---3---|--4--|      equal shares, whatever the lengths

Every program finds its share from the lengths on the device: nothing is read on the host, a captured graph follows
when lengths change, and one long sequence among short ones occupies all processors. A segment is the part of one
(sequence, head) within one share. A program that holds a whole one stores the result; otherwise each leaves a partial
result, and the program that arrives last (counted in tiles) merges them and sets the counter back to zero.
Source of the split: Dao et al., "Flash-Decoding" (2023); of the equal shares: Osama et al., "Stream-K" (2023).
"""

import triton
import triton.language as tl

from .combine import combine, partial_slot, store_partial
from .keys import first_slot, key_count, load_pages, load_tile, locate_sequence, visible_slots
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
def sequence_tiles(
    b,
    inside,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    cache_leftpad,
    capacity,
    new_tokens,
    dense_queries,
    window_left,
    HAS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(tiles of each KV head of sequence ``b``, its keys, its queries, its visible slots from, to)

    A sequence without visible keys counts one tile, so that somebody writes its zeros.
    """
    keys = key_count(b, inside, cu_seqlens_k, seqused_k, capacity, new_tokens)
    queries = query_count(b, inside, cu_seqlens_q, seqused_q, dense_queries)
    first = first_slot(b, inside, cache_leftpad)
    begin, end = visible_slots(first, keys, queries, window_left, HAS_LEFT)
    tiles = tl.maximum(tl.cdiv(end, BLOCK_N) - begin // BLOCK_N, 1)
    return tl.where(inside, tiles, 0), keys, queries, begin, end


@triton.jit
def decode(
    q,
    k,
    v,
    out,
    lse,
    partials,
    arrivals,
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
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    PAGED: tl.constexpr = PAGE_SIZE > 0
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    program = tl.program_id(0)
    programs = tl.num_programs(0)

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

    if cu_seqlens_q is not None:
        clear_rows_behind(out, lse, cu_seqlens_q, batch, total_rows, program, programs, HEADS, DV, BLOCK_DV)

    # ---- This program's share of the line of tiles ----
    line = 0
    for start in range(0, batch, BLOCK_B):
        some = start + tl.arange(0, BLOCK_B)
        tiles, _, _, _, _ = sequence_tiles(
            some, some < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        line += tl.sum(tiles) * KV_HEADS
    share = tl.cdiv(line, programs)
    place = program * share
    share_end = tl.minimum(place + share, line)

    # ---- The sequence it begins in ----
    b = 0
    sequence_begin = 0
    for start in range(0, batch, BLOCK_B):
        some = start + tl.arange(0, BLOCK_B)
        tiles, _, _, _, _ = sequence_tiles(
            some, some < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        ends = sequence_begin + tl.cumsum(tiles, 0) * KV_HEADS
        passed = (some < batch) & (ends <= place)
        if start == b:  # all before were passed
            b += tl.sum(passed.to(tl.int32))
            sequence_begin += tl.sum(tl.where(passed, tiles, 0)) * KV_HEADS

    # ---- Segment by segment ----
    row = tl.arange(0, BLOCK_M)
    i = row // GROUP
    while place < share_end:
        tiles, keys, queries, begin, end = sequence_tiles(
            b, b < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        kv_head = (place - sequence_begin) // tiles
        segment_begin = sequence_begin + kv_head * tiles
        first_tile = begin // BLOCK_N + (place - segment_begin)
        count = tl.minimum(segment_begin + tiles, share_end) - place

        # The rows: query i of the sequence for query head `head`.
        head = kv_head * GROUP + row % GROUP
        first_row, owned_rows = query_rows(b, cu_seqlens_q, dense_queries)
        used = (i < queries) & (keys >= 0)
        position = i + keys - queries
        first, last = visible_bounds(position, begin, end, used, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        slope = load_slopes(alibi_slopes, b, head, used, HEADS, SLOPES_PER_SEQUENCE)
        q_tile = load_queries(
            q, b, first_row, i, head, used, seqused_k, cu_seqlens_q, rotary_cos, rotary_sin, rotary_rows,
            q_batch_stride, q_row_stride, q_head_stride,
            D, BLOCK_D, ROTARY_DIM, INTERLEAVED, HAS_LEFT or HAS_RIGHT,
        )  # fmt: skip

        # The keys. The pages of a tile are looked up one tile ahead.
        cache_row, offset = locate_sequence(b, cu_seqlens_k, cache_batch_idx, PAGED)
        table = block_table
        if PAGED:
            table += b.to(tl.int64) * table_width
        k_head = k + kv_head * k_head_stride
        v_head = v + kv_head * v_head_stride
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        pages = load_pages(table, cache_row, first_tile, begin, end, PAGE_SIZE, BLOCK_N)
        for tile in range(first_tile, first_tile + count):
            k_tile = load_tile(
                k_head, pages, tile, offset, begin, end, k_page_stride, k_slot_stride,
                PAGE_SIZE, D, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
            v_tile = load_tile(
                v_head, pages, tile, offset, begin, end, v_page_stride, v_slot_stride,
                PAGE_SIZE, DV, BLOCK_N, BLOCK_DV, True,
            )  # fmt: skip
            pages = load_pages(table, cache_row, tile + 1, begin, end, PAGE_SIZE, BLOCK_N)
            slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, q_tile, k_tile, v_tile, slots, first, last, position, slope, scale, softcap,
                HAS_SOFTCAP, HAS_ALIBI, True, PRECISION,
            )  # fmt: skip

        # The result, or a part of it.
        if count == tiles:
            store_result(
                out, lse, acc, row_max, row_sum, b, first_row, i, head, i < owned_rows, sinks,
                cu_seqlens_q, total_rows, dense_queries, HEADS, DV, BLOCK_DV,
            )  # fmt: skip
        else:
            slot = partial_slot(program, place == segment_begin)
            store_partial(partials, 2 * programs, slot, acc, row_max, row_sum, ROWS, BLOCK_M, BLOCK_DV)
            tl.debug_barrier()  # every thread's stores come before the one thread's atomic
            arrived = tl.atomic_add(arrivals + b * KV_HEADS + kv_head, count, sem="acq_rel", scope="gpu") + count
            if arrived == tiles:
                tl.store(arrivals + b * KV_HEADS + kv_head, 0)
                acc_all, max_all, sum_all = combine(
                    partials, 2 * programs, segment_begin // share, (segment_begin + tiles - 1) // share,
                    ROWS, BLOCK_DV, BLOCK_PARTS,
                )  # fmt: skip
                row_all = tl.arange(0, ROWS)
                i_all = row_all // GROUP
                head_all = kv_head * GROUP + row_all % GROUP
                store_result(
                    out, lse, acc_all, max_all, sum_all, b, first_row, i_all, head_all, i_all < owned_rows, sinks,
                    cu_seqlens_q, total_rows, dense_queries, HEADS, DV, BLOCK_DV,
                )  # fmt: skip

        place += count
        if place == sequence_begin + tiles * KV_HEADS:
            b += 1
            sequence_begin = place
