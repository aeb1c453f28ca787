"""The oracle itself, against things that know nothing of it: SDPA, transformers' eager attention, rotary and sinks, and
cases small enough to work out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagedflash import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    kv_paged_write,
    merge_attention_states,
    use_backend,
)
from pagedflash.backends import reference
from pagedflash.testing import assert_matches_reference, random_problem


@pytest.fixture(autouse=True)
def on_the_reference():
    with use_backend("reference"):
        yield


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """SDPA in float64, in flash-attn's layout."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=scale).transpose(1, 2)


def qkv(batch: int, queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dim: int = 32, dtype=torch.float32):
    torch.manual_seed(queries * 1000 + keys)
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def bottom_right(queries: int, keys: int, left: int, right: int) -> Tensor:
    """The mask of flash-attn's documentation, entry by entry."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            position = i + keys - queries
            mask[i, j] = (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
    return mask


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 50), (7, 7), (3, 40), (33, 64)])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (True, (5, 5)), (False, (3, 2)), (False, (-1, 4))]
)
def test_masks_against_sdpa(dtype, queries, keys, causal, window):
    q, k, v = qkv(2, queries, keys, dtype=dtype)
    out = flash_attn_func(q, k, v, causal=causal, window_size=window)
    want = sdpa(q, k, v, bottom_right(queries, keys, window[0], 0 if causal else window[1]))
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_upstream_case_within_two_millionths():
    """The proposal's figure: float32, B=4, Hq=16, D=128, 50 keys behind a block table."""
    torch.manual_seed(0)
    pages = torch.randn(2, 16, 16, 16, 128)
    table = torch.randperm(16).view(4, 4).int()
    q, lengths = torch.randn(4, 1, 16, 128), torch.full((4,), 50, dtype=torch.int32)
    out = flash_attn_with_kvcache(q, pages[0], pages[1], cache_seqlens=lengths, block_table=table)
    k, v = (side[table.long()].flatten(1, 2)[:, :50] for side in pages)
    assert (out - sdpa(q, k, v)).abs().max() <= 2e-6


def test_more_queries_than_keys_leaves_the_first_rows_empty():
    q, k, v = qkv(1, 4, 2)
    out, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert (lse[..., :2] == math.inf).all() and lse[..., 2:].isfinite().all()
    torch.testing.assert_close(out[:, 2], v[:, 0].repeat_interleave(2, dim=1))  # row 2 sees key 0 alone


def test_softcap_by_hand():
    """One query, two keys with scores 3 and -1: softcap c gives c * tanh(s / c) before the softmax."""
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1.0
    k = torch.zeros(1, 2, 1, 8)
    k[0, :, 0, 0] = torch.tensor([3.0, -1.0])
    v = torch.zeros(1, 2, 1, 8)
    v[0, :, 0, 0] = torch.tensor([1.0, 0.0])
    out, lse = flash_attn_func(q, k, v, softmax_scale=1.0, softcap=2.0, return_softmax_lse=True)
    a, b = math.exp(2 * math.tanh(1.5)), math.exp(2 * math.tanh(-0.5))
    assert out[0, 0, 0, 0].item() == pytest.approx(a / (a + b), rel=1e-6)
    assert lse.item() == pytest.approx(math.log(a + b), rel=1e-6)


def test_alibi_by_hand():
    """Equal scores leave exp(-slope * distance): two queries on three keys, slopes per head and per sequence."""
    q, k = torch.zeros(2, 2, 2, 8), torch.zeros(2, 3, 2, 8)
    v = torch.eye(3, 8).view(1, 3, 1, 8).expand(2, 3, 2, 8)
    slopes = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    out = flash_attn_func(q, k, v, alibi_slopes=slopes)
    for b in range(2):
        for h in range(2):
            for i in range(2):
                weights = torch.tensor([math.exp(-slopes[b, h].item() * abs(i + 1 - j)) for j in range(3)])
                torch.testing.assert_close(out[b, i, h, :3], weights / weights.sum())
    torch.testing.assert_close(flash_attn_func(q, k, v, alibi_slopes=slopes[0])[1], out[0])


