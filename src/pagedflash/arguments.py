"""From what callers pass to a problem: aliases, int64 to int32, windows, defaults, and the names that errors use.

Types are validated here as far as a problem cannot be built without them; all else is for :mod:`pagedflash.validate`.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import plan_cache
from .errors import ATTENTION_NAMES, KVCACHE_NAMES, Names, reject, reject_type
from .problem import Append, AttentionProblem, CacheWrite, KVCache, Queries, Scores

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1

Given = Any
"""An argument as it came."""


class Named(NamedTuple):
    """A problem and what its caller calls its fields."""

    problem: AttentionProblem
    names: Names


class ScoreArguments(NamedTuple):
    """The arguments about scores that all attention functions have, as they came."""

    softmax_scale: Given
    causal: Given
    window_size: Given
    softcap: Given
    alibi_slopes: Given
    s_aux: Given
    learnable_sink: Given


def dense(q: Given, k: Given, v: Given, dropout_p: Given, scores: ScoreArguments) -> Named:
    """The problem of ``flash_attn_func``."""
    _reject_dropout(dropout_p)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _require_axes(name, tensor, 4)
    problem = AttentionProblem.of(
        Queries(_inner_contiguous(q), max_seqlen_q=q.shape[1]),
        KVCache(_inner_contiguous(k), _inner_contiguous(v), max_seqlen_k=k.shape[1]),
        None,
        _scores(scores, q),
    )
    return Named(problem, _names(ATTENTION_NAMES, scores))


def packed(
    q: Given,
    k: Given,
    v: Given,
    cu_seqlens_q: Given,
    cu_seqlens_k: Given,
    max_seqlen_q: Given,
    max_seqlen_k: Given,
    dropout_p: Given,
    block_table: Given,
    page_table: Given,
    seqused_q: Given,
    seqused_k: Given,
    scores: ScoreArguments,
) -> Named:
    """The problem of ``flash_attn_varlen_func``."""
    _reject_dropout(dropout_p)
    table = _one_of("block_table", block_table, "page_table", page_table)
    _require_axes("q", q, 3)
    for name, keys in (("k", k), ("v", v)):
        _require_axes(name, keys, 3 if table is None else 4)
    if cu_seqlens_k is None and (table is None or seqused_k is None):
        reject("cu_seqlens_k", "None", "offsets of the keys (None only with block_table and seqused_k)")
    problem = AttentionProblem.of(
        Queries(
            _inner_contiguous(q),
            _int32("cu_seqlens_q", _required("cu_seqlens_q", cu_seqlens_q)),
            _int32("seqused_q", seqused_q),
            _integer("max_seqlen_q", max_seqlen_q),
        ),
        KVCache(
            _inner_contiguous(k) if table is None else k,
            _inner_contiguous(v) if table is None else v,
            block_table=_int32("block_table" if page_table is None else "page_table", table),
            seqused_k=_int32("seqused_k", seqused_k),
            cu_seqlens_k=_int32("cu_seqlens_k", cu_seqlens_k),
            max_seqlen_k=_integer("max_seqlen_k", max_seqlen_k),
        ),
        None,
        _scores(scores, q),
    )
    return Named(problem, _names(ATTENTION_NAMES, scores, page_table))


def cached(
    q: Given,
    k_cache: Given,
    v_cache: Given,
    k: Given,
    v: Given,
    rotary_cos: Given,
    rotary_sin: Given,
    cache_seqlens: Given,
    cache_batch_idx: Given,
    cache_leftpad: Given,
    block_table: Given,
    page_table: Given,
    rotary_interleaved: Given,
    num_splits: Given,
    scores: ScoreArguments,
) -> Named:
    """The problem of ``flash_attn_with_kvcache``.

    A decode step is mostly like the one before, and short: how its arguments became a problem is kept with their signature.
    """
    table = _one_of("block_table", block_table, "page_table", page_table)
    names = _names(KVCACHE_NAMES, scores, page_table)
    window = _window(scores.window_size, scores.causal)
    softmax_scale = None if scores.softmax_scale is None else _number("softmax_scale", scores.softmax_scale)
    softcap, num_splits = _number("softcap", scores.softcap), _integer("num_splits", num_splits)
    rotary_interleaved = bool(rotary_interleaved)

    tensors = (
        q, None, None, k_cache, v_cache, table, cache_batch_idx, cache_leftpad, cache_seqlens, None,
        k, v, rotary_cos, rotary_sin, scores.alibi_slopes, scores.s_aux,
    )  # fmt: skip
    # As plain numbers: 1.0 would be found where 1 is kept.
    options = (softmax_scale, *window, softcap, rotary_interleaved, num_splits, scores.learnable_sink is None)
    entry = plan_cache.entry_of_arguments(tensors, options)
    if entry is not None and entry.arguments is not None:
        numbers, problem_entry = entry.arguments
        problem = AttentionProblem(tensors, numbers)
        problem.entry = problem_entry
        return Named(problem, names)

    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _require_axes(name, tensor, 4)
    has_append = any(x is not None for x in (k, v, rotary_cos, rotary_sin))
    problem = AttentionProblem.of(
        Queries(_inner_contiguous(q), max_seqlen_q=q.shape[1]),
        KVCache(
            k_cache,
            v_cache,
            block_table=_int32("block_table" if page_table is None else "page_table", table),
            cache_batch_idx=_int32("cache_batch_idx", cache_batch_idx),
            cache_leftpad=_int32("cache_leftpad", cache_leftpad),
            seqused_k=_lengths("cache_seqlens", cache_seqlens, q),
            max_seqlen_k=k_cache.shape[1] * (1 if table is None else _tensor("block_table", table).shape[-1]),
        ),
        Append(
            _inner_contiguous(k), _inner_contiguous(v), _contiguous(rotary_cos), _contiguous(rotary_sin), rotary_interleaved
        )
        if has_append
        else None,
        _scores(scores, q),
        num_splits,
    )
    # Where no tensor had to be converted, the tensors of the next arguments like these are those of the next problem.
    if entry is not None and problem.entry is not None and all(a is b for a, b in zip(tensors, problem.tensors)):
        entry.arguments = problem.numbers, problem.entry
    return Named(problem, names)


def write(k: Given, v: Given, k_cache: Given, v_cache: Given, block_table: Given, seq_lens: Given) -> CacheWrite:
    """The write of ``kv_paged_write``."""
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _require_axes(name, tensor, 4)
    return CacheWrite.of(
        KVCache(
            k_cache,
            v_cache,
            block_table=_int32("block_table", _required("block_table", block_table)),
            seqused_k=_lengths("seq_lens", _required("seq_lens", seq_lens), k),
        ),
        Append(_inner_contiguous(k), _inner_contiguous(v)),
    )


def _names(names: Names, scores: ScoreArguments, page_table: Given = None) -> Names:
    """The caller's names of a problem's fields, where it used the newer aliases of some."""
    if scores.learnable_sink is not None:
        names = {**names, "sinks": "learnable_sink"}
    if page_table is not None:
        names = {**names, "block_table": "page_table"}
    return names


def _scores(given: ScoreArguments, q: Tensor) -> Scores:
    window_left, window_right = _window(given.window_size, given.causal)
    scale = given.softmax_scale
    return Scores(
        _contiguous(given.alibi_slopes),
        _sinks(given.s_aux, given.learnable_sink),
        1.0 / math.sqrt(q.shape[-1] or 1) if scale is None else _number("softmax_scale", scale),
        _number("softcap", given.softcap),
        window_left,
        window_right,
    )


def _window(window_size: Given, causal: Given) -> tuple[int, int]:
    """``(left, right)``; causal is a right window of 0."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        reject("window_size", "{window}", "a pair (left, right)", window=window_size)
    left, right = window_size
    if left.__class__ is not int or right.__class__ is not int:
        left, right = _integer("window_size", left), _integer("window_size", right)
    return left, 0 if causal and right >= -1 else right


