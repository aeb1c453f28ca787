"""The records that kernels take: the tensors of a call, and what is the same for all calls of one signature.

A field in capitals is a constant when the kernel is compiled, and so is a None, which says that an option is not used. An
assignment turns the constants of a record into values, and no function can return a None: hand records on as arguments, or
read one field.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .score import ScoreParams


class Tensors(NamedTuple):
    """Pointers: a problem's tensors, in its order, and what a call allocates."""

    q: Any  # (B, Sq, Hq, D) | packed (total_q, Hq, D)
    cu_seqlens_q: Any
    seqused_q: Any
    k: Any  # pages (num_pages, page_size, Hkv, D) | packed (total_k, Hkv, D) | dense (B_cache, Sk, Hkv, D)
    v: Any
    k_descale: Any  # float32; None: not quantized
    v_descale: Any
    block_table: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    seqused_k: Any
    cu_seqlens_k: Any
    k_new: Any  # (B, S_new, Hkv, D) | packed (total_new, Hkv, D)
    v_new: Any
    rotary_cos: Any  # (rotary_len, ROTARY_DIM / 2)
    rotary_sin: Any
    cu_seqlens_new: Any
    slot_mapping: Any
    alibi_slopes: Any
    sinks: Any
    dropout_seed: Any
    out: Any  # (B, Sq, Hq, Dv) | (total_q, Hq, Dv), contiguous
    lse: Any  # (B, Hq, Sq) | (Hq, total_q) float32, contiguous; None: nobody wants it
    partials: Any  # accumulators, maxima and sums of all splits, float32; None: no work tile is split
    semaphores: Any  # one int32 for each work tile; None: ``combine`` reduces the splits


class BackwardTensors(NamedTuple):
    """Those of a problem without an append, the results of its forward pass, and gradients, all contiguous."""

    q: Any
    cu_seqlens_q: Any
    seqused_q: Any
    k: Any
    v: Any
    k_descale: Any
    v_descale: Any
    block_table: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    seqused_k: Any
    cu_seqlens_k: Any
    k_new: Any
    v_new: Any
    rotary_cos: Any
    rotary_sin: Any
    cu_seqlens_new: Any
    slot_mapping: Any
    alibi_slopes: Any
    sinks: Any
    dropout_seed: Any
    out: Any
    lse: Any
    d_out: Any
    d_lse: Any
    delta: Any  # float32, as the LSE: sum(out * d_out) - d_lse of each row
    d_q: Any
    d_k: Any  # as k, with a head for each part of a KV head's query heads
    d_v: Any


class WriteTensors(NamedTuple):
    """Those of a write: the cache's and the append's."""

    k: Any
    v: Any
    k_descale: Any
    v_descale: Any
    block_table: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    seqused_k: Any
    cu_seqlens_k: Any
    k_new: Any
    v_new: Any
    rotary_cos: Any
    rotary_sin: Any
    cu_seqlens_new: Any
    slot_mapping: Any


class Strides(NamedTuple):
    """Elements from one sequence (or page), token and head to the next, divided by ALIGN, the last by HEAD_ALIGN.

    So the compiler knows that rows start at multiples of ALIGN elements, and loads them in pieces of so many.
    Where HEAD_ALIGN is less, rows are loaded from the multiple of ALIGN before them (:func:`.paging.lead_of`).
    """

    batch: int
    token: int
    head: int
    ALIGN: int
    HEAD_ALIGN: int


class ElementStrides(NamedTuple):
    """The same in elements, as int64."""

    batch: Any
    token: Any
    head: Any


class ScaleStrides(NamedTuple):
    """Elements from one scale to the next, 0 where one serves all."""

    sequence: int
    batch: int
    token: int
    head: int
    IS_WRITTEN: bool  # one a token and head, by an append


class QueryParams(NamedTuple):
    strides: Strides
    batch_size: int
    total_q: int
    max_seqlen_q: int  # of each sequence, unless packed
    GROUP: int  # query heads of a KV head
    DECODE_LIMIT: (
        int | None
    )  # in a mixed batch, sequences of up to so many queries are ``decode``'s, the others ``prefill``'s


