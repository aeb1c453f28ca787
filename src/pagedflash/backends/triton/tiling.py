"""Tile shapes and launch options of each kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...geometry import max_visible_keys, strides, v_fits_in_k
from ...problem import AttentionProblem, KVCache
from .compiled import has_hopper_kernels, has_words
from .kernels.params import CacheParams, HopperTile, ProblemParams


class Tiling(NamedTuple):
    """Of an attention kernel."""

    block_m: int  # query rows of a CTA
    block_n: int  # keys of a KV tile
    num_warps: int
    num_stages: int  # KV tiles in flight
    ctas_per_sm: int = 0  # size of decode's grid

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)


WIDE = 512
"""The largest width of a tile. Such tiles fill registers and shared memory: there are fewer rows and keys of them."""

MAX_DECODE_ROWS = 64
"""Packed-GQA rows of one tile of ``decode``."""


class Widths(NamedTuple):
    """Of tiles of keys and values (:class:`.kernels.params.CacheParams`)."""

    block_d: int
    block_dv: int
    tail: int
    block_tail: int


def tile_widths(cache: KVCache, same: bool) -> Widths:
    """Powers of two. What a key has behind WIDE elements, or behind its value if that is a part of it, is its tail.

    ``same``: whether k and v have the same address.
    """
    head_dim = cache.k.shape[-1]
    block_d, block_dv = min(block_width(head_dim), WIDE), block_width(cache.v.shape[-1])
    if same and v_fits_in_k(cache.k, cache.v):
        if head_dim - block_dv <= block_dv:  # else the tail would be the wider part
            block_d = block_dv
        block_dv = block_d
    elif cache.v_descale is not None:  # with narrower tiles than keys have, Triton 3.6 gives wrong values on Hopper
        block_dv = max(block_dv, block_d)
    tail = max(head_dim - block_d, 0)
    return Widths(block_d, block_dv, tail, block_width(tail) if tail else 0)


def word_format(keys: Tensor, widths: Widths, align: int) -> str | None:
    """The format of keys or values whose elements of one byte ``decode`` reads two by two; None where it reads elements.

    Rows are whole words then, and half of a tile is still what the matrix units take.
    """
    if keys.element_size() > 1 or not has_words(keys.device, keys.dtype):
        return None
    tiles = (widths.block_d, widths.block_dv, widths.block_tail)
    fits = keys.shape[-1] % 2 == 0 and align % 2 == 0 and all(width % 32 == 0 for width in tiles)
    return str(keys.dtype).removeprefix("torch.") if fits else None


def widest(block_d: int, block_dv: int, block_tail: int) -> int:
    """The width that tile shapes are chosen for."""
    return max(min(power_of_two(block_d + block_tail), WIDE), block_dv)


def max_decode_rows(block_d: int, element_size: int) -> int:
    """MAX_DECODE_ROWS, or less where they would not fit."""
    return 16 if block_d == WIDE and element_size == 4 else MAX_DECODE_ROWS


def decode_tiling(
    rows: int, block_d: int, element_size: int, cache_element_size: int, v_in_k: bool, words: bool = False
) -> Tiling:
    """Decode needs bytes in flight: about 64 KiB an SM, in two CTAs or more. Elements of one byte that are not read in words
    take longer to convert than to load: there larger tiles are what helps."""
    if words and rows <= 32 and block_d < WIDE:
        return Tiling(max(16, rows), min(128, 16384 // block_d), 4, 3, ctas_per_sm=2)
    if not words and cache_element_size == 1 and element_size == 2 and rows <= 16 and block_d >= 128:
        return Tiling(16, 16384 // block_d, 4, 2, ctas_per_sm=2)
    row_bytes = block_d * element_size
    if block_d == WIDE and element_size == 4:
        return Tiling(16, 16, 4, 2, ctas_per_sm=1)
    if block_d == WIDE and rows > 16:
        return Tiling(rows, 64 if v_in_k else 32, 8, 2, ctas_per_sm=1)
    if block_d == WIDE and v_in_k:
        return Tiling(16, 32, 4, 2, ctas_per_sm=2)
    block_n = max(16, min(64 if row_bytes >= 128 else 128, 16384 // row_bytes))
    if rows > 32 and element_size == 4:
        block_n = min(block_n, 32)
    return Tiling(max(16, rows), block_n, 4, 3, ctas_per_sm=2)


def prefill_tiling(max_seqlen_q: int, block_d: int, element_size: int) -> Tiling:
    """Prefill needs tiles that feed the matrix units; float32 runs without them and only needs to fit."""
    if block_d == WIDE and element_size < 4:
        return Tiling(64, 32, 8, 2)
    if element_size == 4:
        return Tiling(32 if block_d <= 128 else 16, 16, 4, 2)
    if max_seqlen_q <= 64:
        return Tiling(64, 64, 4, 3 if block_d <= 128 else 2)
    return Tiling(128, 64, 8, 4 if block_d <= 128 else 2)


def backward_tilings(block_d: int, element_size: int) -> tuple[Tiling, Tiling]:
    """Of ``keys_backward`` and ``queries_backward``: two accumulators in registers, and one."""
    if element_size == 4:
        return Tiling(16, 32 if block_d <= 128 else 16, 4, 2), Tiling(32 if block_d <= 128 else 16, 16, 4, 2)
    if block_d <= 64:
        return Tiling(32, 128, 4, 3), Tiling(64, 64, 4, 3)
    if block_d <= 128:
        return Tiling(64, 128, 8, 3), Tiling(128, 64, 8, 3)
    return Tiling(32, 64, 8, 2), Tiling(64, 32, 8, 2)


HOPPER_SHAPES = ((128, 3, 2), (128, 2, 2), (128, 2, 1), (64, 3, 2), (64, 3, 1), (64, 2, 1))
"""BLOCK_N, STAGES and Q_SLOTS of ``prefill_hopper``, of which the first is taken that shared memory and registers hold."""

HOPPER_SHARED_BYTES = 226 << 10
"""For queries, keys, values, and the output on its way to rows in order; barriers take the rest."""

HOPPER_HEAD_DIMS = range(33, 257)
"""That ``prefill_hopper`` takes: smaller ones would mostly be padding."""

SHORT_KEYS = 512
"""Keys up to which its KV tiles have 64: of larger ones, a causal block would skip too few."""


def hopper_tile(problem: AttentionProblem, params: ProblemParams) -> HopperTile | None:
    """The tile of ``prefill_hopper`` where it takes a prefill; None leaves it to ``prefill``.

    It takes 16-bit keys and values of q's dtype, contiguous or in pages of a multiple of 16 tokens, aligned to 16 bytes.
    Left padding, rotary embedding of queries, softcap, ALiBi and dropout are ``prefill``'s.
    """
    cache, score = params.cache, params.score
    if not (cache.D in HOPPER_HEAD_DIMS and cache.DV in HOPPER_HEAD_DIMS and _loads_by_tma(problem, params)):
        return None
    widths = *hopper_widths(cache.D), *hopper_widths(cache.DV)
    most_keys = 64 if max_visible_keys(problem) <= SHORT_KEYS else 128
    shapes = (shape for shape in HOPPER_SHAPES if shape[0] <= most_keys)
    block_n, stages, q_slots = next(shape for shape in shapes if fits_hopper(shape, *widths))
    box_n = _box(cache, block_n)
    takes = (
        not cache.V_IN_K
        and cache.SHARE == 1
        and problem.cache.cache_leftpad is None
        and score.softcap is None
        and score.SLOPES_STRIDE is None
    )
    return HopperTile(block_n, box_n, stages, q_slots, *widths) if takes else None


def _loads_by_tma(problem: AttentionProblem, params: ProblemParams) -> bool:
    """Whether the kernels for Hopper can be used at all."""
    cache = params.cache
    q, k, v = problem.queries.q, problem.cache.k, problem.cache.v
    return (
        has_hopper_kernels(q.device)
        and q.element_size() == 2
        and k.dtype == v.dtype == q.dtype
        and params.queries.strides.ALIGN % 8 == 0  # TMA takes strides of a multiple of 16 bytes
        and (cache.PAGE_SIZE or 16) % 16 == 0
        and params.append.ROTARY_DIM is None
        and params.score.dropout_threshold is None
        and all(0 not in tensor.shape and 0 not in tensor.stride() for tensor in (k, v))
    )


def _box(cache: CacheParams, block_n: int) -> int:
    """BOX_N: keys of a KV tile that lie within one page."""
    return block_n if cache.PAGE_SIZE is None else math.gcd(cache.PAGE_SIZE, block_n)


def hopper_widths(head_dim: int) -> tuple[int, int]:
    """Widths of the parts of a tile of ``prefill_hopper``; the second is 0 where one part is no wider."""
    block = max(64, power_of_two(head_dim))
    tail = block_width(head_dim - block // 2) if head_dim > 64 else block
    return (block, 0) if tail >= block // 2 else (block // 2, tail)


def fits_hopper(shape: tuple[int, int, int], d: int, tail: int, dv: int, dv_tail: int) -> bool:
    """Whether shared memory has the room, and registers hold the output and the scores of a KV tile."""
    block_n, stages, q_slots = shape
    elements = q_slots * 128 * (d + tail) + stages * block_n * (d + tail + dv + dv_tail) + 64 * max(dv, 128)
    return 2 * elements <= HOPPER_SHARED_BYTES and block_n * (dv + dv_tail) <= 16384


MLA_HEAD_DIMS = (576, 512)
"""Of keys and values, that ``decode_hopper`` takes: tiles of 512 and a tail of 64."""

HOPPER_DECODE = Tiling(64, 64, 4, 1, ctas_per_sm=1)
"""Of ``decode_hopper``: rows, keys, warps of a consumer; its grid has one CTA an SM."""


def decode_box(problem: AttentionProblem, params: ProblemParams) -> int:
    """BOX_N of ``decode_hopper`` where it takes a decode; 0 leaves it to ``decode``.

    It takes MLA: 16-bit keys of q's dtype, of 576 elements whose first 512 are the value, contiguous or in pages of a
    multiple of 16 tokens, aligned to 16 bytes. Rotary embedding of queries and dropout are ``decode``'s.
    """
    cache = params.cache
    takes = cache.V_IN_K and (cache.D, cache.DV) == MLA_HEAD_DIMS and _loads_by_tma(problem, params)
    return _box(cache, HOPPER_DECODE.block_n) if takes else 0


MAX_HOPPER_ROWS = 128
"""Packed-GQA rows of one tile of ``decode_rows_hopper``: 64 of each warp group."""

FEW_ROWS = 16
"""Rows up to which ``decode`` is as fast."""

FEW_SPLITS = 5
"""Splits of a work tile up to which its last warp groups reduce them: ``combine`` would cost more than is won."""

ROWS_TILES = {(64, 64): (128, 3), (64, 128): (64, 3), (128, 64): (128, 5), (128, 128): (64, 5)}
"""Of rows and widths that ``decode_rows_hopper`` takes: BLOCK_N, STAGES."""


class RowsTile(NamedTuple):
    """How ``decode_rows_hopper`` divides the work."""

    block_m: int
    block_n: int
    box_n: int
    stages: int


def rows_tile(problem: AttentionProblem, params: ProblemParams, rows: int, num_sms: int) -> RowsTile | None:
    """The tile of ``decode_rows_hopper`` where it takes a decode of so many packed-GQA rows; None leaves it to ``decode``.

    It takes the caches that ``prefill_hopper`` takes, of head dims from 33 to 128, where there are work tiles for a fifth of
    the SMs; left padding, softcap and ALiBi too.
    """
    cache = params.cache
    shape = 64 if rows <= 64 else 128, cache.BLOCK_D
    splits = problem.num_splits or -(-num_sms // max(problem.batch_size * cache.HEADS, 1))
    takes = (
        FEW_ROWS < rows <= MAX_HOPPER_ROWS
        and splits <= FEW_SPLITS
        and shape in ROWS_TILES
        and cache.BLOCK_D == cache.BLOCK_DV
        and not cache.V_IN_K
        and _loads_by_tma(problem, params)
    )
    if not takes:
        return None
    block_n, stages = ROWS_TILES[shape]
    return RowsTile(shape[0], block_n, _box(cache, block_n), stages)


def decode_rows(problem: AttentionProblem, params: ProblemParams, num_sms: int) -> int:
    """Packed-GQA rows that one tile of the kernels for decode has at most. Short prompts of more are left to prefill."""
    cache = params.cache
    has_many_keys = max_visible_keys(problem) > SHORT_KEYS
    if has_many_keys and rows_tile(problem, params, MAX_HOPPER_ROWS, num_sms) is not None:
        return MAX_HOPPER_ROWS
    width = widest(cache.BLOCK_D, cache.BLOCK_DV, cache.BLOCK_TAIL)
    return max_decode_rows(width, problem.queries.q.element_size())


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def block_width(head_dim: int) -> int:
    """A tile's width for a head dim: a power of two that the matrix units take."""
    return max(16, power_of_two(head_dim))


