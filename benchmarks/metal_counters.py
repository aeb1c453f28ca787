"""Counts what the Metal kernels cost, on metalsim: bytes, transactions, simd and matrix operations, beside a baseline.

    python benchmarks/metal_counters.py            prints the tables
    python benchmarks/metal_counters.py --write    puts them into docs/metal.md

Needs no Apple GPU. The counts are exact and repeatable; they say nothing of time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from metalsim import Counters, Dispatch

import pagedflash
from pagedflash import flash_attn_func, flash_attn_with_kvcache, kv_paged_write
from pagedflash.testing import PagedProblem

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from metal_harness import counted, paged_decode, pairs, plain_decode  # noqa: E402

DOCUMENT = ROOT / "docs" / "metal.md"
BEGIN, END = "<!-- counters: begin -->", "<!-- counters: end -->"

DECODE_CASES = (  # batch, query heads, KV heads, head dim, keys, dtype; then the page size if it is not 16
    (4, 16, 16, 128, 50, torch.float32),
    (1, 32, 8, 128, 4096, torch.float16),
    (1, 8, 8, 128, 1024, torch.float16),
    (2, 9, 3, 64, 1024, torch.float16),
    (1, 16, 2, 128, 1024, torch.bfloat16),
    (1, 32, 2, 64, 1024, torch.float16),
    (1, 32, 2, 128, 1024, torch.float16),
    (1, 16, 2, 256, 1024, torch.float16),
    (1, 8, 8, 128, 512, torch.float16, 1),
    (1, 2, 2, 256, 512, torch.float16, 1),
)
HEADER = (
    "| case | kernel | bytes loaded / K and V | used of each transaction | simd operations / (key, query head) |"
    " simdgroups | threadgroup memory |\n|---|---|---|---|---|---|---|"
)


def decode_row(name: str, kernel: str, dispatches: list[Dispatch], problem: PagedProblem) -> str:
    total = sum((d.counters for d in dispatches[1:]), dispatches[0].counters)
    return (
        f"| {name} | {kernel} | {total.device_bytes_loaded / problem.cache_bytes:.3f} | {total.load_efficiency:.0%} |"
        f" {total.simd_operations / pairs(problem):.2f} | {dispatches[0].counters.simdgroups} |"
        f" {dispatches[0].threadgroup_bytes} B |"
    )


def decode_table() -> list[str]:
    lines = [HEADER]
    for batch, heads, kv_heads, head_dim, keys, dtype, *page_size in DECODE_CASES:
        problem = paged_decode(batch, heads, kv_heads, head_dim, keys, dtype, *page_size)
        name = f"B={batch} {heads}/{kv_heads} D={head_dim} S={keys} {str(dtype).removeprefix('torch.')}"
        name += "".join(f", pages of {size}" for size in page_size)
        dispatches = counted(lambda problem=problem: run_decode(problem))
        lines.append(decode_row(name, " + ".join(d.kernel for d in dispatches), dispatches, problem))
        lines.append(decode_row("", "baseline", counted(lambda problem=problem: plain_decode(problem)), problem))
    return lines


def run_decode(problem: PagedProblem) -> None:
    with pagedflash.use_backend("metal"):
        flash_attn_with_kvcache(
            problem.q,
            problem.k_cache,
            problem.v_cache,
            cache_seqlens=problem.cache_seqlens,
            block_table=problem.block_table,
            causal=True,
        )


def prefill_table() -> list[str]:
    lines = [
        "| case | 8x8 multiplies | of full | bytes loaded / K and V | used of each transaction |"
        " simd operations / query row |\n|---|---|---|---|---|---|"
    ]
    full: Counters | None = None
    for name, options in (
        ("full", {}),
        ("causal", dict(causal=True)),
        ("causal, window 128", dict(causal=True, window_size=(127, 0))),
    ):
        counters = count_prefill(options)
        full = full or counters
        kv_bytes = 2 * 512 * 64 * 2
        lines.append(
            f"| {name} | {counters.matrix_multiplies} | {counters.matrix_multiplies / full.matrix_multiplies:.2f} |"
            f" {counters.device_bytes_loaded / kv_bytes:.1f} | {counters.load_efficiency:.0%} |"
            f" {counters.simd_operations / (512 * 4):.1f} |"
        )
    return lines


def count_prefill(options: dict[str, object]) -> Counters:
    """512 queries of 4 heads against 512 keys of one KV head, D = 64, float16."""
    q, kv = torch.randn(1, 512, 4, 64).half(), torch.randn(1, 512, 1, 64).half()
    with pagedflash.use_backend("metal"):
        (only,) = counted(lambda: flash_attn_func(q, kv, kv, **options))  # type: ignore[arg-type]
    return only.counters


def write_line() -> str:
    problem = paged_decode(8, 8, 8, 128, 32, torch.float16)
    new = torch.randn(8, 1, 8, 128).half()

    def write() -> None:
        with pagedflash.use_backend("metal"):
            kv_paged_write(new, new, problem.k_cache, problem.v_cache, problem.block_table, problem.cache_seqlens - 1)

    (only,) = counted(write)
    moved = 2 * new.numel() * new.element_size()
    counters = only.counters
    return (
        "`kv_write` of one token for 8 sequences, 8 heads, D=128, float16:"
        f" {counters.device_bytes_loaded / moved:.2f} x the new elements loaded,"
        f" {counters.device_bytes_stored / moved:.2f} x stored, {counters.simdgroups} simdgroups, one dispatch."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/metal.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts: tuple[Callable[[], list[str]], ...] = (decode_table, prefill_table, lambda: [write_line()])
    tables = "\n\n".join("\n".join(part()) for part in parts)
    print(tables)
    if arguments.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
