"""The public functions: flash-attn's signatures, from arguments to one :class:`~pagedflash.call.AttentionCall`.

Argument names, order and semantics are those of flash-attn 2.8 (``flash_attn_interface.py``), with the newer names that
callers look for (``s_aux``, ``learnable_sink``, ``seqused_q``, ``seqused_k``, ``page_table``, ``return_softmax_lse``) as
keyword arguments behind them. Every argument is a named parameter, since callers discover support with
``inspect.signature``.

Common to the three attention functions:

* ``B`` sequences, ``Sq`` queries, ``Sk`` keys, ``Hq`` query heads, ``Hkv`` key/value heads (``Hq % Hkv == 0``: query head
  ``h`` reads key head ``h // (Hq // Hkv)``), ``D`` head dim (a multiple of 8, at most 256), ``Dv <= D`` head dim of v.
* q, k, v share one dtype: float32, float16 or bfloat16. Sums and the softmax are float32.
* Masks are aligned to the bottom right: query ``i`` sits at key position ``i + Sk - Sq``.
* A query that sees no key gives 0, and ``+inf`` as its LSE (as flash-attn 2).
* There is no backward yet: tensors that require grad are refused unless grad mode is off.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from . import dispatch, reference
from .call import (
    FLOAT_DTYPES,
    KVCACHE_NAMES,
    NAMES,
    NO_BACKWARD,
    AttentionCall,
    CacheWrite,
    Names,
    check,
    check_shape,
    check_tensor,
    check_write,
    recall,
    refuse,
    remember,
)
from .ops import attention, attention_with_append, is_watched, write_cache

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1

Given = Any
"""An argument as it came: what is not the tensor it should be is passed on to :func:`~pagedflash.call.check`."""

Output = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Output:
    """Attention of dense queries over dense keys.

    Args:
        q: ``(B, Sq, Hq, D)``.
        k: ``(B, Sk, Hkv, D)``.
        v: ``(B, Sk, Hkv, Dv)``.
        dropout_p: must be 0.
        softmax_scale: factor on ``q @ k^T``; ``1 / sqrt(D)`` if None.
        causal: query ``i`` sees keys ``j <= i + Sk - Sq``.
        window_size: ``(left, right)``, inclusive, -1 = unbounded: query ``i`` sees keys from ``i + Sk - Sq - left`` to
            ``i + Sk - Sq + right``. With ``causal``, right is 0.
        softcap: if > 0, scores become ``softcap * tanh(scores / softcap)``, after scaling, before masking (Gemma 2).
        alibi_slopes: float32 ``(Hq,)`` or ``(B, Hq)``; adds ``-slope * |i + Sk - Sq - j|`` (Press et al., 2022).
        deterministic: accepted for compatibility; the forward pass always is.
        return_attn_probs: return ``(out, lse, S_dmask)`` as flash-attn does; S_dmask is empty without dropout.
        s_aux: ``(Hq,)`` attention sinks: one extra logit per head in the softmax denominator (gpt-oss). Counted in the LSE.
        learnable_sink: another name of ``s_aux``.
        return_softmax_lse: return ``(out, lse)``.

    Returns:
        ``out (B, Sq, Hq, Dv)`` in q's dtype, or a tuple with ``lse (B, Hq, Sq)``: float32, the natural logarithm of the
        softmax denominator.

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: of a wrong shape or value. Both name it.

    Source: Dao, "FlashAttention-2" (2023); flash-attn's ``flash_attn_func``.
    """
    _check_dropout(dropout_p)
    _check_dims("q", q, 4)
    _check_dims("k", k, 4)
    _check_dims("v", v, 4)
    window_left, window_right = _window(window_size, causal)
    call = AttentionCall(
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        alibi_slopes=_contiguous(alibi_slopes),
        sinks=_sinks(s_aux, learnable_sink),
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        scale=_scale(softmax_scale, q),
        window_left=window_left,
        window_right=window_right,
        softcap=_number("softcap", softcap),
    )
    return _run(call, _names(NAMES, learnable_sink), return_attn_probs, return_softmax_lse)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
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
    block_table: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Output:
    """Attention of sequences of different lengths packed one after another, over packed or paged keys.

    Args:
        q: ``(total_q, Hq, D)``. Rows behind ``cu_seqlens_q[-1]`` give 0.
        k: ``(total_k, Hkv, D)``, or with a block table pages ``(num_pages, page_size, Hkv, D)`` (chunked prefill).
        v: as k, with ``Dv``.
        cu_seqlens_q: ``(B + 1,)`` int32 or int64, starting with 0: sequence ``b`` has rows ``cu[b]`` to ``cu[b + 1]``.
        cu_seqlens_k: the same for the keys. With a block table only its differences count, as lengths; None is allowed
            if ``seqused_k`` gives them.
        max_seqlen_q: at least the longest sequence in ``cu_seqlens_q``.
        max_seqlen_k: the longest sequence of keys, a hint.
        block_table: ``(B, max_pages)`` int32 or int64: key ``t`` of sequence ``b`` is in page
            ``block_table[b, t // page_size]`` at ``t % page_size``. Entries behind the length may be anything.
        page_table: another name of ``block_table`` (FlashAttention-3).
        seqused_q: ``(B,)``: only the first ``seqused_q[b]`` queries of sequence ``b`` are used; the others give 0.
        seqused_k: ``(B,)``: only the first ``seqused_k[b]`` keys of sequence ``b`` are used.

    The other arguments, errors and source: see :func:`flash_attn_func`.

    Returns:
        ``out (total_q, Hq, Dv)`` in q's dtype, or a tuple with ``lse (Hq, total_q)`` float32.
    """
    _check_dropout(dropout_p)
    table = _one_of("block_table", block_table, "page_table", page_table)
    _check_dims("q", q, 3)
    _check_dims("k", k, 3 if table is None else 4)
    _check_dims("v", v, 3 if table is None else 4)
    if cu_seqlens_k is None and (table is None or seqused_k is None):
        refuse("cu_seqlens_k", "None", "offsets of the keys (None only with block_table and seqused_k)")
    window_left, window_right = _window(window_size, causal)
    call = AttentionCall(
        q=_rows(q),
        k=_rows(k) if table is None else k,
        v=_rows(v) if table is None else v,
        cu_seqlens_q=_int32("cu_seqlens_q", _required("cu_seqlens_q", cu_seqlens_q)),
        cu_seqlens_k=_int32("cu_seqlens_k", cu_seqlens_k),
        seqused_q=_int32("seqused_q", seqused_q),
        seqused_k=_int32("seqused_k", seqused_k),
        block_table=_int32("block_table", table),
        alibi_slopes=_contiguous(alibi_slopes),
        sinks=_sinks(s_aux, learnable_sink),
        max_seqlen_q=_integer("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=_integer("max_seqlen_k", max_seqlen_k),
        scale=_scale(softmax_scale, q),
        window_left=window_left,
        window_right=window_right,
        softcap=_number("softcap", softcap),
    )
    names = _names(NAMES, learnable_sink, page_table)
    return _run(call, names, return_attn_probs, return_softmax_lse)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Output:
    """Append new keys and values to a cache in place, then attend to the cache including them.

    Args:
        q: ``(B, Sq, Hq, D)``.
        k_cache: ``(B_cache, Sk, Hkv, D)``, or with a block table pages ``(num_pages, page_size, Hkv, D)``. May be a
            strided view (last axis contiguous), and may share one allocation with ``v_cache``.
        v_cache: as k_cache, with ``Dv``.
        k: ``(B, S_new, Hkv, D)`` to append at ``cache_seqlens[b]``, or None.
        v: ``(B, S_new, Hkv, Dv)`` to append, or None.
        rotary_cos: ``(seqlen_ro, rotary_dim / 2)`` in q's dtype, ``seqlen_ro`` at least the cache's capacity. Rotates the
            first ``rotary_dim`` elements of k at position ``cache_seqlens[b] + i``, and of q at
            ``cache_seqlens[b] + i`` if the call is causal or has a window, else at ``cache_seqlens[b]``. Needs k and v.
        rotary_sin: as rotary_cos.
        cache_seqlens: int or ``(B,)`` int32 or int64: tokens in the cache *before* the append. -1 skips the sequence:
            nothing is read or written, its output is 0. None (only without k and v) means the whole cache.
        cache_batch_idx: ``(B,)``: row of the cache that belongs to sequence ``b``. Not with a block table.
        cache_leftpad: ``(B,)``: first valid slot of each sequence; slots before it are not seen.
        block_table: ``(B, max_pages)`` int32 or int64: slot ``t`` of sequence ``b`` is in page
            ``block_table[b, t // page_size]`` at ``t % page_size``. Entries that the length does not reach may be anything.
        rotary_interleaved: True rotates pairs (0, 1), (2, 3), ... (GPT-J), False the two halves (GPT-NeoX, Llama).
        num_splits: parts to split the keys into (split-KV, "Flash-Decoding"); 0 = chosen for you.
        return_softmax_lse: return ``(out, lse)``.
        page_table: another name of ``block_table`` (FlashAttention-3).

    The other arguments: see :func:`flash_attn_func`.

    Returns:
        ``out (B, Sq, Hq, Dv)`` in q's dtype, or with ``return_softmax_lse`` also ``lse (B, Hq, Sq)`` float32.

    Raises:
        TypeError, ValueError: naming the argument; the caches are untouched then. Lengths and table entries are checked
            on a CPU always, on other devices under ``PAGEDFLASH_CHECK=1`` (it makes the host wait).

    Source: flash-attn's ``flash_attn_with_kvcache``; Kwon et al., "PagedAttention" (2023); Su et al., "RoFormer" (2021).
    """
    table = _one_of("block_table", block_table, "page_table", page_table)
    names = _names(KVCACHE_NAMES, learnable_sink, page_table)
    window_left, window_right = _window(window_size, causal)
    softmax_scale = None if softmax_scale is None else _number("softmax_scale", softmax_scale)
    softcap, rotary_interleaved = _number("softcap", softcap), bool(rotary_interleaved)
    num_splits = _integer("num_splits", num_splits)

    # A decode step is mostly like the one before, and short: what its tensors come to is not worked out again.
    tensors = (
        q, k_cache, v_cache, k, v, None, None, None, cache_seqlens, cache_batch_idx, cache_leftpad, table,
        rotary_cos, rotary_sin, alibi_slopes, s_aux,
    )  # fmt: skip
    options = (softmax_scale, window_left, window_right, softcap, rotary_interleaved, num_splits, learnable_sink is None)
    if (known := recall(tensors, options)) is not None:
        return _run(known, names, False, return_softmax_lse)

    _check_dims("q", q, 4)
    _check_dims("k_cache", k_cache, 4)
    _check_dims("v_cache", v_cache, 4)
    call = AttentionCall(
        q=_rows(q),
        k=k_cache,
        v=v_cache,
        k_new=_rows(k),
        v_new=_rows(v),
        seqused_k=_lengths("cache_seqlens", cache_seqlens, q),
        cache_batch_idx=_int32("cache_batch_idx", cache_batch_idx),
        cache_leftpad=_int32("cache_leftpad", cache_leftpad),
        block_table=_int32("block_table", table),
        rotary_cos=_contiguous(rotary_cos),
        rotary_sin=_contiguous(rotary_sin),
        alibi_slopes=_contiguous(alibi_slopes),
        sinks=_sinks(s_aux, learnable_sink),
        max_seqlen_q=q.shape[1],
        max_seqlen_k=_capacity(k_cache, table),
        scale=_scale(softmax_scale, q),
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
    )
    output = _run(call, names, False, return_softmax_lse)
    if learnable_sink is None:
        remember(tensors, options, call)
    return output


def kv_paged_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: int | Tensor
) -> None:
    """Write new keys and values into their pages, in place: what ``flash_attn_with_kvcache`` does before it attends.

    Args:
        k: ``(B, S_new, Hkv, D)``.
        v: ``(B, S_new, Hkv, Dv)``.
        k_cache: pages ``(num_pages, page_size, Hkv, D)`` of k's dtype, any strides with a contiguous last axis.
        v_cache: pages ``(num_pages, page_size, Hkv, Dv)``.
        block_table: ``(B, max_pages)`` int32 or int64.
        seq_lens: int or ``(B,)`` int32 or int64: tokens each sequence has *before* the write; -1 writes nothing. Token
            ``i`` goes to page ``block_table[b, t // page_size]``, slot ``t % page_size``, with ``t = seq_lens[b] + i``.

    Raises:
        TypeError, ValueError: naming the argument; the caches are untouched then. Lengths and table entries are checked
            on a CPU always, on other devices under ``PAGEDFLASH_CHECK=1``.
    """
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_dims(name, tensor, 4)
    write = CacheWrite(
        k=_rows(k),
        v=_rows(v),
        k_cache=k_cache,
        v_cache=v_cache,
        seq_lens=_lengths("seq_lens", _required("seq_lens", seq_lens), k),
        block_table=_int32("block_table", _required("block_table", block_table)),
    )
    if check_write(write) and not is_watched():
        dispatch.kv_write(write)
    else:
        write_cache(*write)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    Args:
        out_a: ``(B, Sq, Hq, Dv)`` or ``(total_q, Hq, Dv)``, the output over the first set.
        lse_a: ``(B, Hq, Sq)`` or ``(Hq, total_q)`` float32, its LSE as the functions here return it. ``+inf`` (flash-attn
            2) and ``-inf`` (FlashAttention-3) both mean that no key was seen.
        out_b: the output over the second set, shape, dtype and device as ``out_a``.
        lse_b: its LSE.

    Returns:
        ``(out, lse)`` of the same shapes and dtypes. Where neither saw a key: 0 and ``+inf``. If attention sinks took
        part, they must have done so in one of the two only.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); FlashInfer's ``merge_state``.
    """
    dense = _tensor("out_a", out_a).dim() != 3
    out_words = "B, Sq, Hq, Dv" if dense else "total_q, Hq, Dv"
    check_tensor("out_a", out_a, out_words, out_a, FLOAT_DTYPES)
    check_tensor("out_b", out_b, out_words, out_a, (out_a.dtype,))
    check_shape("out_b", out_b, tuple(out_a.shape), "as out_a")
    *rows, heads, _ = out_a.shape
    lse_shape = (rows[0], heads, rows[1]) if dense else (heads, rows[0])
    words = "B, Hq, Sq" if dense else "Hq, total_q"
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, lse, words, out_a, (torch.float32,))
        check_shape(name, lse, lse_shape, words)
    return reference.combine(torch.stack((out_a, out_b)), torch.stack((lse_a, lse_b)))


# --------------------------------------------------------------------------------------------------------------------
# From arguments to a description
# --------------------------------------------------------------------------------------------------------------------


def _run(call: AttentionCall, names: Names, return_attn_probs: bool, return_softmax_lse: bool) -> Output:
    if check(call, names) and not is_watched():
        out, lse = dispatch.attention(call)
    else:
        out, lse = (attention if call.k_new is None else attention_with_append)(*call)
    if return_attn_probs:
        return out, lse, out.new_empty(0)
    return (out, lse) if return_softmax_lse else out


def _names(names: Names, learnable_sink: Given, page_table: Given = None) -> Names:
    """The caller's names of a description's fields, where it used the newer aliases of some."""
    if learnable_sink is not None:
        names = {**names, "sinks": "learnable_sink"}
    if page_table is not None:
        names = {**names, "block_table": "page_table"}
    return names


def _type_error(name: str, came: object, expected: str) -> NoReturn:
    raise TypeError(f"pagedflash: {name} is of type {type(came).__name__}, expected {expected}")


def _tensor(name: str, value: Given) -> Tensor:
    if not isinstance(value, Tensor):
        _type_error(name, value, "a torch.Tensor")
    return value


def _required(name: str, value: Given) -> Given:
    if value is None:
        refuse(name, "None", "a tensor")
    return value


def _check_dims(name: str, tensor: Given, dims: int) -> None:
    """What comes before a description can be built: a tensor of the right rank."""
    if not isinstance(tensor, Tensor):
        _type_error(name, tensor, f"a torch.Tensor of {dims} axes")
    if tensor.dim() != dims:
        refuse(name, f"of shape {tuple(tensor.shape)}", f"{dims} axes")


def _check_dropout(dropout_p: Given) -> None:
    if not isinstance(dropout_p, (int, float)) or dropout_p != 0.0:
        refuse("dropout_p", dropout_p, "0: there is no dropout without a backward")


def _one_of(name: str, value: Given, other_name: str, other: Given) -> Given:
    """Two names of one argument: at most one may be given."""
    if value is not None and other is not None:
        refuse(other_name, f"given together with {name}", "one of the two: they name the same thing")
    return other if value is None else value


def _number(name: str, value: Given) -> float:
    if isinstance(value, (float, int)):
        return float(value)
    _type_error(name, value, "a number")


def _integer(name: str, value: Given) -> int:
    """Ints, SymInts while tracing, and whatever else is an exact integer (NumPy's, 0-dim tensors)."""
    if isinstance(value, (int, torch.SymInt)):
        return cast(int, value)
    try:
        return operator.index(value)
    except TypeError:
        _type_error(name, value, "an int")


def _scale(softmax_scale: Given, q: Tensor) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1] or 1)
    return _number("softmax_scale", softmax_scale)


