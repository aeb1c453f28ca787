"""How the kernels are launched: tile shapes for each kernel, and a launch that costs little of the host's time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU's memory or a device's."""


class Shape(NamedTuple):
    """Launch parameters of an attention kernel."""

    block_m: int  # query rows of a program (prefill)
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int  # tiles in flight
    programs_per_processor: int = 0  # size of decode's grid


def decode_shape(rows: int, block_d: int, element_size: int) -> Shape:
    """Decode needs bytes in flight: about 64 KiB a processor, in two programs or more."""
    row_bytes = block_d * element_size
    block_n = max(16, min(128, 16384 // row_bytes))
    if rows > 32 and element_size == 4:
        block_n = min(block_n, 32)
    return Shape(max(16, rows), block_n, 4, 3, 2)


def prefill_shape(queries: int, block_d: int, element_size: int) -> Shape:
    """Prefill needs tiles that feed the matrix units; float32 runs without them and only needs to fit."""
    if element_size == 4:
        return Shape(64 if block_d <= 128 else 32, 32 if block_d <= 128 else 16, 4, 2)
    if queries <= 64:
        return Shape(64, 64, 4, 3 if block_d <= 128 else 2)
    if block_d <= 64:
        return Shape(128, 128, 8, 3)
    return Shape(128, 64, 8, 3 if block_d <= 128 else 2)


class Code(NamedTuple):
    """What the compiled code of a kernel depends on."""

    constants: tuple  # the kernel's tl.constexpr arguments, in order
    dtype: torch.dtype
    device: torch.device
    missing: tuple[bool, ...]  # which tensors are None
    num_warps: int
    num_stages: int
    dependent: bool = False  # may be set up while the kernel before it still runs, and waits for its end itself


class Plan(NamedTuple):
    """A launch, but for its tensors. The same for all calls of the same shapes, strides and options."""

    code: Code
    grid: tuple[int, int, int]
    numbers: tuple  # the kernel's numbers, in order
    aligned: bool  # all tensors start at a multiple of 16 bytes


class Kernel:
    """A Triton kernel that finds its compiled form with one dictionary look-up.

    Triton's own launch path types and hashes every argument of every call. Here a :class:`Plan` names everything that the
    compiled code depends on, but for the alignment of the pointers: where they are not all multiples of 16 bytes,
    Triton's path runs.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[object, Any] = {}

    def __call__(self, plan: Plan, tensors: tuple[Tensor | None, ...], pointers: tuple[int | None, ...]) -> None:
        """Launch on the current stream. ``pointers`` are the addresses of ``tensors``."""
        compiled = self._compiled.get(plan.code) if plan.aligned else None
        if compiled is None:
            compiled = self._function[plan.grid](
                *tensors,
                *plan.numbers,
                *plan.code.constants,
                num_warps=plan.code.num_warps,
                num_stages=plan.code.num_stages,
                **({"launch_pdl": True} if plan.code.dependent else {}),
            )
            if plan.aligned and not INTERPRETED:
                self._compiled[plan.code] = compiled
            return
        stream = triton.runtime.driver.active.get_current_stream(plan.code.device.index)
        compiled.run(
            *plan.grid,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *pointers,
            *plan.numbers,
            *plan.code.constants,
        )


def addresses(tensors: tuple[Tensor | None, ...]) -> tuple[tuple[int | None, ...], bool]:
    """(the address of each tensor, whether all are multiples of 16)"""
    pointers = tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])
    bits = 0
    for pointer in pointers:
        if pointer is not None:
            bits |= pointer
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


@lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device. The interpreter pretends to a few, so that work gets split there too."""
    if INTERPRETED:
        return 3
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


@lru_cache(maxsize=None)
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be set up while the one before it still runs (Hopper and later)."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
