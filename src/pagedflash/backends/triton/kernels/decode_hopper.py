# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
r"""``decode`` of MLA on Hopper, in Gluon: a value is the first 512 elements of its key, the latent; 64 are left, the tail.

Work is split over CTAs as in ``decode`` (:mod:`.schedule`), and ``combine`` reduces the splits. There is one CTA an SM. It
has 64 rows, which fill the tensor cores, and two warp groups, each with half of the columns of the output in its registers::

    producer      tile 2 ──►  slot 0                     1 warp, TMA
                  tile 3 ──►            slot 1
    consumer      S0 │ P0 = softmax(S0) │ O += P0.V0, S1 = Q.K1 │ P1 = softmax(S1) │ O += P1.V1, S2 = Q.K2 │

Each warp group multiplies the queries by half of the keys of a tile. The weights P of both go through shared memory, and
each multiplies all of them by half of the columns of the values. A slot is loaded again as soon as its values are used:
the work on the other tile hides that.
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
from .prefill_hopper import clear_rows_behind, load_pages, slot_of
from .schedule import first_tile_of, kv_tiles, locate_sequence, part_of, sequence_of, sequence_work, share_tiles
from .score import row_scores, score_tile
from .sequence import clamp, load_first_key, load_rows
from .softmax import SoftmaxState, normalize, raise_max

WARPS = gl.constexpr(8)
"""Of the consumer: two warp groups."""

STAGES = gl.constexpr(2)
"""KV tiles in shared memory, which they fill."""

CLEARED_COLUMNS = gl.constexpr(64)
"""Of values, that are cleared together."""


class Buffers(NamedTuple):
    """Shared memory and barriers."""

    q: Any  # (BLOCK_M, BLOCK_D)
    q_tail: Any  # (BLOCK_M, BLOCK_TAIL)
    weights: Any  # (BLOCK_M, BLOCK_N)
    latents: Any  # (STAGES, 1, 1, BLOCK_N, BLOCK_D)
    tails: Any  # (STAGES, 1, 1, BLOCK_N, BLOCK_TAIL)
    ready: Any
    free: Any


class Share(NamedTuple):
    """Of a CTA: the KV tiles ``[tile_index, tile_end)``, of sequence ``b`` on, whose first tile is ``sequence_begin``."""

    tile_index: Any
    tile_end: Any
    b: Any
    sequence_begin: Any


@gluon.jit
def share_of_cta(tensors, problem, tile):
    KV_HEADS: gl.constexpr = problem.cache.HEADS
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    cta = gl.program_id(0)
    if tile.SPLIT_KV:
        lanes = gl.arange(0, tile.BLOCK_B, LANES)
        _, total_tiles, longest, work_tiles = locate_sequence(tensors, problem, tile, 0, lanes)
        shares = share_tiles(total_tiles, longest, work_tiles, tile.num_ctas)
        tile_index = first_tile_of(cta, shares)
        tile_end = first_tile_of(cta + 1, shares)
        b, sequence_begin = sequence_of(tensors, problem, tile, tile_index, lanes, kv_tiles)
    else:
        b = cta // KV_HEADS
        tiles = sequence_work(tensors, problem, tile, b, b < problem.queries.batch_size).tiles
        sequence_begin = 0
        tile_index = cta % KV_HEADS * tiles
        tile_end = tile_index + tiles
    return Share(tile_index, tile_end, b, sequence_begin)


@gluon.jit
def behind(problem, share, part):
    """The share behind its next part."""
    tile_index = share.tile_index + part.count
    sequence_end = share.sequence_begin + (part.work_end - part.work_begin) * problem.cache.HEADS
    is_next = tile_index == sequence_end
    return Share(
        tile_index,
        share.tile_end,
        part.b + is_next.to(gl.int32),
        gl.where(is_next, sequence_end, share.sequence_begin),
    )


# --------------------------------------------------------------------------------------------------------------------
# The producer
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def produce(tensors, problem, tile, buffers, latent_tiles, tail_tiles, share):
    """Loads the KV tiles of this CTA."""
    loaded = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share.tile_index, share.tile_end, share.b, share.sequence_begin)
        row = part.b
        offset = 0
        if tensors.block_table is None:
            if tensors.cu_seqlens_k is not None:
                row = 0
                offset = load_first_key(tensors, problem, part.b, True)
            elif tensors.cache_batch_idx is not None:
                row = clamp(gl.load(tensors.cache_batch_idx + part.b), 0, problem.cache.num_pages - 1)
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
    """Ask for the ``number``-th KV tile, in boxes that lie within one page each."""
    stage, phase = slot_of(number, STAGES)
    ready = buffers.ready.index(stage)
    mbarrier.wait(buffers.free.index(stage), phase ^ 1)
    box_bytes: gl.constexpr = latent_tiles.block_type.nbytes + tail_tiles.block_type.nbytes
    mbarrier.expect(ready, box_bytes * (tile.BLOCK_N // tile.BOX_N))
    head = part.kv_head // problem.cache.SHARE
    for box in gl.static_range(tile.BLOCK_N // tile.BOX_N):
        slot = first_slot + box * tile.BOX_N
        page = pages[box]
        if problem.cache.PAGE_SIZE is not None:
            page = clamp(page, 0, problem.cache.num_pages - 1)
            slot = slot % problem.cache.PAGE_SIZE
        latents = buffers.latents.index(stage).slice(box * tile.BOX_N, tile.BOX_N, 2)
        tails = buffers.tails.index(stage).slice(box * tile.BOX_N, tile.BOX_N, 2)
        load_box(latent_tiles, [page, head, slot, 0], ready, latents)
        load_box(tail_tiles, [page, head, slot, problem.cache.BLOCK_D], ready, tails)


# --------------------------------------------------------------------------------------------------------------------
# The consumer
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def consume(tensors, problem, tile, buffers, share):
    """The rows of each work tile of this CTA."""
    GROUP: gl.constexpr = problem.queries.GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, tile.BLOCK_N // 2, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, problem.cache.BLOCK_DV // 2, 16])
    if tensors.cu_seqlens_q is not None:
        clear_rows_behind(tensors, problem, gl.program_id(0), gl.num_programs(0))
    consumed = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share.tile_index, share.tile_end, share.b, share.sequence_begin)
        load_q(tensors, problem, tile, part, buffers)
        row = gl.arange(0, tile.BLOCK_M, gl.SliceLayout(1, SCORES))
        i = row // GROUP
        head = part.kv_head * GROUP + row % GROUP
        used = (i < part.seqlen_q) & (part.seqlen_k >= 0)
        rows = row_scores(
            tensors, problem, part.b, head, i, used, part.seqlen_q, part.seqlen_k, part.begin, part.end
        )  # fmt: skip
        acc = gl.full([tile.BLOCK_M, problem.cache.BLOCK_DV], 0.0, gl.float32, ACC)
        row_max = gl.full([tile.BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        row_sum = gl.full([tile.BLOCK_M, tile.BLOCK_N], 0.0, gl.float32, SCORES)

        kv_tile = part.first_tile
        last_tile = kv_tile + part.count - 1
        s = warpgroup_mma_wait(0, deps=(start_scores(problem, tile, buffers, consumed, SCORES),))
        while kv_tile < last_tile:
            row_max, row_sum, alpha = weigh(problem, tile, buffers, part, rows, kv_tile, consumed, s, row_max, row_sum)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
            acc_token = start_values(problem, tile, buffers, acc, consumed)
            s_token = start_scores(problem, tile, buffers, consumed + 1, SCORES)
            acc = warpgroup_mma_wait(2, deps=(acc_token,))  # a product of scores is two
            mbarrier.arrive(buffers.free.index(consumed % STAGES))
            s = warpgroup_mma_wait(0, deps=(s_token,))
            consumed += 1
            kv_tile += 1
        row_max, row_sum, alpha = weigh(problem, tile, buffers, part, rows, kv_tile, consumed, s, row_max, row_sum)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
        acc = warpgroup_mma_wait(0, deps=(start_values(problem, tile, buffers, acc, consumed),))
        mbarrier.arrive(buffers.free.index(consumed % STAGES))
        consumed += 1

        state = SoftmaxState(
            acc,
            gl.convert_layout(row_max, gl.SliceLayout(1, ACC)),
            gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, ACC)),
        )
        store_part(tensors, problem, tile, part, state, ACC)
        share = behind(problem, share, part)


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
    """Start the product of the queries and the keys of the ``number``-th KV tile."""
    stage, phase = slot_of(number, STAGES)
    mbarrier.wait(buffers.ready.index(stage), phase)
    latents = buffers.latents.index(stage).reshape([tile.BLOCK_N, problem.cache.BLOCK_D]).permute((1, 0))
    tails = buffers.tails.index(stage).reshape([tile.BLOCK_N, problem.cache.BLOCK_TAIL]).permute((1, 0))
    s = gl.full([tile.BLOCK_M, tile.BLOCK_N], 0.0, gl.float32, SCORES)
    s = warpgroup_mma(buffers.q, latents, s, use_acc=False, is_async=True)
    return warpgroup_mma(buffers.q_tail, tails, s, is_async=True)


@gluon.jit
def start_values(problem, tile, buffers, acc, number):
    """Start to add the product of the weights and the values of the ``number``-th KV tile, which is there."""
    values = buffers.latents.index(number % STAGES).reshape([tile.BLOCK_N, problem.cache.BLOCK_DV])
    return warpgroup_mma(buffers.weights, values, acc, is_async=True)


@gluon.jit
def weigh(problem, tile, buffers, part, rows, kv_tile, number, s, row_max, row_sum):
    """The softmax of a KV tile, whose weights go to shared memory: (new maxima, sums, alpha)."""
    first_slot = kv_tile * tile.BLOCK_N
    slots = first_slot + gl.arange(0, tile.BLOCK_N, gl.SliceLayout(0, s.type.layout))
    scores = score_tile(problem, s, slots, rows, True)
    row_max, subtrahend, alpha = raise_max(row_max, gl.max(scores, 1), True)
    weights = gl.exp2(scores - subtrahend[:, None])
    row_sum = row_sum * alpha[:, None] + weights
    buffers.weights.store(weights.to(buffers.weights.dtype))
    if (first_slot < part.begin) | (first_slot + tile.BLOCK_N > part.end):
        clear_values(problem, tile, buffers.latents.index(number % STAGES), first_slot, part.begin, part.end)
    fence_async_shared()
    barrier()
    return row_max, row_sum, alpha


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
def store_part(tensors, problem, tile, part, state, ACC: gl.constexpr):
    """The output of a whole work tile, or a split."""
    GROUP: gl.constexpr = problem.queries.GROUP
    HEADS: gl.constexpr = problem.cache.HEADS * GROUP
    DV: gl.constexpr = problem.cache.BLOCK_DV
    first_row, owned_rows = load_rows(tensors, problem, part.b, True)
    row = gl.arange(0, tile.BLOCK_M, gl.SliceLayout(1, ACC))
    d = gl.arange(0, DV, gl.SliceLayout(0, ACC))
    i = row // GROUP
    owned = (i < owned_rows) & (row < tile.ROWS)
    if tile.SPLIT_KV:
        if part.count < part.work_end - part.work_begin:
            split = part.b * problem.cache.HEADS + part.kv_head + gl.program_id(0)
            maxima, sums = split_states(tensors, problem, tile)
            first = split.to(gl.int64) * tile.ROWS
            gl.store(tensors.partials + first * DV + ((row * DV)[:, None] + d[None, :]), state.acc, owned[:, None])
            gl.store(maxima + first + row, state.row_max, owned)
            gl.store(sums + first + row, state.row_sum, owned)
    if part.count == part.work_end - part.work_begin:
        head = part.kv_head * GROUP + row % GROUP
        values, lse = normalize(tensors, state, head, owned)
        out_row = (first_row + i).to(gl.int64)
        pointers = tensors.out + ((out_row * HEADS + head) * DV)[:, None] + d[None, :]
        gl.store(pointers, values.to(tensors.out.dtype.element_ty), owned[:, None])
        if tensors.lse is not None:
            gl.store(tensors.lse + lse_offsets(tensors, problem, part.b, out_row, i, head), lse, owned)


@gluon.jit
def decode_hopper(tensors: Tensors, problem: ProblemParams, tile: DecodeTile, tail_tiles, latent_tiles):
    """A CTA takes its share of the KV tiles, work tile by work tile."""
    DTYPE: gl.constexpr = tensors.q.dtype.element_ty
    M: gl.constexpr = tile.BLOCK_M
    N: gl.constexpr = tile.BLOCK_N
    D: gl.constexpr = problem.cache.BLOCK_D
    TAIL: gl.constexpr = problem.cache.BLOCK_TAIL
    if tile.PDL:
        gdc_launch_dependents()  # combine may be set up while this runs
    share = share_of_cta(tensors, problem, tile)
    q = gl.allocate_shared_memory(DTYPE, [M, D], gl.NVMMASharedLayout.get_default_for([M, D], DTYPE))
    q_tail = gl.allocate_shared_memory(DTYPE, [M, TAIL], gl.NVMMASharedLayout.get_default_for([M, TAIL], DTYPE))
    weights = gl.allocate_shared_memory(DTYPE, [M, N], gl.NVMMASharedLayout.get_default_for([M, N], DTYPE))
    latents = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, D], latent_tiles.layout)
    tails = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, TAIL], tail_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    buffers = Buffers(q, q_tail, weights, latents, tails, ready, free)
    gl.warp_specialize(
        [
            (consume, (tensors, problem, tile, buffers, share)),
            (produce, (tensors, problem, tile, buffers, latent_tiles, tail_tiles, share)),
        ],
        [1],  # warps of the producer
        [24],  # their registers; the consumer gets what is left
    )
