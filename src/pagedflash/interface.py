"""The public functions: flash-attn's signatures, each a problem and an operator.

Argument names, order and semantics are those of flash-attn 2.8 (``flash_attn_interface.py``), with the newer names that
callers look for (``s_aux``, ``learnable_sink``, ``seqused_q``, ``seqused_k``, ``page_table``, ``return_softmax_lse``) as
keyword arguments behind them. Every argument is a named parameter, since callers discover support with
``inspect.signature``.

Common to the three attention functions:

* ``B`` sequences, ``Sq`` queries, ``Sk`` keys, ``Hq`` query heads, ``Hkv`` key/value heads (``Hq % Hkv == 0``: query head
  ``h`` reads key head ``h // (Hq // Hkv)``), ``D`` head dim, ``Dv`` head dim of v (each from 1 to 512).
* MLA: ``D`` = 576 with a ``v_cache`` that is a view of ``k_cache``, the first ``Dv`` = 512 of each key. It is read once, and
  an append writes keys only: v_new is the same part of k_new, and the scales of a quantized cache are one tensor for both.
* q, k, v share one dtype: float32, float16 or bfloat16; a cache may have a format of its own. Sums and the softmax are
  float32.
* Masks are aligned to the bottom right: query ``i`` sits at key position ``i + Sk - Sq``.
* A query that sees no key gives 0, and ``+inf`` as its LSE (as flash-attn 2).
* Output and LSE are differentiable in q, k, v and the sinks, in O(S) memory and with the same bits each time; not twice, and
  neither through pages nor through an append. See docs/training.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, ops
from .backends import reference
from .errors import Names
from .problem import AttentionProblem
from .validate import validate_shape, validate_tensor

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
    num_splits: int = 0,
    scheduler_metadata: None = None,
    qv: None = None,
    attention_chunk: int = 0,
    out: Tensor | None = None,
) -> Output:
    """Attention of dense queries over dense keys.

    Args:
        q: ``(B, Sq, Hq, D)``.
        k: ``(B, Sk, Hkv, D)``.
        v: ``(B, Sk, Hkv, Dv)``.
        dropout_p: share of the probabilities that is dropped; the others are scaled by ``1 / (1 - dropout_p)``. Which ones,
            torch's generator says: one number drawn from it is the seed of the call.
        softmax_scale: factor on ``q @ k^T``; ``1 / sqrt(D)`` if None.
        causal: query ``i`` sees keys ``j <= i + Sk - Sq``.
        window_size: ``(left, right)``, inclusive, -1 = unbounded: query ``i`` sees keys from ``i + Sk - Sq - left`` to
            ``i + Sk - Sq + right``. With ``causal``, right is 0.
        softcap: if > 0, scores become ``softcap * tanh(scores / softcap)``, after scaling, before masking (Gemma 2).
        alibi_slopes: float32 ``(Hq,)`` or ``(B, Hq)``; adds ``-slope * |i + Sk - Sq - j|`` (Press et al., 2022).
        deterministic: accepted for compatibility; forward and backward always are.
        return_attn_probs: return ``(out, lse, S_dmask)`` as flash-attn does, where S_dmask is empty: only without dropout.
        s_aux: ``(Hq,)`` attention sinks: one extra logit per head in the softmax denominator (gpt-oss). Counted in the LSE.
        learnable_sink: another name of ``s_aux``.
        return_softmax_lse: return ``(out, lse)``.
        num_splits: splits of the keys (split-KV, "Flash-Decoding"); 0 = chosen for you.
        scheduler_metadata: accepted for compatibility with FlashAttention-3; must be None.
        qv: FlashAttention-3's second query; must be None.
        attention_chunk: FlashAttention-3's chunked mask; must be 0.
        out: tensor of the output's shape and dtype, its last axis contiguous, that the output is written into. Not where
            gradients are tracked.

    Returns:
        ``out (B, Sq, Hq, Dv)`` in q's dtype, or a tuple with ``lse (B, Hq, Sq)``: float32, the natural logarithm of the
        softmax denominator.

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: of a wrong shape or value. Both name it.

    Examples:
        >>> q, k, v = torch.randn(2, 5, 8, 64), torch.randn(2, 9, 2, 64), torch.randn(2, 9, 2, 64)
        >>> out, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 5, 8, 64]), torch.Size([2, 8, 5]))
        >>> flash_attn_func(q, k.half(), v)
        Traceback (most recent call last):
        pagedflash.errors.InvalidType: pagedflash: k is torch.float16, expected torch.float32, as q

    Source: Dao, "FlashAttention-2" (2023); flash-attn's ``flash_attn_func``.
    """
    arguments.reject_unsupported(scheduler_metadata, qv, attention_chunk)
    arguments.reject_dropped_probabilities(return_attn_probs, dropout_p)
    problem, names = arguments.dense(
        q, k, v, num_splits, softmax_scale, causal, window_size, softcap, dropout_p, alibi_slopes, s_aux, learnable_sink
    )
    return _run(problem, names, out, return_attn_probs, return_softmax_lse)


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
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    num_splits: int = 0,
    scheduler_metadata: None = None,
    qv: None = None,
    attention_chunk: int = 0,
    q_descale: None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out: Tensor | None = None,
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
        seqused_q: ``(B,)``: only the first ``seqused_q[b]`` queries of sequence ``b`` are used; the others give 0. With
            ``k_new``, all new tokens are appended nevertheless, and the last used query is aligned to the last of them.
        seqused_k: ``(B,)``: only the first ``seqused_k[b]`` keys of sequence ``b`` are used.
        k_new: ``(total_q, Hkv, D)`` to append to the pages before attention, as many new tokens as queries: those of
            sequence ``b`` behind its keys, which ``seqused_k`` or ``cu_seqlens_k`` then count before the append.
        v_new: ``(total_q, Hkv, Dv)``.
        q_descale: FlashAttention-3's scale of a quantized q; must be None.
        k_descale: scales of quantized pages, see ``flash_attn_with_kvcache``.
        v_descale: as k_descale.

    The other arguments, errors and source: see ``flash_attn_func``.

    Returns:
        ``out (total_q, Hq, Dv)`` in q's dtype, or a tuple with ``lse (Hq, total_q)`` float32.

    Examples:
        Three sequences of 3, 0 and 4 tokens, packed:

        >>> q, k, v = torch.randn(7, 8, 64), torch.randn(7, 2, 64), torch.randn(7, 2, 64)
        >>> cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
        torch.Size([7, 8, 64])

        A chunk of two new tokens on five cached ones, over pages, appended by the same call:

        >>> k_pages, v_pages = torch.zeros(2, 10, 4, 2, 64)
        >>> table, cached = torch.tensor([[7, 2]], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
        >>> out = flash_attn_varlen_func(
        ...     q[:2], k_pages, v_pages, torch.tensor([0, 2], dtype=torch.int32), None, 2, 7,
        ...     causal=True, block_table=table, seqused_k=cached, k_new=k[:2], v_new=v[:2],
        ... )
        >>> k_pages[2, 1].equal(k[0])  # token 5 is the second of the second page
        True
    """
    arguments.reject_unsupported(scheduler_metadata, qv, attention_chunk, q_descale)
    arguments.reject_dropped_probabilities(return_attn_probs, dropout_p)
    problem, names = arguments.packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        block_table, page_table, seqused_q, seqused_k, k_new, v_new, k_descale, v_descale, num_splits,
        softmax_scale, causal, window_size, softcap, dropout_p, alibi_slopes, s_aux, learnable_sink,
    )  # fmt: skip
    return _run(problem, names, out, return_attn_probs, return_softmax_lse)


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
    scheduler_metadata: None = None,
    qv: None = None,
    attention_chunk: int = 0,
    q_descale: None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dropout_p: float = 0.0,
    out: Tensor | None = None,
) -> Output:
    """Append new keys and values to a cache in place, then attend to the cache including them.

    Args:
        q: ``(B, Sq, Hq, D)``.
        k_cache: ``(B_cache, Sk, Hkv, D)``, or with a block table pages ``(num_pages, page_size, Hkv, D)``. May be a
            strided view (last axis contiguous), and may share one allocation with ``v_cache``. Its format is q's dtype, or
            float16 or bfloat16 under float32, or int8, float8_e4m3fn or float8_e5m2 with ``k_descale``.
        v_cache: as k_cache, with ``Dv``. The two may differ in format.
        k: ``(B, S_new, Hkv, D)`` to append at ``cache_seqlens[b]``, or None.
        v: ``(B, S_new, Hkv, Dv)`` to append, or None.
        rotary_cos: ``(seqlen_ro, rotary_dim / 2)`` in q's dtype, ``seqlen_ro`` at least the cache's capacity. Rotates the
            first ``rotary_dim`` elements of k at position ``cache_seqlens[b] + i``, and of q at
            ``cache_seqlens[b] + i`` if the call is causal or has a window, else at ``cache_seqlens[b]``: where there are
            more queries than new tokens, that takes as many more rows. Needs k and v.
        rotary_sin: as rotary_cos.
        cache_seqlens: int or ``(B,)`` int32 or int64: tokens in the cache *before* the append. -1 skips the sequence:
            nothing is read or written, its output is 0. None (only without k and v) means the whole cache.
        cache_batch_idx: ``(B,)``: row of the cache that belongs to sequence ``b``. Not with a block table.
        cache_leftpad: ``(B,)``: first valid slot of each sequence; slots before it are not seen.
        block_table: ``(B, max_pages)`` int32 or int64: slot ``t`` of sequence ``b`` is in page
            ``block_table[b, t // page_size]`` at ``t % page_size``. Entries that the length does not reach may be anything.
        rotary_interleaved: True rotates pairs (0, 1), (2, 3), ... (GPT-J), False the two halves (GPT-NeoX, Llama).
        return_softmax_lse: return ``(out, lse)``.
        page_table: another name of ``block_table`` (FlashAttention-3).
        q_descale: FlashAttention-3's scale of a quantized q; must be None.
        k_descale: float32, for a quantized ``k_cache``: its elements stand for ``element * k_descale``. Static scales are
            0-dim, ``(Hkv,)`` or ``(B, Hkv)``; new keys are divided by them, saturating. Or one scale a token and head,
            ``(num_pages, page_size, Hkv)`` or ``(B_cache, Sk, Hkv)``, any strides: written with the new keys, as their
            largest magnitude divided by the format's largest value.
        v_descale: the same for ``v_cache``.

    The other arguments: see ``flash_attn_func``.

    Returns:
        ``out (B, Sq, Hq, Dv)`` in q's dtype, or with ``return_softmax_lse`` also ``lse (B, Hq, Sq)`` float32.

    Raises:
        TypeError, ValueError: naming the argument; the caches are untouched then. Lengths and table entries are checked
            on a CPU always, on other devices under ``PAGEDFLASH_CHECK=1`` (it makes the host wait).

    Examples:
        >>> k_pages, v_pages = torch.zeros(2, 64, 16, 8, 128)  # 64 pages of 16 tokens, 8 KV heads of 128
        >>> table = torch.tensor([[3, 9], [5, 0]], dtype=torch.int32)  # two sequences, two pages each
        >>> lengths = torch.tensor([17, 4], dtype=torch.int32)
        >>> q, k, v = torch.randn(2, 1, 32, 128), torch.randn(2, 1, 8, 128), torch.randn(2, 1, 8, 128)
        >>> out = flash_attn_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, causal=True)
        >>> out.shape, k_pages[9, 1].equal(k[0, 0])  # token 17 is the second of page 9
        (torch.Size([2, 1, 32, 128]), True)

    Source: flash-attn's ``flash_attn_with_kvcache``; Kwon et al., "PagedAttention" (2023); Su et al., "RoFormer" (2021).
    """
    arguments.reject_unsupported(scheduler_metadata, qv, attention_chunk, q_descale)
    problem, names = arguments.cached(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        block_table, page_table, k_descale, v_descale, rotary_interleaved, num_splits,
        softmax_scale, causal, window_size, softcap, dropout_p, alibi_slopes, s_aux, learnable_sink,
    )  # fmt: skip
    return _run(problem, names, out, False, return_softmax_lse)


