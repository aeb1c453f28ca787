# ruff: noqa: SIM108 (an if on constants chooses code when the kernel is compiled)
"""One step of the online softmax: a tile of keys and values goes into the rows' running state.

The state of a row is ``(acc, row_max, row_sum)``: the weighted sum of values, the largest score so far, and the sum of
weights, where a weight is ``2^(score - row_max)``. Scores are in units of log2, so that the weight is one ``exp2``.
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tile(
    acc,
    row_max,
    row_sum,
    q_tile,
    k_tile,
    v_tile,
    slots,
    first,
    last,
    position,
    slope,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    MASKED: tl.constexpr,
    SPREAD_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale`` holds log2(e), or with a softcap 1 / softcap; ``softcap`` holds log2(e): the host folds them in.

    If MASKED, a row sees the slots from ``first`` to ``last`` of its own; else it sees the whole tile. If SPREAD_SUM,
    ``row_sum`` is ``(rows, BLOCK_N)``, to be summed after the last tile: one step less in which warps wait for each other.
    """
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), which is right at both ends: e^2x = inf gives 1, 0 gives -1
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E)) + 1.0))
    if HAS_ALIBI:
        scores -= slope[:, None] * tl.abs(position[:, None] - slots[None, :]).to(tl.float32)
    if MASKED:
        visible = (slots[None, :] >= first[:, None]) & (slots[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1))
    pivot = new_max
    if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - pivot[:, None])
    shrink = tl.exp2(row_max - pivot)
    if SPREAD_SUM:
        row_sum = row_sum * shrink[:, None] + weights
    else:
        row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum
