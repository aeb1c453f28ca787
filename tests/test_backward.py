"""Gradients: what torch does with a differentiable function besides calling it, and the memory that it takes.

That the gradients of every backend are right over all options is checked by the conformance suite (test_conformance.py).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import pagedflash
from pagedflash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from pagedflash.backends import backward, cpu

CU_Q, CU_K = (torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 3, 3, 8], [0, 5, 7, 15]))
LENGTHS = torch.tensor([4, 7], dtype=torch.int32)
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])

Inputs = tuple[Tensor, ...]


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    """q, k, v and sinks: two sequences of 5 queries and 7 keys, two query heads for each KV head."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), (4,))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def packed_inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 4, 16), (15, 2, 16), (15, 2, 16), (4,))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    out = flash_attn_func(q, k, v, causal=True, softcap=3.0, s_aux=sinks)
    assert isinstance(out, Tensor)
    return out


def plain_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """:func:`attend`, spelled out."""
    k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], 2) for tensor in (k, v))
    scores = 3.0 * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 / 3.0)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    logits = torch.cat((scores.masked_fill(~seen, -torch.inf), sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1)[..., :-1], v)


def gradients_of(function: Callable[..., Tensor], tensors: Inputs) -> Inputs:
    """Of a loss that weighs all elements differently."""
    out = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), tensors)


