"""The backward pass in plain PyTorch operations, the same on every device.

Probabilities are computed again from q, k and the LSE, a block of queries and a block of keys at a time, so that nothing
of size ``Sq x Sk`` is ever held; blocks that a causal mask or a window hides are skipped. Sums are float32 (float64, if that
is what comes in) and always in the same order: the same bits each time.

Source: Dao, "FlashAttention-2" (2023), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import AttentionProblem, Scores
from ..validate_values import key_lengths, query_lengths
from .dropout import kept
from .reference import without_autocast, working_dtype

BLOCK_SCORES = 2**21
"""About as many scores are held at once, of all heads together."""
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 1024
"""Queries of a block, and keys."""


class Gradients(NamedTuple):
    """With respect to the tensors of a problem, each of its shape and dtype, contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor  # (0,) where there are none


def backward(problem: AttentionProblem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """The gradients of a problem without an append, a block table and scales of quantized keys.

    ``out`` and ``lse`` are what the forward pass gave, ``d_out`` and ``d_lse`` the gradients with respect to them. Queries
    and keys of no sequence get 0, and so do queries that see no key.
    """
    gradients = empty_gradients(problem)
    for tensor in gradients:
        tensor.zero_()
    with without_autocast(out.device.type):
        for part in _parts(problem):
            _add(gradients, problem, part, (out, lse, d_out, d_lse))
    return gradients


def empty_gradients(problem: AttentionProblem) -> Gradients:
    """Gradients that are not filled in."""
    q, k, v, sinks = problem.queries.q, problem.cache.k, problem.cache.v, problem.scores.sinks
    d_q, d_k, d_v = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    return Gradients(d_q, d_k, d_v, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape))


def sinks_gradient(problem: AttentionProblem, lse: Tensor, delta: Tensor) -> Tensor:
    """From ``delta``, of the shape of the LSE: ``sum(out * d_out) - d_lse`` of each row, 0 where that saw no key."""
    sinks = problem.scores.sinks
    if sinks is None:
        return delta.new_empty(0, dtype=problem.queries.q.dtype)
    heads = (-1, 1) if problem.queries.cu_seqlens_q is not None else (1, -1, 1)
    of_rows = torch.exp(sinks.view(heads) - lse) * delta  # 0 where the LSE is +inf
    return -of_rows.sum([axis for axis in range(lse.dim()) if axis != lse.dim() - 2])


class _Part(NamedTuple):
    """Sequences that are worked on together: indices that give views with a batch axis, ``q[queries]`` and ``k[keys]``."""

    sequences: slice
    queries: tuple[slice | None, slice]
    keys: tuple[slice | None, slice]
    first_key: int = 0
    """The slot, in its sequence, of the first of the keys."""


_ALL = slice(None)


def _parts(problem: AttentionProblem) -> Iterator[_Part]:
    """All sequences at once where they are of one length, else one at a time."""
    cu_seqlens_q, cache = problem.queries.cu_seqlens_q, problem.cache
    told_apart_by = cu_seqlens_q, cache.cu_seqlens_k, cache.cache_batch_idx, cache.cache_leftpad, cache.seqused_k
    if all(tensor is None for tensor in told_apart_by):
        yield _Part(_ALL, (_ALL, _ALL), (_ALL, _ALL))
        return
    starts_q, starts_k, rows, firsts = (tensor if tensor is None else tensor.tolist() for tensor in told_apart_by[:4])
    for b, (num_queries, length) in enumerate(zip(query_lengths(problem), key_lengths(problem))):
        first = firsts[b] if firsts else 0
        if length <= first:
            continue
        alone = slice(b, b + 1)
        row = slice(rows[b], rows[b] + 1) if rows else alone
        yield _Part(
            alone,
            (None, slice(starts_q[b], starts_q[b] + num_queries)) if starts_q else (alone, _ALL),
            (None, slice(starts_k[b] + first, starts_k[b] + length)) if starts_k else (row, slice(first, length)),
            first,
        )


