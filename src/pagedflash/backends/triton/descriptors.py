"""Tensor descriptors: what Hopper's TMA unit is told of keys and values."""

from __future__ import annotations

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

    def __init__(self, tensor: Tensor, box: int, width: int) -> None:
        """``tensor``: pages, dense or packed keys or values."""
        batch, token, head = strides(tensor)
        slots, heads, head_dim = tensor.shape[-3:]
        rows = tensor.shape[0] if tensor.dim() == 4 else 1
        self._block = [1, 1, box, width]
        self._shape = [rows, heads, slots, head_dim]
        self._strides = [batch or slots * token, head, token, 1]
        self._layout = gl.NVMMASharedLayout.get_default_for(self._block, ELEMENTS[tensor.dtype])
        self._data_type = DATA_TYPES[tensor.dtype]

    def of(self, tensor: Tensor | None) -> TensorDescriptor:
        return TensorDescriptor(tensor, self._shape, self._strides, self._block, self._layout)

    def map_of(self, tensor: int) -> MapShape:
        """Of the kernel's tensor of this index."""
        return MapShape(tensor, self._data_type, self._shape, self._strides)


class DescribedLaunch(CompiledLaunch):
    """A launch whose kernel takes descriptors of keys and values too."""

    def __init__(self, k: TileDescriptor, v: TileDescriptor, *launch: Any, **options: Any) -> None:
        super().__init__(*launch, **options)
        self._k, self._v = k, v

    def descriptors(self, tensors: Tensors) -> tuple[TensorDescriptor, TensorDescriptor]:
        return self._k.of(tensors[K]), self._v.of(tensors[V])

    @property
    def maps(self) -> tuple[MapShape, MapShape]:
        return self._k.map_of(K), self._v.map_of(V)
