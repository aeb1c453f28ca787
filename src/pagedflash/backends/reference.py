"""Plain, slow, obviously right attention in PyTorch: the oracle of every test, and the fallback on any device.

One sequence at a time: its keys are gathered from where they lie, the whole score matrix is formed in float32 (or
float64, if that is what comes in), masked, and normalised. Nothing outside a sequence's own slots is ever read, so
garbage or NaN in unused slots and pages cannot leak.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..geometry import queries_rotate_by_position, v_is_in_k
from ..problem import QUANTIZED, AttentionProblem, CacheWrite, is_per_token
from ..validate_values import key_lengths, new_lengths
from .dropout import kept
from .protocol import Capabilities, Support

NAME = "reference"

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A scale below it counts as 0: what is quantized with it is 0."""

CAPABILITIES = Capabilities(
    dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    cache_dtypes=(torch.float16, torch.bfloat16, *QUANTIZED),
    max_head_dim=2**31,
    max_v_head_dim=2**31,
    dropout=True,
)


def available() -> Support:
    return Support(True)


def supports(problem: AttentionProblem) -> Support:
    return Support(True)


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend sequence by sequence. Returns ``(out, lse)`` of the shapes the problem gives."""
    if problem.append is not None:
        kv_write(problem.write)
    return attend(problem, out)


def attend(problem: AttentionProblem, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`attention` for a problem whose new tokens are in the cache already."""
    q, cache = problem.queries.q, problem.cache
    lengths = [n + new if n >= 0 else n for n, new in zip(key_lengths(problem), new_lengths(problem))]
    out = q.new_zeros(problem.out_shape) if out is None else out.zero_()
    lse = torch.full(problem.lse_shape, float("inf"), dtype=working_dtype(q), device=q.device)
    for b, length in enumerate(lengths):
        if length < 0:
            continue
        q_b, out_b, lse_b = _queries(problem, b, out, lse)
        q_b = _rotate_queries(problem, q_b, b)
        first = 0 if cache.cache_leftpad is None else int(cache.cache_leftpad[b])
        k, v = (
            _keys(problem, keys, descale, b, first, length, q_b.shape[0])
            for keys, descale in ((cache.k, cache.k_descale), (cache.v, cache.v_descale))
        )
        with without_autocast(q.device.type):
            out_rows, lse_rows = _attend(problem, q_b, k, v, b)
        out_b.copy_(out_rows)
        lse_b.copy_(lse_rows)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    cache, (k_new, v_new, cos, sin, offsets, slots, interleaved) = write.cache, write.append
    if slots is not None:
        for token, at in enumerate(slots.tolist()):
            if at >= 0:
                page, offset = (torch.tensor([index], device=slots.device) for index in divmod(at, write.page_size))
                slot = page, offset
                _store(cache.k, cache.k_descale, slot, token, k_new[token : token + 1])
                _store(cache.v, cache.v_descale, slot, token, v_new[token : token + 1])
        return
    assert cache.seqused_k is not None
    starts = None if offsets is None else offsets.tolist()
    for b, (start, new_tokens) in enumerate(zip(cache.seqused_k.tolist(), new_lengths(write))):
        if start < 0 or new_tokens == 0:
            continue
        positions = torch.arange(start, start + new_tokens, device=k_new.device)
        k, v = (new[b] if starts is None else new[starts[b] : starts[b] + new_tokens] for new in (k_new, v_new))
        if cos is not None and sin is not None:
            k = rotate(k, cos[positions], sin[positions], interleaved)
        if cache.block_table is not None:
            slot = (cache.block_table[b, positions // write.page_size].long(), positions % write.page_size)
        else:
            row = b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])
            slot = (torch.full_like(positions, row), positions)
        _store(cache.k, cache.k_descale, slot, b, k)
        if not v_is_in_k(cache.k, cache.v):
            _store(cache.v, cache.v_descale, slot, b, v)


def _store(keys: Tensor, descale: Tensor | None, slot: tuple[Tensor, Tensor], b: int, new: Tensor) -> None:
    """New tokens ``(S_new, Hkv, D)`` of sequence b into their slots, in the cache's format, rounded to nearest even."""
    if descale is not None:
        if is_per_token(descale):
            descale[slot] = _scales_of(new, QUANTIZED[keys.dtype])
        new = quantize(new, _scales(descale, b)[slot] if is_per_token(descale) else _scales(descale, b), keys.dtype)
    keys[slot] = new.to(keys.dtype)


