"""From a description to launches: which kernel, with which arguments.

What depends on shapes, strides and options only is made once for calls alike, and kept: an eager call of a model's layer
finds its plan, and adds the addresses of its tensors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...call import NUM_TENSORS, NUM_WRITE_TENSORS, AttentionCall, CacheWrite, Tensors
from .kernels.combine import combine
from .kernels.decode import decode
from .kernels.kv_write import kv_write as kv_write_kernel
from .kernels.prefill import prefill
from .launch import (
    Launch,
    Shape,
    addresses,
    decode_shape,
    has_dependent_launch,
    power_of_two,
    prefill_shape,
    processors,
    stride_factor,
)
from .tickets import tickets

MAX_DECODE_ROWS = 64
"""Queries times group up to which a call goes to ``decode``, which holds them all in one tile of rows."""

MAX_FUSED_TOKENS = 64
"""New tokens of a sequence up to which ``decode`` appends them itself."""

MAX_WHOLE_TILES = 4
"""Tiles a sequence can have at most for ``decode`` to give each segment to one program: too few to be worth sharing."""

MAX_WHOLE_KEYS = 1024
"""The same in keys, where there are segments for half of the processors: even one long one among short ones is read in
about the time that sharing costs."""

MAX_MERGED_PARTS = 10
"""Parts of a segment, on average, up to which the last program of a segment merges them; more are left to ``combine``."""

MERGED_TOGETHER, MERGED_VALUES = 8, 4096
"""Parts, and values of them, that are on their way together at most. Rows of more values are left to ``combine`` too."""

FEW_SEQUENCES, MANY_SEQUENCES = 32, 256
"""Lengths that a program of ``decode`` looks at in one step: what one warp holds, or for larger batches all four."""

LOG2E = 1 / math.log(2)


class _Plan(NamedTuple):
    """All that calls alike share. It holds no tensor."""

    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...]
    writes_first: bool = False  # more new tokens than ``decode`` appends itself
    prefill: Launch | None = None
    decode: Launch | None = None
    scratch: int = 0  # float32 elements of partial results
    segments: int = 0  # that need a ticket each, where ``decode`` merges partial results itself
    combine: Launch | None = None  # where it leaves them


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend with ``decode`` (and ``combine``) or ``prefill``."""
    q = call.q
    dtype, device = q.dtype, q.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return attention(call)
    tensors = cast(Tensors, call[:NUM_TENSORS])
    pointers, aligned = addresses(tensors)
    plan = call.once(("triton", aligned, _precision(dtype)), lambda: _plan(call, aligned))

    out = torch.empty_strided(plan.out_shape, plan.out_strides, dtype=dtype, device=device)
    lse = torch.empty_strided(plan.lse_shape, plan.lse_strides, dtype=torch.float32, device=device)
    if plan.writes_first:
        kv_write(call.write)
    if plan.prefill is not None:
        plan.prefill((out, lse, *tensors), (out.data_ptr(), lse.data_ptr(), *pointers))
    elif plan.decode is None:
        out.zero_()
        lse.fill_(math.inf)
    elif not plan.scratch:
        plan.decode((None, None, out, lse, *tensors), (None, None, out.data_ptr(), lse.data_ptr(), *pointers))
    else:
        partials = torch.empty_strided((plan.scratch,), (1,), dtype=torch.float32, device=device)
        results = (partials.data_ptr(), out.data_ptr(), lse.data_ptr())
        counters = tickets(device, plan.segments) if plan.segments else None
        place = None if counters is None else counters.data_ptr()
        plan.decode((counters, partials, out, lse, *tensors), (place, *results, *pointers))
        if plan.combine is None:
            return out, lse
        _, _, _, _, _, cu_q, cu_k, used_q, used_k, _, leftpad, *_, sinks = pointers
        plan.combine(
            (
                partials, out, lse, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
                call.cache_leftpad, call.sinks,
            ),
            (*results, cu_q, cu_k, used_q, used_k, leftpad, sinks),
        )  # fmt: skip
    return out, lse


