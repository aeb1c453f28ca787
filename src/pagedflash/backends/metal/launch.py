"""Problems to dispatches: which kernels run, over which grid, with which arguments.

All that follows from a problem's signature is worked out once and kept as a :class:`Plan`. A call then allocates its results
and hands tensors to kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import decode_rows, max_visible_keys, may_be_mixed, queries_rotate_by_position, scale_strides, strides
from ...problem import (
    K_NEW,
    QUANTIZED,
    WRITE,
    Append,
    AttentionProblem,
    CacheWrite,
    KVCache,
    Tensors,
    fold_scores,
    is_per_token,
)
from .. import backward as common
from ..backward import Gradients
from ..protocol import Support
from .compiler import ELEMENT_TYPES, Target, buffers_of, compiled, current_target, source_of
from .params import Params, packed
from .tiling import (
    BACKWARD_SIMDGROUPS_PER_CORE,
    DECODE_MAX_QUERIES,
    LANES,
    LOAD_BYTES,
    MAX_SPLITS,
    MIN_SIMDGROUPS,
    MIXED_DECODE_QUERIES,
    PSEUDO_PAGE,
    BackwardTiling,
    DecodeTiling,
    PrefillTiling,
    backward_tiling,
    choose_backward_parts,
    choose_num_splits,
    choose_team,
    decode_tiling,
    least_split_keys,
    prefill_tiling,
)

COMBINE_SIMDGROUPS = 4

_FLAGS = [field for field in Params._fields if field.startswith("has_")]
_NO_PARAMS = Params(*(0 for _ in Params._fields))
_Q, _K, _V = ([field.name for field in AttentionProblem.TENSOR_FIELDS].index(name) for name in "qkv")

Grid = tuple[int, int, int]


class Dispatch(NamedTuple):
    """One kernel over one grid."""

    kernel: Any
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    """Its arguments, from the problem's tensors, the results and the plan's constants, in one tuple."""
    threads: Grid
    group_size: Grid


class Result(NamedTuple):
    """A tensor that kernels write."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Plan(NamedTuple):
    """All of a problem but its tensors."""

    dispatches: tuple[Dispatch, ...]
    results: tuple[Result, ...]  # out, lse if it is wanted, and what the splits leave for combine
    constants: tuple[Any, ...]  # the other arguments of the kernels: structs, and a stand-in for each absent tensor


def supports(problem: AttentionProblem) -> Support:
    """Whether the kernels can run a problem."""
    cache = problem.cache
    if max(cache.k.stride(-3), cache.v.stride(-3)) * _page_size(cache) >= 2**31:
        return Support(False, "a page spans more than 2^31 elements")
    return Support(True)


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Append (if asked), then attend: ``(out, lse)``. Nothing waits for the GPU."""
    target = current_target()
    tensors: tuple[Any, ...] = problem.tensors
    q = tensors[_Q]
    shared = tensors[K_NEW] is not None and _shares_scales(tensors[WRITE])
    # A signature holds no storage offsets, and wide loads need them to be multiples of a chunk.
    offset = (q.storage_offset() | tensors[_K].storage_offset() | tensors[_V].storage_offset()) % LOAD_BYTES
    plan = problem.plan(
        ("metal", target, offset, shared, with_lse),
        lambda signature: _plan_attention(signature, target, offset, shared, with_lse),
    )  # fmt: skip
    device = q.device
    results = [] if out is None else [out]
    results += [torch.empty(*shape, dtype=dtype, device=device) for shape, dtype in plan.results[len(results) :]]
    _run(plan, (*tensors, *results))
    return results[0], results[1] if with_lse else None


def has_backward_kernel(problem: AttentionProblem) -> bool:
    """Not for sequences that pick rows of a cache, since several may pick the same, nor for heads that are too wide."""
    return problem.cache.cache_batch_idx is None and _backward_tiling(problem, current_target()) is not None


def _backward_tiling(problem: AttentionProblem, target: Target) -> BackwardTiling | None:
    q, k, v = problem.queries.q, *problem.cache[:2]
    return backward_tiling(k.shape[-1], v.shape[-1], q.element_size(), target.tuning)


def backward(problem: AttentionProblem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """The gradients of a problem, as :func:`pagedflash.backends.backward.backward` gives them.

    That function itself takes what the kernel does not (:func:`has_backward_kernel`).
    """
    if not has_backward_kernel(problem):
        return common.backward(problem, out, lse, d_out, d_lse)
    target, (q, k, v) = current_target(), (problem.queries.q, *problem.cache[:2])
    d_out = d_out.contiguous()
    delta = ((out.float() * d_out.float()).sum(-1).mT - d_lse).masked_fill_(lse.isinf(), 0.0).contiguous()
    offset = math.gcd(LOAD_BYTES, *(int(tensor.storage_offset()) for tensor in (q, k, v, d_out)))
    plan = problem.plan(
        ("metal backward", target, offset), lambda signature: _plan_backward(signature, target, offset)
    )  # fmt: skip
    results = [torch.zeros(*shape, dtype=dtype, device=q.device) for shape, dtype in plan.results]
    _run(plan, (*problem.tensors, lse.contiguous(), d_out, delta, *results))

    d_q = results[0].sum(0)[..., : q.shape[-1]].mul(problem.scores.scale).to(q.dtype).contiguous()
    d_k, d_v = (
        parts if parts.shape == keys.shape else parts.unflatten(-2, (keys.shape[-2], -1)).sum(-2)
        for parts, keys in zip(results[1:], (k, v))
    )
    return Gradients(d_q, d_k, d_v, common.sinks_gradient(problem, lse, delta))


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot: one dispatch."""
    target = current_target()
    shared = _shares_scales(write.tensors)
    _run(write.plan(("metal", target, shared), lambda signature: _plan_write(signature, target, shared)), write.tensors)


