"""From what callers pass to a problem: aliases, int64 to int32, windows, defaults, and the names that errors use.

Types are validated here as far as a problem cannot be built without them; all else is for :mod:`pagedflash.validate`.
"""

from __future__ import annotations

import math
import operator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import plan_cache
from .errors import ATTENTION_NAMES, KVCACHE_NAMES, WRITE_NAMES, Names, reject, reject_type
from .plan_cache import Entry
from .problem import Append, AttentionProblem, CacheWrite, KVCache, Queries, Scores

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1

Given = Any
"""An argument as it came."""

Problem = TypeVar("Problem", AttentionProblem, CacheWrite)


def dense(
    q: Given,
    k: Given,
    v: Given,
    num_splits: Given,
    *scores: Given,
) -> tuple[AttentionProblem, Names]:
    """The problem of ``flash_attn_func``, and its names."""
    *options, alibi_slopes, s_aux, learnable_sink = scores
    tensors = (q, None, None, k, v, *_NONE[:13], alibi_slopes, learnable_sink if s_aux is None else s_aux, None)
    found = plan_cache.entry_of_arguments(tensors, (_DENSE, num_splits, s_aux is None, learnable_sink is None, *options))
    if (known := _known(AttentionProblem, found, tensors)) is not None:
        return known

    names = _names(ATTENTION_NAMES, learnable_sink)
    num_splits = _integer("num_splits", num_splits)
    numbers = _score_numbers(*options)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _require_axes(name, tensor, 4)
    problem = AttentionProblem.of(
        Queries(_inner_contiguous(q), max_seqlen_q=q.shape[1]),
        KVCache(_inner_contiguous(k), _inner_contiguous(v), max_seqlen_k=k.shape[1]),
        None,
        _scores(q, numbers, alibi_slopes, _sinks(s_aux, learnable_sink)),
        num_splits,
    )
    return _keep(found, tensors, problem, names)


