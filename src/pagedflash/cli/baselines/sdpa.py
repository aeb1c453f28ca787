"""torch alone: SDPA over keys gathered from their pages, in blocks of queries for a window, and single kernels of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ...testing import PagedProblem
from ..measure import Contender
from .packed import PackedProblem


def gather_decode(problem: PagedProblem, fold: bool) -> Contender:
    """What to do without a paged kernel: index the pages into one tensor, then SDPA, sequence by sequence.

    Query heads of a group share keys either through ``enable_gqa``, or folded into query rows (one query token only).
    """
    q, k_cache, v_cache, lengths, table = problem
    num_queries, group = q.shape[1], q.shape[2] // k_cache.shape[2]
    assert not fold or num_queries == 1
    counts, page_size = lengths.tolist(), k_cache.shape[1]
    rows = [row[: -(-count // page_size)].long() for row, count in zip(table, counts)]
    masks: list[Tensor | None] = [None] * len(counts)
    if num_queries > 1:
        masks = [q.new_ones(num_queries, n, dtype=torch.bool).tril(n - num_queries) for n in counts]

    def run() -> list[Tensor]:
        outs = []
        for b, (row, count, mask) in enumerate(zip(rows, counts, masks)):
            k, v = (pages[row].flatten(0, 1)[:count].transpose(0, 1).unsqueeze(0) for pages in (k_cache, v_cache))
            if fold:
                outs.append(scaled_dot_product_attention(q[b].view(1, -1, group, q.shape[3]), k, v))
            else:
                queries = q[b].transpose(0, 1).unsqueeze(0)
                outs.append(scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=group > 1))
        return outs

    def output(outs: list[Tensor]) -> Tensor:
        # (1, Hkv, group, D) or (1, Hq, Sq, D) of each sequence
        return torch.cat([out.reshape(q.shape[1:]) if fold else out[0].transpose(0, 1) for out in outs]).view(q.shape)

    return Contender(run, output)


def prompt(q: Tensor, k: Tensor, v: Tensor, repeat: bool, mask: Tensor | None = None) -> Contender:
    """SDPA on ``(1, S, H, D)``; the heads of a group through enable_gqa, or with K and V repeated (once, not timed)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return Contender(
        lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=not repeat),
        lambda out: out.transpose(1, 2),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, repeat: bool = False, **options: Any) -> Tensor:
    """SDPA of ``(B, S, H, D)``; where KV heads are shared, they are repeated, or it is told so."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=not repeat, **options).transpose(1, 2)


def gather_prefill(problem: PagedProblem, repeat: bool) -> Contender:
    """The last queries of one sequence: its pages indexed into one tensor, then SDPA with a mask made beforehand."""
    q, k_cache, v_cache, lengths, table = problem
    num_queries, total = q.shape[1], int(lengths[0])
    pages = table[0].long()
    # 0 and -inf in q's dtype: what SDPA would otherwise make of a boolean mask in every call.
    mask = torch.full((num_queries, total), float("-inf"), dtype=q.dtype).triu(total - num_queries + 1)
    group = q.shape[2] // k_cache.shape[2]

    def run() -> Tensor:
        k, v = (cache[pages].flatten(0, 1)[:total].transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache))
        if repeat:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=not repeat)

    return Contender(run, lambda out: out.transpose(1, 2))


def window_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, block: int, repeat: bool) -> Contender:
    """A causal prompt ``(1, S, H, D)`` with a window: blocks of queries, each on the slice of keys that it sees."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    blocks = []
    for start in range(0, q.shape[2], block):
        end, first = min(start + block, q.shape[2]), max(0, start - window)
        distance = torch.arange(start, end).unsqueeze(1) - torch.arange(first, end)
        blocks.append((start, end, first, (distance >= 0) & (distance <= window)))

    def run() -> list[Tensor]:
        return [
            scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=mask, enable_gqa=not repeat
            )
            for start, end, first, mask in blocks
        ]

    return Contender(run, lambda outs: torch.cat(outs, 2).transpose(1, 2))


def one_kernel(problem: PackedProblem, kernel: SDPBackend) -> Contender:
    """The sequences one after another with one of SDPA's kernels, their keys gathered beforehand."""
    q, k, v, lengths_q, lengths_k, _ = problem.gathered()
    sequences = []
    for rows in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in rows)
        whole = queries.shape[2] == keys.shape[2]
        mask = None if whole else causal_lower_right(queries.shape[2], keys.shape[2])
        sequences.append((queries, keys, values, mask, whole))

    def run() -> list[Tensor]:
        with sdpa_kernel(kernel):
            return [
                scaled_dot_product_attention(queries, keys, values, mask, is_causal=whole, enable_gqa=True)
                for queries, keys, values, mask, whole in sequences
            ]

    return Contender(run, lambda outs: torch.cat([out[0].transpose(0, 1) for out in outs]))
