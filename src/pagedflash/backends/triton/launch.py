"""From a problem to launches: which kernel, with which arguments.

What depends on shapes, strides and options only is made once and kept as a plan: an eager call of a model's layer finds its
plan, and adds the addresses of its tensors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...errors import reject_type
from ...geometry import max_visible_keys, may_be_mixed, queries_rotate_by_position, scale_strides, strides, v_fits_in_k
from ...problem import WRITE, Append, AttentionProblem, CacheWrite, K, V, fold_scores, is_per_token
from ...signature import addresses_of
from ..allocation import Allocate, contiguous
from .compiled import CompiledLaunch, are_aligned, compute_capability, has_pdl, num_sms
from .kernels.combine import combine
from .kernels.decode import decode
from .kernels.kv_write import kv_write as kv_write_kernel
from .kernels.params import (
    AppendParams,
    CacheParams,
    DecodeTile,
    HopperTile,
    PrefillTile,
    ProblemParams,
    QueryParams,
    ScaleStrides,
    Strides,
    WriteParams,
    WriteTile,
)
from .kernels.prefill import prefill
from .kernels.score import ScoreParams
from .semaphores import semaphores
from .tiling import (
    HOPPER_DECODE,
    Tiling,
    decode_box,
    decode_rows,
    decode_tiling,
    hopper_tile,
    power_of_two,
    prefill_tiling,
    row_align,
    rows_tile,
    stride_factor,
    tile_widths,
    widest,
    word_format,
)

FEW_QUERIES = 4
"""Queries of a sequence up to which a call goes to ``decode`` even if the query heads of a KV head take several tiles."""

MORE_QUERIES = 16
"""The same where ``prefill`` is slow: quantized keys, which it converts one by one, or too few work tiles for half of the
SMs, since it splits none."""

MIXED_DECODE_ROWS = 16
"""The same of each sequence of a mixed batch, unless one query has more: what the matrix units take at least, so that decode
is as fast as in a call of its own."""

MAX_FUSED_TOKENS = 64
"""New tokens of a sequence up to which ``decode`` appends them itself."""

E4M3_CAPABILITY = (8, 9)

MAX_WRITTEN_TOKENS = 16
"""New tokens that a CTA of ``kv_write`` takes together: fewer where packed ones would not give all SMs a CTA."""

MAX_UNSPLIT_TILES = 4
"""KV tiles of a sequence up to which ``decode`` splits no work tile: too few to be worth it."""

MAX_UNSPLIT_KEYS = 1024
"""The same in keys, where there are work tiles for half of the SMs: even one long one among short ones is read in about the
time that splitting costs."""

MAX_FUSED_SPLITS, MAX_FUSED_VALUES, MAX_SPLIT_VALUES = 10, 40960, 8192
"""Splits of a work tile, on average, and values of all and of each, up to which its last CTA reduces them; more are left to
``combine``."""

MANY_SPLITS = 64
"""From so many on, on average, an SM has one CTA: that halves what is stored and reduced, which takes the most time then."""

DECODE_SPLITS, DECODE_VALUES = 8, 4096
"""Splits, and values of them, that this CTA loads together at most."""

ROWS_VALUES = 16384
"""The same of a warp group of ``decode_rows_hopper``."""

COMBINE_SPLITS, COMBINE_VALUES = 64, 8192
"""The same of ``combine``."""

FEW_SEQUENCES, MANY_SEQUENCES = 32, 256
"""Lengths that a CTA looks at together: what one warp holds, or for larger batches all four."""


_K_ADDRESS, _V_ADDRESS, _WRITE_ADDRESSES = (
    slice(8 * tensors.start, 8 * tensors.stop) for tensors in (slice(K, K + 1), slice(V, V + 1), WRITE)
)
"""Where the packed addresses of a problem's tensors have them."""


