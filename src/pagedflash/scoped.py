"""Overrides for the length of a ``with`` block: a backend, a compiler, an instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Scoped(Generic[T]):
    """A value that holds inside ``with scoped.use(value):``.

    Blocks nest: each restores what held before it. A thread or task that has entered a block of its own sees that one. One
    that has entered none, as the thread on which an engine runs a model, sees the block entered last of those still open.
    """

    def __init__(self, name: str) -> None:
        self._own: ContextVar[T | None] = ContextVar(name, default=None)
        self._open: list[T] = []

    @property
    def current(self) -> T | None:
        """The value in force here; None outside all blocks."""
        if not self._open:
            return None
        own = self._own.get()
        return self._open[-1] if own is None else own

    @contextmanager
    def use(self, value: T) -> Iterator[None]:
        token = self._own.set(value)
        self._open.append(value)
        try:
            yield
        finally:
            # By identity, and the last such: threads leave their blocks in any order.
            last = max(index for index, other in enumerate(self._open) if other is value)
            del self._open[last]
            self._own.reset(token)
