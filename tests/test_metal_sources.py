"""The sources that the Metal kernels are compiled from: what becomes of them in a GPU compiler, and what PyTorch takes."""

from __future__ import annotations

import metalsim
import pytest
import torch
from metal_harness import paged_decode, sources_of

from pagedflash import flash_attn_func, flash_attn_with_kvcache, kv_paged_write
from pagedflash.testing import DTYPES


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