def assert_close(got: Inputs, want: Inputs, tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(causal=True),
        dict(window_size=(2, 1)),
        dict(causal=True, window_size=(1, 0), softcap=1.5),
        dict(alibi_slopes=SLOPES, softmax_scale=0.4),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradcheck(options: dict[str, Any], with_sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and LSE against finite differences, in float64, in blocks of two queries and two keys."""
    monkeypatch.setattr(backward, "_block_size", lambda heads: 2)

    def small(tensors: Inputs) -> Inputs:
        return tuple(tensor[..., :size].detach().requires_grad_() for tensor, size in zip(tensors, (4, 4, 2)))

    sinks = inputs()[3].detach() if with_sinks else None

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn_func(q, k, v, s_aux=sinks, return_softmax_lse=True, **options)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 8, s_aux=sinks, **options)

    with pagedflash.use_backend("reference"):
        torch.autograd.gradcheck(dense, small(inputs(torch.float64)))
        torch.autograd.gradcheck(packed, small(packed_inputs(torch.float64)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Gradients come in the dtype of what they belong to, and are those of plain attention."""
    tensors = inputs(dtype)
    got = gradients_of(attend, tensors)
    assert [gradient.dtype for gradient in got] == [dtype] * 4
    assert_close(got, gradients_of(plain_attention, tuple(x.detach().double().requires_grad_() for x in tensors)), tolerance)


def test_learnable_sink_is_another_name() -> None:
    got = gradients_of(lambda q, k, v, s: flash_attn_func(q, k, v, causal=True, softcap=3.0, learnable_sink=s), inputs())
    assert_close(got, gradients_of(attend, inputs()), 0.0)


def test_strided_and_expanded_inputs() -> None:
    """Heads before tokens, one sequence for the whole batch, slices of one projection: the gradients go where they came
    from."""
    q, k, v, sinks = inputs()
    heads_first = q.detach().transpose(1, 2).contiguous().requires_grad_()
    one_sequence = k.detach()[:1].clone().requires_grad_()
    both = torch.cat((v.detach(), v.detach() + 1), -1).requires_grad_()
    views = lambda q, k, v, s: attend(q.transpose(1, 2), k.expand(2, -1, -1, -1), v[..., 16:], s)  # noqa: E731
    plain = lambda q, k, v, s: plain_attention(q.transpose(1, 2), k.expand(2, -1, -1, -1), v[..., 16:], s)  # noqa: E731
    tensors = heads_first, one_sequence, both, sinks
    assert_close(gradients_of(views, tensors), gradients_of(plain, tensors))


def test_fused_projections() -> None:
    """flash-attn's packed forms: one gradient for q, k and v together."""
    qkv = torch.randn(2, 6, 3, 4, 16, requires_grad=True)
    got = gradients_of(lambda qkv: pagedflash.flash_attn_qkvpacked_func(qkv, causal=True), (qkv,))
    assert_close(got, gradients_of(lambda qkv: flash_attn_func(*qkv.unbind(2), causal=True), (qkv,)), 0.0)

    rows, offsets = qkv.detach().flatten(0, 1).requires_grad_(), torch.tensor([0, 6, 12], dtype=torch.int32)
    packed = gradients_of(lambda qkv: pagedflash.flash_attn_varlen_qkvpacked_func(qkv, offsets, 6, causal=True), (rows,))
    assert_close(packed, (got[0].flatten(0, 1),))


def test_what_is_not_used_gets_zero() -> None:
    """Queries and keys behind the last sequence or beyond what it uses, whatever lies there."""
    q, k, v, _ = (tensor.detach() for tensor in packed_inputs())
    q, k, v = (torch.cat((tensor, torch.full_like(tensor[:2], torch.nan))) for tensor in (q, k, v))
    used_q, used_k = torch.tensor([2, 0, 5], dtype=torch.int32), torch.tensor([5, 2, 6], dtype=torch.int32)
    k[13:15] = v[13:15] = torch.nan
    tensors = tuple(tensor.requires_grad_() for tensor in (q, k, v))
    out = flash_attn_varlen_func(*tensors, CU_Q, CU_K, 5, 8, seqused_q=used_q, seqused_k=used_k)
    weights = torch.ones_like(out)
    weights[2] = weights[8:] = torch.nan
    d_q, d_k, d_v = torch.autograd.grad(out, tensors, weights)
    used = torch.tensor([True, True, False, True, True, True, True, True, False, False])
    assert d_q[used].any(-1).all() and not d_q[~used].any()
    for gradient in (d_k, d_v):
        assert gradient.isfinite().all() and not gradient[5:7].any() and not gradient[13:].any()
    assert d_v[:5].any(-1).all() and d_v[7:13].any(-1).all()


def test_queries_without_keys_get_zero() -> None:
    """More queries than keys, causal: the first see nothing."""
    q, k, v, sinks = inputs()
    tensors = q, k[:, :3].detach().requires_grad_(), v[:, :3].detach().requires_grad_(), sinks
    out, lse = flash_attn_func(*tensors[:3], causal=True, s_aux=sinks, return_softmax_lse=True)
    assert lse[..., :2].isinf().all()
    weights = torch.ones_like(out)
    weights[:, :2] = torch.nan
    gradients = torch.autograd.grad(out, tensors, weights)
    assert all(gradient.isfinite().all() for gradient in gradients) and not gradients[0][:, :2].any()


def test_a_cache_without_an_append() -> None:
    """Lengths and left padding as transformers' padded batches have them; the same as attending to the keys alone."""
    q, k, v, _ = inputs()
    firsts = torch.tensor([1, 0], dtype=torch.int32)

    def cached(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS, cache_leftpad=firsts, causal=True)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = flash_attn_func(q[:1], k[:1, 1:4], v[:1, 1:4], causal=True)
        return torch.cat((first, flash_attn_func(q[1:], k[1:], v[1:], causal=True)))

    assert_close(gradients_of(cached, (q, k, v)), gradients_of(alone, (q, k, v)))


def test_rows_of_a_cache_that_sequences_share() -> None:
    q, k, v, _ = inputs()
    rows = torch.tensor([1, 1], dtype=torch.int32)
    got = gradients_of(lambda *qkv: flash_attn_with_kvcache(*qkv, cache_seqlens=7, cache_batch_idx=rows), (q, k, v))
    want = gradients_of(lambda q, k, v: flash_attn_func(q, k[rows.long()], v[rows.long()]), (q, k, v))
    assert_close(got, want)


def test_a_cache_that_was_written_since_is_found_out() -> None:
    q, k, v, _ = inputs()
    out = flash_attn_func(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_slopes_have_no_gradient() -> None:
    out = flash_attn_func(*inputs()[:3], alibi_slopes=SLOPES.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="alibi_slopes requires a gradient"):
        out.sum().backward()


def test_second_derivatives_say_that_they_are_not_there() -> None:
    tensors = inputs()
    (d_q,) = torch.autograd.grad(attend(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="a derivative of attention's gradient was asked for"):
        d_q.sum().backward()
    rest = tuple(tensor.detach() for tensor in tensors[1:])
    first = torch.func.grad(lambda q: attend(q, *rest).square().sum())
    with pytest.raises(NotImplementedError, match="a derivative of attention's gradient was asked for"):
        torch.func.grad(lambda q: first(q).sum())(tensors[0].detach())


def test_activation_checkpointing() -> None:
    for use_reentrant in (False, True):
        checkpointed = lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=use_reentrant)  # noqa: B023, E731
        if use_reentrant:  # does not work with torch.autograd.grad
            tensors = inputs()
            checkpointed(*tensors).square().sum().backward()
            got = tuple(tensor.grad for tensor in tensors)
            assert_close(got, torch.autograd.grad(attend(*tensors).square().sum(), tensors), 0.0)
        else:
            assert_close(gradients_of(checkpointed, inputs()), gradients_of(attend, inputs()), 0.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_training_step(dynamic: bool) -> None:
    """One graph, forward and backward, each with one operator of attention."""
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "pagedflash" in str(node.target)])
        return make_boxed_func(graph)

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return attend(q * 2, k, v.tanh(), sinks)

    aot = aot_autograd(fw_compiler=record, bw_compiler=record)
    want = gradients_of(loss, inputs())
    assert_close(gradients_of(torch.compile(loss, fullgraph=True, backend=aot, dynamic=dynamic), inputs()), want)
    assert graphs == [["pagedflash.attention.default"], ["pagedflash.attention_backward.default"]]
    if not dynamic:
        assert_close(gradients_of(torch.compile(loss, fullgraph=True), inputs()), want)  # with Inductor


def test_a_compiled_step_over_packed_sequences() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 8, causal=True, s_aux=sinks)

    got = gradients_of(torch.compile(loss, fullgraph=True, backend="aot_eager"), packed_inputs())
    assert_close(got, gradients_of(loss, packed_inputs()), 0.0)


def test_the_fake_kernels_agree() -> None:
    """Shapes, dtypes, strides, and that the operators are as autograd takes them."""
    for tensors in (inputs(), inputs(torch.float64)):
        with pagedflash.use_backend("reference"):
            torch.library.opcheck(
                torch.ops.pagedflash.attention.default,
                problem_of(*tensors).flat,
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static"),
            )


def problem_of(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> pagedflash.problem.AttentionProblem:
    return pagedflash.problem.AttentionProblem.of_fields(
        q=q, k=k, v=v, sinks=sinks.float(), max_seqlen_q=5, max_seqlen_k=7, scale=0.25, window_right=0
    )


def test_transforms_of_torch_func() -> None:
    """grad; grad inside of vmap and the other way round."""
    tensors = tuple(tensor.detach() for tensor in inputs())
    loss = lambda *tensors: attend(*tensors).square().sum()  # noqa: E731
    each = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    got = each(*tensors)
    with_grad = inputs()
    assert_close(got, torch.autograd.grad(loss(*with_grad), with_grad), 0.0)

    three = tuple(torch.stack((tensor, tensor * 2, tensor - 1)) for tensor in tensors)
    want = tuple(torch.stack(parts) for parts in zip(*(each(*(x[i] for x in three)) for i in range(3))))
    assert_close(torch.vmap(each)(*three), want)
    together = torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), argnums=(0, 1, 2, 3))
    assert_close(together(*three), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing_inside(backend: str) -> None:
    """Neither of the forward nor of the backward pass, wherever that is called."""
    want = gradients_of(attend, inputs())
    with pagedflash.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert_close(gradients_of(attend, inputs()), want)


def test_gradients_accumulate() -> None:
    tensors = inputs()
    for _ in range(2):
        attend(*tensors).square().sum().backward()
    once = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    assert_close(tuple(tensor.grad for tensor in tensors), tuple(2 * gradient for gradient in once))


def test_two_outputs_in_one_loss() -> None:
    """The LSE is differentiable, too; either may be left out."""
    tensors = inputs()[:3]
    both = lambda q, k, v: flash_attn_func(q, k, v, return_softmax_lse=True)  # noqa: E731
    together = torch.autograd.grad(sum(result.sum() for result in both(*tensors)), tensors)
    apart = [torch.autograd.grad(both(*tensors)[i].sum(), tensors) for i in range(2)]
    assert_close(together, tuple(a + b for a, b in zip(*apart)))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        results = function(*arguments, **(options or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(100, 100), softcap=5.0)], ids=str)
