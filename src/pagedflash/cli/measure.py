"""Measuring: all contenders for one problem run in interleaved rounds in one process; what is reported are medians.

What a busy machine does meanwhile then hits all of them alike, and a ratio is the median of ratios within a round.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.metal.tuning import gpu_name
from ..dispatch import DEVICE_BACKENDS, availability

SETTLE_SECONDS = 0.03
"""Idle threads of the previous contender spin for a while and would slow the next one: they get this long to stop."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""How far the outputs of two contenders may be apart, relative to their size."""


def as_it_is(result: Any) -> Any:
    return result


class Contender(NamedTuple):
    """One implementation on one problem."""

    run: Callable[[], Any]
    output: Callable[[Any], Tensor] | None = as_it_is
    """From what ``run`` returns to a tensor of the shape that all contenders share, outside the timing. None: it has no
    output to compare."""


class Clock(Protocol):
    def prepare(self, run: Callable[[], Any]) -> Callable[[], float]:
        """What times one round of ``run``, which has run once: seconds a call."""
        ...


@dataclass(frozen=True)
class WallClock:
    """Times ``calls`` calls together, and waits for the device.

    Where there are several, others come before that are not timed: one on a CPU, as many on a GPU, which lowers its clock
    when it idles and so gets no time to settle either.
    """

    device: str = "cpu"
    calls: int = 1
    settle: float = SETTLE_SECONDS

    def prepare(self, run: Callable[[], Any]) -> Callable[[], float]:
        untimed = 0 if self.calls == 1 else 1 if self.device == "cpu" else self.calls

        def seconds_a_call() -> float:
            if self.device == "cpu":
                time.sleep(self.settle)
            for _ in range(untimed):
                run()
            self._wait()
            start = time.perf_counter()
            for _ in range(self.calls):
                run()
            self._wait()
            return (time.perf_counter() - start) / self.calls

        return seconds_a_call

    def _wait(self) -> None:
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as long as ours their rounds take: the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


class Measured(NamedTuple):
    """What :func:`interleave` found, by the contenders' names."""

    seconds: dict[str, list[float]]  # a call, in each round
    differences: dict[str, float]  # of the output to the first contender's, relative; only those that have an output
    tolerance: float  # of the differences

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, theirs: str, ours: str) -> float:
        """How many times as long as ``ours`` ``theirs`` takes."""
        return ratio(self.seconds[theirs], self.seconds[ours])

    def fastest(self) -> dict[str, str]:
        """Each contender, and the name of its fastest variant: ``"SDPA, folded"`` is a variant of ``"SDPA"``."""
        found: dict[str, str] = {}
        for name in self.seconds:
            contender = name.partition(",")[0]
            found[contender] = min(found.get(contender, name), name, key=self.median)
        return found

    def disagreements(self) -> list[str]:
        """The outputs that are further apart than rounding explains, in words."""
        first = next(iter(self.differences), "")
        return [
            f"the output of {name} differs from that of {first} by {difference:.2g}, relative to its size"
            for name, difference in self.differences.items()
            if not difference <= self.tolerance
        ]


def interleave(contenders: Mapping[str, Contender], rounds: int, clock: Clock) -> Measured:
    """Time all contenders in each of ``rounds`` rounds, and compare what they give."""
    timers: dict[str, Callable[[], float]] = {}
    differences: dict[str, float] = {}
    first: Tensor | None = None
    for name, (run, output) in contenders.items():
        result = run()
        if output is not None:
            mine = output(result)
            first = mine if first is None else first
            differences[name] = _difference(mine, first)
        timers[name] = clock.prepare(run)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer())
    return Measured(seconds, differences, 0.0 if first is None else TOLERANCE[first.dtype])


def _difference(output: Tensor, reference: Tensor) -> float:
    if output.shape != reference.shape:
        raise ValueError(f"an output is of shape {tuple(output.shape)}, another of {tuple(reference.shape)}")
    return float((output.float() - reference.float()).norm() / reference.float().norm())


class Load:
    """How busy others keep the machine, from when this is made on. What the system does not say is taken as 0."""

    MUCH = 0.1

    def __init__(self) -> None:
        self.before = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
        self._start = self._now()

    def report(self) -> dict[str, float]:
        """Shares of the machine's processors: waited for before (load average), taken meanwhile by other programs, and by
        other virtual machines (steal)."""
        total, busy, steal, ours = (now - then for now, then in zip(self._now(), self._start))
        others = max(0.0, busy - ours)
        shares = {
            "before": self.before,
            "others": others / total if total else 0.0,
            "steal": steal / total if total else 0.0,
        }
        return {name: round(share, 3) for name, share in shares.items()}

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Seconds of all processors: all, busy, stolen; and busy for this process."""
        times = os.times()
        ours = times.user + times.system + times.children_user + times.children_system
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return 0.0, 0.0, 0.0, ours
        user, nice, system, idle, iowait, irq, softirq, steal = (tick / os.sysconf("SC_CLK_TCK") for tick in ticks)
        busy = user + nice + system + irq + softirq
        return busy + idle + iowait + steal, busy, steal, ours


def describe_load(load: Mapping[str, float]) -> str:
    """What :meth:`Load.report` found, in one sentence if it disturbs a measurement, else empty."""
    words = [f"other programs took {load['others']:.0%} of its processors"] if load["others"] > Load.MUCH else []
    words += [f"other virtual machines {load['steal']:.0%}"] if load["steal"] > Load.MUCH / 5 else []
    if not words and load["before"] > 2 * Load.MUCH:
        words = [f"its load average was {load['before']:.0%} of its processors when this began"]
    return f"The machine was busy: {' and '.join(words)}. Measure again when it is quiet." if words else ""


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_device(device: str) -> str:
    """The processor, and for a CPU its threads and the instruction set that the kernels use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "mps":
        return gpu_name()
    if device != "cpu" or not availability()[DEVICE_BACKENDS["cpu"]].ok:
        return device
    from ..backends.cpu.launch import library

    native = library()
    isa = next(name for name, number in native.isas.items() if number == native.isa)
    return f"{_processor_name()}, {torch.get_num_threads()} threads, {isa}"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return apple_chip() or platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def apple_chip() -> str:
    """Such as ``"Apple M3 Max"``; empty on other machines."""
    if sys.platform != "darwin":
        return ""
    asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()