class CacheParams(NamedTuple):
    k_strides: Strides
    v_strides: Strides | None  # None: as k's, so that offsets are computed once
    k_descale_strides: ScaleStrides | None
    v_descale_strides: ScaleStrides | None
    capacity: int  # tokens that fit one sequence; 0 without pages
    num_pages: int  # or rows of a dense cache
    table_width: int | None
    HEADS: int  # KV heads, each SHARE times: so many blocks of its query heads read it
    SHARE: int
    D: int
    DV: int
    BLOCK_D: int  # widths of the tiles, powers of two
    BLOCK_DV: int
    TAIL: int  # the last elements of D, which have a tile of their own; 0: there is one tile
    BLOCK_TAIL: int
    K_WORDS: str | None  # the format of keys whose elements of one byte are read two by two (:mod:`.words`)
    V_WORDS: str | None
    V_IN_K: bool  # each value is the first part of its key, in the same memory: it is neither loaded nor stored
    PAGE_SIZE: int | None


class AppendParams(NamedTuple):
    k_strides: Strides | None
    v_strides: Strides | None
    seqlen_new: int  # new tokens of each sequence, or of all where they are packed; 0 without an append
    rotary_len: int | None
    ROTARY_DIM: int | None
    INTERLEAVED: bool | None
    QUERIES_BY_POSITION: bool | None  # query i is rotated as position seqused_k + i, else all as seqused_k


class ProblemParams(NamedTuple):
    queries: QueryParams
    cache: CacheParams
    append: AppendParams
    score: ScoreParams


class WriteParams(NamedTuple):
    cache: CacheParams
    append: AppendParams
    batch_size: int


class DecodeTile(NamedTuple):
    """How ``decode`` and ``combine`` divide the work."""

    ROWS: int  # packed-GQA rows, rounded up to a power of two
    BLOCK_M: int  # rows of the tile: ROWS, or what the matrix units take
    BLOCK_N: int  # keys of a KV tile
    BLOCK_NEW: int  # new tokens, which ``decode`` appends itself; 0: they are in the cache, or there are none
    BLOCK_B: int  # lengths looked at together
    SPLIT_KV: bool  # work tiles may be split over CTAs
    REDUCE_ROWS: int  # rows and splits that are reduced together
    REDUCE_SPLITS: int
    PDL: bool  # ``combine`` is launched while ``decode`` still runs
    num_ctas: int  # of ``decode``, where it splits work tiles
    BOX_N: int  # of the kernels for Hopper: keys that one TMA load brings, which lie within one page; 0: ``decode``
    STAGES: int  # ``decode_rows_hopper``: KV tiles in each ring


class PrefillTile(NamedTuple):
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    BLOCK_B: int  # lengths looked at together


class BackwardTile(NamedTuple):
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    HEADS: int  # query heads of a KV head that one CTA takes to its keys
    BLOCK_B: int  # lengths looked at together


class HopperTile(NamedTuple):
    """How ``prefill_hopper`` divides the work."""

    BLOCK_N: int  # keys of a KV tile
    BOX_N: int  # keys that one TMA load brings: they lie within one page
    STAGES: int  # KV tiles in each ring
    Q_SLOTS: int  # blocks whose queries are held: 2 where there is room, so that they come early
    D: int  # widths of the parts of a tile, powers of two; a TAIL of 0: there is one part
    TAIL: int
    DV: int
    DV_TAIL: int


class WriteTile(NamedTuple):
    BLOCK_NEW: int  # new tokens
    BLOCK_B: int  # offsets of packed tokens that are looked at together


@triton.jit
def in_elements(strides):
    """Strides as the host divided them -> in elements."""
    return ElementStrides(
        tl.cast(strides.batch, tl.int64) * strides.ALIGN,
        tl.cast(strides.token, tl.int64) * strides.ALIGN,
        tl.cast(strides.head, tl.int64) * strides.HEAD_ALIGN,
    )


@triton.jit
def in_words(strides):
    """The same in words of two elements."""
    return ElementStrides(
        tl.cast(strides.batch, tl.int64) * (strides.ALIGN // 2),
        tl.cast(strides.token, tl.int64) * (strides.ALIGN // 2),
        tl.cast(strides.head, tl.int64) * (strides.ALIGN // 2),
    )
