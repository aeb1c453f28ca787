"""From a kernel's name and its definitions to a compiled kernel, kept for the process."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

Compiler = Callable[[str], Any]
"""Metal source -> a library whose attributes are its kernels, as ``torch.mps.compile_shader``."""

UNKNOWN_CORE_COUNT = 128
"""Assumed where there is no Apple GPU to ask: more than the largest has, so that a simulator sees the most splits."""

SOURCES = {
    "kv_write": ("kv_format", "paging", "sequence", "rotary", "kv_write"),
    "decode": ("kv_format", "sequence", "paging", "rotary", "softmax", "score", "decode"),
    "combine": ("softmax", "combine"),
    "prefill": ("kv_format", "sequence", "paging", "rotary", "softmax", "score", "matrix", "prefill"),
}
"""Kernel -> the files it is made of, in order."""

ELEMENT_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


class _Replacement(NamedTuple):
    compile: Compiler
    core_count: int | None


_replacements: list[_Replacement] = []


@contextmanager
def use_compiler(compile_shader: Compiler, core_count: int | None = None) -> Iterator[None]:
    """Compile the kernels inside with ``compile_shader`` in place of ``torch.mps.compile_shader``, in all threads.

    For simulators of Metal, whose kernels run on tensors of another device.

    Args:
        compile_shader: Metal source -> library, with the interface of ``torch.mps.compile_shader``.
        core_count: GPU cores to plan for, in place of ``torch.backends.mps.get_core_count()``.
    """
    replacement = _Replacement(compile_shader, core_count)
    _replacements.append(replacement)
    try:
        yield
    finally:
        _replacements.remove(replacement)


def available() -> tuple[bool, str]:
    """Whether there is something to compile and run kernels with, and if not, why."""
    if _replacements or torch.backends.mps.is_available():
        return True, ""
    if not torch.backends.mps.is_built():
        return False, "this build of PyTorch has no MPS (it needs an Apple GPU), and no other Metal compiler is in use"
    return False, "PyTorch finds no MPS device, and no other Metal compiler is in use"


def core_count() -> int:
    """Cores of the GPU that calls are planned for."""
    given = _replacements[-1].core_count if _replacements else None
    return given or _asked_core_count(torch.backends.mps.get_core_count)


@cache
def _asked_core_count(ask: Callable[[], int]) -> int:
    try:
        return ask()
    except (AttributeError, RuntimeError):  # a PyTorch without MPS lacks even the function behind it
        return UNKNOWN_CORE_COUNT


def kernel(name: str, dtype: torch.dtype, definitions: tuple[tuple[str, int], ...], structs: tuple[type, ...]) -> Any:
    """The compiled kernel ``name`` for one element type and one set of definitions."""
    compiler = _replacements[-1].compile if _replacements else torch.mps.compile_shader
    return _compiled(compiler, name, dtype, definitions, structs)


@cache
def _compiled(
    compiler: Compiler, name: str, dtype: torch.dtype, definitions: tuple[tuple[str, int], ...], structs: tuple[type, ...]
) -> Any:
    return getattr(compiler(source_of(name, dtype, dict(definitions), structs)), name)


def source_of(name: str, dtype: torch.dtype, definitions: Mapping[str, int], structs: tuple[type, ...]) -> str:
    """The whole source of one kernel: definitions, structures shared with the host, then its files."""
    lines = [
        _file("prologue"),
        f"#define T {ELEMENT_TYPES[dtype]}",
        f"#define T_IS_FLOAT {int(dtype == torch.float32)}",
        f"#define T_IS_BFLOAT {int(dtype == torch.bfloat16)}",
        f"#define WORDS {definitions['CHUNK'] * dtype.itemsize // 4}",
    ]
    lines += [f"#define {key} {value}" for key, value in definitions.items()]
    lines += [_struct(fields) for fields in structs]
    return "\n".join(lines) + "\n" + "\n".join(_file(part) for part in SOURCES[name])


_MEMBERS = {int: ("long", "q"), float: ("float", "f")}
"""Type of a NamedTuple's field -> its type in the shader, and in the module struct."""


def _struct(fields: type) -> str:
    members = " ".join(f"{_MEMBERS[kind][0]} {field};" for field, kind in get_type_hints(fields).items())
    return f"struct {fields.__name__} {{ {members} }};"


def packed(values: NamedTuple) -> list[int]:
    """A NamedTuple of ints and floats as the struct of the same name in the shader: its bytes, 8 to an int."""
    layout = "@" + "".join(_MEMBERS[kind][1] for kind in get_type_hints(type(values)).values()) + "0q"
    contents = struct.pack(layout, *values)
    return list(struct.unpack(f"@{len(contents) // 8}q", contents))


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "kernels" / f"{name}.metal").read_text()
