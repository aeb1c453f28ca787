"""The one name of the Hub kernel ``kernels-community/metal-flash-sdpa`` that flash-attn does not have.

Only what ``pagedflash hub`` writes exports it, as a drop-in for that kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.protocol import Capabilities
from ..interface import flash_attn_varlen_func
from ..validate import validate_shape, validate_tensor

NO_SOFTCAP = 1.0


@torch.no_grad()
def flash_attention_varlen(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    do_causal: bool = False,
    scale: float | None = None,
    softcapping: float = NO_SOFTCAP,
) -> None:
    """Attention of packed sequences, written into ``out``.

    Args:
        out: ``(total_q, Hq, Dv)`` in query's dtype, overwritten.
        query: ``(total_q, Hq, D)``.
        key: ``(total_k, Hkv, D)``.
        value: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: ``(B + 1,)``, starting with 0.
        cu_seqlens_k: ``(B + 1,)``, starting with 0.
        max_seqlen_q: at least the longest sequence of queries.
        max_seqlen_k: the longest sequence of keys, a hint.
        do_causal: query ``i`` sees keys ``j <= i + Sk - Sq``.
        scale: factor on ``query @ key^T``; ``1 / sqrt(D)`` if None.
        softcapping: 1 means none, any other positive number is the softcap.

    Raises:
        TypeError, ValueError: naming the argument, by the name that ``flash_attn_varlen_func`` has for it; ``out`` is
            untouched then.

    Source: the function of this name in ``kernels-community/metal-flash-sdpa``.
    """
    validate_tensor("out", out, "total_q, Hq, Dv", out, Capabilities().dtypes)
    result = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=scale,
        causal=do_causal,
        softcap=0.0 if softcapping == NO_SOFTCAP else softcapping,
    )
    assert isinstance(result, Tensor)
    validate_tensor("out", out, "total_q, Hq, Dv", result, (result.dtype,))
    validate_shape("out", out, tuple(result.shape), "total_q, Hq, Dv")
    out.copy_(result)
