"""Launches, through CUDA's driver, of kernels that Triton has compiled: less of the host's time than by Triton's launcher.

What the driver is told of a launch lies in memory that is written once; a launch puts the addresses of its tensors there.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from ctypes import CDLL, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache
from struct import pack
from typing import Any, NamedTuple

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID
INVALID_CONTEXT = 201  # of CUresult
L2_PROMOTION_128B = 2  # of CUtensorMapL2promotion

FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}
"""Triton's types of numbers, and how Python's ``struct`` packs them."""

ADDRESS, MAP = 8, 128
"""Bytes of an address, and of a CUtensorMap."""

SCRATCH = 2
"""Addresses of memory behind a kernel's own parameters: for Triton's own use, and for its profiler."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_uint64), ("value", c_uint32), ("rest", c_uint32 * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", c_uint),
    )


class MapShape(NamedTuple):
    """The tensor of a TMA descriptor, but for its address."""

    tensor: int  # which of the kernel's
    data_type: int  # CUtensorMapDataType
    shape: Sequence[int]
    strides: Sequence[int]  # in elements


class DriverLaunch:
    """A launch of a compiled kernel, but for addresses and the stream."""

    def __init__(
        self,
        compiled: Any,
        device_index: int,
        grid: tuple[int, int, int],
        records: tuple[Any, ...],
        descriptors: Sequence[MapShape | None],
    ) -> None:
        """
        Args:
            compiled: Triton's compiled kernel, whose first parameter is a record of tensors.
            records: its other parameters, tuples of numbers and tuples.
            descriptors: its tensor descriptors, behind those; None where it has none.

        Raises:
            Unknown: it takes what is not known here.
        """
        metadata, signature = compiled.metadata, tuple(compiled.src.signature.values())
        if metadata.num_ctas > 1 or metadata.launch_cooperative_grid or metadata.global_scratch_size:
            raise Unknown("it wants clusters, a cooperative grid or scratch memory")
        self._driver = driver()
        self._function = c_void_p(compiled.function)
        self._device_index = device_index
        self._addresses = len(signature[0]) * ADDRESS
        self._lock = threading.Lock()  # launches of several threads write to the same memory

        # | addresses of the tensors, up to a multiple of 64 bytes | descriptors | numbers, 8 bytes each |
        first_map = -(-self._addresses // 64) * 64
        numbers, where = bytearray(), []  # where: offset and size of each parameter
        maps = [_Map(first_map + MAP * i, shape) for i, shape in enumerate(filter(None, descriptors))]
        rest = iter(maps)
        given = [range(len(signature[0])), *records, *(shape and next(rest) for shape in descriptors)]
        for kind, value in _parameters(signature, given):
            if kind == "map":
                where.append((value, MAP))
            elif kind.startswith("*"):
                where.append((value * ADDRESS, ADDRESS))
            elif kind in FORMATS:
                content = pack(FORMATS[kind], value)
                where.append((first_map + MAP * len(maps) + len(numbers), len(content)))
                numbers += content.ljust(8, b"\0")
            else:
                raise Unknown(f"it takes a parameter of type {kind}")
        for _ in range(SCRATCH):
            where.append((first_map + MAP * len(maps) + len(numbers), ADDRESS))
            numbers += bytes(ADDRESS)
        if _sizes_of_parameters(self._function) != [size for _, size in where]:
            raise Unknown("its parameters are others than those of Triton 3.6 to 3.9")

        size = first_map + MAP * len(maps) + len(numbers)
        self._memory = (ctypes.c_char * (size + 64))()
        start = -ctypes.addressof(self._memory) % 64
        self._view = memoryview(self._memory).cast("B")[start : start + size]
        self._view[size - len(numbers) :] = numbers
        base = ctypes.addressof(self._memory) + start
        self._parameters = (c_void_p * len(where))(*(base + offset for offset, _ in where))
        self._maps = [(base + map.offset, map.shape.tensor * ADDRESS) for map in maps]
        for map, description in zip(maps, metadata.tensordesc_meta):
            _encode(base + map.offset, map.shape, description)

        attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 1)
        block = (32 * metadata.num_warps, 1, 1)
        self._config = _Config(grid, block, metadata.shared, None, ctypes.pointer(attribute), int(metadata.launch_pdl))
        self._arguments = ctypes.byref(self._config), self._function, self._parameters, None

    def __call__(self, addresses: bytes, stream: int) -> None:
        """Launch with tensors at packed ``addresses``, 0 for None."""
        driver = self._driver
        with self._lock:
            self._view[: self._addresses] = addresses
            for at, offset in self._maps:
                driver.cuTensorMapReplaceAddress(at, int.from_bytes(addresses[offset : offset + ADDRESS], "little"))
            self._config.stream = stream
            status = driver.cuLaunchKernelEx(*self._arguments)
            if status == INVALID_CONTEXT:  # the first that this thread wants of CUDA
                _bind_context(self._device_index)
                status = driver.cuLaunchKernelEx(*self._arguments)
        if status:
            _fail(status)