class _Plan(NamedTuple):
    """What problems of one signature share."""

    out: Allocate
    lse: Allocate | None  # None where nobody wants it
    write: CompiledLaunch | None = None  # of new tokens that ``decode`` does not append itself
    attend: tuple[CompiledLaunch, ...] = ()  # one after another; none where there is nothing to attend to
    partials: Allocate | None = None  # of splits
    semaphores: int = 0  # where ``decode`` reduces splits itself


# --------------------------------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------------------------------


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Append (if asked), then attend with ``decode`` (and ``combine``), ``prefill``, or both."""
    tensors = problem.tensors
    q = cast(Tensor, tensors[0])
    device = q.device
    if is_elsewhere(device):
        with torch.cuda.device(device):
            return attention(problem, out, with_lse)
    addresses = problem.addresses
    facts = are_aligned(addresses), precision_of(q.dtype), addresses[_K_ADDRESS] == addresses[_V_ADDRESS], with_lse
    plan = problem.plan(("triton", facts), lambda signature: _plan_attention(signature, *facts))

    if out is None:
        out = plan.out()
    lse = None if plan.lse is None else plan.lse()
    if plan.write is not None:
        plan.write(tensors[WRITE], addresses[_WRITE_ADDRESSES])
    if not plan.attend:
        return out.zero_(), None if lse is None else lse.fill_(math.inf)
    counters = partials = None
    if plan.partials is not None:
        partials = plan.partials()
        if plan.semaphores:
            counters = semaphores(device, plan.semaphores)
    tensors = (*tensors, out, lse, partials, counters)
    addresses += addresses_of(out, lse, partials, counters)
    for launch in plan.attend:
        launch(tensors, addresses)
    return out, lse


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    tensors = write.tensors
    device = cast(Tensor, tensors[0]).device
    if is_elsewhere(device):
        with torch.cuda.device(device):
            return kv_write(write)
    addresses = write.addresses
    facts = are_aligned(addresses), addresses[:8] == addresses[8:16]
    launch = write.plan(("triton", facts), lambda signature: _plan_write(signature, *facts))
    if launch is not None:
        launch(tensors, addresses)


# --------------------------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------------------------


def _plan_attention(problem: AttentionProblem, aligned: bool, precision: str, same: bool, with_lse: bool) -> _Plan:
    """``same``: whether k and v have the same address."""
    device = problem.queries.q.device
    max_seqlen_q, group = problem.queries.max_seqlen_q, problem.group
    params = problem_params(problem, aligned, precision, None, same)
    most_rows = decode_rows(problem, params, num_sms(device))
    heads_together = _heads_together(group, max_seqlen_q, most_rows)
    few_queries = MORE_QUERIES if _is_prefill_slow(problem) else FEW_QUERIES
    is_decode = heads_together == group or (heads_together > 0 and max_seqlen_q <= few_queries)
    is_mixed = not is_decode and may_be_mixed(problem)
    is_empty = problem.batch_size == 0 or 0 in problem.out_shape
    plan = _Plan(
        contiguous(problem.out_shape, problem.queries.q.dtype, device),
        contiguous(problem.lse_shape, torch.float32, device) if with_lse else None,
    )
    append, fused_tokens = problem.append, problem.num_new_tokens
    is_packed = append is not None and append.cu_seqlens_new is not None
    cannot_fuse = is_empty or is_packed or not is_decode or problem.scores.dropout_p > 0
    if append is not None and (cannot_fuse or fused_tokens > MAX_FUSED_TOKENS):
        fused_tokens = 0
        plan = plan._replace(write=_plan_write(problem.write, aligned, same))
    if is_empty:
        return plan
    decode_limit = max(1, MIXED_DECODE_ROWS // group) if is_mixed else None
    if is_mixed:
        heads_together = _heads_together(group, cast(int, decode_limit), most_rows)
    if is_decode or is_mixed:
        params = problem_params(problem, aligned, precision, decode_limit, same, group // heads_together, True)
        plan = _with_decode(plan, problem, params, aligned, fused_tokens)
    if not is_decode:
        params = problem_params(problem, aligned, precision, decode_limit, same)
        plan = plan._replace(attend=(*plan.attend, _plan_prefill(problem, params, aligned)))
    return plan


def _is_prefill_slow(problem: AttentionProblem) -> bool:
    """Of a few queries."""
    _, _, k_descale, v_descale = problem.cache[:4]
    is_quantized = k_descale is not None or v_descale is not None
    return is_quantized or 2 * problem.batch_size * problem.cache.k.shape[-2] < num_sms(problem.queries.q.device)


def _heads_together(group: int, queries: int, most_rows: int) -> int:
    """Query heads of a KV head that share a tile of decode, of so many queries each: all, or a part; 0 if none fits."""
    return max((n for n in range(1, group + 1) if group % n == 0 and n * queries <= most_rows), default=0)


def _plan_prefill(problem: AttentionProblem, params: ProblemParams, aligned: bool) -> CompiledLaunch:
    hopper = hopper_tile(problem, params)
    if hopper is not None:
        return _plan_prefill_hopper(problem, params, hopper, aligned)
    q, _, _, max_seqlen_q = problem.queries
    batch_size, heads, decode_limit = problem.batch_size, q.shape[-2], params.queries.DECODE_LIMIT
    tiling = prefill_tiling(max_seqlen_q, _widest(params.cache), q.element_size())
    tile = PrefillTile(tiling.block_m, tiling.block_n, lengths_together(batch_size))
    grid = (heads, batch_size, max(1, -(-max_seqlen_q // tiling.block_m)))
    if decode_limit is not None:
        # CTAs for full blocks, or for all SMs; no more than there may be blocks, each sequence's last one not full.
        total_q = q.shape[0]
        full_blocks = -(-total_q // tiling.block_m)
        most_blocks = full_blocks + min(batch_size, total_q // (decode_limit + 1))
        grid = (heads, max(1, min(most_blocks, max(full_blocks, -(-num_sms(q.device) // heads)))), 1)
    return CompiledLaunch(prefill, grid, params, tile, q.device, aligned, **tiling.options)


def _plan_prefill_hopper(
    problem: AttentionProblem, params: ProblemParams, tile: HopperTile, aligned: bool
) -> CompiledLaunch:
    from .descriptors import DescribedLaunch, K, TileDescriptor, V  # these two need Gluon
    from .kernels.prefill_hopper import BLOCK_M, prefill_hopper

    q, k, v = problem.queries.q, problem.cache.k, problem.cache.v
    widths = ((K, k, tile.D), (V, v, tile.DV), (K, k, tile.TAIL), (V, v, tile.DV_TAIL))
    tiles = [TileDescriptor(which, keys, tile.BOX_N, width) if width else None for which, keys, width in widths]
    most_blocks = problem.batch_size * k.shape[-2] * -(-problem.queries.max_seqlen_q * problem.group // BLOCK_M.value)
    grid = (max(1, min(num_sms(q.device), most_blocks)), 1, 1)
    options = dict(num_warps=4, num_stages=1)
    return DescribedLaunch(tiles, prefill_hopper, grid, params, tile, q.device, aligned, **options)


def _with_decode(plan: _Plan, problem: AttentionProblem, params: ProblemParams, aligned: bool, fused_tokens: int) -> _Plan:
    q, cache = problem.queries.q, params.cache
    device, batch_size, kv_heads, block_dv = q.device, problem.batch_size, cache.HEADS, cache.BLOCK_DV
    work_tiles = batch_size * kv_heads
    decode_limit = params.queries.DECODE_LIMIT
    longest = problem.queries.max_seqlen_q if decode_limit is None else decode_limit
    rows = power_of_two(max(longest, 1) * params.queries.GROUP)
    cache_element_size = min(problem.cache.k.element_size(), problem.cache.v.element_size())
    both_words = cache.K_WORDS is not None and cache.V_WORDS is not None
    box, stages, reducers = decode_box(problem, params), 0, 1
    rows_hopper = rows_tile(problem, params, rows, num_sms(device))
    if rows_hopper is not None:
        block_m, block_n, box, stages = rows_hopper
        tiling = Tiling(block_m, block_n, 4, 1, ctas_per_sm=1)
        reducers = block_m // 64
    elif box:
        tiling = HOPPER_DECODE
    else:
        tiling = decode_tiling(rows, _widest(cache), q.element_size(), cache_element_size, cache.V_IN_K, both_words)
    if box and fused_tokens:
        fused_tokens = 0
        plan = plan._replace(write=_plan_write(problem.write, aligned, cache.V_IN_K))

    few_keys = MAX_UNSPLIT_TILES * tiling.block_n
    if 2 * work_tiles >= num_sms(device):
        few_keys = max(few_keys, MAX_UNSPLIT_KEYS)
    num_splits = problem.num_splits
    split_kv = num_splits > 1 or (num_splits == 0 and max_visible_keys(problem) > few_keys)
    num_ctas = num_sms(device) * tiling.ctas_per_sm
    if num_ctas >= MANY_SPLITS * work_tiles:
        num_ctas = num_sms(device)
    if num_splits or not split_kv:
        num_ctas = work_tiles * max(num_splits, 1)
    splits, split_values = -(-num_ctas // work_tiles), rows * block_dv // reducers  # of a work tile, on average; of a split
    reduces_itself = (
        (not box or rows_hopper is not None)
        and splits <= MAX_FUSED_SPLITS
        and splits * split_values <= MAX_FUSED_VALUES
        and split_values <= MAX_SPLIT_VALUES
    )
    pdl = split_kv and not reduces_itself and has_pdl(device)

    # ``combine`` takes rows together where there are enough work tiles to fill the device, else one by one.
    together = min(rows, COMBINE_VALUES // block_dv) if work_tiles >= num_sms(device) else 1
    most, values = COMBINE_SPLITS, COMBINE_VALUES // (together * block_dv)
    if reduces_itself:
        most, values = DECODE_SPLITS, (ROWS_VALUES if rows_hopper else DECODE_VALUES) // split_values
    tile = DecodeTile(
        ROWS=rows,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_NEW=max(16, power_of_two(fused_tokens)) if fused_tokens else 0,
        BLOCK_B=lengths_together(batch_size),
        SPLIT_KV=split_kv,
        REDUCE_ROWS=together,
        REDUCE_SPLITS=max(1, min(most, power_of_two(splits + 1), values)),
        PDL=pdl,
        num_ctas=num_ctas if split_kv else 0,
        BOX_N=box,
        STAGES=stages,
    )
    grid = (num_ctas, 1, 1)
    if box:
        launch = _plan_decode_hopper(problem, grid, params, tile, aligned, tiling.options)
    else:
        launch = CompiledLaunch(decode, grid, params, tile, device, aligned, **tiling.options)
    plan = plan._replace(attend=(launch,))
    if not split_kv:
        return plan
    plan = plan._replace(partials=contiguous(((work_tiles + num_ctas) * rows * (block_dv + 2),), torch.float32, device))
    if reduces_itself:
        return plan._replace(semaphores=work_tiles * reducers)
    grid = (kv_heads * rows // together, batch_size, 1)
    options: dict[str, object] = dict(num_warps=4, num_stages=1, **(dict(launch_pdl=True) if pdl else {}))
    return plan._replace(attend=(launch, CompiledLaunch(combine, grid, params, tile, device, aligned, **options)))


def _plan_decode_hopper(
    problem: AttentionProblem,
    grid: tuple[int, int, int],
    params: ProblemParams,
    tile: DecodeTile,
    aligned: bool,
    options: dict[str, int],
) -> CompiledLaunch:
    from .descriptors import DescribedLaunch, K, TileDescriptor, V  # these three need Gluon
    from .kernels.decode_hopper import HALF, decode_hopper
    from .kernels.decode_rows_hopper import decode_rows_hopper

    k, v, cache = problem.cache.k, problem.cache.v, params.cache
    if cache.V_IN_K:
        kernel, k_width, v_width = decode_hopper, cache.BLOCK_TAIL, HALF.value
    else:
        kernel, k_width, v_width = decode_rows_hopper, cache.BLOCK_D, cache.BLOCK_DV
    tiles = [TileDescriptor(K, k, tile.BOX_N, k_width), TileDescriptor(V, v, tile.BOX_N, v_width)]
    return DescribedLaunch(tiles, kernel, grid, params, tile, problem.queries.q.device, aligned, **options)


def _widest(cache: CacheParams) -> int:
    return widest(cache.BLOCK_D, cache.BLOCK_DV, cache.BLOCK_TAIL)


def lengths_together(batch_size: int) -> int:
    """BLOCK_B for a batch."""
    return FEW_SEQUENCES if batch_size <= FEW_SEQUENCES else MANY_SEQUENCES


def _plan_write(write: CacheWrite, aligned: bool, same: bool) -> CompiledLaunch | None:
    """None where there is nothing to write."""
    cache, append = write.cache, write.append
    k_new, v_new = append[:2]
    if 0 in k_new.shape:
        return None
    align = stride_factor((k_new, v_new, cache.k, cache.v), aligned)
    params = WriteParams(_cache_params(write, align, same), _append_params(append, align), write.batch_size)
    if append.slot_mapping is not None:
        params = params._replace(cache=params.cache._replace(PAGE_SIZE=write.page_size))
    *batch, seqlen_new, kv_heads, _ = k_new.shape
    tokens_of_cta = seqlen_new if batch else seqlen_new * kv_heads // num_sms(k_new.device)
    tile = WriteTile(min(MAX_WRITTEN_TOKENS, power_of_two(tokens_of_cta)), lengths_together(write.batch_size))
    grid = (kv_heads, batch[0] if batch else 1, -(-seqlen_new // tile.BLOCK_NEW))
    num_warps = 1 if tile.BLOCK_NEW == 1 else 4
    return CompiledLaunch(kv_write_kernel, grid, params, tile, k_new.device, aligned, num_warps=num_warps, num_stages=1)


# --------------------------------------------------------------------------------------------------------------------
# What kernels are told of a signature
# --------------------------------------------------------------------------------------------------------------------


def problem_params(
    problem: AttentionProblem,
    aligned: bool,
    precision: str,
    decode_limit: int | None,
    same: bool,
    share: int = 1,
    words: bool = False,
    leads: bool = True,
) -> ProblemParams:
    """``same``: whether k and v have the same address; ``share``: blocks of the query heads of a KV head; ``words``: whether
    the kernel reads elements of one byte in words where it can; ``leads``: whether it may load rows from before them."""
    q, _, _, max_seqlen_q = problem.queries
    new_tokens = [] if problem.append is None else list(problem.append[:2])
    align = stride_factor((q, problem.cache.k, problem.cache.v, *new_tokens), aligned)
    folded, slopes = fold_scores(problem.scores), problem.scores.alibi_slopes
    used: dict[str, Any] = folded._asdict() | dict(
        softcap=folded.softcap if folded.softcap > 0 else None,
        window_left=folded.window_left if folded.window_left >= 0 else None,
        window_right=folded.window_right if folded.window_right >= 0 else None,
        dropout_threshold=folded.dropout_threshold or None,
        dropout_scale=folded.dropout_scale if folded.dropout_threshold else None,
    )
    return ProblemParams(
        QueryParams(
            strides=_divided(q, align),
            batch_size=problem.batch_size,
            total_q=q.shape[0],
            max_seqlen_q=max_seqlen_q,
            GROUP=problem.group // share,
            DECODE_LIMIT=decode_limit,
        ),
        _cache_params(problem, align, same, share, words and q.element_size() == 2, leads and aligned),
        _append_params(problem.append, align, queries_rotate_by_position(problem)),
        ScoreParams(
            **used,
            SLOPES_STRIDE=None if slopes is None else q.shape[-2] if slopes.dim() == 2 else 0,
            PRECISION=precision,
        ),
    )


def _cache_params(
    problem: AttentionProblem | CacheWrite, align: int, same: bool, share: int = 1, words: bool = False, leads: bool = False
) -> CacheParams:
    k, v, k_descale, v_descale, block_table = problem.cache[:5]
    _reject_missing_formats(k, v)
    widths = tile_widths(problem.cache, same)
    k_words = word_format(k, widths, align) if words else None
    v_words = word_format(v, widths, align) if words else None
    k_align = v_align = align
    if leads and not widths.tail:
        k_align = align if k_words else row_align(k, widths.block_d, align)
        v_align = align if v_words else row_align(v, widths.block_dv, align)
        if strides(v) == strides(k):
            k_align = v_align = min(k_align, v_align)
    return CacheParams(
        k_strides=_divided(k, k_align, align),
        v_strides=None if strides(v) == strides(k) else _divided(v, v_align, align),
        k_descale_strides=_scale_strides(k_descale),
        v_descale_strides=_scale_strides(v_descale),
        capacity=problem.capacity if k.shape[0] else 0,
        num_pages=k.shape[0],
        table_width=None if block_table is None else block_table.shape[1],
        HEADS=k.shape[-2] * share,
        SHARE=share,
        D=k.shape[-1],
        DV=v.shape[-1],
        BLOCK_D=widths.block_d,
        BLOCK_DV=widths.block_dv,
        TAIL=widths.tail,
        BLOCK_TAIL=widths.block_tail,
        K_WORDS=k_words,
        V_WORDS=v_words,
        V_IN_K=same and v_fits_in_k(k, v),
        PAGE_SIZE=None if block_table is None else problem.page_size,
    )


def _reject_missing_formats(k: Tensor, v: Tensor) -> None:
    """Triton has float8_e4m3fn from compute capability 8.9 on (Ada, Hopper)."""
    capability = compute_capability(k.device)
    for field, keys in (("k", k), ("v", v)):
        if keys.dtype == torch.float8_e4m3fn and capability is not None and capability < E4M3_CAPABILITY:
            came = "of dtype torch.float8_e4m3fn on a GPU of compute capability {major}.{minor}"
            expected = "torch.int8 or torch.float8_e5m2 there: it has that format from 8.9 on"
            reject_type(field, came, expected, major=capability[0], minor=capability[1])


def _append_params(append: Append | None, align: int, queries_by_position: bool = True) -> AppendParams:
    if append is None:
        return AppendParams(None, None, 0, None, None, None, None)
    cos = append.rotary_cos
    return AppendParams(
        k_strides=_divided(append.k_new, align),
        v_strides=_divided(append.v_new, align),
        seqlen_new=append.k_new.shape[-3],
        rotary_len=None if cos is None else cos.shape[0],
        ROTARY_DIM=None if cos is None else 2 * cos.shape[1],
        INTERLEAVED=append.rotary_interleaved,
        QUERIES_BY_POSITION=queries_by_position,
    )


def _scale_strides(descale: Tensor | None) -> ScaleStrides | None:
    return None if descale is None else ScaleStrides(*scale_strides(descale), is_per_token(descale))


def _divided(tensor: Tensor, align: int, head_align: int | None = None) -> Strides:
    head_align = head_align or align
    batch, token, head = strides(tensor)
    return Strides(batch // align, token // align, head // head_align, align, head_align)


def is_elsewhere(device: torch.device) -> bool:
    """Whether Triton would launch on another device than the tensors'."""
    return _cuda_devices() > 1 and device.type == "cuda" and device.index != torch.cuda.current_device()


@cache
def _cuda_devices() -> int:
    return torch.cuda.device_count()


def precision_of(dtype: torch.dtype) -> str:
    """float32 products are exact unless torch's own may use tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
