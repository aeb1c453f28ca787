"""The sources that the Metal kernels are compiled from: what becomes of them in a GPU compiler, and what PyTorch takes."""

from __future__ import annotations

import re
from pathlib import Path

import metalsim
import pytest
import torch
from metal_harness import paged_decode, require_simulator, sources_of

from pagedflash import flash_attn_func, flash_attn_with_kvcache, kv_paged_write
from pagedflash.backends.metal import compiler
from pagedflash.testing import DTYPES, paged_problem


@pytest.fixture(autouse=True)
def simulated() -> None:
    require_simulator()


@pytest.mark.parametrize("group", (1, 3, 8, 16))
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_has_its_arrays_in_registers(dtype: torch.dtype, head_dim: int, group: int) -> None:
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
def test_prefill_has_its_arrays_in_registers(dtype: torch.dtype, head_dim: int) -> None:
    q, kv = torch.zeros(1, 64, 4, head_dim, dtype=dtype), torch.zeros(1, 64, 1, head_dim, dtype=dtype)
    (source,) = sources_of(lambda: flash_attn_func(q, kv, kv, causal=True))["prefill"]
    assert metalsim.stack_arrays(source) == []


def test_kv_write_has_its_arrays_in_registers() -> None:
    problem = paged_decode(1, 2, 2, 64, 64, torch.float16)
    new = torch.zeros(1, 3, 2, 64).half()
    run = lambda: kv_paged_write(new, new, *problem[1:3], problem.block_table, problem.cache_seqlens - 3)  # noqa: E731
    (source,) = sources_of(run)["kv_write"]
    assert metalsim.stack_arrays(source) == []


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


@pytest.mark.parametrize("group, kernels", ((1, 1), (4, 2)))
def test_few_queries_of_any_number_share_a_decode_kernel(group: int, kernels: int) -> None:
    """One for up to 8 rows, one for more."""

    def run() -> None:
        for num_queries in range(1, 9):
            problem = paged_problem([100, 30], heads=(2 * group, 2), head_dim=64, num_queries=num_queries)
            flash_attn_with_kvcache(
                *problem[:3], cache_seqlens=problem.cache_seqlens, block_table=problem.block_table, causal=True
            )

    assert len(set(sources_of(run)["decode"])) == kernels


@pytest.mark.parametrize("paged", (True, False), ids=("pages", "dense caches"))
def test_a_generation_compiles_four_kernels_at_most(paged: bool) -> None:
    """Prompts, then single tokens with ever longer caches, and batches that come and go."""
    heads, kv_heads, head_dim, dtype = 8, 2, 128, torch.float16

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
