"""What a call costs before and after its kernel: Python, checks, operator and dispatch, on a CPU.

    python benchmarks/overhead.py

A backend that does nothing stands in for the kernels. Prints microseconds a call, the median and the least of many short
rounds (the least is what the code costs; the median includes what else the machine was doing).
"""

from __future__ import annotations

import statistics
import sys
import timeit
from collections.abc import Callable
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from pagedflash import (
    dispatch,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    kv_paged_write,
    use_backend,
)
from pagedflash.backends.protocol import Capabilities, Support

ROUNDS, CALLS = 400, 50


def idle_backend() -> str:
    """Register a backend whose kernels return at once; returns its name."""
    module = ModuleType("idle_backend")
    output = torch.empty(0), torch.empty(0)
    vars(module).update(
        NAME="idle",
        CAPABILITIES=Capabilities(checks_values=True),
        available=lambda: Support(True),
        supports=lambda problem: Support(True),
        attention=lambda problem: output,
        kv_write=lambda write: None,
    )
    sys.modules[module.__name__] = module
    dispatch.BACKEND_MODULES["idle"] = module.__name__
    return "idle"


def calls() -> dict[str, Callable[[], object]]:
    """One small call of each function, with the arguments that decoding and prefill use."""
    batch, heads, dim, page_size = 4, 16, 128, 16
    k_pages, v_pages = torch.randn(2, 64, page_size, heads, dim)
    table = torch.arange(16, dtype=torch.int32).view(batch, 4)
    lengths = torch.full((batch,), 50, dtype=torch.int32)
    q, k, v = torch.randn(3, batch, 1, heads, dim)
    q_rows, k_rows, v_rows = q[:, 0], k[:, 0], v[:, 0]
    offsets = torch.arange(batch + 1, dtype=torch.int32)
    return {
        "flash_attn_with_kvcache, append, block table": lambda: flash_attn_with_kvcache(
            q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, causal=True
        ),
        "flash_attn_with_kvcache, block table": lambda: flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table
        ),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            q_rows, k_rows, v_rows, offsets, offsets, 1, 1, causal=True
        ),
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "kv_paged_write": lambda: kv_paged_write(k, v, k_pages, v_pages, table, lengths),
    }


def main() -> None:
    table = Table("call", "median us", "least us", title="Overhead of a call without its kernel")
    with use_backend(idle_backend()):
        for name, call in calls().items():
            call()
            times = [time / CALLS * 1e6 for time in timeit.repeat(call, number=CALLS, repeat=ROUNDS)]
            table.add_row(name, f"{statistics.median(times):.1f}", f"{min(times):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
