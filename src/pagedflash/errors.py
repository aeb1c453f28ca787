"""The one form of error for a wrong argument: which one, what came, what is expected. It speaks the caller's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

Names = Mapping[str, str]
"""Field of a problem -> the caller's name of that argument, where the two differ."""

_NO_NAMES: Names = {}
ATTENTION_NAMES: Names = {"sinks": "s_aux", "scale": "softmax_scale", "cu_seqlens_new": "cu_seqlens_q"}
KVCACHE_NAMES: Names = {
    **ATTENTION_NAMES,
    "k": "k_cache",
    "v": "v_cache",
    "k_new": "k",
    "v_new": "v",
    "seqused_k": "cache_seqlens",
}
WRITE_NAMES: Names = {**KVCACHE_NAMES, "seqused_k": "seq_lens"}


class _FieldNames(dict[str, Any]):
    """Fields that have no other name stand for themselves."""

    def __missing__(self, field: str) -> str:
        return field


class InvalidArgument(Exception):
    """An argument that is wrong. ``text`` names fields of a problem, and values, in braces."""

    def __init__(self, text: str, values: Mapping[str, Any], names: Names = _NO_NAMES) -> None:
        super().__init__("pagedflash: " + text.format_map(_FieldNames({**names, **values})))
        self._text, self._values = text, values

    def renamed(self, names: Names) -> InvalidArgument:
        """The same error in the names that a public function gives to the fields."""
        return type(self)(self._text, self._values, names)


class InvalidValue(InvalidArgument, ValueError):
    """A wrong shape, value or combination."""


class InvalidType(InvalidArgument, TypeError):
    """A wrong type or dtype."""


def reject(field: str, came: str, expected: str, **values: object) -> NoReturn:
    """Raise :class:`InvalidValue` for ``field``. ``came`` and ``expected`` may hold ``{value}`` and ``{other_field}``."""
    raise InvalidValue(f"{{{field}}} is {came}, expected {expected}", values)


def reject_type(field: str, came: str, expected: str, **values: object) -> NoReturn:
    """:func:`reject` for a wrong type or dtype."""
    raise InvalidType(f"{{{field}}} is {came}, expected {expected}", values)
