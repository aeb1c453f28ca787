# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
r"""``decode`` of MLA on Hopper, in Gluon: a value is the first 512 elements of its key, the latent; 64 are left, the tail.

Work is split over CTAs as in ``decode`` (:mod:`.schedule`), and ``combine`` reduces the splits. There is one CTA an SM. It
has 64 rows, which fill the tensor cores, and two consumers, warp groups that each have half of the columns of the output in
their registers. The first also multiplies queries by keys and does the softmax::

    producer      tile 2 ──►  slot 0                    4 warps, TMA
                  tile 3 ──►            slot 1
    consumer 0    S0 │ P0 = softmax(S0) │ O += P0.V0, S1 = Q.K1 │ P1 = softmax(S1) │ O += P1.V1, S2 = Q.K2 │
    consumer 1            rescale O     │ O += P0.V0            │       rescale O  │ O += P1.V1            │

What bounds it is how soon the tensor cores get the next weights, and shared memory: two tiles and the queries fill it, and
the products read from it nearly all that it gives. So the weights P take the place of their tile's tail, which nobody needs
by then. Each half of a slot's columns is loaded again as soon as the one consumer that multiplies it is done, behind the
softmax and the products of the other tile; each warp of the producer asks for a part of it.
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
from triton.language.extra.cuda import gdc_launch_dependents

from .combine import split_states
from .gluon_names import barrier, load_async, load_box
from .output import lse_offsets
from .params import DecodeTile, ProblemParams, Tensors, in_elements
from .prefill_hopper import clear_rows_behind, load_pages, row_of, slot_of
from .schedule import behind, part_of, share_of
from .score import is_visible, row_scores, score_tile
from .sequence import clamp, load_rows
from .softmax import SoftmaxState, normalize, raise_max

WARPS = gl.constexpr(4)
"""Of each consumer, and of the producer."""

HALF = gl.constexpr(256)
"""Columns of the output that a consumer has."""

ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
"""The layout of a consumer's accumulator ``(BLOCK_M, HALF)``."""

STAGES = gl.constexpr(2)
"""KV tiles in shared memory."""

SLACK = gl.constexpr(8.0)
"""A row's maximum is not raised where it grows by less: weights go up to 2^8, and most tiles rescale nothing."""

CLEARED_COLUMNS = gl.constexpr(64)
"""Of values, that are cleared together."""


class Buffers(NamedTuple):
    """Shared memory and barriers."""

    q: Any  # (BLOCK_M, BLOCK_D)
    q_tail: Any  # (BLOCK_M, BLOCK_TAIL)
    latents: Any  # (STAGES, 1, 1, BLOCK_N, BLOCK_D)
    tails: Any  # (STAGES, 1, 1, BLOCK_N, BLOCK_TAIL), then the weights, (BLOCK_M, BLOCK_N)
    alpha: Any  # (STAGES, BLOCK_M)
    state: Any  # (2, BLOCK_M): maxima and sums
    ready: Any  # [STAGES * 2]: a half of a tile's columns is loaded; the tail comes with the first half
    free: Any  # [STAGES * 2]: the consumer of a half is done with it
    scaled: Any  # [STAGES]: a tile's alpha is there
    weighed: Any  # [STAGES]: a tile's weights are there
    state_ready: Any
    state_free: Any


# --------------------------------------------------------------------------------------------------------------------
# The producer
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def produce(tensors, problem, tile, buffers, latent_tiles, tail_tiles, share):
    """Loads the KV tiles of this CTA."""
    loaded = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share)
        row, offset = row_of(tensors, problem, part.b)
        kv_tile = part.first_tile
        while kv_tile < part.first_tile + part.count:
            first_slot = kv_tile * tile.BLOCK_N
            pages = load_pages(tensors, problem, tile, part, first_slot, row, part.begin, part.end)
            load_tile(problem, tile, part, buffers, latent_tiles, tail_tiles, loaded, pages, first_slot + offset)
            loaded += 1
            kv_tile += 1
        share = behind(problem, share, part)


