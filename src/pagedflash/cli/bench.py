"""``pagedflash bench``: decode against context length and prefill against prompt length, beside what else is installed.

A decode step reads each cached key and value once, so its speed is the bytes of the cache over the time of a call, and its
limit is what the machine streams from memory. Prefill is bound by arithmetic: its speed is in floating-point operations.
Every figure of the documentation is printed by a suite of ``benchmarks/`` of the repository.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..interface import flash_attn_func, flash_attn_with_kvcache
from ..testing import PagedProblem, paged_problem
from . import baselines
from .baselines import flex, sdpa
from .baselines.packed import PackedProblem
from .measure import Contender, Load, Measured, WallClock, best_device, describe_device, describe_load, interleave

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPTS = (128, 256, 512, 1024, 2048)
CACHE_BYTES = 160 << 20
"""Keys and values of all sequences together: more than a processor's cache, so that memory is what is measured."""

STREAM_BYTES = 1 << 30

OURS, STREAMING = "pagedflash", "streaming"


class Shape(NamedTuple):
    """Heads and pages, by the names of :func:`~pagedflash.testing.paged_problem`; the defaults are Llama 3's 8B."""

    heads: tuple[int, int] = (32, 8)  # (Hq, Hkv)
    head_dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.heads[1] * self.head_dim * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.heads[0]}/{self.heads[1]} heads of {self.head_dim}, {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------------------------
# Contenders
# --------------------------------------------------------------------------------------------------------------------


def pagedflash_decode(problem: PagedProblem) -> Contender:
    q, k_cache, v_cache, lengths, table = problem
    return Contender(
        lambda: flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True)
    )


def streaming(device: str = "cpu", size: int = STREAM_BYTES) -> Contender:
    """Read ``size`` bytes, far more than any cache holds, with all of torch's threads."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return Contender(data.sum, output=None)


def decode_contenders(problem: PagedProblem) -> dict[str, Contender]:
    """pagedflash, and what torch alone offers."""
    contenders = {OURS: pagedflash_decode(problem), "gather + SDPA, enable_gqa": sdpa.gather_decode(problem, fold=False)}
    if problem.q.shape[2] != problem.k_cache.shape[2] and problem.q.shape[1] == 1:
        contenders["gather + SDPA, folded"] = sdpa.gather_decode(problem, fold=True)
    return contenders


def dense_prompt(tokens: int, shape: Shape, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v ``(1, tokens, H, D)``."""
    q_heads, kv_heads = shape.heads
    q, k, v = (torch.randn(1, tokens, n, shape.head_dim).to(device, shape.dtype) for n in (q_heads, kv_heads, kv_heads))
    return q, k, v


def prefill_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
    """A causal prompt: pagedflash, and what torch alone offers."""
    return {
        OURS: Contender(lambda: flash_attn_func(q, k, v, causal=True)),
        "SDPA, enable_gqa": sdpa.prompt(q, k, v, repeat=False),
        "SDPA, repeated": sdpa.prompt(q, k, v, repeat=True),
    }


def decode_peers(problem: PagedProblem) -> baselines.Peers:
    """Packages that decode over pages on the problem's device."""
    device = problem.q.device.type
    if device == "cpu":
        return baselines.cpu_decode(problem)
    return baselines.cuda_decode(problem) if device == "cuda" else {}


def prefill_peers(q: Tensor, k: Tensor, v: Tensor) -> baselines.Peers:
    """Packages, and what torch has to compile, for a causal prompt."""
    device, length = q.device.type, q.shape[1]
    peers: baselines.Peers = baselines.cpu_prefill(q, k, v) if device == "cpu" else {}
    if device == "cuda":
        packed = PackedProblem(q[0], k[0], v[0], [length], [length])
        peers = {name: partial(_as_batch, make) for name, make in baselines.cuda_prefill(packed).items()}
    return peers | {"flex_attention": partial(flex.prefill, q, k, v)}


