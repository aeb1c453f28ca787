"""What is kept from one call to the next: for each signature, that it is valid and the backends' plans for it.

A signature is what problems with the same shapes, strides, dtypes, devices and options share, at any addresses and with any
values. An eager call of a model's layer is mostly like the one before: it finds its entry and adds the addresses of its
tensors. The cache is bounded: where there are too many signatures, all are forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .signature import signature

if TYPE_CHECKING:
    from .problem import _Flat

MAX_SIGNATURES = 4096

Problem = TypeVar("Problem", bound="_Flat")


class TensorSpec:
    """What a signature holds of a tensor, with a tensor's names for it. No address, no values."""

    __slots__ = ("_strides", "device", "dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self._strides = tensor.stride()
        self.dtype = tensor.dtype
        self.device = tensor.device

    def stride(self, axis: int | None = None) -> Any:
        return self._strides if axis is None else self._strides[axis]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


class Entry:
    """What is kept for one signature."""

    __slots__ = ("is_plain", "plans", "problem", "ready_for", "signature")

    def __init__(self, signature: Any, is_plain: bool) -> None:
        self.signature = signature
        self.is_plain = is_plain
        """Whether kernels may be given the addresses of the tensors: no gradient is tracked, no negative bit is set."""
        self.ready_for: object = None
        """The backend that the signature is valid for and that supports it."""
        self.plans: dict[Hashable, Any] = {}
        self.problem: Any = None
        """For a signature of arguments: (numbers, entry, names for errors) of the problem that they became."""


_entries: dict[Hashable, Entry] = {}


def entry_of(problem: _Flat) -> Entry | None:
    """The entry of a problem; made if it is the first of its signature. None where its tensors cannot be told apart."""
    numbers = _rounded(problem.numbers, problem.HINT)
    found = _find(problem.tensors, (None, *numbers), lambda: Entry(signature_of(problem), _is_plain(problem.tensors)))
    return None if found is None else found[0]


def entry_of_arguments(tensors: tuple[object, ...], options: tuple[Hashable, ...]) -> tuple[Entry, bytes | None] | None:
    """The entry of the arguments of a public function, as they came, and their addresses if these are known.

    Args:
        options: an int for the function, then all that is no tensor of a problem.
    """
    return _find(tensors, options, _entry_of_nothing)


def _entry_of_nothing() -> Entry:
    return Entry(None, False)


def signature_of(problem: Problem) -> Problem:
    """The problem with a :class:`TensorSpec` in the place of each tensor, and hints rounded up as in its key."""
    numbers = _rounded(problem.numbers, problem.HINT)
    specs = tuple(None if tensor is None else TensorSpec(tensor) for tensor in problem.tensors)
    return type(problem)(specs, numbers)  # type: ignore[arg-type]


def _rounded(numbers: tuple[Any, ...], hint: int) -> tuple[Any, ...]:
    """``numbers`` with the one at ``hint`` rounded up."""
    return (*numbers[:hint], round_hint(numbers[hint]), *numbers[hint + 1 :])


def round_hint(hint: int) -> int:
    """Up to a power of two, so that the steps of a generation share their plans."""
    return 1 << (hint - 1).bit_length() if hint.__class__ is int and hint > 0 else hint


def _find(
    tensors: tuple[object, ...], options: tuple[Any, ...], make: Callable[[], Entry]
) -> tuple[Entry, bytes | None] | None:
    """The entry, and the addresses of the tensors if they were read with the signature."""
    if torch.compiler.is_compiling() or (found := signature(tensors, options)) is None:
        return None
    key, addresses = found
    entry = _entries.get(key)
    if entry is None:
        if len(_entries) >= MAX_SIGNATURES:
            _entries.clear()
        entry = _entries.setdefault(key, make())
    return entry, addresses


def _is_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    tracks_grad = torch.is_grad_enabled()
    return not any(t is not None and (t.is_neg() or (tracks_grad and t.requires_grad)) for t in tensors)
