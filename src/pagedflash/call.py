"""The one description of a problem, and its checks.

Whatever public function is called, it becomes one :class:`AttentionCall` (or, for writing without attending, one
:class:`CacheWrite`). Every backend reads these two and nothing else. The fields are flat tensors and numbers so that
the same tuple is also the argument list of the operator in :mod:`pagedflash.ops`.

Checks come in two halves. :func:`check` looks at types, shapes, dtypes and devices only: it costs microseconds, works on
fake tensors, and runs for every call. :func:`check_values` looks at lengths and table entries: on a CPU it runs for
every call, on other devices only under ``PAGEDFLASH_CHECK=1``, because reading them would make the host wait. Both
run before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
NO_BACKWARD = "one that does not: there is no backward yet; call under torch.no_grad()"


Tensors = tuple[Tensor | None, ...]
Made = TypeVar("Made")


class _Described:
    """What both descriptions have."""

    @cached_property
    def kept(self) -> dict[object, Any] | None:
        """What was found out about calls alike, to be added to: by the check, and by backends.

        None where that cannot be told (see :func:`_kept_for`).
        """
        return _kept_for(*self._parts())

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What ``make()`` gives, made for the first of the calls alike and kept under ``key``."""
        kept = self.kept
        if kept is None:
            return make()
        made: Made | None = kept.get(key)
        if made is None:
            made = kept[key] = make()
        return made

    def _parts(self) -> tuple[Tensors, tuple[object, ...]]:
        """(tensors, what else calls alike share)"""
        raise NotImplementedError


class _CacheWriteFields(NamedTuple):
    k: Tensor  # (B, S_new, Hkv, D)
    v: Tensor  # (B, S_new, Hkv, Dv)
    k_cache: Tensor  # pages (num_pages, page_size, Hkv, D) with a block table, else (B_cache, capacity, Hkv, D)
    v_cache: Tensor  # the same with Dv
    seq_lens: Tensor  # (B,) int32, tokens in the cache before the write; -1 writes nothing
    block_table: Tensor | None = None  # (B, max_pages) int32
    cache_batch_idx: Tensor | None = None  # (B,) int32, row of an unpaged cache; None = row b
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2), applied to k at position seq_lens[b] + i
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = True  # True: pairs (0, 1), (2, 3), ... (GPT-J); False: halves (GPT-NeoX)


