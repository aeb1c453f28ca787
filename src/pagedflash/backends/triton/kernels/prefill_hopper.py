# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
r"""``prefill`` on Hopper, in Gluon: the same attention by warp groups that each do one thing.

Each SM runs one CTA for the whole launch (a persistent grid), which takes blocks of 128 rows in turn, those with the most
keys first. A row is one query of one query head: the query heads of a KV head are packed into the same block, and share its
keys::

                    blocks        K ring        V ring
    producer      [ ][ ]  ──►  [tile][tile]  [tile][tile]        1 warp, TMA
                     │              │             │
                     ▼              ▼             ▼
    consumer 0    rows 0 to 63:   S = Q.K^T, softmax, O += P.V      a warp group: 4 warps
    consumer 1    rows 64 to 127: the same                          another

    one consumer   S1 = Q.K1 │ O += P0.V0 │ S2 = Q.K2 │ O += P1.V1 │        tensor cores
                             │ P1 = softmax(S1) │     │ P2 = softmax(S2) │  all else

The producer decides what comes next, tells it to the consumers, and asks the TMA unit for tiles of keys and values as soon
as both consumers have left a slot of the ring. A consumer starts the product of the next keys before that of the values it
has weights for, and does the softmax of the one while the tensor cores are busy with the other. The weights P are never
stored: they are the registers that the second product takes. A block's last product and its output run beside the first
product of the next block.

KV tiles are visited from the last to the first. Only those at the edges of what the rows see are masked.

The width of a tile is a power of two. A head dim of 96 or 192 is two of them, 64 and 32, or 128 and 64: queries, keys,
values and outputs are tuples of such parts, and so is their shared memory.
Source: Shah et al., "FlashAttention-3" (2024).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_names import barrier, load_async, load_box, reinterpret
from .params import HopperTile, ProblemParams, Tensors, in_elements
from .score import LN2, LOG2E
from .sequence import clamp, load_first_key, load_rows, load_seqlen_k, load_seqlen_q

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)
"""Of a block that each consumer has: what a warp group multiplies at a time."""

BLOCK_M = gl.constexpr(128)
"""Rows of a block, of all consumers."""

WORK_FIELDS = gl.constexpr(7)
"""Numbers that describe a block, those of :class:`Work`."""


class Work(NamedTuple):
    """A block of rows."""

    b: Any  # the sequence; past the last block, the batch size
    kv_head: Any
    first_row: Any  # of the sequence, in the output
    block: Any  # of the sequence
    seqlen_q: Any
    owned_rows: Any  # queries of the sequence, used or not
    seqlen_k: Any


class Buffers(NamedTuple):
    """Shared memory and barriers. A ring's ``ready`` counts the producer, ``free`` both consumers.

    One more barrier of ``v_ready`` is the producer's own, for values that it has to see before the consumers.
    """

    q: Any  # parts (2 * Q_SLOTS, 64, width): each consumer's own rows
    k: Any  # parts (STAGES, 1, 1, BLOCK_N, width)
    v: Any
    work: Any  # (2 * WORK_FIELDS, 1)
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any
    work_ready: Any
    work_free: Any


@gluon.jit
def key_range(problem, tile, work):
    """Slots ``[begin, end)`` that some row of the block sees."""
    first, last = queries_of(problem, tile, work)
    shift = work.seqlen_k - work.seqlen_q  # query i sits at key position i + shift
    begin = 0
    end = gl.maximum(work.seqlen_k, 0)
    if problem.score.window_left is not None:
        begin = gl.maximum(begin, first + shift - problem.score.window_left)
    if problem.score.window_right is not None:
        end = gl.minimum(end, last + shift + problem.score.window_right + 1)
    end = gl.where(first < work.seqlen_q, gl.maximum(end, 0), 0)
    return gl.minimum(begin, end), end


@gluon.jit
def tile_range(tile, begin, end):
    """KV tiles ``[first, end)`` of a block. There is one at least, be it one that no row sees."""
    first = begin // tile.BLOCK_N
    return first, gl.maximum(gl.cdiv(end, tile.BLOCK_N), first + 1)


@gluon.jit
def queries_of(problem, tile, work):
    """First and last used query of the block."""
    first = work.block * BLOCK_M // problem.queries.GROUP
    last = (work.block * BLOCK_M + BLOCK_M - 1) // problem.queries.GROUP
    return first, gl.minimum(last, work.seqlen_q - 1)


# --------------------------------------------------------------------------------------------------------------------
# The producer
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def blocks_of(tensors, problem, tile, b):
    """Blocks of sequence ``b`` of one KV head, 0 if it is ``decode``'s."""
    _, rows = load_rows(tensors, problem, b, True)
    blocks = gl.cdiv(rows * problem.queries.GROUP, BLOCK_M)
    if problem.queries.DECODE_LIMIT is not None:
        blocks = gl.where(rows > problem.queries.DECODE_LIMIT, blocks, 0)
    return blocks


