"""Which probabilities dropout drops: Philox 4x32-10, as :mod:`pagedflash.backends.dropout` says."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class DropoutRows(NamedTuple):
    """What the counters of each row of queries have besides the key. Nothing is read of it without dropout."""

    seed: Any
    query: Any  # (rows,)
    head: Any  # (rows,)
    b: Any


@triton.jit
def dropout_rows(tensors, problem, b, head, i):
    seed = b
    if problem.score.dropout_threshold is not None:
        seed = tl.load(tensors.dropout_seed)
    return DropoutRows(seed, i, head, b)


@triton.jit
def dropout_factors(problem, rows, slots):
    """``(rows, slots)``: 0 where a probability is dropped, else what it is scaled by.

    The slots follow each other from a multiple of 4: four neighbours share a counter.
    """
    BLOCK_N: tl.constexpr = slots.shape[0]
    counters = tl.min(tl.reshape(slots, [BLOCK_N // 4, 4]), 1) // 4
    words = tl.philox(rows.seed, counters[None, :], rows.query[:, None], rows.head[:, None], rows.b)
    kept = tl.join(
        tl.join(is_kept(problem, words[0]), is_kept(problem, words[2])),
        tl.join(is_kept(problem, words[1]), is_kept(problem, words[3])),
    )
    return tl.where(tl.reshape(kept, [rows.query.shape[0], BLOCK_N]), problem.score.dropout_scale, 0.0)


@triton.jit
def is_kept(problem, word):
    return (word >> 1).to(tl.int32) >= problem.score.dropout_threshold