class Unknown(Exception):
    """Why a kernel cannot be launched here, as the end of a sentence."""


class _Map(NamedTuple):
    offset: int
    shape: MapShape


@cache
def driver() -> Any:
    """The library of CUDA's driver.

    Raises:
        Unknown: there is none that has all functions that are called here.
    """
    try:
        library = CDLL("libcuda.so.1")
        library.cuLaunchKernelEx.argtypes = [c_void_p] * 4
        library.cuTensorMapReplaceAddress.argtypes = [c_void_p, c_void_p]
        library.cuTensorMapEncodeTiled.argtypes = [
            c_void_p, c_int, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int
        ]  # fmt: skip
        library.cuFuncGetParamInfo.argtypes = [c_void_p, c_size_t, c_void_p, c_void_p]
    except (OSError, AttributeError) as error:
        raise Unknown(f"CUDA's driver, 12.4 or newer, cannot be had: {error}") from None
    return library


def _parameters(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of all that a kernel is given: constants are not."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif isinstance(value, _Map):
            yield "map", value.offset
            yield from (("i32", extent) for extent in value.shape.shape)
            yield from (("i64", stride) for stride in value.shape.strides)
        elif kind != "constexpr":
            yield kind, value


def _sizes_of_parameters(function: c_void_p) -> list[int]:
    """As the driver knows them."""
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    while driver().cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes


def _encode(at: int, tensor: MapShape, description: dict[str, Any]) -> None:
    """Write a CUtensorMap, as Triton does; the innermost axis comes first there."""
    rank, bytes_each = len(tensor.shape), description["elem_size"]
    extents = (c_uint64 * rank)(*reversed(tensor.shape))
    strides = (c_uint64 * (rank - 1))(*(bytes_each * stride for stride in tensor.strides[-2::-1]))
    box = (c_uint32 * rank)(*reversed(description["block_size"]))
    ones = (c_uint32 * rank)(*[1] * rank)
    no_interleave = no_fill = 0
    anywhere = 256
    status = driver().cuTensorMapEncodeTiled(
        at, tensor.data_type, rank, anywhere, extents, strides, box, ones, no_interleave, description["swizzle"],
        L2_PROMOTION_128B, no_fill,
    )  # fmt: skip
    if status:
        _fail(status)


def _bind_context(device_index: int) -> None:
    """To this thread, the context of a device that torch uses too."""
    device, context = c_int(), c_void_p()
    library = driver()
    for status in (
        library.cuDeviceGet(ctypes.byref(device), device_index),
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        library.cuCtxSetCurrent(context),
    ):
        if status:
            _fail(status)


def _fail(status: int) -> None:
    name = ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    raise RuntimeError(f"pagedflash: CUDA's driver refused a launch: {(name.value or b'unknown error').decode()}")
