"""A launch of a Triton kernel that costs little of the host's time."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on the CPU's memory or a device's."""

Values = tuple[Any, ...]
"""Tensors, or their addresses; None for one that is not given."""

LAUNCHER_PARAMETERS = (
    "gridX", "gridY", "gridZ", "stream", "function",
    "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook",
)  # fmt: skip
"""What Triton's launcher of a compiled kernel takes before the kernel's own arguments."""


class CompiledLaunch:
    """A launch of a Triton kernel, but for its tensors: the same for all calls of one plan.

    Triton's own launch types and hashes every argument of every call; here the first call does, and the others reuse what
    it compiled. The compiled code relies on pointers being multiples of 16 bytes where they were in that call: unless all
    are (``aligned``), every call takes Triton's own launch. So it does where Triton's launcher, which is private, is not
    there or not the one we know.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], device: torch.device, aligned: bool, **options: object
    ) -> None:
        """``options`` are Triton's launch options."""
        self.kernel = kernel
        self.grid = grid
        self._options = options
        self._device_index = device.index
        self._reusable = aligned and not INTERPRETED
        self._launcher: Callable[..., object] | None = None
        self._compiled: tuple[Any, ...] = ()
        self._current_stream: Any = None

    def __call__(self, arguments: Values, with_tensors: Callable[[], Values]) -> None:
        """Launch on the current stream.

        ``arguments`` are the kernel's records as plain tuples, with addresses; ``with_tensors()`` are the same with the
        tensors, whose types Triton's own launch looks at.
        """
        if self._launcher is not None:
            stream = self._current_stream(self._device_index)
            self._launcher(*self.grid, stream, *self._compiled, *arguments)
            return
        records = self.kernel.fn.__annotations__.values()
        named = [name_fields(record, values) for record, values in zip(records, with_tensors())]
        compiled = self.kernel[self.grid](*named, **self._options)
        if self._reusable:
            self._launcher = known_launcher(compiled)
            self._reusable = self._launcher is not None
        if self._reusable:
            no_metadata, no_hooks = None, (None, None)
            self._compiled = (compiled.function, compiled.packed_metadata, no_metadata, *no_hooks)
            self._current_stream = triton.runtime.driver.active.get_current_stream


def name_fields(record: Any, values: Values) -> Any:
    """``values`` as the NamedTuple ``record``, and those of its fields that are records too; constants marked as such."""
    fields = record.__annotations__.items()
    return record(*[_as_field(name, kind, value) for (name, kind), value in zip(fields, values)])


def _as_field(name: str, kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if hasattr(kind, "_fields"):
        return name_fields(kind, value)
    return tl.constexpr(value) if name.isupper() else value


def known_launcher(compiled: Any) -> Callable[..., object] | None:
    """Triton's launcher of a compiled kernel. None, with a warning, where it does not take LAUNCHER_PARAMETERS."""
    launcher: Callable[..., object] | None = getattr(compiled, "run", None)
    if launcher is not None and _takes_known_parameters(launcher):
        return launcher
    warnings.warn(
        f"pagedflash: the launcher of Triton {triton.__version__} is not the one known from 3.6 to 3.9: every call takes "
        "Triton's own launch, which costs more of the host's time",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _takes_known_parameters(launcher: Callable[..., object]) -> bool:
    try:
        *named, rest = inspect.signature(launcher).parameters.values()
    except (TypeError, ValueError):
        return False
    names = tuple(parameter.name for parameter in named)
    grid_to_function = 5
    is_known = len(names) >= grid_to_function and names == LAUNCHER_PARAMETERS[: len(names)]
    return is_known and rest.kind is inspect.Parameter.VAR_POSITIONAL


def addresses_of(tensors: Values) -> tuple[Values, bool]:
    """(the address of each tensor, whether all are multiples of 16)"""
    addresses = tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])
    bits = 0
    for address in addresses:
        if address is not None:
            bits |= address
    return addresses, bits % 16 == 0


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device. The interpreter pretends to a few, so that work gets split there too."""
    if INTERPRETED:
        return 3
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


@cache
def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel is set up while the one before it still runs (Hopper and later)."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
