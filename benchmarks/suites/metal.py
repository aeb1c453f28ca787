"""What the Metal kernels cost, counted by metalsim. The counts are exact and repeatable; they say nothing of time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.suite import Figures, Options, Row, suite
from pagedflash import flash_attn_func, kv_paged_write, use_backend
from pagedflash.cli.bench import dtype_name, pagedflash_decode
from pagedflash.testing import PagedProblem

if TYPE_CHECKING:
    from metalsim import Counters, Dispatch

# batch, query heads, KV heads, head dim, keys, dtype; then the page size if it is not 16
DECODE_CASES: tuple[tuple[Any, ...], ...] = (
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
MAX_BYTES = 1.05
"""Bytes that decode may load, to those of K and V: queries, tables, lengths and the partial results are in them."""

REGISTERS = "registers a lane, estimated, and bytes in memory with 128"
"""The name of a figure."""

MAX_CAUSAL = 0.6
"""Matrix multiplications of a causal prompt, to those of a full one."""

MAX_BACKWARD = 2.6
"""Those of the backward pass, to those of forward."""


def no_metalsim() -> str:
    return "" if importlib.util.find_spec("metalsim") else "metalsim is not installed (pip install ./metalsim)"


@suite("metal-counters", needs=no_metalsim)
def counters(options: Options) -> Iterator[Row]:
    """Bytes, transactions and operations of the Metal kernels on metalsim, beside one simdgroup for each query head"""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    yield from decode(options.size(DECODE_CASES, DECODE_CASES[:1]))
    yield from prefill(options.size(512, 64))
    yield from backward(options.size(512, 64))
    yield write()


def decode(cases: tuple[tuple[Any, ...], ...]) -> Iterator[Row]:
    from metal_harness import counted, paged_decode, plain_decode

    for case in cases:
        batch, heads, kv_heads, head_dim, keys, dtype, *page_size = case
        problem = paged_decode(*case)
        name = f"B={batch} {heads}/{kv_heads} D={head_dim} S={keys} {dtype_name(dtype)}"
        name += "".join(f", pages of {size}" for size in page_size)
        run = pagedflash_decode(problem).run
        with use_backend("metal"):
            figures = decode_figures(counted(run), problem) | registers(run, "decode")
        loaded = figures["bytes loaded / K and V"]
        failures = [f"{loaded:.3f} x the bytes of K and V loaded, more than {MAX_BYTES}"] if loaded > MAX_BYTES else ()
        yield Row(name, figures, failures)
        baseline = decode_figures(counted(partial(plain_decode, problem)), problem)
        yield Row("", baseline | {"kernel": "baseline", REGISTERS: ""})


def registers(run: Callable[[], object], kernel: str) -> Figures:
    """As another GPU's compiler counts them, and what it keeps in memory if there are 128."""
    import metalsim
    from metal_harness import sources_of

    (source,) = sources_of(run)[kernel]
    used, spilled = metalsim.count_registers(source)[kernel]
    return {REGISTERS: f"{used}, {spilled} bytes" if spilled else str(used)}


def decode_figures(dispatches: list[Dispatch], problem: PagedProblem) -> Figures:
    from metal_harness import pairs

    total = sum((d.counters for d in dispatches[1:]), dispatches[0].counters)
    return {
        "kernel": " + ".join(d.kernel for d in dispatches),
        "bytes loaded / K and V": total.device_bytes_loaded / problem.cache_bytes,
        "used of each transaction": total.load_efficiency,
        "simd operations / (key, query head)": total.simd_operations / pairs(problem),
        "simdgroups": dispatches[0].counters.simdgroups,
        "bytes of threadgroup memory": dispatches[0].threadgroup_bytes,
    }


def prefill(tokens: int) -> Iterator[Row]:
    """As many queries of 4 heads as keys of one KV head, D = 64, float16."""
    full: Counters | None = None
    for name, arguments in (
        ("full", {}),
        ("causal", dict(causal=True)),
        (f"causal, window {tokens // 4}", dict(causal=True, window_size=(tokens // 4 - 1, 0))),
    ):
        counted = count_prefill(tokens, arguments)
        full = full or counted
        share = counted.matrix_multiplies / full.matrix_multiplies
        figures = {
            "8x8 multiplies": counted.matrix_multiplies,
            "of full": share,
            "bytes loaded / K and V": counted.device_bytes_loaded / (2 * tokens * 64 * 2),
            "used of each transaction": counted.load_efficiency,
            "simd operations / query row": counted.simd_operations / (tokens * 4),
        }
        failures = [f"{share:.2f} of the work without a mask"] if arguments and tokens >= 512 and share > MAX_CAUSAL else ()
        yield Row(f"prefill {tokens}, {name}", figures, failures)


def count_prefill(tokens: int, arguments: dict[str, Any]) -> Counters:
    from metal_harness import counted

    q, kv = torch.randn(1, tokens, 4, 64).half(), torch.randn(1, tokens, 1, 64).half()
    with use_backend("metal"):
        (only,) = counted(lambda: flash_attn_func(q, kv, kv, **arguments))
    counters: Counters = only.counters
    return counters


def backward(tokens: int) -> Iterator[Row]:
    """Of the same problems."""
    full: Counters | None = None
    for name, arguments in (("full", {}), ("causal", dict(causal=True))):
        run = partial(train, tokens, arguments)
        forward, counted = count_backward(run)
        full = full or counted
        share = counted.matrix_multiplies / full.matrix_multiplies
        products = counted.matrix_multiplies / forward.matrix_multiplies
        figures = {
            "8x8 multiplies": counted.matrix_multiplies,
            "of full": share,
            "of forward": products,
            "bytes loaded / K and V": counted.device_bytes_loaded / (2 * tokens * 64 * 2),
            "bytes stored / K and V": counted.device_bytes_stored / (2 * tokens * 64 * 2),
            "used of each transaction": counted.load_efficiency,
        } | registers(run, "backward")
        failures = []
        if not arguments and products > MAX_BACKWARD:
            failures.append(f"{products:.2f} x the work of forward")
        if arguments and tokens >= 512 and share > MAX_CAUSAL:
            failures.append(f"{share:.2f} of the work without a mask")
        yield Row(f"backward {tokens}, {name}", figures, failures)


def train(tokens: int, arguments: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, tokens, heads, 64).half().requires_grad_() for heads in (4, 1, 1))
    flash_attn_func(q, k, v, **arguments).sum().backward()


def count_backward(run: Callable[[], None]) -> tuple[Counters, Counters]:
    """Of forward, and of backward."""
    from metal_harness import counted

    with use_backend("metal"):
        forward, backward = counted(run)
    return forward.counters, backward.counters


def write() -> Row:
    """One token for 8 sequences."""
    from metal_harness import counted, paged_decode

    problem = paged_decode(8, 8, 8, 128, 32, torch.float16)
    new = torch.randn(8, 1, 8, 128).half()
    _, k_cache, v_cache, lengths, table = problem
    with use_backend("metal"):
        (only,) = counted(lambda: kv_paged_write(new, new, k_cache, v_cache, table, lengths - 1))
    moved = 2 * new.numel() * new.element_size()
    figures = {
        "loaded / new elements": only.counters.device_bytes_loaded / moved,
        "stored / new elements": only.counters.device_bytes_stored / moved,
        "simdgroups": only.counters.simdgroups,
    }
    stored = only.counters.device_bytes_stored
    return Row("kv_write, B=8, 8 heads, D=128 float16", figures, [] if stored == moved else [f"{stored} bytes stored"])
