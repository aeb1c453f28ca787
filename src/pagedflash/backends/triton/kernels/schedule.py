"""How ``decode`` splits its work, found from the lengths on the device.

The work is a line of tiles of BLOCK_N keys, sequence by sequence, KV head by KV head::

    sequence       0               1                  2
    KV head     0     1     0        1        0   1
    tiles      [aaaa][aaaa][bbbbbbb][bbbbbbb][cc][cc]      only the tiles that hold a visible key
    sharers    |--0---|---1---|---2---|---3---|--4--|      shares that differ by one tile at most, whatever the lengths

A segment is one (sequence, KV head); a part is what one program has of one segment. Along the line either the segment
or the program steps on from one part to the next, so (segment + program) numbers the parts. A segment in one part is
finished by its program; the others are left to ``combine``.
Source of the split: Dao et al., "Flash-Decoding" (2023); of the equal shares: Osama et al., "Stream-K" (2023).
"""

import triton
import triton.language as tl

from .keys import first_slot, key_count, visible_slots
from .queries import query_count


@triton.jit
def sharer_count(line, longest, segments, programs):
    """Programs that share the line: all of them, or one for each segment where segments are alike and nearly as many.

    Then no program has to start on a second segment, and there is nothing to combine.
    """
    alike = (line == longest * segments) & (segments <= programs) & (segments * 8 >= programs * 7)
    return tl.where(alike, segments, programs)


@triton.jit
def share_begin(program, sharers, line):
    """Where the share of ``program`` begins on the line. The first ``line % sharers`` have one tile more."""
    return tl.minimum(program * (line // sharers) + tl.minimum(program, line % sharers), line)


@triton.jit
def program_at(place, sharers, line):
    """The program whose share holds ``place``."""
    tiles = line // sharers
    long_programs = line % sharers
    long_end = long_programs * (tiles + 1)
    behind = long_programs + (place - long_end) // tl.maximum(tiles, 1)
    return tl.where(place < long_end, place // (tiles + 1), behind)


@triton.jit
def sequence_tiles(
    b,
    inside,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    cache_leftpad,
    capacity,
    new_tokens,
    fused_tokens,
    dense_queries,
    window_left,
    HAS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(tiles of a segment of sequence ``b``, its keys, its queries, its visible slots in the cache from, to)

    The last ``fused_tokens`` keys are not in the cache yet. A sequence without visible keys counts one tile, so that
    somebody writes its zeros.
    """
    keys = key_count(b, inside, cu_seqlens_k, seqused_k, capacity, new_tokens)
    queries = query_count(b, inside, cu_seqlens_q, seqused_q, dense_queries)
    begin, end = visible_slots(first_slot(b, inside, cache_leftpad), keys, queries, window_left, HAS_LEFT)
    end = tl.maximum(end - fused_tokens, 0)
    begin = tl.minimum(begin, end)
    tiles = tl.maximum(tl.cdiv(end, BLOCK_N) - begin // BLOCK_N, 1)
    return tl.where(inside, tiles, 0), keys, queries, begin, end


@triton.jit
def line_position(
    b,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    cache_leftpad,
    batch,
    capacity,
    new_tokens,
    fused_tokens,
    dense_queries,
    window_left,
    KV_HEADS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """(where sequence ``b`` begins on the line, the line's length, tiles of the longest segment)"""
    begin = 0
    line = 0
    longest = 0
    for start in range(0, batch, BLOCK_B):
        some = start + tl.arange(0, BLOCK_B)
        tiles, _, _, _, _ = sequence_tiles(
            some, some < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, fused_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        begin += tl.sum(tl.where(some < b, tiles, 0)) * KV_HEADS
        line += tl.sum(tiles) * KV_HEADS
        longest = tl.maximum(longest, tl.max(tiles))
    return begin, line, longest


@triton.jit
def sequence_at(
    place,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    cache_leftpad,
    batch,
    capacity,
    new_tokens,
    fused_tokens,
    dense_queries,
    window_left,
    KV_HEADS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """(the sequence that holds ``place`` on the line, where it begins)"""
    b = 0
    begin = 0
    for start in range(0, batch, BLOCK_B):
        some = start + tl.arange(0, BLOCK_B)
        tiles, _, _, _, _ = sequence_tiles(
            some, some < batch, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad,
            capacity, new_tokens, fused_tokens, dense_queries, window_left, HAS_LEFT, BLOCK_N,
        )  # fmt: skip
        passed = (some < batch) & (begin + tl.cumsum(tiles, 0) * KV_HEADS <= place)
        if start == b:  # all before were passed
            b += tl.sum(passed.to(tl.int32))
            begin += tl.sum(tl.where(passed, tiles, 0)) * KV_HEADS
    return b, begin
