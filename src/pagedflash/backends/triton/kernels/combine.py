"""``combine``: reduces the splits that ``decode`` leaves, by their running maximum and sum.

Where a work tile has few splits, this is the last stage of ``decode`` itself: each CTA that has one counts up a semaphore
after it has stored it, and the one that finds all others there reduces them (``is_last``, ``reduce_few``). Where there are
many splits, one CTA would take too long: then a kernel of its own has a CTA for each row, or for a few.
Splits are reduced in their own order, so results do not depend on which CTA comes last.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .output import store_output
from .params import DecodeTile, ProblemParams, Tensors
from .schedule import cta_of, locate_sequence, sequence_work, share_tiles
from .sequence import load_rows
from .softmax import SoftmaxState, raise_max


@triton.jit
def combine(tensors: Tensors, problem: ProblemParams, tile: DecodeTile):
    """REDUCE_ROWS rows of one work tile. If PDL, it is launched while ``decode`` still runs."""
    kv_head = tl.program_id(0) % problem.cache.HEADS
    row = tl.program_id(0) // problem.cache.HEADS * tile.REDUCE_ROWS + tl.arange(0, tile.REDUCE_ROWS)
    b = tl.program_id(1)

    # ---- Which CTAs of decode have its splits ----
    first_tile, total_tiles, longest, work_tiles = locate_sequence(tensors, problem, tile, b, tl.arange(0, tile.BLOCK_B))
    tiles = sequence_work(tensors, problem, tile, b, b < problem.queries.batch_size).tiles
    first_tile += kv_head * tiles
    work_tile = b * problem.cache.HEADS + kv_head
    shares = share_tiles(total_tiles, longest, work_tiles, tile.num_ctas)
    first = work_tile + cta_of(first_tile, shares)
    last = work_tile + cta_of(first_tile + tiles - 1, shares)
    first_row, owned_rows = load_rows(tensors, problem, b, True)
    owned = row < owned_rows * problem.queries.GROUP

    # ---- The splits, some at a time ----
    if tile.PDL:
        gdc_wait()
    if first >= last:  # its CTA has stored the output, or there was nothing to do
        return
    d = tl.arange(0, problem.cache.BLOCK_DV)
    acc = tl.zeros([tile.REDUCE_ROWS, problem.cache.BLOCK_DV], tl.float32)
    row_max = tl.full([tile.REDUCE_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.REDUCE_ROWS], tl.float32)
    maxima, sums = split_states(tensors, problem, tile)
    for start in range(first, last + 1, tile.REDUCE_SPLITS):
        split = start + tl.arange(0, tile.REDUCE_SPLITS)
        there = (split <= last)[:, None] & owned[None, :]
        rows = split.to(tl.int64)[:, None] * tile.ROWS + row[None, :]
        split_max = tl.load(maxima + rows, there, other=float("-inf"))
        split_sum = tl.load(sums + rows, there, other=0.0)
        pointers = tensors.partials + rows[:, :, None] * problem.cache.BLOCK_DV + d[None, None, :]
        split_acc = tl.load(pointers, there[:, :, None], other=0.0)

        row_max, subtrahend, alpha = raise_max(row_max, tl.max(split_max, 0), True)
        weights = tl.exp2(split_max - subtrahend[None, :])
        acc = acc * alpha[:, None] + tl.sum(split_acc * weights[:, :, None], 0)
        row_sum = row_sum * alpha + tl.sum(split_sum * weights, 0)

    i = row // problem.queries.GROUP
    head = kv_head * problem.queries.GROUP + row % problem.queries.GROUP
    state = SoftmaxState(acc, row_max, row_sum)
    store_output(tensors, problem, state, b, first_row, i, kv_head, head, owned, d)


@triton.jit
def is_last(semaphore, others):
    """Whether the ``others`` have all left their splits; the last one puts the semaphore back to 0, for the next call."""
    tl.debug_barrier()  # the whole CTA's stores come before it counts
    last = tl.atomic_add(semaphore, 1, sem="acq_rel") == others
    if last:
        tl.store(semaphore, 0)
    return last


@triton.jit
def reduce_few(tensors, problem, tile, first, last, row, columns, owned):
    """The state of rows (a vector) ``owned``, from splits ``first`` to ``last``; REDUCE_SPLITS are loaded together."""
    row_sum = (row * 0).to(tl.float32)
    row_max = row_sum + float("-inf")
    acc = row_sum[:, None] + (columns * 0).to(tl.float32)[None, :]
    maxima, sums = split_states(tensors, problem, tile)
    for start in range(first, last + 1, tile.REDUCE_SPLITS):
        for step in tl.static_range(tile.REDUCE_SPLITS):
            split = start + step
            there = (split <= last) & owned
            rows = split.to(tl.int64) * tile.ROWS + row
            # Past the L1 cache: other SMs have just written them.
            split_max = tl.load(maxima + rows, there, other=float("-inf"), cache_modifier=".cg")
            split_sum = tl.load(sums + rows, there, other=0.0, cache_modifier=".cg")
            pointers = tensors.partials + rows[:, None] * problem.cache.BLOCK_DV + columns[None, :]
            split_acc = tl.load(pointers, there[:, None], other=0.0, cache_modifier=".cg")

            row_max, subtrahend, alpha = raise_max(row_max, split_max, True)
            weight = tl.exp2(split_max - subtrahend)
            acc = acc * alpha[:, None] + split_acc * weight[:, None]
            row_sum = row_sum * alpha + split_sum * weight
    return SoftmaxState(acc, row_max, row_sum)


@triton.jit
def split_states(tensors, problem, tile):
    """Where the maxima and the sums lie, behind the accumulators ``(splits, ROWS, BLOCK_DV)`` of one buffer."""
    splits = problem.queries.batch_size * problem.cache.HEADS + tile.num_ctas
    maxima = tensors.partials + tl.cast(splits, tl.int64) * tile.ROWS * problem.cache.BLOCK_DV
    return maxima, maxima + splits * tile.ROWS


@triton.jit
def store_split(tensors, problem, tile, split, state, row, columns, owned):
    """Leave the softmax state of rows (a vector) ``owned`` to be reduced."""
    rows = split.to(tl.int64) * tile.ROWS + row
    maxima, sums = split_states(tensors, problem, tile)
    tl.store(tensors.partials + rows[:, None] * problem.cache.BLOCK_DV + columns[None, :], state.acc, owned[:, None])
    tl.store(maxima + rows, state.row_max, owned)
    tl.store(sums + rows, state.row_sum, owned)