def stride_factor(tensors: Sequence[Tensor], aligned: bool) -> int:
    """ALIGN of the strides of ``tensors`` (:class:`.kernels.params.Strides`).

    Where addresses are ``aligned`` to 16 bytes, the first of 16 (if there are elements of one byte), 8, 4 and 2 that divides
    all strides, so that rows are loaded in pieces of those; else 1.
    """
    bits = 0 if any(tensor.element_size() == 1 for tensor in tensors) else 8
    for tensor in tensors:
        for stride in strides(tensor):
            bits |= stride
    return next((align for align in (16, 8, 4, 2) if aligned and bits % align == 0), 1)


def row_align(keys: Tensor, block: int, align: int) -> int:
    """ALIGN of rows of keys or values whose heads lie at multiples of ``align`` only.

    The largest whose pieces have up to 16 bytes, so that a row and what is loaded before it fit a tile of ``block`` columns,
    and the last piece of the last head ends with it: else ``align``.
    """
    batch, token, head = strides(keys)
    head_dim, last = keys.shape[-1], (keys.shape[-2] - 1) * head + keys.shape[-1]

    def fits(larger: int) -> bool:
        longest_lead = larger - math.gcd(head, larger)
        return larger > align and (batch | token | last) % larger == 0 and head_dim + longest_lead <= block

    return next(filter(fits, (16 // keys.element_size() >> i for i in range(4))), align)
