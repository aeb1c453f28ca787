"""Calls to dispatches: which kernels run, over which grid, with which arguments."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...call import AttentionCall, CacheWrite
from .compiler import core_count, kernel, packed
from .plan import (
    DECODE_MAX_QUERIES,
    HEAD_DIMS,
    MAX_SPLITS,
    MIN_LANE_DIMS,
    TILE_KEYS,
    plan_decode,
    plan_prefill,
    plan_splits,
)

LOG2_E = 1.4426950408889634


class Params(NamedTuple):
    """The integers of a dispatch, as the struct of the same name in the shader. Strides count elements."""

    batch_size: int
    num_tokens_q: int  # queries of each sequence; of all together where they are packed
    num_heads: int
    capacity: int  # keys of a sequence whose length is not given
    num_new_tokens: int  # of each sequence, behind those its length counts
    appends: int  # whether decode writes them to the cache
    num_splits: int
    max_pages: int  # of a sequence: the width of block_table
    has_cu_seqlens_q: int
    has_cu_seqlens_k: int
    has_seqused_q: int
    has_seqused_k: int
    has_cache_batch_idx: int
    has_cache_leftpad: int
    has_alibi_slopes: int
    has_sinks: int
    alibi_batch_stride: int
    rotary_half: int  # 0 = no rotary embedding
    rotary_interleaved: int
    rotary_by_position: int
    rotary_positions: int
    q_batch_stride: int
    q_token_stride: int
    q_head_stride: int
    k_batch_stride: int
    k_page_stride: int
    k_token_stride: int
    k_head_stride: int
    v_batch_stride: int
    v_page_stride: int
    v_token_stride: int
    v_head_stride: int
    k_new_batch_stride: int
    k_new_token_stride: int
    k_new_head_stride: int
    v_new_batch_stride: int
    v_new_token_stride: int
    v_new_head_stride: int


class ScoreParams(NamedTuple):
    """What makes scores of products of queries and keys, as the struct of the same name in the shader."""

    scale: float  # from q . k to a score in base 2, or to the argument of softcap's tanh
    softcap: float  # in base 2; 0 = none
    window_left: int  # -1 = unbounded
    window_right: int


STRUCTS = (Params, ScoreParams)
COMBINE_SIMDGROUPS = 4
_NO_SIZES = Params(*(0 for _ in Params._fields))


def supports(call: AttentionCall) -> tuple[bool, str]:
    """Whether the kernels can run a call, and if not, why."""
    head_dim = call.q.shape[-1]
    if head_dim not in HEAD_DIMS:
        return False, f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    page_size = call.k.shape[1] if call.block_table is not None else TILE_KEYS
    if max(call.k.stride(-3), call.v.stride(-3)) * page_size >= 2**31:
        return False, "a page spans more than 2^31 elements"
    return True, ""


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend. Returns ``(out, lse)`` of the shapes the call gives."""
    out = call.q.new_empty(call.out_shape)
    lse = torch.empty(call.lse_shape, dtype=torch.float32, device=call.q.device)
    few_queries = call.max_seqlen_q <= DECODE_MAX_QUERIES
    if few_queries and out.numel():
        _decode(call, out, lse)
        return out, lse
    if call.k_new is not None:
        kv_write(call.write)
    if out.numel():
        _prefill(call, out, lse)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot: one dispatch."""
    batch, new_tokens, kv_heads, head_dim = write.k.shape
    if not batch * new_tokens * kv_heads:
        return
    paged = write.block_table is not None
    sizes = _NO_SIZES._replace(
        max_pages=write.block_table.shape[1] if write.block_table is not None else 0,
        has_cache_batch_idx=int(write.cache_batch_idx is not None),
        **_cache_strides(write.k_cache, write.v_cache, paged),
        **_new_strides(write.k, write.v),
        **_rotary_sizes(write.rotary_cos, write.rotary_interleaved),
    )
    definitions = (
        ("HEAD_DIM", head_dim),
        ("V_HEAD_DIM", write.v.shape[-1]),
        ("PAGED", int(paged)),
        ("PAGE_SIZE", write.k_cache.shape[1] if paged else TILE_KEYS),
        ("CHUNK", MIN_LANE_DIMS),
        ("ALIGNED", 1),
    )
    heads_together = next(n for n in (8, 4, 2, 1) if kv_heads % n == 0)
    kernel("kv_write", write.k.dtype, definitions, STRUCTS)(
        write.k,
        write.v,
        write.k_cache,
        write.v_cache,
        write.seq_lens,
        *_given(write.k.device, torch.int32, write.cache_batch_idx, write.block_table),
        *_given(write.k.device, write.k.dtype, write.rotary_cos, write.rotary_sin),
        packed(sizes),
        threads=(32 * kv_heads, new_tokens, batch),
        group_size=(32 * heads_together, 1, 1),
    )


def _decode(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Few queries a sequence: one dispatch, append included, or two where the keys are split."""
    dtype, device = call.q.dtype, call.q.device
    heads, kv_heads, head_dim, v_head_dim = call.q.shape[-2], call.k.shape[-2], call.q.shape[-1], call.v.shape[-1]
    group, batch, page_size = heads // kv_heads, call.batch_size, _page_size(call)
    max_keys, max_queries = _most_keys_seen(call), max(1, call.max_seqlen_q)  # 1: rows behind all sequences
    plan = plan_decode(batch * kv_heads, group, max_queries, max_keys, head_dim, v_head_dim, dtype.itemsize, page_size)
    row_tiles = -(-group * max_queries // plan.rows)
    if row_tiles > 1 and call.k_new is not None:  # several threadgroups read the new keys: they must be there before
        kv_write(call.write)
    threadgroups = batch * kv_heads * row_tiles
    planned = plan_splits(threadgroups, plan.simdgroups, plan.rows, max_keys, core_count())
    splits = min(call.num_splits or planned, MAX_SPLITS)
    sizes = _sizes(call)._replace(num_splits=splits, appends=int(row_tiles == 1 and call.k_new is not None))
    partial_out = partial_sums = None
    if splits > 1:
        rows = out.numel() // v_head_dim
        partial_out = torch.empty(rows * splits * v_head_dim, dtype=torch.float32, device=device)
        partial_sums = torch.empty(rows * splits * 2, dtype=torch.float32, device=device)

    definitions = (
        *_shape_definitions(call, plan.chunk),
        ("ROWS", plan.rows),
        ("SIMDGROUPS", plan.simdgroups),
        ("K_LANES", plan.k_lanes),
        ("K_CHUNKS", plan.k_chunks),
        ("V_LANES", plan.v_lanes),
        ("V_CHUNKS", plan.v_chunks),
        ("K_STEPS", plan.k_steps),
        ("V_STEPS", plan.v_steps),
        ("KEY_BLOCK", plan.key_block),
        ("REDUCE_ROWS", plan.reduce_rows),
        ("K_RUN", plan.k_run),
        ("V_RUN", plan.v_run),
    )
    threads = 32 * plan.simdgroups
    kernel("decode", dtype, definitions, STRUCTS)(
        call.q,
        *_given(device, dtype, call.k, call.v),
        out,
        lse,
        *_given(device, dtype, call.k_new, call.v_new),
        *_given(device, torch.int32, *_lengths(call), call.block_table),
        *_given(device, dtype, call.rotary_cos, call.rotary_sin),
        *_given(device, torch.float32, call.alibi_slopes, call.sinks, partial_out, partial_sums),
        packed(sizes),
        packed(_numbers(call)),
        threads=(threads * kv_heads, splits * row_tiles, batch + sizes.has_cu_seqlens_q),
        group_size=(threads, 1, 1),
    )
    if partial_out is not None and partial_sums is not None:
        _combine(partial_out, partial_sums, call.sinks, out, lse, sizes)


def _combine(
    partial_out: Tensor, partial_sums: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, sizes: Params
) -> None:
    """Merge the parts of split keys."""
    v_head_dim, heads = out.shape[-1], out.shape[-2]
    definitions = (
        ("V_HEAD_DIM", v_head_dim),
        ("SIMDGROUPS", COMBINE_SIMDGROUPS),
        ("PAGED", 0),
        ("CHUNK", MIN_LANE_DIMS),
        ("ALIGNED", 1),
    )
    threads = 32 * COMBINE_SIMDGROUPS
    kernel("combine", out.dtype, definitions, STRUCTS)(
        partial_out,
        partial_sums,
        *_given(out.device, torch.float32, sinks),
        out,
        lse,
        packed(sizes),
        threads=(threads * heads, out.numel() // (v_head_dim * heads), 1),
        group_size=(threads, 1, 1),
    )


def _prefill(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Many queries a sequence, over keys that are in the cache already: one dispatch."""
    dtype, device = call.q.dtype, call.q.device
    plan = plan_prefill(call.q.shape[-1], call.v.shape[-1], dtype.itemsize)
    sizes = _sizes(call)
    definitions = (
        *_shape_definitions(call, plan.chunk),
        ("KEY_TILE", plan.key_tile),
        ("SIMDGROUPS", plan.simdgroups),
    )
    kv_heads = call.k.shape[-2]
    rows = call.max_seqlen_q * (call.q.shape[-2] // kv_heads)
    threads = 32 * plan.simdgroups
    kernel("prefill", dtype, definitions, STRUCTS)(
        call.q,
        *_given(device, dtype, call.k, call.v),
        out,
        lse,
        *_given(device, torch.int32, *_lengths(call), call.block_table),
        *_given(device, dtype, call.rotary_cos, call.rotary_sin),
        *_given(device, torch.float32, call.alibi_slopes, call.sinks),
        packed(sizes),
        packed(_numbers(call)),
        threads=(threads * -(-rows // (8 * plan.simdgroups)), kv_heads, call.batch_size + sizes.has_cu_seqlens_q),
        group_size=(threads, 1, 1),
    )


def _sizes(call: AttentionCall) -> Params:
    """The integers of a call, for decode and prefill alike."""
    q, ragged = call.q, call.cu_seqlens_q is not None
    slopes = call.alibi_slopes
    return _NO_SIZES._replace(
        num_tokens_q=q.shape[0] if ragged else q.shape[1],
        batch_size=call.batch_size,
        num_heads=q.shape[-2],
        capacity=call.capacity,
        num_new_tokens=0 if call.k_new is None else call.k_new.shape[1],
        max_pages=0 if call.block_table is None else call.block_table.shape[1],
        has_cu_seqlens_q=int(ragged),
        has_cu_seqlens_k=int(call.cu_seqlens_k is not None),
        has_seqused_q=int(call.seqused_q is not None),
        has_seqused_k=int(call.seqused_k is not None),
        has_cache_batch_idx=int(call.cache_batch_idx is not None),
        has_cache_leftpad=int(call.cache_leftpad is not None),
        has_alibi_slopes=int(slopes is not None),
        has_sinks=int(call.sinks is not None),
        alibi_batch_stride=slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0,
        rotary_by_position=int(call.window_left >= 0 or call.window_right >= 0),
        q_batch_stride=0 if ragged else q.stride(0),
        q_token_stride=q.stride(-3),
        q_head_stride=q.stride(-2),
        **_cache_strides(call.k, call.v, call.block_table is not None),
        **(_new_strides(call.k_new, call.v_new) if call.k_new is not None and call.v_new is not None else {}),
        **_rotary_sizes(call.rotary_cos, call.rotary_interleaved),
    )


def _numbers(call: AttentionCall) -> ScoreParams:
    windows = (call.window_left, call.window_right)
    if call.softcap > 0:
        return ScoreParams(call.scale / call.softcap, call.softcap * LOG2_E, *windows)
    return ScoreParams(call.scale * LOG2_E, 0.0, *windows)


def _cache_strides(k: Tensor, v: Tensor, paged: bool) -> dict[str, int]:
    """Strides of keys where they lie. Unpaged ones are pages of ``TILE_KEYS`` tokens that follow each other."""
    strides: dict[str, int] = {}
    for name, rows in (("k", k), ("v", v)):
        token_stride = rows.stride(-3)
        strides |= {
            f"{name}_batch_stride": 0 if paged else rows.stride(0),
            f"{name}_page_stride": rows.stride(0) if paged else TILE_KEYS * token_stride,
            f"{name}_token_stride": token_stride,
            f"{name}_head_stride": rows.stride(-2),
        }
    return strides


def _new_strides(k_new: Tensor, v_new: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}_stride": stride
        for name, tensor in (("k_new", k_new), ("v_new", v_new))
        for axis, stride in zip(("batch", "token", "head"), tensor.stride())
    }


def _rotary_sizes(cosines: Tensor | None, interleaved: bool) -> dict[str, int]:
    if cosines is None:
        return {}
    return {
        "rotary_half": cosines.shape[1],
        "rotary_positions": cosines.shape[0],
        "rotary_interleaved": int(interleaved),
    }


def _shape_definitions(call: AttentionCall, chunk: int) -> tuple[tuple[str, int], ...]:
    heads, kv_heads = call.q.shape[-2], call.k.shape[-2]
    aligned = all(
        number % chunk == 0 for rows in (call.q, call.k, call.v) for number in (rows.storage_offset(), *rows.stride()[:-1])
    )
    return (
        ("HEAD_DIM", call.q.shape[-1]),
        ("V_HEAD_DIM", call.v.shape[-1]),
        ("GROUP", heads // kv_heads),
        ("PAGED", int(call.block_table is not None)),
        ("PAGE_SIZE", _page_size(call)),
        ("CHUNK", chunk),
        ("ALIGNED", int(aligned)),
    )


def _page_size(call: AttentionCall) -> int:
    return TILE_KEYS if call.block_table is None else call.k.shape[1]


def _most_keys_seen(call: AttentionCall) -> int:
    """Most keys that the queries of one sequence see, as far as the host knows."""
    keys = min(call.max_seqlen_k, call.capacity)
    if call.window_left >= 0 and call.window_right >= 0:
        keys = min(keys, call.window_left + call.window_right + call.max_seqlen_q)
    return keys


def _lengths(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """Offsets and lengths, in the order of the kernels' arguments."""
    return (
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.seqused_q,
        call.seqused_k,
        call.cache_batch_idx,
        call.cache_leftpad,
    )


def _given(device: torch.device, dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with a stand-in for each that is absent or empty: a kernel never reads it, but it must be bound."""
    return [_stand_in(device, dtype) if tensor is None or not tensor.numel() else tensor for tensor in tensors]


@cache
def _stand_in(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(4, dtype=dtype, device=device)