def test_sinks_against_transformers():
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = qkv(2, 5, 9)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training = 2, torch.randn(4), False
    mask = torch.where(bottom_right(5, 9, -1, 0), 0.0, -math.inf).view(1, 1, 5, 9)
    want, _ = gpt_oss.eager_attention_forward(
        module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scaling=0.2
    )
    out = flash_attn_func(q, k, v, softmax_scale=0.2, causal=True, s_aux=module.sinks)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    same = flash_attn_func(q, k, v, softmax_scale=0.2, causal=True, learnable_sink=module.sinks.bfloat16())
    torch.testing.assert_close(same, want, atol=1e-2, rtol=1e-2)


def test_sinks_count_in_the_lse():
    q, k, v = qkv(1, 1, 1, heads=1, kv_heads=1)
    _, lse = flash_attn_func(q, k, v, softmax_scale=0.0, s_aux=torch.tensor([math.log(3.0)]), return_softmax_lse=True)
    assert lse.item() == pytest.approx(math.log(1 + 3), rel=1e-6)


@pytest.mark.parametrize(("style", "interleaved"), [("llama", False), ("gptj", True)])
def test_rotary_against_transformers(style, interleaved):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = torch.randn(6, 3, 32)
    angles = torch.rand(6, 16) * 6
    if style == "llama":
        twice = torch.cat((angles, angles), -1)
        want, _ = llama.apply_rotary_pos_emb(x[None], x[None], twice.cos()[None], twice.sin()[None], unsqueeze_dim=2)
    else:
        want = gptj.apply_rotary_pos_emb(x[None], angles.sin()[None], angles.cos()[None])
    torch.testing.assert_close(reference.rotate(x, angles.cos(), angles.sin(), interleaved), want[0])


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_positions_and_partial_rotary_dim(causal):
    """k turns at cache_seqlens + i; q too if causal, else all queries at cache_seqlens. The rest of D is kept."""
    q, k_new, v_new = qkv(2, 3, 3, heads=2)
    k_cache, v_cache = torch.randn(2, 12, 2, 32), torch.randn(2, 12, 2, 32)
    angles = torch.rand(12, 8)
    lengths = torch.tensor([4, 7])
    before = k_cache.clone()
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k_new,
        v_new,
        angles.cos(),
        angles.sin(),
        lengths,
        causal=causal,
        rotary_interleaved=False,
    )
    for b, start in enumerate(lengths.tolist()):

        def turn(x: Tensor, positions: Tensor) -> Tensor:
            c, s = angles[positions].cos().unsqueeze(1), angles[positions].sin().unsqueeze(1)
            return torch.cat((x[..., :8] * c - x[..., 8:16] * s, x[..., 8:16] * c + x[..., :8] * s, x[..., 16:]), -1)

        new = torch.arange(start, start + 3)
        keys = torch.cat((before[b, :start], turn(k_new[b], new)))
        torch.testing.assert_close(k_cache[b, : start + 3], keys)
        assert torch.equal(k_cache[b, start + 3 :], before[b, start + 3 :])
        q_b = turn(q[b], new if causal else torch.full((3,), start))
        mask = bottom_right(3, start + 3, -1, 0 if causal else -1)
        want = sdpa(q_b[None], keys[None], v_cache[b : b + 1, : start + 3], mask)
        torch.testing.assert_close(out[b].double(), want[0], atol=2e-6, rtol=1e-5)


def test_leftpad_batch_idx_and_skipped_sequences():
    q, k, v = qkv(3, 2, 10)
    rows, firsts, lengths = torch.tensor([2, 0, 1]), torch.tensor([3, 0, 1]), torch.tensor([10, -1, 6])
    out, lse = flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        cache_leftpad=firsts,
        causal=True,
        return_softmax_lse=True,
    )
    assert (out[1] == 0).all() and (lse[1] == math.inf).all()
    for b in (0, 2):
        part = slice(firsts[b], lengths[b])
        count = int(lengths[b] - firsts[b])
        want = sdpa(q[b : b + 1], k[rows[b], part][None], v[rows[b], part][None], bottom_right(2, count, -1, 0))
        torch.testing.assert_close(out[b].double(), want[0], atol=2e-6, rtol=1e-5)


