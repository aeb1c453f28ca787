"""Validation of everything about a problem but the values of its lengths and tables.

It looks at types, shapes, dtypes, devices and numbers only: microseconds, no synchronisation with a device, fake tensors
too. It runs once for each signature and raises before anything is written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends.protocol import Capabilities
from .errors import reject, reject_type
from .geometry import v_is_in_k
from .problem import QUANTIZED, Append, AttentionProblem, CacheWrite, KVCache, is_per_token

INDEX_DTYPES = (torch.int32,)
SLOT_DTYPES = (torch.int64,)
SLOPE_DTYPES = (torch.float32,)
SCALE_DTYPES = (torch.float32,)


def validate(problem: AttentionProblem, capabilities: Capabilities) -> None:
    """Raise InvalidType (wrong type or dtype) or InvalidValue, naming the argument, what came and what is expected."""
    queries, cache = problem.queries, problem.cache
    q, k = queries.q, cache.k
    validate_tensor("q", q, "B, Sq, Hq, D" if queries.cu_seqlens_q is None else "total_q, Hq, D", q, capabilities.dtypes)
    _validate_cache(cache, q, problem.batch_size, _formats(cache, q.dtype, capabilities))
    _validate_head_dims(q, cache, capabilities)
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        reject(
            "k",
            "of {heads} heads",
            "a number of heads that divides the {q_heads} of q",
            heads=k.shape[-2],
            q_heads=q.shape[-2],
        )
    _validate_last_axis("q", q)

    _validate_lengths(problem)
    batch = problem.batch_size
    shares_rows = cache.block_table is None and cache.cu_seqlens_k is None and cache.cache_batch_idx is None
    if shares_rows and k.shape[0] != batch:
        reject("k", "of batch size {rows}", "{batch}, as q (or give cache_batch_idx)", rows=k.shape[0], batch=batch)

    append = problem.append
    if append is not None:
        if append.k_new is not None or append.v_new is not None:
            packed = append.cu_seqlens_new is not None
            _validate_new_tokens(append, cache, (q.shape[0],) if packed else (batch, None), q.dtype)
            if cache.seqused_k is None:
                reject("seqused_k", "None", "tokens in the cache before the append, with {k_new}")
        _validate_rotary(append, q, problem.capacity)
    _validate_scores(problem, capabilities)


def validate_write(write: CacheWrite, capabilities: Capabilities) -> None:
    """:func:`validate` for a write of its own."""
    cache, append, batch, k_new = write.cache, write.append, write.batch_size, write.append.k_new
    slots, packed = append.slot_mapping, append.cu_seqlens_new is not None or append.slot_mapping is not None
    validate_tensor("k_new", k_new, _NEW_TOKENS[packed], k_new, capabilities.dtypes)
    _validate_cache(cache, k_new, batch, _cache_formats(k_new.dtype, capabilities))
    _validate_head_dims(cache.k, cache, capabilities)
    _validate_new_tokens(append, cache, (k_new.shape[0],) if packed else (batch, None), k_new.dtype)
    if slots is not None:
        validate_tensor("slot_mapping", slots, "total", cache.k, SLOT_DTYPES)
        validate_shape("slot_mapping", slots, (k_new.shape[0],), "total")
        _validate_pages(cache.k)
        return
    for field, dims, shape in (("seqused_k", "B", (batch,)), ("block_table", "B, max_pages", (batch, None))):
        tensor = getattr(cache, field)
        validate_tensor(field, tensor, dims, cache.k, INDEX_DTYPES)
        validate_shape(field, tensor, shape, dims)


def validate_scales(k: Tensor, v: Tensor, k_descale: Tensor, v_descale: Tensor, appends: bool) -> None:
    """Whose memory scales are in. Addresses are in no signature, so this runs for each call with scales."""
    is_same = k_descale.data_ptr() == v_descale.data_ptr()
    offset = (v.data_ptr() - k.data_ptr()) // k.element_size()
    if v_is_in_k(k, v):
        if not is_same:
            came = "another tensor than {k_descale}, while {v} is the first part of {k}"
            reject("v_descale", came, "the same tensor: keys and values are stored once")
    elif appends and -v.shape[-1] < offset < k.shape[-1]:
        reject("v", "a part of {k} that is not its first", "the first part of {k}, or memory of its own")
    elif appends and is_same and is_per_token(k_descale):
        reject("v_descale", "the same tensor as {k_descale}", "a tensor of its own: an append writes the scales of both")


def validate_out(problem: AttentionProblem, out: Tensor) -> None:
    """The tensor for the output of a valid problem."""
    q = problem.queries.q
    dims = "B, Sq, Hq, Dv" if q.dim() == 4 else "total_q, Hq, Dv"
    validate_tensor("out", out, dims, q, (q.dtype,))
    validate_shape("out", out, problem.out_shape, dims)
    _validate_last_axis("out", out)
    if out.is_neg():
        reject("out", "a lazily negated view", "a tensor as it lies in memory")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*problem.tensors, out)):
        reject("out", "given where gradients are tracked", "none, or a call under torch.no_grad()")


def validate_tensor(field: str, tensor: object, dims: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """``tensor`` must be a strided tensor with one axis per word of ``dims``, on ``like``'s device, of one of ``dtypes``."""
    if not isinstance(tensor, Tensor):
        reject_type(field, "of type {type}", "a torch.Tensor ({dims})", type=type(tensor).__name__, dims=dims)
    if tensor.layout is not torch.strided:
        reject(field, "of layout {layout}", "a strided tensor", layout=tensor.layout)
    if tensor.dim() != (dims.count(",") + 1 if dims else 0):
        reject(field, "of shape {shape}", "({dims})", shape=tuple(tensor.shape), dims=dims)
    if tensor.dtype not in dtypes:
        reject_type(field, "of dtype {dtype}", "{wanted}", dtype=tensor.dtype, wanted=" or ".join(map(str, dtypes)))
    if tensor.device != like.device:
        reject(field, "on {device}", "{wanted}, where q or the cache is", device=tensor.device, wanted=like.device)