def _window(window_size: Given, causal: Given) -> tuple[int, int]:
    """``(left, right)``; causal is a right window of 0."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        refuse("window_size", window_size, "a pair (left, right)")
    left, right = window_size
    if left.__class__ is not int or right.__class__ is not int:
        left, right = _integer("window_size", left), _integer("window_size", right)
    return left, 0 if causal and right >= -1 else right


def _capacity(k_cache: Tensor, table: Given) -> int:
    return k_cache.shape[1] * (1 if table is None else _tensor("block_table", table).shape[-1])


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
    raise TypeError(f"pagedflash: {name} is of dtype {dtype}, expected torch.int32 or torch.int64")


def _sinks(s_aux: Given, learnable_sink: Given) -> Given:
    """Sinks come in the model's dtype; backends read contiguous float32."""
    sinks = _one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    if sinks is None:
        return None
    name = "learnable_sink" if s_aux is None else "s_aux"
    if not _tensor(name, sinks).is_floating_point():
        raise TypeError(f"pagedflash: {name} is of dtype {sinks.dtype}, expected a floating point dtype")
    if sinks.requires_grad and torch.is_grad_enabled():
        refuse(name, "a tensor that requires grad", NO_BACKWARD)
    return sinks.to(torch.float32).contiguous()


def _contiguous(tensor: Given) -> Given:
    return tensor.contiguous() if isinstance(tensor, Tensor) else tensor


def _rows(tensor: Given) -> Given:
    """Inputs (never caches) whose last axis is strided are copied, as flash-attn does."""
    if tensor is None or not isinstance(tensor, Tensor) or tensor.is_contiguous():
        return tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