def _scales_of(new: Tensor, largest: float) -> Tensor:
    """``(S_new, Hkv)`` float32: the largest magnitude of each token and head, NaN aside, becomes the largest value of the
    format. 0 where that is too small for a scale with a reciprocal."""
    magnitudes = new.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)
    scales = magnitudes / torch.full_like(magnitudes, largest)  # CUDA multiplies by the reciprocal of a number
    return scales.masked_fill(scales < SMALLEST_SCALE, 0.0)


def quantize(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``x (..., D)`` multiplied by the reciprocals of ``scales (...)``, all float32, saturating, rounded to nearest even."""
    reciprocals = scales.reciprocal().masked_fill(scales.abs() < SMALLEST_SCALE, 0.0)
    scaled = (x.float() * reciprocals.unsqueeze(-1)).clamp(-QUANTIZED[dtype], QUANTIZED[dtype])
    return scaled.nan_to_num(nan=0.0).round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)


def _scales(descale: Tensor, b: int) -> Tensor:
    """Those of sequence b: as they are where there is one a token and head, else for any tokens ``(1, Hkv | 1)``."""
    if is_per_token(descale):
        return descale
    return (descale[b] if descale.dim() == 2 else descale).reshape(1, -1)


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial outputs by their LSE: ``outs (parts, ..., Hq, Dv)``, ``lses (parts, ...)`` laid out as in a call.

    A part with LSE ``+inf`` or ``-inf`` saw no key and counts nothing; where all are so: 0 and ``+inf``.
    """
    empty = lses.isinf()
    total = lses.masked_fill(empty, float("-inf")).logsumexp(0)
    seen = ~empty.all(0)
    weights = torch.exp(lses - total).masked_fill(empty, 0.0)
    per_row = weights.transpose(-1, -2).unsqueeze(-1)  # head-major, as an LSE, to row-major, as an output
    working = outs.to(working_dtype(outs)).masked_fill(per_row == 0, 0.0)
    out = (working * per_row).sum(0).to(outs.dtype)
    return out, torch.where(seen, total, float("inf"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of ``x (S, H, D)`` by angles given as ``cos, sin (S, rotary_dim / 2)``; the rest of D is kept.

    Pair ``i`` is elements ``(2i, 2i + 1)`` if interleaved, else ``(i, i + rotary_dim / 2)``. Source: Su et al.,
    "RoFormer" (2021); the two layouts are GPT-J's and GPT-NeoX's.
    """
    half = cos.shape[-1]
    working = working_dtype(x)
    cos, sin = cos.to(working).unsqueeze(1), sin.to(working).unsqueeze(1)
    head = x[..., : 2 * half].to(working)
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = head[..., :half], head[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """What is computed inside keeps its dtype."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _queries(problem: AttentionProblem, b: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(Sq, Hq, D)`` of sequence b, and where its output ``(Sq, Hq, Dv)`` and LSE ``(Hq, Sq)`` go."""
    q, cu_seqlens_q, seqused_q, _ = problem.queries
    if cu_seqlens_q is None:
        return q[b], out[b], lse[b]
    start, end = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1])
    if seqused_q is not None:
        end = start + int(seqused_q[b])
    return q[start:end], out[start:end], lse[:, start:end]


def _rotate_queries(problem: AttentionProblem, q: Tensor, b: int) -> Tensor:
    """Query i sits at position seqused_k + i where positions matter (causal or windowed), else all at seqused_k."""
    append = problem.append
    if append is None or append.rotary_cos is None or append.rotary_sin is None:
        return q
    assert problem.cache.seqused_k is not None
    positions = torch.full((q.shape[0],), int(problem.cache.seqused_k[b]), device=q.device)
    if queries_rotate_by_position(problem):
        positions = positions + torch.arange(q.shape[0], device=q.device)
        positions = positions.clamp(max=append.rotary_cos.shape[0] - 1)
    return rotate(q, append.rotary_cos[positions], append.rotary_sin[positions], append.rotary_interleaved)


def _keys(
    problem: AttentionProblem,
    keys: Tensor,
    descale: Tensor | None,
    b: int,
    first: int,
    length: int,
    num_queries: int,
) -> Tensor:
    """Slots ``first`` to ``length`` of sequence b, as ``(length - first, Hkv, D)``, scales applied."""
    rows = _rows(problem, keys, b, first, length, num_queries)
    if descale is None:
        return rows
    scales = _scales(descale, b)
    if is_per_token(descale):
        scales = _rows(problem, scales.unsqueeze(-1), b, first, length, num_queries).squeeze(-1)
    return rows.to(working_dtype(problem.queries.q)) * scales.unsqueeze(-1)


def _rows(problem: AttentionProblem, keys: Tensor, b: int, first: int, length: int, num_queries: int) -> Tensor:
    """Slots ``first`` to ``length`` of sequence b, as they lie in the cache. Left of a window: zeros, not read."""
    cache = problem.cache
    if cache.block_table is not None:
        page_size = problem.page_size
        seen = first
        if problem.scores.window_left >= 0:
            seen = min(max(first, length - num_queries - problem.scores.window_left), length)
        first_page, end_page = seen // page_size, -(-length // page_size)
        pages = cache.block_table[b, first_page:end_page].long()
        offset = first_page * page_size
        rows = keys.new_zeros(length - first, *keys.shape[-2:])
        rows[seen - first :] = keys[pages].flatten(0, 1)[seen - offset : length - offset]
        return rows
    if cache.cu_seqlens_k is not None:
        start = int(cache.cu_seqlens_k[b])
        return keys[start + first : start + length]
    row = b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])
    return keys[row, first:length]