def validate_shape(field: str, tensor: Tensor, expected: tuple[int | None, ...], dims: str) -> None:
    """``tensor.shape`` must be ``expected``, where None is any size."""
    for have, want in zip(tensor.shape, expected):
        if want is not None and have != want:
            sizes = ", ".join("*" if size is None else str(size) for size in expected)
            reject(field, "of shape {shape}", "({dims}) = ({sizes})", shape=tuple(tensor.shape), dims=dims, sizes=sizes)


def _validate_last_axis(field: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        reject(
            field,
            "strided by {stride} in its last axis",
            "stride 1 there (a cache is never copied)",
            stride=tensor.stride(-1),
        )


def _formats(cache: KVCache, dtype: torch.dtype, capabilities: Capabilities) -> tuple[torch.dtype, ...]:
    """Formats that keys and values may have under queries of ``dtype``. What is no cache has theirs."""
    if cache.block_table is None and (cache.seqused_k is None or cache.cu_seqlens_k is not None):
        return (dtype,)
    return _cache_formats(dtype, capabilities)


def _cache_formats(dtype: torch.dtype, capabilities: Capabilities) -> tuple[torch.dtype, ...]:
    """Formats that a cache may have under queries or new tokens of ``dtype``."""
    others = [other for other in capabilities.cache_dtypes if other in QUANTIZED or dtype == torch.float32]
    return (dtype, *(other for other in others if other != dtype))


def _validate_cache(cache: KVCache, like: Tensor, batch: int, formats: tuple[torch.dtype, ...]) -> None:
    k, v = cache.k, cache.v
    if cache.block_table is not None:
        dims = "num_pages, page_size, Hkv, D"
    else:
        dims = "B, Sk, Hkv, D" if cache.cu_seqlens_k is None else "total_k, Hkv, D"
    validate_tensor("k", k, dims, like, formats)
    validate_tensor("v", v, dims, like, formats)
    if v.shape[:-1] != k.shape[:-1]:
        reject("v", "of shape {shape}", "{wanted} before head_dim, as {k}", shape=tuple(v.shape), wanted=tuple(k.shape[:-1]))
    if cache.block_table is not None:
        _validate_pages(k)
    _validate_last_axis("k", k)
    _validate_last_axis("v", v)
    _validate_descale("k", k, cache.k_descale, batch)
    _validate_descale("v", v, cache.v_descale, batch)


def _validate_pages(k: Tensor) -> None:
    if k.shape[1] == 0:
        reject("k", "of shape {shape}", "pages of at least one token", shape=tuple(k.shape))


def _validate_descale(field: str, keys: Tensor, descale: Tensor | None, batch: int) -> None:
    """The scales of keys or values, if and only if their format has them."""
    name = f"{field}_descale"
    if (descale is None) == (keys.dtype in QUANTIZED):
        came, expected = ("None", "scales") if descale is None else ("given", "None")
        reject(name, came, f"{expected}, with {{{field}}} of dtype {{dtype}}", dtype=keys.dtype)
    if descale is None:
        return
    if not isinstance(descale, Tensor):
        reject_type(name, "of type {type}", "a torch.Tensor", type=type(descale).__name__)
    shapes = ((), (keys.shape[-2],), (batch, keys.shape[-2]), tuple(keys.shape[:-1]))
    if tuple(descale.shape) not in shapes or (is_per_token(descale) and keys.dim() != 4):
        expected = "one of {shapes}: one scale in all, a head, a sequence and head, or a token and head"
        reject(name, "of shape {shape}", expected, shape=tuple(descale.shape), shapes=", ".join(map(str, shapes)))
    axes = ("", "Hkv", "B, Hkv", "num_pages, page_size, Hkv")
    validate_tensor(name, descale, axes[descale.dim()], keys, SCALE_DTYPES)


def _validate_head_dims(q: Tensor, cache: KVCache, capabilities: Capabilities) -> None:
    head_dim, k_head_dim, multiple = q.shape[-1], cache.k.shape[-1], capabilities.head_dim_multiple
    expected = "1 to {most}" if multiple == 1 else "a multiple of {multiple} up to {most}"
    for field, d, most in (
        ("q", head_dim, capabilities.max_head_dim),
        ("v", cache.v.shape[-1], capabilities.max_v_head_dim),
    ):
        if not 0 < d <= most or d % multiple:
            reject(field, "of head_dim {d}", expected, d=d, multiple=multiple, most=most)
    if k_head_dim != head_dim:
        reject("k", "of head_dim {d}", "{wanted}, as q", d=k_head_dim, wanted=head_dim)


def _validate_lengths(problem: AttentionProblem) -> None:
    """Every tensor of lengths or indices: int32, one entry a sequence."""
    batch, fields = problem.batch_size, problem.named_fields()
    for field, dims, shape in (
        ("cu_seqlens_q", "B + 1", (batch + 1,)),
        ("cu_seqlens_k", "B + 1", (batch + 1,)),
        ("cu_seqlens_new", "B + 1", (batch + 1,)),
        ("seqused_q", "B", (batch,)),
        ("seqused_k", "B", (batch,)),
        ("cache_batch_idx", "B", (batch,)),
        ("cache_leftpad", "B", (batch,)),
        ("block_table", "B, max_pages", (batch, None)),
    ):
        if fields[field] is not None:
            validate_tensor(field, fields[field], dims, problem.queries.q, INDEX_DTYPES)
            validate_shape(field, fields[field], shape, dims)
    if problem.cache.block_table is not None and problem.cache.cache_batch_idx is not None:
        reject("cache_batch_idx", "given together with {block_table}", "one of the two: a table already picks the pages")
    if problem.queries.cu_seqlens_q is None:
        return
    if batch < 0:
        reject("cu_seqlens_q", "empty", "(B + 1) offsets, starting with 0")
    for field in ("max_seqlen_q", "max_seqlen_k"):
        # One that a graph computes is not known before it runs; then the values are validated.
        if not isinstance(fields[field], torch.SymInt) and fields[field] < 0:
            reject(field, "{length}", "at least 0", length=fields[field])


_NEW_TOKENS = {False: "B, S_new, Hkv, D", True: "total, Hkv, D"}
"""Axes of new tokens, by whether they are packed."""


def _validate_new_tokens(append: Append, cache: KVCache, tokens: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """New keys and values come together and fit the caches they go to. ``tokens`` are their first sizes, None any."""
    k_new, v_new = append.k_new, append.v_new
    if k_new is None or v_new is None:
        missing, given = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        reject(missing, "None", f"a tensor, since {{{given}}} is given")
    for field, new, keys in (("k_new", k_new, cache.k), ("v_new", v_new, cache.v)):
        dims = _NEW_TOKENS[len(tokens) == 1]
        validate_tensor(field, new, dims, keys, (dtype,))
        validate_shape(field, new, (*tokens, *keys.shape[-2:]), dims)
    if v_new.shape[:-1] != k_new.shape[:-1]:
        wanted = tuple(k_new.shape[:-1])
        reject("v_new", "of shape {shape}", "{wanted} before head_dim, as {k_new}", shape=tuple(v_new.shape), wanted=wanted)


def _validate_rotary(append: Append, q: Tensor, capacity: int) -> None:
    """As in flash-attn: both tables in q's dtype, at least one row for each slot of the cache."""
    cos, sin = append.rotary_cos, append.rotary_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        reject(missing, "None", "a tensor: rotary_cos and rotary_sin go together")
    if append.k_new is None:
        reject("rotary_cos", "given without new keys", "{k_new} and {v_new} to rotate and append")
    for field, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        validate_tensor(field, table, "seqlen_ro, rotary_dim / 2", q, (q.dtype,))
        validate_shape(field, table, (None, cos.shape[1]), "seqlen_ro, rotary_dim / 2")
        if table.shape[0] < capacity:
            reject(field, "of {rows} positions", "at least {most}, the cache's capacity", rows=table.shape[0], most=capacity)
    if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        reject("rotary_cos", "for rotary_dim {d}", "at most head_dim = {most}", d=2 * cos.shape[1], most=q.shape[-1])


def _validate_scores(problem: AttentionProblem, capabilities: Capabilities) -> None:
    """Scale, window, softcap, ALiBi, sinks, dropout, splits."""
    scores, slopes, sinks = problem.scores, problem.scores.alibi_slopes, problem.scores.sinks
    for field, number in scores._asdict().items():
        if isinstance(number, float) and not math.isfinite(number):
            reject(field, "{number}", "a finite number", number=number)
    q, batch, heads = problem.queries.q, problem.batch_size, problem.queries.q.shape[-2]
    window = scores.window_left, scores.window_right
    if min(window) < -1:
        reject("window_size", "{window}", "two integers of at least -1 (-1 = unbounded)", window=window)
    if scores.softcap < 0:
        reject("softcap", "{cap}", "at least 0 (0 = none)", cap=scores.softcap)
    if problem.num_splits < 0:
        reject("num_splits", "{splits}", "at least 0 (0 = chosen for you)", splits=problem.num_splits)
    if not 0 <= scores.dropout_p < 1:
        reject("dropout_p", "{p}", "at least 0 and below 1", p=scores.dropout_p)
    if scores.dropout_p and not capabilities.dropout:
        reject("dropout_p", "{p}", "0: on {device} there is no dropout yet", p=scores.dropout_p, device=q.device.type)
    if slopes is not None:
        per_sequence = isinstance(slopes, Tensor) and slopes.dim() == 2
        dims = "B, Hq" if per_sequence else "Hq"
        validate_tensor("alibi_slopes", slopes, dims, q, SLOPE_DTYPES)
        validate_shape("alibi_slopes", slopes, (batch, heads) if per_sequence else (heads,), dims)
    if sinks is not None:
        validate_tensor("sinks", sinks, "Hq", q, SLOPE_DTYPES)
        validate_shape("sinks", sinks, (heads,), "Hq")