@gluon.jit
def load_tile(problem, tile, part, buffers, latent_tiles, tail_tiles, number, pages, first_slot):
    """Ask for the ``number``-th KV tile, first for the second half of its columns, which is free before the first."""
    BOXES: gl.constexpr = tile.BLOCK_N // tile.BOX_N
    HALF_BYTES: gl.constexpr = latent_tiles.block_type.nbytes * BOXES
    TAIL_BYTES: gl.constexpr = tail_tiles.block_type.nbytes * BOXES
    stage, phase = slot_of(number, STAGES)
    latents = buffers.latents.index(stage)
    first, second = stage * 2, stage * 2 + 1

    mbarrier.wait(buffers.free.index(second), phase ^ 1)
    ready = buffers.ready.index(second)
    mbarrier.expect(ready, HALF_BYTES)
    load_columns(problem, tile, part, latent_tiles, HALF, ready, latents.slice(HALF, HALF, 3), pages, first_slot)

    mbarrier.wait(buffers.free.index(first), phase ^ 1)
    ready = buffers.ready.index(first)
    mbarrier.expect(ready, HALF_BYTES + TAIL_BYTES)
    load_columns(problem, tile, part, latent_tiles, 0, ready, latents.slice(0, HALF, 3), pages, first_slot)
    tails = buffers.tails.index(stage)
    load_columns(problem, tile, part, tail_tiles, problem.cache.BLOCK_D, ready, tails, pages, first_slot)


@gluon.jit
def load_columns(problem, tile, part, tiles, column, ready, target, pages, first_slot):
    """Ask for the columns of a KV tile from ``column`` on, as many as ``target`` has, in boxes within one page each."""
    for box in gl.static_range(tile.BLOCK_N // tile.BOX_N):
        page = pages[box]
        slot = first_slot + box * tile.BOX_N
        if problem.cache.PAGE_SIZE is not None:
            page = clamp(page, 0, problem.cache.num_pages - 1)
            slot = slot % problem.cache.PAGE_SIZE
        coordinates = [page, part.kv_head // problem.cache.SHARE, slot, column]
        load_box(tiles, coordinates, ready, target.slice(box * tile.BOX_N, tile.BOX_N, 2))


# --------------------------------------------------------------------------------------------------------------------
# The consumers
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def weigh_and_multiply(tensors, problem, tile, buffers, share):
    """The weights of each work tile of this CTA, and the first half of the columns of its output."""
    GROUP: gl.constexpr = problem.queries.GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, tile.BLOCK_N, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    if tensors.cu_seqlens_q is not None:
        clear_rows_behind(tensors, problem, gl.program_id(0), gl.num_programs(0))
    consumed = 0
    parts = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share)
        load_q(tensors, problem, tile, part, buffers)
        row = gl.arange(0, tile.BLOCK_M, OF_ROWS)
        i = row // GROUP
        head = part.kv_head * GROUP + row % GROUP
        used = (i < part.seqlen_q) & (part.seqlen_k >= 0)
        rows = row_scores(
            tensors, problem, part.b, head, i, used, part.seqlen_q, part.seqlen_k, part.begin, part.end
        )  # fmt: skip
        acc = gl.full([tile.BLOCK_M, HALF], 0.0, gl.float32, ACC)
        row_max = gl.full([tile.BLOCK_M], float("-inf"), gl.float32, OF_ROWS)
        row_sum = gl.full([tile.BLOCK_M], 0.0, gl.float32, OF_ROWS)

        kv_tile = part.first_tile
        last_tile = kv_tile + part.count - 1
        s = warpgroup_mma_wait(0, deps=(start_scores(problem, tile, buffers, consumed, SCORES),))
        while kv_tile < last_tile:
            row_max, row_sum, rescaled = weigh(problem, tile, buffers, part, rows, kv_tile, consumed, s, row_max, row_sum)
            if rescaled:
                acc = rescale(buffers, consumed % STAGES, acc)
            acc_token = start_values(problem, tile, buffers, acc, consumed, 0)
            s_token = start_scores(problem, tile, buffers, consumed + 1, SCORES)
            acc = warpgroup_mma_wait(3, deps=(acc_token,))  # not for the three of the scores
            mbarrier.arrive(buffers.free.index(consumed % STAGES * 2))
            s = warpgroup_mma_wait(0, deps=(s_token,))
            consumed += 1
            kv_tile += 1
        row_max, row_sum, rescaled = weigh(problem, tile, buffers, part, rows, kv_tile, consumed, s, row_max, row_sum)
        if rescaled:
            acc = rescale(buffers, consumed % STAGES, acc)
        acc = warpgroup_mma_wait(0, deps=(start_values(problem, tile, buffers, acc, consumed, 0),))
        mbarrier.arrive(buffers.free.index(consumed % STAGES * 2))
        consumed += 1

        row_max = gl.where(used, row_max, float("-inf"))  # other rows saw the tiles that all used ones see
        row_sum = gl.where(used, row_sum, 0.0)
        mbarrier.wait(buffers.state_free, parts & 1 ^ 1)
        buffers.state.index(0).store(row_max)
        buffers.state.index(1).store(row_sum)
        mbarrier.arrive(buffers.state_ready)
        state = SoftmaxState(
            acc, gl.convert_layout(row_max, gl.SliceLayout(1, ACC)), gl.convert_layout(row_sum, gl.SliceLayout(1, ACC))
        )
        store_part(tensors, problem, tile, part, state, 0)
        share = behind(problem, share, part)
        parts += 1


@gluon.jit
def multiply(tensors, problem, tile, buffers, share):
    """The second half of the columns of the output of each work tile."""
    consumed = 0
    parts = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share)
        acc = gl.full([tile.BLOCK_M, HALF], 0.0, gl.float32, ACC)
        for _ in range(part.count):
            stage, phase = slot_of(consumed, STAGES)
            mbarrier.wait(buffers.scaled.index(stage), phase)
            if is_rescaled(buffers, stage):
                acc = rescale(buffers, stage, acc)
            mbarrier.wait(buffers.weighed.index(stage), phase)
            acc = warpgroup_mma_wait(0, deps=(start_values(problem, tile, buffers, acc, consumed, 1),))
            mbarrier.arrive(buffers.free.index(stage * 2 + 1))
            consumed += 1

        mbarrier.wait(buffers.state_ready, parts & 1)
        row_max = buffers.state.index(0).load(gl.SliceLayout(1, ACC))
        row_sum = buffers.state.index(1).load(gl.SliceLayout(1, ACC))
        mbarrier.arrive(buffers.state_free)
        store_part(tensors, problem, tile, part, SoftmaxState(acc, row_max, row_sum), 1)
        share = behind(problem, share, part)
        parts += 1


