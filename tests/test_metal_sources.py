"""The sources that the Metal kernels are compiled from: what becomes of them in a GPU compiler, and what PyTorch takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import metalsim
import pytest
import torch
from metal_harness import paged_decode, require_simulator, sources_of

from pagedflash import flash_attn_func, flash_attn_with_kvcache, kv_paged_write
from pagedflash.backends.metal import Tuning, compiler
from pagedflash.cli.bench import pagedflash_decode
from pagedflash.cli.sweep import CANDIDATES
from pagedflash.testing import DTYPES, paged_problem


@pytest.fixture
def simulated() -> None:
    require_simulator()


# --------------------------------------------------------------------------------------------------------------------
# Apple's compiler
# --------------------------------------------------------------------------------------------------------------------

SHAPES = ((64, 64, 1), (64, 64, 4), (80, 80, 1), (96, 96, 4), (128, 128, 1), (128, 128, 4), (128, 128, 16), (192, 128, 8),
          (256, 256, 4), (40, 40, 1), (5, 33, 3))  # fmt: skip
"""Head dims of K and V, query heads a KV head."""


@pytest.mark.parametrize("paged", (True, False), ids=("pages", "dense caches"))
@pytest.mark.parametrize("head_dim, v_head_dim, group", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apples_compiler_takes_every_kernel(
    dtype: torch.dtype, head_dim: int, v_head_dim: int, group: int, paged: bool, device: str
) -> None:
    """Every kernel, with dropout and without. On a Mac; elsewhere the other tests compile them."""
    if device != "mps":
        pytest.skip("needs --device mps")

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    lengths = torch.tensor([900], dtype=torch.int32)
    table = torch.arange(64, dtype=torch.int32).view(1, 64) if paged else None
    k, v = (tensor(64, 16, 2, d) if paged else tensor(1, 1024, 2, d) for d in (head_dim, v_head_dim))

    def run() -> None:
        for dropout_p in (0.0, 0.1):
            options = dict(causal=True, dropout_p=dropout_p)
            for queries in (1, 8, 64):
                q, k_new, v_new = (
                    tensor(1, queries, heads, d) for heads, d in ((2 * group, head_dim), (2, head_dim), (2, v_head_dim))
                )
                flash_attn_with_kvcache(q, k, v, k_new, v_new, cache_seqlens=lengths, block_table=table, **options)
            flash_attn_func(q.requires_grad_(), k_new, v_new, **options).sum().backward()

    sources = sources_of(run)
    assert set(sources) == set(compiler.SOURCES)
    for name, of_kernel in sources.items():
        for source in set(of_kernel):
            assert callable(getattr(torch.mps.compile_shader(source), name))


# --------------------------------------------------------------------------------------------------------------------
# What stays in registers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", (1, 3, 8, 16))
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_has_its_arrays_in_registers(simulated: None, dtype: torch.dtype, head_dim: int, group: int) -> None:
    problem = paged_decode(1, 2 * group, 2, head_dim, 1024, dtype)
    new = torch.zeros(1, 1, 2, head_dim, dtype=dtype)
    sources = sources_of(
        lambda: flash_attn_with_kvcache(
            *problem[:3], new, new, cache_seqlens=problem.cache_seqlens - 1, block_table=problem.block_table
        )
    )
    assert "decode" in sources
    assert all(metalsim.stack_arrays(source) == [] for kernel in sources.values() for source in kernel)


@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_prefill_has_its_arrays_in_registers(simulated: None, dtype: torch.dtype, head_dim: int) -> None:
    q, kv = torch.zeros(1, 64, 4, head_dim, dtype=dtype), torch.zeros(1, 64, 1, head_dim, dtype=dtype)
    (source,) = sources_of(lambda: flash_attn_func(q, kv, kv, causal=True))["prefill"]
    assert metalsim.stack_arrays(source) == []


@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_backward_has_its_arrays_in_registers(simulated: None, dtype: torch.dtype, head_dim: int) -> None:
    q, kv = (torch.zeros(1, 64, heads, head_dim, dtype=dtype, requires_grad=True) for heads in (4, 1))
    (source,) = sources_of(lambda: flash_attn_func(q, kv, kv, causal=True).sum().backward())["backward"]
    assert metalsim.stack_arrays(source) == []


def test_with_dropout_arrays_are_in_registers(simulated: None) -> None:
    def run() -> None:
        for queries in (1, 8, 64):
            q, kv = (torch.zeros(1, queries, heads, 64, requires_grad=True) for heads in (4, 1))
            flash_attn_func(q, kv, kv, 0.1, causal=True).sum().backward()

    sources = sources_of(run)
    assert set(sources) == {"decode", "prefill", "backward"}
    assert all(metalsim.stack_arrays(source) == [] for kernel in sources.values() for source in set(kernel))


def test_kv_write_has_its_arrays_in_registers(simulated: None) -> None:
    problem = paged_decode(1, 2, 2, 64, 64, torch.float16)
    new = torch.zeros(1, 3, 2, 64).half()
    run = lambda: kv_paged_write(new, new, *problem[1:3], problem.block_table, problem.cache_seqlens - 3)  # noqa: E731
    (source,) = sources_of(run)["kv_write"]
    assert metalsim.stack_arrays(source) == []


@pytest.mark.parametrize("name, values", [(n, v) for numbers in CANDIDATES.values() for n, v in numbers.items()])
def test_every_plan_of_the_sweep_has_its_arrays_in_registers(simulated: None, name: str, values: tuple[int, ...]) -> None:
    problem = paged_decode(1, 32, 2, 128, 1024, torch.float16)
    q, kv = torch.zeros(1, 64, 4, 128).half(), torch.zeros(1, 64, 1, 128).half()

    def run() -> None:
        flash_attn_with_kvcache(*problem[:3], cache_seqlens=problem.cache_seqlens, block_table=problem.block_table)
        flash_attn_func(q, kv, kv, causal=True)

    for value in values:
        sources = sources_of(run, Tuning(**{name: value}))
        assert all(metalsim.stack_arrays(source) == [] for kernel in sources.values() for source in kernel)


SPILLED = {
    torch.float16: {64: (0, 12, 0), 80: (0, 36, 0), 128: (0, 132, 52), 192: (88, 88, 40), 256: (208, 208, 64)},
    torch.float32: {64: (0, 20, 0), 80: (0, 60, 0), 128: (28, 160, 76), 192: (84, 84, 20), 256: (152, 152, 64)},
}
"""Dtype -> head dim -> bytes a lane that are in memory with 128 registers: of decode with 8 rows, with 16, of prefill. Those
of 16 rows are the price of reading the keys once, which decode_rows=8 does not pay; clamped lengths and table
entries have theirs."""


@pytest.mark.parametrize("head_dim", (64, 80, 128, 192, 256))
@pytest.mark.parametrize("dtype", SPILLED, ids=str)
def test_spills_with_the_registers_of_an_apple_gpu(simulated: None, dtype: torch.dtype, head_dim: int) -> None:
    """Estimated by another GPU's compiler, temporaries and addresses included."""

    def spilled(kernel: str, run: Callable[[], object]) -> int:
        (source,) = sources_of(run)[kernel]
        return metalsim.count_registers(source)[kernel].spilled_bytes

    few, many = (paged_decode(1, 2 * group, 2, head_dim, 64, dtype) for group in (8, 16))
    q, kv = torch.zeros(1, 64, 4, head_dim, dtype=dtype), torch.zeros(1, 64, 1, head_dim, dtype=dtype)
    found = (
        *(spilled("decode", pagedflash_decode(problem).run) for problem in (few, many)),
        spilled("prefill", lambda: flash_attn_func(q, kv, kv, causal=True)),
    )
    assert all(mine <= most for mine, most in zip(found, SPILLED[dtype][head_dim])), found