def packed(
    q: Given,
    k: Given,
    v: Given,
    cu_seqlens_q: Given,
    cu_seqlens_k: Given,
    max_seqlen_q: Given,
    max_seqlen_k: Given,
    block_table: Given,
    page_table: Given,
    seqused_q: Given,
    seqused_k: Given,
    k_new: Given,
    v_new: Given,
    k_descale: Given,
    v_descale: Given,
    num_splits: Given,
    *scores: Given,
) -> tuple[AttentionProblem, Names]:
    """The problem of ``flash_attn_varlen_func``, and its names."""
    *options, alibi_slopes, s_aux, learnable_sink = scores
    appends = k_new is not None or v_new is not None
    tensors = (
        q, cu_seqlens_q, seqused_q, k, v, k_descale, v_descale, page_table if block_table is None else block_table,
        None, None, seqused_k, cu_seqlens_k, k_new, v_new, None, None, cu_seqlens_q if appends else None, None,
        alibi_slopes, learnable_sink if s_aux is None else s_aux, None,
    )  # fmt: skip
    given = block_table is None, page_table is None, s_aux is None, learnable_sink is None
    seqlens = max_seqlen_q, plan_cache.round_hint(max_seqlen_k)
    found = plan_cache.entry_of_arguments(tensors, (_PACKED, *seqlens, num_splits, *given, *options))
    if (known := _known(AttentionProblem, found, tensors)) is not None:
        problem, _ = known
        before, after = problem.numbers[: problem.HINT], problem.numbers[problem.HINT + 1 :]
        problem.numbers = (*before, max_seqlen_k, *after)  # what is kept has one of the same power of two
        return known

    names = _names(ATTENTION_NAMES, learnable_sink, page_table)
    num_splits = _integer("num_splits", num_splits)
    numbers = _score_numbers(*options)
    table = _one_of("block_table", block_table, "page_table", page_table)
    max_seqlen_q, max_seqlen_k = _integer("max_seqlen_q", max_seqlen_q), _integer("max_seqlen_k", max_seqlen_k)
    if appends and table is None:
        reject("k_new", "given without block_table", "pages to append to")
    _require_axes("q", q, 3)
    for name, keys in (("k", k), ("v", v)):
        _require_axes(name, keys, 3 if table is None else 4)
    if cu_seqlens_k is None and (table is None or seqused_k is None):
        reject("cu_seqlens_k", "None", "offsets of the keys (None only with block_table and seqused_k)")
    cu_seqlens_q = _int32("cu_seqlens_q", _required("cu_seqlens_q", cu_seqlens_q))
    append = None
    if appends:
        for name, new in (("k_new", k_new), ("v_new", v_new)):
            if new is not None:
                _require_axes(name, new, 3)
        if seqused_k is None:
            seqused_k = _tensor("cu_seqlens_k", cu_seqlens_k).diff()
        append = Append(_inner_contiguous(k_new), _inner_contiguous(v_new), cu_seqlens_new=cu_seqlens_q)
    problem = AttentionProblem.of(
        Queries(
            _inner_contiguous(q),
            cu_seqlens_q,
            _int32("seqused_q", seqused_q),
            max_seqlen_q,
        ),
        KVCache(
            _inner_contiguous(k) if table is None else k,
            _inner_contiguous(v) if table is None else v,
            k_descale,
            v_descale,
            block_table=_int32("block_table" if page_table is None else "page_table", table),
            seqused_k=_int32("seqused_k", seqused_k),
            cu_seqlens_k=_int32("cu_seqlens_k", cu_seqlens_k),
            max_seqlen_k=max_seqlen_k,
        ),
        append,
        _scores(q, numbers, alibi_slopes, _sinks(s_aux, learnable_sink)),
        num_splits,
    )
    return _keep(found, tensors, problem, names)


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
    k_descale: Given,
    v_descale: Given,
    rotary_interleaved: Given,
    num_splits: Given,
    *scores: Given,
) -> tuple[AttentionProblem, Names]:
    """The problem of ``flash_attn_with_kvcache``, and its names."""
    *options, alibi_slopes, s_aux, learnable_sink = scores
    tensors = (
        q, None, None, k_cache, v_cache, k_descale, v_descale, page_table if block_table is None else block_table,
        cache_batch_idx, cache_leftpad, cache_seqlens, None, k, v, rotary_cos, rotary_sin, None, None,
        alibi_slopes, learnable_sink if s_aux is None else s_aux, None,
    )  # fmt: skip
    given = block_table is None, page_table is None, s_aux is None, learnable_sink is None
    found = plan_cache.entry_of_arguments(tensors, (_CACHED, rotary_interleaved, num_splits, *given, *options))
    if (known := _known(AttentionProblem, found, tensors)) is not None:
        return known

    names = _names(KVCACHE_NAMES, learnable_sink, page_table)
    num_splits, rotary_interleaved = _integer("num_splits", num_splits), _flag("rotary_interleaved", rotary_interleaved)
    numbers = _score_numbers(*options)
    table = _one_of("block_table", block_table, "page_table", page_table)
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _require_axes(name, tensor, 4)
    if cache_seqlens is None and table is None and k is None and v is None and not q.dtype == k_cache.dtype == v_cache.dtype:
        cache_seqlens = k_cache.shape[1]  # all of it, as for keys of q's dtype; other formats are a cache's
    append = None
    if any(tensor is not None for tensor in (k, v, rotary_cos, rotary_sin)):
        append = Append(
            _inner_contiguous(k),
            _inner_contiguous(v),
            _contiguous(rotary_cos),
            _contiguous(rotary_sin),
            rotary_interleaved=rotary_interleaved,
        )
    problem = AttentionProblem.of(
        Queries(_inner_contiguous(q), max_seqlen_q=q.shape[1]),
        KVCache(
            k_cache,
            v_cache,
            k_descale,
            v_descale,
            block_table=_int32("block_table" if page_table is None else "page_table", table),
            cache_batch_idx=_int32("cache_batch_idx", cache_batch_idx),
            cache_leftpad=_int32("cache_leftpad", cache_leftpad),
            seqused_k=_lengths("cache_seqlens", cache_seqlens, q),
            max_seqlen_k=k_cache.shape[1] * (1 if table is None else _tensor("block_table", table).shape[-1]),
        ),
        append,
        _scores(q, numbers, alibi_slopes, _sinks(s_aux, learnable_sink)),
        num_splits,
    )
    return _keep(found, tensors, problem, names)


def write(
    k: Given,
    v: Given,
    k_cache: Given,
    v_cache: Given,
    block_table: Given,
    seq_lens: Given,
    slot_mapping: Given,
    k_descale: Given,
    v_descale: Given,
) -> tuple[CacheWrite, Names]:
    """The write of ``kv_paged_write``, and its names."""
    if slot_mapping is not None:
        cache = KVCache(k_cache, v_cache, k_descale, v_descale)
        return _write_to_slots(k, v, cache, block_table, seq_lens, slot_mapping)
    tensors = (k_cache, v_cache, k_descale, v_descale, block_table, None, None, seq_lens, None, k, v, *_NONE[:4])
    found = plan_cache.entry_of_arguments(tensors, (_WRITE,))
    if (known := _known(CacheWrite, found, tensors)) is not None:
        return known
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _require_axes(name, tensor, 4)
    problem = CacheWrite.of(
        KVCache(
            k_cache,
            v_cache,
            k_descale,
            v_descale,
            block_table=_int32("block_table", _required("block_table", block_table)),
            seqused_k=_lengths("seq_lens", _required("seq_lens", seq_lens), k),
        ),
        Append(_inner_contiguous(k), _inner_contiguous(v)),
    )
    return _keep(found, tensors, problem, WRITE_NAMES)


def _write_to_slots(
    k: Given, v: Given, cache: KVCache, block_table: Given, seq_lens: Given, slot_mapping: Given
) -> tuple[CacheWrite, Names]:
    """Packed tokens, each to a slot of its own."""
    tensors = (*cache[:4], *_NONE[:5], k, v, *_NONE[:3], slot_mapping)
    found = plan_cache.entry_of_arguments(tensors, (_SLOTS, block_table is None, seq_lens is None))
    if (known := _known(CacheWrite, found, tensors)) is not None:
        return known
    for name, other in (("block_table", block_table), ("seq_lens", seq_lens)):
        if other is not None:
            reject("slot_mapping", f"given together with {name}", "one of the two: a slot mapping already says where")
    for name, tensor, axes in (("k", k, 3), ("v", v, 3), ("k_cache", cache.k, 4), ("v_cache", cache.v, 4)):
        _require_axes(name, tensor, axes)
    append = Append(_inner_contiguous(k), _inner_contiguous(v), slot_mapping=_int64("slot_mapping", slot_mapping))
    return _keep(found, tensors, CacheWrite.of(cache, append), WRITE_NAMES)


