"""The records that kernels take: pointers first, in the order of a problem's tensors, then numbers.

A field in capitals is a constant when the kernel is compiled, and so is a None, which says that an option is not used. An
assignment turns the constants of a record into values, and no function can return a None: hand records on as arguments, or
read one field.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .score import ScoreParams


class Strides(NamedTuple):
    """Elements from one sequence (or page), token and head to the next, divided by ALIGN.

    So the compiler knows that rows start at multiples of ALIGN elements, and loads them in one piece.
    """

    batch: Any
    token: Any
    head: Any
    ALIGN: Any


class ElementStrides(NamedTuple):
    """The same in elements, as int64."""

    batch: Any
    token: Any
    head: Any


class QueryParams(NamedTuple):
    q: Any  # (B, Sq, Hq, D) | packed (total_q, Hq, D)
    cu_seqlens_q: Any
    seqused_q: Any
    strides: Strides
    batch_size: Any
    total_q: Any
    max_seqlen_q: Any  # of each sequence, unless packed
    GROUP: Any  # query heads of a KV head


class CacheParams(NamedTuple):
    k: Any  # pages (num_pages, page_size, Hkv, D) | packed (total_k, Hkv, D) | dense (B_cache, Sk, Hkv, D)
    v: Any
    block_table: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    seqused_k: Any
    cu_seqlens_k: Any
    k_strides: Strides
    v_strides: Strides  # None: as k's, so that offsets are computed once
    capacity: Any  # tokens that fit one sequence
    num_pages: Any  # or rows of a dense cache
    table_width: Any
    HEADS: Any
    D: Any
    DV: Any
    BLOCK_D: Any  # widths of the tiles, powers of two
    BLOCK_DV: Any
    PAGE_SIZE: Any


class AppendParams(NamedTuple):
    k_new: Any  # (B, S_new, Hkv, D)
    v_new: Any
    rotary_cos: Any  # (rotary_len, ROTARY_DIM / 2)
    rotary_sin: Any
    k_strides: Strides
    v_strides: Strides
    seqlen_new: Any  # 0 without an append
    rotary_len: Any
    ROTARY_DIM: Any
    INTERLEAVED: Any
    QUERIES_BY_POSITION: Any  # query i is rotated as position seqused_k + i, else all as seqused_k


class Problem(NamedTuple):
    queries: QueryParams
    cache: CacheParams
    append: AppendParams
    score: ScoreParams


class Output(NamedTuple):
    out: Any  # (B, Sq, Hq, Dv) | (total_q, Hq, Dv), contiguous
    lse: Any  # (B, Hq, Sq) | (Hq, total_q) float32, contiguous


class Scratch(NamedTuple):
    """What CTAs of ``decode`` leave for each other, or for ``combine``. All None where no work tile is split."""

    semaphores: Any  # one for each work tile, or None: ``combine`` reduces
    partials: Any  # accumulators, maxima and sums of all splits, float32
    num_ctas: Any  # of ``decode``


class DecodeTile(NamedTuple):
    """Of ``decode`` and ``combine``."""

    ROWS: Any  # packed-GQA rows, rounded up to a power of two
    BLOCK_M: Any  # rows of the tile: ROWS, or what the matrix units take
    BLOCK_N: Any  # keys of a KV tile
    BLOCK_NEW: Any  # new tokens, which ``decode`` appends itself; 0: they are in the cache, or there are none
    BLOCK_B: Any  # lengths looked at together
    SPLIT_KV: Any  # work tiles may be split over CTAs
    REDUCE_ROWS: Any  # rows and splits that are reduced together
    REDUCE_SPLITS: Any
    PDL: Any  # ``combine`` is launched while ``decode`` still runs


class PrefillTile(NamedTuple):
    BLOCK_M: Any  # queries
    BLOCK_N: Any  # keys


class WriteTile(NamedTuple):
    BLOCK_NEW: Any  # new tokens


@triton.jit
def in_elements(strides):
    """Strides as the host divided them -> in elements."""
    return ElementStrides(
        tl.cast(strides.batch, tl.int64) * strides.ALIGN,
        tl.cast(strides.token, tl.int64) * strides.ALIGN,
        tl.cast(strides.head, tl.int64) * strides.ALIGN,
    )