def test_sources_are_what_every_compile_takes() -> None:
    """PyTorch passes sources on as ASCII; with PYTORCH_MPS_FAST_MATH=1 infinities and NaN of the language are undefined."""
    for path in (Path(compiler.__file__).parent / "kernels").glob("*.metal"):
        source = path.read_text()
        assert source.isascii(), path.name
        code = re.sub(r"//.*", "", source)
        assert not re.search(r"\b(INFINITY|HUGE_VALF?|NAN|MAXFLOAT|isnan|isinf|isfinite|isnormal)\b", code), path.name


# --------------------------------------------------------------------------------------------------------------------
# How many there are: each costs a compilation, the first time in the middle of serving
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group, kernels", ((1, 2), (4, 3), (8, 2)))
def test_few_queries_of_any_number_share_a_decode_kernel(group: int, kernels: int) -> None:
    """One for single queries of up to 4 rows, one for up to 8 rows, one for more."""

    def run() -> None:
        for num_queries in range(1, 9):
            problem = paged_problem([100, 30], heads=(2 * group, 2), head_dim=64, num_queries=num_queries)
            flash_attn_with_kvcache(
                *problem[:3], cache_seqlens=problem.cache_seqlens, block_table=problem.block_table, causal=True
            )

    assert len(set(sources_of(run)["decode"])) == kernels


@pytest.mark.parametrize("paged", (True, False), ids=("pages", "dense caches"))
@pytest.mark.parametrize("head_dim, dtype", ((128, torch.float16), (256, torch.float32)), ids=str)
def test_a_generation_compiles_four_kernels_at_most(head_dim: int, dtype: torch.dtype, paged: bool) -> None:
    """Prompts, then single tokens with ever longer caches, and batches that come and go."""
    heads, kv_heads = 8, 2

    def run() -> None:
        for batch in (1, 3, 8):
            for length in (9, 33, 64, 500):
                q = torch.zeros(batch, length, heads, head_dim, dtype=dtype)
                kv = torch.zeros(batch, length, kv_heads, head_dim, dtype=dtype)
                flash_attn_func(q, kv, kv, causal=True)
                for step in (1, 2, 40, 3000):
                    keys, new = length + step, torch.zeros(batch, 1, kv_heads, head_dim, dtype=dtype)
                    if paged:
                        problem = paged_problem([keys] * batch, heads=(heads, kv_heads), head_dim=head_dim, dtype=dtype)
                        flash_attn_with_kvcache(
                            *problem[:3], new, new, cache_seqlens=problem.cache_seqlens - 1,
                            block_table=problem.block_table, causal=True,
                        )  # fmt: skip
                    else:
                        cache = torch.zeros(batch, kv_heads, keys, head_dim, dtype=dtype).transpose(1, 2)
                        flash_attn_func(q[:, :1], cache, cache, causal=True)

    kernels = {name: len(set(sources)) for name, sources in sources_of(run).items()}
    assert sum(kernels.values()) <= 4, kernels
