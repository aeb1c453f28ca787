"""FlashInfer's wrappers, their plans made beforehand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...testing import PagedProblem
from ..measure import Contender
from .packed import PackedProblem

WORKSPACE_BYTES = 512 << 20
DECODE_VARIANTS = ("CUDA cores", "fa2", "fa3")
PREFILL_VARIANTS = ("fa2", "fa3")
MLA_VARIANTS = ("fa2", "fa3")


def decode(problem: PagedProblem, variant: str) -> Contender:
    """One query a sequence, on CUDA cores or with one of its kernels for tensor cores."""
    import flashinfer

    q, k_cache, v_cache, lengths, table = problem
    pages = _Pages.of(lengths.tolist(), table, k_cache.shape[1])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        use_cuda_graph=True,
        use_tensor_cores=variant != "CUDA cores",
        backend="auto" if variant == "CUDA cores" else variant,
        paged_kv_indptr_buffer=pages.offsets.clone(),
        paged_kv_indices_buffer=pages.indices.clone(),
        paged_kv_last_page_len_buffer=pages.last.clone(),
    )
    heads, kv_heads, head_dim, page_size = q.shape[2], k_cache.shape[2], q.shape[3], k_cache.shape[1]
    wrapper.plan(*pages, heads, kv_heads, head_dim, page_size, q_data_type=q.dtype, kv_data_type=k_cache.dtype)
    rows, out = q[:, 0], torch.empty_like(q[:, 0])
    return Contender(lambda: wrapper.run(rows, (k_cache, v_cache), out=out))


def prefill(problem: PackedProblem, variant: str) -> Contender:
    """Packed queries on pages or packed keys."""
    import flashinfer

    q, k, v, _, lengths, table = problem
    offsets = problem.cu_seqlens_q
    heads = (q.shape[1], k.shape[-2], q.shape[2])
    options: dict[str, Any] = dict(causal=True, q_data_type=q.dtype, kv_data_type=k.dtype, head_dim_vo=v.shape[-1])
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if table is None:
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            _workspace(),
            use_cuda_graph=True,
            qo_indptr_buf=offsets.clone(),
            kv_indptr_buf=problem.cu_seqlens_k,
            backend=variant,
        )
        wrapper.plan(offsets, problem.cu_seqlens_k, *heads, **options)
        return Contender(lambda: wrapper.run(q, k, v, out=out))
    pages = _Pages.of(lengths, table, k.shape[1])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        _workspace(),
        use_cuda_graph=True,
        qo_indptr_buf=offsets.clone(),
        paged_kv_indptr_buf=pages.offsets.clone(),
        paged_kv_indices_buf=pages.indices.clone(),
        paged_kv_last_page_len_buf=pages.last.clone(),
        backend=variant,
    )
    wrapper.plan(offsets, *pages, *heads, k.shape[1], **options)
    return Contender(lambda: wrapper.run(q, (k, v), out=out))


def mla(problem: PagedProblem, variant: str) -> Contender:
    """Values that are the first part of their keys, on one KV head."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

    q, latents, values, lengths, table = problem
    pages = _Pages.of(lengths.tolist(), table, latents.shape[1])
    offsets = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    wrapper = BatchMLAPagedAttentionWrapper(
        _workspace(),
        use_cuda_graph=True,
        qo_indptr=offsets.clone(),
        kv_indptr=pages.offsets.clone(),
        kv_indices=pages.indices.clone(),
        kv_len_arr=lengths.clone(),
        backend=variant,
    )
    wrapper.plan(
        metadata=MLAPlanMetadata.csr(offsets, pages.offsets, pages.indices, lengths),
        num_heads=q.shape[2],
        head_dim_ckv=values.shape[-1],
        head_dim_kpe=q.shape[-1] - values.shape[-1],
        page_size=latents.shape[1],
        causal=True,
        sm_scale=q.shape[-1] ** -0.5,
        q_data_type=q.dtype,
        kv_data_type=latents.dtype,
    )
    rows, cache = q.flatten(0, 1), latents[:, :, 0]
    out = torch.empty_like(rows[..., : values.shape[-1]])
    return Contender(lambda: wrapper.run(query=rows, kv_cache=cache, out=out))


class _Pages(NamedTuple):
    """A block table as FlashInfer has it."""

    offsets: Tensor  # (B + 1,) of each sequence in indices
    indices: Tensor  # pages of all sequences
    last: Tensor  # (B,) tokens on the last page

    @staticmethod
    def of(lengths: list[int], table: Tensor, page_size: int) -> _Pages:
        counts = [-(-length // page_size) for length in lengths]
        offsets = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0)).int().to(table.device)
        indices = torch.cat([row[:count] for row, count in zip(table, counts)])
        last = torch.tensor([(length - 1) % page_size + 1 for length in lengths], dtype=torch.int32, device=table.device)
        return _Pages(offsets, indices, last)


def _workspace() -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
