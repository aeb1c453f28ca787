"""The Metal kernels against the reference: on metalsim, or with ``pytest --device mps`` on a Mac."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import metalsim
import pytest
import torch
from metal_harness import Launch, gathered_sdpa, kernels_on, paged_decode

import pagedflash
from pagedflash import flash_attn_func, flash_attn_with_kvcache, kv_paged_write
from pagedflash.backends import metal
from pagedflash.backends.metal.launch import has_backward_kernel
from pagedflash.backends.metal.tiling import DECODE_MAX_QUERIES
from pagedflash.backends.protocol import Support
from pagedflash.geometry import may_be_mixed
from pagedflash.problem import AttentionProblem
from pagedflash.testing import (
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    PAGE_SIZES,
    assert_matches_reference,
    describe,
    random_problem,
)
from pagedflash.testing.compare import assert_gradients_match_reference
from pagedflash.testing.conformance import BackendConformance

LIMITS = metal.CAPABILITIES._replace(cache_dtypes=())
OTHER_HEAD_DIMS = (1, 2, 5, 8, 13, 24, 40, 48, 56, 88, 104, 120, 136, 160, 176, 200, 248, 255)


@pytest.fixture
def launches(device: str) -> Iterator[list[Launch]]:
    """Public functions run on the Metal backend; the launches they make."""
    with kernels_on(device) as seen, pagedflash.use_backend("metal"):
        yield seen


# --------------------------------------------------------------------------------------------------------------------
# Every option with every other
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options(rng: random.Random, rounds, launches, device, layout, dtype) -> None:
    for _ in range(rounds(1)):
        assert_matches_reference(
            random_problem(rng, dtype=dtype, layout=layout, device=device, capabilities=LIMITS), metal.attention
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_options_under_the_simulator_checks(rng: random.Random, rounds, launches, device, layout) -> None:
    """Bounds, alignment, races, uninitialised memory and divergence, with the threads in any order."""
    if device != "cpu":
        pytest.skip("the checks are the simulator's")
    for _ in range(rounds(2)):
        problem = random_problem(rng, layout=layout, capabilities=LIMITS)
        with metalsim.simulate(check=True, order=rng.choice(metalsim.ORDERS), seed=rng.getrandbits(32)):
            assert_matches_reference(problem, metal.attention)


@pytest.mark.parametrize("queries", (1, 12), ids=("decode", "prefill"))
@pytest.mark.parametrize("head_dim", (*HEAD_DIMS, *OTHER_HEAD_DIMS))
def test_head_dims(rng: random.Random, launches, device, head_dim, queries) -> None:
    """Every head dim from 1 to 256 runs in the kernels; here those of models, and some that fill no load and no matrix."""
    layout = rng.choice(("paged", "cache") if queries == 1 else ("varlen", "dense"))
    problem = random_problem(
        rng, layout=layout, head_dims=(head_dim,), max_queries=queries, device=device, capabilities=metal.CAPABILITIES
    )
    assert_matches_reference(problem, metal.attention)


@pytest.mark.parametrize("layout", ("dense", "cache", "varlen"))
def test_gradients_under_the_simulator_checks(rng: random.Random, rounds, launches, device, layout) -> None:
    """All options, with the threads in any order."""
    if device != "cpu":
        pytest.skip("the checks are the simulator's")
    seen = 0
    while seen < rounds(2):
        problem = random_problem(rng, layout=layout, max_queries=90, max_keys=150, capabilities=LIMITS)
        if problem.append is not None or problem.cache.cache_batch_idx is not None:
            continue
        seen += 1
        with metalsim.simulate(check=True, order=rng.choice(metalsim.ORDERS), seed=rng.getrandbits(32)):
            assert_gradients_match_reference(problem, metal.attention, metal.backward)


@pytest.mark.parametrize("head_dim", (1, 40, 72, 96, 136, 256, 288, 320, 512))
def test_gradients_of_head_dims(rng: random.Random, launches, device, head_dim) -> None:
    """In float32 up to 288: more do not fit threadgroup memory, and run in torch's operations."""
    dtype = torch.float32 if head_dim <= 288 else torch.float16
    problem = random_problem(
        rng, dtype=dtype, layout="varlen", head_dims=(head_dim,), max_queries=40, device=device, capabilities=LIMITS
    )
    assert has_backward_kernel(problem)
    with metalsim.simulate(check=device == "cpu"):
        assert_gradients_match_reference(problem, metal.attention, metal.backward)


