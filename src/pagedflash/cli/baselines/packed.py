"""Packed problems: prompts of several lengths, and new tokens of several sequences on cached ones."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ...testing import PagedProblem, paged_problem


class PackedProblem(NamedTuple):
    """Causal attention of packed queries, each sequence's aligned to the end of its keys."""

    q: Tensor  # (total_q, Hq, D)
    k: Tensor  # packed (total_k, Hkv, D), or pages (num_pages, page_size, Hkv, D)
    v: Tensor
    lengths_q: list[int]
    lengths_k: list[int]
    block_table: Tensor | None = None  # (B, max_pages) int32, for pages

    @staticmethod
    def of(problem: PagedProblem) -> PackedProblem:
        """The same with packed queries."""
        q, k_cache, v_cache, lengths, table = problem
        batch, num_queries = q.shape[:2]
        return PackedProblem(q.flatten(0, 1), k_cache, v_cache, [num_queries] * batch, lengths.tolist(), table)

    @property
    def cu_seqlens_q(self) -> Tensor:
        return self.int32([0, *accumulate(self.lengths_q)])

    @property
    def cu_seqlens_k(self) -> Tensor:
        return self.int32([0, *accumulate(self.lengths_k)])

    @property
    def seqused_k(self) -> Tensor:
        return self.int32(self.lengths_k)

    @property
    def operations(self) -> float:
        """Floating-point operations of the pairs that are seen."""
        pairs = sum(q * (k - q) + q * (q + 1) / 2 for q, k in zip(self.lengths_q, self.lengths_k))
        return 2 * pairs * self.q.shape[1] * (self.q.shape[2] + self.v.shape[-1])

    def gathered(self) -> PackedProblem:
        """The same on packed keys."""
        if self.block_table is None:
            return self
        page_size = self.k.shape[1]
        rows = [pages[: -(-n // page_size)].long() for pages, n in zip(self.block_table, self.lengths_k)]
        k, v = (torch.cat([x[row].flatten(0, 1)[:n] for row, n in zip(rows, self.lengths_k)]) for x in (self.k, self.v))
        return self._replace(k=k, v=v, block_table=None)

    def int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)


def prompts(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    v_head_dim: int | None = None,
) -> PackedProblem:
    """Whole prompts, keys packed like queries, and values as wide as keys unless ``v_head_dim`` is given."""
    q_heads, kv_heads = heads
    widths = ((q_heads, head_dim), (kv_heads, head_dim), (kv_heads, v_head_dim or head_dim))
    q, k, v = (torch.randn(sum(lengths), *width, device=device, dtype=dtype) for width in widths)
    return PackedProblem(q, k, v, lengths, lengths)


def on_pages(
    new: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: str,
) -> PackedProblem:
    """The last ``new`` tokens of sequences of ``lengths`` tokens, all of whose keys lie on shuffled pages."""
    paged = paged_problem(lengths, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype, device=device)
    q = torch.randn(sum(new), heads[0], head_dim, device=device, dtype=dtype)
    return PackedProblem(q, paged.k_cache, paged.v_cache, new, lengths, paged.block_table)
