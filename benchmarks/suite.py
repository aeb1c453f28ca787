"""What a suite is: a function that yields rows, registered under a name whose first word is its group."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from pagedflash.cli import baselines
from pagedflash.cli.bench import OURS
from pagedflash.cli.measure import Clock, Contender, Measured, interleave

Size = TypeVar("Size")
Figures = dict[str, Any]


class Options(NamedTuple):
    """What the command line says to a suite."""

    rounds: int | None = None  # None: as many as the suite usually takes
    quick: bool = False  # tiny sizes: to see that it runs

    def rounds_or(self, usual: int) -> int:
        return self.rounds or (2 if self.quick else usual)

    def size(self, usual: Size, quick: Size) -> Size:
        return quick if self.quick else usual


class Row(NamedTuple):
    """One line of a suite's table."""

    case: str
    figures: Figures  # column -> number or word
    failures: Sequence[str] = ()  # properties that the documentation states and this row lacks, in words
    seconds: Mapping[str, list[float]] | None = None  # contender -> times of a call, behind the figures
    x: tuple[str, float] | None = None  # where it lies on which axis, for suites whose plot is a line


class Suite(NamedTuple):
    name: str
    run: Callable[[Options], Iterator[Row]]
    needs: Callable[[], str]  # what is missing here for it to run, "" if nothing

    @property
    def description(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]


SUITES: dict[str, Suite] = {}

left_out: dict[str, str] = {}
"""Baseline -> why it was left out."""

not_wanted: list[str] = []
"""Baselines that are left out whatever is installed: how their names begin."""


def suite(
    name: str, needs: Callable[[], str] = lambda: ""
) -> Callable[[Callable[[Options], Iterator[Row]]], Callable[[Options], Iterator[Row]]]:
    """Register a suite. The first line of its docstring is its description."""

    def register(run: Callable[[Options], Iterator[Row]]) -> Callable[[Options], Iterator[Row]]:
        SUITES[name] = Suite(name, run, needs)
        return run

    return register


def that_run(peers: baselines.Peers) -> dict[str, Contender]:
    """Those that can be made and run here, and are wanted. Of each other it is said once why it is left out."""
    wanted = {name: make for name, make in peers.items() if not name.startswith(tuple(not_wanted))}
    return baselines.that_run(wanted, leave_out)


def leave_out(name: str, reason: str) -> None:
    if left_out.get(name) != reason:
        left_out[name] = reason
        print(f"without {name}: {reason}", file=sys.stderr)


def measure(contenders: Mapping[str, Contender], rounds: int, clock: Clock) -> Measured:
    with torch.inference_mode():
        return interleave(contenders, rounds, clock)


def compared(case: str, measured: Measured, unit: str, figures: Figures | None = None, **place: Any) -> Row:
    """A row of our time, of what ``figures`` says of it, and of each other contender: its time, and how often that is ours.

    Only contenders with an output are compared. The fastest variant of each counts.
    """
    scale = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    row: Figures = {unit: scale * measured.median(OURS), **(figures or {})}
    for name, variant in measured.fastest().items():
        if name != OURS and variant in measured.differences:
            row |= {f"{name} {unit}": scale * measured.median(variant), f"x {name}": measured.ratio(variant, OURS)}
    return Row(case, row, measured.disagreements(), measured.seconds, **place)
