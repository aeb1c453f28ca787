"""How dispatches run: unchecked or checked, and in which order. Set by `simulate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch

from .counters import Dispatch
from .errors import KernelError

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


def in_every_order(run: Callable[[], Sequence[torch.Tensor]], check: bool = True, seed: int = 0) -> Sequence[torch.Tensor]:
    """Run something in every order of threads and require the same results, bit for bit.

    Args:
        run: launches kernels and returns what they computed, from the same inputs each time.
        check: as for `simulate`.
        seed: of the random order.

    Returns:
        the results.

    Raises:
        KernelError: two orders give different results.
    """
    results = {}
    for order in ORDERS:
        with simulate(check, order, seed):
            results[order] = run()
        for n, (first, this) in enumerate(zip(results["forward"], results[order], strict=True)):
            different = first.contiguous().view(torch.uint8) != this.contiguous().view(torch.uint8)
            if different.any():
                count = int(different.sum())
                raise KernelError(f"result {n} depends on the order of threads: {count} bytes differ in {order} order")
    return results["forward"]
