"""Mends what the kernels trip over in Triton's interpreter, which ``conftest.py`` switches on where there is no GPU.

In Triton 3.6 the interpreter multiplies the bit patterns of bfloat16 matrices, rounds float32 to bfloat16 towards zero,
takes int8 for the bits of bfloat16, loses NaN on the way to 8 bits, and calls ``int`` on arrays of one element, which NumPy
2.4 refuses.

It also shows every access to memory to who ``watch_accesses``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


_FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

Watcher = Callable[[np.ndarray, bool], None]
_watchers: list[Watcher] = []


@contextmanager
def watch_accesses(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher(addresses, written)`` before each access of a kernel in here, with those that are not masked."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _show(pointers, mask, written: bool) -> None:
    for watcher in _watchers:
        watcher(pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)], written)


class _Builder(interpreter.InterpreterBuilder):
    def create_masked_load(self, ptrs, mask, *others):
        _show(ptrs, mask, False)
        return super().create_masked_load(ptrs, mask, *others)

    def create_masked_store(self, ptrs, value, mask, *others):
        _show(ptrs, mask, True)
        return super().create_masked_store(ptrs, value, mask, *others)

    def create_atomic_rmw(self, operation, ptr, value, mask, *others):
        _show(ptr, mask, True)
        return super().create_atomic_rmw(operation, ptr, value, mask, *others)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        if source in _FLOAT8:
            numbers = torch.from_numpy(np.ascontiguousarray(src.data)).view(_FLOAT8[source]).float().numpy()
        else:
            numbers = self.cast_impl(src, tl.float32).data
        if target in _FLOAT8:
            bits = torch.from_numpy(np.ascontiguousarray(numbers)).to(_FLOAT8[target]).view(torch.uint8).numpy()
            return interpreter.TensorHandle(bits, target)
        return self.cast_impl(interpreter.TensorHandle(numbers, tl.float32), target)

    def cast_impl(self, src, dst_type):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_to_float32(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if kinds[1] == tl.bfloat16 and kinds[0].is_int():
            return interpreter.TensorHandle(_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


def _patch_lang_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
    _patch_lang_tensor_of_triton(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patch_lang(fn: object) -> interpreter._LangPatchScope:
    """All that the functions which ``fn`` calls need too: Triton would patch its language anew at each of their calls."""
    return _patch_lang_of_triton(SimpleNamespace(__globals__=dict(tl=tl, core=tl.core)))


def _call_device_function(self: interpreter.InterpretedFunction, *args, **kwargs):
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


if triton.knobs.runtime.interpret:
    _patch_lang_tensor_of_triton, _patch_lang_of_triton = interpreter._patch_lang_tensor, interpreter._patch_lang
    interpreter._patch_lang_tensor, interpreter._patch_lang = _patch_lang_tensor, _patch_lang
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.interpreter_builder.__class__ = _Builder
    # Overflows are worked out for every sum, and then looked at only with ``debug``.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
