"""torch.compile holds one operator a call, with the same results and without copies of a cache."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pagedflash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, kv_paged_write
from pagedflash.testing import LAYOUTS, random_problem

LENGTHS = torch.tensor([5, 20], dtype=torch.int32)
TABLE = torch.tensor([[8, 2, 30], [4, 16, 22]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True)


def bytes_allocated(function) -> int:
    """Bytes that a call allocates on the CPU, all allocations added up."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


@pytest.mark.parametrize("lse", [False, True])
def test_dense_and_varlen(lse):
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)

    def dense(q: Tensor, k: Tensor, v: Tensor):
        return flash_attn_func(q * 2, k, v, causal=True, window_size=(4, 4), return_softmax_lse=lse)

    cu_q, cu_k = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 9, 18], dtype=torch.int32)

    def varlen(q: Tensor, k: Tensor, v: Tensor):
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*rows, cu_q, cu_k, 5, 9, softcap=3.0, return_softmax_lse=lse)

    for function in (dense, varlen):
        torch.testing.assert_close(compiled(function)(q, k, v), function(q, k, v))


def test_gpt_oss_sinks_and_alibi():
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    function = lambda *x: flash_attn_func(*x, s_aux=torch.ones(4), alibi_slopes=torch.ones(4) / 8)  # noqa: E731
    torch.testing.assert_close(compiled(function)(q, k, v), function(q, k, v))


def step_with_views(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, block_table=TABLE, causal=True)
    return out * 2


def step_with_base(q: Tensor, base: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The two overlapping views are made inside the graph, as transformers' cache does for each layer."""
    return step_with_views(q, base[:-1], base[1:], k, v)


@pytest.mark.parametrize("where", ["inputs", "views of an input"])
@pytest.mark.parametrize("overlap", [True, False])
def test_append_writes_in_place_and_copies_no_cache(where, overlap):
    base = torch.randn(2000, 16, 2, 32)  # 8 MB
    q, k, v = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 32)
    eager_base = base.clone()
    halves = (lambda b: (b[:-1], b[1:])) if overlap else (lambda b: (b[:1000], b[1000:]))
    want = step_with_views(q, *halves(eager_base), k, v)

    if where == "inputs":
        step = compiled(step_with_views)
        run = lambda: step(q, *halves(base), k, v)  # noqa: E731
    else:
        step = compiled(lambda q, b, k, v: step_with_views(q, *halves(b), k, v))
        run = lambda: step(q, base, k, v)  # noqa: E731
    address = base.data_ptr()
    torch.testing.assert_close(run(), want)
    assert torch.equal(base, eager_base) and base.data_ptr() == address
    assert bytes_allocated(run) < base.nbytes / 8


def test_two_layers_of_one_allocation_in_one_graph():
    """Layer after layer writes its own interleaved views; the order of reads and writes must survive the compiler."""
    base = torch.randn(64, 16, 2, 32)
    q, k, v = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 32)

    def layers(q: Tensor, base: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = step_with_views(q, base[0:-3], base[1:-2], k, v)
        second = step_with_views(first, base[2:-1], base[3:], k + 1, v + 1)
        return second + step_with_views(second, base[0:-3], base[1:-2], k + 2, v + 2)

    copy = base.clone()
    want = layers(q, copy, k, v)
    torch.testing.assert_close(compiled(layers)(q, base, k, v), want)
    assert torch.equal(base, copy)


def test_kv_paged_write():
    base = torch.randn(2000, 16, 2, 32)
    k, v = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 32)
    copy = base.clone()
    kv_paged_write(k, v, copy[:-1], copy[1:], TABLE, LENGTHS)

    @compiled
    def write(base: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv_paged_write(k, v, base[:-1], base[1:], TABLE, LENGTHS)
        return k + 1

    write(base, k, v)
    assert torch.equal(base, copy)
    assert bytes_allocated(lambda: write(base, k, v)) < base.nbytes / 8


def test_export_keeps_one_operator():
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_func(q, k, v, causal=True)

    inputs = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    program = torch.export.export(Attend(), inputs)
    assert sum("pagedflash.attention" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(*inputs), flash_attn_func(*inputs, causal=True))


def test_export_of_an_append():
    """The exported program declares what it writes, and writes it."""

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return step_with_views(q, k_cache, v_cache, k, v)

    caches = torch.randn(2, 40, 16, 2, 32)
    q, k, v = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 32)
    want_caches = caches.clone()
    want = step_with_views(q, *want_caches, k, v)
    program = torch.export.export(Step(), (q, *caches.clone(), k, v))
    assert sum("attention_with_append" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(q, *caches, k, v), want)
    assert torch.equal(caches, want_caches)


