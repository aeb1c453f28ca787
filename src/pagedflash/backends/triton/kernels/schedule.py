"""How ``decode`` splits its work over CTAs, found from the lengths on the device.

A work tile is one (sequence, KV head): all query rows that share its keys. The KV tiles of all work tiles, of BLOCK_N keys
each, are numbered sequence by sequence, KV head by KV head, and each active CTA takes the same number of them::

    sequence       0               1                  2
    KV head     0     1     0        1        0   1
    KV tiles   [aaaa][aaaa][bbbbbbb][bbbbbbb][cc][cc]      only those that hold a key which is seen
    CTAs       |--0---|---1---|---2---|---3---|--4--|      one tile more or less, whatever the lengths

A CTA that has all KV tiles of a work tile stores its output. A work tile that several have is split: each leaves a split,
its softmax state, and the splits are reduced (:mod:`.combine`). From one split to the next either the work tile or the CTA
is the next one, so (work tile + CTA) numbers the splits.
In a mixed batch, sequences of more than DECODE_LIMIT queries have no KV tiles here: they are ``prefill``'s.
Source of the split: Dao et al., "Flash-Decoding" (2023); of the equal shares: Osama et al., "Stream-K" (2023).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .sequence import kv_range, load_leftpad, load_rows, load_seqlen_k, load_seqlen_q


class Part(NamedTuple):
    """The KV tiles of one work tile that a CTA takes next."""

    b: Any
    kv_head: Any
    first_tile: Any  # of the sequence
    count: Any
    work_begin: Any  # all KV tiles of the work tile, in the numbers of all work tiles
    work_end: Any
    seqlen_q: Any
    seqlen_k: Any
    begin: Any  # cached slots [begin, end) are seen
    end: Any


class Shares(NamedTuple):
    """KV tiles in groups of ``tiles``, each of which ``ctas`` CTAs share."""

    ctas: Any
    tiles: Any
    total_tiles: Any


class Share(NamedTuple):
    """What a CTA has left of its share: the KV tiles ``[tile_index, tile_end)``."""

    tile_index: Any
    tile_end: Any
    b: Any  # the sequence of the first one, or one before it that has no KV tiles
    sequence_begin: Any  # that sequence's first KV tile
    shares: Any  # of all CTAs


class SequenceWork(NamedTuple):
    """Of one sequence, or a vector of them."""

    tiles: Any  # KV tiles of each of its work tiles
    seqlen_q: Any
    seqlen_k: Any
    begin: Any  # cached slots [begin, end) are seen
    end: Any


@triton.jit
def sequence_work(tensors, problem, tile, b, inside):
    """The work of sequence ``b``. Tokens that ``decode`` appends itself (BLOCK_NEW) are in no KV tile.

    A sequence without visible keys counts one KV tile, so that some CTA writes its zeros; one of ``prefill``'s counts none.
    """
    seqlen_k = load_seqlen_k(tensors, problem, b, inside)
    seqlen_q = load_seqlen_q(tensors, problem, b, inside)
    begin, end = kv_range(problem, load_leftpad(tensors, b, inside), seqlen_q, seqlen_k)
    if tile.BLOCK_NEW > 0:
        end = tl.maximum(end - problem.append.seqlen_new, 0)
        begin = tl.minimum(begin, end)
    tiles = tl.maximum(tl.cdiv(end, tile.BLOCK_N) - begin // tile.BLOCK_N, 1)
    served = inside
    if problem.queries.DECODE_LIMIT is not None:
        _, rows = load_rows(tensors, problem, b, inside)
        served = inside & (rows <= problem.queries.DECODE_LIMIT)
    return SequenceWork(tl.where(served, tiles, 0), seqlen_q, seqlen_k, begin, end)


@triton.jit
def locate_sequence(tensors, problem, tile, b, lanes):
    """(the first KV tile of sequence ``b``, all KV tiles, KV tiles of the longest work tile, all work tiles)

    ``lanes``: 0 to BLOCK_B - 1.
    """
    first_tile = 0
    total_tiles = 0
    longest = 0
    served = 0
    for start in range(0, problem.queries.batch_size, tile.BLOCK_B):
        some = start + lanes
        work = sequence_work(tensors, problem, tile, some, some < problem.queries.batch_size)
        first_tile += tl.sum(tl.where(some < b, work.tiles, 0)) * problem.cache.HEADS
        total_tiles += tl.sum(work.tiles) * problem.cache.HEADS
        longest = tl.maximum(longest, tl.max(work.tiles))
        if problem.queries.DECODE_LIMIT is not None:
            served += tl.sum((work.tiles > 0).to(tl.int32))
    if problem.queries.DECODE_LIMIT is None:
        served += problem.queries.batch_size
    return first_tile, total_tiles, longest, served * problem.cache.HEADS


@triton.jit
def kv_tiles(tensors, problem, tile, b, inside):
    """KV tiles of sequence ``b``, of all KV heads."""
    return sequence_work(tensors, problem, tile, b, inside).tiles * problem.cache.HEADS


@triton.jit
def sequence_of(tensors, problem, tile, tile_index, lanes, COUNT: tl.constexpr):
    """(the sequence of a tile, its first tile), where the tiles that ``COUNT`` gives of all sequences are numbered.

    Past the last tile it is the sequence past the batch.
    """
    b = 0
    first_tile = 0
    for start in range(0, problem.queries.batch_size, tile.BLOCK_B):
        some = start + lanes
        inside = some < problem.queries.batch_size
        tiles = COUNT(tensors, problem, tile, some, inside)
        passed = inside & (first_tile + tl.cumsum(tiles, 0) <= tile_index)
        if start == b:  # all before were passed
            b += tl.sum(passed.to(tl.int32))
            first_tile += tl.sum(tl.where(passed, tiles, 0))
    return b, first_tile


@triton.jit
def share_of(tensors, problem, tile, cta, lanes):
    """The share of a CTA. Where work is not split, each has one work tile. ``lanes``: 0 to BLOCK_B - 1."""
    if tile.SPLIT_KV:
        _, total_tiles, longest, work_tiles = locate_sequence(tensors, problem, tile, 0, lanes)
        shares = share_tiles(total_tiles, longest, work_tiles, tile.num_ctas)
        tile_index = first_tile_of(cta, shares)
        tile_end = first_tile_of(cta + 1, shares)
        b, sequence_begin = sequence_of(tensors, problem, tile, tile_index, lanes, kv_tiles)
    else:
        b = cta // problem.cache.HEADS
        tiles = sequence_work(tensors, problem, tile, b, b < problem.queries.batch_size).tiles
        sequence_begin = 0
        tile_index = cta % problem.cache.HEADS * tiles
        tile_end = tile_index + tiles
        shares = Shares(1, tiles, tile_end)
    return Share(tile_index, tile_end, b, sequence_begin, shares)


@triton.jit
def part_of(tensors, problem, tile, share):
    """The next part of a share."""
    b, tile_index, sequence_begin = share.b, share.tile_index, share.sequence_begin
    work = sequence_work(tensors, problem, tile, b, b < problem.queries.batch_size)
    if problem.queries.DECODE_LIMIT is not None:
        while work.tiles == 0:
            b += 1
            work = sequence_work(tensors, problem, tile, b, b < problem.queries.batch_size)
    kv_head = (tile_index - sequence_begin) // work.tiles
    work_begin = sequence_begin + kv_head * work.tiles
    work_end = work_begin + work.tiles
    first_tile = work.begin // tile.BLOCK_N + (tile_index - work_begin)
    count = tl.minimum(work_end, share.tile_end) - tile_index
    return Part(
        b, kv_head, first_tile, count, work_begin, work_end, work.seqlen_q, work.seqlen_k, work.begin, work.end
    )  # fmt: skip


@triton.jit
def behind(problem, share, part):
    """The share behind its next part."""
    tile_index = share.tile_index + part.count
    sequence_end = share.sequence_begin + (part.work_end - part.work_begin) * problem.cache.HEADS
    is_next = tile_index == sequence_end
    b = part.b + is_next.to(tl.int32)
    sequence_begin = tl.where(is_next, sequence_end, share.sequence_begin)
    return Share(tile_index, share.tile_end, b, sequence_begin, share.shares)


@triton.jit
def share_tiles(total_tiles, longest, work_tiles, num_ctas):
    """:class:`Shares`: of each work tile where these are alike and the CTAs nearly a multiple of them, else of all together.

    Then no CTA has to start on a second work tile, and each work tile has as few splits as can be.
    """
    ctas = num_ctas // tl.maximum(work_tiles, 1)
    alike = (total_tiles == longest * work_tiles) & (ctas * work_tiles * 8 >= num_ctas * 7)
    tiles = tl.maximum(tl.where(alike, longest, total_tiles), 1)
    return Shares(tl.where(alike, ctas, num_ctas), tiles, total_tiles)


@triton.jit
def first_tile_of(cta, shares):
    """The first KV tile of a CTA. The first CTAs of those that share tiles may have one more than the others."""
    rank = cta % shares.ctas
    first = rank * (shares.tiles // shares.ctas) + tl.minimum(rank, shares.tiles % shares.ctas)
    return tl.minimum(cta // shares.ctas * shares.tiles + first, shares.total_tiles)


@triton.jit
def cta_of(tile_index, shares):
    """The CTA that has a KV tile."""
    index = tile_index % shares.tiles
    each = shares.tiles // shares.ctas
    longer_ctas = shares.tiles % shares.ctas
    longer_end = longer_ctas * (each + 1)
    behind = longer_ctas + (index - longer_end) // tl.maximum(each, 1)
    return tile_index // shares.tiles * shares.ctas + tl.where(index < longer_end, index // (each + 1), behind)
