"""From a kernel's name and its definitions to a compiled kernel."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...scoped import Scoped
from ..protocol import Support
from .params import STRUCTS, struct_source
from .tuning import Tuning, tuning_in_force

Compiler = Callable[[str], Any]
"""Metal source -> a library whose attributes are its kernels, as ``torch.mps.compile_shader``."""

UNKNOWN_CORE_COUNT = 128
"""Assumed where there is no Apple GPU to ask: more than the largest has, so that a simulator sees the most splits."""

MAX_KERNELS = 1024
"""Compiled kernels that are kept. A model needs a handful."""

NOTICE_SECONDS = 1.0
"""A compilation that takes longer is announced on stderr."""

SOURCES = {
    "kv_write": ("kv_format", "paging", "sequence", "rotary", "kv_write"),
    "decode": (
        "kv_format",
        "sequence",
        "paging",
        "rotary",
        "softmax",
        "score",
        "matrix",
        "dropout",
        "decode_lanes",
        "decode_matrix",
        "decode",
    ),
    "combine": ("sequence", "softmax", "combine"),
    "prefill": ("kv_format", "sequence", "paging", "rotary", "softmax", "score", "matrix", "dropout", "prefill"),
    "backward": ("kv_format", "sequence", "softmax", "score", "matrix", "dropout", "backward"),
}
"""Kernel -> the files it is made of, in order, behind the prologue, its definitions and the structs."""

ELEMENT_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat", torch.int8: "char"}


class Target(NamedTuple):
    """What kernels are compiled with and laid out for."""

    compile_shader: Compiler
    core_count: int
    tuning: Tuning = Tuning()

    @property
    def simdgroups(self) -> int:
        """That run at once. A threadgroup's run on one core."""
        per_threadgroup = self.tuning.decode_simdgroups
        return self.tuning.simdgroups_per_core // per_threadgroup * per_threadgroup * self.core_count


_given_target = Scoped[Target]("pagedflash_metal_target")


def use_compiler(
    compile_shader: Compiler, core_count: int | None = None, tuning: Tuning | None = None
) -> AbstractContextManager[None]:
    """Compile the kernels inside with ``compile_shader`` in place of ``torch.mps.compile_shader``.

    For simulators of Metal, whose kernels run on tensors of another device. Holds in this thread, and in threads that use
    no compiler of their own.

    Args:
        compile_shader: Metal source -> library, with the interface of ``torch.mps.compile_shader``.
        core_count: GPU cores to lay kernels out for, in place of ``torch.backends.mps.get_core_count()``.
        tuning: numbers of the tiling, in place of those in force.
    """
    cores = core_count or _gpu_core_count(torch.backends.mps.get_core_count)
    return _given_target.use(Target(compile_shader, cores, tuning or tuning_in_force().tuning))


def available() -> Support:
    """Whether there is something to compile and run kernels with."""
    if _given_target.current is not None or torch.backends.mps.is_available():
        return Support(True)
    if not torch.backends.mps.is_built():
        return Support(
            False, "this build of PyTorch has no MPS (it needs an Apple GPU), and no other Metal compiler is in use"
        )
    return Support(False, "PyTorch finds no MPS device, and no other Metal compiler is in use")


def current_target() -> Target:
    """The compiler in use here, and the GPU cores that kernels are laid out for."""
    target = _given_target.current
    if target is None:
        cores = _gpu_core_count(torch.backends.mps.get_core_count)
        target = Target(torch.mps.compile_shader, cores, tuning_in_force().tuning)
    return target


@lru_cache(maxsize=1)
def _gpu_core_count(get_core_count: Callable[[], int]) -> int:
    try:
        return get_core_count()
    except (AttributeError, RuntimeError):  # a PyTorch without MPS lacks even the function behind it
        return UNKNOWN_CORE_COUNT


@lru_cache(maxsize=MAX_KERNELS)
def compiled(compile_shader: Compiler, name: str, source: str) -> Any:
    """The kernel ``name`` of ``source``. Says so where that takes long; macOS keeps what it has compiled."""
    notice = threading.Timer(NOTICE_SECONDS, _say, (f"pagedflash: compiling the Metal kernel {name!r}, once for its shape",))
    notice.daemon = True
    notice.start()
    try:
        return getattr(compile_shader(source), name)
    finally:
        notice.cancel()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def source_of(name: str, dtype: torch.dtype, definitions: Mapping[str, int | str]) -> str:
    """The whole source of one kernel for one element type."""
    lines = [
        _file("prologue"),
        f"#define T {ELEMENT_TYPES[dtype]}",
        f"#define T_BYTES {dtype.itemsize}",
        f"#define T_IS_BFLOAT {int(dtype == torch.bfloat16)}",
        *(f"#define {key} {value}" for key, value in definitions.items()),
        *map(struct_source, STRUCTS),
        *map(_file, SOURCES[name]),
    ]
    return "\n".join(lines)


@lru_cache(maxsize=len(SOURCES))
def buffers_of(name: str) -> tuple[str, ...]:
    """The names of a kernel's buffers, in the order of their indices."""
    buffers = re.findall(r"(\w+) \[\[buffer\((\d+)\)\]\]", _file(name))
    assert [int(index) for _, index in buffers] == list(range(len(buffers)))
    return tuple(buffer for buffer, _ in buffers)


@lru_cache(maxsize=32)
def _file(name: str) -> str:
    return (Path(__file__).parent / "kernels" / f"{name}.metal").read_text()
