# ruff: noqa: SIM108 (an if on constants chooses code when the kernel is compiled)
"""Where the keys are: how many each sequence has, which of them can be seen, and how a tile of them is loaded.

Functions that take a sequence ``b`` take one number or a vector of them alike. ``inside`` masks what is past the batch.
"""

import triton
import triton.language as tl


@triton.jit
def key_count(b, inside, cu_seqlens_k, seqused_k, capacity, new_tokens):
    """Keys of sequence ``b``, the append included, never more than its table or row can hold. -1 = skip the sequence."""
    if seqused_k is not None:
        before = tl.load(seqused_k + b, inside, other=-1)
        count = tl.where(before < 0, -1, tl.minimum(before + new_tokens, capacity))
    elif cu_seqlens_k is not None:
        count = tl.load(cu_seqlens_k + b + 1, inside, other=0) - tl.load(cu_seqlens_k + b, inside, other=0)
    else:
        count = b * 0 + capacity
    return count


@triton.jit
def first_slot(b, inside, cache_leftpad):
    """First slot of sequence ``b`` that holds a key."""
    if cache_leftpad is not None:
        first = tl.load(cache_leftpad + b, inside, other=0)
    else:
        first = b * 0
    return first


@triton.jit
def visible_slots(first, keys, queries, window_left, HAS_LEFT: tl.constexpr):
    """Slots ``[begin, end)`` that at least one query of a sequence sees.

    The last query sits at ``keys - 1`` and so sees the last key, whatever the right window is.
    """
    end = tl.where(queries > 0, tl.maximum(keys, 0), 0)
    begin = first
    if HAS_LEFT:
        begin = tl.maximum(begin, keys - queries - window_left)
    return tl.minimum(begin, end), end


@triton.jit
def locate_sequence(b, cu_seqlens_k, cache_batch_idx, PAGED: tl.constexpr):
    """Where an unpaged sequence lies: (its row of the cache, how many slots into it). Ragged keys are one long row."""
    row = b * 0
    offset = b * 0
    if not PAGED:
        if cu_seqlens_k is not None:
            offset = tl.load(cu_seqlens_k + b)
        elif cache_batch_idx is not None:
            row = tl.load(cache_batch_idx + b)
        else:
            row = b
    return row, offset


@triton.jit
def load_pages(table, row, tile, begin, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the slots of a tile: one number where the tile lies within one page, else one for each slot.

    ``table`` is the sequence's own row of the block table. Entries that ``[begin, end)`` does not reach are not read.
    Unpaged (``PAGE_SIZE == 0``), the "page" is the sequence's row of the cache.
    """
    if PAGE_SIZE == 0:
        pages = row
    elif PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table + tile * BLOCK_N // PAGE_SIZE, tile * BLOCK_N < end, other=0)
    else:
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        pages = tl.load(table + slots // PAGE_SIZE, (slots >= begin) & (slots < end), other=0)
    return pages


@triton.jit
def load_tile(
    base,
    pages,
    tile,
    offset,
    begin,
    end,
    page_stride,
    slot_stride,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A ``(BLOCK_N, BLOCK_WIDTH)`` tile of keys or values; if MASKED, zeros for the slots outside ``[begin, end)``.

    Zeros and not what lies there, because an unused slot may hold NaN, and 0 x NaN is not 0.
    """
    slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_WIDTH)
    if PAGE_SIZE == 0:
        within = (slots + offset).to(tl.int64)
    else:
        within = (slots % PAGE_SIZE).to(tl.int64)
    rows = pages.to(tl.int64) * page_stride + within * slot_stride
    pointers = base + rows[:, None] + d[None, :]
    if MASKED:
        inside = (slots >= begin) & (slots < end)
        tile_values = tl.load(pointers, inside[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_WIDTH:
        tile_values = tl.load(pointers)
    else:
        tile_values = tl.load(pointers, (d < WIDTH)[None, :], other=0.0)
    return tile_values
