"""flash-attn's functions for q, k and v in one tensor, or k and v in one: views of it, passed on to the others."""

from __future__ import annotations

from torch import Tensor

from .errors import reject, reject_type
from .interface import Output, flash_attn_func, flash_attn_varlen_func


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_func`` of ``qkv (B, S, 3, H, D)``.

    Examples:
        >>> flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 8, 64), causal=True).shape
        torch.Size([2, 5, 8, 64])
    """
    q, k, v = _unpacked("qkv", qkv, "B, S, 3, H, D")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_func`` of ``q (B, Sq, Hq, D)`` and ``kv (B, Sk, 2, Hkv, D)``.

    Examples:
        >>> flash_attn_kvpacked_func(torch.randn(2, 5, 8, 64), torch.randn(2, 9, 2, 2, 64)).shape
        torch.Size([2, 5, 8, 64])
    """
    k, v = _unpacked("kv", kv, "B, Sk, 2, Hkv, D")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_varlen_func`` of ``qkv (total, 3, H, D)``.

    Examples:
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(7, 3, 8, 64), cu_seqlens, 4).shape
        torch.Size([7, 8, 64])
    """
    q, k, v = _unpacked("qkv", qkv, "total, 3, H, D")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """``flash_attn_varlen_func`` of ``q (total_q, Hq, D)`` and ``kv (total_k, 2, Hkv, D)``.

    Examples:
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> q, kv = torch.randn(7, 8, 64), torch.randn(7, 2, 2, 64)
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 4, 4).shape
        torch.Size([7, 8, 64])
    """
    k, v = _unpacked("kv", kv, "total_k, 2, Hkv, D")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _unpacked(name: str, packed: Tensor, dims: str) -> tuple[Tensor, ...]:
    """Views of the tensors along the third last axis."""
    if not isinstance(packed, Tensor):
        reject_type(name, "of type {type}", "a torch.Tensor ({dims})", type=type(packed).__name__, dims=dims)
    if packed.dim() != dims.count(",") + 1 or packed.shape[-3] != len(name):
        reject(name, "of shape {shape}", "({dims})", shape=tuple(packed.shape), dims=dims)
    return packed.unbind(-3)