def _sinks(s_aux: Given, learnable_sink: Given) -> Given:
    """Sinks come in the model's dtype; backends read contiguous float32."""
    sinks = _one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    if sinks is None:
        return None
    name = "learnable_sink" if s_aux is None else "s_aux"
    if not _tensor(name, sinks).is_floating_point():
        reject_type(name, "of dtype {dtype}", "a floating point dtype", dtype=sinks.dtype)
    return sinks.to(torch.float32).contiguous()


def _lengths(name: str, lengths: Given, batched: Tensor) -> Given:
    """One length for all sequences becomes a tensor of them."""
    if not isinstance(lengths, Tensor) and isinstance(lengths, (int, torch.SymInt)) and not isinstance(lengths, bool):
        return torch.full((batched.shape[0],), cast(int, lengths), dtype=torch.int32, device=batched.device)
    return _int32(name, lengths)


def _int32(name: str, tensor: Given) -> Given:
    """Lengths and tables come as int32 or int64; backends read contiguous int32. Values past int32 stay invalid."""
    if tensor is None:
        return None
    dtype = _tensor(name, tensor).dtype
    if dtype is torch.int32:
        return tensor.contiguous()
    if dtype is torch.int64:
        return tensor.clamp(_INT32_MIN, _INT32_MAX).to(torch.int32).contiguous()
    reject_type(name, "of dtype {dtype}", "torch.int32 or torch.int64", dtype=dtype)


def _contiguous(tensor: Given) -> Given:
    return tensor.contiguous() if isinstance(tensor, Tensor) else tensor


def _inner_contiguous(tensor: Given) -> Given:
    """Inputs (never caches) whose last axis is strided are copied, as flash-attn does."""
    if not isinstance(tensor, Tensor) or tensor.is_contiguous():
        return tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _one_of(name: str, value: Given, other_name: str, other: Given) -> Given:
    """Two names of one argument: at most one may be given."""
    if value is not None and other is not None:
        reject(other_name, f"given together with {name}", "one of the two: they name the same thing")
    return other if value is None else value


def _required(name: str, value: Given) -> Given:
    if value is None:
        reject(name, "None", "a tensor")
    return value


def _tensor(name: str, value: Given) -> Tensor:
    if not isinstance(value, Tensor):
        reject_type(name, "of type {type}", "a torch.Tensor", type=type(value).__name__)
    return value


def _require_axes(name: str, tensor: Given, axes: int) -> None:
    if not isinstance(tensor, Tensor):
        reject_type(name, "of type {type}", "a torch.Tensor of {axes} axes", type=type(tensor).__name__, axes=axes)
    if tensor.dim() != axes:
        reject(name, "of shape {shape}", "{axes} axes", shape=tuple(tensor.shape), axes=axes)


def _reject_dropout(dropout_p: Given) -> None:
    if not isinstance(dropout_p, (int, float)) or dropout_p != 0.0:
        reject("dropout_p", "{p}", "0: there is no dropout without a backward", p=dropout_p)


def _number(name: str, value: Given) -> float:
    if isinstance(value, (float, int)):
        return float(value)
    reject_type(name, "of type {type}", "a number", type=type(value).__name__)


def _integer(name: str, value: Given) -> int:
    """Ints, SymInts while tracing, and whatever else is an exact integer (NumPy's, 0-dim tensors)."""
    if isinstance(value, (int, torch.SymInt)):
        return cast(int, value)
    try:
        return operator.index(value)
    except TypeError:
        reject_type(name, "of type {type}", "an int", type=type(value).__name__)