class CacheWrite(_CacheWriteFields, _Described):
    """New keys and values, and where in the cache they go: token ``i`` of sequence ``b`` to slot ``seq_lens[b] + i``."""

    def _parts(self) -> tuple[Tensors, tuple[object, ...]]:
        return cast(Tensors, self[:NUM_WRITE_TENSORS]), self[NUM_WRITE_TENSORS:]

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold for one sequence."""
        return cache_capacity(self.k_cache, self.block_table)


class _AttentionFields(NamedTuple):
    q: Tensor
    k: Tensor  # pages (num_pages, page_size, Hkv, D) | ragged (total_k, Hkv, D) | dense (B or B_cache, Sk, Hkv, D)
    v: Tensor  # the same with Dv <= D
    k_new: Tensor | None = None  # (B, S_new, Hkv, D), appended to k before attention
    v_new: Tensor | None = None
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32; with a block table only its differences count
    seqused_q: Tensor | None = None  # (B,) int32, queries used of each ragged sequence
    seqused_k: Tensor | None = None  # (B,) int32, keys of each sequence, before the append; -1 = skip the sequence
    cache_batch_idx: Tensor | None = None  # (B,) int32, row of a dense cache
    cache_leftpad: Tensor | None = None  # (B,) int32, first valid slot of each sequence
    block_table: Tensor | None = None  # (B, max_pages) int32
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2), q.dtype
    rotary_sin: Tensor | None = None
    alibi_slopes: Tensor | None = None  # (Hq,) or (B, Hq) float32
    sinks: Tensor | None = None  # (Hq,) float32, one extra logit per head in the softmax denominator
    max_seqlen_q: int = 0  # most queries of any sequence
    max_seqlen_k: int = 0  # most keys of any sequence that the caller promises, a hint for splitting
    scale: float = 1.0
    window_left: int = -1  # -1 = unbounded
    window_right: int = -1  # -1 = unbounded, 0 = causal
    softcap: float = 0.0  # 0 = none
    rotary_interleaved: bool = True
    num_splits: int = 0  # 0 = the backend decides


class AttentionCall(_AttentionFields, _Described):
    """One attention problem: queries, keys where they lie, lengths, mask and options.

    Queries are dense ``(B, Sq, Hq, D)`` or, with ``cu_seqlens_q``, ragged ``(total_q, Hq, D)``. Keys are paged with
    ``block_table``, ragged with ``cu_seqlens_k`` alone, dense otherwise. A causal mask is ``window_right = 0``.

    Query ``i`` of a sequence with ``Sq`` queries and ``Sk`` keys (the append included) sits at key position
    ``p = i + Sk - Sq`` and sees the keys ``j`` with ``cache_leftpad <= j < Sk``, ``j >= p - window_left`` and
    ``j <= p + window_right``.
    """

    def _parts(self) -> tuple[Tensors, tuple[object, ...]]:
        # max_seqlen_k is a hint, another one in each step of a generation.
        return cast(Tensors, self[:NUM_TENSORS]), (self.max_seqlen_q, self.max_seqlen_k >= 0, self[NUM_TENSORS + 2 :])

    @property
    def batch_size(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def layout(self) -> str:
        """``"dense"``, ``"varlen"``, ``"paged"`` (dense queries on pages) or ``"paged varlen"`` (chunked prefill)."""
        if self.block_table is None:
            return "dense" if self.cu_seqlens_q is None else "varlen"
        return "paged" if self.cu_seqlens_q is None else "paged varlen"

    @property
    def capacity(self) -> int:
        """Keys one sequence can have where it lies."""
        return cache_capacity(self.k, self.block_table)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """``(B, Hq, Sq)``, or ``(Hq, total_q)`` for ragged queries."""
        shape = self.q.shape
        return (shape[0], shape[2], shape[1]) if self.cu_seqlens_q is None else (shape[1], shape[0])

    @property
    def write(self) -> CacheWrite:
        """The append of this call. Only where ``k_new`` is given."""
        assert self.k_new is not None and self.v_new is not None and self.seqused_k is not None
        return CacheWrite(
            self.k_new,
            self.v_new,
            self.k,
            self.v,
            self.seqused_k,
            self.block_table,
            self.cache_batch_idx,
            self.rotary_cos,
            self.rotary_sin,
            self.rotary_interleaved,
        )


NUM_TENSORS = AttentionCall._fields.index("max_seqlen_q")
NUM_WRITE_TENSORS = CacheWrite._fields.index("rotary_interleaved")
"""Fields of the descriptions that are tensors: those before the numbers."""


KEPT_AT_MOST = 4096
"""Signatures that anything is remembered for; where there are more, all is forgotten."""

_kept: dict[tuple[object, ...], dict[object, Any]] = {}


def _kept_for(tensors: tuple[object, ...], options: tuple[object, ...]) -> dict[object, Any] | None:
    """What is kept for calls with such tensors and these options.

    Alike are tensors of the same shapes, strides, dtypes and devices, at any addresses and with any values. None where
    that cannot be told: with wrong types, tensor subclasses or symbolic sizes.
    """
    signature: list[object] = [options, torch.is_grad_enabled()]
    for tensor in tensors:
        if tensor is None:
            signature.append(None)
        elif tensor.__class__ is Tensor or tensor.__class__ is Parameter:  # sinks come as parameters
            signature += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        else:
            return None
    try:
        kept = _kept.get(key := tuple(signature))
    except TypeError:  # unhashable: symbolic sizes
        return None
    if kept is None:
        if len(_kept) == KEPT_AT_MOST:
            _kept.clear()
        kept = _kept[key] = {}
    return kept


def remember(tensors: tuple[object, ...], options: tuple[object, ...], call: AttentionCall) -> None:
    """Keep how the arguments of a call that has passed :func:`check` became its description.

    ``tensors`` are the arguments in the order of the description's fields, ``options`` all others, checked and as plain
    numbers (1.0 would be found where 1 was kept). Only where no tensor had to be converted: then the next arguments alike
    are the next description's tensors.
    """
    if torch.compiler.is_compiling() or any(a is not b for a, b in zip(tensors, call)):
        return
    if (kept := _kept_for(tensors, options)) is not None and call.kept is not None:
        kept["described"] = call[NUM_TENSORS:], call.kept


def recall(tensors: tuple[object, ...], options: tuple[object, ...]) -> AttentionCall | None:
    """The description of arguments like those of an earlier call, without looking at each of them again; or None."""
    if torch.compiler.is_compiling() or not (kept := _kept_for(tensors, options)):
        return None
    numbers, kept_of_call = kept["described"]
    call = AttentionCall(*tensors, *numbers)  # type: ignore[arg-type]
    call.kept = kept_of_call
    return call


def cache_capacity(keys: Tensor, block_table: Tensor | None) -> int:
    """Tokens that fit one sequence: table width times page size, or the length of a dense row, or all ragged keys."""
    if block_table is not None:
        return block_table.shape[1] * keys.shape[1]
    return keys.shape[1] if keys.dim() == 4 else keys.shape[0]


# --------------------------------------------------------------------------------------------------------------------
# Checks that need no values
# --------------------------------------------------------------------------------------------------------------------

Names = Mapping[str, str]
"""Field of a description -> the caller's name of that argument, where the two differ."""

