"""Clocks for CUDA: of the device, by replays of a graph, and of the host alone."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

L2_BYTES = 256 << 20
"""Several times what any L2 cache holds."""


class GraphClock:
    """Device time of a CUDA graph that holds one call; the time of an empty graph is part of it.

    Before each replay the L2 cache is filled with other data: by reading it, or, if ``written``, by writing it, so that the
    call also waits until that is written back.
    """

    def __init__(self, written: bool = False) -> None:
        gc.freeze()  # else each capture looks through all that the imports made
        self._others = torch.zeros(L2_BYTES // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")
        self._written = written

    def prepare(self, run: Callable[[], Any]) -> Callable[[], float]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(3):
            graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds() -> float:
            self._flush()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            milliseconds: float = begin.elapsed_time(end)
            return milliseconds / 1e3

        return seconds

    def _flush(self) -> None:
        if self._written:
            self._others.zero_()
        else:
            torch.sum(self._others, 0, out=self._sum)


class HostClock:
    """Time until a few eager calls are in the device's queue, which is empty before."""

    calls = 20

    def prepare(self, run: Callable[[], Any]) -> Callable[[], float]:
        def seconds() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.calls):
                run()
            return (time.perf_counter() - start) / self.calls

        return seconds
