"""What the Metal kernels cost, counted by metalsim, and how calls are laid out on a GPU."""

from __future__ import annotations

import itertools

import metalsim
import pytest
import torch
from metal_harness import counted, gathered_sdpa, kernels_on, paged_decode, pairs, plain_decode, require_simulator

import pagedflash
from pagedflash import flash_attn_func, flash_attn_with_kvcache
from pagedflash.backends.metal.tiling import Tuning, backward_tiling, choose_num_splits, decode_tiling
from pagedflash.testing import PagedProblem


@pytest.fixture(autouse=True)
def simulated(device: str) -> None:
    if device != "cpu":
        pytest.skip("only the simulator counts")
    require_simulator()


def decode(problem: PagedProblem, **options) -> torch.Tensor:
    with pagedflash.use_backend("metal"):
        return flash_attn_with_kvcache(
            problem.q,
            problem.k_cache,
            problem.v_cache,
            cache_seqlens=problem.cache_seqlens,
            block_table=problem.block_table,
            causal=True,
            **options,
        )


@pytest.mark.parametrize("group", (1, 2, 3, 4, 7, 8, 16))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_decode_reads_each_key_once(group: int, head_dim: int) -> None:
    """Counted per lane, over all dispatches: the queries, the table and the parts that combine reads are in it."""
    problem = paged_decode(1, group, 1, head_dim, 1024, torch.float16)
    dispatches = counted(lambda: decode(problem))
    assert sum(d.counters.device_bytes_loaded for d in dispatches) <= 1.05 * problem.cache_bytes
    assert sum(d.counters.simd_operations for d in dispatches) <= 2.5 * pairs(problem)
    assert dispatches[0].counters.load_efficiency >= 0.95


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_decode_of_other_dtypes(dtype: torch.dtype) -> None:
    problem = paged_decode(2, 8, 2, 128, 512, dtype)
    (only,) = (d for d in counted(lambda: decode(problem)) if d.kernel == "decode")
    assert only.counters.device_bytes_loaded <= 1.05 * problem.cache_bytes
    assert only.counters.simd_operations <= 2.5 * pairs(problem)
    assert only.counters.load_efficiency >= 0.95


@pytest.mark.parametrize("group", (1, 4, 8))
def test_decode_of_int8(group: int) -> None:
    """Its scales are 4 bytes beside 128."""
    problem = paged_decode(1, group, 1, 128, 1024, torch.float16)
    k, v = (torch.randint(-127, 128, cache.shape, dtype=torch.int8) for cache in problem[1:3])
    k_scales, v_scales = (torch.rand(cache.shape[:-1]) for cache in (k, v))
    options = dict(cache_seqlens=problem.cache_seqlens, block_table=problem.block_table, causal=True)
    with pagedflash.use_backend("metal"):
        dispatches = counted(
            lambda: flash_attn_with_kvcache(problem.q, k, v, k_descale=k_scales, v_descale=v_scales, **options)
        )
    keys_and_scales = 1024 * 2 * (128 + 4)
    assert sum(d.counters.device_bytes_loaded for d in dispatches) <= 1.06 * keys_and_scales


def test_decode_against_the_baseline() -> None:
    """The baseline reads the keys once for each of the four query heads that share them."""
    problem = paged_decode(1, 8, 2, 128, 512, torch.float16)
    torch.testing.assert_close(plain_decode(problem), gathered_sdpa(problem), rtol=2e-3, atol=2e-3)
    (plain,), (ours, *_) = counted(lambda: plain_decode(problem)), counted(lambda: decode(problem))
    assert plain.counters.device_bytes_loaded >= 4 * problem.cache_bytes
    assert ours.counters.device_bytes_loaded <= 1.05 * problem.cache_bytes
    assert ours.counters.load_instructions <= plain.counters.load_instructions / 16  # 4 heads, 8 elements for 2 at a time
    assert ours.counters.simdgroups >= plain.counters.simdgroups


