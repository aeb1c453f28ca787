"""A launch of a Triton kernel that costs little of the host's time."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .driver import DriverLaunch, MapShape, Unknown

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU's memory or a device's."""

Tensors = tuple[Tensor | None, ...]


class CompiledLaunch:
    """A launch of a Triton kernel, but for its tensors: the same for all calls of one signature.

    Triton's own launch types and hashes every argument of every call; here the first call does, and the others have CUDA's
    driver launch what it compiled. The compiled code relies on pointers being multiples of 16 bytes where they were in that
    call: unless all are (``aligned``), every call takes Triton's own launch. So it does where there is no such driver.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        params: tuple[Any, ...],
        tile: tuple[Any, ...],
        device: torch.device,
        aligned: bool,
        **options: object,
    ) -> None:
        """``params`` and ``tile`` are the kernel's records (:mod:`.kernels.params`), ``options`` Triton's launch options."""
        self.kernel = kernel
        self.grid = grid
        self._records = (params, tile)
        self.options = options
        self._device_index = device.index
        self._reusable = aligned and not INTERPRETED
        self._launch: DriverLaunch | None = None
        self._current_stream: Any = None

    def __call__(self, tensors: Tensors, addresses: bytes) -> None:
        """Launch on the current stream. ``addresses`` are those of ``tensors``, which come in the order of the kernel's."""
        launch = self._launch
        if launch is not None:
            launch(addresses, self._current_stream(self._device_index))
            return
        compiled = self.kernel[self.grid](*self.arguments(tensors), *self.descriptors(tensors), **self.options)
        if self._reusable:
            self._reuse(compiled)

    def _reuse(self, compiled: Any) -> None:
        self._current_stream = triton.runtime.driver.active.get_current_stream
        try:
            self._launch = DriverLaunch(compiled, self._device_index, self.grid, self._records, self.maps)
        except Unknown as error:
            self._reusable = False
            warnings.warn(
                f"pagedflash: every call takes the launch of Triton {triton.__version__}, which costs more of the host's "
                f"time: {error}",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def maps(self) -> tuple[MapShape | None, ...]:
        """Of the tensor descriptors."""
        return ()

    def descriptors(self, tensors: Tensors) -> tuple[Any, ...]:
        """Tensor descriptors that the kernel takes behind its records."""
        return ()

    def arguments(self, tensors: Tensors) -> list[Any]:
        """What Triton's own launch takes: the kernel's records, with tensors and marked constants."""
        kind = self.kernel.fn.__annotations__["tensors"]
        return [kind(*tensors), *map(mark_constants, self._records)]


def mark_constants(record: Any) -> Any:
    """A record of :mod:`.kernels.params` as Triton's own launch takes it: its fields in capitals are constants."""

    def marked(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return mark_constants(value)
        return tl.constexpr(value) if name.isupper() and value is not None else value

    return type(record)(*[marked(name, value) for name, value in zip(record._fields, record)])


def are_aligned(addresses: bytes) -> bool:
    """Whether all packed addresses are multiples of 16."""
    return not int.from_bytes(addresses, "little") & _low_bits(len(addresses) // 8)


@cache
def _low_bits(count: int) -> int:
    """In so many packed addresses as one number, the bits below 16 of each."""
    return int.from_bytes(b"\x0f\0\0\0\0\0\0\0" * count, "little")


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device. The interpreter pretends to a few, so that work gets split there too."""
    if INTERPRETED:
        return 3
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device. None for any other, and in the interpreter."""
    return None if INTERPRETED or device.type != "cuda" else torch.cuda.get_device_capability(device)


def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel is set up while the one before it still runs (Hopper and later)."""
    return (compute_capability(device) or (0, 0)) >= (9, 0)


def has_words(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :mod:`.kernels.words` runs there: its PTX needs Ampere, for float8 Ada or Hopper."""
    return INTERPRETED or (compute_capability(device) or (0, 0)) >= ((8, 0) if dtype == torch.int8 else (8, 9))


GLUON_SINCE, GLUON_BEFORE = TorchVersion("3.6"), TorchVersion("3.10")
"""Gluon changes from one Triton to the next: the versions whose Gluon the kernels for Hopper are known to be right under."""


def knows_gluon() -> bool:
    return GLUON_SINCE <= TorchVersion(triton.__version__) < GLUON_BEFORE


@cache
def has_hopper_kernels(device: torch.device) -> bool:
    """Whether the GPU is a Hopper, and Gluon one that ``prefill_hopper`` and ``decode_hopper`` are written for."""
    return compute_capability(device) == (9, 0) and knows_gluon()
