"""The native CPU kernels against the reference, in every instruction set that this processor has."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pagedflash
from pagedflash.backends import cpu as backend
from pagedflash.backends import reference
from pagedflash.backends.cpu import launch
from pagedflash.problem import QUANTIZED, Append, AttentionProblem, CacheWrite, KVCache, Queries, Scores
from pagedflash.testing import DTYPES, LAYOUTS, assert_matches_reference, copy_of, random_problem
from pagedflash.testing.compare import assert_gradients_match_reference, describe
from pagedflash.validate_values import check_values, check_write_values

# Where nobody has built the library these tests have nothing to run on; CI sets this variable, and then they must run.
REQUIRED = os.environ.get("PAGEDFLASH_REQUIRE_NATIVE") == "1"
if not REQUIRED and not backend.available().ok:
    pytest.skip(backend.available().reason, allow_module_level=True)

ISAS = list(launch.library().isas)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with launch.use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever the test sets torch's threads to, they are set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options(isa: str, rng: random.Random, rounds, layout: str, dtype: torch.dtype) -> None:
    for _ in range(rounds(8)):
        assert_matches_reference(random_problem(rng, dtype=dtype, layout=layout), backend.attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sequences_are_split_and_reduced(isa: str, rng: random.Random, rounds, dtype: torch.dtype) -> None:
    """Thousands of keys: several tasks a sequence, for decode (few rows) and prefill (many)."""
    for _ in range(rounds(2)):
        for layout in ("paged", "paged varlen"):
            problem = random_problem(rng, dtype=dtype, layout=layout, max_keys=3000, head_dims=(64, 72), groups=(1, 3, 4))
            assert_matches_reference(problem, backend.attention)


@pytest.mark.parametrize("queries", (1, 2, 4, 5, 6, 16, 17))
@pytest.mark.parametrize("group", (1, 2, 3, 4, 7, 16, 20))
def test_every_number_of_rows(isa: str, queries: int, group: int) -> None:
    """Query rows per key head decide which block sizes, and which kernel, run."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, 2 * group, 40), torch.randn(2, 70, 2, 40), torch.randn(2, 70, 2, 40)
    with pagedflash.use_backend("cpu"):
        out, lse = pagedflash.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    with pagedflash.use_backend("reference"):
        want, want_lse = pagedflash.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    torch.testing.assert_close(out, want, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("keys", (1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 161))
@pytest.mark.parametrize(
    "head_dims", ((8, 8), (40, 24), (64, 64), (72, 40), (128, 96), (1, 3), (59, 111), (100, 26)), ids=str
)
def test_blocks_that_are_not_full(isa: str, head_dims: tuple[int, int], keys: int, dtype: torch.dtype) -> None:
    """Matrix products of 16-bit numbers go by blocks and pairs: what fills them up must count for nothing. Behind the last
    key of the cache, and behind the last element of each head, lies NaN."""
    torch.manual_seed(0)
    head_dim, v_head_dim = head_dims
    k_cache, v_cache = (torch.full((1, keys + 3, 2, n + 8), float("nan"), dtype=dtype) for n in head_dims)
    k_cache[:, :keys, :, :head_dim] = torch.randn(1, keys, 2, head_dim)
    v_cache[:, :keys, :, :v_head_dim] = torch.randn(1, keys, 2, v_head_dim)
    for queries, window in ((9, -1), (33, -1), (33, 20)):
        problem = AttentionProblem.of(
            Queries(torch.randn(1, queries, 6, head_dim).to(dtype), max_seqlen_q=queries),
            KVCache(
                k_cache[..., :head_dim],
                v_cache[..., :v_head_dim],
                seqused_k=torch.tensor([keys], dtype=torch.int32),
                max_seqlen_k=keys,
            ),
            None,
            Scores(scale=head_dim**-0.5, window_left=window, window_right=0),
        )
        assert_matches_reference(problem, backend.attention)


@pytest.mark.parametrize(("tokens", "keys"), ((640, 300), (1600, 40)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_tasks_of_many_rows(isa: str, dtype: torch.dtype, tokens: int, keys: int) -> None:
    """So many rows in all that a prefill task has more of them than pass over a tile of keys at once."""
    torch.manual_seed(0)
    cache = torch.randn(2, 1, keys, 1, 16).to(dtype)
    problem = AttentionProblem.of(
        Queries(torch.randn(1, tokens, 64, 16).to(dtype), max_seqlen_q=tokens),
        KVCache(*cache, seqused_k=torch.tensor([keys], dtype=torch.int32), max_seqlen_k=keys),
        None,
        Scores(scale=0.25),
    )
    assert_matches_reference(problem, backend.attention)


@pytest.mark.parametrize("num_splits", (0, 1, 2, 7, 1000))
@pytest.mark.parametrize("queries", (1, 24))
def test_splits_do_not_change_the_output(isa: str, num_splits: int, queries: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, queries, 4, 64), torch.randn(1, 900, 2, 64), torch.randn(1, 900, 2, 64)
    out = pagedflash.flash_attn_with_kvcache(q, k, v, causal=True, num_splits=num_splits)
    whole = pagedflash.flash_attn_with_kvcache(q, k, v, causal=True, num_splits=1)
    torch.testing.assert_close(out, whole, rtol=0, atol=2e-6)


def test_large_scores_do_not_overflow(isa: str) -> None:
    """Scores of thousands, of both signs, and differences below the smallest float's logarithm."""
    q = torch.full((1, 1, 1, 64), 30.0)
    k = torch.zeros(1, 100, 1, 64)
    k[0, 37], k[0, 50] = 30.0, -30.0
    v = torch.arange(100.0).view(1, 100, 1, 1).expand(1, 100, 1, 64).contiguous()
    out, lse = pagedflash.flash_attn_func(q, k, v, softmax_scale=1.0, return_softmax_lse=True)
    assert (out == 37.0).all()
    assert lse.item() == pytest.approx(64 * 900.0)


@pytest.mark.parametrize("queries", (1, 40))
@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_of_scores_of_zero_is_exact(isa: str, dtype: torch.dtype, queries: int, num_splits: int) -> None:
    """2^0 is 1 and log2(1) is 0, not nearly: a row that sees one key of score 0 has an LSE of 0, and its value as output."""
    q, v = torch.zeros(1, queries, 2, 64, dtype=dtype), torch.randn(1, 200, 2, 64).to(dtype)
    out, lse = pagedflash.flash_attn_with_kvcache(
        q, torch.randn_like(v), v, causal=True, window_size=(0, 0), num_splits=num_splits, return_softmax_lse=True
    )
    assert torch.equal(lse, torch.zeros(1, 2, queries))
    assert torch.equal(out, v[:, -queries:])


def test_no_head_dim_is_too_large_for_the_kernels(isa: str) -> None:
    """What a backend takes is said by its capabilities alone: no array in a kernel has a size of its own."""
    torch.manual_seed(0)
    for queries, dtype in ((1, torch.float32), (1, torch.bfloat16), (40, torch.float16)):
        q, k, v, new = (torch.randn(1, n, 2, 1024).to(dtype) for n in (queries, 900, 900, 1))
        cos, sin = torch.rand(2, 900, 460).to(dtype)
        problem = AttentionProblem.of(
            Queries(q, max_seqlen_q=queries),
            KVCache(k, v, seqused_k=torch.tensor([880], dtype=torch.int32), max_seqlen_k=900),
            Append(new, -new, cos, sin, rotary_interleaved=queries == 1),
            Scores(scale=1 / 32),
            num_splits=2,
        )
        assert_matches_reference(problem, backend.attention)


@pytest.mark.parametrize("queries", (1, 2))
@pytest.mark.parametrize("heads", (1, 16, 128))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_the_first_part_of_keys(isa: str, dtype: torch.dtype, heads: int, queries: int) -> None:
    """MLA: V is a view of K, and an append writes it once. The same as with a V of its own."""
    torch.manual_seed(0)
    q, latent = torch.randn(2, queries, heads, 576).to(dtype), torch.randn(7, 64, 1, 576).to(dtype)
    new = torch.randn(2, queries, 1, 576).to(dtype)
    table = torch.tensor([[3, 1, 5], [0, 6, 2]], dtype=torch.int32)

    def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pagedflash.flash_attn_with_kvcache(
            q, k, v, new, new[..., :512], cache_seqlens=torch.tensor([130, 7]), block_table=table, causal=True
        )

    own_k, own_v = latent.clone(), latent[..., :512].clone()
    assert torch.equal(run(latent, latent[..., :512]), run(own_k, own_v))
    assert torch.equal(latent, own_k)


def test_nan_in_a_visible_key_is_not_swallowed(isa: str) -> None:
    q, k, v = torch.randn(1, 1, 2, 64), torch.randn(1, 20, 2, 64), torch.randn(1, 20, 2, 64)
    k[0, 7, 0, 3] = float("nan")
    out = pagedflash.flash_attn_func(q, k, v)
    assert out[0, 0, 0].isnan().all() and not out[0, 0, 1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_survives_conversion(isa: str, dtype: torch.dtype) -> None:
    """Rotating by zero widens and narrows every number: all 65,536, subnormals and infinities included."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.where(numbers.isfinite(), numbers, torch.zeros((), dtype=dtype))
    cos, sin = torch.ones(256, 32, dtype=dtype), torch.zeros(256, 32, dtype=dtype)
    k_cache, v_cache = torch.zeros(2, 1, 256, 4, 64, dtype=dtype)
    k = finite.view(1, 256, 4, 64)
    q = torch.zeros(1, 1, 4, 64, dtype=dtype)
    pagedflash.flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cos, sin, cache_seqlens=0)
    assert torch.equal(k_cache, k)

    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], dtype=dtype).repeat(16).view(1, 1, 1, 64)
    caches = torch.zeros(2, 1, 4, 1, 64, dtype=dtype)
    # An angle of zero leaves infinities alone only where nothing is multiplied by them: beyond the rotated elements.
    rotated = torch.cat((torch.ones(1, 1, 1, 16, dtype=dtype), special[..., 16:]), -1)
    pagedflash.flash_attn_with_kvcache(
        q[:, :, :1], caches[0], caches[1], rotated, special, cos[:, :8], sin[:, :8], cache_seqlens=0
    )
    torch.testing.assert_close(caches[0, :, :1], rotated, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_every_code_of_8_bits_is_read_exactly(isa: str, dtype: torch.dtype, queries: int, head_dim: int) -> None:
    """One key for each of the 256 codes: a value is the output of its only key, a score the LSE."""
    codes, one = torch.arange(256, dtype=torch.uint8).view(dtype), torch.ones(())
    places, numbers = torch.arange(256) % head_dim, codes.float()
    q, bits = torch.zeros(256, queries, 1, head_dim), torch.zeros(256, 1, 1, head_dim, dtype=torch.uint8)
    q[torch.arange(256), :, 0, places] = 1
    bits[torch.arange(256), 0, 0, places] = codes.view(torch.uint8)
    elements = bits.view(dtype)

    def attend(k: torch.Tensor, v: torch.Tensor) -> Any:
        return pagedflash.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=1, softmax_scale=1.0, k_descale=one, v_descale=one, return_softmax_lse=True
        )

    zeros = torch.zeros_like(bits).view(dtype)
    out, _ = attend(zeros, elements)
    torch.testing.assert_close(out, elements.float().expand_as(out), rtol=0, atol=0, equal_nan=True)
    _, lse = attend(elements, zeros)
    finite = numbers.isfinite()
    torch.testing.assert_close(lse[finite], numbers[finite, None, None].expand_as(lse[finite]), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_round_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """The mean of two neighbouring numbers lies halfway: it goes to the even one."""
    low = torch.arange(2**14 - 64, 2**14, dtype=torch.int16).view(dtype)
    high = torch.arange(2**14 - 63, 2**14 + 1, dtype=torch.int16).view(dtype)
    v = torch.stack((low, high)).view(1, 2, 1, 64)
    out = pagedflash.flash_attn_func(torch.zeros(1, 1, 1, 64, dtype=dtype), torch.zeros_like(v), v)
    torch.testing.assert_close(out.flatten(), ((low.double() + high.double()) / 2).to(dtype), rtol=0, atol=0)


def test_offsets_of_more_than_32_bits(isa: str) -> None:
    """A cache of 2^32 elements, of which only the last page is ever touched."""
    pages = torch.empty(2**22 + 1, 16, 1, 64, dtype=torch.float16)
    table = torch.tensor([[2**22]], dtype=torch.int32)
    k, v = torch.randn(2, 1, 5, 1, 64).half()
    q = torch.randn(1, 1, 2, 64).half()
    out = pagedflash.flash_attn_with_kvcache(
        q, pages, pages[:, :, :, :32], k, v[..., :32], cache_seqlens=0, block_table=table
    )
    want = pagedflash.flash_attn_func(q, pages[-1:, :5], pages[-1:, :5, :, :32])
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ("dense", "cache", "varlen"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_over_all_options(isa: str, rng: random.Random, rounds, layout: str, dtype: torch.dtype) -> None:
    for problem in _differentiable(rng, rounds(6), dtype=dtype, layout=layout):
        assert_gradients_match_reference(problem, backend.attention, backend.backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_long_sequences(isa: str, rng: random.Random, rounds, dtype: torch.dtype) -> None:
    """Several tasks a head, blocks of rows, passes and tiles."""
    for layout in ("dense", "varlen"):
        sizes = dict(max_queries=500, max_keys=1000, head_dims=(64, 72), groups=(1, 3, 4))
        for problem in _differentiable(rng, rounds(1), dtype=dtype, layout=layout, **sizes):
            assert_gradients_match_reference(problem, backend.attention, backend.backward)


def _differentiable(rng: random.Random, count: int, **options) -> Iterator[AttentionProblem]:
    """Random problems, without those that there is no backward for."""
    while count:
        problem = random_problem(rng, capabilities=backend.CAPABILITIES, **options)
        if problem.append is None and problem.cache.k_descale is None and problem.cache.v_descale is None:
            count -= 1
            yield problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", (1, 15, 17, 31, 33, 191, 192, 193, 250))
@pytest.mark.parametrize("head_dims", ((8, 8), (40, 24), (64, 64), (72, 40)), ids=str)
def test_gradients_of_blocks_that_are_not_full(isa: str, head_dims: tuple[int, int], keys: int, dtype: torch.dtype) -> None:
    """What fills up blocks and pairs counts for nothing, of queries and of keys. Behind the last key lies NaN."""
    torch.manual_seed(0)
    head_dim, v_head_dim = head_dims
    k, v = (torch.full((1, keys + 3, 2, n), float("nan"), dtype=dtype) for n in head_dims)
    k[:, :keys], v[:, :keys] = torch.randn(1, keys, 2, head_dim), torch.randn(1, keys, 2, v_head_dim)
    used = torch.tensor([keys], dtype=torch.int32)
    for queries, window in ((1, -1), (9, -1), (65, -1), (65, 20)):
        problem = AttentionProblem.of(
            Queries(torch.randn(1, queries, 6, head_dim).to(dtype), max_seqlen_q=queries),
            KVCache(k, v, seqused_k=used, max_seqlen_k=keys),
            None,
            Scores(scale=head_dim**-0.5, window_left=window, window_right=0),
        )
        assert_gradients_match_reference(problem, backend.attention, backend.backward)


def test_gradients_of_a_saturated_softcap(isa: str) -> None:
    """Where tanh is flat, on either side, nothing overflows."""
    q, k, v = torch.randn(1, 30, 2, 16) * 1e3, torch.randn(1, 40, 2, 16) * 1e3, torch.randn(1, 40, 2, 16)
    problem = AttentionProblem.of(
        Queries(q, max_seqlen_q=30), KVCache(k, v, max_seqlen_k=40), None, Scores(scale=1.0, softcap=2.0)
    )
    assert_gradients_match_reference(problem, backend.attention, backend.backward)


def test_kv_write(isa: str, rng: random.Random, rounds) -> None:
    for _ in range(rounds(40)):
        problem = random_problem(rng, layout=rng.choice(("paged", "cache")))
        if problem.append is None:
            continue
        want = copy_of(problem)
        reference.kv_write(want.write)
        backend.kv_write(problem.write)
        step = 0.0 if problem.append.rotary_cos is None else torch.finfo(problem.cache.k.dtype).eps
        torch.testing.assert_close(problem.cache.k, want.cache.k, rtol=2 * step, atol=step, equal_nan=True)
        # Interleaved in one allocation, a view of V passes over rotated keys too.
        shared = problem.cache.v.untyped_storage()._cdata == problem.cache.k.untyped_storage()._cdata
        step = step if shared else 0.0
        torch.testing.assert_close(problem.cache.v, want.cache.v, rtol=2 * step, atol=step, equal_nan=True)


# --------------------------------------------------------------------------------------------------------------------
# Validation of values
# --------------------------------------------------------------------------------------------------------------------

NUMBERS = (-(2**31), -7, -2, -1, 0, 1, 2, 3, 15, 16, 17, 10**6, 2**31 - 1)


def _damage(rng: random.Random, problem: AttentionProblem) -> AttentionProblem:
    """Overwrite one number of one tensor of lengths or indices."""
    damaged = copy_of(problem)
    fields = [tensor for tensor in damaged.tensors if tensor is not None and tensor.dtype == torch.int32 and tensor.numel()]
    if fields:
        tensor = rng.choice(fields).view(-1)
        position = rng.randrange(tensor.numel())
        tensor[position] = rng.choice((*NUMBERS, int(tensor[rng.randrange(tensor.numel())])))
    return damaged


def _is_rejected(run, problem: AttentionProblem | CacheWrite) -> bool:
    try:
        run(problem)
    except ValueError:
        return True
    return False


def test_the_native_validation_rejects_what_the_python_check_rejects(rng: random.Random, rounds) -> None:
    """Neither more nor less, and before anything is written."""
    rejections = 0
    for _ in range(rounds(150)):
        problem = _damage(rng, random_problem(rng))
        before = copy_of(problem)
        rejected = _is_rejected(backend.attention, problem)  # RuntimeError if the native validation is stricter
        assert rejected == _is_rejected(check_values, problem)
        rejections += rejected
        if rejected:
            for cache, was in zip(problem.cache[:2], before.cache[:2]):
                torch.testing.assert_close(cache, was, rtol=0, atol=0, equal_nan=True)
        if problem.append is not None and problem.cache.cache_batch_idx is None:  # kv_paged_write has no cache_batch_idx
            assert _is_rejected(backend.kv_write, problem.write) == _is_rejected(check_write_values, problem.write)
    assert rejections > 10, "the damage found nothing to reject"


@pytest.mark.parametrize("queries", (1, 3, 60))
@pytest.mark.parametrize("append", (0, 1, 90))
def test_table_entries_left_of_a_window_are_not_read(isa: str, queries: int, append: int) -> None:
    """Engines give pages back that no query sees any more: their entries may be -1 or anything."""
    torch.manual_seed(0)
    left, length, page_size = 30, 200, 16
    q, k_new, v_new = torch.randn(1, queries, 4, 64), *torch.randn(2, 1, append, 2, 64)
    pages = torch.randn(2, 20, page_size, 2, 64)
    table = torch.randperm(20, dtype=torch.int32)[None]
    reads = min(length, length + append - queries - left) // page_size

    def run(table: torch.Tensor, new: tuple[torch.Tensor, ...]) -> torch.Tensor:
        k, v = pages.clone()
        return pagedflash.flash_attn_with_kvcache(
            q, k, v, *new, cache_seqlens=length, block_table=table, causal=True, window_size=(left, 0)
        )

    new = (k_new, v_new) if append else ()
    want = run(table, new)
    for garbage in (-1, 2**30):
        freed = table.clone()
        freed[:, :reads] = garbage
        assert torch.equal(run(freed, new), want)
    freed[:, reads] = -1
    with pytest.raises(ValueError, match=rf"block_table is -1 at \[0, {reads}\]"):
        run(freed, new)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
@pytest.mark.parametrize("step", ("validation", "plan"))
def test_running_out_of_memory_is_said_before_anything_is_written(step: str) -> None:
    """The validation needs memory for the slots of many new tokens, the plan for the tasks of many sequences."""
    script = f"""
import resource, torch
from pagedflash.backends.cpu import launch
from pagedflash.problem import QUANTIZED, Append, AttentionProblem, CacheWrite, KVCache, Queries, Scores

n = 1 << 20
cache = torch.zeros(1, 1, 1, 8).expand(n, 1, 1, 8)
if "{step}" == "validation":  # one sequence, a page a token
    new, table, lengths = torch.ones(1, 1, 1, 8).expand(1, n, 1, 8), torch.arange(n)[None].int(), torch.zeros(1).int()
    run = launch.kv_write
    problem = CacheWrite.of(KVCache(cache, cache, block_table=table, seqused_k=lengths), Append(new, new))
else:  # a sequence a page, whose slots take less memory than their tasks
    new, table, lengths = torch.ones(1, 1, 1, 8).expand(n, 1, 1, 8), torch.arange(n)[:, None].int(), torch.zeros(n).int()
    run = launch.attention
    q = torch.ones(1, 1, 1, 8).expand(n, 1, 1, 8)
    kv = KVCache(cache, cache, block_table=table, seqused_k=lengths, max_seqlen_k=1)
    problem = AttentionProblem.of(Queries(q, max_seqlen_q=1), kv, Append(new, new), Scores())
run(problem)  # everything is loaded and planned
cache.zero_()
pages = int(open("/proc/self/statm").read().split()[0])
spare = (136 << 20) if "{step}" == "plan" else 8 << 20  # the output, of 36 MiB, still fits
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare,) * 2)
try:
    run(problem)
except MemoryError as error:
    assert "pagedflash: out of memory" in str(error), error
else:
    raise AssertionError("there was enough memory")
assert not cache[0].any()  # the memory of all pages; all of them take memory to look at
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
def test_the_memory_of_a_backward_pass_grows_with_the_length() -> None:
    """Scores of 2 GiB, in a process that has 200 MiB to spare."""
    script = """
import resource, torch, pagedflash
torch.set_num_threads(1)

def train(length):
    q, k, v = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
    pagedflash.flash_attn_func(q, k, v, causal=True).sum().backward()
    assert k.grad.any()

train(16)  # everything is loaded
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
train(16384)
"""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], check=True)


