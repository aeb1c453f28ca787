"""Tile shapes and launch options of each kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...geometry import strides


class Tiling(NamedTuple):
    """Of an attention kernel."""

    block_m: int  # query rows of a CTA
    block_n: int  # keys of a KV tile
    num_warps: int
    num_stages: int  # KV tiles in flight
    ctas_per_sm: int = 0  # size of decode's grid

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)


def decode_tiling(rows: int, block_d: int, element_size: int, cache_element_size: int) -> Tiling:
    """Decode needs bytes in flight: about 64 KiB an SM, in two CTAs or more. Elements of one byte take longer to convert
    than to load: there larger tiles are what helps."""
    if cache_element_size == 1 and element_size == 2 and rows <= 16 and block_d >= 128:
        return Tiling(16, 16384 // block_d, 4, 2, ctas_per_sm=2)
    row_bytes = block_d * element_size
    block_n = max(16, min(128, 16384 // row_bytes))
    if rows > 32 and element_size == 4:
        block_n = min(block_n, 32)
    if row_bytes <= 128:
        return Tiling(max(16, rows), min(block_n, 64), 4, 3, ctas_per_sm=3)
    return Tiling(max(16, rows), block_n, 4, 3, ctas_per_sm=2)


def prefill_tiling(max_seqlen_q: int, block_d: int, element_size: int) -> Tiling:
    """Prefill needs tiles that feed the matrix units; float32 runs without them and only needs to fit."""
    if element_size == 4:
        return Tiling(32 if block_d <= 128 else 16, 16, 4, 2)
    if max_seqlen_q <= 64:
        return Tiling(64, 64, 4, 3 if block_d <= 128 else 2)
    return Tiling(128, 64, 8, 4 if block_d <= 128 else 2)


def backward_tilings(block_d: int, element_size: int) -> tuple[Tiling, Tiling]:
    """Of ``keys_backward`` and ``queries_backward``: two accumulators in registers, and one."""
    if element_size == 4:
        return Tiling(16, 32 if block_d <= 128 else 16, 4, 2), Tiling(32 if block_d <= 128 else 16, 16, 4, 2)
    if block_d <= 64:
        return Tiling(32, 128, 4, 3), Tiling(64, 64, 4, 3)
    if block_d <= 128:
        return Tiling(64, 128, 8, 3), Tiling(128, 64, 8, 3)
    return Tiling(32, 64, 8, 2), Tiling(64, 32, 8, 2)


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def block_width(head_dim: int) -> int:
    """A tile's width for a head dim: a power of two that the matrix units take."""
    return max(16, power_of_two(head_dim))


def stride_factor(tensors: Sequence[Tensor], aligned: bool) -> int:
    """ALIGN of the strides of ``tensors`` (:class:`.kernels.params.Strides`).

    Where addresses are ``aligned`` to 16 bytes, the first of 16 (if there are elements of one byte) and 8 that divides all
    strides, so that rows are loaded in pieces of those; else 1.
    """
    bits = 0 if any(tensor.element_size() == 1 for tensor in tensors) else 8
    for tensor in tensors:
        for stride in strides(tensor):
            bits |= stride
    return next((align for align in (16, 8) if aligned and bits % align == 0), 1)
