"""Finds the numbers of the tiling that suit this machine's GPU best.

    python -m pagedflash.backends.metal.tune

times the kernels with each of the plausible numbers, prints what they take, and says which environment variable keeps the
best ones. Nothing is stored.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from ... import flash_attn_func, flash_attn_with_kvcache, use_backend
from ...testing import paged_problem
from .compiler import current_target, use_compiler
from .tiling import TUNING_VARIABLE, Tuning

Run = Callable[[], object]
Clock = Callable[[Run], float]

CANDIDATES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "decode": {"load_registers": (8, 16, 32, 64), "decode_simdgroups": (2, 4, 8), "simdgroups_per_core": (8, 13, 26)},
    "prefill": {"prefill_keys": (16, 32), "prefill_simdgroups": (2, 4, 8), "prefill_registers": (64, 96, 128)},
}
"""Kernel -> the numbers that concern it, and the values to try, one number after the other."""

LEAST_GAIN = 0.02
"""A number is taken for another only where that saves so much of the time."""

SAMPLES, CALLS = 5, 20


class Step(NamedTuple):
    """One value of one number."""

    tuning: Tuning
    kernel: str
    seconds: tuple[float, ...]  # of each case


def cases(device: str) -> dict[str, dict[str, Run]]:
    """Kernel -> what to time: a model of 32 heads in float16, one of wide heads in float32."""
    decode: dict[str, Run] = {}
    for batch, heads, head_dim, dtype in (
        (1, (32, 8), 128, torch.float16),
        (8, (32, 8), 128, torch.float16),
        (1, (16, 4), 256, torch.float32),
    ):
        q, k, v, lengths, table = paged_problem([4096] * batch, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
        name = f"{batch} x {heads[0]}/{heads[1]} heads of {head_dim}, 4096 keys"
        decode[name] = lambda q=q, k=k, v=v, lengths=lengths, table=table: flash_attn_with_kvcache(  # type: ignore[misc]
            q, k, v, cache_seqlens=lengths, block_table=table, causal=True
        )
    prefill: dict[str, Run] = {}
    for heads, head_dim, dtype in (((32, 8), 128, torch.float16), ((16, 4), 256, torch.float32)):
        q, k, v = (torch.randn(1, 1024, n, head_dim, dtype=dtype, device=device) for n in (heads[0], heads[1], heads[1]))
        prefill[f"{heads[0]}/{heads[1]} heads of {head_dim}, 1024 tokens"] = lambda q=q, k=k, v=v: flash_attn_func(  # type: ignore[misc]
            q, k, v, causal=True
        )
    return {"decode": decode, "prefill": prefill}


def sweep(runs: Mapping[str, Mapping[str, Run]], clock: Clock) -> Iterator[Step]:
    """Try the candidates, one number after the other, each time from the best so far. The last step is the best."""
    compile_shader, core_count, best = current_target()
    for kernel, numbers in CANDIDATES.items():
        fastest: Step | None = None
        for name, values in numbers.items():
            start = best
            for value in (getattr(start, name), *values):
                tuning = start._replace(**{name: value})
                if fastest is not None and tuning == fastest.tuning:
                    continue
                with use_compiler(compile_shader, core_count, tuning), use_backend("metal"):
                    step = Step(tuning, kernel, tuple(clock(run) for run in runs[kernel].values()))
                yield step
                if fastest is None or _ratio(step, fastest) < 1 - LEAST_GAIN:
                    fastest, best = step, tuning
    yield Step(best, "", ())


def _ratio(step: Step, other: Step) -> float:
    """Geometric mean of how long the cases take, to how long they take in another step."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(step.seconds, other.seconds)))


def seconds_a_call(run: Run) -> float:
    """The median of some samples of many calls, after a burst that wakes the GPU up."""
    for _ in range(CALLS):
        run()
    samples = []
    for _ in range(SAMPLES):
        torch.mps.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        torch.mps.synchronize()
        samples.append((time.perf_counter() - start) / CALLS)
    return statistics.median(samples)


def override(tuning: Tuning) -> str:
    """What the environment variable has to say for ``tuning``; empty for the defaults."""
    defaults = Tuning()
    changed = {name: value for name, value in tuning._asdict().items() if value != getattr(defaults, name)}
    return ",".join(f"{name}={value}" for name, value in changed.items())


def main() -> None:
    if not torch.backends.mps.is_available():
        sys.exit("pagedflash: there is no Apple GPU to tune for: PyTorch finds no MPS device")
    runs = cases("mps")
    print(f"{current_target().core_count} GPU cores; microseconds a call")
    kernel = ""
    for step in sweep(runs, seconds_a_call):
        if step.seconds:
            if step.kernel != kernel:
                kernel = step.kernel
                print(f"\n{kernel}: " + " | ".join(runs[kernel]))
            times = "  ".join(f"{seconds * 1e6:9.1f}" for seconds in step.seconds)
            print(f"{times}  {override(step.tuning) or 'as it is'}")
        elif keep := override(step.tuning):
            print(f'\nTo keep the best:  export {TUNING_VARIABLE}="{keep}"')
        else:
            print("\nThe defaults are the best.")


if __name__ == "__main__":
    main()
