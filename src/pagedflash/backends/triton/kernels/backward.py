"""The backward pass: ``row_gradients``, ``keys_backward`` and ``queries_backward``. Bound by the matrix units.

Probabilities are computed again from q, k and the LSE, tile by tile, so nothing of size ``Sq x Sk`` is ever held. A CTA of
``keys_backward`` holds BLOCK_N keys and values and walks the blocks of queries that see them; one of ``queries_backward``
holds BLOCK_M queries and walks the KV tiles that they see::

    p = 2^(score - lse)       d_v = p^T d_out        d_score = p (d_out v^T - delta)      d_q = scale d_score k
    delta = sum(out d_out) - d_lse                                                        d_k = scale d_score^T q

With dropout, what p is multiplied by there is dropped: in d_v it is p, in d_score it is d_out v^T.

No CTA adds to what another one wrote: the same bits each time. Only tiles at the edges of what is seen are masked. Keys,
queries and rows past the end are loaded as zeros, and their LSE as +inf, so that they add nothing.
Source: Dao, "FlashAttention-2" (2023), algorithm 2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import dropout_factors
from .kv_format import load_kv
from .output import lse_offsets
from .paging import load_pages, view_kv
from .params import BackwardTensors, BackwardTile, ProblemParams
from .queries import load_queries
from .schedule import sequence_of
from .score import LN2, LOG2E, cap_products, derive_cap, is_visible, row_scores, score_distance
from .sequence import clamp, load_first_key, load_rows, load_seqlen_k, load_seqlen_q


class QueryBlock(NamedTuple):
    """BLOCK_M queries of one head."""

    q: Any  # (BLOCK_M, BLOCK_D)
    d_out: Any  # (BLOCK_M, BLOCK_DV)
    lse: Any  # (BLOCK_M,) in base 2, +inf where no key is seen
    delta: Any
    rows: Any  # RowScores


@triton.jit
def row_gradients(tensors: BackwardTensors, problem: ProblemParams, tile: BackwardTile):
    """``delta`` of BLOCK_M rows, each one query of one head: 0 where it saw no key."""
    HEADS: tl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    row = tl.program_id(0).to(tl.int64) * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    query = row // HEADS
    head = row % HEADS
    rows = tl.cast(problem.queries.total_q, tl.int64)
    if tensors.cu_seqlens_q is None:
        rows = rows * problem.queries.max_seqlen_q
    real = query < rows
    d = tl.arange(0, problem.cache.BLOCK_DV)
    pointers = (row * problem.cache.DV)[:, None] + d[None, :]
    loaded = real[:, None] & (d < problem.cache.DV)[None, :]
    out = tl.load(tensors.out + pointers, loaded, other=0.0).to(tl.float32)
    d_out = tl.load(tensors.d_out + pointers, loaded, other=0.0).to(tl.float32)
    b = query * 0
    i = query
    if tensors.cu_seqlens_q is None:
        b = query // problem.queries.max_seqlen_q
        i = query % problem.queries.max_seqlen_q
    offsets = lse_offsets(tensors, problem, b, query, i, head)
    lse = tl.load(tensors.lse + offsets, real, other=float("inf"))
    d_lse = tl.load(tensors.d_lse + offsets, real, other=0.0)
    delta = tl.where(lse == float("inf"), 0.0, tl.sum(out * d_out, 1) - d_lse)
    tl.store(tensors.delta + offsets, delta, real)


@triton.jit
def load_block(tensors, problem, tile, b, head, block, first_row, seqlen_q, seqlen_k):
    """The ``block``-th BLOCK_M queries of sequence ``b``."""
    HEADS: tl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    i = block * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    used = (i < seqlen_q) & (seqlen_k >= 0)
    row = (first_row + i).to(tl.int64)
    d = tl.arange(0, problem.cache.BLOCK_DV)
    pointers = tensors.d_out + ((row * HEADS + head) * problem.cache.DV)[:, None] + d[None, :]
    offsets = lse_offsets(tensors, problem, b, row, i, head)
    end = tl.maximum(seqlen_k, 0)
    return QueryBlock(
        load_queries(tensors, problem, b, first_row, i, head, used, 0).q,
        tl.load(pointers, used[:, None] & (d < problem.cache.DV)[None, :], other=0.0),
        tl.load(tensors.lse + offsets, used, other=float("inf")) * LOG2E,
        tl.load(tensors.delta + offsets, used, other=0.0),
        row_scores(tensors, problem, b, head + i * 0, i, used, seqlen_q, seqlen_k, b * 0, end),
    )


@triton.jit
def probabilities(problem, products, position, slot, first, last, slope, lse, MASKED: tl.constexpr):
    """From q.k to probabilities, and the derivative of a score by its ``scale * q.k`` (the products where that is 1).

    All but the products are broadcast to them. If MASKED, a probability is 0 where the row does not see the slot.
    """
    capped = cap_products(problem, products)
    scores = score_distance(problem, capped, position, slot, slope)
    p = tl.exp2(scores - lse)
    if MASKED:
        p = tl.where(is_visible(slot, first, last), p, 0.0)
    return p, derive_cap(problem, capped)


@triton.jit
def natural_scale(problem):
    """Of q.k: what ``score.scale`` was folded from."""
    scale = problem.score.scale * LN2
    if problem.score.softcap is not None:
        scale *= problem.score.softcap
    return scale


# ---- Keys and values ------------------------------------------------------------------------------------------------


@triton.jit
def blocks_into_keys(
    tensors, problem, tile, b, head, first_row, seqlen_q, seqlen_k, k, v, slots, d_k, d_v, block, end, MASKED: tl.constexpr
):  # fmt: skip
    """Query blocks ``block`` to ``end`` of one head into the gradients of a KV tile, in the tile's orientation."""
    for index in range(block, end):
        queries = load_block(tensors, problem, tile, b, head, index, first_row, seqlen_q, seqlen_k)
        rows = queries.rows
        products = tl.dot(k, tl.trans(queries.q), input_precision=problem.score.PRECISION)
        p, derivative = probabilities(
            problem, products, rows.position[None, :], slots[:, None], rows.first[None, :], rows.last[None, :],
            rows.slope[None, :], queries.lse[None, :], MASKED,
        )  # fmt: skip
        kept = p
        if problem.score.dropout_threshold is not None:
            factors = tl.trans(dropout_factors(problem, rows.dropout, slots))
            kept = p * factors
        d_v = tl.dot(kept.to(queries.d_out.dtype), queries.d_out, d_v, input_precision=problem.score.PRECISION)
        d_p = tl.dot(v, tl.trans(queries.d_out), input_precision=problem.score.PRECISION)
        if problem.score.dropout_threshold is not None:
            d_p *= factors
        d_score = p * (d_p - queries.delta[None, :])
        if problem.score.softcap is not None:
            d_score *= derivative
        d_k = tl.dot(d_score.to(queries.q.dtype), queries.q, d_k, input_precision=problem.score.PRECISION)
    return d_k, d_v