@gluon.jit
def produce(tensors, k_tiles, v_tiles, problem, tile, buffers):
    """Walks the blocks of this CTA, and loads their tiles."""
    loaded = 0  # KV tiles
    cleared = 0  # of them
    number = 0  # of the block, in this CTA
    work, first_block = find_block(tensors, problem, tile, gl.to_tensor(0), gl.to_tensor(0), block_of_cta(gl.to_tensor(0)))
    hand_out(buffers, work, 0)
    while work.b < problem.queries.batch_size:
        # Consumers are told of a block one ahead, so that its queries are there when they start on it.
        number += 1
        next_work, first_block = find_block(tensors, problem, tile, work.b, first_block, block_of_cta(number))
        hand_out(buffers, next_work, number)
        loaded, cleared = load_tiles(tensors, k_tiles, v_tiles, problem, tile, buffers, work, loaded, cleared)
        work = next_work
    # They also start on the keys of the next block before they finish one: here are some behind the last, never used.
    stage, phase = slot_of(loaded, tile.STAGES)
    mbarrier.wait(buffers.k_free.index(stage), phase ^ 1)
    mbarrier.arrive(buffers.k_ready.index(stage))


@gluon.jit
def find_block(tensors, problem, tile, b, first_block, index):
    """Block ``index``, searched from sequence ``b`` and its first block on: (work, the first block of its sequence)."""
    blocks = blocks_of(tensors, problem, tile, b) * problem.cache.HEADS
    while (b < problem.queries.batch_size) & (index >= first_block + blocks):
        first_block += blocks
        b += 1
        if b < problem.queries.batch_size:
            blocks = blocks_of(tensors, problem, tile, b) * problem.cache.HEADS
    kv_head = 0
    block = 0
    first_row = 0
    owned_rows = 0
    seqlen_q = 0
    seqlen_k = 0
    if b < problem.queries.batch_size:
        within = index - first_block
        kv_head = within % problem.cache.HEADS
        block = blocks // problem.cache.HEADS - 1 - within // problem.cache.HEADS
        first_row, owned_rows = load_rows(tensors, problem, b, True)
        seqlen_q = load_seqlen_q(tensors, problem, b, True)
        seqlen_k = load_seqlen_k(tensors, problem, b, True)
    return Work(b, kv_head, first_row, block, seqlen_q, owned_rows, seqlen_k), first_block


@gluon.jit
def block_of_cta(number):
    """The ``number``-th block of this CTA. Dealt to and fro, so that the first CTA has no more keys than the last."""
    ctas = gl.num_programs(0)
    cta = gl.program_id(0)
    return number * ctas + gl.where(number % 2 == 0, cta, ctas - 1 - cta)


@gluon.jit
def slot_of(number, SLOTS: gl.constexpr):
    """(slot of a ring that the ``number``-th takes, phase of the slot's barriers)"""
    return number % SLOTS, number // SLOTS & 1


