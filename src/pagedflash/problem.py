"""The one description of a problem, made of typed records.

Whatever public function is called, it becomes one :class:`AttentionProblem` (or, for writing without attending, one
:class:`CacheWrite`). Backends read nothing else. A problem is stored flat, all tensors and then all numbers, which is also
the argument list of the operators in :mod:`pagedflash.ops` and what a signature in :mod:`pagedflash.plan_cache` is made of;
the records are views of it. A field added to a record is thereby in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from . import plan_cache
from .signature import addresses_of

LOG2_E = 1 / math.log(2)

QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Formats of a cache whose elements have scales, and the largest value that each stores."""

Tensors = tuple[Tensor | None, ...]
Numbers = tuple[float, ...]
Plan = TypeVar("Plan")
Self = TypeVar("Self", bound="_Flat")


# Every record has its tensors first.


class Queries(NamedTuple):
    """Queries, dense or packed one sequence after another."""

    q: Tensor  # (B, Sq, Hq, D), or packed (total_q, Hq, D)
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32; makes the queries packed
    seqused_q: Tensor | None = None  # (B,) int32, queries used of each packed sequence
    max_seqlen_q: int = 0  # most queries of any sequence


class KVCache(NamedTuple):
    """Keys and values where they lie: paged with ``block_table``, packed with ``cu_seqlens_k`` alone, else dense.

    k and v each have a format, their dtype: that of q, a narrower one under float32, or one of :data:`QUANTIZED`, whose
    elements stand for ``element * descale``. Scales of three axes are one a token and head: an append writes them.
    """

    k: Tensor  # pages (num_pages, page_size, Hkv, D) | packed (total_k, Hkv, D) | dense (B or B_cache, Sk, Hkv, D)
    v: Tensor  # the same with Dv
    k_descale: Tensor | None = None  # float32: 0-dim | (Hkv,) | (B, Hkv), or written: k.shape[:-1]
    v_descale: Tensor | None = None
    block_table: Tensor | None = None  # (B, max_pages) int32
    cache_batch_idx: Tensor | None = None  # (B,) int32, row of a dense cache
    cache_leftpad: Tensor | None = None  # (B,) int32, first valid slot of each sequence
    seqused_k: Tensor | None = None  # (B,) int32, keys of each sequence, before an append; -1 = skip the sequence
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32; with a block table only its differences count
    max_seqlen_k: int = 0  # most keys of any sequence that the caller promises; a hint for splitting


class Append(NamedTuple):
    """New keys and values. Token ``i`` of sequence ``b`` goes to slot ``seqused_k[b] + i``, or where a mapping says."""

    k_new: Tensor  # (B, S_new, Hkv, D), or packed (total_new, Hkv, D)
    v_new: Tensor  # the same with Dv
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2) in the dtype of the keys
    rotary_sin: Tensor | None = None
    cu_seqlens_new: Tensor | None = None  # (B + 1,) int32, of packed tokens; in an attention problem it is cu_seqlens_q
    slot_mapping: Tensor | None = None  # (total_new,) int64, only in a CacheWrite: page * page_size + offset, -1 = nowhere
    rotary_interleaved: bool = True  # True: pairs (0, 1), (2, 3), ... (GPT-J); False: halves (GPT-NeoX)


class Scores(NamedTuple):
    """From q . k to a masked score. A causal mask is ``window_right = 0``."""

    alibi_slopes: Tensor | None = None  # (Hq,) or (B, Hq) float32
    sinks: Tensor | None = None  # (Hq,) float32, one extra logit per head in the softmax denominator
    dropout_seed: Tensor | None = None  # () int64, with dropout
    scale: float = 1.0
    softcap: float = 0.0  # 0 = none
    window_left: int = -1  # -1 = unbounded
    window_right: int = -1
    dropout_p: float = 0.0  # share of the probabilities that is dropped, see backends/dropout.py; 0 = none


class ScoreParams(NamedTuple):
    """The numbers of :class:`Scores` as kernels take them, whose softmax is in base 2."""

    scale: float  # from q . k to a score in base 2, or, where there is a softcap, to the argument of its tanh
    softcap: float  # in base 2; 0 = none
    window_left: int  # -1 = unbounded
    window_right: int
    dropout_threshold: int  # of 2^31: what is dropped; 0 = no dropout
    dropout_scale: float  # of what is kept