def kv_paged_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None = None,
    seq_lens: int | Tensor | None = None,
    *,
    slot_mapping: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Write new keys and values into their pages, in place: what ``flash_attn_with_kvcache`` does before it attends.

    Args:
        k: ``(B, S_new, Hkv, D)``, or with ``slot_mapping`` packed ``(total, Hkv, D)``.
        v: as k, with ``Dv``.
        k_cache: pages ``(num_pages, page_size, Hkv, D)``, any strides with a contiguous last axis, in one of the formats
            of ``flash_attn_with_kvcache``.
        v_cache: pages ``(num_pages, page_size, Hkv, Dv)``.
        block_table: ``(B, max_pages)`` int32 or int64.
        seq_lens: int or ``(B,)`` int32 or int64: tokens each sequence has *before* the write; -1 writes nothing. Token
            ``i`` goes to page ``block_table[b, t // page_size]``, slot ``t % page_size``, with ``t = seq_lens[b] + i``.
        slot_mapping: ``(total,)`` int32 or int64, in place of a table and lengths: where each token goes, as
            ``page * page_size + offset``; -1 writes nothing (vLLM's ``reshape_and_cache_flash``).
        k_descale: scales of a quantized cache, see ``flash_attn_with_kvcache``; ``B`` counts tokens here if there is a
            ``slot_mapping``.
        v_descale: as k_descale.

    Raises:
        TypeError, ValueError: naming the argument; the caches are untouched then. Lengths and table entries are checked
            on a CPU always, on other devices under ``PAGEDFLASH_CHECK=1``.

    Examples:
        >>> k_pages, v_pages = torch.zeros(2, 10, 4, 2, 64)
        >>> k, v = torch.randn(1, 3, 2, 64), torch.randn(1, 3, 2, 64)
        >>> kv_paged_write(k, v, k_pages, v_pages, torch.tensor([[7, 2]], dtype=torch.int32), seq_lens=3)
        >>> k_pages[7, 3].equal(k[0, 0]), k_pages[2, :2].equal(k[0, 1:])
        (True, True)
        >>> kv_paged_write(k[0], v[0], k_pages, v_pages, slot_mapping=torch.tensor([0, -1, 5]))
        >>> k_pages[0, 0].equal(k[0, 0]), k_pages[1, 1].equal(k[0, 2])
        (True, True)
    """
    ops.write_cache(*arguments.write(k, v, k_cache, v_cache, block_table, seq_lens, slot_mapping, k_descale, v_descale))


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

    Examples:
        >>> q, k, v = torch.randn(1, 1, 4, 64), torch.randn(1, 100, 2, 64), torch.randn(1, 100, 2, 64)
        >>> first = flash_attn_func(q, k[:, :60], v[:, :60], return_softmax_lse=True)
        >>> second = flash_attn_func(q, k[:, 60:], v[:, 60:], return_softmax_lse=True)
        >>> out, lse = merge_attention_states(*first, *second)
        >>> torch.allclose(out, flash_attn_func(q, k, v), atol=1e-5)
        True

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); FlashInfer's ``merge_state``.
    """
    dense = not isinstance(out_a, Tensor) or out_a.dim() != 3
    out_dims, lse_dims = ("B, Sq, Hq, Dv", "B, Hq, Sq") if dense else ("total_q, Hq, Dv", "Hq, total_q")
    validate_tensor("out_a", out_a, out_dims, out_a, reference.CAPABILITIES.dtypes)
    validate_tensor("out_b", out_b, out_dims, out_a, (out_a.dtype,))
    validate_shape("out_b", out_b, tuple(out_a.shape), "as out_a")
    *rows, heads, _ = out_a.shape
    lse_shape = (rows[0], heads, rows[1]) if dense else (heads, rows[0])
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        validate_tensor(name, lse, lse_dims, out_a, (torch.float32,))
        validate_shape(name, lse, lse_shape, lse_dims)
    return reference.combine(torch.stack((out_a, out_b)), torch.stack((lse_a, lse_b)))


def _run(
    problem: AttentionProblem, names: Names, out: Tensor | None, return_attn_probs: bool, return_softmax_lse: bool
) -> Output:
    with_lse = bool(return_attn_probs or return_softmax_lse)
    out, lse = ops.attention(problem, names, out, with_lse)
    if not with_lse:
        return out
    assert lse is not None
    return (out, lse, out.new_empty(0)) if return_attn_probs else (out, lse)
