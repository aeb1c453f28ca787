"""The CPU backend against what a user could run instead, case by case.

    python benchmarks/cpu_attention.py [--cases decode hot prefill options chunked speculative] [--json FILE] [--rounds N]

Every case runs all its contenders in interleaved rounds in one process. A ratio is the median over rounds of two times
measured in the same round; behind it, of the fastest round of each, which a busy machine
disturbs less. "Streaming" reads 1 GiB with the same threads between the contenders.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pagedflash import flash_attn_func, flash_attn_varlen_func
from pagedflash.cli.bench import (
    STREAM_BYTES,
    Contender,
    DecodeShape,
    Ratio,
    decode_contenders,
    decode_problem,
    describe_device,
    interleave,
    pagedflash_decode,
    ratio,
    streaming,
)

OURS = "pagedflash"


class Row(NamedTuple):
    """One line of the table: a case, our time, and ratios to others (the higher the better for us)."""

    case: str
    milliseconds: float
    ratios: dict[str, Ratio]  # by what it is compared with
    target: str


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def best(seconds: dict[str, list[float]], prefix: str) -> list[float]:
    """The times of the fastest contender (by median) whose name begins so."""
    return min((times for name, times in seconds.items() if name.startswith(prefix)), key=statistics.median)


def decode(rounds: int) -> Iterator[Row]:
    """Long caches: bound by memory."""
    stream = streaming()
    shapes = [
        (DecodeShape(q_heads, kv_heads, 128, page_size, dtype), "equal")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for q_heads, kv_heads in ((32, 8), (16, 16))
        for page_size in (16, 256)
    ]
    shapes += [(DecodeShape(9, 3, 64, 16, dtype), "ragged") for dtype in (torch.float32, torch.bfloat16)]
    for shape, kind in shapes:
        token_bytes = shape.token_bytes
        if kind == "equal":
            lengths = [4096] * (-(-(128 << 20) // (4096 * token_bytes)))
            target = f"{'.65' if shape.dtype == torch.float16 else '.75'} streaming, 1.5 OpenVINO, 8 gather"
        else:
            count = 2 * (128 << 20) // (4096 * token_bytes)
            lengths = [1 + 4095 * i // (count - 1) for i in range(count)]
            target = ".5 streaming, 1.5 OpenVINO"
        problem = decode_problem(shape, lengths)
        seconds = interleave({"streaming": stream, **decode_contenders(problem)}, rounds)
        ours = seconds[OURS]
        fraction = problem.cache_bytes / STREAM_BYTES
        ratios = {"streaming": ratio(seconds["streaming"], ours, fraction)}
        ratios |= {
            name: ratio(best(seconds, name), ours)
            for name in ("OpenVINO", "gather")
            if any(other.startswith(name) for other in seconds)
        }
        heads = f"{shape.q_heads}/{shape.kv_heads} D={shape.head_dim}"
        case = f"decode {heads}, pages of {shape.page_size}, {kind}, {name_of(shape.dtype)}"
        yield Row(case, 1e3 * statistics.median(ours), ratios, target)


def hot(rounds: int) -> Iterator[Row]:
    """A small cache that stays in the processor's caches: bound by overhead. A round's first calls are not hot."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = decode_problem(DecodeShape(16, 16, 128, 16, dtype), [50] * 4)
        seconds = interleave(decode_contenders(problem), 5 * rounds, calls=200)
        ratios = {name: ratio(best(seconds, name), seconds[OURS]) for name in ("OpenVINO", "gather") if name in seconds}
        yield Row(
            f"hot decode B=4 16/16 S=50, {name_of(dtype)}",
            1e3 * statistics.median(seconds[OURS]),
            ratios,
            "0.080 ms, 1.67 OpenVINO",
        )


def dense(num_queries: int, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, num_queries, 32, 128).to(dtype),
        torch.randn(1, num_keys, 8, 128).to(dtype),
        torch.randn(1, num_keys, 8, 128).to(dtype),
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, repeat: bool, mask: Tensor | None = None) -> Contender:
    """Causal, on ``(1, S, H, D)``; the heads of a group through enable_gqa or with K and V repeated (once, not timed)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    causal = mask is None
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=not repeat)


def both_sdpa(make: Callable[[bool], Contender]) -> dict[str, Contender]:
    return {"SDPA, enable_gqa": make(False), "SDPA, repeated": make(True)}


def prefill(rounds: int) -> Iterator[Row]:
    for dtype, target in ((torch.float32, "1.0 SDPA"), (torch.bfloat16, "2.0 SDPA"), (torch.float16, "")):
        q, k, v = dense(2048, 2048, dtype)
        contenders = {OURS: lambda q=q, k=k, v=v: flash_attn_func(q, k, v, causal=True)}
        contenders |= both_sdpa(lambda repeat, q=q, k=k, v=v: sdpa(q, k, v, repeat))
        seconds = interleave(contenders, rounds)
        ratios = {"SDPA": ratio(best(seconds, "SDPA"), seconds[OURS])}
        yield Row(f"prefill 2048 causal 32/8, {name_of(dtype)}", 1e3 * statistics.median(seconds[OURS]), ratios, target)


def blocked_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int, block: int, repeat: bool) -> Contender:
    """A sliding window with SDPA: blocks of queries, each on the slice of keys that it can see, with a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = []
    for start in range(0, q.shape[2], block):
        end, first = min(start + block, q.shape[2]), max(0, start - window)
        distance = torch.arange(start, end).unsqueeze(1) - torch.arange(first, end)
        parts.append((start, end, first, (distance >= 0) & (distance <= window)))

    def run() -> list[Tensor]:
        return [
            scaled_dot_product_attention(q[:, :, a:b], k[:, :, c:b], v[:, :, c:b], attn_mask=mask, enable_gqa=not repeat)
            for a, b, c, mask in parts
        ]

    return run


