"""From a problem to launches: which kernel, with which arguments.

What depends on shapes, strides and options only is made once and kept as a plan: an eager call of a model's layer finds its
plan, and adds the addresses of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall, CacheWrite
from .compiled import CompiledLaunch, Values, addresses_of, has_pdl, num_sms
from .kernels.combine import combine
from .kernels.decode import decode
from .kernels.kv_write import kv_write as kv_write_kernel
from .kernels.params import DecodeTile, PrefillTile, Strides, WriteTile
from .kernels.prefill import prefill
from .semaphores import semaphores
from .tiling import block_width, decode_tiling, power_of_two, prefill_tiling, stride_factor

MAX_DECODE_ROWS = 64
"""Packed-GQA rows up to which a call goes to ``decode``, which holds them all in one tile."""

MAX_FUSED_TOKENS = 64
"""New tokens of a sequence up to which ``decode`` appends them itself."""

MAX_UNSPLIT_TILES = 4
"""KV tiles of a sequence up to which ``decode`` splits no work tile: too few to be worth it."""

MAX_UNSPLIT_KEYS = 1024
"""The same in keys, where there are work tiles for half of the SMs: even one long one among short ones is read in about the
time that splitting costs."""

MAX_FUSED_SPLITS = 10
"""Splits of a work tile, on average, up to which its last CTA reduces them; more are left to ``combine``."""

SPLITS_TOGETHER, VALUES_TOGETHER = 8, 4096
"""Splits, and values of them, that this CTA loads together at most. Rows of more values are left to ``combine`` too."""

FEW_SEQUENCES, MANY_SEQUENCES = 32, 256
"""Lengths that a CTA of ``decode`` looks at together: what one warp holds, or for larger batches all four."""

LOG2E = 1 / math.log(2)


class _Plan(NamedTuple):
    """All that is the same for calls of one signature. It holds no tensor."""

    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...]
    writes_first: bool = False  # more new tokens than ``decode`` appends itself
    attend: CompiledLaunch | None = None  # ``decode`` or ``prefill``; None where there is nothing to attend to
    partials: int = 0  # float32 elements of splits
    semaphores: int = 0  # where ``decode`` reduces splits itself
    combine: CompiledLaunch | None = None  # where it leaves them


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend with ``decode`` (and ``combine``) or ``prefill``."""
    q = call.q
    dtype, device = q.dtype, q.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return attention(call)
    tensors: Values = (
        q, call.cu_seqlens_q, call.seqused_q,
        call.k, call.v, call.block_table, call.cache_batch_idx, call.cache_leftpad, call.seqused_k, call.cu_seqlens_k,
        call.k_new, call.v_new, call.rotary_cos, call.rotary_sin, call.alibi_slopes, call.sinks,
    )  # fmt: skip
    addresses, aligned = addresses_of(tensors)
    precision = _precision(dtype)
    plan = call.once(("triton", aligned, precision), lambda: _plan_attention(call, aligned, precision))

    out = torch.empty_strided(plan.out_shape, plan.out_strides, dtype=dtype, device=device)
    lse = torch.empty_strided(plan.lse_shape, plan.lse_strides, dtype=torch.float32, device=device)
    if plan.writes_first:
        kv_write(call.write)
    if plan.attend is None:
        return out.zero_(), lse.fill_(math.inf)
    counters = partials = counters_at = partials_at = None
    if plan.partials:
        partials = torch.empty_strided((plan.partials,), (1,), dtype=torch.float32, device=device)
        partials_at = partials.data_ptr()
        if plan.semaphores:
            counters = semaphores(device, plan.semaphores)
            counters_at = counters.data_ptr()
    tensors = (out, lse, counters, partials, *tensors)
    addresses = (out.data_ptr(), lse.data_ptr(), counters_at, partials_at, *addresses)
    plan.attend(tensors, addresses)
    if plan.combine is not None:
        plan.combine(tensors, addresses)
    return out, lse


def _plan_attention(call: AttentionCall, aligned: bool, precision: str) -> _Plan:
    """Reads of ``call`` only what calls alike share."""
    seqlen_new = _seqlen_new(call)
    is_decode = call.max_seqlen_q * _group(call) <= MAX_DECODE_ROWS
    is_empty = call.batch_size == 0 or 0 in call.out_shape
    is_fused = is_decode and not is_empty and seqlen_new <= MAX_FUSED_TOKENS
    plan = _Plan(
        call.out_shape,
        _contiguous_strides(call.out_shape),
        call.lse_shape,
        _contiguous_strides(call.lse_shape),
        writes_first=seqlen_new > 0 and not is_fused,
    )
    if is_empty:
        return plan
    bind_problem = _bind_problem(call, aligned, precision)
    if not is_decode:
        return plan._replace(attend=_prefill(call, bind_problem, aligned))
    return _with_decode(plan, call, bind_problem, aligned, seqlen_new if is_fused else 0)


