"""What launchers work out on the host, the same for every backend: strides, rows, visible keys."""

from __future__ import annotations

from torch import Tensor

from .problem import AttentionProblem


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides ``(sequence or page, token, head)``, in elements. Packed tensors have no first axis: 0."""
    *outer, token, head, _ = tensor.stride()
    return (outer[0] if outer else 0, token, head)


def scale_strides(descale: Tensor | None) -> tuple[int, int, int, int]:
    """Strides ``(sequence, page or row, token, head)`` of scales: 0 where one serves all."""
    match () if descale is None else descale.stride():
        case ():
            return 0, 0, 0, 0
        case (head,):
            return 0, 0, 0, head
        case (sequence, head):
            return sequence, 0, 0, head
        case (page, token, head):
            return 0, page, token, head
    raise AssertionError(descale)


def v_is_in_k(k: Tensor, v: Tensor) -> bool:
    """Whether each value is the first part of its key, in the same memory, as in MLA. Then an append writes keys only."""
    return v.data_ptr() == k.data_ptr() and v_fits_in_k(k, v)


def v_fits_in_k(k: Tensor, v: Tensor) -> bool:
    """Whether this is so if both begin at the same address."""
    return v.shape[-1] <= k.shape[-1] and v.dtype == k.dtype and strides(v) == strides(k)


def decode_rows(problem: AttentionProblem) -> int:
    """Packed-GQA rows of the longest sequence: queries times the query heads of a KV head."""
    return problem.queries.max_seqlen_q * problem.group


def may_be_mixed(problem: AttentionProblem) -> bool:
    """Whether some sequences may have few queries and others many, as far as shapes say: packed queries over pages, less of
    them than if all sequences were as long as the longest."""
    q, cu_seqlens_q, _, max_seqlen_q = problem.queries
    is_packed = cu_seqlens_q is not None and problem.cache.block_table is not None
    return is_packed and q.shape[0] < problem.batch_size * max_seqlen_q


def queries_rotate_by_position(problem: AttentionProblem) -> bool:
    """Whether query ``i`` takes the rotary position ``seqused_k + i`` (causal or windowed); else all take ``seqused_k``."""
    return problem.scores.window_left >= 0 or problem.scores.window_right >= 0


def max_visible_keys(problem: AttentionProblem) -> int:
    """Most keys that the queries of one sequence see, as far as the host knows."""
    keys = min(problem.cache.max_seqlen_k, problem.capacity)
    left, right = problem.scores.window_left, problem.scores.window_right
    if left >= 0 and right >= 0:
        keys = min(keys, left + right + problem.queries.max_seqlen_q)
    return keys