@gluon.jit
def load_q(tensors, problem, tile, part, buffers):
    """The rows of q, into shared memory; zeros where there is no used query."""
    first_row, _ = load_rows(tensors, problem, part.b, True)
    strides = in_elements(problem.queries.strides)
    if tensors.cu_seqlens_q is None:
        start = tensors.q + part.b.to(gl.int64) * strides.batch
    else:
        start = tensors.q + first_row.to(gl.int64) * strides.token
    copy_rows(problem, tile, part, strides, start, buffers.q)
    copy_rows(problem, tile, part, strides, start + problem.cache.BLOCK_D, buffers.q_tail)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()


@gluon.jit
def copy_rows(problem, tile, part, strides, start, target):
    """Start to copy columns from ``start`` on, as many as ``target`` has."""
    GROUP: gl.constexpr = problem.queries.GROUP
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, tile.BLOCK_M, gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, target.shape[1], gl.SliceLayout(0, LAYOUT))
    i = row // GROUP
    head = part.kv_head * GROUP + row % GROUP
    pointers = start + (i.to(gl.int64) * strides.token + head * strides.head)[:, None] + d[None, :]
    load_async(target, pointers, (i < part.seqlen_q)[:, None] & (d < target.shape[1])[None, :])


@gluon.jit
def start_scores(problem, tile, buffers, number, SCORES: gl.constexpr):
    """Start the three products of the queries and the keys of the ``number``-th KV tile, as these come."""
    stage, phase = slot_of(number, STAGES)
    latents = buffers.latents.index(stage).reshape([tile.BLOCK_N, problem.cache.BLOCK_D])
    tails = buffers.tails.index(stage).reshape([tile.BLOCK_N, problem.cache.BLOCK_TAIL])
    s = gl.full([tile.BLOCK_M, tile.BLOCK_N], 0.0, gl.float32, SCORES)
    mbarrier.wait(buffers.ready.index(stage * 2 + 1), phase)
    keys = latents.slice(HALF, HALF, 1).permute((1, 0))
    s = warpgroup_mma(buffers.q.slice(HALF, HALF, 1), keys, s, use_acc=False, is_async=True)
    mbarrier.wait(buffers.ready.index(stage * 2), phase)
    keys = latents.slice(0, HALF, 1).permute((1, 0))
    s = warpgroup_mma(buffers.q.slice(0, HALF, 1), keys, s, is_async=True)
    return warpgroup_mma(buffers.q_tail, tails.permute((1, 0)), s, is_async=True)


