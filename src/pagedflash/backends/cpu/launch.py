"""The native library: finding it, choosing an instruction set, and packing shapes and addresses for it.

``native/abi.h`` mirrors the layouts written here; the sizes are compared when the library is loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import strides
from ...problem import Append, AttentionProblem, CacheWrite, KVCache
from ...scoped import Scoped
from ...validate_values import check_values, check_write_values

ISA_VARIABLE = "PAGEDFLASH_CPU_ISA"
"""Names the instruction set to use (``avx512bf16``, ``avx512``, ``avx2``, ``neon``, ``generic``) instead of the best one."""

LIBRARY_VARIABLE = "PAGEDFLASH_CPU_LIBRARY"
"""Path of a library to use instead of the installed one: a build with sanitizers, for one."""

LIBRARY = Path(__file__).with_name("pagedflash_cpu.dll" if os.name == "nt" else "libpagedflash_cpu.so")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Every field is 8 bytes wide, in the order of native/abi.h.
_WRITE = Struct("24q")
_ATTENTION = Struct("24q 3q 8q 2d")
_WRITE_ADDRESSES = Struct("9Q")
_ADDRESSES = Struct("18Q")

_DONE, _BAD_VALUES, _OUT_OF_MEMORY = 0, 1, 2

_CPU = torch.device("cpu")


class Unavailable(Exception):
    """The native library cannot be used here; the message says why."""


class Library:
    """The loaded library, running on torch's thread pool with one instruction set."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise Unavailable(
                f"its native library ({path.name}) was not built: install pagedflash from a wheel, or with pip"
            )
        parallel_for, num_threads = _thread_pool()
        try:
            native = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"its native library cannot be loaded: {error}") from error
        native.pagedflash_isa_name.restype = ctypes.c_char_p
        for function in ("isa_name", "isa_present"):
            getattr(native, f"pagedflash_{function}").argtypes = [ctypes.c_int64]
        native.pagedflash_use_pool.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        for struct, layout in (("write", _WRITE), ("attention", _ATTENTION), ("addresses", _ADDRESSES)):
            if getattr(native, f"pagedflash_sizeof_{struct}")() != layout.size:
                raise Unavailable(f"its native library ({path.name}) is of another version: reinstall pagedflash")
        self.run_attention = native.pagedflash_attention
        self.run_write = native.pagedflash_kv_write
        for run in (self.run_attention, self.run_write):
            run.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
            run.restype = ctypes.c_int64
        native.pagedflash_use_pool(parallel_for, num_threads)
        self.isas = _present_isas(native)
        if not self.isas:
            raise Unavailable("this processor has none of the instruction sets it is compiled for")
        self.isa = self._chosen_isa()

    def _chosen_isa(self) -> int:
        wanted = os.environ.get(ISA_VARIABLE)
        if wanted is None:
            return next(iter(self.isas.values()))
        if wanted not in self.isas:
            raise Unavailable(f"{ISA_VARIABLE} is {wanted}, expected one of {', '.join(self.isas)}")
        return self.isas[wanted]


@cache
def library() -> Library:
    """The library of this installation.

    Raises:
        Unavailable: it is missing, does not fit, or this processor cannot run it.
    """
    return Library(Path(os.environ.get(LIBRARY_VARIABLE, LIBRARY)))


_forced_isa = Scoped[int]("pagedflash_isa")


def use_isa(name: str) -> AbstractContextManager[None]:
    """Run every native call inside with one of ``library().isas``. For tests and comparisons."""
    return _forced_isa.use(library().isas[name])


def _isa(native: Library) -> int:
    forced = _forced_isa.current
    return native.isa if forced is None else forced