Namer = Callable[[str], str]

NAMES: Names = {"sinks": "s_aux"}
KVCACHE_NAMES: Names = {
    **NAMES,
    "k": "k_cache",
    "v": "v_cache",
    "k_new": "k",
    "v_new": "v",
    "seqused_k": "cache_seqlens",
}


def refuse(name: str, came: object, expected: str) -> NoReturn:
    """Raise the one form of error this package raises for a wrong value: which argument, what came, what to give."""
    raise ValueError(f"pagedflash: {name} is {came}, expected {expected}")


def check_tensor(name: str, tensor: object, dims: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """``tensor`` must be a tensor with one axis per word of ``dims``, on ``like``'s device, of one of ``dtypes``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"pagedflash: {name} is of type {type(tensor).__name__}, expected a torch.Tensor ({dims})")
    if tensor.dim() != dims.count(",") + 1:
        refuse(name, f"of shape {tuple(tensor.shape)}", f"({dims})")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"pagedflash: {name} is of dtype {tensor.dtype}, expected {wanted}")
    if tensor.device != like.device:
        refuse(name, f"on {tensor.device}", f"{like.device}, where q or the cache is")
    if tensor.is_floating_point() and tensor.requires_grad and torch.is_grad_enabled():
        refuse(name, "a tensor that requires grad", NO_BACKWARD)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], words: str) -> None:
    """``tensor.shape`` must be ``expected``, where None is any size."""
    for have, want in zip(tensor.shape, expected):
        if want is not None and have != want:
            sizes = ", ".join("*" if size is None else str(size) for size in expected)
            refuse(name, f"of shape {tuple(tensor.shape)}", f"({words}) = ({sizes})")


def _check_last_axis(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        refuse(name, f"strided by {tensor.stride(-1)} in its last axis", "stride 1 there (a cache is never copied)")


def check(call: AttentionCall, names: Names) -> bool:
    """Check everything about a call but the values of its lengths and tables.

    A call like one that has passed is not looked at again: that keeps a call's overhead low.

    Returns whether all is plain: tensors in memory and numbers, nothing that stands for them.

    Raises TypeError (wrong type or dtype) or ValueError, naming the argument, what came and what is expected.
    """
    return _check_once(call, lambda: _check_fields(call, names))


def check_write(write: CacheWrite) -> bool:
    """:func:`check` for a write of its own."""
    return _check_once(write, lambda: _check_write_fields(write))


def _check_once(description: _Described, check_fields: Callable[[], None]) -> bool:
    kept = None if torch.compiler.is_compiling() else description.kept
    if kept is None or "passed" not in kept:
        check_fields()
    if kept is not None:
        kept["passed"] = True
    return kept is not None


def _check_fields(call: AttentionCall, names: Names) -> None:
    def name(field: str) -> str:
        return names.get(field, field)

    q, k, v = call.q, call.k, call.v
    ragged_q = call.cu_seqlens_q is not None
    check_tensor("q", q, "total_q, Hq, D" if ragged_q else "B, Sq, Hq, D", q, FLOAT_DTYPES)
    if call.block_table is not None:
        key_dims = "num_pages, page_size, Hkv, D"
    else:
        key_dims = "total_k, Hkv, D" if call.cu_seqlens_k is not None else "B, Sk, Hkv, D"
    same_dtype = (q.dtype,)
    check_tensor(name("k"), k, key_dims, q, same_dtype)
    check_tensor(name("v"), v, key_dims, q, same_dtype)

    head_dim, v_head_dim, q_heads, kv_heads = q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2]
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        refuse("q", f"of head_dim {head_dim}", f"a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}")
    if k.shape[-1] != head_dim:
        refuse(name("k"), f"of head_dim {k.shape[-1]}", f"{head_dim}, as q")
    if not 0 < v_head_dim <= head_dim or v_head_dim % HEAD_DIM_MULTIPLE:
        refuse(name("v"), f"of head_dim {v_head_dim}", f"a multiple of {HEAD_DIM_MULTIPLE} up to {head_dim}, as q")
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        refuse(name("k"), f"of {kv_heads} heads", f"a number of heads that divides the {q_heads} of q")
    if v.shape[:-1] != k.shape[:-1]:
        refuse(name("v"), f"of shape {tuple(v.shape)}", f"{tuple(k.shape[:-1])} before head_dim, as {name('k')}")
    for field in ("q", "k", "v"):
        _check_last_axis(name(field), getattr(call, field))

    batch = call.batch_size
    _check_lengths(call, name, batch)
    if call.block_table is None and call.cu_seqlens_k is None and call.cache_batch_idx is None and k.shape[0] != batch:
        refuse(name("k"), f"of batch size {k.shape[0]}", f"{batch}, as q (or give cache_batch_idx)")
    if call.block_table is not None and k.shape[1] == 0:
        refuse(name("k"), f"of shape {tuple(k.shape)}", "pages of at least one token")

    if call.k_new is not None or call.v_new is not None:
        _check_new_tokens(call.k_new, call.v_new, k, v, batch, name)
        if call.seqused_k is None:
            refuse(name("seqused_k"), "None", f"tokens in the cache before the append, with {name('k_new')}")
    _check_rotary(call, name)
    _check_scores(call, name, batch)


def _check_lengths(call: AttentionCall, name: Namer, batch: int) -> None:
    """Every tensor of lengths or indices: int32, one entry a sequence."""
    for field, dims, shape in (
        ("cu_seqlens_q", "B + 1", (batch + 1,)),
        ("cu_seqlens_k", "B + 1", (batch + 1,)),
        ("seqused_q", "B", (batch,)),
        ("seqused_k", "B", (batch,)),
        ("cache_batch_idx", "B", (batch,)),
        ("cache_leftpad", "B", (batch,)),
        ("block_table", "B, max_pages", (batch, None)),
    ):
        tensor = getattr(call, field)
        if tensor is not None:
            check_tensor(name(field), tensor, dims, call.q, (torch.int32,))
            check_shape(name(field), tensor, shape, dims)
    if call.block_table is not None and call.cache_batch_idx is not None:
        refuse("cache_batch_idx", "given together with block_table", "one of the two: a table already picks the pages")
    if call.cu_seqlens_q is not None:
        if batch < 0:
            refuse("cu_seqlens_q", "empty", "(B + 1) offsets, starting with 0")
        if call.max_seqlen_q < 0:
            refuse("max_seqlen_q", call.max_seqlen_q, "at least 0")
        if call.max_seqlen_k < 0:
            refuse("max_seqlen_k", call.max_seqlen_k, "at least 0")


def _check_write_fields(write: CacheWrite) -> None:
    k_cache, v_cache = write.k_cache, write.v_cache
    check_tensor("k_cache", k_cache, "num_pages, page_size, Hkv, D", k_cache, FLOAT_DTYPES)
    check_tensor("v_cache", v_cache, "num_pages, page_size, Hkv, D", k_cache, (k_cache.dtype,))
    check_shape("v_cache", v_cache, (*k_cache.shape[:3], None), "num_pages, page_size, Hkv, Dv")
    if k_cache.shape[1] == 0:
        refuse("k_cache", f"of shape {tuple(k_cache.shape)}", "pages of at least one token")
    batch = write.k.shape[0]
    _check_new_tokens(write.k, write.v, k_cache, v_cache, batch, lambda field: KVCACHE_NAMES[field])
    for field, dims, shape in (("seq_lens", "B", (batch,)), ("block_table", "B, max_pages", (batch, None))):
        tensor = getattr(write, field)
        check_tensor(field, tensor, dims, k_cache, (torch.int32,))
        check_shape(field, tensor, shape, dims)


def _check_new_tokens(k_new: Tensor | None, v_new: Tensor | None, k: Tensor, v: Tensor, batch: int, name: Namer) -> None:
    """New keys and values come together and fit the caches they go to."""
    if k_new is None or v_new is None:
        missing, given = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        refuse(name(missing), "None", f"a tensor, since {name(given)} is given")
    for field, new, cache in (("k", k_new, k), ("v", v_new, v)):
        check_tensor(name(f"{field}_new"), new, "B, S_new, Hkv, D", cache, (cache.dtype,))
        check_shape(name(f"{field}_new"), new, (batch, k_new.shape[1], *cache.shape[-2:]), "B, S_new, Hkv, D")
        _check_last_axis(name(field), cache)


def _check_rotary(call: AttentionCall, name: Namer) -> None:
    cos, sin = call.rotary_cos, call.rotary_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        refuse(missing, "None", "a tensor: rotary_cos and rotary_sin go together")
    if call.k_new is None:
        refuse("rotary_cos", "given without new keys", f"{name('k_new')} and {name('v_new')} to rotate and append")
    check_rotary_tables(cos, sin, call.q, call.capacity)


def check_rotary_tables(cos: Tensor, sin: Tensor, like: Tensor, capacity: int) -> None:
    """As in flash-attn: both tables in q's dtype, at least one row for each slot of the cache."""
    for table_name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_tensor(table_name, table, "seqlen_ro, rotary_dim / 2", like, (like.dtype,))
        check_shape(table_name, table, (None, cos.shape[1]), "seqlen_ro, rotary_dim / 2")
        if table.shape[0] < capacity:
            refuse(table_name, f"of {table.shape[0]} positions", f"at least {capacity}, the cache's capacity")
    if not 0 < 2 * cos.shape[1] <= like.shape[-1]:
        refuse("rotary_cos", f"for rotary_dim {2 * cos.shape[1]}", f"at most head_dim = {like.shape[-1]}")


def _check_scores(call: AttentionCall, name: Namer, batch: int) -> None:
    """Scale, window, softcap, ALiBi, sinks, splits."""
    heads = call.q.shape[-2]
    if not -float("inf") < call.scale < float("inf"):
        refuse("softmax_scale", call.scale, "a finite number")
    if call.window_left < -1 or call.window_right < -1:
        refuse("window_size", (call.window_left, call.window_right), "two integers of at least -1 (-1 = unbounded)")
    if not 0.0 <= call.softcap < float("inf"):
        refuse("softcap", call.softcap, "a finite number of at least 0 (0 = none)")
    if call.num_splits < 0:
        refuse("num_splits", call.num_splits, "at least 0 (0 = chosen for you)")
    slopes = call.alibi_slopes
    if slopes is not None:
        per_sequence = isinstance(slopes, Tensor) and slopes.dim() == 2
        check_tensor("alibi_slopes", slopes, "B, Hq" if per_sequence else "Hq", call.q, (torch.float32,))
        check_shape("alibi_slopes", slopes, (batch, heads) if per_sequence else (heads,), "B, Hq" if per_sequence else "Hq")
    if call.sinks is not None:
        check_tensor(name("sinks"), call.sinks, "Hq", call.q, (torch.float32,))
        check_shape(name("sinks"), call.sinks, (heads,), "Hq")


# --------------------------------------------------------------------------------------------------------------------
# Checks that read lengths and tables
# --------------------------------------------------------------------------------------------------------------------


def check_values(call: AttentionCall) -> None:
    """Check lengths, offsets and table entries of a call whose :func:`check` has passed. Reads them on the host."""
    batch = call.batch_size
    new_tokens = 0 if call.k_new is None else call.k_new.shape[1]
    if call.cu_seqlens_q is not None:
        longest = _check_offsets("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0])
        _check_used("seqused_q", call.seqused_q, call.cu_seqlens_q)
        if longest > call.max_seqlen_q:
            refuse("max_seqlen_q", call.max_seqlen_q, f"at least {longest}, the longest sequence in cu_seqlens_q")
    if call.cu_seqlens_k is not None:
        ragged = call.block_table is None
        _check_offsets("cu_seqlens_k", call.cu_seqlens_k, call.k.shape[0] if ragged else None)
        if ragged:
            _check_used("seqused_k", call.seqused_k, call.cu_seqlens_k)
    if call.cache_batch_idx is not None:
        for index in call.cache_batch_idx.tolist():
            if not 0 <= index < call.k.shape[0]:
                refuse("cache_batch_idx", f"{index} somewhere", f"rows of the cache, 0 to {call.k.shape[0] - 1}")
        if new_tokens and len(set(call.cache_batch_idx.tolist())) < batch:
            refuse("cache_batch_idx", call.cache_batch_idx.tolist(), "a different row for each sequence that appends")

    lengths = key_lengths(call)
    lengths_name = "seqused_k" if call.cu_seqlens_q is not None else "cache_seqlens"
    if call.seqused_k is None and call.cu_seqlens_k is not None:
        lengths_name = "cu_seqlens_k"
    if call.cu_seqlens_k is None or call.block_table is not None:
        _check_fit(lengths_name, lengths, new_tokens, call.capacity)
    firsts = [0] * batch if call.cache_leftpad is None else call.cache_leftpad.tolist()
    for first, length in zip(firsts, lengths):
        if length >= 0 and not 0 <= first <= length + new_tokens:
            refuse("cache_leftpad", f"{first} for a sequence of {length + new_tokens} tokens", "0 to its length")
    if call.block_table is not None:
        _check_table(call.block_table, firsts, lengths, new_tokens, call.k)


def check_write_values(write: CacheWrite) -> None:
    """:func:`check_values` for a write of its own."""
    lengths = write.seq_lens.tolist()
    new_tokens = write.k.shape[1]
    _check_fit("seq_lens", lengths, new_tokens, write.capacity)
    if write.block_table is not None:
        _check_table(write.block_table, lengths, lengths, new_tokens, write.k_cache)


def key_lengths(call: AttentionCall) -> list[int]:
    """Keys of each sequence before the append, on the host; -1 marks a sequence to skip."""
    if call.seqused_k is not None:
        return call.seqused_k.tolist()
    if call.cu_seqlens_k is not None:
        return call.cu_seqlens_k.diff().tolist()
    return [call.capacity] * call.batch_size


def _check_offsets(name: str, offsets: Tensor, total: int | None) -> int:
    """Offsets start at 0, never fall, and end within ``total``. Returns the longest sequence."""
    values = offsets.tolist()
    if values[0] != 0:
        refuse(name, f"starting with {values[0]}", "0 first")
    longest = 0
    for start, end in zip(values, values[1:]):
        if end < start:
            refuse(name, f"falling from {start} to {end}", "offsets that never fall")
        longest = max(longest, end - start)
    if total is not None and values[-1] > total:
        refuse(name, f"ending with {values[-1]}", f"at most {total}, the tokens there are")
    return longest


def _check_used(name: str, used: Tensor | None, offsets: Tensor) -> None:
    """Used lengths lie within what the offsets give each sequence; -1 (skip) only for keys."""
    if used is None:
        return
    lowest = -1 if name == "seqused_k" else 0
    for count, room in zip(used.tolist(), offsets.diff().tolist()):
        if not lowest <= count <= room:
            refuse(name, f"{count} for a sequence of {room} tokens", f"{lowest} to {room}")


def _check_fit(name: str, lengths: list[int], new_tokens: int, capacity: int) -> None:
    for length in lengths:
        if length < -1:
            refuse(name, f"{length} somewhere", "at least 0, or -1 to skip a sequence")
        if length >= 0 and length + new_tokens > capacity:
            more = f" and {new_tokens} to append" if new_tokens else ""
            refuse(name, f"{length} somewhere{more}", f"at most {capacity} in all, what the cache or table holds")


def _check_table(table: Tensor, firsts: list[int], lengths: list[int], new_tokens: int, pages: Tensor) -> None:
    """Entries that a call reads or writes must be pages; no two sequences may append to one slot."""
    page_size, num_pages = pages.shape[1], pages.shape[0]
    rows = table.tolist()
    written: set[tuple[int, int]] = set()
    for b, (first, length) in enumerate(zip(firsts, lengths)):
        if length < 0:
            continue
        end = length + new_tokens
        for column in range(min(first, length) // page_size, -(-end // page_size)):
            if not 0 <= rows[b][column] < num_pages:
                refuse("block_table", f"{rows[b][column]} at [{b}, {column}]", f"a page, 0 to {num_pages - 1}")
        for token in range(length, end):
            slot = (rows[b][token // page_size], token % page_size)
            if slot in written:
                refuse("block_table", f"sending two new tokens to slot {slot[1]} of page {slot[0]}", "a slot for each")
            written.add(slot)
