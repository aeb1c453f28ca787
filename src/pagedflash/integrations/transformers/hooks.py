"""Changes to transformers that :func:`undo_all` takes back, and what names and versions are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

NAME = "pagedflash"
"""What to pass as ``attn_implementation``."""

PAGED_PREFIX = "paged|"
"""How transformers up to 5.17 names the continuous batching variant of an implementation."""

_undo: list[Callable[[], None]] = []


def any_made() -> bool:
    """Whether there is a change to take back."""
    return bool(_undo)


def undo_all() -> None:
    """Take every change back, the last one first."""
    while _undo:
        _undo.pop()()


def undo_last() -> None:
    """Take the last change back."""
    _undo.pop()()


def on_undo(action: Callable[[], None]) -> None:
    """Run ``action`` when the changes are taken back."""
    _undo.append(action)


def replace(owner: Any, name: str, value: object) -> None:
    """``owner.name`` becomes ``value``."""
    original = inspect.getattr_static(owner, name)  # class methods as they are, not bound
    setattr(owner, name, value)
    on_undo(lambda: setattr(owner, name, original))


def replace_item(table: Any, key: str, value: object) -> None:
    """``table[key]`` becomes ``value``."""
    original = table[key]
    table[key] = value
    on_undo(lambda: table.__setitem__(key, original))


def register(functions: Any, name: str, function: Callable[..., Any]) -> None:
    """``function`` gets a name in one of transformers' tables of functions."""
    functions.register(name, function)
    on_undo(lambda: functions._global_mapping.pop(name, None))


def with_globals(function: FunctionType, **names: Any) -> FunctionType:
    """A copy of ``function`` for which ``names`` stand in its module's globals. Module and function stay as they are."""
    scope = {**function.__globals__, **names}
    return FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)


def base_name(implementation: str | None) -> str:
    """The name without what transformers puts around it: ``paged|org/name@revision:function`` is ``org/name``."""
    return (implementation or "").removeprefix(PAGED_PREFIX).split(":")[0].split("@")[0].strip()


def version() -> str:
    """The version of transformers."""
    import transformers

    return str(transformers.__version__)


def version_numbers() -> tuple[int, int]:
    """The version of transformers, its first two numbers."""
    major, minor, *_ = version().split(".")
    return int(major), int(minor)
