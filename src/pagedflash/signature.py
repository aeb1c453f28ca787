"""What calls share, as a key of dictionaries: shapes, strides, dtypes and devices of their tensors, and their options.

A native function reads them (``native/signature.cpp``), in a quarter of the time of Python. Where it is not built (a
Python-only kernel of the Hub), or torch does not offer its tensors as C structs, Python does.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Arguments = tuple[Any, ...]

LIBRARY_VARIABLE = "PAGEDFLASH_SIGNATURE_LIBRARY"
"""Path of a library to use instead of the installed one: a build with sanitizers, for one."""

LIBRARY = Path(__file__).with_name("pagedflash_signature.dll" if os.name == "nt" else "libpagedflash_signature.so")

FUNCTIONS = (
    "PyTuple_Size", "PyTuple_GetItem", "PyObject_Type", "PyObject_GetAttr", "PyObject_CallMethodObjArgs",
    "PyLong_AsLongLong", "PyFloat_AsDouble", "PyBytes_FromStringAndSize", "Py_DecRef", "PyErr_Occurred", "PyErr_Clear",
)  # fmt: skip
"""Of Python's stable ABI, as struct Python of the native function has them."""

OBJECTS = None, True, False, int, float, tuple, Tensor, Parameter, sys.intern("is_neg"), sys.intern("requires_grad")
"""What its struct Objects has."""


def _load() -> Callable[[Arguments, Arguments, bool], bytes] | None:
    """The native function; None where it cannot be had."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    try:
        native = ctypes.PyDLL(os.environ.get(LIBRARY_VARIABLE, str(LIBRARY)))
        signature = native.pagedflash_signature
    except (OSError, AttributeError):
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in FUNCTIONS]
    native.pagedflash_use_python.argtypes = [ctypes.c_void_p] * 3
    native.pagedflash_use_python(
        (ctypes.c_void_p * len(functions))(*[function.value for function in functions]),
        (ctypes.c_void_p * len(OBJECTS))(*map(id, OBJECTS)),
        pointer_of(capsule, b"dlpack_exchange_api"),
    )
    signature.argtypes, signature.restype = [ctypes.py_object, ctypes.py_object, ctypes.c_int64], ctypes.py_object
    return signature


native = _load()
"""``native(tensors, options, tracks_grad)``: 8 bytes for the address of each tensor and then the key, or no bytes at all."""


def signature(tensors: Arguments, options: Arguments) -> tuple[Hashable, bytes | None] | None:
    """``(key, addresses)``: the key is the same for tensors that differ in addresses and values alone, and equal options.

    Args:
        tensors: tensors and None.
        options: None, bools, ints, floats and tuples of them. Each is told from those of other types: 1 from 1.0 and True.

    Returns:
        None where there is no telling: a subclass of Tensor, symbolic sizes, anything else. ``addresses``, 8 bytes for each
        tensor and 0 for None, are None where Python has read the key.
    """
    tracks_grad = torch.is_grad_enabled()
    if native is not None and (words := native(tensors, options, tracks_grad)):
        split = 8 * len(tensors)
        return words[split:], words[:split]
    key = _in_python(tensors, options, tracks_grad)
    return None if key is None else (key, None)


def addresses_of(*tensors: Tensor | None) -> bytes:
    """8 bytes for each, 0 for None."""
    return _pointers(len(tensors)).pack(*[0 if tensor is None else tensor.data_ptr() for tensor in tensors])


@cache
def _pointers(count: int) -> Struct:
    """How so many addresses are packed."""
    return Struct(f"{count}P")


def _in_python(tensors: Arguments, options: Arguments, tracks_grad: bool) -> Hashable | None:
    types = _types(options)
    if types is None:
        return None
    parts: list[Hashable] = [tracks_grad, options, types]
    add = parts.append
    for tensor in tensors:
        if tensor is None:
            add(None)
        elif tensor.__class__ is Tensor or tensor.__class__ is Parameter:  # sinks come as parameters
            add(tensor.shape)  # one by one: a tuple of them would take half as long again
            add(tensor.stride())
            add(tensor.dtype)
            add(tensor.device)
            add(tensor.is_neg())
            if tracks_grad:
                add(tensor.requires_grad)
        else:
            return None
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:  # symbolic sizes
        return None
    return key


def _types(options: Arguments) -> tuple[Hashable, ...] | None:
    """The type of each, or None if one is no plain value."""
    types: list[Hashable] = []
    for option in options:
        kind: Hashable = _types(option) if option.__class__ is tuple else option.__class__
        if kind is None or not (option.__class__ is tuple or kind in _PLAIN):
            return None
        types.append(kind)
    return tuple(types)


_PLAIN = {type(None), bool, int, float}