@gluon.jit
def hand_out(buffers, work, number):
    """Tell the consumers their next block, the ``number``-th."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot, phase = slot_of(number, 2)
    mbarrier.wait(buffers.work_free.index(slot), phase ^ 1)
    for field in gl.static_range(WORK_FIELDS):
        buffers.work.index(slot * WORK_FIELDS + field).store(gl.full([1], work[field], gl.int32, ONE))
    mbarrier.arrive(buffers.work_ready.index(slot))


@gluon.jit
def load_tiles(tensors, k_tiles, v_tiles, problem, tile, buffers, work, loaded, cleared):
    """The KV tiles of a block, from the last to the first. Returns how many were loaded, and cleared, so far."""
    row, offset = row_of(tensors, problem, work.b)
    # Slots [valid_begin, valid_end) hold keys that some query of the sequence sees; others may hold anything.
    valid_begin = 0
    valid_end = gl.maximum(work.seqlen_k, 0)
    if problem.score.window_left is not None:
        valid_begin = gl.maximum(work.seqlen_k - work.seqlen_q - problem.score.window_left, 0)
    begin, end = key_range(problem, tile, work)
    first_tile, end_tile = tile_range(tile, begin, end)
    kv_tile = end_tile - 1
    while kv_tile >= first_tile:
        pages = load_pages(tensors, problem, tile, work, kv_tile * tile.BLOCK_N, row, valid_begin, valid_end)
        cleared = load_kv(
            problem, tile, work, k_tiles, v_tiles, buffers, kv_tile, pages, offset, valid_begin, valid_end, loaded, cleared
        )
        loaded += 1
        kv_tile -= 1
    return loaded, cleared


@gluon.jit
def load_kv(problem, tile, work, k_tiles, v_tiles, buffers, kv_tile, pages, offset, begin, end, loaded, cleared):
    """Ask for the ``loaded``-th KV tile; clear its values outside ``[begin, end)``. Returns how many were cleared so far."""
    stage, phase = slot_of(loaded, tile.STAGES)
    first_slot = kv_tile * tile.BLOCK_N
    k_signal = buffers.k_ready.index(stage)
    load_tile(problem, tile, work, k_tiles, buffers.k, k_signal, buffers.k_free, stage, phase, pages, first_slot + offset)
    is_edge = (first_slot < begin) | (first_slot + tile.BLOCK_N > end)
    v_signal = buffers.v_ready.index(gl.where(is_edge, tile.STAGES, stage))
    load_tile(problem, tile, work, v_tiles, buffers.v, v_signal, buffers.v_free, stage, phase, pages, first_slot + offset)
    if is_edge:
        mbarrier.wait(buffers.v_ready.index(tile.STAGES), cleared & 1)
        for part in gl.static_range(len(buffers.v)):
            clear_values(tile, buffers.v[part].index(stage), first_slot, begin, end)
        mbarrier.arrive(buffers.v_ready.index(stage))
        cleared += 1
    return cleared


@gluon.jit
def clear_values(tile, values, first_slot, begin, end):
    """Zeros for the values of a tile that lie outside ``[begin, end)``: 0 x NaN is not 0.

    Shared memory has a tile as columns of up to 64 elements, one behind the other.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    WIDTH: gl.constexpr = min(values.shape[3], 64)
    COLUMNS: gl.constexpr = values.shape[3] // WIDTH
    lines = reinterpret(values, [COLUMNS * tile.BLOCK_N, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zeros = gl.full([WIDTH], 0.0, values.dtype, LAYOUT)
    for row in range(0, tile.BLOCK_N):
        slot = first_slot + row
        if (slot < begin) | (slot >= end):
            for column in gl.static_range(COLUMNS):
                lines.index(column * tile.BLOCK_N + row).store(zeros)
    fence_async_shared()


@gluon.jit
def row_of(tensors, problem, b):
    """(the row of a contiguous cache that has the keys of sequence ``b``, the slot of the first one there)"""
    row = b
    offset = 0
    if tensors.block_table is None:
        if tensors.cu_seqlens_k is not None:
            row = 0
            offset = load_first_key(tensors, problem, b, True)
        elif tensors.cache_batch_idx is not None:
            row = clamp(gl.load(tensors.cache_batch_idx + b), 0, problem.cache.num_pages - 1)
    return row, offset


@gluon.jit
def load_pages(tensors, problem, tile, work, first_slot, row, valid_begin, valid_end):
    """The page of each box of a tile, some page where it holds no valid slot; in a dense cache, the row."""
    pages = ()
    for box in gl.static_range(tile.BLOCK_N // tile.BOX_N):
        if problem.cache.PAGE_SIZE is None:
            pages = pages + (row,)  # noqa: RUF005 (the compiler has no unpacking)
        else:
            slot = first_slot + box * tile.BOX_N
            entry = tensors.block_table + work.b.to(gl.int64) * problem.cache.table_width + slot // problem.cache.PAGE_SIZE
            page = gl.load(entry, (slot < valid_end) & (slot + tile.BOX_N > valid_begin), other=0)
            pages = pages + (page,)  # noqa: RUF005
    return pages


@gluon.jit
def load_tile(problem, tile, work, tiles, ring, signal, free, stage, phase, pages, first_slot):
    """Ask for a tile of keys or values, in boxes that lie within one page each. ``tiles`` are descriptors of its parts."""
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(signal, bytes_of(tiles) * (tile.BLOCK_N // tile.BOX_N))
    for box in gl.static_range(tile.BLOCK_N // tile.BOX_N):
        slot = first_slot + box * tile.BOX_N
        page = pages[box]
        if problem.cache.PAGE_SIZE is not None:
            page = clamp(page, 0, problem.cache.num_pages - 1)
            slot = slot % problem.cache.PAGE_SIZE
        head = work.kv_head // problem.cache.SHARE
        for part in gl.static_range(len(tiles)):
            target = ring[part].index(stage).slice(box * tile.BOX_N, tile.BOX_N, 2)
            column = 0 if part == 0 else tiles[0].block_type.shape[3]
            load_box(tiles[part], [page, head, slot, column], signal, target)


@gluon.constexpr_function
def bytes_of(tiles):
    """Of a box, all parts together."""
    return sum(part.block_type.nbytes for part in tiles)


# --------------------------------------------------------------------------------------------------------------------
# The consumers
# --------------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Of a consumer's 64 rows: the slots that each sees, from first to last."""

    first: Any
    last: Any


@gluon.jit
def consume(tensors, problem, tile, buffers, WHICH: gl.constexpr):
    """64 rows of every block of this CTA."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile.BLOCK_N, 16])
    ACC: gl.constexpr = acc_layout(tile.DV)
    if tensors.cu_seqlens_q is not None:
        if problem.queries.DECODE_LIMIT is None:  # else decode does it
            clear_rows_behind(tensors, problem, gl.program_id(0) * CONSUMERS + WHICH, gl.num_programs(0) * CONSUMERS)
    consumed = 0  # KV tiles
    number = 0  # of the block, in this CTA
    work = take(buffers, number)
    q_rows = parts_at(buffers.q, WHICH)
    load_q(tensors, problem, tile, work, q_rows, WHICH)
    leave(buffers, number)
    wait_for_q()
    s = warpgroup_mma_wait(0, deps=(start_scores(problem, tile, buffers, q_rows, consumed, SCORES),))
    mbarrier.arrive(buffers.k_free.index(0))
    while work.b < problem.queries.batch_size:
        begin, end = key_range(problem, tile, work)
        first_tile, end_tile = tile_range(tile, begin, end)
        all_first, all_end = unmasked_tiles(problem, tile, work, begin, end)
        first_of_consumer = work.block * BLOCK_M + WHICH * ROWS
        row = first_of_consumer + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        rows = visible_slots(problem, work, row // problem.queries.GROUP, begin, end)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        row_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = no_output(tile)

        kv_tile = end_tile - 1
        next_q_rows = parts_at(buffers.q, (number + 1) % tile.Q_SLOTS * CONSUMERS + WHICH)
        if tile.Q_SLOTS == 2:
            load_q(tensors, problem, tile, take(buffers, number + 1), next_q_rows, WHICH)
        s = mask_tile(problem, tile, s, kv_tile, rows, SCORES)
        weights, row_max, row_sum, alpha = softmax_step(problem, s, row_max, row_sum)
        while kv_tile > first_tile:
            # ---- The products of the keys of the next tile, then of the weights and values of this one ----
            kv_tile -= 1
            k_stage, _ = slot_of(consumed + 1, tile.STAGES)
            v_stage, v_phase = slot_of(consumed, tile.STAGES)
            p = as_operand(weights, tensors.q.dtype.element_ty, ACC)
            s_token = start_scores(problem, tile, buffers, q_rows, consumed + 1, SCORES)
            acc_tokens = start_values(problem, tile, buffers, p, acc, consumed)

            # ---- The softmax of the next tile while the second product is under way ----
            s = warpgroup_mma_wait(len(acc), deps=(s_token,))  # each part of the values is one
            mbarrier.arrive(buffers.k_free.index(k_stage))
            if (kv_tile >= all_end) | (kv_tile < all_first):
                s = mask_tile(problem, tile, s, kv_tile, rows, SCORES)
            weights, row_max, row_sum, alpha = softmax_step(problem, s, row_max, row_sum)
            mbarrier.wait(buffers.v_ready.index(v_stage), v_phase)  # long ready: ptxas moves no softmax behind a branch
            acc = warpgroup_mma_wait(0, deps=acc_tokens + (p,))[: len(acc)]  # noqa: RUF005
            mbarrier.arrive(buffers.v_free.index(v_stage))
            acc = scaled(acc, alpha)
            consumed += 1

        # ---- The last values, and the first keys of the next block, whose products run while this one is finished ----
        number += 1
        next_work = take(buffers, number)
        if tile.Q_SLOTS == 1:
            load_q(tensors, problem, tile, next_work, next_q_rows, WHICH)
        leave(buffers, number)
        p = as_operand(weights, tensors.q.dtype.element_ty, ACC)
        acc_tokens = start_values(problem, tile, buffers, p, acc, consumed)
        acc = warpgroup_mma_wait(0, deps=acc_tokens + (p,))[: len(acc)]  # noqa: RUF005
        v_stage, _ = slot_of(consumed, tile.STAGES)
        mbarrier.arrive(buffers.v_free.index(v_stage))
        consumed += 1
        q_rows = next_q_rows
        wait_for_q()
        s_token = start_scores(problem, tile, buffers, q_rows, consumed, SCORES)
        finish(tensors, problem, tile, work, first_of_consumer, acc, row_max, row_sum, SCORES)
        s = warpgroup_mma_wait(0, deps=(s_token,))
        k_stage, _ = slot_of(consumed, tile.STAGES)
        mbarrier.arrive(buffers.k_free.index(k_stage))
        work = next_work


@gluon.jit
def take(buffers, number):
    """The ``number``-th block."""
    slot, phase = slot_of(number, 2)
    mbarrier.wait(buffers.work_ready.index(slot), phase)
    at = slot * WORK_FIELDS
    work = Work(
        field(buffers, at), field(buffers, at + 1), field(buffers, at + 2), field(buffers, at + 3), field(buffers, at + 4),
        field(buffers, at + 5), field(buffers, at + 6),
    )  # fmt: skip
    return work


@gluon.jit
def leave(buffers, number):
    """The ``number``-th block need not be told again."""
    slot, _ = slot_of(number, 2)
    mbarrier.arrive(buffers.work_free.index(slot))


@gluon.jit
def field(buffers, at):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(buffers.work.index(at).load(ONE), 0)


@gluon.jit
def parts_at(ring, index):
    """The parts of a tile in a slot of shared memory."""
    parts = ()
    for part in gl.static_range(len(ring)):
        parts = parts + (ring[part].index(index),)  # noqa: RUF005
    return parts


@gluon.jit
def load_q(tensors, problem, tile, work, q_rows, WHICH: gl.constexpr):
    """Start to copy this consumer's rows of q; zeros where there is no used query."""
    strides = in_elements(problem.queries.strides)
    if tensors.cu_seqlens_q is None:
        start = tensors.q + work.b.to(gl.int64) * strides.batch
    else:
        start = tensors.q + work.first_row.to(gl.int64) * strides.token
    for part in gl.static_range(len(q_rows)):
        copy_rows(problem, work, strides, start, q_rows[part], 0 if part == 0 else tile.D, WHICH)
    async_copy.commit_group()


@gluon.jit
def copy_rows(problem, work, strides, start, target, COLUMN: gl.constexpr, WHICH: gl.constexpr):
    """Start to copy columns from ``COLUMN`` on, as many as ``target`` has."""
    WIDTH: gl.constexpr = target.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    GROUP: gl.constexpr = problem.queries.GROUP
    row = work.block * BLOCK_M + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    head = work.kv_head * GROUP + row % GROUP
    i = row // GROUP
    d = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    pointers = start + (i.to(gl.int64) * strides.token + head * strides.head)[:, None] + d[None, :]
    load_async(target, pointers, (i < work.seqlen_q)[:, None] & (d < problem.cache.D)[None, :])


@gluon.jit
def wait_for_q():
    """Until this consumer's rows of q are there, for the tensor cores too."""
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()


@gluon.jit
def visible_slots(problem, work, i, begin, end):
    """The slots that query ``i`` sees; none if it is not used."""
    position = i + (work.seqlen_k - work.seqlen_q)
    first = position * 0 + begin
    last = position * 0 + (end - 1)
    if problem.score.window_left is not None:
        first = gl.maximum(first, position - problem.score.window_left)
    if problem.score.window_right is not None:
        last = gl.minimum(last, position + problem.score.window_right)
    return Rows(first, gl.where((i < work.seqlen_q) & (work.seqlen_k >= 0), last, -1))


@gluon.jit
def unmasked_tiles(problem, tile, work, begin, end):
    """KV tiles ``[first, end)`` of which all used rows of the block see all keys."""
    first, last = queries_of(problem, tile, work)
    shift = work.seqlen_k - work.seqlen_q
    if problem.score.window_left is not None:
        begin = gl.maximum(begin, last + shift - problem.score.window_left)
    if problem.score.window_right is not None:
        end = gl.minimum(end, first + shift + problem.score.window_right + 1)
    return gl.cdiv(begin, tile.BLOCK_N), end // tile.BLOCK_N


@gluon.jit
def start_scores(problem, tile, buffers, q_rows, number, SCORES: gl.constexpr):
    """Start the product of this consumer's queries and the ``number``-th keys."""
    stage, phase = slot_of(number, tile.STAGES)
    mbarrier.wait(buffers.k_ready.index(stage), phase)
    s = gl.full([ROWS, tile.BLOCK_N], 0.0, gl.float32, SCORES)
    for part in gl.static_range(len(q_rows)):
        keys = buffers.k[part].index(stage).reshape([tile.BLOCK_N, q_rows[part].shape[1]]).permute((1, 0))
        s = warpgroup_mma(q_rows[part], keys, s, use_acc=part > 0, is_async=True)
    return s


@gluon.jit
def start_values(problem, tile, buffers, p, acc, number):
    """Start to add the product of the weights ``p`` and the ``number``-th values to ``acc``."""
    stage, phase = slot_of(number, tile.STAGES)
    mbarrier.wait(buffers.v_ready.index(stage), phase)
    tokens = ()
    for part in gl.static_range(len(acc)):
        values = buffers.v[part].index(stage).reshape([tile.BLOCK_N, acc[part].shape[1]])
        tokens = tokens + (warpgroup_mma(p, values, acc[part], is_async=True),)  # noqa: RUF005
    return tokens


@gluon.jit
def no_output(tile):
    """The parts of an output of zeros."""
    acc = (gl.full([ROWS, tile.DV], 0.0, gl.float32, acc_layout(tile.DV)),)
    if tile.DV_TAIL:
        acc = acc + (gl.full([ROWS, tile.DV_TAIL], 0.0, gl.float32, acc_layout(tile.DV_TAIL)),)  # noqa: RUF005
    return acc


@gluon.constexpr_function
def acc_layout(width):
    """Of the part of an output."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.jit
def scaled(acc, factor):
    """The parts of an output times a factor of each row."""
    parts = ()
    for part in gl.static_range(len(acc)):
        of_rows = gl.convert_layout(factor, gl.SliceLayout(1, acc[part].type.layout))
        parts = parts + (acc[part] * of_rows[:, None],)  # noqa: RUF005
    return parts


@gluon.jit
def mask_tile(problem, tile, s, kv_tile, rows, SCORES: gl.constexpr):
    """-inf at the slots that a row does not see."""
    columns = gl.arange(0, tile.BLOCK_N, gl.SliceLayout(0, SCORES))[None, :]
    first_slot = kv_tile * tile.BLOCK_N
    visible = columns <= (rows.last - first_slot)[:, None]
    if problem.score.window_left is not None:
        visible = visible & (columns >= (rows.first - first_slot)[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def softmax_step(problem, s, row_max, row_sum):
    """Products (rows, BLOCK_N) to (weights, row maxima, sums, alpha). Maxima are of products, before they are scaled."""
    new_max = gl.maximum(row_max, gl.max(s, 1))
    safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)  # of a row that has seen nothing
    subtrahend = safe_max * problem.score.scale
    alpha = gl.exp2(row_max * problem.score.scale - subtrahend)
    weights = gl.exp2(s * problem.score.scale - subtrahend[:, None])
    row_sum = row_sum * alpha + gl.sum(weights, 1)
    return weights, new_max, row_sum, alpha


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, ACC: gl.constexpr):
    """Weights as the second product takes them: the same registers, rounded."""
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)


@gluon.jit
def finish(tensors, problem, tile, work, first_of_consumer, acc, row_max, row_sum, SCORES: gl.constexpr):
    """Normalise the rows, the sink's weight counted in, and store them and their LSE: 0 and +inf if a row saw no key."""
    GROUP: gl.constexpr = problem.queries.GROUP
    HEADS: gl.constexpr = problem.cache.HEADS * GROUP
    row = first_of_consumer + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    head = work.kv_head * GROUP + row % GROUP
    i = row // GROUP
    owned = i < work.owned_rows
    seen = (row_sum > 0) & (i < work.seqlen_q)  # rows past the used ones saw unmasked tiles as if they were there
    row_max = row_max * problem.score.scale
    if tensors.sinks is not None:
        sink = gl.load(tensors.sinks + head, owned, other=0.0).to(gl.float32) * LOG2E
        new_max = gl.maximum(row_max, sink)
        alpha = gl.exp2(row_max - new_max)
        acc = scaled(acc, alpha)
        row_sum = row_sum * alpha + gl.exp2(sink - new_max)
        row_max = new_max
    safe_sum = gl.where(seen, row_sum, 1.0)
    factor = gl.where(seen, 1.0 / safe_sum, 0.0)
    if tensors.lse is not None:
        lse = gl.where(seen, (row_max + gl.log2(safe_sum)) * LN2, float("inf"))
        if tensors.cu_seqlens_q is None:  # (B, Hq, Sq)
            lse_row = (work.b.to(gl.int64) * HEADS + head) * problem.queries.max_seqlen_q + i
        else:  # (Hq, total_q)
            lse_row = head * gl.cast(problem.queries.total_q, gl.int64) + work.first_row + i
        gl.store(tensors.lse + lse_row, lse, owned)

    acc = scaled(acc, factor)
    for part in gl.static_range(len(acc)):
        store_rows(tensors, problem, work, first_of_consumer, acc[part], 0 if part == 0 else tile.DV)


@gluon.jit
def store_rows(tensors, problem, work, first_of_consumer, out, COLUMN: gl.constexpr):
    """The columns of the output from ``COLUMN`` on."""
    GROUP: gl.constexpr = problem.queries.GROUP
    HEADS: gl.constexpr = problem.cache.HEADS * GROUP
    WIDTH: gl.constexpr = out.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    out = gl.convert_layout(out.to(tensors.out.dtype.element_ty), LAYOUT)
    row = first_of_consumer + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    i = row // GROUP
    out_row = (work.first_row + i).to(gl.int64) * HEADS + work.kv_head * GROUP + row % GROUP
    d = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    stored = (i < work.owned_rows)[:, None] & (d < problem.cache.DV)[None, :]
    gl.store(tensors.out + (out_row * problem.cache.DV)[:, None] + d[None, :], out, stored)


@gluon.jit
def clear_rows_behind(tensors, problem, first, step):
    """Packed rows behind the last sequence give 0 and +inf. Of them, every ``step``-th from ``first``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    HEADS: gl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    d = gl.arange(0, problem.cache.BLOCK_DV, LAYOUT)
    zeros = gl.full([problem.cache.BLOCK_DV], 0.0, tensors.out.dtype.element_ty, LAYOUT)
    total_q = gl.cast(problem.queries.total_q, gl.int64)
    row = gl.maximum(gl.load(tensors.cu_seqlens_q + problem.queries.batch_size), 0).to(gl.int64)
    row += first
    while row < total_q:
        for head in range(0, HEADS):
            gl.store(tensors.out + (row * HEADS + head) * problem.cache.DV + d, zeros, d < problem.cache.DV)
            if tensors.lse is not None:
                gl.store(tensors.lse + head * total_q + row, float("inf"))
        row += step


@gluon.jit
def allocate_queries(tensors, tile, tiles):
    """Shared memory for blocks of queries, which have the parts of keys."""
    q = ()
    for part in gl.static_range(len(tiles)):
        q = q + (allocate_rows(tensors.q.dtype.element_ty, tile, tiles[part].block_type.shape[3]),)  # noqa: RUF005
    return q


@gluon.jit
def allocate_rows(DTYPE: gl.constexpr, tile, WIDTH: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [tile.Q_SLOTS * CONSUMERS, ROWS, WIDTH], LAYOUT)


@gluon.jit
def allocate_ring(tile, tiles):
    """Shared memory for tiles of keys or values."""
    ring = ()
    for part in gl.static_range(len(tiles)):
        ring = ring + (allocate_slots(tile, tiles[part]),)  # noqa: RUF005
    return ring


@gluon.jit
def allocate_slots(tile, tiles):
    SHAPE: gl.constexpr = [tile.STAGES, 1, 1, tile.BLOCK_N, tiles.block_type.shape[3]]
    return gl.allocate_shared_memory(tiles.dtype, SHAPE, tiles.layout)


@gluon.jit
def prefill_hopper(
    tensors: Tensors,
    problem: ProblemParams,
    tile: HopperTile,
    k_tiles,
    v_tiles,
    k_tail_tiles=None,  # of the second part, if there is one
    v_tail_tiles=None,
):
    SCALARS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    STAGES: gl.constexpr = tile.STAGES
    all_k_tiles = (k_tiles,)
    all_v_tiles = (v_tiles,)
    if k_tail_tiles is not None:
        all_k_tiles = (k_tiles, k_tail_tiles)
    if v_tail_tiles is not None:
        all_v_tiles = (v_tiles, v_tail_tiles)
    q = allocate_queries(tensors, tile, all_k_tiles)
    k = allocate_ring(tile, all_k_tiles)
    v = allocate_ring(tile, all_v_tiles)
    work = gl.allocate_shared_memory(gl.int32, [2 * WORK_FIELDS, 1], SCALARS)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    work_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=CONSUMERS)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=CONSUMERS)
    mbarrier.init(v_ready.index(STAGES), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(work_ready.index(slot), count=1)
        mbarrier.init(work_free.index(slot), count=CONSUMERS)
    fence_async_shared()
    buffers = Buffers(q, k, v, work, k_ready, k_free, v_ready, v_free, work_ready, work_free)
    gl.warp_specialize(
        [
            (consume, (tensors, problem, tile, buffers, 0)),
            (consume, (tensors, problem, tile, buffers, 1)),
            (produce, (tensors, all_k_tiles, all_v_tiles, problem, tile, buffers)),
        ],
        [4, 1],  # warps of the second consumer and the producer
        [240, 24],  # their registers; the first consumer gets as many as the second
    )