def fold_scores(scores: Scores) -> ScoreParams:
    """log2(e) folded into the scale, so that kernels use exp2 and log2."""
    if scores.softcap > 0:
        scale, softcap = scores.scale / scores.softcap, scores.softcap * LOG2_E
    else:
        scale, softcap = scores.scale * LOG2_E, 0.0
    p = scores.dropout_p
    threshold = min(round(p * 2**31), 2**31 - 1)
    return ScoreParams(scale, softcap, scores.window_left, scores.window_right, threshold, 1 / (1 - p))


def is_per_token(descale: Tensor | None) -> bool:
    """Whether there is a scale for each token and head, which an append writes."""
    return descale is not None and descale.dim() == 3


class _Options(NamedTuple):
    """What belongs to no record."""

    num_splits: int = 0  # 0 = the backend decides


_NO_APPEND = Append(None, None)  # type: ignore[arg-type]


def _num_new_tokens(append: Append) -> int:
    *_, tokens, _, _ = append.k_new.shape
    return tokens


class _Field(NamedTuple):
    name: str
    type: Any


def _fields(records: tuple[type, ...], tensors: bool) -> tuple[_Field, ...]:
    fields = [_Field(name, hint) for record in records for name, hint in get_type_hints(record).items()]
    return tuple(field for field in fields if (field.type in (Tensor, Tensor | None)) == tensors)