def _as_batch(make: Callable[[], Contender]) -> Contender:
    run, output = make()
    return Contender(run, (lambda out: output(out).unsqueeze(0)) if output else None)


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def main(
    device: str | None = None,
    dtype: torch.dtype | None = None,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    contexts: Sequence[int] = CONTEXTS,
    prompts: Sequence[int] = PROMPTS,
    cache_bytes: int = CACHE_BYTES,
    rounds: int = 7,
) -> dict[str, Any]:
    """Measure, print two tables and a verdict, and write JSON and a picture if asked. Returns what the JSON file holds.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; the best one present if None.
        dtype: of the cache; float32 on a CPU and float16 elsewhere if None.
        json_file: where to write the results as JSON.
        plot_file: where to draw them (any format matplotlib knows, by its suffix).
        contexts: tokens in the cache of each sequence, for decode.
        prompts: tokens of a prompt, for prefill.
        cache_bytes: of all sequences together, for decode.
        rounds: how often every contender is measured.
    """
    from rich.console import Console
    from rich.progress import Progress

    if plot_file is not None:
        import matplotlib  # noqa: F401 (missing, it is said before anything is measured)

    device = device or best_device()
    shape = Shape(dtype=dtype or (torch.float32 if device == "cpu" else torch.float16))
    report: dict[str, Any] = {
        "device": describe_device(device),
        "torch": torch.__version__,
        "shape": {**shape._asdict(), "dtype": dtype_name(shape.dtype)},
        "decode": [],
        "prefill": [],
        "left out": {},
    }
    left_out: dict[str, str] = report["left out"]
    load = Load()
    # Calls on a GPU are put in a queue: several together, the host's part of a call is hidden behind the one before.
    clock = WallClock(device, calls=1 if device == "cpu" else 20)
    with torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(contexts) + len(prompts))
        for row in _decode_rows(shape, contexts, cache_bytes, rounds, clock, left_out):
            report["decode"].append(row)
            progress.update(task, advance=1, description=f"decode, {row['context']} tokens")
        for row in _prefill_rows(shape, prompts, rounds, clock, left_out):
            report["prefill"].append(row)
            progress.update(task, advance=1, description=f"prefill, {row['tokens']} tokens")
    report["load"] = load.report()
    report["verdict"] = verdict(report)
    _print_report(Console(), shape, report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if plot_file is not None:
        _plot(shape, report, plot_file)
    return report


def _decode_rows(
    shape: Shape, contexts: Sequence[int], cache_bytes: int, rounds: int, clock: WallClock, left_out: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """GB/s of keys and values read, and of streaming."""
    stream_bytes = min(STREAM_BYTES, 8 * cache_bytes)
    stream = streaming(clock.device, stream_bytes)
    for context in contexts:
        batch = max(1, cache_bytes // (context * shape.token_bytes))
        problem = paged_problem([context] * batch, **shape._asdict(), device=clock.device)
        contenders = _with_peers(decode_contenders(problem), decode_peers(problem), left_out)
        measured = interleave({**contenders, STREAMING: stream}, rounds, clock)
        speeds = _speeds(measured, problem.cache_bytes / 1e9)
        speeds[STREAMING] = stream_bytes / 1e9 / measured.median(STREAMING)
        yield {"context": context, "batch": batch, "gb_per_second": speeds, "seconds": measured.seconds}


def _prefill_rows(
    shape: Shape, prompts: Sequence[int], rounds: int, clock: WallClock, left_out: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """TFLOP/s of a causal prompt."""
    for tokens in prompts:
        prompt = dense_prompt(tokens, shape, clock.device)
        measured = interleave(_with_peers(prefill_contenders(*prompt), prefill_peers(*prompt), left_out), rounds, clock)
        operations = 4 * shape.heads[0] * shape.head_dim * tokens * (tokens + 1) / 2
        yield {"tokens": tokens, "tflop_per_second": _speeds(measured, operations / 1e12), "seconds": measured.seconds}


def _with_peers(ours: dict[str, Contender], peers: baselines.Peers, left_out: dict[str, str]) -> dict[str, Contender]:
    """Who was left out once is not tried again."""
    return ours | baselines.that_run({name: peers[name] for name in peers if name not in left_out}, left_out.__setitem__)


def _speeds(measured: Measured, work: float) -> dict[str, float]:
    """``work`` a second, of the fastest variant of each contender."""
    return {name: work / measured.median(variant) for name, variant in measured.fastest().items()}


def verdict(report: Mapping[str, Any]) -> str:
    """The whole report in one line."""
    decode = [row["gb_per_second"] for row in report["decode"]]
    prefill = [row["tflop_per_second"] for row in report["prefill"]]
    share = max(speeds[OURS] / speeds[STREAMING] for speeds in decode)
    return (
        f"pagedflash decodes at up to {share:.0%} of streaming bandwidth, {_beside(decode)}; it prefills {_beside(prefill)}."
    )


def _beside(rows: list[dict[str, float]]) -> str:
    """How many times as fast as each other contender, over the rows that have it."""
    others = dict.fromkeys(name for row in rows for name in row if name not in (OURS, STREAMING))
    found = [f"{_range([row[OURS] / row[name] for row in rows if name in row])} x as fast as {name}" for name in others]
    return ", ".join(found)


def _range(values: list[float]) -> str:
    least, most = f"{min(values):.2g}", f"{max(values):.2g}"
    return least if least == most else f"{least} to {most}"


class _Part(NamedTuple):
    """How one half of the report is shown."""

    rows: str
    size: str
    speed: str
    title: str
    xlabel: str


_PARTS = (
    _Part("decode", "context", "gb_per_second", "Decode, GB/s of keys and values", "tokens in the cache of each sequence"),
    _Part("prefill", "tokens", "tflop_per_second", "Prefill, causal, TFLOP/s", "tokens of the prompt"),
)


def _columns(rows: Sequence[Mapping[str, Any]], part: _Part) -> list[str]:
    """All contenders of any row: not everyone takes every size."""
    return list(dict.fromkeys(name for row in rows for name in row[part.speed]))


def _reasons(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> contenders that were left out for it, without their variants."""
    found: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names, contender = found.setdefault(reason, []), name.partition(",")[0]
        if contender not in names:
            names.append(contender)
    return found


def _print_report(console: Console, shape: Shape, report: Mapping[str, Any]) -> None:
    from rich.table import Table

    console.print(f"{report['device']}, torch {report['torch']}: {shape}", soft_wrap=True, highlight=False)
    for part in _PARTS:
        rows = report[part.rows]
        table = Table(title=part.title, title_justify="left")
        columns = _columns(rows, part)
        for column in (part.size, *columns):
            table.add_column(column, justify="right")
        for row in rows:
            speeds = row[part.speed]
            table.add_row(str(row[part.size]), *(f"{speeds[name]:.3g}" if name in speeds else "" for name in columns))
        console.print(table)
    for reason, names in _reasons(report["left out"]).items():
        console.print(f"without {', '.join(names)}: {reason}", style="dim", soft_wrap=True, highlight=False, markup=False)
    if busy := describe_load(report["load"]):
        console.print(busy, style="yellow", soft_wrap=True, highlight=False)
    console.print(report["verdict"], soft_wrap=True, highlight=False)


def _plot(shape: Shape, report: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"{report['device']}, {shape}", fontsize=10)
    for part, axes in zip(_PARTS, figure.subplots(1, len(_PARTS))):
        rows = report[part.rows]
        lines = {name: [row[part.speed].get(name, math.nan) for row in rows] for name in _columns(rows, part)}
        draw_lines(axes, [row[part.size] for row in rows], lines, part.xlabel, part.title)
    figure.savefig(file, dpi=150)


def draw_lines(axes: Axes, x: Sequence[float], lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> None:
    """One line for each contender, and a dashed one for the limit that streaming sets."""
    for name, values in lines.items():
        if name == STREAMING:
            axes.plot(x, values, color="0.6", linestyle="--", label="streaming limit")
        else:
            axes.plot(x, values, marker="o", linewidth=2.5 if name == OURS else 1.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.margins(y=0.25)  # room for the legend
    axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper right")
