"""FlashAttention 2, 3 and 4.

FlashAttention 3 is measured on contiguous keys: the wheels that can be installed are built without paging.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ...testing import PagedProblem
from ..measure import Contender
from . import CannotRun
from .packed import PackedProblem


def fa2_decode(problem: PagedProblem) -> Contender:
    from flash_attn import flash_attn_with_kvcache

    q, k_cache, v_cache, lengths, table = problem
    _fa2_page_size(k_cache)
    return Contender(
        lambda: flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True)
    )


def fa2_prefill(problem: PackedProblem) -> Contender:
    from flash_attn import flash_attn_varlen_func

    q, k, v, lengths_q, lengths_k, table = problem
    if table is not None:
        _fa2_page_size(k)
    cu_q, cu_k = problem.cu_seqlens_q, problem.cu_seqlens_k
    longest = max(lengths_q), max(lengths_k)
    return Contender(lambda: flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=True, block_table=table))


def fa3_decode(problem: PagedProblem) -> Contender:
    """Its keys gathered beforehand."""
    function = _fa3().flash_attn_with_kvcache
    q, lengths = problem.q, problem.cache_seqlens
    k, v = (_contiguous(cache, problem.block_table, lengths.tolist()) for cache in (problem.k_cache, problem.v_cache))
    return Contender(lambda: function(q, k, v, cache_seqlens=lengths, causal=True), _out)


def fa3_prefill(problem: PackedProblem) -> Contender:
    """Its keys gathered beforehand."""
    function = _fa3().flash_attn_varlen_func
    q, k, v, lengths_q, lengths_k, _ = problem.gathered()
    cu_q, cu_k, longest = problem.cu_seqlens_q, problem.cu_seqlens_k, (max(lengths_q), max(lengths_k))
    return Contender(lambda: function(q, k, v, cu_q, cu_k, *longest, causal=True), _out)


def fa4_decode(problem: PagedProblem) -> Contender:
    from flash_attn.cute.interface import flash_attn_varlen_func

    q, k_cache, v_cache, lengths, table = problem
    options = dict(seqused_k=lengths, page_table=table, max_seqlen_k=int(lengths.max()))
    return Contender(lambda: flash_attn_varlen_func(q, k_cache, v_cache, causal=True, **options), _out)


def fa4_prefill(problem: PackedProblem) -> Contender:
    from flash_attn.cute.interface import flash_attn_varlen_func

    q, k, v, lengths_q, lengths_k, table = problem
    options: dict[str, Any] = dict(
        cu_seqlens_q=problem.cu_seqlens_q, max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k)
    )
    if table is None:
        options |= dict(cu_seqlens_k=problem.cu_seqlens_k)
    else:
        options |= dict(seqused_k=problem.seqused_k, page_table=table)
    return Contender(lambda: flash_attn_varlen_func(q, k, v, causal=True, **options), _out)


def _fa3() -> ModuleType:
    """Its own build, or the wheel fa3-fwd."""
    try:
        import flash_attn_interface
    except ImportError:
        import fa3_fwd_interface

        return fa3_fwd_interface  # type: ignore[no-any-return]
    return flash_attn_interface  # type: ignore[no-any-return]


def _fa2_page_size(cache: Tensor) -> None:
    if cache.shape[1] % 256:
        raise CannotRun(f"its pages have a multiple of 256 tokens, not {cache.shape[1]}")


def _contiguous(cache: Tensor, table: Tensor, lengths: list[int]) -> Tensor:
    """``(B, longest, Hkv, D)``, zeros behind each sequence."""
    rows = cache.new_zeros(len(lengths), max(lengths), *cache.shape[2:])
    for row, pages, length in zip(rows, table, lengths):
        row[:length] = cache[pages[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]
    return rows


def _out(result: Any) -> Tensor:
    """Some versions return the LSE too."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
