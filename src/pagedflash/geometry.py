"""What launchers work out on the host, the same for every backend: strides, visible keys, folded scores."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .problem import AttentionProblem, Scores

LOG2_E = 1 / math.log(2)


class ScoreParams(NamedTuple):
    """The numbers of :class:`~pagedflash.problem.Scores` as kernels take them. Their softmax is in base 2."""

    scale: float  # from q . k to a score in base 2, or, where there is a softcap, to the argument of its tanh
    softcap: float  # in base 2; 0 = none
    window_left: int  # -1 = unbounded
    window_right: int


def fold_scores(scores: Scores) -> ScoreParams:
    """log2(e) folded into the scale, so that kernels use exp2 and log2."""
    if scores.softcap > 0:
        scale, softcap = scores.scale / scores.softcap, scores.softcap * LOG2_E
    else:
        scale, softcap = scores.scale * LOG2_E, 0.0
    return ScoreParams(scale, softcap, scores.window_left, scores.window_right)


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides ``(sequence or page, token, head)``, in elements. Packed tensors have no first axis: 0."""
    *outer, token, head, _ = tensor.stride()
    return (outer[0] if outer else 0, token, head)


def decode_rows(problem: AttentionProblem) -> int:
    """Packed-GQA rows of the longest sequence: queries times the query heads of a KV head."""
    return problem.queries.max_seqlen_q * problem.group


def queries_rotate_by_position(problem: AttentionProblem) -> bool:
    """Whether query ``i`` takes the rotary position ``seqused_k + i`` (causal or windowed); else all take ``seqused_k``."""
    return problem.scores.window_left >= 0 or problem.scores.window_right >= 0


def max_visible_keys(problem: AttentionProblem) -> int:
    """Most keys that the queries of one sequence see, as far as the host knows."""
    keys = min(problem.cache.max_seqlen_k, problem.capacity)
    _, _, _, _, window_left, window_right = problem.scores
    if window_left >= 0 and window_right >= 0:
        keys = min(keys, window_left + window_right + problem.queries.max_seqlen_q)
    return keys