def test_gradients_of_wide_heads_in_float32(launches, device) -> None:
    q = torch.randn(1, 5, 1, 289, generator=torch.Generator().manual_seed(0)).to(device)
    problem = AttentionProblem.of_fields(q=q, k=q, v=q, max_seqlen_q=5, max_seqlen_k=5, scale=0.1)
    assert not has_backward_kernel(problem)
    assert_gradients_match_reference(problem, metal.attention, metal.backward)
    assert all(launch.kernel != "backward" for launch in launches)


def test_the_order_of_threads_changes_no_gradient(launches, device) -> None:
    """Keys in splits, heads in parts: sums are always in the same order."""
    if device != "cpu":
        pytest.skip("only the simulator can choose the order")
    q, k, v = (torch.randn(1, 150, heads, 64).half() for heads in (6, 2, 2))
    problem = AttentionProblem.of_fields(q=q, k=k, v=v, max_seqlen_q=150, max_seqlen_k=150, scale=0.1, window_right=0)
    out, lse = metal.attention(problem)
    weights = torch.randn_like(out), torch.randn_like(lse)
    launches.clear()
    metalsim.in_every_order(lambda: metal.backward(problem, out, lse, *weights)[:3])
    (splits, parts, _), group = launches[0].threads, launches[0].group_size
    assert splits > group[0] and parts > 2


WITH_DROPOUT = ((1, 64, torch.float16), (5, 32, torch.float32), (5, 128, torch.float16), (40, 32, torch.float16),
                (40, 128, torch.float32))  # fmt: skip
"""Queries, head dim, dtype: decode over lanes and with matrices, prefill; one, two and four matrices of keys and of rows."""


@pytest.mark.parametrize("queries, head_dim, dtype", WITH_DROPOUT, ids=str)
def test_dropout_under_the_simulator_checks(launches, device, queries, head_dim, dtype) -> None:
    """With the threads in every order."""
    if device != "cpu":
        pytest.skip("the checks are the simulator's")
    q, k, v = (torch.randn(1, length, heads, head_dim).to(dtype) for length, heads in ((queries, 4), (40, 2), (40, 2)))
    sizes = dict(max_seqlen_q=queries, max_seqlen_k=40, scale=0.1, window_right=0)
    problem = AttentionProblem.of_fields(q=q, k=k, v=v, dropout_seed=torch.tensor(2**62 + 5), dropout_p=0.4, **sizes)
    assert_matches_reference(problem, metal.attention)
    out, lse = metalsim.in_every_order(lambda: metal.attention(problem))
    if queries == 40:
        assert_gradients_match_reference(problem, metal.attention, metal.backward)
        metalsim.in_every_order(lambda: metal.backward(problem, out, lse, torch.ones_like(out), torch.ones_like(lse))[:3])


