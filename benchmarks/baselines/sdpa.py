"""torch alone: SDPA over keys that are gathered from their pages, blocks of queries for a window, and single kernels of it.

Decode and plain causal prompts are in :mod:`pagedflash.cli.bench`, which measures them for users.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.problems import PackedProblem
from pagedflash.cli.measure import Contender
from pagedflash.testing import PagedProblem


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
