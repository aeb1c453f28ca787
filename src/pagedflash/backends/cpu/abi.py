"""What crosses to the native library, field by field, as ``native/abi.def`` lists it.

The library says which fields it was compiled with. When it is loaded, :func:`mismatch` compares them with the records here:
names, types and order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from struct import Struct
from typing import Any, NamedTuple, get_type_hints

from ...problem import AttentionProblem, CacheWrite, ScoreParams


class Strides(NamedTuple):
    batch: int  # from sequence to sequence, or from page to page; 0 if packed
    token: int
    head: int


class ScaleStrides(NamedTuple):
    sequence: int
    batch: int
    token: int
    head: int


class QueryShape(NamedTuple):
    q_stride: Strides
    q_tokens: int
    q_heads: int
    max_seqlen_q: int


class WriteShape(NamedTuple):
    k_stride: Strides
    v_stride: Strides
    k_descale_stride: ScaleStrides
    v_descale_stride: ScaleStrides
    k_new_stride: Strides
    v_new_stride: Strides
    rotary_rows: int
    rotary_pairs: int
    rotary_interleaved: bool
    dtype: int
    k_dtype: int
    v_dtype: int
    writes_k_descale: bool
    writes_v_descale: bool
    batch_size: int
    num_new_tokens: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    num_pages: int
    page_size: int
    table_width: int


class AttentionShape(NamedTuple):
    queries: QueryShape
    write: WriteShape
    scores: ScoreParams
    alibi_batch_stride: int
    num_splits: int


_NUMBERS = {int: ("int64_t", "q"), bool: ("int64_t", "q"), float: ("double", "d")}
"""Type of a field -> its name in C, its format in ``struct``. All take 8 bytes."""

_TENSORS = [field.name for field in AttentionProblem.TENSOR_FIELDS]
_WRITE_TENSORS = [field.name for field in CacheWrite.TENSOR_FIELDS]
_FIRST_OF_WRITE = _TENSORS.index(_WRITE_TENSORS[0])

_ADDRESSES = {
    "QueryAddresses": _TENSORS[:_FIRST_OF_WRITE],
    "WriteAddresses": _WRITE_TENSORS,
    "ScoreAddresses": _TENSORS[_FIRST_OF_WRITE + len(_WRITE_TENSORS) :],
    "OutputAddresses": ["out", "lse"],
    "GradientAddresses": ["d_out", "d_lse", "d_q", "d_k", "d_v", "delta"],
}
"""Struct -> its tensors: those of a problem, in their order, then the outputs, then the gradients.

Addresses are packed by ``signature.addresses_of``."""


def pack_shape(record: WriteShape | AttentionShape) -> bytes:
    """The struct of a record's name."""
    return Struct(_format(type(record))).pack(*_flatten(record))


def mismatch(native: str) -> str | None:
    """Where the structs of a library differ from the records here, or None.

    Args:
        native: what ``pagedflash_abi()`` returns: a struct a line, its name and then its fields.
    """
    structs = {name: fields for name, *fields in map(str.split, native.splitlines())}
    for name, expected in _structs().items():
        for theirs, ours in zip_longest(structs.get(name, []), expected, fillvalue="nothing"):
            if theirs != ours:
                return f"{theirs} in {name} where {ours} is expected"
    return None


def _structs() -> dict[str, list[str]]:
    structs = dict(_ADDRESSES)
    structs["AttentionAddresses"] = [
        f"{field}:{struct}" for field, struct in zip(("queries", "write", "scores", "outputs"), _ADDRESSES)
    ]
    structs["BackwardAddresses"] = ["attention:AttentionAddresses", "gradients:GradientAddresses"]
    for record in (Strides, ScaleStrides, QueryShape, WriteShape, ScoreParams, AttentionShape):
        structs[record.__name__] = [
            f"{field}:{_NUMBERS[kind][0] if kind in _NUMBERS else kind.__name__}"
            for field, kind in get_type_hints(record).items()
        ]
    return structs


def _format(record: type) -> str:
    kinds = get_type_hints(record).values()
    return "".join(_NUMBERS[kind][1] if kind in _NUMBERS else _format(kind) for kind in kinds)


def _flatten(record: tuple[Any, ...]) -> Iterator[float]:
    for value in record:
        if isinstance(value, tuple):
            yield from _flatten(value)
        else:
            yield value
