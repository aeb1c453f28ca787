"""The native library: finding it, choosing an instruction set, and packing descriptions for it.

``native/abi.h`` mirrors the two layouts written here; the sizes are compared when the library is loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from ...call import AttentionCall, CacheWrite, check_values, check_write_values

ISA_VARIABLE = "PAGEDFLASH_CPU_ISA"
"""Names the instruction set to use (``avx512bf16``, ``avx512``, ``avx2``, ``neon``, ``generic``) instead of the best one."""

LIBRARY_VARIABLE = "PAGEDFLASH_CPU_LIBRARY"
"""Path of a library to use instead of the installed one: a build with sanitizers, for one."""

LIBRARY = Path(__file__).with_name("pagedflash_cpu.dll" if os.name == "nt" else "libpagedflash_cpu.so")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Every field is 8 bytes wide, in the order of native/abi.h; _pack_write and _pack_attention fill them in that order.
_WRITE_LAYOUT = Struct("33q")
_ATTENTION_LAYOUT = Struct("33q 4q 2q 6q 8q 2d")

_DONE, _BAD_VALUES, _OUT_OF_MEMORY = 0, 1, 2

_SOMEWHERE = 64
"""The address of a table without columns: never read, but not null, which would mean no table."""


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
        for function, layout in (("write", _WRITE_LAYOUT), ("attention", _ATTENTION_LAYOUT)):
            if getattr(native, f"pagedflash_sizeof_{function}")() != layout.size:
                raise Unavailable(f"its native library ({path.name}) is of another version: reinstall pagedflash")
        self.run_attention = native.pagedflash_attention
        self.run_write = native.pagedflash_kv_write
        for run in (self.run_attention, self.run_write):
            run.argtypes = [ctypes.c_char_p, ctypes.c_int64]
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


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked) and attend. Lengths and tables are checked natively before anything is written."""
    native = library()
    out = call.q.new_empty(call.out_shape)
    lse = torch.empty(call.lse_shape, dtype=torch.float32)
    status = native.run_attention(_pack_attention(call, out, lse), native.isa)
    if status != _DONE:
        if status == _BAD_VALUES:
            check_values(call)
        _fail(status)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Write new keys and values. Lengths and tables are checked natively before anything is written."""
    native = library()
    status = native.run_write(_pack_write(write), native.isa)
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


def _pack_write(write: CacheWrite) -> bytes:
    return _WRITE_LAYOUT.pack(*_write_fields(*write))


def _pack_attention(call: AttentionCall, out: Tensor, lse: Tensor) -> bytes:
    q, k = call.q, call.k
    cu_seqlens_q, slopes = call.cu_seqlens_q, call.alibi_slopes
    if cu_seqlens_q is None:
        batch, q_tokens, q_heads, _ = q.shape
        q_strides: tuple[int, ...] = q.stride()
    else:
        batch = cu_seqlens_q.shape[0] - 1
        q_tokens, q_heads, _ = q.shape
        q_strides = (0, *q.stride())
    fields = _write_fields(
        call.k_new,
        call.v_new,
        k,
        call.v,
        call.seqused_k,
        call.block_table,
        call.cache_batch_idx,
        call.rotary_cos,
        call.rotary_sin,
        call.rotary_interleaved,
        batch,
    )
    return _ATTENTION_LAYOUT.pack(
        *fields,
        q.data_ptr(),
        *q_strides[:3],
        out.data_ptr(),
        lse.data_ptr(),
        _address(cu_seqlens_q),
        _address(call.cu_seqlens_k),
        _address(call.seqused_q),
        _address(call.cache_leftpad),
        _address(slopes),
        _address(call.sinks),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        q_tokens,
        k.shape[0],
        q_heads,
        call.max_seqlen_q,
        call.window_left,
        call.window_right,
        call.num_splits,
        call.scale,
        call.softcap,
    )


def _write_fields(
    k_new: Tensor | None,
    v_new: Tensor | None,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    batch: int | None = None,
) -> tuple[int, ...]:
    """The fields of ``CacheWrite`` in native/abi.h."""
    if k.dim() == 4:
        num_pages, page_size, kv_heads, head_dim = k.shape
        k_strides, v_strides = k.stride(), v.stride()
    else:
        (page_size, kv_heads, head_dim), num_pages = k.shape, 0
        k_strides, v_strides = (0, *k.stride()), (0, *v.stride())
    new_rows: tuple[int, ...]
    if k_new is None or v_new is None:
        new_tokens, new_rows = 0, _NO_ROWS
    else:
        new_tokens = k_new.shape[1]
        new_rows = (k_new.data_ptr(), *k_new.stride()[:3], v_new.data_ptr(), *v_new.stride()[:3])
        if batch is None:
            batch = k_new.shape[0]
    assert batch is not None
    return (
        *new_rows,
        k.data_ptr(),
        *k_strides[:3],
        v.data_ptr(),
        *v_strides[:3],
        _address(lengths),
        0 if block_table is None else block_table.data_ptr() or _SOMEWHERE,
        _address(cache_batch_idx),
        _address(rotary_cos),
        _address(rotary_sin),
        *((0, 0) if rotary_cos is None else rotary_cos.shape),
        rotary_interleaved,
        _DTYPES[k.dtype],
        batch,
        new_tokens,
        kv_heads,
        head_dim,
        v.shape[-1],
        num_pages,
        page_size,
        0 if block_table is None else block_table.shape[1],
    )


_NO_ROWS = (0,) * 8


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
