"""Plain, slow, obviously right attention in PyTorch: the oracle of every test, and the fallback on any device.

One sequence at a time: its keys are gathered from where they lie, the whole score matrix is formed in float32 (or
float64, if that is what comes in), masked, and normalised. Nothing outside a sequence's own slots is ever read, so
garbage or NaN in unused slots and pages cannot leak.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import AttentionCall, CacheWrite, key_lengths

NAME = "reference"
CHECKS_VALUES = False


def available() -> tuple[bool, str]:
    return True, ""


def supports(call: AttentionCall) -> tuple[bool, str]:
    return True, ""


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend sequence by sequence. Returns ``(out, lse)`` of the shapes the call gives."""
    lengths = key_lengths(call)
    if call.k_new is not None:
        kv_write(call.write)
        lengths = [n + call.k_new.shape[1] if n >= 0 else n for n in lengths]

    out = call.q.new_zeros(call.out_shape)
    lse = torch.full(call.lse_shape, float("inf"), dtype=_working_dtype(call.q), device=call.q.device)
    for b, length in enumerate(lengths):
        if length < 0:
            continue
        q, out_b, lse_b = _queries(call, b, out, lse)
        if call.rotary_cos is not None:
            q = _rotate_queries(call, q, b)
        first = 0 if call.cache_leftpad is None else int(call.cache_leftpad[b])
        k = _keys(call, call.k, b, first, length)
        v = _keys(call, call.v, b, first, length)
        out_rows, lse_rows = _attend(call, q, k, v, b)
        out_b.copy_(out_rows)
        lse_b.copy_(lse_rows)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    new_tokens = write.k.shape[1]
    for b, start in enumerate(write.seq_lens.tolist()):
        if start < 0 or new_tokens == 0:
            continue
        positions = torch.arange(start, start + new_tokens, device=write.k.device)
        k = write.k[b]
        if write.rotary_cos is not None and write.rotary_sin is not None:
            k = rotate(k, write.rotary_cos[positions], write.rotary_sin[positions], write.rotary_interleaved)
        if write.block_table is not None:
            page_size = write.k_cache.shape[1]
            slot = (write.block_table[b, positions // page_size].long(), positions % page_size)
        else:
            row = b if write.cache_batch_idx is None else int(write.cache_batch_idx[b])
            slot = (torch.full_like(positions, row), positions)
        write.k_cache[slot] = k
        write.v_cache[slot] = write.v[b]


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial outputs by their LSE: ``outs (parts, ..., Hq, Dv)``, ``lses (parts, ...)`` laid out as in a call.

    A part with LSE ``+inf`` or ``-inf`` saw no key and counts nothing; where all are so: 0 and ``+inf``.
    """
    empty = lses.isinf()
    total = lses.masked_fill(empty, float("-inf")).logsumexp(0)
    seen = ~empty.all(0)
    weights = torch.exp(lses - total).masked_fill(empty, 0.0)
    per_row = weights.transpose(-1, -2).unsqueeze(-1)  # head-major, as an LSE, to row-major, as an output
    working = outs.to(_working_dtype(outs)).masked_fill(per_row == 0, 0.0)
    out = (working * per_row).sum(0).to(outs.dtype)
    return out, torch.where(seen, total, float("inf"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of ``x (S, H, D)`` by angles given as ``cos, sin (S, rotary_dim / 2)``; the rest of D is kept.

    Pair ``i`` is elements ``(2i, 2i + 1)`` if interleaved, else ``(i, i + rotary_dim / 2)``. Source: Su et al.,
    "RoFormer" (2021); the two layouts are GPT-J's and GPT-NeoX's.
    """
    half = cos.shape[-1]
    working = _working_dtype(x)
    cos, sin = cos.to(working).unsqueeze(1), sin.to(working).unsqueeze(1)
    head = x[..., : 2 * half].to(working)
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = head[..., :half], head[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _queries(call: AttentionCall, b: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(Sq, Hq, D)`` of sequence b, and where its output ``(Sq, Hq, Dv)`` and LSE ``(Hq, Sq)`` go."""
    if call.cu_seqlens_q is None:
        return call.q[b], out[b], lse[b]
    start, end = int(call.cu_seqlens_q[b]), int(call.cu_seqlens_q[b + 1])
    if call.seqused_q is not None:
        end = start + int(call.seqused_q[b])
    return call.q[start:end], out[start:end], lse[:, start:end]


def _rotate_queries(call: AttentionCall, q: Tensor, b: int) -> Tensor:
    """Query i sits at position seqused_k + i where positions matter (causal or windowed), else all at seqused_k."""
    assert call.seqused_k is not None and call.rotary_cos is not None and call.rotary_sin is not None
    positions = torch.full((q.shape[0],), int(call.seqused_k[b]), device=q.device)
    if call.window_left >= 0 or call.window_right >= 0:
        positions = positions + torch.arange(q.shape[0], device=q.device)
        positions = positions.clamp(max=call.rotary_cos.shape[0] - 1)
    return rotate(q, call.rotary_cos[positions], call.rotary_sin[positions], call.rotary_interleaved)


def _keys(call: AttentionCall, keys: Tensor, b: int, first: int, length: int) -> Tensor:
    """Slots ``first`` to ``length`` of sequence b, as ``(length - first, Hkv, D)``."""
    if call.block_table is not None:
        page_size = keys.shape[1]
        first_page, end_page = first // page_size, -(-length // page_size)
        pages = call.block_table[b, first_page:end_page].long()
        offset = first_page * page_size
        return keys[pages].flatten(0, 1)[first - offset : length - offset]
    if call.cu_seqlens_k is not None:
        start = int(call.cu_seqlens_k[b])
        return keys[start + first : start + length]
    row = b if call.cache_batch_idx is None else int(call.cache_batch_idx[b])
    return keys[row, first:length]


def _attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """One sequence: ``q (Sq, Hq, D)``, ``k (n, Hkv, D)``, ``v (n, Hkv, Dv)`` to ``out (Sq, Hq, Dv)``, ``lse (Hq, Sq)``."""
    working = _working_dtype(q)
    num_queries, num_keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k = k.to(working).repeat_interleave(group, dim=1)
    v = v.to(working).repeat_interleave(group, dim=1)

    scores = torch.einsum("qhd,khd->hqk", q.to(working), k) * call.scale
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    # Bottom-right alignment; slots left of cache_leftpad are gone from both sides of the difference.
    query_position = torch.arange(num_queries, device=q.device).unsqueeze(1) + (num_keys - num_queries)
    distance = query_position - torch.arange(num_keys, device=q.device)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes[b] if call.alibi_slopes.dim() == 2 else call.alibi_slopes
        scores = scores - slopes.to(working).view(-1, 1, 1) * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool)
    if call.window_left >= 0:
        visible &= distance <= call.window_left
    if call.window_right >= 0:
        visible &= -distance <= call.window_right
    scores = scores.masked_fill(~visible, float("-inf"))

    logits = scores
    if call.sinks is not None:
        sinks = call.sinks.to(working).view(-1, 1, 1).expand(-1, num_queries, 1)
        logits = torch.cat((scores, sinks), dim=-1)
    sees_a_key = visible.any(-1)
    lse = logits.logsumexp(-1).masked_fill(~sees_a_key, float("inf"))
    probabilities = torch.exp(scores - lse.unsqueeze(-1))  # exp(-inf) = 0 for masked keys and for rows without any
    return torch.einsum("hqk,khd->qhd", probabilities, v), lse