def _shares_scales(tensors: Tensors) -> bool:
    """Whether values are a part of their keys with one scale for both: written again, they would write another."""
    _, _, k_descale, v_descale, *_ = tensors
    if k_descale is None or v_descale is None or not is_per_token(k_descale):
        return False
    return k_descale.data_ptr() == v_descale.data_ptr()


def _run(plan: Plan, tensors: tuple[Any, ...]) -> None:
    tensors += plan.constants
    for kernel, pick, threads, group_size in plan.dispatches:
        kernel(*pick(tensors), threads=threads, group_size=group_size)


class _Planner:
    """Collects the dispatches of a plan. Kernels name their buffers as a problem its fields; that is how they are bound."""

    def __init__(
        self, signature: AttentionProblem | CacheWrite, target: Target, dtype: torch.dtype, shared: bool = False
    ) -> None:
        self.target, self.shared = target, shared
        self.device, self.dtype = signature.cache.k.device, dtype
        self.names = [
            field.name if tensor is not None and tensor.numel() else None  # what is empty cannot be bound
            for field, tensor in zip(signature.TENSOR_FIELDS, signature.tensors)
        ]
        self.results: dict[str, Result] = {}
        self.constants: dict[str, Any] = {}
        self.dispatches: list[tuple[str, Any, Grid, Grid]] = []

    def bind(self, params: Params) -> None:
        writes = dict(writes_values=int(not self.shared), writes_lse=int("lse" in self.results))
        self.constants["params"] = packed(params._replace(**writes))

    def dispatch(self, name: str, definitions: Mapping[str, int | str], threads: Grid, group_size: Grid) -> None:
        kernel = compiled(self.target.compile_shader, name, source_of(name, self.dtype, definitions))
        self.dispatches.append((name, kernel, threads, group_size))

    def plan(self) -> Plan:
        for name, *_ in self.dispatches:
            for buffer in buffers_of(name):
                if buffer not in self.names and buffer not in self.results:
                    self.constants.setdefault(buffer, _stand_in(self.device, buffer))
        index = {name: i for i, name in enumerate((*self.names, *self.results, *self.constants))}
        dispatches = tuple(
            Dispatch(kernel, itemgetter(*(index[buffer] for buffer in buffers_of(name))), threads, group_size)
            for name, kernel, threads, group_size in self.dispatches
        )
        return Plan(dispatches, tuple(self.results.values()), tuple(self.constants.values()))


@lru_cache(maxsize=256)
def _stand_in(device: torch.device, buffer: str) -> Tensor:
    """What is bound for an absent tensor: never read, but Metal wants a buffer; one each, so that no two overlap."""
    return torch.zeros(4, device=device)


