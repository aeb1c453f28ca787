"""Binding the arguments of a dispatch and running it."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .counters import Counters, Dispatch
from .errors import KernelError, LaunchError
from .memory import GuardedMemory
from .settings import ORDERS, Simulation
from .toolchain import RUNTIME, build_shared_object, cached

MAX_BUFFERS = 31
MAX_THREADS = 1024

_FORMATS = {
    "fp16": "e", "fp32": "f", "int32": "i", "int16": "h", "int8": "b", "uint8": "B", "int64": "q",
}  # fmt: skip


class _Uint3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))


class _Region(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("constant", ctypes.c_uint32),
        ("written", ctypes.c_uint32),
        ("cells", ctypes.c_void_p),
    )


class _Counters(ctypes.Structure):
    _fields_ = tuple((f.name, ctypes.c_uint64) for f in fields(Counters))


class _Dispatch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p * MAX_BUFFERS),
        ("threads_per_grid", _Uint3),
        ("threads_per_threadgroup", _Uint3),
        ("threadgroups_per_grid", _Uint3),
        ("order", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("counters", _Counters),
        ("site", ctypes.c_uint64),
        ("failed", ctypes.c_uint32),
        ("message", ctypes.c_char * 1020),
    )


@functools.cache
def runtime() -> ctypes.CDLL:
    """The runtime, compiled once. Kernels find its functions among the process's global symbols."""

    def build(folder: Path) -> None:
        source = f'#include "{RUNTIME / "runtime.cpp"}"\n'
        build_shared_object(source, ["-O2"], folder / "runtime.so")

    return ctypes.CDLL(str(cached("runtime", "", build) / "runtime.so"), mode=ctypes.RTLD_GLOBAL)


_one_dispatch_at_a_time = threading.Lock()


@dataclass(frozen=True)
class BoundKernel:
    """What a launch needs of a compiled kernel: its entry, and the buffer index of each parameter."""

    name: str
    library: Path
    entry: int
    buffers: dict[str, int]


def constant_bytes(value: object, cast: str | None) -> bytes:
    """A number or list of numbers as torch.mps passes it: ints as int64, floats as float32, or as `cast` says."""
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise LaunchError("an empty list or tuple cannot be an argument of a Metal kernel")
    if isinstance(values[0], int):
        fmt, values = "q", [int(v) for v in values]
    elif isinstance(values[0], float):
        fmt, values = "f", [float(v) for v in values]
    else:
        raise LaunchError(f"unsupported argument type {type(value).__name__}: pass tensors, ints, floats or lists")
    if cast == "bf16":
        return torch.tensor(values, dtype=torch.float64).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    if cast is not None:
        if cast not in _FORMATS:
            raise LaunchError(f"unsupported cast {cast!r}: one of {', '.join(sorted([*_FORMATS, 'bf16']))}")
        fmt = _FORMATS[cast]
        if fmt in "ihbBq":
            bits = 8 * struct.calcsize(fmt)
            values = [_wrapped(int(v), bits, signed=fmt != "B") for v in values]
    try:
        return struct.pack(f"<{len(values)}{fmt}", *values)
    except (struct.error, OverflowError) as error:
        raise LaunchError(f"the argument {value!r} does not fit: {error}") from None


