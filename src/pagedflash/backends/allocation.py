"""Memory for the results of kernels, in little of the host's time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Allocate = Callable[[], Tensor]
"""Memory for one result, the same for all problems of a signature."""

_ALLOCATORS = {
    device: allocate
    for device in ("cpu", "cuda")
    if (allocate := getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)) is not None
}
"""Device type -> what code that torch compiles calls: a third of the time of ``torch.empty_strided``."""


def contiguous(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Allocate:
    """What allocates a tensor on a device, of CUDA's on the current one."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    allocate = _ALLOCATORS.get(device.type)
    if allocate is not None:
        return partial(allocate, shape, strides, dtype)
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