WRONG_LENGTHS = (-(2**31), -7, 5, 2**20, 2**31 - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_values_touch_no_memory_outside(rng: random.Random, rounds, launches, device, layout: str) -> None:
    """Lengths and table entries that nobody has checked: one wrong value at a time, and all of a tensor."""
    if device != "cpu":
        pytest.skip("the checks are the simulator's")
    problem = random_problem(rng, layout=layout, dtype=torch.float32, max_queries=40)
    wrong = list(BackendConformance().with_one_value_changed(problem))
    for name, tensor in problem.named_fields().items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32:
            wrong += [problem.replace(**{name: torch.full_like(tensor, value)}) for value in WRONG_LENGTHS]
    for some in rng.sample(wrong, min(len(wrong), rounds(12))):
        with metalsim.simulate(check=True):
            try:
                results = metal.attention(some)
                if some.append is not None:
                    metal.kv_write(some.write)
                elif some.cache.block_table is None and has_backward_kernel(some):  # else torch's operations look
                    metal.backward(some, *results, *results)
            except metalsim.KernelError as error:  # sequences at one place may race
                assert not re.search("out-of-bounds|wild address", str(error)), f"{error}: {describe(some)}"


def test_unused_queries_look_up_no_page(launches, device) -> None:
    """A tile of them, behind a window's last key: with no page left in the table."""
    if device != "cpu":
        pytest.skip("the checks are the simulator's")
    problem = paged_decode(1, 1, 1, 64, 64, torch.float32)
    _, k, v, lengths, table = problem
    offsets, used = torch.tensor([0, 80], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    fields = dict(
        q=torch.randn(80, 1, 64), k=k, v=v, block_table=table, seqused_k=lengths, cu_seqlens_q=offsets, seqused_q=used
    )
    numbers = dict(max_seqlen_q=80, max_seqlen_k=64, window_left=3, scale=0.1)
    with metalsim.simulate(check=True):
        assert_matches_reference(AttentionProblem.of_fields(**fields, **numbers), metal.attention)


def test_mixed_batches(rng: random.Random, rounds, launches, device) -> None:
    """Decode and prefill have their own sequences, and all rows are written once: in any order of threads."""
    if device != "cpu":
        pytest.skip("the checks are the simulator's")
    seen = 0
    while seen < rounds(3):
        problem = random_problem(rng, layout="paged varlen", head_dims=(32, 72), max_keys=400, capabilities=LIMITS)
        if not may_be_mixed(problem) or problem.queries.max_seqlen_q <= DECODE_MAX_QUERIES:
            continue
        seen += 1
        launches.clear()
        with metalsim.simulate(check=True, order=rng.choice(metalsim.ORDERS), seed=rng.getrandbits(32)):
            assert_matches_reference(problem, metal.attention)
        writes = int(problem.append is not None)
        kernels = [launch.kernel for launch in launches]
        assert kernels[:writes] == ["kv_write"] * writes and kernels[writes] == "decode" and kernels[-1] == "prefill"


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(rng: random.Random, launches, device, page_size) -> None:
    layout = rng.choice(("paged", "paged varlen"))
    problem = random_problem(rng, layout=layout, page_sizes=(page_size,), max_keys=400, device=device, capabilities=LIMITS)
    assert_matches_reference(problem, metal.attention)


@pytest.mark.parametrize("group", (1, 2, 3, 4, 5, 6, 7, 8, 12, 16))
def test_query_heads_of_a_kv_head(rng: random.Random, launches, device, group) -> None:
    problem = random_problem(
        rng, layout="paged", groups=(group,), head_dims=(64, 128), max_queries=1, device=device, capabilities=LIMITS
    )
    assert_matches_reference(problem, metal.attention)


def test_the_order_of_threads_changes_nothing(launches, device) -> None:
    if device != "cpu":
        pytest.skip("only the simulator can choose the order")
    problem = paged_decode(2, 6, 2, 64, 700, torch.float16)
    outs = []
    for order in metalsim.ORDERS:
        with metalsim.simulate(check=False, order=order, seed=3):
            outs.append(decode(problem))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# --------------------------------------------------------------------------------------------------------------------
# What the upstream proposal promises
# --------------------------------------------------------------------------------------------------------------------


def decode(problem, **options) -> torch.Tensor:
    return flash_attn_with_kvcache(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        cache_seqlens=problem.cache_seqlens,
        block_table=problem.block_table,
        causal=True,
        **options,
    )


def on(device: str, problem):
    return type(problem)(*(tensor.to(device) for tensor in problem))


def test_upstream_case(launches, device) -> None:
    problem = paged_decode(4, 16, 16, 128, 50, torch.float32)
    difference = (decode(on(device, problem)).cpu() - gathered_sdpa(problem)).abs()
    assert difference.isfinite().all() and difference.max() <= 2e-6


def test_write_is_one_dispatch(launches, device) -> None:
    problem = on(device, paged_decode(3, 4, 2, 64, 40, torch.float16))
    new = torch.randn(3, 5, 2, 64, dtype=torch.float16, device=device)
    with pagedflash.use_backend("reference"):
        want_k, want_v = problem.k_cache.clone(), problem.v_cache.clone()
        kv_paged_write(new, 2 * new, want_k, want_v, problem.block_table, torch.tensor([0, -1, 35], device=device))
    kv_paged_write(
        new, 2 * new, problem.k_cache, problem.v_cache, problem.block_table, torch.tensor([0, -1, 35], device=device)
    )
    assert [launch.kernel for launch in launches] == ["kv_write"]
    assert torch.equal(problem.k_cache, want_k) and torch.equal(problem.v_cache, want_v)


# --------------------------------------------------------------------------------------------------------------------
# Dispatches, copies, what is unsupported
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits, kernels", ((1, ["decode"]), (4, ["decode", "combine"])))
def test_dispatches_of_append_and_decode(launches, device, splits, kernels) -> None:
    problem = on(device, paged_decode(2, 8, 2, 64, 300, torch.float16))
    new = torch.randn(2, 1, 2, 64, dtype=torch.float16, device=device)
    flash_attn_with_kvcache(
        problem.q, problem.k_cache, problem.v_cache, new, new, cache_seqlens=problem.cache_seqlens - 1,
        block_table=problem.block_table, causal=True, num_splits=splits,
    )  # fmt: skip
    assert [launch.kernel for launch in launches] == kernels


def test_strided_inputs_are_bound_where_they_lie(launches, device) -> None:
    """q and the new keys are slices of a fused projection, K and V of one allocation: the kernel gets these very tensors."""
    fused = torch.randn(2, 1, 8 + 2 + 2, 64, device=device)
    q, k_new, v_new = fused.split((8, 2, 2), dim=2)
    pages = torch.randn(9, 16, 2, 64, device=device)
    k, v = pages[:-1], pages[1:]
    table = torch.tensor([[0, 2], [4, 6]], dtype=torch.int32, device=device)
    flash_attn_with_kvcache(
        q, k, v, k_new, v_new, cache_seqlens=torch.tensor([20, 7], device=device), block_table=table, causal=True
    )
    bound = {argument.data_ptr() for argument in launches[0].arguments if isinstance(argument, torch.Tensor)}
    assert {tensor.data_ptr() for tensor in (q, k, v, k_new, v_new)} <= bound


@pytest.mark.parametrize("queries", (1, 20), ids=("decode", "prefill"))
def test_values_in_keys_with_one_scale_a_token(launches, device, queries) -> None:
    """What is appended is written once: its scale is that of the keys, not that of their part."""
    k, scales = torch.ones(3, 16, 1, 64, dtype=torch.int8, device=device), torch.ones(3, 16, 1, device=device)
    new = torch.randn(1, queries, 1, 64, device=device)
    cache = dict(k=k, v=k[..., :16], k_descale=scales, v_descale=scales, seqused_k=torch.tensor([7], device=device).int())
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    problem = AttentionProblem.of_fields(
        q=torch.randn(1, queries, 4, 64, device=device), **cache, block_table=table, k_new=new, v_new=new[..., :16],
        max_seqlen_q=queries, max_seqlen_k=32, scale=0.1,
    )  # fmt: skip
    assert_matches_reference(problem, metal.attention)


def test_rows_to_skip_read_and_write_nothing(launches, device) -> None:
    k = torch.full((4, 16, 2, 64), torch.nan, device=device)
    v, new = k.clone(), torch.ones(3, 1, 2, 64, device=device)
    out, lse = flash_attn_with_kvcache(
        torch.randn(3, 1, 4, 64, device=device), k, v, new, new, cache_seqlens=torch.full((3,), -1, device=device),
        block_table=torch.full((3, 2), -1, device=device), causal=True, return_softmax_lse=True,
    )  # fmt: skip
    assert (out == 0).all() and (lse == torch.inf).all() and k.isnan().all() and v.isnan().all()


def test_pages_beyond_32_bit_offsets(launches, device) -> None:
    """Page 2 begins 2^31 elements into the cache. Only its pages that are used take memory."""
    if device != "cpu":
        pytest.skip("needs an allocation of 4 GiB that is never touched")
    stride = 2**30
    storage = torch.empty(2 * stride + 2 * 16 * 64, dtype=torch.float16)
    k = storage.as_strided((3, 16, 1, 64), (stride, 64, 64, 1))
    v = storage[16 * 64 :].as_strided((3, 16, 1, 64), (stride, 64, 64, 1))
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    for page in (0, 2):
        k[page], v[page] = torch.randn(16, 1, 64), torch.randn(16, 1, 64)
    q = torch.randn(1, 1, 2, 64).half()
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([30]), block_table=table)
    dense_k, dense_v = (cache[[2, 0]].flatten(0, 1)[None, :30] for cache in (k, v))
    with pagedflash.use_backend("reference"):
        torch.testing.assert_close(out, flash_attn_func(q, dense_k, dense_v), rtol=2e-3, atol=2e-3)


def test_unsupported_caches_run_on_the_reference_and_say_so(launches, device) -> None:
    """Offsets inside a page take 32 bits: tokens that lie 2^27 elements apart are too far."""
    storage = torch.randn(64, device=device)
    far = storage.as_strided((1, 1, 1, 64), (64, 2**27, 64, 1))  # unpaged keys are taken for pages of 32
    q = torch.randn(1, 1, 2, 64, device=device)
    with pytest.warns(RuntimeWarning, match=r"reference runs instead of metal: a page spans more than 2\^31 elements"):
        out = flash_attn_func(q, far, far)
    with pagedflash.use_backend("reference"):
        assert torch.equal(out, flash_attn_func(q, far, far))
    assert not launches


def test_what_is_missing_is_said() -> None:
    if not torch.backends.mps.is_available():
        support = metal.available()
        assert not support.ok and "MPS" in support.reason
    with metal.use_compiler(metalsim.compile_shader):
        assert metal.available() == Support(True)
    assert metal.available().ok == torch.backends.mps.is_available()


def test_an_empty_batch_launches_nothing(launches, device) -> None:
    q = torch.randn(0, 1, 4, 64, device=device)
    assert flash_attn_func(q, q, q).shape == (0, 1, 4, 64) and not launches


def test_supports_every_random_problem(rng: random.Random) -> None:
    """The fuzz above would prove nothing if problems went elsewhere."""
    for _ in range(50):
        assert metal.supports(random_problem(rng, capabilities=LIMITS)) == Support(True)