def _plan_write(write: CacheWrite, target: Target, shared: bool) -> Plan:
    planner = _Planner(write, target, write.append.k_new.dtype, shared)
    planner.bind(_write_params(write))
    _add_write(planner, write.cache, write.append)
    return planner.plan()


def _plan_attention(problem: AttentionProblem, target: Target, offset: int, shared: bool, with_lse: bool) -> Plan:
    planner = _Planner(problem, target, problem.queries.q.dtype, shared)
    planner.results["out"] = Result(problem.out_shape, planner.dtype)
    if with_lse:
        planner.results["lse"] = Result(problem.lse_shape, torch.float32)
    planner.constants["score_params"] = packed(fold_scores(problem.scores))
    append, has_rows = problem.append, math.prod(problem.out_shape) > 0
    if has_rows and problem.queries.max_seqlen_q <= DECODE_MAX_QUERIES:
        _add_decode(planner, problem, offset)
    elif has_rows and may_be_mixed(problem):
        _add_decode(planner, problem, offset, MIXED_DECODE_QUERIES)
        _add_prefill(planner, problem, offset, MIXED_DECODE_QUERIES)
    else:
        planner.bind(_params(problem))
        if append is not None:
            _add_write(planner, problem.cache, append)
        if has_rows:
            _add_prefill(planner, problem, offset)
    return planner.plan()


def _add_write(planner: _Planner, cache: KVCache, append: Append) -> None:
    *batch, num_new_tokens, kv_heads, _ = append.k_new.shape
    if not append.k_new.numel():
        return
    heads_together = next(n for n in (8, 4, 2, 1) if kv_heads % n == 0)
    planner.dispatch(
        "kv_write",
        _cache_definitions(cache, append.slot_mapping is not None) | {"ALIGNED": 1},
        (LANES * kv_heads, num_new_tokens, batch[0] if batch else 1),
        (LANES * heads_together, 1, 1),
    )


