"""``combine``: merges the partial results of a segment by their running maximum and sum.

It is the last stage of ``decode``: each program that has a part of a segment leaves its softmax state and takes a ticket;
the program that finds all other parts there merges them. So nothing is launched after ``decode``, and since parts are
merged in their own order, results do not depend on which program comes last.
"""

import triton
import triton.language as tl

from .queries import store_result


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
    """Leave the softmax state of a part."""
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    real = row < ROWS
    rows = part.to(tl.int64) * ROWS + row
    maxima, sums = partial_states(partials, parts, ROWS, BLOCK_DV)
    tl.store(partials + rows[:, None] * BLOCK_DV + d[None, :], acc, real[:, None])
    tl.store(maxima + rows, row_max, real)
    tl.store(sums + rows, row_sum, real)


@triton.jit
def is_last(ticket, others):
    """Whether the ``others`` have all left their parts; the last one puts the ticket back to 0, for the next call."""
    tl.debug_barrier()  # the whole program's stores come before its ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == others
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def combine(
    partials,
    parts,
    first,
    last,
    out,
    lse,
    b,
    kv_head,
    first_row,
    owned_rows,
    sinks,
    cu_seqlens_q,
    total_rows,
    dense_queries,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Merge parts ``first`` to ``last`` of a segment, BLOCK_PARTS at a time, and store the result."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    maxima, sums = partial_states(partials, parts, ROWS, BLOCK_DV)
    for start in range(first, last + 1, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = (part <= last)[:, None]
        rows = part.to(tl.int64)[:, None] * ROWS + row[None, :]
        # Past the nearest cache: other processors have just written them.
        part_max = tl.load(maxima + rows, there, other=float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(sums + rows, there, other=0.0, cache_modifier=".cg")
        pointers = partials + rows[:, :, None] * BLOCK_DV + d[None, None, :]
        values = tl.load(pointers, there[:, :, None], other=0.0, cache_modifier=".cg")

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