def _add(gradients: Gradients, problem: AttentionProblem, part: _Part, results: tuple[Tensor, ...]) -> None:
    """Add the gradients of some sequences, a block of queries after another.

    Rows are the queries of all heads that share a KV head: ``(N, Hkv, group * queries, ...)``.
    """
    scores, group, working = problem.scores, problem.group, working_dtype(problem.queries.q)
    q, out, d_out = (tensor[part.queries] for tensor in (problem.queries.q, results[0], results[2]))
    lse, d_lse = (tensor[part.queries[0], :, part.queries[1]].mT.unsqueeze(-1) for tensor in (results[1], results[3]))
    d_q, *d_keys = (tensor[index] for tensor, index in zip(gradients, (part.queries, part.keys, part.keys)))
    k, v = (tensor[part.keys].transpose(1, 2).to(working).contiguous() for tensor in problem.cache[:2])
    d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
    batch, num_queries, heads, _ = q.shape
    block = _Block(scores, part.sequences, group, k.shape[2] - num_queries, part.first_key)
    size = _block_size(batch * heads)

    for queries in _slices(0, num_queries, size):
        q_rows, out_rows, d_out_rows, lse_rows, d_lse_rows = (
            tensor[:, queries].unflatten(2, (-1, group)).movedim(1, 3).to(working).flatten(2, 3)
            for tensor in (q, out, d_out, lse, d_lse)
        )
        q_rows = q_rows * scores.scale
        sees_nothing = lse_rows.isinf()
        d_out_rows = d_out_rows.masked_fill(sees_nothing, 0.0)
        # The gradient of a logit is its probability times (the gradient of that probability - delta).
        delta = ((d_out_rows * out_rows).sum(-1, keepdim=True) - d_lse_rows).masked_fill(sees_nothing, 0.0)
        if scores.sinks is not None:
            sinks = scores.sinks.to(working).view(-1, group, 1, 1)
            of_heads, delta_of_heads = (rows.unflatten(2, (group, -1)) for rows in (lse_rows, delta))
            gradients.sinks.sub_((torch.exp(sinks - of_heads) * delta_of_heads).sum((0, 3, 4)).flatten())

        d_q_rows = torch.zeros_like(q_rows)
        for keys in _slices(*block.seen_keys(queries, k.shape[2]), size):
            k_block, v_block = k[:, :, keys], v[:, :, keys]
            probabilities, slope = block.probabilities(q_rows @ k_block.mT, lse_rows, queries, keys)
            d_probabilities = d_out_rows @ v_block.mT
            if scores.dropout_p:
                factors = block.kept(probabilities, queries, keys)
                d_v[:, :, keys] += (probabilities * factors).mT @ d_out_rows
                d_probabilities *= factors
            else:
                d_v[:, :, keys] += probabilities.mT @ d_out_rows
            d_scores = d_probabilities.sub_(delta).mul_(probabilities)
            if slope is not None:
                d_scores *= slope
            d_q_rows += d_scores @ k_block
            d_k[:, :, keys] += d_scores.mT @ q_rows
        d_q[:, queries] = (d_q_rows * scores.scale).unflatten(2, (group, -1)).movedim(3, 1).flatten(2, 3).to(d_q.dtype)
    for gradient, total in zip(d_keys, (d_k, d_v)):
        gradient += total.transpose(1, 2).to(gradient.dtype)


class _Block(NamedTuple):
    """How the scores of a block of queries and keys are made."""

    scores: Scores
    sequences: slice
    group: int
    offset: int
    """Query ``i`` sits at key position ``i + offset``."""
    first_key: int

    def seen_keys(self, queries: slice, num_keys: int) -> tuple[int, int]:
        """First and end of the keys that any of the queries sees."""
        left, right = self.scores.window_left, self.scores.window_right
        first = 0 if left < 0 else max(0, queries.start + self.offset - left)
        return first, num_keys if right < 0 else min(num_keys, queries.stop + self.offset + right)

    def probabilities(self, products: Tensor, lse: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """From ``scale * q . k`` to probabilities, and the derivative of a score by it: None where that is 1."""
        scores, slope = products, None
        if self.scores.softcap > 0:
            scores = torch.tanh(scores / self.scores.softcap)
            slope = 1 - scores * scores
            scores *= self.scores.softcap
        by_head = scores.unflatten(2, (self.group, -1))  # a view: (N, Hkv, group, queries, keys)
        if self.scores.alibi_slopes is not None:
            slopes = self.scores.alibi_slopes
            slopes = slopes[self.sequences] if slopes.dim() == 2 else slopes.unsqueeze(0)
            by_head -= (
                slopes.to(scores.dtype).unflatten(1, (-1, self.group))[..., None, None]
                * self._distance(queries, keys, scores.device).abs()
            )
        probabilities = scores.sub_(lse).exp_()
        nearest, farthest = queries.start + self.offset - keys.stop + 1, queries.stop - 1 + self.offset - keys.start
        if 0 <= self.scores.window_left < farthest:
            by_head.masked_fill_(self._distance(queries, keys, scores.device) > self.scores.window_left, 0.0)
        if 0 <= self.scores.window_right < -nearest:
            by_head.masked_fill_(-self._distance(queries, keys, scores.device) > self.scores.window_right, 0.0)
        return probabilities, slope

    def kept(self, probabilities: Tensor, queries: slice, keys: slice) -> Tensor:
        """What dropout makes of each probability: 0, or a factor."""
        batch, kv_heads = probabilities.shape[:2]
        device = probabilities.device
        query, key = (torch.arange(part.start, part.stop, device=device) for part in (queries, keys))
        heads = torch.arange(kv_heads * self.group, device=device).view(kv_heads, self.group, 1, 1)
        sequences = torch.arange(batch, device=device) + (self.sequences.start or 0)
        which = sequences[:, None, None, None, None], heads, query[:, None], key + self.first_key
        return kept(self.scores, *which, probabilities.dtype).flatten(2, 3)

    def _distance(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """``(queries, keys)``: how far a key lies left of a query."""
        positions = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1) + self.offset
        return positions - torch.arange(keys.start, keys.stop, device=device)


def _block_size(heads: int) -> int:
    """Queries and keys of a block, a power of two."""
    size = math.isqrt(BLOCK_SCORES // max(heads, 1)) or 1
    return min(max(1 << size.bit_length() - 1, SMALLEST_BLOCK), LARGEST_BLOCK)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))
