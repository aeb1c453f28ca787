"""From a description to launches: which kernel, with which arguments.

What depends on shapes, strides and options only is made once for all calls alike, and kept: an eager call of a model's
layer finds its launches in a cache, and adds the addresses of its tensors.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall, CacheWrite
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

MAX_DECODE_ROWS = 64
"""Queries times group up to which a call goes to ``decode``, which holds them all in one tile of rows."""

MAX_FUSED_TOKENS = 64
"""New tokens of a sequence up to which ``decode`` appends them itself."""

MAX_WHOLE_TILES = 4
"""Tiles a sequence can have at most for ``decode`` to give each segment to one program: too few to be worth sharing."""

FEW_SEQUENCES, MANY_SEQUENCES = 32, 256
"""Lengths that a program of ``decode`` looks at in one step: what one warp holds, or for larger batches all four."""

LOG2E = 1 / math.log(2)


class _Problem(NamedTuple):
    """What of a call its plan depends on."""

    dtype: torch.dtype
    device: torch.device
    q_shape: torch.Size
    q_strides: tuple[int, ...]
    k_shape: torch.Size
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    v_head_dim: int
    k_new_strides: tuple[int, ...] | None
    v_new_strides: tuple[int, ...] | None
    batch: int
    new_tokens: int
    table_width: int | None
    rotary_shape: torch.Size | None
    slopes_per_sequence: bool
    missing: tuple[bool, ...]
    max_seqlen_q: int
    scale: float
    window_left: int
    window_right: int
    softcap: float
    rotary_interleaved: bool
    num_splits: int
    precision: str
    aligned: bool

    @property
    def group(self) -> int:
        return self.q_shape[-2] // self.k_shape[-2]

    @property
    def capacity(self) -> int:
        return self.k_shape[-3] if self.table_width is None else self.table_width * self.k_shape[1]


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend with ``decode`` (and ``combine``) or ``prefill``."""
    q, device = call.q, call.q.device
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return attention(call)
    out = torch.empty(call.out_shape, dtype=q.dtype, device=device)
    lse = torch.empty(call.lse_shape, dtype=torch.float32, device=device)
    new_tokens = 0 if call.k_new is None else call.k_new.shape[1]
    is_decode = call.max_seqlen_q * (q.shape[-2] // call.k.shape[-2]) <= MAX_DECODE_ROWS
    is_empty = out.numel() == 0 or call.batch_size == 0
    is_fused = is_decode and not is_empty and 0 < new_tokens <= MAX_FUSED_TOKENS
    if new_tokens and not is_fused:
        kv_write(call.write)
    if is_empty:
        return out.zero_(), lse.fill_(math.inf)

    tensors = (
        q,
        call.k,
        call.v,
        out,
        lse,
        call.k_new if is_fused else None,
        call.v_new if is_fused else None,
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
    pointers, aligned = addresses(tensors)
    problem = _problem(call, new_tokens, tuple([pointer is None for pointer in pointers]), aligned)
    if not is_decode:
        _prefill(problem)(tensors, pointers)
        return out, lse
    launches = _decode(problem)
    partials = torch.empty(launches.scratch, dtype=torch.float32, device=device) if launches.scratch else lse
    launches.decode((partials, *tensors), (partials.data_ptr(), *pointers))
    if launches.combine is not None:
        _, _, _, _, _, _, _, cu_q, cu_k, used_q, used_k, _, leftpad, *_, sinks = pointers
        launches.combine(
            (
                partials, out, lse, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
                call.cache_leftpad, call.sinks,
            ),
            (partials.data_ptr(), pointers[3], pointers[4], cu_q, cu_k, used_q, used_k, leftpad, sinks),
        )  # fmt: skip
    return out, lse


def _problem(call: AttentionCall, new_tokens: int, missing: tuple[bool, ...], aligned: bool) -> _Problem:
    q, k, v = call.q, call.k, call.v
    return _Problem(
        q.dtype,
        q.device,
        q.shape,
        q.stride(),
        k.shape,
        k.stride(),
        v.stride(),
        v.shape[-1],
        None if call.k_new is None else call.k_new.stride(),
        None if call.v_new is None else call.v_new.stride(),
        call.batch_size,
        new_tokens,
        None if call.block_table is None else call.block_table.shape[1],
        None if call.rotary_cos is None else call.rotary_cos.shape,
        call.alibi_slopes is not None and call.alibi_slopes.dim() == 2,
        missing,
        call.max_seqlen_q,
        call.scale,
        call.window_left,
        call.window_right,
        call.softcap,
        call.rotary_interleaved,
        call.num_splits,
        _precision(q.dtype),
        aligned,
    )


@lru_cache(maxsize=4096)
def _prefill(problem: _Problem) -> Launch:
    block_d, block_dv = _block(problem.q_shape[-1]), _block(problem.v_head_dim)
    shape = prefill_shape(problem.max_seqlen_q, block_d, problem.dtype.itemsize)
    numbers, constants = _arguments(problem, ())
    constants += (shape.block_m, shape.block_n, block_d, block_dv)
    grid = (problem.q_shape[-2], problem.batch, max(1, -(-problem.max_seqlen_q // shape.block_m)))
    return Launch(prefill, grid, numbers, constants, shape, problem.device, problem.aligned)


class _Decode(NamedTuple):
    decode: Launch
    combine: Launch | None  # None where every program of decode has a whole segment
    scratch: int  # float32 elements of partial results


@lru_cache(maxsize=4096)
def _decode(problem: _Problem) -> _Decode:
    block_d, block_dv = _block(problem.q_shape[-1]), _block(problem.v_head_dim)
    segments = problem.batch * problem.k_shape[-2]
    rows = power_of_two(max(problem.max_seqlen_q, 1) * problem.group)
    block_b = FEW_SEQUENCES if problem.batch <= FEW_SEQUENCES else MANY_SEQUENCES
    shape = decode_shape(rows, block_d, problem.dtype.itemsize)
    fused_tokens = problem.new_tokens if problem.new_tokens <= MAX_FUSED_TOKENS else 0
    block_new = max(16, power_of_two(fused_tokens)) if fused_tokens else 0

    whole = problem.num_splits == 1 or problem.capacity <= MAX_WHOLE_TILES * shape.block_n
    programs = processors(problem.device) * shape.programs_per_processor
    if whole or problem.num_splits:
        programs = segments * max(problem.num_splits, 1)
    dependent = not whole and has_dependent_launch(problem.device)

    no_strides = (0, 0, 0)
    new_strides = (*(problem.k_new_strides or no_strides)[:3], *(problem.v_new_strides or no_strides)[:3])
    numbers, constants = _arguments(problem, new_strides)
    numbers += (fused_tokens, problem.k_shape[0])
    constants += (
        rows, shape.block_m, shape.block_n, block_d, block_dv, block_b, block_new, whole, dependent,
    )  # fmt: skip
    decode_launch = Launch(decode, (programs, 1, 1), numbers, constants, shape, problem.device, problem.aligned)
    if whole:
        return _Decode(decode_launch, None, 0)

    # Rows together where there are enough segments to fill the device, else one by one.
    some_rows = rows if segments >= processors(problem.device) else 1
    combine_shape = Shape(0, 0, 4, 1)
    combine_numbers = (
        problem.batch,
        problem.q_shape[0],
        problem.max_seqlen_q,
        problem.capacity,
        problem.new_tokens,
        fused_tokens,
        problem.window_left,
        programs,
    )
    combine_constants = (
        problem.k_shape[-2],
        problem.group,
        problem.v_head_dim,
        problem.window_left >= 0,
        rows,
        some_rows,
        shape.block_n,
        block_dv,
        block_b,
        max(1, min(64, 8192 // (some_rows * block_dv))),
        dependent,
    )
    combine_grid = (problem.k_shape[-2] * rows // some_rows, problem.batch, 1)
    combine_launch = Launch(
        combine,
        combine_grid,
        combine_numbers,
        combine_constants,
        combine_shape,
        problem.device,
        problem.aligned,
        dependent,
    )
    return _Decode(decode_launch, combine_launch, (segments + programs) * rows * (block_dv + 2))


def _arguments(problem: _Problem, new_strides: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[object, ...]]:
    """What ``decode`` and ``prefill`` both take: (numbers, constants)."""
    q_shape, k_shape = problem.q_shape, problem.k_shape

    def three(strides: tuple[int, ...]) -> tuple[int, int, int]:
        """Strides of the sequence or page (none for ragged rows), of the row, of the head."""
        return (strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])

    strides = (*three(problem.q_strides), *three(problem.k_strides), *three(problem.v_strides), *new_strides)
    align = stride_factor(strides, problem.aligned)
    scale, softcap = problem.scale * LOG2E, 0.0
    if problem.softcap > 0:
        scale, softcap = problem.scale / problem.softcap, problem.softcap * LOG2E
    numbers = (
        *[stride // align for stride in strides],
        problem.batch,
        q_shape[0],
        problem.max_seqlen_q,
        problem.capacity,
        problem.new_tokens,
        problem.table_width or 0,
        0 if problem.rotary_shape is None else problem.rotary_shape[0],
        problem.window_left,
        problem.window_right,
        scale,
        softcap,
    )
    constants = (
        k_shape[-2],
        problem.group,
        q_shape[-1],
        problem.v_head_dim,
        0 if problem.table_width is None else k_shape[1],
        0 if problem.rotary_shape is None else 2 * problem.rotary_shape[1],
        problem.rotary_interleaved,
        problem.window_left >= 0,
        problem.window_right >= 0,
        problem.softcap > 0,
        problem.slopes_per_sequence,
        problem.precision,
        align,
        three(problem.k_strides) == three(problem.v_strides),
    )
    return numbers, constants


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    if write.k.numel() == 0:
        return
    if _is_elsewhere(write.k.device):
        with torch.cuda.device(write.k.device):
            return kv_write(write)
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
    pointers, aligned = addresses(tensors)
    launch = _kv_write(
        write.k.dtype,
        write.k.device,
        write.k.shape,
        write.v.shape[-1],
        write.k.stride(),
        write.v.stride(),
        write.k_cache.shape,
        write.k_cache.stride(),
        write.v_cache.stride(),
        None if write.block_table is None else write.block_table.shape[1],
        None if write.rotary_cos is None else write.rotary_cos.shape[1],
        write.rotary_interleaved,
        tuple([pointer is None for pointer in pointers]),
        aligned,
    )
    launch(tensors, pointers)


@lru_cache(maxsize=4096)
def _kv_write(
    dtype: torch.dtype,
    device: torch.device,
    k_shape: torch.Size,
    v_head_dim: int,
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    cache_shape: torch.Size,
    k_cache_strides: tuple[int, ...],
    v_cache_strides: tuple[int, ...],
    table_width: int | None,
    rotary_pairs: int | None,
    interleaved: bool,
    missing: tuple[bool, ...],
    aligned: bool,
) -> Launch:
    batch, new_tokens, heads, head_dim = k_shape
    num_pages, page_size = cache_shape[:2]
    strides = (*k_strides[:3], *v_strides[:3], *k_cache_strides[:3], *v_cache_strides[:3])
    align = stride_factor(strides, aligned)
    capacity = page_size * (1 if table_width is None else table_width)
    numbers = (*[stride // align for stride in strides], new_tokens, capacity, table_width or 0, num_pages)
    block_t = min(16, power_of_two(new_tokens))
    constants = (
        head_dim,
        v_head_dim,
        0 if table_width is None else page_size,
        2 * (rotary_pairs or 0),
        interleaved,
        align,
        block_t,
        _block(head_dim),
        _block(v_head_dim),
    )
    grid = (heads, batch, -(-new_tokens // block_t))
    return Launch(kv_write_kernel, grid, numbers, constants, Shape(0, 0, 1 if block_t == 1 else 4, 1), device, aligned)


def _is_elsewhere(device: torch.device) -> bool:
    """Whether Triton would launch on another device than the tensors'."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def _block(head_dim: int) -> int:
    """A tile's width for a head dim: a power of two that the matrix units take."""
    return max(16, power_of_two(head_dim))


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless torch's own may use tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