def _plan(call: AttentionCall, aligned: bool) -> _Plan:
    """Reads of ``call`` only what calls alike share."""
    new_tokens = _new_tokens(call)
    is_decode = call.max_seqlen_q * _group(call) <= MAX_DECODE_ROWS
    is_empty = call.batch_size == 0 or 0 in call.out_shape
    is_fused = is_decode and not is_empty and new_tokens <= MAX_FUSED_TOKENS
    plan = _Plan(
        call.out_shape,
        _contiguous_strides(call.out_shape),
        call.lse_shape,
        _contiguous_strides(call.lse_shape),
        writes_first=new_tokens > 0 and not is_fused,
    )
    if is_empty:
        return plan
    if not is_decode:
        return plan._replace(prefill=_prefill(call, aligned))
    return _with_decode(plan, call, new_tokens if is_fused else 0, aligned)


def _prefill(call: AttentionCall, aligned: bool) -> Launch:
    block_d, block_dv = _block(call.q.shape[-1]), _block(call.v.shape[-1])
    shape = prefill_shape(call.max_seqlen_q, block_d, call.q.element_size())
    numbers, constants = _arguments(call, (), aligned)
    constants += (shape.block_m, shape.block_n, block_d, block_dv)
    grid = (call.q.shape[-2], call.batch_size, max(1, -(-call.max_seqlen_q // shape.block_m)))
    return Launch(prefill, grid, numbers, constants, shape, call.q.device, aligned)


def _with_decode(plan: _Plan, call: AttentionCall, fused_tokens: int, aligned: bool) -> _Plan:
    device, batch, kv_heads, group = call.q.device, call.batch_size, call.k.shape[-2], _group(call)
    block_d, block_dv = _block(call.q.shape[-1]), _block(call.v.shape[-1])
    segments = batch * kv_heads
    rows = power_of_two(max(call.max_seqlen_q, 1) * group)
    block_b = FEW_SEQUENCES if batch <= FEW_SEQUENCES else MANY_SEQUENCES
    shape = decode_shape(rows, block_d, call.q.element_size())
    block_new = max(16, power_of_two(fused_tokens)) if fused_tokens else 0

    few_keys = MAX_WHOLE_TILES * shape.block_n
    if 2 * segments >= processors(device):
        few_keys = max(few_keys, MAX_WHOLE_KEYS)
    whole = call.num_splits == 1 or (call.num_splits == 0 and call.capacity <= few_keys)
    programs = processors(device) * shape.programs_per_processor
    if whole or call.num_splits:
        programs = segments * max(call.num_splits, 1)
    merges_itself = programs <= MAX_MERGED_PARTS * segments and rows * block_dv <= MERGED_VALUES
    dependent = not whole and not merges_itself and has_dependent_launch(device)

    no_strides = (0, 0, 0)
    new_strides = [no_strides if new is None else new.stride()[:3] for new in (call.k_new, call.v_new)]
    numbers, constants = _arguments(call, (*new_strides[0], *new_strides[1]), aligned)
    numbers += (fused_tokens, call.k.shape[0])
    constants += (
        rows, shape.block_m, shape.block_n, block_d, block_dv, block_b, block_new,
        max(1, min(MERGED_TOGETHER, MERGED_VALUES // (rows * block_dv))), whole, dependent,
    )  # fmt: skip
    plan = plan._replace(decode=Launch(decode, (programs, 1, 1), numbers, constants, shape, device, aligned))
    if whole:
        return plan
    plan = plan._replace(scratch=(segments + programs) * rows * (block_dv + 2))
    if merges_itself:
        return plan._replace(segments=segments)

    # Rows together where there are enough segments to fill the device, else one by one.
    some_rows = rows if segments >= processors(device) else 1
    combine_numbers = (
        batch,
        call.q.shape[0],
        call.max_seqlen_q,
        call.capacity,
        _new_tokens(call),
        fused_tokens,
        call.window_left,
        programs,
    )
    combine_constants = (
        kv_heads,
        group,
        call.v.shape[-1],
        call.window_left >= 0,
        rows,
        some_rows,
        shape.block_n,
        block_dv,
        block_b,
        max(1, min(64, 8192 // (some_rows * block_dv))),
        dependent,
    )
    grid = (kv_heads * rows // some_rows, batch, 1)
    return plan._replace(
        combine=Launch(combine, grid, combine_numbers, combine_constants, Shape(0, 0, 4, 1), device, aligned, dependent),
    )


def _arguments(
    call: AttentionCall, new_strides: tuple[int, ...], aligned: bool
) -> tuple[tuple[float, ...], tuple[object, ...]]:
    """What ``decode`` and ``prefill`` both take: (numbers, constants)."""

    def three(tensor: Tensor) -> tuple[int, int, int]:
        """Strides of the sequence or page (none for ragged rows), of the row, of the head."""
        strides = tensor.stride()
        return (strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])

    strides = (*three(call.q), *three(call.k), *three(call.v), *new_strides)
    align = stride_factor(strides, aligned)
    scale, softcap = call.scale * LOG2E, 0.0
    if call.softcap > 0:
        scale, softcap = call.scale / call.softcap, call.softcap * LOG2E
    rotary_rows, rotary_pairs = (0, 0) if call.rotary_cos is None else call.rotary_cos.shape
    numbers = (
        *[stride // align for stride in strides],
        call.batch_size,
        call.q.shape[0],
        call.max_seqlen_q,
        call.capacity,
        _new_tokens(call),
        0 if call.block_table is None else call.block_table.shape[1],
        rotary_rows,
        call.window_left,
        call.window_right,
        scale,
        softcap,
    )
    constants = (
        call.k.shape[-2],
        _group(call),
        call.q.shape[-1],
        call.v.shape[-1],
        0 if call.block_table is None else call.k.shape[1],
        2 * rotary_pairs,
        call.rotary_interleaved,
        call.window_left >= 0,
        call.window_right >= 0,
        call.softcap > 0,
        call.alibi_slopes is not None and call.alibi_slopes.dim() == 2,
        _precision(call.q.dtype),
        align,
        three(call.k) == three(call.v),
    )
    return numbers, constants


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    if write.k.numel() == 0:
        return
    device = write.k.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return kv_write(write)
    tensors = cast(Tensors, write[:NUM_WRITE_TENSORS])
    pointers, aligned = addresses(tensors)
    launch = write.once(("triton", aligned), lambda: _kv_write(write, aligned))
    launch(tensors, pointers)


def _kv_write(write: CacheWrite, aligned: bool) -> Launch:
    """Reads of ``write`` only what writes alike share."""
    batch, new_tokens, heads, head_dim = write.k.shape
    num_pages, page_size = write.k_cache.shape[:2]
    v_head_dim = write.v.shape[-1]
    strides = [stride for x in (write.k, write.v, write.k_cache, write.v_cache) for stride in x.stride()[:3]]
    align = stride_factor(tuple(strides), aligned)
    table_width = 0 if write.block_table is None else write.block_table.shape[1]
    numbers = (*[stride // align for stride in strides], new_tokens, write.capacity, table_width, num_pages)
    block_t = min(16, power_of_two(new_tokens))
    constants = (
        head_dim,
        v_head_dim,
        0 if write.block_table is None else page_size,
        0 if write.rotary_cos is None else 2 * write.rotary_cos.shape[1],
        write.rotary_interleaved,
        align,
        block_t,
        _block(head_dim),
        _block(v_head_dim),
    )
    grid = (heads, batch, -(-new_tokens // block_t))
    shape = Shape(0, 0, 1 if block_t == 1 else 4, 1)
    return Launch(kv_write_kernel, grid, numbers, constants, shape, write.k.device, aligned)


def _new_tokens(call: AttentionCall) -> int:
    return 0 if call.k_new is None else call.k_new.shape[1]


def _group(call: AttentionCall) -> int:
    return call.q.shape[-2] // call.k.shape[-2]


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_elsewhere(device: torch.device) -> bool:
    """Whether Triton would launch on another device than the tensors'."""
    return device.type == "cuda" and _cuda_devices() > 1 and device.index != torch.cuda.current_device()


@cache
def _cuda_devices() -> int:
    return torch.cuda.device_count()


def _block(head_dim: int) -> int:
    """A tile's width for a head dim: a power of two that the matrix units take."""
    return max(16, power_of_two(head_dim))


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless torch's own may use tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
