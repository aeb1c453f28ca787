"""The native library: finding it, choosing an instruction set, and running problems on it."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ...geometry import scale_strides, strides
from ...problem import Append, AttentionProblem, CacheWrite, KVCache, fold_scores, is_per_token
from ...scoped import Scoped
from ...signature import addresses_of
from ...validate_values import check_values, check_write_values
from ..allocation import Allocate, contiguous
from ..backward import Gradients, empty_gradients, sinks_gradient
from .abi import AttentionShape, QueryShape, ScaleStrides, Strides, WriteShape, mismatch, pack_shape

ISA_VARIABLE = "PAGEDFLASH_CPU_ISA"
"""The instruction set to use instead of the best: ``amx``, ``avx512bf16``, ``avx512``, ``avx2``, ``neon``, ``generic``."""

LIBRARY_VARIABLE = "PAGEDFLASH_CPU_LIBRARY"
"""Path of a library to use instead of the installed one: a build with sanitizers, for one."""

LIBRARY = Path(__file__).with_name("pagedflash_cpu.dll" if os.name == "nt" else "libpagedflash_cpu.so")

_DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}

_OK, _INVALID_VALUES, _OUT_OF_MEMORY = 0, 1, 2


class Unavailable(Exception):
    """The native library cannot be used here; the message says why."""


class Library:
    """The loaded library, running on torch's thread pool with one instruction set."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise Unavailable(
                f"its native library ({path.name}) was not built: install pagedflash from a wheel, or with pip"
            )
        self.path = path
        parallel_for, num_threads = _thread_pool()
        try:
            native = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"its native library cannot be loaded: {error}") from error
        if not hasattr(native, "pagedflash_abi"):
            raise Unavailable(f"its native library ({path.name}) is of another version: reinstall pagedflash")
        native.pagedflash_abi.restype = ctypes.c_char_p
        if difference := mismatch(native.pagedflash_abi().decode()):
            raise Unavailable(
                f"its native library ({path.name}) is of another version, it has {difference}: reinstall pagedflash"
            )
        native.pagedflash_isa_name.restype = ctypes.c_char_p
        for function in ("isa_name", "isa_present"):
            getattr(native, f"pagedflash_{function}").argtypes = [ctypes.c_int64]
        native.pagedflash_best_isa.restype = ctypes.c_int64
        native.pagedflash_use_pool.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.run_attention = native.pagedflash_attention
        self.run_write = native.pagedflash_kv_write
        self.run_backward = native.pagedflash_backward
        for run in (self.run_attention, self.run_write, self.run_backward):
            run.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
            run.restype = ctypes.c_int64
        native.pagedflash_use_pool(parallel_for, num_threads)
        self.isas = _present_isas(native)
        if not self.isas:
            raise Unavailable("this processor has none of the instruction sets it is compiled for")
        self.isa = self._chosen_isa(native.pagedflash_best_isa())

    def _chosen_isa(self, best: int) -> int:
        name = os.environ.get(ISA_VARIABLE)
        if name is None:
            return best
        if name not in self.isas:
            raise Unavailable(f"{ISA_VARIABLE} is {name}, expected one of {', '.join(self.isas)}")
        return self.isas[name]


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


class Plan(NamedTuple):
    """What problems of one signature share."""

    shape: bytes  # AttentionShape
    out: Allocate
    lse: Allocate


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Append (if asked) and attend. Lengths and tables are validated natively before anything is written."""
    native = library()
    plan = problem.plan("cpu", make_plan)
    if out is None:
        out = plan.out()
    lse = plan.lse() if with_lse else None
    status = native.run_attention(plan.shape, problem.addresses + addresses_of(out, lse), _isa(native))
    if status != _OK:
        if status == _INVALID_VALUES:
            check_values(problem)
        _fail(status)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Write new keys and values. Lengths and tables are validated natively before anything is written."""
    native = library()
    shape = write.plan("cpu", make_write_plan)
    status = native.run_write(shape, write.addresses, _isa(native))
    if status != _OK:
        if status == _INVALID_VALUES:
            check_write_values(write)
        _fail(status)