@gluon.jit
def start_values(problem, tile, buffers, acc, number, WHICH: gl.constexpr):
    """Start to add the product of the weights and half of the values of the ``number``-th KV tile."""
    stage, _ = slot_of(number, STAGES)
    weights = buffers.tails.index(stage).reshape([tile.BLOCK_M, tile.BLOCK_N])
    values = buffers.latents.index(stage).reshape([tile.BLOCK_N, problem.cache.BLOCK_DV]).slice(WHICH * HALF, HALF, 1)
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def weigh(problem, tile, buffers, part, rows, kv_tile, number, s, row_max, row_sum):
    """The softmax of a KV tile: (new maxima, sums, whether accumulators are to be rescaled).

    Alpha, then the weights go to shared memory.
    """
    stage, _ = slot_of(number, STAGES)
    first_slot = kv_tile * tile.BLOCK_N
    slots = first_slot + gl.arange(0, tile.BLOCK_N, gl.SliceLayout(0, s.type.layout))
    scores = score_tile(problem, s, slots, rows, False)
    all_begin, all_end = slots_all_see(problem, part)
    if (first_slot < all_begin) | (first_slot + tile.BLOCK_N > all_end):
        scores = gl.where(is_visible(slots[None, :], rows.first[:, None], rows.last[:, None]), scores, float("-inf"))
    largest = gl.max(scores, 1)
    largest = gl.where(largest > row_max + SLACK, largest, row_max)
    row_max, subtrahend, alpha = raise_max(row_max, largest, True)
    buffers.alpha.index(stage).store(alpha)
    mbarrier.arrive(buffers.scaled.index(stage))
    rescaled = is_rescaled(buffers, stage)

    weights = gl.exp2(scores - subtrahend[:, None])
    target = buffers.tails.index(stage).reshape([tile.BLOCK_M, tile.BLOCK_N])
    target.store(weights.to(target.dtype))
    if (first_slot < part.begin) | (first_slot + tile.BLOCK_N > part.end):
        clear_values(problem, tile, buffers.latents.index(stage), first_slot, part.begin, part.end)
    fence_async_shared()
    mbarrier.arrive(buffers.weighed.index(stage))
    return row_max, row_sum * alpha + gl.sum(weights, 1), rescaled


@gluon.jit
def is_rescaled(buffers, stage):
    """Whether alpha of a tile is less than 1 for some row. Each warp looks at all rows, so that none waits for another."""
    ALL_ROWS: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    return gl.min(buffers.alpha.index(stage).load(ALL_ROWS), 0) < 1.0


@gluon.jit
def rescale(buffers, stage, acc):
    """An accumulator times alpha of a tile."""
    return acc * buffers.alpha.index(stage).load(gl.SliceLayout(1, ACC))[:, None]


@gluon.jit
def slots_all_see(problem, part):
    """Cached slots ``[begin, end)`` that all used rows see."""
    begin = part.begin
    end = part.end
    if problem.score.window_left is not None:
        begin = gl.maximum(begin, part.seqlen_k - 1 - problem.score.window_left)
    if problem.score.window_right is not None:
        end = gl.minimum(end, part.seqlen_k - part.seqlen_q + problem.score.window_right + 1)
    return begin, end