def options(rounds: int) -> Iterator[Row]:
    q, k, v = dense(2048, 2048, torch.float32)
    sinks = torch.randn(32)
    contenders: dict[str, Contender] = {
        "plain": lambda: flash_attn_func(q, k, v, causal=True),
        "softcap": lambda: flash_attn_func(q, k, v, causal=True, softcap=30.0),
        "sinks": lambda: flash_attn_func(q, k, v, causal=True, s_aux=sinks),
        "window": lambda: flash_attn_func(q, k, v, causal=True, window_size=(256, 0)),
    }
    for block in (128, 256, 512):
        for repeat in (False, True):
            contenders[f"SDPA in blocks of {block}, {'repeated' if repeat else 'enable_gqa'}"] = blocked_sdpa(
                q, k, v, 256, block, repeat
            )
    seconds = interleave(contenders, rounds)
    for name in ("softcap", "sinks"):
        ratios = {"plain": ratio(seconds["plain"], seconds[name])}
        yield Row(f"prefill 2048 with {name}, float32", 1e3 * statistics.median(seconds[name]), ratios, "0.77 plain")
    ratios = {"SDPA": ratio(best(seconds, "SDPA"), seconds["window"])}
    yield Row(
        "prefill 2048 with window 256, float32", 1e3 * statistics.median(seconds["window"]), ratios, "2.0 SDPA in blocks"
    )


def chunked(rounds: int) -> Iterator[Row]:
    """512 new queries on 4096 cached tokens in pages."""
    new, total = 512, 4096 + 512
    for dtype, target in ((torch.float32, "1.0 gather"), (torch.bfloat16, "2.0 gather")):
        problem = decode_problem(DecodeShape(32, 8, 128, 16, dtype), [total])
        q = torch.randn(1, new, 32, 128).to(dtype)
        offsets = torch.tensor([0, new], dtype=torch.int32)
        rows = problem.block_table[0].long()
        # 0 and -inf in q's dtype: what SDPA would otherwise make of a boolean mask in every call.
        mask = torch.full((new, total), float("-inf"), dtype=dtype).triu(total - new + 1)

        def paged(problem=problem, q=q, offsets=offsets) -> Tensor:  # type: ignore[no-untyped-def]
            return flash_attn_varlen_func(
                q[0], problem.k_pages, problem.v_pages, offsets, None, new, total,
                causal=True, block_table=problem.block_table, seqused_k=problem.lengths,
            )  # fmt: skip

        def gathered(repeat: bool, problem=problem, q=q, rows=rows, mask=mask) -> Contender:  # type: ignore[no-untyped-def]
            def run() -> Tensor:
                k, v = (pages[rows].flatten(0, 1)[:total].unsqueeze(0) for pages in (problem.k_pages, problem.v_pages))
                return sdpa(q, k, v, repeat, mask)()

            return run

        seconds = interleave({OURS: paged, **both_sdpa(gathered)}, rounds)
        ratios = {"gather": ratio(best(seconds, "SDPA"), seconds[OURS])}
        yield Row(
            f"chunked prefill 512 on 4096, pages of 16, {name_of(dtype)}",
            1e3 * statistics.median(seconds[OURS]),
            ratios,
            target,
        )


def speculative(rounds: int) -> Iterator[Row]:
    """Several query tokens at once on long caches (of which there are enough to leave the processor's caches)."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = DecodeShape(32, 8, 128, 16, dtype)
        lengths = [4096] * (-(-(128 << 20) // (4096 * shape.token_bytes)))
        contenders = {str(n): pagedflash_decode(decode_problem(shape, lengths, num_queries=n)) for n in (1, 2, 4, 8, 16)}
        seconds = interleave(contenders, rounds)
        for name in list(seconds)[1:]:
            ratios = {"1 token": ratio(seconds["1"], seconds[name])}
            target = {"2": "0.67", "4": "0.67", "8": "0.33", "16": "0.33"}[name]
            yield Row(
                f"decode 32/8, {name} tokens, {name_of(dtype)}", 1e3 * statistics.median(seconds[name]), ratios, target
            )


CASES: dict[str, Callable[[int], Iterator[Row]]] = {
    "decode": decode,
    "hot": hot,
    "prefill": prefill,
    "options": options,
    "chunked": chunked,
    "speculative": speculative,
}


def versions() -> dict[str, str]:
    found = {
        "date": date.today().isoformat(),
        "device": describe_device("cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        from importlib.metadata import version

        found["openvino"] = version("openvino")
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    console = Console(width=170)
    rows: list[Row] = []
    table = Table(title=", ".join(f"{key} {value}" for key, value in versions().items()))
    for column in ("case", "ms", "theirs / ours: median (of the best rounds)", "wanted"):
        table.add_column(column)
    for name in arguments.cases:
        for row in CASES[name](arguments.rounds):
            rows.append(row)
            ratios = ", ".join(f"{found.median:.2f} ({found.best:.2f}) {other}" for other, found in row.ratios.items())
            console.print(f"{row.case}: {row.milliseconds:.3f} ms, {ratios}")
            table.add_row(row.case, f"{row.milliseconds:.3f}", ratios, row.target)
    console.print(table)
    if arguments.json is not None:
        report: dict[str, Any] = {
            **versions(),
            "rows": [row._asdict() | {"ratios": {k: r._asdict() for k, r in row.ratios.items()}} for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
