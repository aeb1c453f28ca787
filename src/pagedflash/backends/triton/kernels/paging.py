# ruff: noqa: SIM108 (an if on constants chooses code when the kernel is compiled)
"""Where the keys and values of one (sequence, KV head) lie."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .params import in_elements, in_words
from .sequence import clamp, load_first_key


class KVView(NamedTuple):
    """The keys and values of one (sequence, KV head), and which of them are read."""

    k: Any  # pointers to the KV head: to elements, or to words of two
    v: Any
    k_strides: Any  # in what is pointed to
    v_strides: Any
    k_lead: Any  # :func:`lead_of` the keys
    k_end: Any  # columns [0, end) of a tile are loaded
    v_end: Any
    k_descale: Any  # the scale of the sequence and KV head; a pointer to its tokens' own; anything where there are none
    v_descale: Any
    row: Any  # the sequence's row of the block table (a pointer) or of a dense cache; packed keys are one long row
    offset: Any  # slots from there to the sequence
    begin: Any  # slots [begin, end) are read
    end: Any


@triton.jit
def view_kv(tensors, problem, b, kv_head, begin, end):
    """The slots ``[begin, end)`` of sequence ``b`` and KV head ``kv_head``."""
    kv_head = kv_head // problem.cache.SHARE
    K_WIDTH: tl.constexpr = problem.cache.D - problem.cache.TAIL
    V_WIDTH: tl.constexpr = problem.cache.DV
    k, k_strides, k_end = view_head(tensors.k, problem.cache.k_strides, kv_head, K_WIDTH, problem.cache.K_WORDS)
    k_lead = lead_of(problem.cache.k_strides, kv_head)
    if problem.cache.v_strides is None:
        v, v_strides, v_end = view_head(tensors.v, problem.cache.k_strides, kv_head, V_WIDTH, problem.cache.V_WORDS)
    else:
        v, v_strides, v_end = view_head(tensors.v, problem.cache.v_strides, kv_head, V_WIDTH, problem.cache.V_WORDS)
    row = b * 0
    offset = b * 0
    if tensors.block_table is not None:
        row = tensors.block_table + b.to(tl.int64) * problem.cache.table_width
    elif tensors.cu_seqlens_k is not None:
        offset = load_first_key(tensors, problem, b, True)
    elif tensors.cache_batch_idx is not None:
        row = clamp(tl.load(tensors.cache_batch_idx + b), 0, problem.cache.num_pages - 1)
    else:
        row = b
    k_descale = descale_of(tensors.k_descale, problem.cache.k_descale_strides, b, kv_head, k)
    v_descale = descale_of(tensors.v_descale, problem.cache.v_descale_strides, b, kv_head, v)
    return KVView(k, v, k_strides, v_strides, k_lead, k_end, v_end, k_descale, v_descale, row, offset, begin, end)


@triton.jit
def view_head(base, strides, kv_head, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """What the rows of a KV head are loaded by: (pointer, strides, end of the columns), in elements or in words."""
    if WORDS is not None:
        in_units = in_words(strides)
        start = base.to(tl.pointer_type(tl.int16), bitcast=True) + kv_head * in_units.head
        end = kv_head * 0 + WIDTH // 2
    elif strides.HEAD_ALIGN < strides.ALIGN:
        in_units = in_elements(strides)
        start = base + kv_head * in_units.head // strides.ALIGN * strides.ALIGN
        end = tl.cdiv(lead_of(strides, kv_head) + WIDTH, strides.ALIGN) * strides.ALIGN
    else:
        in_units = in_elements(strides)
        start = base + kv_head * in_units.head
        end = kv_head * 0 + WIDTH
    return start, in_units, end


@triton.jit
def leads_of(problem, kv_head):
    """:func:`lead_of` the keys and the values of a KV head of the cache."""
    k_lead = lead_of(problem.cache.k_strides, kv_head)
    v_lead = k_lead
    if problem.cache.v_strides is not None:
        v_lead = lead_of(problem.cache.v_strides, kv_head)
    return k_lead, v_lead


@triton.jit
def lead_of(strides, kv_head):
    """Elements that are loaded before each row of a KV head: back to a multiple of ALIGN.

    Column c of a tile is element ``c - lead`` then, and so it is of queries, which are multiplied with it, and accumulators.
    """
    lead = kv_head * 0
    if strides.HEAD_ALIGN < strides.ALIGN:
        lead = (kv_head * in_elements(strides).head % strides.ALIGN).to(tl.int32)
    return lead


@triton.jit
def descale_of(descale, strides, b, kv_head, anything):
    if strides is None:
        of_head = anything
    else:
        of_head = descale + b.to(tl.int64) * strides.sequence + kv_head.to(tl.int64) * strides.head
        if not strides.IS_WRITTEN:
            of_head = tl.load(of_head)
    return of_head


@triton.jit
def load_pages(problem, view, tile_index, BLOCK_N: tl.constexpr):
    """Pages of the slots of a KV tile: one number where the tile lies within one page, else one for each slot.

    Entries of the table that ``[view.begin, view.end)`` does not reach are not read; those that are no pages give some page.
    In a dense cache, the "page" is the sequence's row.
    """
    first_slot = tile_index * BLOCK_N
    if problem.cache.PAGE_SIZE is None:
        pages = view.row
    elif problem.cache.PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(view.row + first_slot // problem.cache.PAGE_SIZE, first_slot < view.end, other=0)
        pages = clamp(pages, 0, problem.cache.num_pages - 1)
    else:
        slots = first_slot + tl.arange(0, BLOCK_N)
        pages = tl.load(view.row + slots // problem.cache.PAGE_SIZE, (slots >= view.begin) & (slots < view.end), other=0)
        pages = clamp(pages, 0, problem.cache.num_pages - 1)
    return pages


@triton.jit
def slots_in_page(problem, view, slots):
    """Slots of a sequence -> slots of their pages."""
    if problem.cache.PAGE_SIZE is None:
        within = slots + view.offset
    else:
        within = slots % problem.cache.PAGE_SIZE
    return within