def test_dynamic_shapes_compile_once():
    """Batch, queries and cache grow without a new graph for each size."""
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    step = torch.compile(step_of_any_size, fullgraph=True, dynamic=True, backend=count)
    for batch, pages in ((3, 33), (5, 60), (7, 70)):
        caches = torch.randn(2, pages, 4, 2, 32)
        table = torch.randperm(pages)[: batch * (pages // batch)].view(batch, -1).int()
        lengths = torch.arange(1, batch + 1, dtype=torch.int32)
        q, k, v = torch.randn(batch, 1, 4, 32), torch.randn(batch, 1, 2, 32), torch.randn(batch, 1, 2, 32)
        want_caches = caches.clone()
        want = step_of_any_size(q, *want_caches, k, v, table, lengths)
        torch.testing.assert_close(step(q, *caches, k, v, table, lengths), want)
        assert torch.equal(caches, want_caches)
    assert compilations == 1


def step_of_any_size(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:
    return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True) + 1


def test_a_length_computed_in_the_graph():
    """``max_seqlen`` is then a number that the tracer knows nothing of."""

    def attend(q: Tensor, cu_seqlens: Tensor) -> Tensor:
        longest = cu_seqlens.diff().max().item()
        return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest, causal=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for lengths in ((3, 5), (4, 9, 2)):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
            q = torch.randn(sum(lengths), 2, 64)
            torch.testing.assert_close(compiled(attend)(q, cu_seqlens), attend(q, cu_seqlens))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_pass_opcheck(layout, rng):
    """The schema's word on what is mutated, and the fake kernels' on shapes, hold for the real ones."""
    checked = set()
    while checked != ({False, True} if layout in ("cache", "paged", "paged varlen") else {False}):
        problem = random_problem(rng, dtype=torch.float32, layout=layout, max_keys=20, max_queries=5)
        appends = problem.append is not None
        if any(tensor is not None and tensor.numel() == 0 for tensor in problem.tensors):
            continue  # opcheck fails on empty strided inputs of its own accord
        # opcheck cannot express mutated arguments that share memory; the tests above cover those.
        if appends and problem.cache.k.untyped_storage()._cdata == problem.cache.v.untyped_storage()._cdata:
            continue
        name = "attention_with_append" if appends else "attention"
        operator = getattr(torch.ops.pagedflash, name).default
        torch.library.opcheck(operator, problem.flat, test_utils=("test_schema", "test_faketensor"))
        checked.add(appends)


def test_eager_calls_are_seen_by_whatever_watches_operators():
    """Calls with plain tensors pass by torch's dispatcher, except where something follows it."""
    q, k, v = torch.randn(3, 1, 4, 2, 16)
    name = "pagedflash::attention"

    class Recorder(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen.append(operator.name())
            return operator(*args, **(kwargs or {}))

    want = flash_attn_func(q, k, v)
    with Recorder():
        torch.testing.assert_close(flash_attn_func(q, k, v), want, rtol=0, atol=0)
    assert name in Recorder.seen
    with torch.profiler.profile() as profile:
        flash_attn_func(q, k, v)
    assert name in {event.name for event in profile.events()}
    assert name in str(torch.jit.trace(lambda *rows: flash_attn_func(*rows), (q, k, v), check_trace=False).graph)