# A step of a generation is mostly like the one before, and short: how arguments became a problem is kept with their
# signature, where no tensor had to be converted. Then the tensors of arguments like these are those of the problem.

_NONE = (None,) * 13
_DENSE, _PACKED, _CACHED, _WRITE, _SLOTS = range(5)
"""The function that options belong to."""

Found = tuple[Entry, bytes | None] | None
"""The entry of arguments and their addresses, see ``plan_cache.entry_of_arguments``."""


def _known(kind: type[Problem], found: Found, tensors: tuple[Given, ...]) -> tuple[Problem, Names] | None:
    """The problem of arguments whose signature was seen before, without looking at each of them again."""
    if found is None:
        return None
    entry, addresses = found
    if entry.problem is None:
        return None
    numbers, problem_entry, names = entry.problem
    problem = kind(tensors, numbers)
    problem.entry = problem_entry
    if addresses is not None:
        problem.addresses = addresses
    return problem, names


def _keep(found: Found, tensors: tuple[Given, ...], problem: Problem, names: Names) -> tuple[Problem, Names]:
    """A problem with dropout has a seed, which is none of ``tensors``: it is never kept."""
    if found is not None and problem.entry is not None and all(a is b for a, b in zip(tensors, problem.tensors)):
        found[0].problem = problem.numbers, problem.entry, names
    return problem, names


def _names(names: Names, learnable_sink: Given, page_table: Given = None) -> Names:
    """The caller's names of a problem's fields, where it used the newer aliases of some."""
    if learnable_sink is not None:
        names = {**names, "sinks": "learnable_sink"}
    if page_table is not None:
        names = {**names, "block_table": "page_table"}
    return names


def _score_numbers(
    softmax_scale: Given, causal: Given, window_size: Given, softcap: Given, dropout_p: Given
) -> tuple[Any, ...]:
    """The numbers of :class:`~pagedflash.problem.Scores`, the scale possibly None."""
    return (
        softmax_scale if softmax_scale is None else _number("softmax_scale", softmax_scale),
        _number("softcap", softcap),
        *_window(window_size, causal),
        _number("dropout_p", dropout_p),
    )


def _scores(q: Tensor, numbers: tuple[Any, ...], alibi_slopes: Given, sinks: Given) -> Scores:
    scale, softcap, left, right, dropout_p = numbers
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1] or 1)
    seed = None
    if dropout_p != 0.0:  # from torch's generator: the forward and the backward pass of a call share it
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    return Scores(_contiguous(alibi_slopes), sinks, seed, scale, softcap, left, right, dropout_p)


def _window(window_size: Given, causal: Given) -> tuple[int, int]:
    """``(left, right)``; causal is a right window of 0."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        reject("window_size", "{window}", "a pair (left, right)", window=window_size)
    left, right = window_size
    if left.__class__ is not int or right.__class__ is not int:
        left, right = _integer("window_size", left), _integer("window_size", right)
    return left, 0 if _flag("causal", causal) and right >= -1 else right


def _flag(name: str, flag: Given) -> bool:
    """True, False, or what equals one of them; None is False."""
    if flag.__class__ is not bool and (isinstance(flag, str) or flag not in (True, False, None)):
        reject_type(name, "{flag!r}", "True or False", flag=flag)
    return bool(flag)


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


def _int64(name: str, tensor: Given) -> Given:
    """Slot mappings come as int32 or int64; backends read contiguous int64."""
    dtype = _tensor(name, tensor).dtype
    if dtype not in (torch.int32, torch.int64):
        reject_type(name, "of dtype {dtype}", "torch.int32 or torch.int64", dtype=dtype)
    return tensor.to(torch.int64).contiguous()


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


def reject_unsupported(scheduler_metadata: Given, qv: Given, attention_chunk: Given, q_descale: Given = None) -> None:
    """Arguments of FlashAttention-3 that are accepted only where they ask for nothing."""
    if scheduler_metadata is not None:
        reject("scheduler_metadata", "given", "None: work is scheduled on the device, without metadata")
    if qv is not None:
        reject("qv", "given", "None: a second query is not supported")
    if q_descale is not None:
        reject("q_descale", "given", "None: q is never quantized, only the cache is")
    if attention_chunk != 0:
        reject("attention_chunk", "{chunk}", "0: chunked masks are not supported", chunk=attention_chunk)


def reject_dropped_probabilities(return_attn_probs: Given, dropout_p: Given) -> None:
    if return_attn_probs and dropout_p:
        reject("return_attn_probs", "True with a dropout_p of {p}", "False: probabilities are never held", p=dropout_p)


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