def backward(problem: AttentionProblem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """The gradients of a problem without an append, a block table and scales. See ``backends/backward.py``."""
    native = library()
    plan = problem.plan("cpu", make_plan)
    results = tuple(tensor.contiguous() for tensor in (out, lse, d_out, d_lse))
    gradients, delta = empty_gradients(problem), torch.empty_like(results[1])
    addresses = problem.addresses + addresses_of(*results, *gradients[:3], delta)
    status = native.run_backward(plan.shape, addresses, _isa(native))
    if status != _OK:
        if status == _INVALID_VALUES:
            check_values(problem)
        _fail(status)
    if problem.scores.sinks is not None:
        gradients.sinks.copy_(sinks_gradient(problem, results[1], delta))
    return gradients


def _fail(status: int) -> NoReturn:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("pagedflash: out of memory for the scratch space of a call; nothing was written")
    raise RuntimeError(
        "pagedflash: the native library rejected lengths or tables that the Python check accepts; please report it"
    )


def make_plan(problem: AttentionProblem) -> Plan:
    q, slopes = problem.queries.q, problem.scores.alibi_slopes
    shape = AttentionShape(
        queries=QueryShape(
            q_stride=Strides(*strides(q)),
            q_tokens=q.shape[-3],
            q_heads=q.shape[-2],
            max_seqlen_q=problem.queries.max_seqlen_q,
        ),
        write=_write_shape(problem.cache, problem.append, problem.batch_size, q.dtype),
        scores=fold_scores(problem.scores),
        alibi_batch_stride=slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        num_splits=problem.num_splits,
    )
    cpu = torch.device("cpu")
    return Plan(
        pack_shape(shape), contiguous(problem.out_shape, q.dtype, cpu), contiguous(problem.lse_shape, torch.float32, cpu)
    )


def make_write_plan(write: CacheWrite) -> bytes:
    return pack_shape(_write_shape(write.cache, write.append, write.batch_size, write.append.k_new.dtype))


def _write_shape(cache: KVCache, append: Append | None, batch_size: int, dtype: torch.dtype) -> WriteShape:
    k, v, table = cache.k, cache.v, cache.block_table
    page_size, kv_heads, head_dim = k.shape[-3:]
    k_new_stride = v_new_stride = Strides(0, 0, 0)
    num_new_tokens, rotary_rows, rotary_pairs, rotary_interleaved = 0, 0, 0, False
    if append is not None:
        k_new_stride, v_new_stride = Strides(*strides(append.k_new)), Strides(*strides(append.v_new))
        num_new_tokens, rotary_interleaved = append.k_new.shape[-3], append.rotary_interleaved
        if append.rotary_cos is not None:
            rotary_rows, rotary_pairs = append.rotary_cos.shape
    return WriteShape(
        k_stride=Strides(*strides(k)),
        v_stride=Strides(*strides(v)),
        k_descale_stride=ScaleStrides(*scale_strides(cache.k_descale)),
        v_descale_stride=ScaleStrides(*scale_strides(cache.v_descale)),
        k_new_stride=k_new_stride,
        v_new_stride=v_new_stride,
        rotary_rows=rotary_rows,
        rotary_pairs=rotary_pairs,
        rotary_interleaved=rotary_interleaved,
        dtype=_DTYPES[dtype],
        k_dtype=_DTYPES[k.dtype],
        v_dtype=_DTYPES[v.dtype],
        writes_k_descale=is_per_token(cache.k_descale),
        writes_v_descale=is_per_token(cache.v_descale),
        batch_size=batch_size,
        num_new_tokens=num_new_tokens,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v.shape[-1],
        num_pages=k.shape[0] if k.dim() == 4 else 0,
        page_size=page_size,
        table_width=-1 if table is None else table.shape[1],
    )


def _present_isas(native: ctypes.CDLL) -> dict[str, int]:
    """The compiled instruction sets that this processor has, the newest first, and their numbers."""
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
