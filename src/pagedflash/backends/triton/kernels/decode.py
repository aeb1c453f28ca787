# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
"""``decode``: few queries a sequence, many keys. Bound by how fast the keys and values can be read.

All query rows that share a KV head (its group of query heads, times the queries) are the rows of one tile, so that
each key is read once. The work is split as :mod:`.schedule` says: nothing is read on the host, a captured graph follows
when lengths change, and one long sequence among short ones occupies all processors. A part leaves its softmax state for
``combine``, which is a stage of this kernel if there are tickets, else a kernel behind it; a program that has a segment to
itself, as all have where the host says so (WHOLE), stores the result.

New tokens are appended here too: the program that has a segment's last tile rotates and writes them, and attends to
them from registers. Nobody reads a slot of the cache that is written in the same launch.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .combine import is_last, merge_few, store_partial
from .keys import load_pages, load_tile, locate_sequence
from .kv_write import write_tokens
from .queries import clear_rows_behind, load_queries, load_slopes, query_rows, store_result, visible_bounds
from .schedule import line_position, program_at, sequence_at, sequence_tiles, share_begin, sharer_count
from .softmax import attend_tile


@triton.jit
def decode(
    tickets,
    partials,
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
    k_new_batch_stride: tl.int64,
    k_new_token_stride: tl.int64,
    k_new_head_stride: tl.int64,
    v_new_batch_stride: tl.int64,
    v_new_token_stride: tl.int64,
    v_new_head_stride: tl.int64,
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
    fused_tokens: tl.int32,
    num_pages: tl.int32,
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
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_DEPENDENT: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    PAGED: tl.constexpr = PAGE_SIZE > 0
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    program = tl.program_id(0)
    programs = tl.num_programs(0)

    if HAS_DEPENDENT:
        gdc_launch_dependents()  # combine may be set up while this runs

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
        clear_rows_behind(out, lse, cu_seqlens_q, batch, total_rows, program, programs, HEADS, DV, BLOCK_DV)

    # ---- This program's share of the line of tiles, [place, share_end), and the sequence it begins in ----
    if WHOLE:
        b = program // KV_HEADS
        tiles, _, _, _, _ = sequence_tiles(
            b, b < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, fused_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        sequence_begin = 0
        place = program % KV_HEADS * tiles
        share_end = place + tiles
    else:
        _, line, longest = line_position(
            0, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            batch, capacity, new_tokens, fused_tokens, dense_queries, window_left, KV_HEADS, HAS_LEFT, BLOCK_N, BLOCK_B,
        )  # fmt: skip
        sharers = sharer_count(line, longest, batch * KV_HEADS, programs)
        place = share_begin(program, sharers, line)
        share_end = share_begin(program + 1, sharers, line)
        b, sequence_begin = sequence_at(
            place, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            batch, capacity, new_tokens, fused_tokens, dense_queries, window_left, KV_HEADS, HAS_LEFT, BLOCK_N, BLOCK_B,
        )  # fmt: skip

    # ---- Segment by segment ----
    row = tl.arange(0, BLOCK_M)
    i = row // GROUP
    while place < share_end:
        tiles, keys, queries, begin, end = sequence_tiles(
            b, b < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, fused_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        kv_head = (place - sequence_begin) // tiles
        segment_begin = sequence_begin + kv_head * tiles
        first_tile = begin // BLOCK_N + (place - segment_begin)
        count = tl.minimum(segment_begin + tiles, share_end) - place

        # The pages of a tile are looked up one tile ahead; those of the first one while the queries are on their way.
        cache_row, offset = locate_sequence(b, cu_seqlens_k, cache_batch_idx, PAGED)
        table = block_table
        if PAGED:
            table += b.to(tl.int64) * table_width
        pages = load_pages(table, cache_row, first_tile, begin, end, PAGE_SIZE, BLOCK_N)

        # The rows: query i of the sequence for query head `head`.
        head = kv_head * GROUP + row % GROUP
        first_row, owned_rows = query_rows(b, cu_seqlens_q, dense_queries)
        used = (i < queries) & (keys >= 0)
        position = i + keys - queries
        first, last = visible_bounds(
            position, begin, tl.maximum(keys, 0), used, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        last_cached = tl.minimum(last, end - 1)
        slope = load_slopes(alibi_slopes, b, head, used, HEADS, SLOPES_PER_SEQUENCE)
        q_tile = load_queries(
            q, b, first_row, i, head, used, seqused_k, cu_seqlens_q, rotary_cos, rotary_sin, rotary_rows,
            q_batch_stride, q_row_stride, q_head_stride,
            D, BLOCK_D, ROTARY_DIM, INTERLEAVED, HAS_LEFT or HAS_RIGHT,
        )  # fmt: skip

        # The keys.
        k_head = k + kv_head * k_head_stride
        v_head = v + kv_head * v_head_stride
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        spread_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
            acc, row_max, spread_sum = attend_tile(
                acc, row_max, spread_sum, q_tile, k_tile, v_tile, slots, first, last_cached, position, slope, scale, softcap,
                HAS_SOFTCAP, HAS_ALIBI, True, True, PRECISION,
            )  # fmt: skip
        row_sum = tl.sum(spread_sum, 1)

        # The new tokens, with the last tile.
        if BLOCK_NEW > 0:
            if place + count == segment_begin + tiles:
                before = keys - fused_tokens
                token = tl.arange(0, BLOCK_NEW)
                sequence = b.to(tl.int64) * ALIGN
                new_head = kv_head.to(tl.int64) * ALIGN
                new_k, new_v = write_tokens(
                    k_new + sequence * k_new_batch_stride + new_head * k_new_head_stride,
                    v_new + sequence * v_new_batch_stride + new_head * v_new_head_stride,
                    k_head, v_head, b, token, fused_tokens, tl.where(keys < 0, -1, before), block_table, cache_batch_idx,
                    rotary_cos, rotary_sin, k_new_token_stride * ALIGN, v_new_token_stride * ALIGN,
                    k_page_stride, k_slot_stride, v_page_stride, v_slot_stride,
                    capacity, table_width, num_pages, D, DV, PAGE_SIZE, ROTARY_DIM, INTERLEAVED, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                acc, row_max, row_sum = attend_tile(
                    acc, row_max, row_sum, q_tile, new_k, new_v, before + token, first, last, position, slope, scale,
                    softcap, HAS_SOFTCAP, HAS_ALIBI, True, False, PRECISION,
                )  # fmt: skip

        # The result, or a part of it.
        if not WHOLE:
            if count < tiles:
                segment = b * KV_HEADS + kv_head
                parts = batch * KV_HEADS + programs
                store_partial(partials, parts, segment + program, acc, row_max, row_sum, ROWS, BLOCK_M, BLOCK_DV)
                if tickets is not None:
                    first_sharer = program_at(segment_begin, sharers, line)
                    last_sharer = program_at(segment_begin + tiles - 1, sharers, line)
                    if is_last(tickets + segment, last_sharer - first_sharer):
                        merged, merged_max, merged_sum = merge_few(
                            partials, parts, segment + first_sharer, segment + last_sharer, ROWS, BLOCK_DV, BLOCK_PARTS
                        )
                        row_of_all = tl.arange(0, ROWS)
                        store_result(
                            out, lse, merged, merged_max, merged_sum, b, first_row, row_of_all // GROUP,
                            kv_head * GROUP + row_of_all % GROUP, row_of_all // GROUP < owned_rows, sinks,
                            cu_seqlens_q, total_rows, dense_queries, HEADS, DV, BLOCK_DV,
                        )  # fmt: skip
        if count == tiles:
            store_result(
                out, lse, acc, row_max, row_sum, b, first_row, i, head, i < owned_rows, sinks,
                cu_seqlens_q, total_rows, dense_queries, HEADS, DV, BLOCK_DV,
            )  # fmt: skip

        place += count
        if place == sequence_begin + tiles * KV_HEADS:
            b += 1
            sequence_begin = place
