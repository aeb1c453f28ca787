"""The memory of a checked dispatch: copies of the argument's storages, far apart from each other.

What a buffer argument may reach. Metal binds a tensor's whole storage from the storage offset on, and kernels take
strides as arguments, so a strided view rightly reaches beyond its own elements. A region is therefore a storage from
the lowest offset that any argument binds to its end. Tensors that share a storage share one region: what is stored
through one is visible through the others, and an access that leaves one for the other is not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

GUARD = 16 << 20
ALIGNMENT = 16384


@dataclass
class Area:
    """A region of the copy: [begin, end) are addresses."""

    begin: int
    end: int
    name: str
    constant: bool
    original: torch.Tensor | None = None
    copy: torch.Tensor | None = None

    def copy_back(self) -> None:
        """Make what the kernel stored visible to the caller."""
        if self.original is not None and self.copy is not None:
            self.original.copy_(self.copy)


class GuardedMemory:
    """Copies of the arguments of a dispatch, and the address at which each argument begins.

    Args:
        arguments: tensors, and numbers as bytes, by buffer index.
        names: the kernel's parameter of each buffer index, for messages.
    """

    def __init__(self, arguments: Sequence[torch.Tensor | bytes], names: Mapping[int, str]) -> None:
        self.areas: list[Area] = []
        self.addresses: list[int] = [0] * len(arguments)
        sharing: dict[int, list[int]] = {}
        for i, argument in enumerate(arguments):
            key = argument.untyped_storage().data_ptr() if isinstance(argument, torch.Tensor) else -1 - i
            sharing.setdefault(key, []).append(i)
        sizes = [_size(arguments[group[0]]) for group in sharing.values()]
        total = sum(GUARD + _round_up(size) for size in sizes) + GUARD + ALIGNMENT
        # Untouched pages of this allocation cost nothing.
        self._arena = torch.empty(total, dtype=torch.uint8)
        at = _round_up(self._arena.data_ptr()) - self._arena.data_ptr() + GUARD
        for group, size in zip(sharing.values(), sizes, strict=True):
            base = self._arena.data_ptr() + at
            name = " = ".join(f"argument {i} '{names[i]}'" if i in names else f"argument {i}" for i in group)
            self.areas.append(self._place(at, base, size, [arguments[i] for i in group], name))
            for i in group:
                argument = arguments[i]
                offset = _offset(argument) if isinstance(argument, torch.Tensor) else 0
                self.addresses[i] = base + offset
            at += _round_up(size) + GUARD

    def _place(self, at: int, base: int, size: int, sharers: list[torch.Tensor | bytes], name: str) -> Area:
        tensors = [s for s in sharers if isinstance(s, torch.Tensor)]
        if not tensors:
            data = sharers[0]
            assert isinstance(data, bytes)
            self._arena[at : at + size] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return Area(base, base + size, name, constant=True)
        first = min(_offset(t) for t in tensors)
        storage = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())
        original, copy = storage[first:], self._arena[at + first : at + size]
        copy.copy_(original)
        return Area(base + first, base + size, name, False, original, copy)


def _offset(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _size(argument: torch.Tensor | bytes) -> int:
    return argument.untyped_storage().nbytes() if isinstance(argument, torch.Tensor) else len(argument)


def _round_up(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
