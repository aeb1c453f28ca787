"""How keys and values are loaded from a cache and stored in it. All that a kernel knows of its elements is here.

A cache has q's dtype, or a narrower one under float32; or it is quantized, and its elements are to be multiplied by scales.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .paging import leads_of, slots_in_page
from .params import in_elements
from .words import join_columns, unpack

TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 next to it has no bits for a fraction
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # one below it counts as 0: what is quantized with it is 0


class KVTile(NamedTuple):
    """Keys and values as the cache holds them, and their scales, which mean nothing where it is not quantized.

    Tiles that are read in words have half as many columns.
    """

    k: Any  # (BLOCK_N, BLOCK_D)
    k_tail: Any  # (BLOCK_N, BLOCK_TAIL); anything where there is none
    v: Any  # (BLOCK_N, BLOCK_DV)
    k_scales: Any  # (BLOCK_N,) float32
    v_scales: Any
    slots: Any  # (BLOCK_N,)


@triton.jit
def load_kv(problem, view, pages, tile_index, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """The KV tile ``tile_index``, which lies in ``pages``. If MASKED, slots outside ``[view.begin, view.end)`` are zeros.

    Zeros and not what lies there, because an unused slot may hold NaN, and 0 x NaN is not 0.
    """
    slots = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    within = slots_in_page(problem, view, slots).to(tl.int64)
    inside = (slots >= view.begin) & (slots < view.end)
    K_UNIT: tl.constexpr = 1 if problem.cache.K_WORDS is None else 2
    V_UNIT: tl.constexpr = 1 if problem.cache.V_WORDS is None else 2
    WIDTH: tl.constexpr = problem.cache.D - problem.cache.TAIL
    TAIL: tl.constexpr = problem.cache.TAIL
    DV: tl.constexpr = problem.cache.DV
    BLOCK_D: tl.constexpr = problem.cache.BLOCK_D
    BLOCK_TAIL: tl.constexpr = problem.cache.BLOCK_TAIL
    BLOCK_DV: tl.constexpr = problem.cache.BLOCK_DV
    k = load_tile(view.k, view.k_strides, pages, within, inside, view.k_end, BLOCK_D // K_UNIT, WIDTH < BLOCK_D, MASKED)
    if problem.cache.k_strides.HEAD_ALIGN < problem.cache.k_strides.ALIGN:
        element = tl.arange(0, BLOCK_D) - view.k_lead
        k = tl.where(((element >= 0) & (element < WIDTH))[None, :], k, tl.zeros_like(k))  # another head's may be NaN
    k_tail = k
    if TAIL > 0:
        tail = view.k + WIDTH // K_UNIT
        k_tail = load_tile(
            tail, view.k_strides, pages, within, inside, TAIL // K_UNIT, BLOCK_TAIL // K_UNIT, TAIL < BLOCK_TAIL, MASKED
        )  # fmt: skip
    v = k
    if not problem.cache.V_IN_K:
        v = load_tile(
            view.v, view.v_strides, pages, within, inside, view.v_end, BLOCK_DV // V_UNIT, DV < BLOCK_DV, MASKED
        )  # fmt: skip
    k_scales = load_scales(view.k_descale, problem.cache.k_descale_strides, pages, within, inside)
    v_scales = load_scales(view.v_descale, problem.cache.v_descale_strides, pages, within, inside)
    return KVTile(k, k_tail, v, k_scales, v_scales, slots)


@triton.jit
def load_tile(
    base, strides, pages, within, inside, end, BLOCK_WIDTH: tl.constexpr, HAS_END: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The columns ``[0, end)`` of a tile, which are all of them if not HAS_END."""
    d = tl.arange(0, BLOCK_WIDTH)
    rows = pages.to(tl.int64) * strides.batch + within * strides.token
    pointers = base + rows[:, None] + d[None, :]
    if MASKED:
        tile = tl.load(pointers, inside[:, None] & (d < end)[None, :], other=0.0)
    elif HAS_END:
        tile = tl.load(pointers, (d < end)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_scales(base, strides, pages, within, inside):
    """The scale of each token; any numbers where there are none."""
    if strides is None:
        scales = within.to(tl.float32)
    elif not strides.IS_WRITTEN:
        scales = tl.zeros([within.shape[0]], tl.float32) + base
    else:
        offsets = pages.to(tl.int64) * tl.cast(strides.batch, tl.int64) + within * tl.cast(strides.token, tl.int64)
        scales = tl.load(base + offsets, inside, other=0.0)
    return scales


@triton.jit
def multiply_keys(problem, q_tile, kv):
    """``(rows, BLOCK_N)`` q.k. Elements become q's dtype exactly, so they are scaled behind the product."""
    products = tl.zeros([q_tile.q.shape[0], kv.slots.shape[0]], tl.float32)
    products = add_products(problem, products, q_tile.q, q_tile.q_odd, kv.k)
    if problem.cache.TAIL > 0:
        products = add_products(problem, products, q_tile.tail, q_tile.tail_odd, kv.k_tail)
    if problem.cache.k_descale_strides is not None:
        products *= kv.k_scales[None, :]
    return products


@triton.jit
def add_products(problem, products, q, q_odd, k):
    if problem.cache.K_WORDS is None:
        products = tl.dot(q, tl.trans(k.to(q.dtype)), products, input_precision=problem.score.PRECISION)
    else:
        k_even, k_odd = unpack(k, problem.cache.K_WORDS, q.dtype)
        products = tl.dot(q, tl.trans(k_even), products)
        products = tl.dot(q_odd, tl.trans(k_odd), products)
    return products


@triton.jit
def add_values(problem, acc, alpha, weights, kv, dtype: tl.constexpr):
    """``acc`` times alpha, and the values of a tile by their weights. The weights are what is scaled: they are fewer."""
    if problem.cache.v_descale_strides is not None:
        weights *= kv.v_scales[None, :]
    weights = weights.to(dtype)
    if problem.cache.V_WORDS is None:
        acc = tl.dot(weights, kv.v.to(dtype), acc * alpha[:, None], input_precision=problem.score.PRECISION)
    else:
        v_even, v_odd = unpack(kv.v, problem.cache.V_WORDS, dtype)
        even, odd = acc
        acc = (tl.dot(weights, v_even, even * alpha[:, None]), tl.dot(weights, v_odd, odd * alpha[:, None]))
    return acc


@triton.jit
def zero_acc(problem, ROWS: tl.constexpr):
    """An accumulator, or one of even columns and one of odd ones."""
    if problem.cache.V_WORDS is None:
        acc = tl.zeros([ROWS, problem.cache.BLOCK_DV], tl.float32)
    else:
        half = tl.zeros([ROWS, problem.cache.BLOCK_DV // 2], tl.float32)
        acc = (half, half)
    return acc


@triton.jit
def join_acc(problem, acc):
    """``(rows, BLOCK_DV)`` of what :func:`zero_acc` began."""
    if problem.cache.V_WORDS is not None:
        even, odd = acc
        acc = join_columns(even, odd)
    return acc


@triton.jit
def store_kv(tensors, problem, b, kv_head, page, slot, k, k_tail, v, written):
    """Store new tokens, ``k`` and ``v`` a row each, at ``slot`` of ``page`` (vectors), where ``written``.

    Returns:
        Them as a KVTile without slots: as the cache holds them.
    """
    WIDTH: tl.constexpr = problem.cache.D - problem.cache.TAIL
    k_lead, v_lead = leads_of(problem, kv_head)
    k_strides = in_elements(problem.cache.k_strides)
    v_strides = k_strides
    if problem.cache.v_strides is not None:
        v_strides = in_elements(problem.cache.v_strides)
    largest = tl.maximum(largest_of(k), largest_of(k_tail))
    k, k_scales = quantize(
        tensors.k, tensors.k_descale, problem.cache.k_descale_strides, b, kv_head, page, slot, k, largest, written
    )  # fmt: skip
    store_tile(tensors.k, k_strides, kv_head, page, slot, k, k_lead, written, WIDTH, problem.cache.BLOCK_D)
    if problem.cache.TAIL > 0:
        k_tail, k_scales = quantize(
            tensors.k, tensors.k_descale, problem.cache.k_descale_strides, b, kv_head, page, slot, k_tail, largest, written
        )  # fmt: skip
        tail = tensors.k + WIDTH
        store_tile(tail, k_strides, kv_head, page, slot, k_tail, 0, written, problem.cache.TAIL, problem.cache.BLOCK_TAIL)
    if problem.cache.V_IN_K:
        v = k
        v_scales = k_scales
    else:
        v, v_scales = quantize(
            tensors.v, tensors.v_descale, problem.cache.v_descale_strides, b, kv_head, page, slot, v, largest_of(v), written
        )  # fmt: skip
        store_tile(tensors.v, v_strides, kv_head, page, slot, v, v_lead, written, problem.cache.DV, problem.cache.BLOCK_DV)
    return k, k_tail, v, k_scales, v_scales


@triton.jit
def store_tile(
    base, strides, kv_head, page, slot, tile, lead, written, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, BLOCK_WIDTH) - lead
    rows = base + kv_head * strides.head + page.to(tl.int64) * strides.batch + slot.to(tl.int64) * strides.token
    tl.store(rows[:, None] + d[None, :], tile, written[:, None] & ((d >= 0) & (d < WIDTH))[None, :])


@triton.jit
def largest_of(tile):
    """The largest magnitude of each row, NaN aside."""
    x = tile.to(tl.float32)
    return tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)


@triton.jit
def quantize(base, descale, strides, b, kv_head, page, slot, tile, largest, written):
    """``(tile in the format of the cache at base, its scales)``. Scales that are one a token and head are made of the
    ``largest`` magnitudes, and stored."""
    FORMAT: tl.constexpr = base.dtype.element_ty
    if strides is None:
        elements = tile.to(FORMAT)
        scales = slot.to(tl.float32)
    else:
        LARGEST: tl.constexpr = 127.0 if tl.int8 == FORMAT else 448.0 if tl.float8e4nv == FORMAT else 57344.0
        offsets = (
            b.to(tl.int64) * strides.sequence + kv_head * tl.cast(strides.head, tl.int64)
            + page.to(tl.int64) * strides.batch + slot.to(tl.int64) * strides.token
        )  # fmt: skip
        if strides.IS_WRITTEN:
            scales = tl.math.div_rn(largest, LARGEST)
            scales = tl.where(scales < SMALLEST_SCALE, 0.0, scales)
            tl.store(descale + offsets, scales, written)
        else:
            scales = tl.load(descale + offsets, written, other=0.0)
        is_zero = tl.abs(scales) < SMALLEST_SCALE
        reciprocals = tl.where(is_zero, 0.0, tl.math.div_rn(1.0, tl.where(is_zero, 1.0, scales)))
        x = tile.to(tl.float32) * reciprocals[:, None]
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
        if tl.int8 == FORMAT:
            x = tl.where(x == x, x, 0.0)
            elements = ((x + TO_NEAREST) - TO_NEAREST).to(tl.int8)
        else:
            elements = x.to(FORMAT)
    return elements, scales