def _prefill(call: AttentionCall, bind_problem: Callable[[Values], Values], aligned: bool) -> CompiledLaunch:
    tiling = prefill_tiling(call.max_seqlen_q, block_width(call.q.shape[-1]), call.q.element_size())
    tile = PrefillTile(tiling.block_m, tiling.block_n)
    grid = (call.q.shape[-2], call.batch_size, max(1, -(-call.max_seqlen_q // tiling.block_m)))

    def bind(values: Values) -> Values:
        return bind_problem(values), values[_OUTPUT], tile

    return CompiledLaunch(prefill, grid, bind, call.q.device, aligned, **tiling.options)


def _with_decode(
    plan: _Plan, call: AttentionCall, bind_problem: Callable[[Values], Values], aligned: bool, fused_tokens: int
) -> _Plan:
    device, batch_size, kv_heads = call.q.device, call.batch_size, call.k.shape[-2]
    block_dv = block_width(call.v.shape[-1])
    work_tiles = batch_size * kv_heads
    rows = power_of_two(max(call.max_seqlen_q, 1) * _group(call))
    tiling = decode_tiling(rows, block_width(call.q.shape[-1]), call.q.element_size())

    few_keys = MAX_UNSPLIT_TILES * tiling.block_n
    if 2 * work_tiles >= num_sms(device):
        few_keys = max(few_keys, MAX_UNSPLIT_KEYS)
    split_kv = call.num_splits > 1 or (call.num_splits == 0 and call.capacity > few_keys)
    num_ctas = num_sms(device) * tiling.ctas_per_sm
    if call.num_splits or not split_kv:
        num_ctas = work_tiles * max(call.num_splits, 1)
    reduces_itself = num_ctas <= MAX_FUSED_SPLITS * work_tiles and rows * block_dv <= VALUES_TOGETHER
    pdl = split_kv and not reduces_itself and has_pdl(device)

    # ``combine`` takes rows together where there are enough work tiles to fill the device, else one by one.
    reduce_rows = rows if reduces_itself or work_tiles >= num_sms(device) else 1
    splits_together, values_together = (SPLITS_TOGETHER, VALUES_TOGETHER) if reduces_itself else (64, 8192)
    tile = DecodeTile(
        ROWS=rows,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_NEW=max(16, power_of_two(fused_tokens)) if fused_tokens else 0,
        BLOCK_B=FEW_SEQUENCES if batch_size <= FEW_SEQUENCES else MANY_SEQUENCES,
        SPLIT_KV=split_kv,
        REDUCE_ROWS=reduce_rows,
        REDUCE_SPLITS=max(1, min(splits_together, values_together // (reduce_rows * block_dv))),
        PDL=pdl,
    )
    scratch_numbers = (num_ctas if split_kv else None,)

    def bind(values: Values) -> Values:
        return bind_problem(values), values[_OUTPUT], values[_SCRATCH] + scratch_numbers, tile

    plan = plan._replace(attend=CompiledLaunch(decode, (num_ctas, 1, 1), bind, device, aligned, **tiling.options))
    if not split_kv:
        return plan
    plan = plan._replace(partials=(work_tiles + num_ctas) * rows * (block_dv + 2))
    if reduces_itself:
        return plan._replace(semaphores=work_tiles)
    grid = (kv_heads * rows // reduce_rows, batch_size, 1)
    options: dict[str, object] = dict(num_warps=4, num_stages=1, **(dict(launch_pdl=True) if pdl else {}))
    return plan._replace(combine=CompiledLaunch(combine, grid, bind, device, aligned, **options))


# The arguments of the attention kernels: where each record's tensors are.
_OUTPUT, _SCRATCH, _QUERIES, _CACHE, _APPEND, _SCORE = (
    slice(0, 2), slice(2, 4), slice(4, 7), slice(7, 14), slice(14, 18), slice(18, 20),
)  # fmt: skip


def _bind_problem(call: AttentionCall, aligned: bool, precision: str) -> Callable[[Values], Values]:
    """A function that puts the problem's numbers behind its tensors, record by record."""
    no_strides = (0, 0, 0)
    q, k, v = (_strides(tensor) for tensor in (call.q, call.k, call.v))
    k_new, v_new = (no_strides if tensor is None else _strides(tensor) for tensor in (call.k_new, call.v_new))
    align = stride_factor((*q, *k, *v, *k_new, *v_new), aligned)
    scale, softcap = call.scale * LOG2E, None
    if call.softcap > 0:
        scale, softcap = call.scale / call.softcap, call.softcap * LOG2E
    window_left = call.window_left if call.window_left >= 0 else None
    window_right = call.window_right if call.window_right >= 0 else None
    slopes_stride = call.q.shape[-2] if call.alibi_slopes is not None and call.alibi_slopes.dim() == 2 else 0

    queries = (_aligned(q, align), call.batch_size, call.q.shape[0], call.max_seqlen_q, _group(call))
    cache = _cache_numbers(call.k, call.v, call.block_table, call.capacity, align)
    by_position = window_left is not None or window_right is not None
    append = (
        None if call.k_new is None else _aligned(k_new, align),
        None if call.v_new is None else _aligned(v_new, align),
        *_append_numbers(_seqlen_new(call), call.rotary_cos, call.rotary_interleaved),
        by_position,
    )
    score = (scale, softcap, window_left, window_right, slopes_stride, precision)

    def bind(values: Values) -> Values:
        return values[_QUERIES] + queries, values[_CACHE] + cache, values[_APPEND] + append, values[_SCORE] + score

    return bind


def _cache_numbers(k: Tensor, v: Tensor, block_table: Tensor | None, capacity: int, align: int) -> Values:
    k_strides, v_strides = _strides(k), _strides(v)
    return (
        _aligned(k_strides, align),
        None if v_strides == k_strides else _aligned(v_strides, align),
        capacity,
        k.shape[0],
        0 if block_table is None else block_table.shape[1],
        k.shape[-2],
        k.shape[-1],
        v.shape[-1],
        block_width(k.shape[-1]),
        block_width(v.shape[-1]),
        0 if block_table is None else k.shape[1],
    )


def _append_numbers(seqlen_new: int, rotary_cos: Tensor | None, interleaved: bool) -> Values:
    rotary_len, rotary_pairs = (0, 0) if rotary_cos is None else rotary_cos.shape
    return seqlen_new, rotary_len, 2 * rotary_pairs, interleaved


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    if write.k.numel() == 0:
        return
    device = write.k.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return kv_write(write)
    tensors: Values = (
        write.k_cache, write.v_cache, write.block_table, write.cache_batch_idx, None, write.seq_lens, None,
        write.k, write.v, write.rotary_cos, write.rotary_sin,
    )  # fmt: skip
    addresses, aligned = addresses_of(tensors)
    launch = write.once(("triton", aligned), lambda: _plan_write(write, aligned))
    launch(tensors, addresses)


def _plan_write(write: CacheWrite, aligned: bool) -> CompiledLaunch:
    """Reads of ``write`` only what writes alike share."""
    batch_size, seqlen_new, kv_heads, _ = write.k.shape
    k_new, v_new = _strides(write.k), _strides(write.v)
    align = stride_factor((*k_new, *v_new, *_strides(write.k_cache), *_strides(write.v_cache)), aligned)
    cache = _cache_numbers(write.k_cache, write.v_cache, write.block_table, write.capacity, align)
    append = (
        _aligned(k_new, align),
        _aligned(v_new, align),
        *_append_numbers(seqlen_new, write.rotary_cos, write.rotary_interleaved),
        True,
    )
    block_new = min(16, power_of_two(seqlen_new))
    tile = WriteTile(block_new)

    def bind(values: Values) -> Values:
        return values[:7] + cache, values[7:] + append, tile

    grid = (kv_heads, batch_size, -(-seqlen_new // block_new))
    num_warps = 1 if block_new == 1 else 4
    return CompiledLaunch(kv_write_kernel, grid, bind, write.k.device, aligned, num_warps=num_warps, num_stages=1)


def _seqlen_new(call: AttentionCall) -> int:
    return 0 if call.k_new is None else call.k_new.shape[1]


def _group(call: AttentionCall) -> int:
    return call.q.shape[-2] // call.k.shape[-2]


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of the sequence or page (none for packed rows), of the token, of the head."""
    strides = tensor.stride()
    return (strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])


def _aligned(strides: tuple[int, int, int], align: int) -> Strides:
    return Strides(*[stride // align for stride in strides], align)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_elsewhere(device: torch.device) -> bool:
    """Whether Triton would launch on another device than the tensors'."""
    return device.type == "cuda" and _cuda_devices() > 1 and device.index != torch.cuda.current_device()


@cache
def _cuda_devices() -> int:
    return torch.cuda.device_count()


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless torch's own may use tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
