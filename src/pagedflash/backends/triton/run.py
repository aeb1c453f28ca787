"""From a description to launches: which kernel, with which arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ...call import AttentionCall, CacheWrite
from .kernels.decode import decode
from .kernels.kv_write import kv_write as kv_write_kernel
from .kernels.prefill import prefill
from .launch import ArrivalCounters, Kernel, Shape, alignment, decode_shape, prefill_shape, processors

MAX_DECODE_ROWS = 64
"""Queries times group up to which a call goes to ``decode``, which holds them all in one tile of rows."""

MAX_BLOCK_B = 1024
"""Lengths that a program of ``decode`` looks at in one step."""

LOG2E = 1 / math.log(2)

_decode = Kernel(decode)
_prefill = Kernel(prefill)
_kv_write = Kernel(kv_write_kernel)
_counters = ArrivalCounters()


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend with ``decode`` or ``prefill``."""
    if call.k_new is not None:
        kv_write(call.write)
    q = call.q
    out = q.new_empty(call.out_shape)
    lse = q.new_empty(call.lse_shape, dtype=torch.float32)
    if call.batch_size == 0:
        return out.zero_(), lse.fill_(math.inf)
    if out.numel() == 0:
        return out, lse
    launch = _launch_decode if uses_decode(call) else _launch_prefill
    launch(call, out, lse)
    return out, lse


def uses_decode(call: AttentionCall) -> bool:
    """Whether the call has few enough rows for ``decode``."""
    return call.max_seqlen_q * (call.q.shape[-2] // call.k.shape[-2]) <= MAX_DECODE_ROWS


def _launch_decode(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    q, kv_heads, batch = call.q, call.k.shape[-2], call.batch_size
    group = q.shape[-2] // kv_heads
    block_d, block_dv = _block(q.shape[-1]), _block(call.v.shape[-1])
    rows = next_power_of_2(max(call.max_seqlen_q, 1) * group)
    shape = decode_shape(rows, block_d, q.element_size())

    programs = processors(q.device) * shape.programs_per_processor
    if call.num_splits:
        programs = batch * kv_heads * call.num_splits
    partials = torch.empty(2 * programs * rows * (block_dv + 2), dtype=torch.float32, device=q.device)
    arrivals = _counters.take(q.device, batch * kv_heads)

    tensors, numbers, constants, aligned = _arguments(call)
    tensors = (q, call.k, call.v, out, lse, partials, arrivals, *tensors)
    block_parts = max(1, min(16, 8192 // (rows * block_dv)))
    block_b = min(next_power_of_2(batch), MAX_BLOCK_B)
    constants += (rows, shape.block_m, shape.block_n, block_d, block_dv, block_b, block_parts)
    _decode((programs, 1, 1), tensors, numbers, constants, shape, aligned)


def _launch_prefill(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    q = call.q
    block_d, block_dv = _block(q.shape[-1]), _block(call.v.shape[-1])
    shape = prefill_shape(call.max_seqlen_q, block_d, q.element_size())
    tensors, numbers, constants, aligned = _arguments(call)
    tensors = (q, call.k, call.v, out, lse, *tensors)
    constants += (shape.block_m, shape.block_n, block_d, block_dv)
    grid = (q.shape[-2], call.batch_size, max(1, cdiv(call.max_seqlen_q, shape.block_m)))
    _prefill(grid, tensors, numbers, constants, shape, aligned)


def _arguments(call: AttentionCall) -> tuple[tuple[Tensor | None, ...], tuple, tuple, bool]:
    """What ``decode`` and ``prefill`` both take: (optional tensors, numbers, constants, all pointers are aligned)."""
    q, k, v = call.q, call.k, call.v
    tensors = (
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.seqused_q,
        call.seqused_k,
        call.cache_batch_idx,
        call.cache_leftpad,
        call.block_table,
        call.rotary_cos,
        call.rotary_sin,
        call.alibi_slopes,
        call.sinks,
    )
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    strides = (
        q_strides[0] if q.dim() == 4 else 0,
        *q_strides[-3:-1],
        k_strides[0] if k.dim() == 4 else 0,
        *k_strides[-3:-1],
        v_strides[0] if v.dim() == 4 else 0,
        *v_strides[-3:-1],
    )
    aligned, align = alignment((q, k, v, *tensors), strides)
    scale, softcap = call.scale * LOG2E, 0.0
    if call.softcap > 0:
        scale, softcap = call.scale / call.softcap, call.softcap * LOG2E
    numbers = (
        *[stride // align for stride in strides],
        call.batch_size,
        q.shape[0],
        call.max_seqlen_q,
        call.capacity,
        0 if call.k_new is None else call.k_new.shape[1],
        0 if call.block_table is None else call.block_table.shape[1],
        0 if call.rotary_cos is None else call.rotary_cos.shape[0],
        call.window_left,
        call.window_right,
        scale,
        softcap,
    )
    constants = (
        k.shape[-2],
        q.shape[-2] // k.shape[-2],
        q.shape[-1],
        v.shape[-1],
        0 if call.block_table is None else k.shape[1],
        0 if call.rotary_cos is None else 2 * call.rotary_cos.shape[1],
        call.rotary_interleaved,
        call.window_left >= 0,
        call.window_right >= 0,
        call.softcap > 0,
        call.alibi_slopes is not None and call.alibi_slopes.dim() == 2,
        _precision(q),
        align,
    )
    return tensors, numbers, constants, aligned


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    batch, new_tokens, heads, head_dim = write.k.shape
    if write.k.numel() == 0:
        return
    tensors = (
        write.k,
        write.v,
        write.k_cache,
        write.v_cache,
        write.seq_lens,
        write.block_table,
        write.cache_batch_idx,
        write.rotary_cos,
        write.rotary_sin,
    )
    strides = (
        *write.k.stride()[:3],
        *write.v.stride()[:3],
        *write.k_cache.stride()[:3],
        *write.v_cache.stride()[:3],
    )
    aligned, align = alignment(tensors, strides)
    numbers = (
        *[stride // align for stride in strides],
        new_tokens,
        write.capacity,
        0 if write.block_table is None else write.block_table.shape[1],
        write.k_cache.shape[0],
    )
    block_t = min(16, next_power_of_2(new_tokens))
    constants = (
        head_dim,
        write.v.shape[-1],
        0 if write.block_table is None else write.k_cache.shape[1],
        0 if write.rotary_cos is None else 2 * write.rotary_cos.shape[1],
        write.rotary_interleaved,
        align,
        block_t,
        next_power_of_2(head_dim),
        next_power_of_2(write.v.shape[-1]),
    )
    grid = (heads, batch, cdiv(new_tokens, block_t))
    _kv_write(grid, tensors, numbers, constants, Shape(0, 0, 1 if block_t == 1 else 4, 1), aligned)


def _block(head_dim: int) -> int:
    """A tile's width for a head dim: a power of two that the matrix units take."""
    return max(16, next_power_of_2(head_dim))


def _precision(q: Tensor) -> str:
    """float32 products are exact unless torch's own may use tf32."""
    return "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