def _wrapped(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def dimensions(size: int | Sequence[int], what: str) -> tuple[int, int, int]:
    """One to three sizes as three."""
    sizes = [size] if isinstance(size, int) else list(size)
    if not 1 <= len(sizes) <= 3 or any(n < 0 for n in sizes):
        raise LaunchError(f"{what} has one to three non-negative sizes, not {size!r}")
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def launch(
    kernel: BoundKernel,
    arguments: Sequence[Any],
    threads: int | Sequence[int] | None,
    group_size: int | Sequence[int] | None,
    arg_casts: str | dict[int, str] | None,
    simulation: Simulation,
) -> None:
    """Run one dispatch.

    Raises:
        LaunchError: arguments or sizes that Metal or torch would reject.
        KernelError: what the kernel did wrong.
    """
    if len(arguments) > MAX_BUFFERS:
        raise LaunchError(f"kernel '{kernel.name}': {len(arguments)} arguments, Metal binds {MAX_BUFFERS} at most")
    for parameter, index in kernel.buffers.items():
        if index >= len(arguments):
            raise LaunchError(f"kernel '{kernel.name}': no argument for parameter '{parameter}' [[buffer({index})]]")
    grid, group = _sizes(kernel, arguments, threads, group_size)
    if 0 in grid:
        return
    bound = [_bindable(kernel, index, argument, arg_casts) for index, argument in enumerate(arguments)]
    dispatch = _Dispatch(
        entry=kernel.entry,
        threads_per_grid=_Uint3(*grid),
        threads_per_threadgroup=_Uint3(*group),
        threadgroups_per_grid=_Uint3(*(-(-n // g) for n, g in zip(grid, group, strict=True))),
        order=ORDERS.index(simulation.order),
        checked=simulation.check,
        seed=simulation.seed,
    )
    if simulation.check:
        _run_checked(kernel, dispatch, bound)
        counters = Counters(*(getattr(dispatch.counters, f.name) for f in fields(Counters)))
        simulation.dispatches.append(Dispatch(kernel.name, grid, group, dispatch.threadgroup_bytes, counters))
    else:
        # The runtime reads these bytes while it runs: the list keeps them.
        constants = [None if isinstance(b, torch.Tensor) else ctypes.create_string_buffer(b, len(b)) for b in bound]
        for index, (tensor, constant) in enumerate(zip(bound, constants, strict=True)):
            dispatch.buffers[index] = (
                tensor.data_ptr() if isinstance(tensor, torch.Tensor) else ctypes.addressof(constant)  # type: ignore[arg-type]
            )
        _run(kernel, dispatch)


def _run(kernel: BoundKernel, dispatch: _Dispatch) -> None:
    with _one_dispatch_at_a_time:
        runtime().metalsim_dispatch(ctypes.byref(dispatch))
    if dispatch.failed:
        where = source_line(kernel.library, dispatch.site)
        raise KernelError(f"kernel '{kernel.name}'{where}: {dispatch.message.decode()}")


def _run_checked(kernel: BoundKernel, dispatch: _Dispatch, bound: list[torch.Tensor | bytes]) -> None:
    memory = GuardedMemory(bound, {index: name for name, index in kernel.buffers.items()})
    regions = (_Region * max(1, len(memory.areas)))()
    for region, area in zip(regions, memory.areas, strict=False):
        region.begin, region.end = area.begin, area.end
        region.name, region.constant = area.name.encode(), area.constant
    dispatch.regions, dispatch.region_count = regions, len(memory.areas)
    for index, address in enumerate(memory.addresses):
        dispatch.buffers[index] = address
    _run(kernel, dispatch)
    for region, area in zip(regions, memory.areas, strict=False):
        if region.written:
            area.copy_back()


def source_line(library: Path, site: int) -> str:
    """` at line N` for an address in a library, or nothing when no addr2line is installed to tell."""
    tool = shutil.which("addr2line")
    if not site or not tool:
        return ""
    done = subprocess.run([tool, "-e", str(library), "-i", hex(site)], capture_output=True, text=True, check=False)
    # The innermost frame that lies in the kernel's own source, not in the simulator's headers.
    lines = re.findall(r"<stdin>:(\d+)", done.stdout)
    return f" at line {lines[0]}" if lines else ""


def _sizes(
    kernel: BoundKernel,
    arguments: Sequence[Any],
    threads: int | Sequence[int] | None,
    group_size: int | Sequence[int] | None,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    if threads is None:
        threads = next((a.numel() for a in arguments if isinstance(a, torch.Tensor)), None)
        if threads is None:
            raise LaunchError(f"kernel '{kernel.name}': the number of threads is undefined")
    grid = dimensions(threads, "threads")
    if group_size is None:
        group = (min(MAX_THREADS, max(1, grid[0])), 1, 1)
    else:
        if (isinstance(threads, int) or len(threads) == 1) != (isinstance(group_size, int) or len(group_size) == 1):
            raise LaunchError(f"kernel '{kernel.name}': threads and group_size have different numbers of dimensions")
        group = dimensions(group_size, "group_size")
    count = group[0] * group[1] * group[2]
    if not 1 <= count <= MAX_THREADS:
        raise LaunchError(f"kernel '{kernel.name}': a threadgroup of {count} threads; Metal allows 1 to {MAX_THREADS}")
    return grid, group


def _bindable(
    kernel: BoundKernel, index: int, argument: Any, arg_casts: str | dict[int, str] | None
) -> torch.Tensor | bytes:
    """An argument as what Metal binds: a tensor's memory, or the bytes of numbers."""
    if isinstance(argument, torch.Tensor):
        if argument.device.type != "cpu":
            raise LaunchError(f"kernel '{kernel.name}', argument {index}: the simulator takes CPU tensors")
        return argument
    cast = arg_casts.get(index) if isinstance(arg_casts, dict) else arg_casts
    try:
        return constant_bytes(argument, cast)
    except LaunchError as error:
        raise LaunchError(f"kernel '{kernel.name}', argument {index}: {error}") from None