@gluon.jit
def clear_values(problem, tile, latents, first_slot, begin, end):
    """Zeros for the values of a tile that lie outside ``[begin, end)``: 0 x NaN is not 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    latents = latents.reshape([tile.BLOCK_N, problem.cache.BLOCK_DV])
    slots = first_slot + gl.arange(0, tile.BLOCK_N, gl.SliceLayout(1, LAYOUT))
    is_valid = ((slots >= begin) & (slots < end))[:, None]
    for column in gl.static_range(0, problem.cache.BLOCK_DV, CLEARED_COLUMNS):
        some = latents.slice(column, CLEARED_COLUMNS, 1)
        values = some.load(LAYOUT)
        some.store(gl.where(is_valid, values, gl.zeros_like(values)))


@gluon.jit
def store_part(tensors, problem, tile, part, state, WHICH: gl.constexpr):
    """Half of the columns of the output of a whole work tile, or of a split."""
    GROUP: gl.constexpr = problem.queries.GROUP
    HEADS: gl.constexpr = problem.cache.HEADS * GROUP
    DV: gl.constexpr = problem.cache.BLOCK_DV
    first_row, owned_rows = load_rows(tensors, problem, part.b, True)
    row = gl.arange(0, tile.BLOCK_M, gl.SliceLayout(1, ACC))
    d = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(0, ACC))
    i = row // GROUP
    owned = (i < owned_rows) & (row < tile.ROWS)
    if tile.SPLIT_KV:
        if part.count < part.work_end - part.work_begin:
            split = part.b * problem.cache.HEADS + part.kv_head + gl.program_id(0)
            maxima, sums = split_states(tensors, problem, tile)
            first = split.to(gl.int64) * tile.ROWS
            gl.store(tensors.partials + first * DV + ((row * DV)[:, None] + d[None, :]), state.acc, owned[:, None])
            if WHICH == 0:
                gl.store(maxima + first + row, state.row_max, owned)
                gl.store(sums + first + row, state.row_sum, owned)
    if part.count == part.work_end - part.work_begin:
        head = part.kv_head * GROUP + row % GROUP
        values, lse = normalize(tensors, state, head, owned)
        out_row = (first_row + i).to(gl.int64)
        pointers = tensors.out + ((out_row * HEADS + head) * DV)[:, None] + d[None, :]
        gl.store(pointers, values.to(tensors.out.dtype.element_ty), owned[:, None])
        if tensors.lse is not None and WHICH == 0:
            gl.store(tensors.lse + lse_offsets(tensors, problem, part.b, out_row, i, head), lse, owned)


@gluon.jit
def decode_hopper(tensors: Tensors, problem: ProblemParams, tile: DecodeTile, tail_tiles, latent_tiles):
    """A CTA takes its share of the KV tiles, work tile by work tile."""
    DTYPE: gl.constexpr = tensors.q.dtype.element_ty
    M: gl.constexpr = tile.BLOCK_M
    N: gl.constexpr = tile.BLOCK_N
    D: gl.constexpr = problem.cache.BLOCK_D
    TAIL: gl.constexpr = problem.cache.BLOCK_TAIL
    SCALARS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if tile.PDL:
        gdc_launch_dependents()  # combine may be set up while this runs
    lanes = gl.arange(0, tile.BLOCK_B, gl.BlockedLayout([1], [32], [WARPS], [0]))
    share = share_of(tensors, problem, tile, gl.program_id(0), lanes)
    q = gl.allocate_shared_memory(DTYPE, [M, D], gl.NVMMASharedLayout.get_default_for([M, D], DTYPE))
    q_tail = gl.allocate_shared_memory(DTYPE, [M, TAIL], gl.NVMMASharedLayout.get_default_for([M, TAIL], DTYPE))
    latents = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, D], latent_tiles.layout)
    tails = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, TAIL], tail_tiles.layout)
    alpha = gl.allocate_shared_memory(gl.float32, [STAGES, M], SCALARS)
    state = gl.allocate_shared_memory(gl.float32, [2, M], SCALARS)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], mbarrier.MBarrierLayout())
    scaled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], mbarrier.MBarrierLayout())
    state_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    state_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(scaled.index(stage), count=1)
        mbarrier.init(weighed.index(stage), count=1)
    for half in gl.static_range(STAGES * 2):
        mbarrier.init(ready.index(half), count=1)
        mbarrier.init(free.index(half), count=1)
    mbarrier.init(state_ready, count=1)
    mbarrier.init(state_free, count=1)
    fence_async_shared()
    buffers = Buffers(
        q, q_tail, latents, tails, alpha, state, ready, free, scaled, weighed, state_ready, state_free
    )  # fmt: skip
    gl.warp_specialize(
        [
            (weigh_and_multiply, (tensors, problem, tile, buffers, share)),
            (multiply, (tensors, problem, tile, buffers, share)),
            (produce, (tensors, problem, tile, buffers, latent_tiles, tail_tiles, share)),
        ],
        [4, 4],  # warps of the second consumer and the producer
        [240, 24],  # their registers; the first consumer gets as many as the second
    )
