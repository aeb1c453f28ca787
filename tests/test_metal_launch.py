"""How problems become dispatches: plans, structs shared with the shader, which compiler is in use."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import metalsim
import pytest
import torch
from metal_harness import kernels_on, paged_decode, require_simulator

import pagedflash
from pagedflash import flash_attn_func, flash_attn_with_kvcache
from pagedflash.backends import metal
from pagedflash.backends.metal import compiler, launch, params, tiling, tuning
from pagedflash.backends.metal.compiler import current_target
from pagedflash.problem import AttentionProblem
from pagedflash.testing import LAYOUTS, assert_matches_reference, copy_of, random_problem


@pytest.fixture(autouse=True)
def simulated(device: str) -> None:
    if device != "cpu":
        pytest.skip("these run on the simulator")


# --------------------------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_problems_alike_share_a_plan(rng: random.Random, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """The second problem of a signature, with other values at other addresses, takes the plan of the first."""
    problem = random_problem(rng, layout=layout, dtype=torch.float32, capabilities=metal.CAPABILITIES)
    other = copy_of(problem)
    other.queries.q.neg_()
    with kernels_on("cpu"):
        metal.attention(problem)
        monkeypatch.setattr(launch, "_plan_attention", None)
        assert_matches_reference(other, metal.attention)


@pytest.mark.parametrize("first_offset, second_offset", ((0, 1), (1, 0)))
def test_tensors_alike_at_other_offsets_have_another_plan(first_offset: int, second_offset: int) -> None:
    """Wide loads want rows that begin at a multiple of a chunk. A signature does not know where a view begins."""
    storage = torch.randn(1 + 2 * 40 * 2 * 64).half()
    with kernels_on("cpu"), pagedflash.use_backend("metal"), metalsim.simulate(check=True):
        for offset in (first_offset, second_offset):
            kv = storage[offset:][: 2 * 40 * 2 * 64].view(2, 40, 2, 64)
            out = flash_attn_func(kv[:, :1], kv, kv)
            with pagedflash.use_backend("reference"):
                torch.testing.assert_close(out, flash_attn_func(kv[:, :1], kv, kv), rtol=2e-3, atol=2e-3)


def test_a_plan_belongs_to_one_compiler_and_core_count() -> None:
    problem = paged_decode(4, 16, 16, 64, 1024, torch.float16)
    grids = []
    for core_count in (8, 80, 8):
        with kernels_on("cpu", core_count) as launches, pagedflash.use_backend("metal"):
            decode(problem)
        grids.append(launches[0].threads)
    assert grids[0] == grids[2] != grids[1]


def test_what_is_cached_is_bounded() -> None:
    caches = [
        value
        for module in (compiler, launch, params, tiling, tuning)
        for value in vars(module).values()
        if hasattr(value, "cache_parameters")
    ]
    assert caches and all(cached.cache_parameters()["maxsize"] is not None for cached in caches)


def test_a_slow_compilation_is_announced(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0.05)

    def compile_slowly(source: str) -> Any:
        time.sleep(0.5 if source == "slow" else 0.0)
        return SimpleNamespace(decode=source)

    assert compiler.compiled(compile_slowly, "decode", "quick") == "quick"
    assert capfd.readouterr().err == ""
    assert compiler.compiled(compile_slowly, "decode", "slow") == "slow"
    assert capfd.readouterr().err == "pagedflash: compiling the Metal kernel 'decode', once for its shape\n"


def test_every_buffer_of_a_kernel_is_a_field_or_a_result() -> None:
    """A misspelt one would be bound to a stand-in."""
    fields = {field.name for field in AttentionProblem.TENSOR_FIELDS}
    others = {
        "out",
        "lse",
        "out_partial",
        "softmax_partial",
        "params",
        "score_params",
        "d_out",
        "delta",
        "d_q",
        "d_k",
        "d_v",
    }
    for name in compiler.SOURCES:
        assert set(compiler.buffers_of(name)) <= fields | others


def test_keys_shared_by_all_sequences_of_a_batch() -> None:
    """An expanded cache: its sequences lie at the same place, with a stride of 0."""
    q, kv = torch.randn(3, 2, 4, 64), torch.randn(1, 50, 2, 64).expand(3, -1, -1, -1)
    with pagedflash.use_backend("reference"):
        want = flash_attn_func(q, kv, kv)
    with kernels_on("cpu"), pagedflash.use_backend("metal"):
        torch.testing.assert_close(flash_attn_func(q, kv, kv), want)


def decode(problem: Any) -> torch.Tensor:
    return flash_attn_with_kvcache(*problem[:3], cache_seqlens=problem.cache_seqlens, block_table=problem.block_table)


# --------------------------------------------------------------------------------------------------------------------
# Structs shared with the shader
# --------------------------------------------------------------------------------------------------------------------


class Mixed(NamedTuple):
    scale: float
    window: int
    softcap: float
    bias: float
    slope: float


def test_a_struct_arrives_as_it_was_packed() -> None:
    """Whatever the order of ints and floats: a score option more is a field more."""
    require_simulator()
    source = f"""
    #include <metal_stdlib>
    using namespace metal;
    {params.struct_source(Mixed)}
    kernel void unpack(constant Mixed& mixed [[buffer(0)]], device float* floats [[buffer(1)]],
                       device long* longs [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
        floats[0] = mixed.scale; floats[1] = mixed.softcap; floats[2] = mixed.bias; floats[3] = mixed.slope;
        longs[0] = mixed.window;
    }}
    """
    floats, longs = torch.empty(4), torch.empty(1, dtype=torch.int64)
    with metalsim.simulate(check=True):
        metalsim.compile_shader(source).unpack(
            params.packed(Mixed(0.5, -(2**40), 3.0, -1.25, 7.0)), floats, longs, threads=1, group_size=1
        )
    assert floats.tolist() == [0.5, 3.0, -1.25, 7.0] and longs.tolist() == [-(2**40)]


@pytest.mark.parametrize("window", (0, 5, 2**31, 2**62))
def test_windows_of_any_width(window: int) -> None:
    q, kv = torch.randn(1, 3, 2, 32), torch.randn(1, 30, 2, 32)
    with pagedflash.use_backend("reference"):
        want = flash_attn_func(q, kv, kv, window_size=(min(window, 1000), 0))
    with kernels_on("cpu"), pagedflash.use_backend("metal"):
        torch.testing.assert_close(flash_attn_func(q, kv, kv, window_size=(window, 0)), want)


# --------------------------------------------------------------------------------------------------------------------
# The compiler in use
# --------------------------------------------------------------------------------------------------------------------


def compile_a(source: str) -> Any:
    raise AssertionError


def compile_b(source: str) -> Any:
    raise AssertionError


def test_the_innermost_compiler_is_in_use_and_the_outer_one_afterwards() -> None:
    outside = current_target()
    with metal.use_compiler(compile_a, 10):
        with metal.use_compiler(compile_b, 20):
            with metal.use_compiler(compile_a, 10):
                assert current_target()[:2] == (compile_a, 10)
            assert current_target()[:2] == (compile_b, 20)
        assert current_target()[:2] == (compile_a, 10)
    assert current_target() == outside


def test_core_count_comes_from_torch_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 38)
    assert current_target().core_count == 38
    with metal.use_compiler(compile_a, core_count=10):
        assert current_target().core_count == 10


# --------------------------------------------------------------------------------------------------------------------
# Tiling
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", (8, 9, 128))
def test_decode_on_matrices_fits_the_registers_of_an_apple_gpu(rows: int) -> None:
    """The values of a lane that the plan has live together, in 32-bit registers. What a compiler adds to them for addresses
    and temporaries is estimated in test_metal_sources.py.
    """
    for element_bytes in (2, 4):
        for head_dim in range(1, 257):
            t = tiling.decode_tiling(rows, 8, head_dim, head_dim, element_bytes, 16, metal.Tuning())
            assert isinstance(t, tiling.MatrixTiling)
            chunks = head_dim // (8 * t.chunk)
            output = t.row_blocks * 2 * (chunks * t.chunk + t.v_tail)
            loads = 2 * t.key_blocks * 4 * max(min(chunks, t.load_chunks), 1)
            scores = t.row_blocks * t.key_blocks * (2 + element_bytes // 2)
            state = 6 * t.row_blocks + 24  # ranges, positions, slopes, maxima, sums; addresses and counters
            assert output + loads + scores + state <= 128, (element_bytes, head_dim, t)


@pytest.mark.parametrize("rows", (1, 2, 3, 4))
def test_decode_over_lanes_fits_the_registers_of_an_apple_gpu(rows: int) -> None:
    """As above; loads are twice there, those that are multiplied and the next. Keys are unpacked where they were loaded."""
    for element_bytes in (1, 2, 4):
        for head_dim in range(1, 257):
            t = tiling.decode_tiling(rows, rows, head_dim, head_dim, element_bytes, 16, metal.Tuning())
            assert isinstance(t, tiling.LaneTiling)
            assert t.k_lanes * t.k_chunks * t.chunk >= head_dim and head_dim % t.chunk == 0
            load = t.k_chunks * max(1, t.chunk * element_bytes // 4)
            output = rows * t.v_chunks * t.chunk
            keys = t.key_block * t.k_chunks * t.chunk
            assert t.k_steps * load <= 32 and keys <= 32 and output <= 32, (element_bytes, head_dim, t)
            wide = rows > tiling.FEW_ROWS and head_dim > 128  # these keep some in memory, for loads
            assert output + 2 * t.k_steps * load + keys + 3 * rows + 16 <= (160 if wide else 144), (
                element_bytes,
                head_dim,
                t,
            )


def test_prefill_fits_the_registers_of_an_apple_gpu() -> None:
    for element_bytes in (2, 4):
        for head_dim in range(1, 257):
            t = tiling.prefill_tiling(head_dim, head_dim, element_bytes, metal.Tuning())
            queries, output = (t.k_chunks * t.chunk + t.k_tail) * element_bytes // 2, 2 * t.v_matrices
            assert queries + output <= 64, (element_bytes, head_dim, t)
            rows = t.dim_split * 8 * (t.k_chunks * t.chunk + t.k_tail), t.dim_split * 8 * t.v_matrices
            assert min(rows) >= head_dim
            widths = [row * element_bytes + 16 for row in rows]
            tiles = t.key_tile * (max(widths) if t.shares_tile else sum(widths))
            parts = (t.dim_split > 1) * t.simdgroups * t.key_tile * 32
            assert t.key_tile in (8, 16, 32) and tiles + parts <= 32 * 1024, (element_bytes, head_dim, t)


@pytest.mark.parametrize("head_dim, v_head_dim", ((257, 257), (320, 300), (512, 512), (576, 512), (576, 40), (40, 512)))
@pytest.mark.parametrize("element_bytes", (2, 4))
def test_wide_heads_fit_threadgroup_memory(element_bytes: int, head_dim: int, v_head_dim: int) -> None:
    t = tiling.prefill_tiling(head_dim, v_head_dim, element_bytes, metal.Tuning())
    rows = t.dim_split * 8 * (t.k_chunks * t.chunk + t.k_tail), t.dim_split * 8 * t.v_matrices
    assert rows[0] >= head_dim and rows[1] >= v_head_dim
    widths = [row * element_bytes + 16 for row in rows]
    tiles = t.key_tile * (max(widths) if t.shares_tile else sum(widths))
    assert tiles + (t.dim_split > 1) * t.simdgroups * t.key_tile * 32 <= 32 * 1024, t
    assert t.simdgroups * 32 <= 1024
    for rows_of_decode in (1, 4, 8, 16):
        d = tiling.decode_tiling(rows_of_decode, rows_of_decode, head_dim, v_head_dim, element_bytes, 16, metal.Tuning())
        reduced = d.simdgroups * d.reduce_rows * v_head_dim * 4
        if isinstance(d, tiling.LaneTiling):
            dims = d.k_lanes * d.k_chunks * d.chunk
        else:
            dims = 8 * (head_dim // (8 * d.chunk) * d.chunk + d.k_tail)
        queries = d.rows * dims * 4
        assert dims >= head_dim
        assert max(queries, reduced) + 1024 <= 32 * 1024, d


@pytest.mark.parametrize(
    "threadgroups, split_keys, element_bytes, team",
    (
        (64, 50, 4, (8, 8)),  # four sequences of 50 keys: all simdgroups have some
        (64, 50, 2, (4, 16)),  # half of the bytes: as many as they are worth
        (384, 683, 2, (4, 32)),  # the GPU is full
        (1, 4096, 2, (8, 32)),
    ),
)
def test_few_keys_are_shared_by_all_simdgroups(
    threadgroups: int, split_keys: int, element_bytes: int, team: tuple[int, int]
) -> None:
    t = tiling.decode_tiling(1, 1, 128, 128, element_bytes, 16, metal.Tuning())
    assert tiling.choose_team(threadgroups, t, split_keys, 256 * element_bytes, 1760, metal.Tuning()) == team
