"""The native library: finding it, choosing an instruction set, and packing shapes and addresses for it.

``native/abi.h`` mirrors the layouts written here; the sizes are compared when the library is loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from ...call import NUM_WRITE_TENSORS, AttentionCall, CacheWrite, check_values, check_write_values

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


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run every native call inside with one of ``library().isas``. For tests and comparisons; holds for all threads."""
    chosen = library()
    before, chosen.isa = chosen.isa, chosen.isas[name]
    try:
        yield
    finally:
        chosen.isa = before


class _Shapes(NamedTuple):
    """What calls alike share."""

    packed: bytes  # AttentionShape of native/abi.h
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked) and attend. Lengths and tables are checked natively before anything is written."""
    native = library()
    shapes = call.once("cpu", lambda: describe(call))
    out = torch.empty(*shapes.out_shape, dtype=call.q.dtype, device=_CPU)
    lse = torch.empty(*shapes.lse_shape, dtype=torch.float32, device=_CPU)
    status = native.run_attention(shapes.packed, addresses(call, out, lse), native.isa)
    if status != _DONE:
        if status == _BAD_VALUES:
            check_values(call)
        _fail(status)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Write new keys and values. Lengths and tables are checked natively before anything is written."""
    native = library()
    shape = write.once("cpu", lambda: describe_write(write))
    at = _WRITE_ADDRESSES.pack(*_data(write[:NUM_WRITE_TENSORS]))  # type: ignore[arg-type]
    status = native.run_write(shape, at, native.isa)
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
    fields = _write_fields(
        write.k,
        write.v,
        write.k_cache,
        write.v_cache,
        write.block_table,
        write.rotary_cos,
        write.rotary_interleaved,
        write.k.shape[0],
    )
    return _WRITE.pack(*fields)


def describe(call: AttentionCall) -> _Shapes:
    """All of a call but its addresses, from what calls alike share."""
    q, slopes = call.q, call.alibi_slopes
    if call.cu_seqlens_q is None:
        (_, q_tokens, q_heads, _), q_strides = q.shape, q.stride()
    else:
        (q_tokens, q_heads, _), q_strides = q.shape, (0, *q.stride())
    write_fields = _write_fields(
        call.k_new,
        call.v_new,
        call.k,
        call.v,
        call.block_table,
        call.rotary_cos,
        call.rotary_interleaved,
        call.batch_size,
    )
    packed = _ATTENTION.pack(
        *write_fields,
        *q_strides[:3],
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        q_tokens,
        call.k.shape[0],
        q_heads,
        call.max_seqlen_q,
        call.window_left,
        call.window_right,
        call.num_splits,
        call.scale,
        call.softcap,
    )
    return _Shapes(packed, call.out_shape, call.lse_shape)


def _write_fields(
    k_new: Tensor | None,
    v_new: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_interleaved: bool,
    batch: int,
) -> tuple[int, ...]:
    """``WriteShape`` of native/abi.h."""
    if k.dim() == 4:
        num_pages, page_size, kv_heads, head_dim = k.shape
        k_strides, v_strides = k.stride(), v.stride()
    else:
        (page_size, kv_heads, head_dim), num_pages = k.shape, 0
        k_strides, v_strides = (0, *k.stride()), (0, *v.stride())
    new_strides = (0,) * 6 if k_new is None or v_new is None else (*k_new.stride()[:3], *v_new.stride()[:3])
    return (
        *new_strides,
        *k_strides[:3],
        *v_strides[:3],
        *((0, 0) if rotary_cos is None else rotary_cos.shape),
        rotary_interleaved,
        _DTYPES[k.dtype],
        batch,
        0 if k_new is None else k_new.shape[1],
        kv_heads,
        head_dim,
        v.shape[-1],
        num_pages,
        page_size,
        -1 if block_table is None else block_table.shape[1],
    )


def addresses(call: AttentionCall, out: Tensor, lse: Tensor) -> bytes:
    """``Addresses`` of native/abi.h, whose first half is ``WriteAddresses``."""
    tensors = (
        call.k_new,
        call.v_new,
        call.k,
        call.v,
        call.seqused_k,
        call.block_table,
        call.cache_batch_idx,
        call.rotary_cos,
        call.rotary_sin,
        call.q,
        out,
        lse,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.seqused_q,
        call.cache_leftpad,
        call.alibi_slopes,
        call.sinks,
    )
    return _ADDRESSES.pack(*_data(tensors))


def _data(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


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
