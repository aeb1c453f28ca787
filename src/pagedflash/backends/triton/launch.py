"""How the kernels are launched: tile shapes for each kernel, and a launch that costs little of the host's time."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from ...call import Tensors

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU's memory or a device's."""


Pointers = tuple[int | None, ...]


class Shape(NamedTuple):
    """Launch parameters of an attention kernel."""

    block_m: int  # query rows of a program (prefill)
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int  # tiles in flight
    programs_per_processor: int = 0  # size of decode's grid
    max_registers: int | None = None  # a thread's, where fewer let more programs run side by side


def decode_shape(rows: int, block_d: int, element_size: int) -> Shape:
    """Decode needs bytes in flight: about 64 KiB a processor, in two programs or more."""
    row_bytes = block_d * element_size
    block_n = max(16, min(128, 16384 // row_bytes))
    if rows > 32 and element_size == 4:
        block_n = min(block_n, 32)
    if row_bytes <= 128:
        return Shape(max(16, rows), min(block_n, 64), 4, 3, 3)
    return Shape(max(16, rows), block_n, 4, 3, 2)


def prefill_shape(queries: int, block_d: int, element_size: int) -> Shape:
    """Prefill needs tiles that feed the matrix units; float32 runs without them and only needs to fit."""
    if element_size == 4:
        return Shape(32 if block_d <= 128 else 16, 16, 4, 2)
    if queries <= 64:
        return Shape(64, 64, 4, 3 if block_d <= 128 else 2)
    return Shape(128, 64, 8, 4 if block_d <= 128 else 2)


class Launch:
    """A launch of a Triton kernel, but for its tensors: the same for all calls of the same shapes, strides and options.

    Triton's own launch path types and hashes every argument of every call; here the first call does, and the others
    reuse what it compiled. The compiled code relies on pointers being multiples of 16 bytes where they were in that
    call: unless all are (``aligned``), every call takes Triton's path.
    """

    def __init__(
        self,
        function: Any,
        grid: tuple[int, int, int],
        numbers: tuple[float, ...],
        constants: tuple[object, ...],
        shape: Shape,
        device: torch.device,
        aligned: bool,
        dependent: bool = False,
    ) -> None:
        """``numbers`` and ``constants`` are the kernel's, in order, behind its tensors. A ``dependent`` kernel may be set
        up while the one before it still runs, and waits for its end itself."""
        self.function = function
        self.grid = grid
        self._arguments = (*numbers, *constants)
        self._options: dict[str, Any] = dict(num_warps=shape.num_warps, num_stages=shape.num_stages)
        if shape.max_registers is not None and device.type == "cuda":
            self._options["maxnreg"] = shape.max_registers
        if dependent:
            self._options["launch_pdl"] = True
        self._device_index = device.index
        self._reusable = aligned and not INTERPRETED
        self._run: Any = None
        self._compiled: tuple[Any, ...] = ()
        self._current_stream: Any = None

    def __call__(self, tensors: Tensors, pointers: Pointers) -> None:
        """Launch on the current stream. ``pointers`` are the addresses of ``tensors``."""
        if self._run is not None:
            stream = self._current_stream(self._device_index)
            self._run(*self.grid, stream, *self._compiled, *pointers, *self._arguments)
            return
        compiled = self.function[self.grid](*tensors, *self._arguments, **self._options)
        if self._reusable:
            no_metadata, no_hooks = None, (None, None)
            self._compiled = (compiled.function, compiled.packed_metadata, no_metadata, *no_hooks)
            self._current_stream = triton.runtime.driver.active.get_current_stream
            self._run = compiled.run


def addresses(tensors: Tensors) -> tuple[Pointers, bool]:
    """(the address of each tensor, whether all are multiples of 16)"""
    pointers = tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])
    bits = 0
    for pointer in pointers:
        bits |= pointer or 0
    return pointers, bits % 16 == 0


def stride_factor(strides: tuple[int, ...], aligned: bool) -> int:
    """What strides are divided by before they go to a kernel, which multiplies them again: 8 where it divides them all.

    So the compiler knows that rows start at multiples of 16 bytes (of 8 elements), and loads them in one piece.
    """
    bits = 0
    for stride in strides:
        bits |= stride
    return 8 if aligned and bits % 8 == 0 else 1


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device. The interpreter pretends to a few, so that work gets split there too."""
    if INTERPRETED:
        return 3
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be set up while the one before it still runs (Hopper and later)."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
