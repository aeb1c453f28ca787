# ruff: noqa: SIM108 (an if on constants chooses code when the kernel is compiled)
"""The online softmax, on scores in base 2.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import dropout_factors
from .kv_format import add_values, multiply_keys
from .score import LN2, load_sinks, score_tile

WEIGHT_BITS = tl.constexpr(6.0)
"""Weights that are multiplied by scales of values go up to 2^6: so float16 holds the products where scales are small."""


class SoftmaxState(NamedTuple):
    """The weight of a score is ``2^(score - row_max)``."""

    acc: Any  # (rows, BLOCK_DV) accumulator: the weighted sum of values; two of them while values are read in words
    row_max: Any  # (rows,) largest score so far, or the same less a constant
    row_sum: Any  # (rows,) sum of weights, or (rows, BLOCK_N), to be summed after the last tile


@triton.jit
def raise_max(row_max, other_max, MAY_BE_EMPTY: tl.constexpr):
    """One step of the online softmax, whatever is merged: (new maximum, what to subtract from scores, alpha).

    Alpha rescales what was summed so far. If MAY_BE_EMPTY, a row may have seen nothing on either side: -inf - -inf would
    be NaN, so 0 is subtracted.
    """
    new_max = tl.maximum(row_max, other_max)
    subtrahend = new_max
    if MAY_BE_EMPTY:
        subtrahend = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, subtrahend, tl.exp2(row_max - subtrahend)


@triton.jit
def attend_tile(problem, state, q_tile, kv, rows, MASKED: tl.constexpr, DEFER_SUM: tl.constexpr):
    """A tile of keys and values into the state. If not MASKED, every row sees the whole tile.

    If DEFER_SUM, ``row_sum`` is ``(rows, BLOCK_N)``: one step less in which warps wait for each other.
    """
    scores = score_tile(problem, multiply_keys(problem, q_tile, kv), kv.slots, rows, MASKED)
    largest = tl.max(scores, 1)
    if problem.cache.v_descale_strides is not None:
        largest -= WEIGHT_BITS
    row_max, subtrahend, alpha = raise_max(state.row_max, largest, MASKED)
    weights = tl.exp2(scores - subtrahend[:, None])
    if DEFER_SUM:
        row_sum = state.row_sum * alpha[:, None] + weights
    else:
        row_sum = state.row_sum * alpha + tl.sum(weights, 1)
    if problem.score.dropout_threshold is not None:
        weights *= dropout_factors(problem, rows.dropout, kv.slots)
    acc = add_values(problem, state.acc, alpha, weights, kv, q_tile.q.dtype)
    return SoftmaxState(acc, row_max, row_sum)


@triton.jit
def normalize(tensors, state, head, owned):
    """(output, LSE) of each row, the sink's weight counted in; 0 and +inf if a row saw no key."""
    acc, row_max, row_sum = state
    seen = row_sum > 0
    if tensors.sinks is not None:
        sink = load_sinks(tensors, head, owned)
        row_max, subtrahend, alpha = raise_max(row_max, sink, False)
        acc = acc * alpha[:, None]
        row_sum = row_sum * alpha + tl.exp2(sink - subtrahend)
    safe_sum = tl.where(seen, row_sum, 1.0)
    out = tl.where(seen[:, None], acc / safe_sum[:, None], 0.0)
    lse = tl.where(seen, (row_max + tl.log2(safe_sum)) * LN2, float("inf"))
    return out, lse