class _Flat:
    """Records, flattened: ``tensors`` of all of them, then ``numbers`` of all of them."""

    RECORDS: tuple[type, ...]
    TENSOR_FIELDS: tuple[_Field, ...]
    NUMBER_FIELDS: tuple[_Field, ...]
    HINT: int
    """Where the numbers have max_seqlen_k, another one in each step of a generation."""

    def __init_subclass__(cls) -> None:
        cls.TENSOR_FIELDS, cls.NUMBER_FIELDS = _fields(cls.RECORDS, tensors=True), _fields(cls.RECORDS, tensors=False)
        cls.HINT = [name for name, _ in cls.NUMBER_FIELDS].index("max_seqlen_k")

    def __init__(self, tensors: Tensors, numbers: Numbers) -> None:
        self.tensors = tensors
        self.numbers = numbers

    @classmethod
    def from_flat(cls: type[Self], flat: tuple[Any, ...]) -> Self:
        """From all tensors and numbers in one tuple, as an operator gets them."""
        return cls(flat[: len(cls.TENSOR_FIELDS)], flat[len(cls.TENSOR_FIELDS) :])

    @classmethod
    def of_fields(cls: type[Self], **fields: Any) -> Self:
        """From fields by name; the others have their defaults."""
        defaults: dict[str, Any] = {}
        for record in cls.RECORDS:
            defaults |= dict.fromkeys(record._fields) | record._field_defaults  # type: ignore[attr-defined]
        assert fields.keys() <= defaults.keys()
        return cls.from_flat(tuple((defaults | fields)[name] for name, _ in (*cls.TENSOR_FIELDS, *cls.NUMBER_FIELDS)))

    @property
    def flat(self) -> tuple[Any, ...]:
        return (*self.tensors, *self.numbers)

    def map_tensors(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same problem on other tensors."""
        return type(self)(tuple(None if tensor is None else function(tensor) for tensor in self.tensors), self.numbers)

    def named_fields(self) -> dict[str, Any]:
        """Name -> value of every field."""
        return {field.name: value for field, value in zip((*self.TENSOR_FIELDS, *self.NUMBER_FIELDS), self.flat)}

    def replace(self: Self, **fields: Any) -> Self:
        """The same problem with some fields changed."""
        assert fields.keys() <= self.named_fields().keys()
        return self.from_flat(tuple((self.named_fields() | fields).values()))

    @cached_property
    def entry(self) -> plan_cache.Entry | None:
        """What is kept for problems of this signature. None where there is no telling: tensor subclasses, symbolic sizes."""
        return plan_cache.entry_of(self)

    @cached_property
    def addresses(self) -> bytes:
        """Where the tensors lie, 8 bytes each, 0 for None."""
        return addresses_of(*self.tensors)

    def plan(self: Self, key: Hashable, make: Callable[[Self], Plan]) -> Plan:
        """``make(signature)``, made for the first problem of a signature and kept under ``key``.

        The signature is a problem whose tensors are :class:`~pagedflash.plan_cache.TensorSpec`: a plan cannot depend on
        addresses or values.
        """
        if self.entry is None:
            return make(plan_cache.signature_of(self))
        plan = self.entry.plans.get(key)
        if plan is None:
            plan = self.entry.plans[key] = make(cast(Self, self.entry.signature))
        return cast(Plan, plan)

    def _record(self, record: type) -> Any:
        fields = self.named_fields()
        return record(*(fields[name] for name in record._fields))  # type: ignore[attr-defined]

    @cached_property
    def cache(self) -> KVCache:
        return cast(KVCache, self._record(KVCache))

    @property
    def page_size(self) -> int:
        """Tokens of a page, or of a row of a dense cache."""
        return self.cache.k.shape[-3]

    @property
    def capacity(self) -> int:
        """Tokens one sequence can have where it lies: table width times page size, a dense row, or all packed keys."""
        table = self.cache.block_table
        return self.page_size if table is None else table.shape[1] * self.page_size


def _flatten(records: tuple[tuple[Any, ...], ...]) -> tuple[Tensors, Numbers]:
    tensors: Tensors = ()
    numbers: Numbers = ()
    for record in records:
        split = _TENSOR_COUNTS[type(record)]
        tensors += record[:split]
        numbers += record[split:]
    return tensors, numbers


_TENSOR_COUNTS: dict[type, int] = {
    record: len(_fields((record,), tensors=True)) for record in (Queries, KVCache, Append, Scores, _Options)
}


class CacheWrite(_Flat):
    """New keys and values, and where in the cache they go."""

    RECORDS = (KVCache, Append)

    @staticmethod
    def of(cache: KVCache, append: Append) -> CacheWrite:
        return CacheWrite(*_flatten((cache, append)))

    @cached_property
    def append(self) -> Append:
        return cast(Append, self._record(Append))

    @property
    def batch_size(self) -> int:
        """Sequences; each token is one where there is a slot mapping."""
        offsets = self.append.cu_seqlens_new
        return self.append.k_new.shape[0] if offsets is None else offsets.shape[0] - 1

    @property
    def num_new_tokens(self) -> int:
        """New tokens of each sequence, or of all together where they are packed."""
        return _num_new_tokens(self.append)


class AttentionProblem(_Flat):
    """Queries, keys where they lie, new tokens to append to them first, and how scores are made.

    Query ``i`` of a sequence with ``Sq`` queries and ``Sk`` keys (an append included) sits at key position
    ``p = i + Sk - Sq`` and sees the keys ``j`` with ``cache_leftpad <= j < Sk`` and
    ``p - window_left <= j <= p + window_right``.
    """

    RECORDS = (Queries, KVCache, Append, Scores, _Options)

    @staticmethod
    def of(queries: Queries, cache: KVCache, append: Append | None, scores: Scores, num_splits: int = 0) -> AttentionProblem:
        return AttentionProblem(*_flatten((queries, cache, append or _NO_APPEND, scores, _Options(num_splits))))

    @cached_property
    def queries(self) -> Queries:
        return cast(Queries, self._record(Queries))

    @cached_property
    def append(self) -> Append | None:
        append: Append = self._record(Append)
        return None if append.k_new is None and append.v_new is None and append.rotary_cos is None else append

    @cached_property
    def scores(self) -> Scores:
        return cast(Scores, self._record(Scores))

    @property
    def num_splits(self) -> int:
        return cast(int, self.numbers[-1])

    @property
    def write(self) -> CacheWrite:
        """The append of this problem. Only where there is one."""
        assert self.append is not None
        return CacheWrite.of(self.cache, self.append)

    @property
    def batch_size(self) -> int:
        q, cu_seqlens_q, _, _ = self.queries
        return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.queries.q.shape[-2] // self.cache.k.shape[-2]

    @property
    def num_new_tokens(self) -> int:
        """New tokens of each sequence, or of all together where they are packed. 0 without an append."""
        return 0 if self.append is None else _num_new_tokens(self.append)

    @property
    def layout(self) -> str:
        """``"dense"``, ``"varlen"``, ``"paged"`` (dense queries on pages) or ``"paged varlen"`` (chunked prefill)."""
        packed = self.queries.cu_seqlens_q is not None
        if self.cache.block_table is None:
            return "varlen" if packed else "dense"
        return "paged varlen" if packed else "paged"

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.queries.q.shape[:-1], self.cache.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """``(B, Hq, Sq)``, or ``(Hq, total_q)`` for packed queries."""
        q, cu_seqlens_q, _, _ = self.queries
        return (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])


_NAMES = [name for name, _ in AttentionProblem.TENSOR_FIELDS]
K, V, K_DESCALE, V_DESCALE = (_NAMES.index(name) for name in ("k", "v", "k_descale", "v_descale"))
K_NEW = _NAMES.index("k_new")
"""Where a flat problem has its new keys."""
WRITE = slice(_NAMES.index("k"), _NAMES.index("k") + len(CacheWrite.TENSOR_FIELDS))
"""Where it has the tensors of its :class:`CacheWrite`."""
