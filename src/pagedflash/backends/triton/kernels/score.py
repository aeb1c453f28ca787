"""From q.k to a masked score. Scores are in base 2: ``2^score`` is the weight that ``e`` to the usual score is."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import dropout_rows

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


class ScoreParams(NamedTuple):
    """:class:`pagedflash.problem.ScoreParams`, None for what is not used, and constants."""

    scale: float  # to base 2, or with a softcap to the argument of tanh
    softcap: float | None  # in base 2
    window_left: int | None
    window_right: int | None
    dropout_threshold: int | None
    dropout_scale: float | None
    SLOPES_STRIDE: int | None  # from one sequence's ALiBi slopes to the next; 0: all have the same; None: there are none
    PRECISION: str  # of products of float32


class RowScores(NamedTuple):
    """What the scores of each row of queries depend on."""

    position: Any  # the key position it sits at
    first: Any  # it sees the slots from first to last
    last: Any
    slope: Any  # of ALiBi, in base 2, if there are any
    dropout: Any  # DropoutRows: of the probabilities that scores become


@triton.jit
def row_scores(tensors, problem, b, head, i, used, seqlen_q, seqlen_k, begin, end):
    """Rows of query ``i`` for query head ``head``, which see at most the slots ``[begin, end)``; none where not ``used``."""
    position = i + seqlen_k - seqlen_q
    first = position * 0 + begin
    last = position * 0 + (end - 1)
    if problem.score.window_left is not None:
        first = tl.maximum(first, position - problem.score.window_left)
    if problem.score.window_right is not None:
        last = tl.minimum(last, position + problem.score.window_right)
    slope = used.to(tl.float32)
    if problem.score.SLOPES_STRIDE is not None:
        slopes = tensors.alibi_slopes + b * problem.score.SLOPES_STRIDE + head
        slope = tl.load(slopes, used, other=0.0) * LOG2E
    dropout = dropout_rows(tensors, problem, b, head, i)
    return RowScores(position, first, tl.where(used, last, -1), slope, dropout)


@triton.jit
def score_tile(problem, products, slots, rows, MASKED: tl.constexpr):
    """From q.k ``(rows, BLOCK_N)`` to scores; if MASKED, -inf at the slots that a row does not see."""
    scores = cap_products(problem, products)
    scores = score_distance(problem, scores, rows.position[:, None], slots[None, :], rows.slope[:, None])
    if MASKED:
        visible = is_visible(slots[None, :], rows.first[:, None], rows.last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def cap_products(problem, products):
    """From q.k to scores that know nothing of positions."""
    scores = products * problem.score.scale
    if problem.score.softcap is not None:
        # tanh(x) = 1 - 2 / (e^2x + 1), which is right at both ends: e^2x = inf gives 1, 0 gives -1
        scores = problem.score.softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E)) + 1.0))
    return scores


@triton.jit
def derive_cap(problem, capped):
    """The derivative of :func:`cap_products` by what it scales q.k to; any numbers where that is 1 (no softcap)."""
    if problem.score.softcap is not None:
        tanh = capped / problem.score.softcap
        capped = 1.0 - tanh * tanh
    return capped


@triton.jit
def score_distance(problem, scores, position, slot, slope):
    """Scores with ALiBi, if there are slopes. Positions, slots and slopes are broadcast to the scores."""
    if problem.score.SLOPES_STRIDE is not None:
        scores -= slope * tl.abs(position - slot).to(tl.float32)
    return scores


@triton.jit
def is_visible(slot, first, last):
    return (slot >= first) & (slot <= last)


@triton.jit
def load_sinks(tensors, head, owned):
    """The attention sink of each row, an extra score without a value."""
    return tl.load(tensors.sinks + head, owned, other=0.0) * LOG2E