def _attend(problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """One sequence: ``q (Sq, Hq, D)``, ``k (n, Hkv, D)``, ``v (n, Hkv, Dv)`` to ``out (Sq, Hq, Dv)``, ``lse (Hq, Sq)``."""
    working = working_dtype(q)
    num_queries, num_keys = q.shape[0], k.shape[0]
    k = k.to(working).repeat_interleave(problem.group, dim=1)
    v = v.to(working).repeat_interleave(problem.group, dim=1)

    scores, visible = _scores(problem, torch.einsum("qhd,khd->hqk", q.to(working), k), b)
    logits = scores.masked_fill(~visible, float("-inf"))
    if problem.scores.sinks is not None:
        sinks = problem.scores.sinks.to(working).view(-1, 1, 1).expand(-1, num_queries, 1)
        logits = torch.cat((logits, sinks), dim=-1)
    sees_a_key = visible.any(-1)
    lse = logits.logsumexp(-1).masked_fill(~sees_a_key, float("inf"))
    # exp(-inf) = 0 for masked keys and for rows without any
    probabilities = torch.exp(logits[..., :num_keys] - lse.unsqueeze(-1))
    if problem.scores.dropout_p:
        probabilities = probabilities * _kept(problem, probabilities, b)
    return torch.einsum("hqk,khd->qhd", probabilities, v), lse


def _kept(problem: AttentionProblem, probabilities: Tensor, b: int) -> Tensor:
    """Factors ``(Hq, Sq, n)`` of the probabilities of sequence b."""
    leftpad = problem.cache.cache_leftpad
    first = 0 if leftpad is None else int(leftpad[b])
    heads, queries, keys = (torch.arange(size, device=probabilities.device) for size in probabilities.shape)
    sequence = torch.tensor(b, device=probabilities.device)
    return kept(problem.scores, sequence, heads[:, None, None], queries[:, None], keys + first, probabilities.dtype)


def _scores(problem: AttentionProblem, products: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """From ``q . k (Hq, Sq, n)`` of sequence b to scores, and which of them are seen ``(Sq, n)``."""
    params = problem.scores
    _, num_queries, num_keys = products.shape
    scores = products * params.scale
    if params.softcap > 0:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    # Bottom-right alignment; slots left of cache_leftpad are gone from both sides of the difference.
    query_position = torch.arange(num_queries, device=scores.device).unsqueeze(1) + (num_keys - num_queries)
    distance = query_position - torch.arange(num_keys, device=scores.device)
    if params.alibi_slopes is not None:
        slopes = params.alibi_slopes[b] if params.alibi_slopes.dim() == 2 else params.alibi_slopes
        scores = scores - slopes.to(scores.dtype).view(-1, 1, 1) * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool)
    if params.window_left >= 0:
        visible &= distance <= params.window_left
    if params.window_right >= 0:
        visible &= -distance <= params.window_right
    return scores, visible
