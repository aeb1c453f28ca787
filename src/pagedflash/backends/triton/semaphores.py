"""Semaphores: how the CTAs of ``decode`` find out which of them is the last to finish a split of a work tile.

A semaphore is a counter in the device's memory, one for each work tile of a call. It is 0 between calls: the CTA that
counts it to the end puts it back. Calls that may run at the same time must not share any, so each stream has its own, and
a call that is captured in a CUDA graph keeps its own for good, since a graph may be replayed on any stream.
"""

from __future__ import annotations

import threading

import torch
import triton
from torch import Tensor

from .compiled import INTERPRETED

SEMAPHORES_OF_A_STREAM = 1 << 14
"""At least so many: more work tiles than that are rare, and then there is one semaphore for each."""

ALIGNMENT = 32
"""Calls get multiples of this: their semaphores begin at addresses that kernels expect of every tensor, 128 bytes apart."""

RESERVE = 1 << 20
"""Semaphores made ahead for captured calls, in which nothing can be cleared but in every replay again (4 MiB)."""

_of_stream: dict[tuple[int | None, int], Tensor] = {}
_reserves: dict[int | None, Tensor] = {}
_captured: list[Tensor] = []  # a graph knows only their addresses: here they are kept
_reserving = threading.Lock()


def semaphores(device: torch.device, count: int) -> Tensor:
    """At least ``count`` counters (int32), all 0, for a call on the current stream."""
    count = -(-count // ALIGNMENT) * ALIGNMENT
    if INTERPRETED:
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    has_graphs = device.type == "cuda"
    if has_graphs and torch.cuda.is_current_stream_capturing():
        return _for_capture(device, count)
    mine = _of_stream.get((device.index, stream))
    if mine is None or mine.numel() < count:
        mine = torch.zeros(max(count, SEMAPHORES_OF_A_STREAM), dtype=torch.int32, device=device)
        _of_stream[device.index, stream] = mine
        if has_graphs:
            _fill_reserve(device)
    return mine


def _fill_reserve(device: torch.device) -> None:
    with _reserving:
        if len(_reserves.get(device.index, ())) < RESERVE // 2:
            _reserves[device.index] = torch.zeros(RESERVE, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # a graph may use them on any stream


def _for_capture(device: torch.device, count: int) -> Tensor:
    """From the reserve; where it does not last, counters that the graph clears itself, a little slower."""
    with _reserving:
        reserve = _reserves.get(device.index)
        if reserve is not None and len(reserve) >= count:
            _reserves[device.index] = reserve[count:]
            _captured.append(reserve[:count])
            return _captured[-1]
    return torch.zeros(count, dtype=torch.int32, device=device)
