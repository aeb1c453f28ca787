"""What engines and older callers ask of the functions: an output to write into, slots, packed appends, packed qkv."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import pagedflash
from pagedflash import (
    bert_padding,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    kv_paged_write,
    use_backend,
)
from pagedflash.testing import paged_problem

BACKENDS = ("reference", "cpu", "triton", "metal")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """Each backend, Triton's in its interpreter and Metal's on the simulator."""
    if request.param == "metal":
        metalsim = pytest.importorskip("metalsim")
        from pagedflash.backends import metal

        with metal.use_compiler(metalsim.compile_shader), use_backend("metal"):
            yield request.param
        return
    if request.param == "triton":
        pytest.importorskip("triton")
        import triton_interpreter  # noqa: F401
    with use_backend(request.param):
        yield request.param


def packed_step() -> dict[str, Tensor]:
    """Three requests on pages of 4: a chunk of 5 tokens, one token, a chunk of 3."""
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 6, 9], dtype=torch.int32)
    return dict(
        q=torch.randn(9, 4, 32, generator=generator),
        k_new=torch.randn(9, 2, 32, generator=generator),
        v_new=torch.randn(9, 2, 32, generator=generator),
        k_cache=torch.randn(12, 4, 2, 32, generator=generator),
        v_cache=torch.randn(12, 4, 2, 32, generator=generator),
        cu_seqlens_q=cu_seqlens,
        before=torch.tensor([2, 11, 0], dtype=torch.int32),
        block_table=torch.tensor([[7, 1, -1], [0, 3, 11], [5, -1, -1]], dtype=torch.int32),
    )


def slots_of(step: dict[str, Tensor]) -> Tensor:
    """Slot by slot, in plain Python."""
    slots = []
    for b, (start, end) in enumerate(zip(step["cu_seqlens_q"].tolist(), step["cu_seqlens_q"].tolist()[1:])):
        for i in range(end - start):
            position = int(step["before"][b]) + i
            slots.append(int(step["block_table"][b, position // 4]) * 4 + position % 4)
    return torch.tensor(slots)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_slot_mapping_says_where_each_token_goes(backend: str, dtype: torch.dtype) -> None:
    step = packed_step()
    slots = slots_of(step).to(dtype)
    slots[3] = -1
    want_k, want_v = step["k_cache"].clone(), step["v_cache"].clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want_k[slot // 4, slot % 4], want_v[slot // 4, slot % 4] = step["k_new"][token], step["v_new"][token]
    kv_paged_write(step["k_new"], step["v_new"], step["k_cache"], step["v_cache"], slot_mapping=slots)
    assert torch.equal(step["k_cache"], want_k) and torch.equal(step["v_cache"], want_v)


def test_a_wrong_slot_mapping_writes_nothing() -> None:
    step = packed_step()
    caches = step["k_cache"], step["v_cache"]
    before = [cache.clone() for cache in caches]
    good = slots_of(step)
    for index, value in ((0, 48), (2, -2), (4, int(good[0]))):
        wrong = good.clone()
        wrong[index] = value
        with pytest.raises(ValueError, match="slot_mapping is"):
            kv_paged_write(step["k_new"], step["v_new"], *caches, slot_mapping=wrong)
    with pytest.raises(ValueError, match="slot_mapping is given together with block_table"):
        kv_paged_write(step["k_new"], step["v_new"], *caches, step["block_table"], slot_mapping=good)
    with pytest.raises(TypeError, match="slot_mapping is of dtype"):
        kv_paged_write(step["k_new"], step["v_new"], *caches, slot_mapping=good.float())
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before))


@pytest.mark.parametrize("lengths_as", ["seqused_k", "cu_seqlens_k"])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0)])
def test_packed_append_is_a_write_and_attention(backend: str, lengths_as: str, window: tuple[int, int]) -> None:
    step = packed_step()
    want_k, want_v = step["k_cache"].clone(), step["v_cache"].clone()
    want = []
    with use_backend("reference"):
        for b, (start, end) in enumerate(zip(step["cu_seqlens_q"].tolist(), step["cu_seqlens_q"].tolist()[1:])):
            q, k, v = (step[name][None, start:end] for name in ("q", "k_new", "v_new"))
            row, length = step["block_table"][b : b + 1], step["before"][b : b + 1]
            want.append(
                flash_attn_with_kvcache(
                    q, want_k, want_v, k, v, cache_seqlens=length, block_table=row, causal=True, window_size=window
                )[0]
            )
    before = step["before"]
    offsets = torch.nn.functional.pad(before.cumsum(0, dtype=torch.int32), (1, 0))
    lengths = dict(seqused_k=before) if lengths_as == "seqused_k" else {}
    out = flash_attn_varlen_func(
        step["q"], step["k_cache"], step["v_cache"], step["cu_seqlens_q"], None if lengths else offsets, 5, 12,
        block_table=step["block_table"], k_new=step["k_new"], v_new=step["v_new"], causal=True, window_size=window,
        **lengths,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.cat(want), atol=2e-6, rtol=2e-5)
    assert torch.equal(step["k_cache"], want_k) and torch.equal(step["v_cache"], want_v)


def test_a_wrong_packed_append_writes_nothing() -> None:
    step = packed_step()
    arguments = dict(
        q=step["q"], k=step["k_cache"], v=step["v_cache"], cu_seqlens_q=step["cu_seqlens_q"], cu_seqlens_k=None,
        max_seqlen_q=5, max_seqlen_k=12, block_table=step["block_table"], seqused_k=step["before"],
        k_new=step["k_new"], v_new=step["v_new"], causal=True,
    )  # fmt: skip
    unread = step["block_table"].clone()
    unread[0, 1] = -1
    wrong = (
        (dict(block_table=unread), "block_table is -1"),
        (dict(seqused_k=torch.tensor([2, 12, 0], dtype=torch.int32)), "seqused_k is"),
        (dict(v_new=None), "v_new is None"),
        (dict(block_table=None), "k_new is given without block_table"),
        (dict(k_new=step["k_new"][:, :1]), "k_new is of shape"),
        (dict(softcap=-1.0), "softcap is"),
        (dict(max_seqlen_q=4), "max_seqlen_q is"),
        (dict(out=torch.empty(9, 4, 16)), "out is of shape"),
    )
    shared = step["block_table"].clone()
    shared[2, 0] = shared[0, 0]  # two sequences that write to slots 2 and 2 of one page
    wrong += ((dict(block_table=shared), "block_table is sending two new tokens to slot 2 of page 7"),)
    wrong += ((dict(block_table=None, page_table=shared), "page_table is sending two new tokens to slot 2 of page 7"),)
    before = step["k_cache"].clone(), step["v_cache"].clone()
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            flash_attn_varlen_func(**arguments | change)
        assert torch.equal(step["k_cache"], before[0]) and torch.equal(step["v_cache"], before[1])


@pytest.mark.parametrize("kind", ["contiguous", "strided", "unaligned"])
def test_out_is_written_in_place_and_returned(backend: str, kind: str) -> None:
    q, k, v = torch.randn(2, 3, 4, 32), torch.randn(2, 7, 2, 32), torch.randn(2, 7, 2, 32)
    want, want_lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    memory = torch.full((2 * 3 * 4 * 32 * 2 + 1,), 7.0)
    out = {
        "contiguous": memory[: q.numel()].view(q.shape),
        "strided": memory[:-1].view(2, 3, 8, 32)[:, :, ::2],
        "unaligned": memory[1 : q.numel() + 1].view(q.shape),
    }[kind]
    version = out._version
    got, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True, out=out)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse) and out._version > version
    assert memory.eq(7.0).sum() == memory.numel() - q.numel()

    pages = paged_problem([9, 3], heads=(4, 2), head_dim=32, page_size=4)
    want = flash_attn_with_kvcache(*pages[:3], cache_seqlens=pages.cache_seqlens, block_table=pages.block_table)
    out = torch.full_like(want, 7.0)
    flash_attn_with_kvcache(*pages[:3], cache_seqlens=pages.cache_seqlens, block_table=pages.block_table, out=out)
    assert torch.equal(out, want)


def test_a_wrong_out_is_rejected() -> None:
    q, k, v = torch.randn(3, 2, 3, 2, 16)
    out = torch.empty_like(q)
    for wrong, message in (
        (out[:1], "out is of shape"),
        (out.double(), "out is of dtype"),
        (torch.empty(2, 3, 2, 32)[..., ::2], "out is strided"),
        (out.clone().requires_grad_(), "out is given where gradients are tracked"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            flash_attn_func(q, k, v, out=wrong)
    with pytest.raises(ValueError, match="out is given where gradients are tracked"):
        flash_attn_func(q.clone().requires_grad_(), k, v, out=out)
    with torch.no_grad():
        flash_attn_func(q.clone().requires_grad_(), k, v, out=out)


def test_out_through_the_compiler() -> None:
    q, k, v = torch.randn(3, 2, 3, 2, 16)

    def attend(q: Tensor, out: Tensor) -> Tensor:
        flash_attn_func(q * 2, k, v, causal=True, out=out)
        return out + 1

    out = torch.zeros_like(q)
    want = flash_attn_func(q * 2, k, v, causal=True)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, out), want + 1)
    torch.testing.assert_close(out, want)


def test_newer_arguments_are_accepted_where_they_ask_for_nothing() -> None:
    q, k, v = torch.randn(3, 2, 3, 2, 16)
    want = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, scheduler_metadata=None, qv=None, attention_chunk=0), want)
    torch.testing.assert_close(flash_attn_func(q, k, v, num_splits=2), want)
    for name, value in (("scheduler_metadata", torch.zeros(1)), ("qv", q), ("attention_chunk", 4), ("num_splits", -1)):
        with pytest.raises(ValueError, match=f"{name} is"):
            flash_attn_func(q, k, v, **{name: value})


def test_all_functions_have_the_shared_arguments() -> None:
    """transformers filters the arguments of the dense function by the signature of the packed one."""
    dense, packed, cached = (
        inspect.signature(function).parameters
        for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
    )
    assert set(dense) <= set(packed)
    assert {"out", "qv", "attention_chunk", "scheduler_metadata", "num_splits"} <= set(dense) & set(cached)


def test_packed_qkv_functions() -> None:
    qkv, kv = torch.randn(2, 5, 3, 4, 16), torch.randn(2, 7, 2, 2, 16)
    q, k, v = qkv.unbind(2)
    assert torch.equal(pagedflash.flash_attn_qkvpacked_func(qkv, causal=True), flash_attn_func(q, k, v, causal=True))
    assert torch.equal(
        pagedflash.flash_attn_kvpacked_func(q, kv, softcap=2.0), flash_attn_func(q, *kv.unbind(2), softcap=2.0)
    )
    offsets, key_offsets = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 7, 14], dtype=torch.int32)
    rows = qkv.flatten(0, 1)
    want = flash_attn_varlen_func(*rows.unbind(1), offsets, offsets, 5, 5, causal=True)
    assert torch.equal(pagedflash.flash_attn_varlen_qkvpacked_func(rows, offsets, 5, causal=True), want)
    key_rows = kv.flatten(0, 1)
    want = flash_attn_varlen_func(rows[:, 0], *key_rows.unbind(1), offsets, key_offsets, 5, 7)
    got = pagedflash.flash_attn_varlen_kvpacked_func(rows[:, 0], key_rows, offsets, key_offsets, 5, 7)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="qkv is of shape"):
        pagedflash.flash_attn_qkvpacked_func(kv)


def test_bert_padding_there_and_back() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1]])
    states = torch.randn(3, 4, 2, 8)
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(states, mask)
    assert torch.equal(tokens, states[mask.bool()]) and cu_seqlens.tolist() == [0, 3, 4, 7] and longest == 3
    assert used.tolist() == [3, 1, 3] and cu_seqlens.dtype is used.dtype is torch.int32
    assert torch.equal(bert_padding.pad_input(tokens, indices, 3, 4), states * mask[..., None, None])
    assert torch.equal(bert_padding.index_first_axis(states.flatten(0, 1), indices), tokens)
    unused = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    *_, cu_seqlens, longest, used = bert_padding.unpad_input(states, mask, unused)
    assert cu_seqlens.tolist() == [0, 4, 5, 8] and longest == 4 and used.tolist() == [3, 1, 3]
