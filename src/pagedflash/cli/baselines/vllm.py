"""The two attention kernels that vLLM runs over pages: its build of FlashAttention, and its own in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..measure import Contender
from .packed import PackedProblem

VARIANTS = ("FlashAttention", "Triton")


def attention(problem: PackedProblem, variant: str) -> Contender:
    """Packed queries on pages; decode too, as sequences of one query."""
    q, k, v, lengths_q, lengths_k, table = problem
    out = torch.empty_like(q)
    options = dict(
        cu_seqlens_q=problem.cu_seqlens_q,
        max_seqlen_q=max(lengths_q),
        seqused_k=problem.seqused_k,
        max_seqlen_k=max(lengths_k),
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        block_table=table,
    )
    if variant == "FlashAttention":
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        return Contender(lambda: flash_attn_varlen_func(q, k, v, out=out, **options))

    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    def run() -> Tensor:
        unified_attention(
            q, k, v, out, window_size=(-1, -1), softcap=0, q_descale=None, k_descale=None, v_descale=None, **options
        )
        return out

    return Contender(run)
