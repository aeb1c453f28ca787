"""``combine``: merges the partial results that ``decode`` leaves, by their running maximum and sum.

Where a segment has few parts, this is the last stage of ``decode`` itself: each program that has a part takes a ticket
after it has stored it, and the one that finds all others there merges them (``is_last``, ``merge_few``). Where there are
many parts, one program would take too long: then a kernel of its own has a program for each row.
Parts are merged in their own order, so results do not depend on which program comes last.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .queries import query_rows, store_result
from .schedule import line_position, program_at, sequence_tiles, sharer_count


@triton.jit
def combine(
    partials,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    cache_leftpad,
    sinks,
    batch: tl.int32,
    total_rows: tl.int32,
    dense_queries: tl.int32,
    capacity: tl.int32,
    new_tokens: tl.int32,
    fused_tokens: tl.int32,
    window_left: tl.int32,
    programs: tl.int32,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    SOME_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """SOME_ROWS rows of one (sequence, KV head). If DEPENDENT, it is launched while ``decode`` still runs."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    kv_head = tl.program_id(0) % KV_HEADS
    row = tl.program_id(0) // KV_HEADS * SOME_ROWS + tl.arange(0, SOME_ROWS)
    b = tl.program_id(1)

    # ---- Which programs of decode hold parts of it ----
    sequence_begin, line, longest = line_position(
        b, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
        batch, capacity, new_tokens, fused_tokens, dense_queries, window_left, KV_HEADS, HAS_LEFT, BLOCK_N, BLOCK_B,
    )  # fmt: skip
    tiles, _, _, _, _ = sequence_tiles(
        b, b < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
        capacity, new_tokens, fused_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
    )  # fmt: skip
    segment_begin = sequence_begin + kv_head * tiles
    segment = b * KV_HEADS + kv_head
    sharers = sharer_count(line, longest, batch * KV_HEADS, programs)
    first = segment + program_at(segment_begin, sharers, line)
    last = segment + program_at(segment_begin + tiles - 1, sharers, line)
    first_row, owned_rows = query_rows(b, cu_seqlens_q, dense_queries)

    # ---- The parts, some at a time ----
    if DEPENDENT:
        gdc_wait()
    if first == last:  # its program has stored the result
        return
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([SOME_ROWS, BLOCK_DV], tl.float32)
    row_max = tl.full([SOME_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([SOME_ROWS], tl.float32)
    maxima, sums = partial_states(partials, batch * KV_HEADS + programs, ROWS, BLOCK_DV)
    for start in range(first, last + 1, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = (part <= last)[:, None]
        rows = part.to(tl.int64)[:, None] * ROWS + row[None, :]
        part_max = tl.load(maxima + rows, there, other=float("-inf"))
        part_sum = tl.load(sums + rows, there, other=0.0)
        values = tl.load(partials + rows[:, :, None] * BLOCK_DV + d[None, None, :], there[:, :, None], other=0.0)

        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(part_max - pivot[None, :])
        shrink = tl.exp2(row_max - pivot)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        row_sum = row_sum * shrink + tl.sum(part_sum * weights, 0)
        row_max = new_max

    i = row // GROUP
    head = kv_head * GROUP + row % GROUP
    store_result(
        out, lse, acc, row_max, row_sum, b, first_row, i, head, i < owned_rows, sinks,
        cu_seqlens_q, total_rows, dense_queries, HEADS, DV, BLOCK_DV,
    )  # fmt: skip


@triton.jit
def is_last(ticket, others):
    """Whether the ``others`` have all left their parts; the last one puts the ticket back to 0, for the next call."""
    tl.debug_barrier()  # the whole program's stores come before its ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == others
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def merge_few(
    partials,
    parts,
    first,
    last,
    ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The state of all ROWS rows from parts ``first`` to ``last``, of which BLOCK_PARTS are on their way together."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    maxima, sums = partial_states(partials, parts, ROWS, BLOCK_DV)
    for start in range(first, last + 1, BLOCK_PARTS):
        for step in tl.static_range(BLOCK_PARTS):
            part = start + step
            there = (part <= last) & (row >= 0)
            rows = part.to(tl.int64) * ROWS + row
            # Past the nearest cache: other processors have just written them.
            part_max = tl.load(maxima + rows, there, other=float("-inf"), cache_modifier=".cg")
            part_sum = tl.load(sums + rows, there, other=0.0, cache_modifier=".cg")
            pointers = partials + rows[:, None] * BLOCK_DV + d[None, :]
            values = tl.load(pointers, there[:, None], other=0.0, cache_modifier=".cg")

            new_max = tl.maximum(row_max, part_max)
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(part_max - pivot)
            shrink = tl.exp2(row_max - pivot)
            acc = acc * shrink[:, None] + values * weight[:, None]
            row_sum = row_sum * shrink + part_sum * weight
            row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def partial_states(partials, parts, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Where the maxima and the sums lie, behind the values ``(parts, ROWS, BLOCK_DV)`` of one buffer."""
    maxima = partials + parts.to(tl.int64) * ROWS * BLOCK_DV
    return maxima, maxima + parts * ROWS


@triton.jit
def store_partial(
    partials,
    parts,
    part,
    acc,
    row_max,
    row_sum,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Leave a softmax state for ``combine``."""
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    real = row < ROWS
    rows = part.to(tl.int64) * ROWS + row
    maxima, sums = partial_states(partials, parts, ROWS, BLOCK_DV)
    tl.store(partials + rows[:, None] * BLOCK_DV + d[None, :], acc, real[:, None])
    tl.store(maxima + rows, row_max, real)
    tl.store(sums + rows, row_sum, real)
