"""What torch does with a tensor besides reading it: transforms, forward-mode AD, versions, lazy negation, gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pagedflash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, kv_paged_write

LENGTHS = torch.tensor([3, 6], dtype=torch.int32)
TABLE = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((2, 3, 4, 16), (2, 5, 2, 16), (2, 5, 2, 16))
    return tuple(torch.randn(shape, generator=generator) for shape in (q, k, v))


def test_functionalize_runs() -> None:
    """In a process of its own: it used to end in a segmentation fault."""
    code = (
        "import torch; from pagedflash import flash_attn_func;"
        "q, k, v = torch.randn(3, 1, 4, 2, 16);"
        "out = torch.func.functionalize(lambda q: flash_attn_func(q, k, v))(q);"
        "torch.testing.assert_close(out, flash_attn_func(q, k, v))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (None, 1, 1)])
def test_vmap_is_one_call_for_each_element(in_dims: tuple[int | None, ...]) -> None:
    tensors = [
        tensor if axis is None else torch.stack((tensor, tensor * 2, tensor - 1), axis)
        for tensor, axis in zip(qkv(), in_dims)
    ]
    got = torch.vmap(flash_attn_func, in_dims=in_dims)(*tensors)
    for i in range(3):
        one = (tensor if axis is None else tensor.select(axis, i) for tensor, axis in zip(tensors, in_dims))
        assert torch.equal(got[i], flash_attn_func(*one))


def test_vmap_over_a_write_is_refused() -> None:
    k_cache, v_cache = torch.zeros(2, 3, 4, 4, 2, 16)
    k = torch.randn(3, 2, 1, 2, 16)
    write = torch.vmap(lambda k, k_cache, v_cache: kv_paged_write(k, k, k_cache, v_cache, TABLE, LENGTHS))
    with pytest.raises(NotImplementedError, match="vmap over a write"):
        write(k, k_cache, v_cache)
    assert not k_cache.any()


def test_forward_mode_derivatives_are_refused_not_dropped() -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="tangent"):
        torch.func.jvp(lambda q: flash_attn_func(q, k, v), (q,), (q,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="v carries a tangent"):
            flash_attn_func(q, k, forward_ad.make_dual(v, v))
        torch.testing.assert_close(flash_attn_func(q, k, v), flash_attn_func(*qkv()))


@pytest.mark.parametrize("field", range(3))
def test_lazily_negated_tensors_have_their_sign(field: int) -> None:
    tensors = list(qkv())
    tensors[field] = -tensors[field]
    want = flash_attn_func(*tensors)
    tensors[field] = torch._neg_view(-tensors[field])
    assert tensors[field].is_neg()
    for _ in range(2):
        assert torch.equal(flash_attn_func(*tensors), want)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["past the dispatcher", "through the dispatcher"])
def test_appends_are_seen_by_autograd(requires_grad: bool) -> None:
    """A graph that saved the cache must not be differentiated through what was written over it."""
    k_cache, v_cache = torch.ones(4, 4, 2, 16), torch.ones(4, 4, 2, 16)
    q, new = torch.randn(2, 1, 4, 16, requires_grad=requires_grad), torch.randn(2, 1, 2, 16)
    weight = torch.ones((), requires_grad=True)

    def append() -> None:
        flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=LENGTHS, block_table=TABLE)

    def write() -> None:
        kv_paged_write(new, new, k_cache, v_cache, TABLE, LENGTHS)

    for change in (append, append, write):
        saved = (weight * k_cache).sum(), (weight * v_cache).sum()
        versions = k_cache._version, v_cache._version
        change()
        assert k_cache._version > versions[0] and v_cache._version > versions[1]
        for loss in saved:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_appends_in_inference_mode() -> None:
    with torch.inference_mode():
        k_cache, v_cache, new = torch.zeros(4, 4, 2, 16), torch.zeros(4, 4, 2, 16), torch.ones(2, 1, 2, 16)
        kv_paged_write(new, new, k_cache, v_cache, TABLE, LENGTHS)
        assert k_cache[1, 3].eq(1).all() and v_cache[0, 2].eq(1).all()


@pytest.mark.parametrize("wants_grad", range(3))
def test_gradients_are_tracked_where_they_are_asked_for(wants_grad: int) -> None:
    tensors = list(qkv())
    want = flash_attn_func(*tensors, causal=True)
    tensors[wants_grad].requires_grad_()
    out = flash_attn_func(*tensors, causal=True)
    assert torch.equal(out, want) and out.requires_grad
    out.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i == wants_grad for i in range(3)]
    with torch.no_grad():
        assert not flash_attn_func(*tensors, causal=True).requires_grad
    for _ in range(2):  # the plan of a call without grad is not taken over by one with
        assert flash_attn_func(*tensors, causal=True).requires_grad


def test_every_function_runs_with_grad() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    cu_q, cu_k = torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 5, 10], dtype=torch.int32)
    rows = (tensor.flatten(0, 1) for tensor in (q, k, v))
    sinks = torch.nn.Parameter(torch.randn(4))
    assert flash_attn_varlen_func(*rows, cu_q, cu_k, 3, 5, s_aux=sinks).requires_grad
    caches = torch.zeros(4, 4, 2, 16), torch.zeros(4, 4, 2, 16)
    out = flash_attn_with_kvcache(q, *caches, k[:, :3], v[:, :3], cache_seqlens=torch.tensor([1, 2]), block_table=TABLE)
    assert out.requires_grad and caches[0].any() and not caches[0].requires_grad
    with pytest.raises(NotImplementedError, match="through an append to a cache, where there is none"):
        out.sum().backward()
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=torch.tensor([1, 2]), block_table=TABLE)
    with pytest.raises(NotImplementedError, match="through pages, where there is none"):
        out.sum().backward()
    quantized, scale = torch.zeros(2, 5, 2, 16, dtype=torch.int8), torch.ones(())
    out = flash_attn_with_kvcache(q, quantized, quantized, cache_seqlens=5, k_descale=scale, v_descale=scale)
    with pytest.raises(NotImplementedError, match="through a quantized cache, where there is none"):
        out.sum().backward()


def test_a_torch_without_its_private_names_still_runs() -> None:
    """Names that torch may rename are looked up; without them calls go through the dispatcher."""
    code = (
        "import torch\n"
        "for owner, name in ((torch._C, '_len_torch_dispatch_stack'), (torch._C._functorch, 'peek_interpreter_stack')):\n"
        "    delattr(owner, name)\n"
        "import pagedflash.ops as ops\n"
        "assert ops.is_watched()\n"
        "q, k, v = torch.randn(3, 1, 4, 2, 16)\n"
        "want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))\n"
        "torch.testing.assert_close(__import__('pagedflash').flash_attn_func(q, k, v), want.transpose(1, 2))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