class _Plan(NamedTuple):
    """What problems of one signature share."""

    packed: bytes  # AttentionShape of native/abi.h
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Append (if asked) and attend. Lengths and tables are checked natively before anything is written."""
    native = library()
    plan = problem.plan("cpu", make_plan)
    q: Tensor = problem.tensors[0]  # type: ignore[assignment]
    out = torch.empty(*plan.out_shape, dtype=q.dtype, device=_CPU)
    lse = torch.empty(*plan.lse_shape, dtype=torch.float32, device=_CPU)
    status = native.run_attention(plan.packed, addresses(problem, out, lse), _isa(native))
    if status != _DONE:
        if status == _BAD_VALUES:
            check_values(problem)
        _fail(status)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Write new keys and values. Lengths and tables are checked natively before anything is written."""
    native = library()
    shape = write.plan("cpu", describe_write)
    k, v, table, rows, _, lengths, _, k_new, v_new, cos, sin = (
        0 if tensor is None else tensor.data_ptr() for tensor in write.tensors
    )
    at = _WRITE_ADDRESSES.pack(k_new, v_new, k, v, lengths, table, rows, cos, sin)
    status = native.run_write(shape, at, _isa(native))
    if status != _DONE:
        if status == _BAD_VALUES:
            check_write_values(write)
        _fail(status)


def _fail(status: int) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("pagedflash: out of memory for the scratch space of an attention call")
    raise RuntimeError(
        "pagedflash: the native check refused lengths or tables that the Python check accepts; please report it"
    )


def describe_write(write: CacheWrite) -> bytes:
    """``WriteShape`` of native/abi.h: all of a write but its addresses."""
    return _WRITE.pack(*_write_fields(write.cache, write.append, write.batch_size))


def make_plan(problem: AttentionProblem) -> _Plan:
    q, slopes, scores = problem.queries.q, problem.scores.alibi_slopes, problem.scores
    packed = _ATTENTION.pack(
        *_write_fields(problem.cache, problem.append, problem.batch_size),
        *strides(q),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        q.shape[-3],
        problem.cache.k.shape[0],
        q.shape[-2],
        problem.queries.max_seqlen_q,
        scores.window_left,
        scores.window_right,
        problem.num_splits,
        scores.scale,
        scores.softcap,
    )
    return _Plan(packed, problem.out_shape, problem.lse_shape)


def _write_fields(cache: KVCache, append: Append | None, batch: int) -> tuple[int, ...]:
    """``WriteShape`` of native/abi.h."""
    k, v, table = cache.k, cache.v, cache.block_table
    page_size, kv_heads, head_dim = k.shape[-3:]
    cos = None if append is None else append.rotary_cos
    return (
        *((0,) * 6 if append is None else (*strides(append.k_new), *strides(append.v_new))),
        *strides(k),
        *strides(v),
        *((0, 0) if cos is None else cos.shape),
        append is None or append.rotary_interleaved,
        _DTYPES[k.dtype],
        batch,
        0 if append is None else append.k_new.shape[1],
        kv_heads,
        head_dim,
        v.shape[-1],
        k.shape[0] if k.dim() == 4 else 0,
        page_size,
        -1 if table is None else table.shape[1],
    )


def addresses(problem: AttentionProblem, out: Tensor, lse: Tensor) -> bytes:
    """``Addresses`` of native/abi.h, whose first half is ``WriteAddresses``."""
    (
        q, cu_q, used_q, k, v, table, rows, leftpad, lengths, cu_k, k_new, v_new, cos, sin, slopes, sinks,
    ) = [0 if tensor is None else tensor.data_ptr() for tensor in problem.tensors]  # fmt: skip
    return _ADDRESSES.pack(
        k_new, v_new, k, v, lengths, table, rows, cos, sin,
        q, out.data_ptr(), lse.data_ptr(), cu_q, cu_k, used_q, leftpad, slopes, sinks,
    )  # fmt: skip


def _present_isas(native: ctypes.CDLL) -> dict[str, int]:
    """The compiled instruction sets that this processor has, best first, and their numbers."""
    isas, index = {}, 0
    while (name := native.pagedflash_isa_name(index)) is not None:
        if native.pagedflash_isa_present(index):
            isas[name.decode()] = index
        index += 1
    return isas


def _thread_pool() -> tuple[int, int]:
    """Addresses of torch's ``torch_parallel_for`` and ``torch_get_num_threads``, plain C functions since torch 2.10."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    path = Path(torch.__file__).parent / "lib" / name
    try:
        loaded = ctypes.CDLL(str(path))
        functions = loaded.torch_parallel_for, loaded.torch_get_num_threads
    except (OSError, AttributeError) as error:
        raise Unavailable(
            f"this torch ({torch.__version__}) does not offer its thread pool; 2.10 or newer does: {error}"
        ) from error
    parallel_for, num_threads = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    assert parallel_for and num_threads
    return parallel_for, num_threads