def test_memory_grows_with_the_length_not_its_square(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is saved nor any tensor on the way is larger than the inputs or one block of scores."""
    monkeypatch.delattr(cpu, "backward")
    length, heads, head_dim = 4096, 2, 16
    q, k, v = (torch.randn(1, length, heads, head_dim, requires_grad=True) for _ in range(3))
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), _Largest() as largest:
        out = flash_attn_func(q, k, v, **options)
        assert sorted(saved) == sorted([q.numel(), k.numel(), v.numel(), out.numel(), heads * length])
        out.sum().backward()
    assert q.numel() <= largest.elements <= backward.BLOCK_SCORES < heads * length * length // 8


def test_hidden_blocks_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal costs little more than half the blocks, a window as many as it is wide."""
    monkeypatch.setattr(backward, "_block_size", lambda heads: 16)
    blocks: list[int] = []
    of_block = backward._Block.probabilities
    monkeypatch.setattr(backward._Block, "probabilities", lambda *x: (blocks.append(1), of_block(*x))[1])

    def count(**options: Any) -> int:
        blocks.clear()
        q, k, v = (torch.randn(1, 256, 1, 16, requires_grad=True) for _ in range(3))
        with pagedflash.use_backend("reference"):
            flash_attn_func(q, k, v, **options).sum().backward()
        return len(blocks)

    assert count() == 16 * 16
    assert count(causal=True) == 16 * 17 // 2
    assert count(window_size=(16, 0)) <= 3 * 16


# --------------------------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------------------------


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.sinks = torch.nn.Linear(16, 3 * 32), torch.nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).unbind(2)
        out = flash_attn_func(q, k, v, causal=True, s_aux=self.sinks)
        assert isinstance(out, Tensor)
        return out


def _train_on_one_of_two(rank: int, port: int, batch: Tensor, results: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(_Attention())
    model(batch[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in model.parameters()], results)
    torch.distributed.barrier()
    os._exit(0)  # the end of a DDP model waits for gloo's threads, one of which may wait for Python: torch hangs at times


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes with half of a batch each have the gradients of one with all of it."""
    batch = torch.randn(2, 6, 16)
    model = _Attention()
    model(batch).square().mean().backward()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_on_one_of_two, (port, batch, tmp_path / "gradients"), nprocs=2)
    for parameter, gradient in zip(model.parameters(), torch.load(tmp_path / "gradients"), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
