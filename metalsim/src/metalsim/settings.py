"""How dispatches run: unchecked or checked, and in which order. Set by `simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from .counters import Dispatch

Order = Literal["forward", "reverse", "random"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")


@dataclass
class Simulation:
    """The settings of a `simulate` block, and what its dispatches did."""

    check: bool = False
    order: Order = "forward"
    seed: int = 0
    dispatches: list[Dispatch] = field(default_factory=list)


_current: ContextVar[Simulation | None] = ContextVar("metalsim_simulation", default=None)
_unchecked = Simulation()


def current() -> Simulation:
    """The innermost `simulate` block, or the default: unchecked, forward."""
    return _current.get() or _unchecked


@contextmanager
def simulate(check: bool = True, order: Order = "forward", seed: int = 0) -> Iterator[Simulation]:
    """Run the dispatches inside the block with checks and counters, or in another order of threads.

    Args:
        check: report errors of the kernel as exceptions and count what it does. Costs about 10 x the time.
        order: the order in which lanes, simdgroups and threadgroups take their turns.
        seed: of the random order.

    Yields:
        the settings; its `dispatches` lists what each dispatch did, in order (with `check` only).
    """
    if order not in ORDERS:
        raise ValueError(f"order is one of {ORDERS}, not {order!r}")
    token = _current.set(Simulation(check, order, seed))
    try:
        yield current()
    finally:
        _current.reset(token)