@pytest.mark.parametrize("cores", (8, 10, 40, 80))
@pytest.mark.parametrize("group", (1, 4, 8))
def test_a_single_sequence_fills_the_gpu(cores: int, group: int) -> None:
    problem = paged_decode(1, 8 * group, 8, 64, 4096, torch.float16)
    with kernels_on("cpu", core_count=cores) as launches:
        decode(problem)
    assert launches[0].simdgroups >= 320


@pytest.mark.parametrize("cores", (8, 40, 80, 132))
def test_a_large_batch_is_not_split(cores: int) -> None:
    tiling = decode_tiling(4, 4, 128, 128, 2, 16, Tuning())
    assert choose_num_splits(64 * 8, tiling, 128, 4096, 12 * cores) == 1


@pytest.mark.parametrize("cores", (80, 132))
def test_splits_fill_the_gpu_once(cores: int) -> None:
    """A core runs three threadgroups of four simdgroups: a few more than that, and they wait for a second turn."""
    tiling = decode_tiling(4, 4, 128, 128, 2, 16, Tuning())
    splits = choose_num_splits(8 * 8, tiling, 128, 4096, 12 * cores)
    assert Tuning().decode_simdgroups == 4
    assert 0.7 <= splits * 8 * 8 / (3 * cores) <= 1


def test_layout_knows_shapes_and_cores_only() -> None:
    """The same grid whatever the lengths on the device are: nothing is read back."""
    grids = []
    for length in (0, 5, 640):
        problem = paged_decode(2, 4, 2, 64, 640, torch.float16)
        problem.cache_seqlens.fill_(length)
        with kernels_on("cpu", core_count=40) as launches:
            decode(problem)
        grids.append([(launch.kernel, launch.threads, launch.group_size) for launch in launches])
    assert grids[0] == grids[1] == grids[2]


@pytest.mark.parametrize("head_dim, dtype", ((256, torch.float32), (128, torch.float16)), ids=str)
def test_threadgroup_memory_fits(head_dim: int, dtype: torch.dtype) -> None:
    q, kv = torch.randn(1, 64, 16, head_dim).to(dtype), torch.randn(1, 300, 1, head_dim).to(dtype)
    with pagedflash.use_backend("metal"):
        (prefill,) = counted(lambda: flash_attn_func(q[:, :, :1], kv, kv))
        (decode, *_) = counted(lambda: flash_attn_func(q[:, :1], kv, kv))
    assert (prefill.kernel, decode.kernel) == ("prefill", "decode")
    assert max(prefill.threadgroup_bytes, decode.threadgroup_bytes) <= 32 * 1024


def matrix_multiplies(causal: bool, window: tuple[int, int] = (-1, -1)) -> int:
    q, kv = torch.randn(1, 512, 2, 64).half(), torch.randn(1, 512, 1, 64).half()
    with pagedflash.use_backend("metal"):
        (only,) = counted(lambda: flash_attn_func(q, kv, kv, causal=causal, window_size=window))
    assert only.kernel == "prefill"
    return only.counters.matrix_multiplies