# --------------------------------------------------------------------------------------------------------------------
# Threads
# --------------------------------------------------------------------------------------------------------------------


def test_the_same_bits_whatever_the_number_of_threads(rng: random.Random, threads: None) -> None:
    for layout in LAYOUTS:
        problem = random_problem(rng, layout=layout, max_keys=1500)
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(backend.attention(copy_of(problem)))
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_the_same_gradients_whatever_the_number_of_threads(rng: random.Random, threads: None) -> None:
    for layout in ("dense", "varlen"):
        (problem,) = _differentiable(rng, 1, layout=layout, max_queries=500, max_keys=1500)
        out, lse = backend.attention(problem)
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(backend.backward(problem, out, lse, torch.ones_like(out), torch.ones_like(lse)))
        for gradients in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(gradients, results[0])), describe(problem)


def test_python_threads_may_call_at_once(rng: random.Random) -> None:
    problems = [random_problem(rng, max_keys=600) for _ in range(4)]
    want = [backend.attention(copy_of(problem)) for problem in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            out, lse = backend.attention(copy_of(problems[i]))
            if not (torch.equal(out, want[i][0]) and torch.equal(lse, want[i][1])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_gil_is_released(threads: None) -> None:
    torch.set_num_threads(1)
    q, k = torch.randn(1, 1500, 8, 128), torch.randn(1, 1500, 8, 128)
    done = threading.Event()

    def work() -> None:
        pagedflash.flash_attn_func(q, k, k)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    steps = 0
    while not done.wait(0.001):
        steps += 1
    worker.join()
    assert steps > 5, "this thread stood still during the call"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_no_thread_is_started_but_torchs() -> None:
    """With torch set to one thread a call starts none."""
    script = """
import os, torch, pagedflash
torch.set_num_threads(1)
q = torch.randn(4, 300, 8, 64)
before = len(os.listdir("/proc/self/task"))
pagedflash.flash_attn_func(q, q, q)
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], check=True)


# --------------------------------------------------------------------------------------------------------------------
# The library
# --------------------------------------------------------------------------------------------------------------------


def test_a_missing_library_is_said(tmp_path: Path) -> None:
    with pytest.raises(launch.Unavailable, match="was not built"):
        launch.Library(tmp_path / "libpagedflash_cpu.so")


def test_a_library_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    path = tmp_path / "libpagedflash_cpu.so"
    path.write_bytes(b"not a library")
    with pytest.raises(launch.Unavailable, match="cannot be loaded"):
        launch.Library(path)


@pytest.mark.parametrize(
    "fields",
    [
        ("rotary_cos", "rotary_sin"),
        ("k_stride:Strides", "v_stride:Strides"),
        ("kv_heads:int64_t", "head_dim:int64_t"),
        ("scale:double", "softcap:double"),
    ],
)
def test_a_library_with_two_fields_swapped_is_not_loaded(tmp_path: Path, fields: tuple[str, str]) -> None:
    """Of the same size, so that nothing else would tell."""
    one, two = (f" {field}".encode() for field in fields)
    data = launch.library().path.read_bytes()
    start = data.index(b"Strides batch:int64_t")  # the list of fields in the library
    end = data.index(b"\0", start)
    fields_of = data[start:end].replace(one, b" ?").replace(two, one).replace(b" ?", two)
    assert fields_of != data[start:end]
    path = tmp_path / "libpagedflash_cpu.so"
    path.write_bytes(data[:start] + fields_of + data[end:])
    with pytest.raises(launch.Unavailable, match=rf"has {fields[1]} in \w+ where {fields[0]} is expected: reinstall"):
        launch.Library(path)


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.Library(launch.LIBRARY).isa in launch.library().isas.values()
    for name in ISAS:
        monkeypatch.setenv(launch.ISA_VARIABLE, name)
        chosen = launch.Library(launch.LIBRARY)
        assert chosen.isa == chosen.isas[name]
    monkeypatch.setenv(launch.ISA_VARIABLE, "mmx")
    with pytest.raises(launch.Unavailable, match="mmx, expected one of"):
        launch.Library(launch.LIBRARY)


def test_only_cpu_tensors_are_supported() -> None:
    q = torch.empty(1, 1, 1, 64, device="meta")
    problem = AttentionProblem.of(Queries(q, max_seqlen_q=1), KVCache(q, q, max_seqlen_k=1), None, Scores())
    support = backend.supports(problem)
    assert not support.ok and "meta" in support.reason


class _Subclass(torch.Tensor):
    """Its instances cannot be told by their class to be plain."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, _Subclass], ids=["parameter", "subclass"])
def test_tensor_subclasses(kind: type) -> None:
    q, k, v = torch.randn(3, 1, 8, 2, 16)
    sinks = torch.randn(2)
    given = torch.nn.Parameter(sinks, requires_grad=False) if kind is torch.nn.Parameter else sinks.as_subclass(kind)
    want = pagedflash.flash_attn_func(q, k, v, s_aux=sinks)
    torch.testing.assert_close(pagedflash.flash_attn_func(q, k, v, s_aux=given), want, rtol=0, atol=0)