def test_varlen_is_each_sequence_alone():
    q, k, v = torch.randn(12, 4, 32), torch.randn(20, 2, 32), torch.randn(20, 2, 16)
    cu_q, cu_k = torch.tensor([0, 3, 3, 10]), torch.tensor([0, 5, 12, 20])
    out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 8, causal=True, return_softmax_lse=True)
    assert (out[10:] == 0).all() and (lse[:, 10:] == math.inf).all()
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone, alone_lse = flash_attn_func(q[None, rows], k[None, keys], v[None, keys], causal=True, return_softmax_lse=True)
        torch.testing.assert_close(out[rows], alone[0])
        torch.testing.assert_close(lse[:, rows], alone_lse[0])


def test_seqused_shortens_both_sides():
    q, k, v = torch.randn(9, 4, 32), torch.randn(11, 2, 32), torch.randn(11, 2, 32)
    cu_q, cu_k, used_q, used_k = (torch.tensor(x) for x in ([0, 4, 9], [0, 5, 11], [2, 5], [5, 3]))
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 6, causal=True, seqused_q=used_q, seqused_k=used_k)
    assert (out[2:4] == 0).all()
    torch.testing.assert_close(out[None, :2], flash_attn_func(q[None, :2], k[None, :5], v[None, :5], causal=True))
    torch.testing.assert_close(out[None, 4:], flash_attn_func(q[None, 4:], k[None, 5:8], v[None, 5:8], causal=True))


def test_paged_varlen_is_the_gathered_call():
    pages_k, pages_v = torch.randn(9, 4, 2, 32), torch.randn(9, 4, 2, 32)
    table, lengths = torch.tensor([[3, 1, -1], [0, 8, 2]]), [7, 12]
    q, cu_q, cu_k = torch.randn(8, 4, 32), torch.tensor([0, 3, 8]), torch.tensor([0, 7, 19])
    out = flash_attn_varlen_func(q, pages_k, pages_v, cu_q, cu_k, 5, 12, causal=True, block_table=table)
    same = flash_attn_varlen_func(
        q, pages_k, pages_v, cu_q, None, 5, 12, causal=True, page_table=table, seqused_k=torch.tensor(lengths)
    )
    assert torch.equal(out, same)
    for b, length in enumerate(lengths):
        rows = slice(cu_q[b], cu_q[b + 1])
        count = -(-length // 4)
        k, v = (pages[table[b, :count]].flatten(0, 1)[None, :length] for pages in (pages_k, pages_v))
        torch.testing.assert_close(out[None, rows], flash_attn_func(q[None, rows], k, v, causal=True))


def test_kv_paged_write_touches_its_slots_only():
    k_cache, v_cache = torch.full((6, 4, 2, 8), math.nan), torch.full((6, 4, 2, 8), math.nan)
    k, v = torch.randn(3, 3, 2, 8), torch.randn(3, 3, 2, 8)
    table, lengths = torch.tensor([[5, 2], [-1, -1], [0, -1]]), torch.tensor([2, -1, 0])
    assert kv_paged_write(k, v, k_cache, v_cache, table, lengths) is None
    want_k, want_v = torch.full_like(k_cache, math.nan), torch.full_like(v_cache, math.nan)
    for (b, i), slot in {
        (0, 0): (5, 2),
        (0, 1): (5, 3),
        (0, 2): (2, 0),
        (2, 0): (0, 0),
        (2, 1): (0, 1),
        (2, 2): (0, 2),
    }.items():
        want_k[slot], want_v[slot] = k[b, i], v[b, i]
    torch.testing.assert_close(k_cache, want_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_cache, want_v, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merge_attention_states(dtype):
    q, k, v = qkv(2, 3, 12, dtype=dtype)
    whole, whole_lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    a = flash_attn_func(q, k[:, :5], v[:, :5], return_softmax_lse=True)
    b = flash_attn_func(q, k[:, 5:], v[:, 5:], return_softmax_lse=True)
    out, lse = merge_attention_states(*a, *b)
    torch.testing.assert_close(out, whole, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, whole_lse)
    for nothing in (math.inf, -math.inf):
        empty = torch.full_like(whole, math.nan), torch.full_like(whole_lse, nothing)
        torch.testing.assert_close(merge_attention_states(*a, *empty), a)
        out, lse = merge_attention_states(*empty, *empty)
        assert (out == 0).all() and (lse == math.inf).all()


def test_reference_over_all_options(rng: random.Random, rounds):
    """Every dtype, layout and option against the same code in float64: rounding, poison and strides."""
    for _ in range(rounds(150)):
        assert_matches_reference(random_problem(rng), reference.attention)