@triton.jit
def key_blocks(tensors, problem, tile, b, inside):
    """KV tiles of sequence ``b``."""
    return tl.where(inside, tl.cdiv(tl.maximum(load_seqlen_k(tensors, problem, b, inside), 0), tile.BLOCK_N), 0)


@triton.jit
def keys_backward(tensors: BackwardTensors, problem: ProblemParams, tile: BackwardTile):
    """A CTA takes BLOCK_N keys, and HEADS query heads that share them: d_k and d_v, or, of more heads, its part."""
    part = tl.program_id(1)
    PARTS: tl.constexpr = problem.queries.GROUP // tile.HEADS
    kv_head = part // PARTS
    kv_tile = tl.program_id(0)
    b = tl.program_id(2)
    if tensors.cu_seqlens_k is not None:
        b, first_tile = sequence_of(tensors, problem, tile, kv_tile, tl.arange(0, tile.BLOCK_B), key_blocks)
        kv_tile -= first_tile
    if b >= problem.queries.batch_size:
        return
    seqlen_k = load_seqlen_k(tensors, problem, b, True)
    if kv_tile * tile.BLOCK_N >= seqlen_k:
        return
    seqlen_q = load_seqlen_q(tensors, problem, b, True)
    first_row, _ = load_rows(tensors, problem, b, True)
    kv = view_kv(tensors, problem, b, kv_head, b * 0, seqlen_k)
    loaded = load_kv(problem, kv, load_pages(problem, kv, kv_tile, tile.BLOCK_N), kv_tile, tile.BLOCK_N, True)
    k = loaded.k.to(tensors.q.dtype.element_ty)
    v = loaded.v.to(tensors.q.dtype.element_ty)

    # ---- The query blocks that see any of the keys, [begin, end), and those that see all of them, [all_begin, all_end) ----
    shift = seqlen_k - seqlen_q  # query i sits at key position i + shift
    first_slot = kv_tile * tile.BLOCK_N
    last_slot = tl.minimum(first_slot + tile.BLOCK_N, seqlen_k) - 1
    begin = 0
    all_begin = 0
    end = tl.cdiv(seqlen_q, tile.BLOCK_M)
    all_end = end
    if problem.score.window_right is not None:
        begin = clamp((first_slot - problem.score.window_right - shift) // tile.BLOCK_M, 0, end)
        begin = tl.where(first_slot - problem.score.window_right - shift < 0, 0, begin)
        all_begin = clamp(tl.cdiv(tl.maximum(last_slot - problem.score.window_right - shift, 0), tile.BLOCK_M), begin, end)
    if problem.score.window_left is not None:
        end = clamp(tl.cdiv(tl.maximum(last_slot + problem.score.window_left - shift + 1, 0), tile.BLOCK_M), begin, end)
        all_end = tl.maximum(first_slot + problem.score.window_left - shift + 1, 0) // tile.BLOCK_M
    all_begin = clamp(all_begin, begin, end)
    all_end = clamp(all_end, all_begin, end)

    d_k = tl.zeros([tile.BLOCK_N, problem.cache.BLOCK_D], tl.float32)
    d_v = tl.zeros([tile.BLOCK_N, problem.cache.BLOCK_DV], tl.float32)
    for h in range(tile.HEADS):
        head = part * tile.HEADS + h
        if problem.score.window_right is not None:
            d_k, d_v = blocks_into_keys(
                tensors, problem, tile, b, head, first_row, seqlen_q, seqlen_k, k, v, loaded.slots, d_k, d_v,
                begin, all_begin, True,
            )  # fmt: skip
        d_k, d_v = blocks_into_keys(
            tensors, problem, tile, b, head, first_row, seqlen_q, seqlen_k, k, v, loaded.slots, d_k, d_v,
            all_begin, all_end, False,
        )  # fmt: skip
        if problem.score.window_left is not None:
            d_k, d_v = blocks_into_keys(
                tensors, problem, tile, b, head, first_row, seqlen_q, seqlen_k, k, v, loaded.slots, d_k, d_v,
                all_end, end, True,
            )  # fmt: skip

    row = loaded.slots.to(tl.int64)
    if tensors.cu_seqlens_k is None:
        row += b.to(tl.int64) * problem.cache.capacity
    else:
        row += load_first_key(tensors, problem, b, True)
    row = row * (problem.cache.HEADS * PARTS) + part
    inside = loaded.slots < seqlen_k
    store_gradient(tensors.d_k, d_k * natural_scale(problem), row, inside, problem.cache.D, problem.cache.BLOCK_D)
    store_gradient(tensors.d_v, d_v, row, inside, problem.cache.DV, problem.cache.BLOCK_DV)


# ---- Queries --------------------------------------------------------------------------------------------------------


@triton.jit
def keys_into_block(problem, tile, kv, queries, d_q, kv_tile, end, MASKED: tl.constexpr):
    """KV tiles ``kv_tile`` to ``end`` into the gradient of a block of queries."""
    rows = queries.rows
    pages = load_pages(problem, kv, kv_tile, tile.BLOCK_N)
    for index in range(kv_tile, end):
        loaded = load_kv(problem, kv, pages, index, tile.BLOCK_N, True)
        k = loaded.k.to(queries.q.dtype)
        v = loaded.v.to(queries.q.dtype)
        products = tl.dot(queries.q, tl.trans(k), input_precision=problem.score.PRECISION)
        p, derivative = probabilities(
            problem, products, rows.position[:, None], loaded.slots[None, :], rows.first[:, None], rows.last[:, None],
            rows.slope[:, None], queries.lse[:, None], MASKED,
        )  # fmt: skip
        d_p = tl.dot(queries.d_out, tl.trans(v), input_precision=problem.score.PRECISION)
        if problem.score.dropout_threshold is not None:
            d_p *= dropout_factors(problem, rows.dropout, loaded.slots)
        d_score = p * (d_p - queries.delta[:, None])
        if problem.score.softcap is not None:
            d_score *= derivative
        d_q = tl.dot(d_score.to(k.dtype), k, d_q, input_precision=problem.score.PRECISION)
    return d_q


@triton.jit
def query_blocks(tensors, problem, tile, b, inside):
    """Blocks of queries of sequence ``b``."""
    return tl.where(inside, tl.cdiv(load_seqlen_q(tensors, problem, b, inside), tile.BLOCK_M), 0)


@triton.jit
def queries_backward(tensors: BackwardTensors, problem: ProblemParams, tile: BackwardTile):
    """A CTA takes BLOCK_M queries of one head: d_q. Blocks with the most keys, the last ones of a sequence, start first."""
    HEADS: tl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    head = tl.program_id(1)
    block = tl.program_id(0)
    b = tl.program_id(2)
    if tensors.cu_seqlens_q is not None:
        b, first_block = sequence_of(tensors, problem, tile, block, tl.arange(0, tile.BLOCK_B), query_blocks)
        block -= first_block
    if b >= problem.queries.batch_size:
        return
    seqlen_q = load_seqlen_q(tensors, problem, b, True)
    seqlen_k = load_seqlen_k(tensors, problem, b, True)
    block = tl.cdiv(seqlen_q, tile.BLOCK_M) - 1 - block
    if block < 0:
        return
    first_row, _ = load_rows(tensors, problem, b, True)
    queries = load_block(tensors, problem, tile, b, head, block, first_row, seqlen_q, seqlen_k)

    # ---- The KV tiles that any of the queries sees, [begin, end), and those that all of them see, [all_begin, all_end) ----
    first_position = block * tile.BLOCK_M + seqlen_k - seqlen_q
    last_position = tl.minimum(block * tile.BLOCK_M + tile.BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q
    begin = 0
    all_begin = 0
    end = tl.cdiv(tl.maximum(seqlen_k, 0), tile.BLOCK_N)
    all_end = end
    if problem.score.window_right is not None:
        end = clamp(tl.cdiv(tl.maximum(last_position + problem.score.window_right + 1, 0), tile.BLOCK_N), 0, end)
        all_end = tl.maximum(first_position + problem.score.window_right + 1, 0) // tile.BLOCK_N
    if problem.score.window_left is not None:
        begin = tl.minimum(tl.maximum(first_position - problem.score.window_left, 0) // tile.BLOCK_N, end)
        all_begin = tl.cdiv(tl.maximum(last_position - problem.score.window_left, 0), tile.BLOCK_N)
    all_begin = clamp(all_begin, begin, end)
    all_end = clamp(all_end, all_begin, end)

    kv = view_kv(tensors, problem, b, head // problem.queries.GROUP, b * 0, tl.maximum(seqlen_k, 0))
    d_q = tl.zeros([tile.BLOCK_M, problem.cache.BLOCK_D], tl.float32)
    if problem.score.window_left is not None:
        d_q = keys_into_block(problem, tile, kv, queries, d_q, begin, all_begin, True)
    d_q = keys_into_block(problem, tile, kv, queries, d_q, all_begin, all_end, False)
    if problem.score.window_right is not None:
        d_q = keys_into_block(problem, tile, kv, queries, d_q, all_end, end, True)

    i = block * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    row = (first_row + i).to(tl.int64) * HEADS + head
    store_gradient(tensors.d_q, d_q * natural_scale(problem), row, i < seqlen_q, problem.cache.D, problem.cache.BLOCK_D)


@triton.jit
def store_gradient(base, gradient, row, inside, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a contiguous ``(rows, WIDTH)``."""
    d = tl.arange(0, BLOCK_WIDTH)
    pointers = base + (row * WIDTH)[:, None] + d[None, :]
    tl.store(pointers, gradient.to(base.dtype.element_ty), inside[:, None] & (d < WIDTH)[None, :])
