"""How tiles of keys and values are loaded from a cache and stored in it. All that a kernel knows of its elements is here."""

import triton
import triton.language as tl

from .paging import slots_in_page
from .params import in_elements


@triton.jit
def load_keys(problem, view, pages, tile_index, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """``(BLOCK_N, BLOCK_D)`` keys: those of KV tile ``tile_index``, which lie in ``pages``."""
    return load_tile(
        problem, view, view.k, view.k_strides, pages, tile_index, problem.cache.D, problem.cache.BLOCK_D, BLOCK_N, MASKED
    )  # fmt: skip


@triton.jit
def load_values(problem, view, pages, tile_index, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """``(BLOCK_N, BLOCK_DV)`` values."""
    return load_tile(
        problem, view, view.v, view.v_strides, pages, tile_index, problem.cache.DV, problem.cache.BLOCK_DV, BLOCK_N, MASKED
    )  # fmt: skip


@triton.jit
def load_tile(
    problem, view, base, strides, pages, tile_index,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """If MASKED, the slots outside ``[view.begin, view.end)`` are zeros.

    Zeros and not what lies there, because an unused slot may hold NaN, and 0 x NaN is not 0.
    """
    slots = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_WIDTH)
    within = slots_in_page(problem, view, slots).to(tl.int64)
    rows = pages.to(tl.int64) * strides.batch + within * strides.token
    pointers = base + rows[:, None] + d[None, :]
    if MASKED:
        inside = (slots >= view.begin) & (slots < view.end)
        tile = tl.load(pointers, inside[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_WIDTH:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, (d < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_keys(tensors, problem, kv_head, page, slot, tile, written):
    """Store the rows of ``tile`` as keys at ``slot`` of ``page`` (vectors), where ``written``."""
    strides = in_elements(problem.cache.k_strides)
    store_tile(tensors.k, strides, kv_head, page, slot, tile, written, problem.cache.D, problem.cache.BLOCK_D)


@triton.jit
def store_values(tensors, problem, kv_head, page, slot, tile, written):
    strides = in_elements(problem.cache.k_strides)
    if problem.cache.v_strides is not None:
        strides = in_elements(problem.cache.v_strides)
    store_tile(tensors.v, strides, kv_head, page, slot, tile, written, problem.cache.DV, problem.cache.BLOCK_DV)


@triton.jit
def store_tile(
    base, strides, kv_head, page, slot, tile, written, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, BLOCK_WIDTH)
    rows = base + kv_head * strides.head + page.to(tl.int64) * strides.batch + slot.to(tl.int64) * strides.token
    tl.store(rows[:, None] + d[None, :], tile, written[:, None] & (d < WIDTH)[None, :])