def _add_decode(planner: _Planner, problem: AttentionProblem, offset: int, decode_limit: int = 0) -> None:
    """Few queries a sequence: ``decode``, which appends; ``kv_write`` before it where several threadgroups read the keys
    of one sequence and head, ``combine`` after it where they are split. With a limit, only sequences of so few."""
    q, cache, append = problem.queries.q, problem.cache, problem.append
    kv_heads, head_dim, v_head_dim = cache.k.shape[-2], q.shape[-1], cache.v.shape[-1]
    sequences = problem.batch_size * kv_heads
    rows = decode_limit * problem.group or max(problem.group, decode_rows(problem))  # q may be all padding
    max_keys = max_visible_keys(problem)
    tuning = planner.target.tuning
    element_bytes = max(cache.k.element_size(), cache.v.element_size())
    tiling = decode_tiling(rows, problem.group, head_dim, v_head_dim, element_bytes, _page_size(cache), tuning)
    row_tiles = -(-rows // tiling.rows)
    scales = is_per_token(cache.k_descale) + is_per_token(cache.v_descale)
    key_bytes = head_dim * cache.k.element_size() + v_head_dim * cache.v.element_size() + scales * torch.float32.itemsize
    least_keys = least_split_keys(
        min(rows, tiling.rows),
        row_bytes=head_dim * q.element_size() + (v_head_dim + 2) * torch.float32.itemsize,
        key_bytes=key_bytes,
    )
    planned = choose_num_splits(sequences * row_tiles, tiling, least_keys, max_keys, planner.target.simdgroups)
    num_splits = min(problem.num_splits or planned, MAX_SPLITS)
    split_keys = -(-max_keys // num_splits)
    threadgroups = sequences * row_tiles * num_splits
    team = choose_team(threadgroups, tiling, split_keys, key_bytes, planner.target.simdgroups, tuning)
    appends = append is not None and append.cu_seqlens_new is None and row_tiles == 1 and not decode_limit
    planner.bind(
        _params(problem)._replace(
            num_splits=num_splits,
            tile_bits=team.tile_keys.bit_length() - 1,
            appends=int(appends),
            decode_limit=decode_limit,
        )
    )
    if append is not None and not appends:
        _add_write(planner, cache, append)
    threads = LANES * team.simdgroups
    planner.dispatch(
        "decode",
        _definitions(problem, tiling, offset),
        (threads * kv_heads, num_splits * row_tiles, problem.batch_size if decode_limit else _grid_batch(problem)),
        (threads, 1, 1),
    )
    if num_splits > 1:
        out_rows = math.prod(problem.out_shape[:-1])
        if decode_limit:
            out_rows = problem.batch_size * decode_limit * q.shape[-2]
        planner.results["out_partial"] = Result((out_rows, num_splits, v_head_dim), torch.float32)
        planner.results["softmax_partial"] = Result((out_rows, num_splits, 2), torch.float32)
        threads = LANES * COMBINE_SIMDGROUPS
        planner.dispatch(
            "combine",
            {"V_HEAD_DIM": v_head_dim, "SIMDGROUPS": COMBINE_SIMDGROUPS},
            (threads * q.shape[-2], out_rows // q.shape[-2], 1),
            (threads, 1, 1),
        )


def _add_prefill(planner: _Planner, problem: AttentionProblem, offset: int, decode_limit: int = 0) -> None:
    """Many queries a sequence, over keys that are in the cache already. With a limit, only sequences of more."""
    q, cache = problem.queries.q, problem.cache
    tiling = prefill_tiling(q.shape[-1], cache.v.shape[-1], q.element_size(), planner.target.tuning)
    threads = LANES * tiling.simdgroups
    row_tiles, layers = -(-decode_rows(problem) // tiling.rows), _grid_batch(problem)
    if decode_limit:  # as many tiles as all sequences may have, each a last one that is not full; and a layer behind them
        total_q = q.shape[0]
        row_tiles = -(-total_q * problem.group // tiling.rows) + min(problem.batch_size, total_q // (decode_limit + 1))
        layers = 2
    planner.dispatch(
        "prefill",
        _definitions(problem, tiling, offset),
        (threads * row_tiles, cache.k.shape[-2], layers),
        (threads, 1, 1),
    )


def _plan_backward(problem: AttentionProblem, target: Target, offset: int) -> Plan:
    q, (k, v) = problem.queries.q, problem.cache[:2]
    kv_heads, group = k.shape[-2], problem.group
    tiling = _backward_tiling(problem, target)
    assert tiling is not None
    parts, num_splits = choose_backward_parts(
        max(1, problem.batch_size * kv_heads),
        group,
        key_tiles=-(-k.shape[-3] // tiling.key_tile),
        slots=max(MIN_SIMDGROUPS, BACKWARD_SIMDGROUPS_PER_CORE * target.core_count) // tiling.simdgroups,
    )
    planner = _Planner(problem, target, q.dtype)
    planner.names += ("lse", "d_out", "delta")
    *rows, head_dim = q.shape
    planner.results["d_q"] = Result((num_splits, *rows, -(-head_dim // 16) * 16), torch.float32)  # loaded 16 dims at a time
    for name, keys in (("d_k", k), ("d_v", v)):
        *tokens, heads, width = keys.shape
        planner.results[name] = Result((*tokens, heads * parts, width), keys.dtype)
    planner.bind(_params(problem)._replace(num_splits=num_splits))
    planner.constants["score_params"] = packed(fold_scores(problem.scores))
    if math.prod(problem.out_shape) and k.numel():
        threads = LANES * tiling.simdgroups
        planner.dispatch(
            "backward",
            {**_definitions(problem, tiling, offset), "HEADS": group // parts, "PARTS": parts},
            (threads * num_splits, kv_heads * parts, problem.batch_size),
            (threads, 1, 1),
        )
    return planner.plan()


def _grid_batch(problem: AttentionProblem) -> int:
    """One layer of threadgroups a sequence, and one for what lies behind the sequences of packed queries."""
    return problem.batch_size + (problem.queries.cu_seqlens_q is not None)


def _params(problem: AttentionProblem) -> Params:
    """The integers of a problem, for all its kernels."""
    q, slopes = problem.queries.q, problem.scores.alibi_slopes
    return _write_params(problem)._replace(
        num_tokens_q=q.shape[-3],
        num_heads=q.shape[-2],
        num_splits=1,
        alibi_batch_stride=0 if slopes is None or slopes.dim() == 1 else slopes.stride(0),
        rotary_by_position=int(queries_rotate_by_position(problem)),
        **_strides("q", q),
    )


def _write_params(problem: AttentionProblem | CacheWrite) -> Params:
    """Those of its cache and its append."""
    fields, append = problem.named_fields(), problem.append
    return _NO_PARAMS._replace(
        batch_size=problem.batch_size,
        **{flag: int(fields.get(flag.removeprefix("has_")) is not None) for flag in _FLAGS},
        **_cache_params(problem.cache, append is not None and append.slot_mapping is not None),
        **({} if append is None else _append_params(append)),
    )


def _cache_params(cache: KVCache, by_slot: bool) -> dict[str, int]:
    """Unpaged keys are pages of ``PSEUDO_PAGE`` tokens that follow each other."""
    is_paged = by_slot or cache.block_table is not None
    max_pages = 0 if cache.block_table is None else cache.block_table.shape[1]
    page_size = cache.k.shape[-3] if cache.k.shape[0] else 0
    params = {
        "max_pages": max_pages,
        "num_pages": cache.k.shape[0],
        "capacity": page_size if cache.block_table is None else page_size * max_pages,
    }
    for name, tensor in (("k", cache.k), ("v", cache.v)):
        outer, token, head = strides(tensor)
        if is_paged:
            batch, page = 0, outer
        else:
            batch, page = token if tensor.dim() == 3 else outer, PSEUDO_PAGE * token  # packed sequences begin at any token
        params |= zip(
            (f"{name}_batch_stride", f"{name}_page_stride", f"{name}_token_stride", f"{name}_head_stride"),
            (batch, page, token, head),
        )
    for name, descale in (("k", cache.k_descale), ("v", cache.v_descale)):
        sequence, outer, token, head = scale_strides(descale)
        batch, page = (0, outer) if is_paged else (outer, PSEUDO_PAGE * token)
        axes = ("sequence", "batch", "page", "token", "head")
        params |= zip((f"{name}_descale_{axis}_stride" for axis in axes), (sequence, batch, page, token, head))
        params[f"writes_{name}_descale"] = int(is_per_token(descale))
    return params


def _append_params(append: Append) -> dict[str, int]:
    cos = append.rotary_cos
    return {
        "num_new_tokens": append.k_new.shape[-3],
        "rotary_half": 0 if cos is None else cos.shape[1],
        "rotary_positions": 0 if cos is None else cos.shape[0],
        "rotary_interleaved": int(append.rotary_interleaved),
        **_strides("k_new", append.k_new),
        **_strides("v_new", append.v_new),
    }


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}_stride": stride for axis, stride in zip(("batch", "token", "head"), strides(tensor))}


def _definitions(
    problem: AttentionProblem, tiling: DecodeTiling | PrefillTiling | BackwardTiling, offset: int
) -> dict[str, int | str]:
    """What kernels that attend are specialised for: the shape, and each number of the tiling under its name in capitals."""
    tensors = (problem.queries.q, problem.cache.k, problem.cache.v)
    aligned = all(number % tiling.chunk == 0 for tensor in tensors for number in (offset, *tensor.stride()[:-1]))
    return {
        **_cache_definitions(problem.cache),
        "GROUP": problem.group,
        "DROPOUT": int(problem.scores.dropout_p > 0),
        "ALIGNED": int(aligned),
        **{name.upper(): value for name, value in tiling._asdict().items()},
    }


def _cache_definitions(cache: KVCache, by_slot: bool = False) -> dict[str, int | str]:
    return {
        "K_T": ELEMENT_TYPES[cache.k.dtype],
        "V_T": ELEMENT_TYPES[cache.v.dtype],
        "K_QUANTIZED": int(cache.k.dtype in QUANTIZED),
        "V_QUANTIZED": int(cache.v.dtype in QUANTIZED),
        "HEAD_DIM": cache.k.shape[-1],
        "V_HEAD_DIM": cache.v.shape[-1],
        "PAGED": int(by_slot or cache.block_table is not None),
        "PAGE_SIZE": cache.k.shape[1] if by_slot else _page_size(cache),
    }


def _page_size(cache: KVCache) -> int:
    return PSEUDO_PAGE if cache.block_table is None else cache.k.shape[1]