def test_prefill_skips_tiles_that_no_query_sees() -> None:
    full = matrix_multiplies(causal=False)
    assert full == 2 * 2 * (512 // 8) ** 2 * 64 // 8  # two heads, Q K^T and P V, 8x8 at a time
    assert matrix_multiplies(causal=True) <= 0.6 * full
    assert matrix_multiplies(causal=True, window=(63, 0)) <= 0.25 * full


def backward_multiplies(head_dim: int = 64, **options) -> int:
    q, k, v = (torch.randn(1, 512, heads, head_dim).half().requires_grad_() for heads in (2, 1, 1))
    with pagedflash.use_backend("metal"):
        forward, backward = counted(lambda: flash_attn_func(q, k, v, **options).sum().backward())
    assert (forward.kernel, backward.kernel) == ("prefill", "backward")
    return backward.counters.matrix_multiplies


def test_backward_takes_five_products_and_skips_tiles_that_no_query_sees() -> None:
    full = backward_multiplies()
    assert full == 2.5 * matrix_multiplies(causal=False)
    assert backward_multiplies(causal=True) <= 0.6 * full
    assert backward_multiplies(window_size=(63, 0)) <= 0.25 * full


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("head_dim", (64, 72, 80, 96, 112, 128, 160, 192, 256))
def test_backward_of_every_head_dim_takes_about_five_products(head_dim: int, dtype: torch.dtype) -> None:
    """Those behind the whole loads of a row are padded; and threadgroup memory fits."""
    tiling = backward_tiling(head_dim, head_dim, dtype.itemsize, Tuning())
    assert tiling is not None
    padded = tiling.dim_split * (tiling.k_chunks * tiling.chunk + tiling.k_tail) * 8
    assert 4 * padded + -(-head_dim // 16) * 16 <= 5 * 1.15 * head_dim
    assert tiling.threadgroup_bytes <= 32 * 1024


@pytest.mark.parametrize("element_bytes, most, v_most", ((2, 576, 512), (4, 288, 288)))
def test_backward_has_room_for_every_pair_of_head_dims(element_bytes: int, most: int, v_most: int) -> None:
    for head_dim, v_head_dim in itertools.product((*range(1, most, 8), most), (*range(1, v_most, 8), v_most)):
        assert backward_tiling(head_dim, v_head_dim, element_bytes, Tuning()) is not None


def test_prefill_over_pages_gathers_nothing() -> None:
    """Chunked prefill binds the cache itself, and reads each key once for each tile of queries."""
    problem = paged_decode(1, 2, 1, 64, 256, torch.float16)
    q = torch.randn(32, 2, 64).half()
    offsets = torch.tensor([0, 32], dtype=torch.int32)
    arguments = (q, problem.k_cache, problem.v_cache, offsets, None, 32, 256)
    options = dict(block_table=problem.block_table, seqused_k=problem.cache_seqlens, causal=True)
    with pagedflash.use_backend("metal"):
        (only,) = counted(lambda: pagedflash.flash_attn_varlen_func(*arguments, **options))
    tiles = 32 * 2 // 32
    assert only.counters.device_bytes_loaded <= 1.15 * tiles * problem.cache_bytes


def test_a_mixed_batch_costs_its_parts() -> None:
    """Seven sequences decode, one has a chunk of 40: bytes, multiplies and dispatches of a call for each of the two."""
    problem = paged_decode(8, 8, 2, 64, 512, torch.float16)
    _, k, v, lengths, table = problem
    q = torch.randn(7 + 40, 8, 64).half()

    def call(first: int, sequences: slice, queries: list[int]) -> list[metalsim.Dispatch]:
        offsets = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        rows = q[first : first + sum(queries)]
        arguments = (rows, k, v, offsets, None, max(queries), 512)
        options = dict(block_table=table[sequences], seqused_k=lengths[sequences], causal=True, num_splits=2)
        with pagedflash.use_backend("metal"):
            return counted(lambda: pagedflash.flash_attn_varlen_func(*arguments, **options))

    mixed = call(0, slice(0, 8), [1] * 7 + [40])
    apart = [*call(0, slice(0, 7), [1] * 7), *call(7, slice(7, 8), [40])]
    assert [d.kernel for d in mixed] == [d.kernel for d in apart] == ["decode", "combine", "prefill"]
    for counter in ("device_bytes_loaded", "device_bytes_stored", "matrix_multiplies"):
        ours, parts = (sum(getattr(d.counters, counter) for d in dispatches) for dispatches in (mixed, apart))
        assert 0.9 * parts <= ours <= 1.05 * parts, counter


def test_more_cores_get_more_splits() -> None:
    tiling = decode_tiling(4, 4, 128, 128, 2, 16, Tuning())
    per_core = [choose_num_splits(16, tiling, 128, 65536, 12 * cores) for cores in (10, 40, 80)]
    assert per_core == sorted(per_core) and per_core[0] < per_core[-1]
