"""Tensor descriptors: what Hopper's TMA unit is told of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...geometry import strides
from .compiled import CompiledLaunch, Tensors
from .driver import MapShape
from .kernels.params import Tensors as KernelTensors

K, V = map(KernelTensors._fields.index, "kv")
"""Where a kernel's tensors have them."""

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
DATA_TYPES = {torch.bfloat16: 9, torch.float16: 6}
"""Of CUtensorMapDataType."""


class TileDescriptor:
    """Of caches of one signature: boxes ``(1, 1, box, width)`` of ``(pages or rows, KV heads, slots, head dim)``."""

    def __init__(self, which: int, tensor: Tensor, box: int, width: int) -> None:
        """``tensor``: pages, dense or packed keys or values, which a kernel's tensors have at ``which``."""
        batch, token, head = strides(tensor)
        slots, heads, head_dim = tensor.shape[-3:]
        rows = tensor.shape[0] if tensor.dim() == 4 else 1
        self._which = which
        self._block = [1, 1, box, width]
        self._shape = [rows, heads, slots, head_dim]
        self._strides = [batch or slots * token, head, token, 1]
        self._layout = gl.NVMMASharedLayout.get_default_for(self._block, ELEMENTS[tensor.dtype])
        self._data_type = DATA_TYPES[tensor.dtype]

    def of(self, tensors: Tensors) -> TensorDescriptor:
        return TensorDescriptor(tensors[self._which], self._shape, self._strides, self._block, self._layout)

    @property
    def map(self) -> MapShape:
        return MapShape(self._which, self._data_type, self._shape, self._strides)


class DescribedLaunch(CompiledLaunch):
    """A launch whose kernel takes descriptors too, None where it has none."""

    def __init__(self, tiles: Sequence[TileDescriptor | None], *launch: Any, **options: Any) -> None:
        super().__init__(*launch, **options)
        self._tiles = tiles

    def descriptors(self, tensors: Tensors) -> tuple[TensorDescriptor | None, ...]:
        return tuple(None if tiles is None else tiles.of(tensors) for tiles in self._tiles)

    @property
    def maps(self) -> tuple[MapShape | None, ...]:
        return tuple(None if tiles is None else tiles.map for tiles in self._tiles)
