"""``combine``: merges the partial results of one (sequence, KV head) by their running maximum and sum."""

import triton
import triton.language as tl


@triton.jit
def combine(
    partials,
    partial_slots,
    first,
    last,
    ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The merged softmax state of ``ROWS`` rows from the parts of programs ``first`` to ``last``.

    Runs inside ``decode``, in whichever program finishes last: a launch of its own would cost more than the merge.
    The parts are merged in the order of the programs, so the result does not depend on which one that is.
    """
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    maxima, sums = partial_maxima(partials, partial_slots, ROWS, BLOCK_DV)
    for start in range(first, last + 1, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = (part <= last)[:, None]
        rows = partial_slot(part, part == first)[:, None] * ROWS + row[None, :]
        part_max = tl.load(maxima + rows, there, other=float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(sums + rows, there, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partials + rows[:, :, None] * BLOCK_DV + d[None, None, :], there[:, :, None], other=0.0, cache_modifier=".cg"
        )

        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(part_max - pivot[None, :])
        shrink = tl.exp2(row_max - pivot)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        row_sum = row_sum * shrink + tl.sum(part_sum * weights, 0)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def partial_slot(program, is_first):
    """A program leaves at most two parts: of the segment it begins in (begun by another), and of the last it begins."""
    return 2 * program + is_first.to(tl.int32)


@triton.jit
def partial_maxima(partials, partial_slots, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Where the maxima and the sums lie, behind the values ``(partial_slots, ROWS, BLOCK_DV)`` of one buffer."""
    maxima = partials + partial_slots * ROWS * BLOCK_DV
    return maxima, maxima + partial_slots * ROWS


@triton.jit
def store_partial(
    partials,
    partial_slots,
    slot,
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
    rows = slot * ROWS + row
    maxima, sums = partial_maxima(partials, partial_slots, ROWS, BLOCK_DV)
    tl.store(partials + rows[:, None] * BLOCK_DV + d[None, :], acc, real[:, None])
    tl.store(maxima + rows, row_max, real)
    tl.store(sums + rows, row_sum, real)
