"""Memory for the results of kernels, in little of the host's time."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What is the same for the results of all problems of a signature."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    return Layout(shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype)


_ALLOCATORS = {
    device: allocate
    for device in ("cpu", "cuda")
    if (allocate := getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)) is not None
}
"""Device type -> what code that torch compiles calls: a third of the time of ``torch.empty_strided``."""


def empty(layout: Layout, device: torch.device) -> Tensor:
    """Memory on a device, of CUDA's the current one."""
    allocate = _ALLOCATORS.get(device.type)
    if allocate is not None:
        return cast(Tensor, allocate(*layout))
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
