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
    programs_per_processor: int = 0  # decode: size of its grid


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


class Kernel:
    """A Triton kernel that finds its compiled form with one dictionary look-up.

    Triton's own launch path types and hashes every argument of every call. Here the caller names everything the compiled
    code depends on once, in ``constants``; the dtype of the data, which arguments are None and the device complete the
    key. Valid only if all pointers are 16-byte aligned, which the caller vouches for; otherwise Triton's path runs.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[object, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple, numbers: tuple, constants: tuple, shape: Shape, aligned: bool
    ) -> None:
        first = tensors[0]
        key = (constants, shape, first.dtype, first.device.index, *[tensor is None for tensor in tensors])
        compiled = self._compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        compiled = self._function[grid](
            *tensors, *numbers, *constants, num_warps=shape.num_warps, num_stages=shape.num_stages
        )
        if aligned and not INTERPRETED:
            self._compiled[key] = compiled


def alignment(tensors: tuple[Tensor | None, ...], strides: tuple[int, ...]) -> tuple[bool, int]:
    """(all tensors start at a multiple of 16 bytes, the factor to divide strides by: 8 where it divides them all)."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    aligned = addresses % 16 == 0
    steps = 0
    for stride in strides:
        steps |= stride
    return aligned, 8 if aligned and steps % 8 == 0 else 1


@lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device. The interpreter pretends to a few, so that work gets split there too."""
    if INTERPRETED:
        return 3
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


class ArrivalCounters:
    """Zeroed counters for ``decode``, which leaves them zeroed again: no launch is spent on clearing them.

    Calls that can run at the same time must not share counters. Those on one stream cannot: they share one set. A call
    captured into a graph can run beside anything but itself: it gets a set for good. When the pool for those is used
    up, or was never made because the first call ever was captured, the capture zeroes a set of its own.
    """

    POOL_SIZE = 1 << 20

    def __init__(self) -> None:
        self._of_stream: dict[tuple[int | None, int], Tensor] = {}
        self._pools: dict[int | None, tuple[Tensor, int]] = {}

    def take(self, device: torch.device, count: int) -> Tensor:
        """``count`` zeros, int32."""
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=device)
        if torch.cuda.is_current_stream_capturing():
            return self._take_for_good(device, count)
        stream = (device.index, torch.cuda.current_stream(device).cuda_stream)
        counters = self._of_stream.get(stream)
        if counters is None or counters.numel() < count:
            if device.index not in self._pools:
                self._pools[device.index] = (torch.zeros(self.POOL_SIZE, dtype=torch.int32, device=device), 0)
                torch.cuda.current_stream(device).synchronize()  # before a capture on another stream takes from it
            counters = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            self._of_stream[stream] = counters
        return counters

    def _take_for_good(self, device: torch.device, count: int) -> Tensor:
        pool, taken = self._pools.get(device.index, (None, 0))
        size = -(-count // 32) * 32
        if pool is None or taken + size > pool.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)
        self._pools[device.index] = (pool, taken + size)
        return pool[taken : taken + count]
