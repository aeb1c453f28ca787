"""``pagedflash bench --device mps --sweep``: finds the numbers of the Metal tiling that suit this machine's GPU best.

It times the kernels with each of the plausible numbers, prints what they take, and stores the best for this GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from ..backends.metal.compiler import current_target, use_compiler
from ..backends.metal.tuning import VARIABLE, Tuning, gpu_name, store_tuning, tuning_in_force
from ..dispatch import use_backend
from ..interface import flash_attn_func, flash_attn_with_kvcache
from ..testing import paged_problem
from .generate import GenerateError
from .measure import Clock, WallClock, best_device

Run = Callable[[], object]

CANDIDATES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "decode": {
        "load_registers": (8, 16, 32, 64),
        "lane_rows": (1, 4),
        "decode_rows": (8, 16),
        "decode_simdgroups": (2, 4, 8),
        "simdgroups_per_core": (13, 26, 46, 104),
    },
    "prefill": {"prefill_keys": (16, 32), "prefill_simdgroups": (2, 4, 8), "prefill_registers": (40, 64, 96)},
}
"""Kernel -> the numbers that concern it, and the values to try, one number after the other."""

LEAST_GAIN = 0.02
"""A number is taken for another only where that saves so much of the time."""

SAMPLES = 5
"""Rounds of one value; their median counts."""


class Step(NamedTuple):
    """One value of one number."""

    tuning: Tuning
    kernel: str
    seconds: tuple[float, ...]  # of each case


def cases(device: str) -> dict[str, dict[str, Run]]:
    """Kernel -> what to time: models of 32 heads in float16, one of wide heads in float32."""
    decode: dict[str, Run] = {}
    for batch, heads, head_dim, dtype in (
        (1, (32, 8), 128, torch.float16),
        (8, (32, 8), 128, torch.float16),
        (8, (32, 2), 128, torch.float16),
        (1, (16, 4), 256, torch.float32),
    ):
        q, k, v, lengths, table = paged_problem([4096] * batch, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
        name = f"{batch} x 4096 keys, {heads[0]}/{heads[1]} heads of {head_dim}"
        decode[name] = lambda q=q, k=k, v=v, lengths=lengths, table=table: flash_attn_with_kvcache(  # type: ignore[misc]
            q, k, v, cache_seqlens=lengths, block_table=table, causal=True
        )
    prefill: dict[str, Run] = {}
    for heads, head_dim, dtype in (((32, 8), 128, torch.float16), ((16, 4), 256, torch.float32)):
        q, k, v = (torch.randn(1, 1024, n, head_dim, dtype=dtype, device=device) for n in (heads[0], heads[1], heads[1]))
        prefill[f"1024 tokens, {heads[0]}/{heads[1]} heads of {head_dim}"] = lambda q=q, k=k, v=v: flash_attn_func(  # type: ignore[misc]
            q, k, v, causal=True
        )
    return {"decode": decode, "prefill": prefill}


def sweep(runs: Mapping[str, Mapping[str, Run]], clock: Clock) -> Iterator[Step]:
    """Try the candidates, one number after the other, each time from the best so far. The last step is the best."""
    compile_shader, core_count, _ = current_target()
    best = Tuning()
    for kernel, numbers in CANDIDATES.items():
        fastest: Step | None = None
        for name, values in numbers.items():
            start = best
            for value in (getattr(start, name), *values):
                tuning = start._replace(**{name: value})
                if fastest is not None and tuning == fastest.tuning:
                    continue
                with use_compiler(compile_shader, core_count, tuning), use_backend("metal"):
                    step = Step(tuning, kernel, tuple(_seconds(run, clock) for run in runs[kernel].values()))
                yield step
                if fastest is None or _ratio(step, fastest) < 1 - LEAST_GAIN:
                    fastest, best = step, tuning
    yield Step(best, "", ())


def _seconds(run: Run, clock: Clock) -> float:
    run()  # compiles
    timer = clock.prepare(run)
    return statistics.median(timer() for _ in range(SAMPLES))


def _ratio(step: Step, other: Step) -> float:
    """Geometric mean of how long the cases take, to how long they take in another step."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(step.seconds, other.seconds)))


def main(device: str | None) -> None:
    """Sweep, print a table for each kernel, and store the best.

    Args:
        device: ``"mps"``; the best one present if None.

    Raises:
        GenerateError: it is no Apple GPU, or the environment variable would hide what is stored.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    if (device or best_device()) != "mps":
        raise GenerateError(f"--sweep is for Apple GPUs, and the device is {device or best_device()}")
    if tuning_in_force().source == VARIABLE:
        raise GenerateError(f"{VARIABLE} is set, and goes before what --sweep stores; unset it")
    console, runs = Console(highlight=False), cases("mps")
    # Calls are put in a queue: several together, the host's part of a call is hidden behind the one before.
    clock = WallClock("mps", calls=20)
    steps: list[Step] = []
    with torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for step in sweep(runs, clock):
            steps.append(step)
            progress.update(task, description=f"{step.kernel}: {_in_words(step.tuning)}")
    for kernel, of_kernel in runs.items():
        table = Table(title=f"{kernel} on {gpu_name()}: microseconds a call", title_justify="left")
        table.add_column("tuning", no_wrap=True)
        for case in of_kernel:
            table.add_column(case, justify="right")
        for step in steps:
            if step.kernel == kernel:
                numbers = _in_words(step.tuning).replace(",", "\n")
                table.add_row(numbers, *(f"{seconds * 1e6:.1f}" for seconds in step.seconds))
        console.print(table)
    best = steps[-1].tuning
    file = store_tuning(best)
    console.print(f"Best: {_in_words(best)}. In force on this GPU from now on, from {file}: delete it to undo this.")
    console.print(f'{VARIABLE}="name=number,..." goes before it, where it is set.')


def _in_words(tuning: Tuning) -> str:
    return str(tuning) or "defaults"
