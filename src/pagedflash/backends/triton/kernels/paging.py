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
    k_descale: Any  # the scale of the sequence and KV head; a pointer to its tokens' own; anything where there are none
    v_descale: Any
    row: Any  # the sequence's row of the block table (a pointer) or of a dense cache; packed keys are one long row
    offset: Any  # slots from there to the sequence
    begin: Any  # slots [begin, end) are read
    end: Any


@triton.jit
def view_kv(tensors, problem, b, kv_head, begin, end):
    """The slots ``[begin, end)`` of sequence ``b`` and KV head ``kv_head``."""
    k, k_strides = pointer_and_strides(tensors.k, problem.cache.k_strides, problem.cache.K_WORDS)
    if problem.cache.v_strides is None:
        v, v_strides = pointer_and_strides(tensors.v, problem.cache.k_strides, problem.cache.V_WORDS)
    else:
        v, v_strides = pointer_and_strides(tensors.v, problem.cache.v_strides, problem.cache.V_WORDS)
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
    kv_head = kv_head // problem.cache.SHARE
    k += kv_head * k_strides.head
    v += kv_head * v_strides.head
    k_descale = descale_of(tensors.k_descale, problem.cache.k_descale_strides, b, kv_head, k)
    v_descale = descale_of(tensors.v_descale, problem.cache.v_descale_strides, b, kv_head, v)
    return KVView(k, v, k_strides, v_strides, k_descale, v_descale, row, offset, begin, end)


@triton.jit
def pointer_and_strides(base, strides, WORDS: tl.constexpr):
    """To elements and in elements, or to words and in words."""
    if WORDS is None:
        in_units = in_elements(strides)
    else:
        base = base.to(tl.pointer_type(tl.int16), bitcast=True)
        in_units = in_words(strides)
    return base, in_units


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
