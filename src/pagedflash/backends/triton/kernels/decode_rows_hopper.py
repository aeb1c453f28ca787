# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
r"""``decode`` of many rows on Hopper, in Gluon: several tokens a sequence, as when drafts are verified.

Work is split over CTAs as in ``decode`` (:mod:`.schedule`). There is one CTA an SM, with one warp group or two, of 64 rows
each, and keys and values come through rings as in ``prefill_hopper``::

                       K ring                V ring
    producer      ──►  [tile][tile] ...      [tile][tile] ...      1 warp, TMA: all that shared memory holds is under way
                          │                     │
    consumer 0    rows 0 to 63:   S = Q.K^T, softmax, O += P.V      4 warps
    consumer 1    rows 64 to 127: the same, of the same tiles       4 warps; not there where there are no such rows

A consumer starts the product of the next keys before that of the values it has weights for, and does the softmax of the one
while the tensor cores are busy with the other. It takes less time than the loading of a tile: what counts is that the
producer never waits, neither for a softmax nor for the next work tile. Splits are reduced as in ``decode``, but by warp
groups: of those that have a split of the same 64 rows, the last one does it.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from .combine import is_last, reduce_few, store_split
from .gluon_names import barrier
from .output import store_output
from .params import DecodeTile, ProblemParams, Tensors
from .prefill_hopper import (
    ROWS,
    Work,
    acc_layout,
    as_operand,
    clear_rows_behind,
    load_kv,
    load_pages,
    load_q,
    parts_at,
    row_of,
    scaled,
    slot_of,
    start_scores,
    start_values,
    unmasked_tiles,
    wait_for_q,
)
from .schedule import behind, cta_of, part_of, share_of
from .score import is_visible, row_scores, score_tile
from .sequence import load_rows
from .softmax import SoftmaxState, raise_max


class Buffers(NamedTuple):
    """Shared memory and barriers, as those of ``prefill_hopper``."""

    q: Any  # one part (CONSUMERS, 64, BLOCK_D): each consumer's own rows
    k: Any  # one part (STAGES, 1, 1, BLOCK_N, BLOCK_D)
    v: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any


@gluon.jit
def produce(tensors, problem, tile, buffers, k_tiles, v_tiles, share):
    """Loads the KV tiles of this CTA. The pages of a tile are looked up one tile ahead."""
    loaded = 0
    cleared = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share)
        row, offset = row_of(tensors, problem, part.b)
        kv_tile = part.first_tile
        pages = load_pages(tensors, problem, tile, part, kv_tile * tile.BLOCK_N, row, part.begin, part.end)
        while kv_tile < part.first_tile + part.count:
            next_slot = (kv_tile + 1) * tile.BLOCK_N
            next_pages = load_pages(tensors, problem, tile, part, next_slot, row, part.begin, part.end)
            cleared = load_kv(
                problem, tile, part, k_tiles, v_tiles, buffers, kv_tile, pages, offset, part.begin, part.end, loaded, cleared
            )  # fmt: skip
            pages = next_pages
            loaded += 1
            kv_tile += 1
        share = behind(problem, share, part)


@gluon.jit
def consume(tensors, problem, tile, buffers, share, WHICH: gl.constexpr):
    """64 rows of each work tile of this CTA."""
    GROUP: gl.constexpr = problem.queries.GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile.BLOCK_N, 16])
    ACC: gl.constexpr = acc_layout(problem.cache.BLOCK_DV)
    if tensors.cu_seqlens_q is not None:
        if WHICH == 0:
            clear_rows_behind(tensors, problem, gl.program_id(0), gl.num_programs(0))
    q_rows = parts_at(buffers.q, WHICH)
    consumed = 0
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share)
        first_row, owned_rows = load_rows(tensors, problem, part.b, True)
        work = Work(part.b, part.kv_head, first_row, 0, part.seqlen_q, owned_rows, part.seqlen_k)
        barrier()  # all warps have their products of the queries before
        load_q(tensors, problem, tile, work, q_rows, WHICH)
        row = WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        i = row // GROUP
        head = part.kv_head * GROUP + row % GROUP
        used = (i < part.seqlen_q) & (part.seqlen_k >= 0)
        rows = row_scores(
            tensors, problem, part.b, head, i, used, part.seqlen_q, part.seqlen_k, part.begin, part.end
        )  # fmt: skip
        all_first, all_end = unmasked_tiles(problem, tile, work, part.begin, part.end)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        row_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = (gl.full([ROWS, problem.cache.BLOCK_DV], 0.0, gl.float32, ACC),)
        wait_for_q()

        kv_tile = part.first_tile
        last_tile = kv_tile + part.count - 1
        stage, _ = slot_of(consumed, tile.STAGES)
        s = warpgroup_mma_wait(0, deps=(start_scores(problem, tile, buffers, q_rows, consumed, SCORES),))
        mbarrier.arrive(buffers.k_free.index(stage))
        is_edge = (kv_tile >= all_end) | (kv_tile < all_first)
        weights, row_max, row_sum, alpha = weigh(problem, tile, s, kv_tile, rows, is_edge, row_max, row_sum)
        while kv_tile < last_tile:
            # ---- The products of the keys of the next tile, then of the weights and values of this one ----
            kv_tile += 1
            k_stage, _ = slot_of(consumed + 1, tile.STAGES)
            v_stage, v_phase = slot_of(consumed, tile.STAGES)
            p = as_operand(weights, tensors.q.dtype.element_ty, ACC)
            s_token = start_scores(problem, tile, buffers, q_rows, consumed + 1, SCORES)
            acc_tokens = start_values(problem, tile, buffers, p, acc, consumed)

            # ---- The softmax of the next tile while the second product is under way ----
            s = warpgroup_mma_wait(1, deps=(s_token,))
            mbarrier.arrive(buffers.k_free.index(k_stage))
            is_edge = (kv_tile >= all_end) | (kv_tile < all_first)
            weights, row_max, row_sum, alpha = weigh(problem, tile, s, kv_tile, rows, is_edge, row_max, row_sum)
            mbarrier.wait(buffers.v_ready.index(v_stage), v_phase)  # long ready: ptxas moves no softmax behind a branch
            acc = warpgroup_mma_wait(0, deps=acc_tokens + (p,))[:1]  # noqa: RUF005
            mbarrier.arrive(buffers.v_free.index(v_stage))
            acc = scaled(acc, alpha)
            consumed += 1
        p = as_operand(weights, tensors.q.dtype.element_ty, ACC)
        acc_tokens = start_values(problem, tile, buffers, p, acc, consumed)
        acc = warpgroup_mma_wait(0, deps=acc_tokens + (p,))[:1]  # noqa: RUF005
        v_stage, _ = slot_of(consumed, tile.STAGES)
        mbarrier.arrive(buffers.v_free.index(v_stage))
        consumed += 1

        row_sum = gl.where(used, row_sum, 0.0)  # rows that are not used saw unmasked tiles as if they were
        state = SoftmaxState(
            acc[0],
            gl.convert_layout(row_max, gl.SliceLayout(1, ACC)),
            gl.convert_layout(row_sum, gl.SliceLayout(1, ACC)),
        )
        store(tensors, problem, tile, part, share.shares, work, state, WHICH, ACC)
        share = behind(problem, share, part)


@gluon.jit
def weigh(problem, tile, s, kv_tile, rows, is_edge, row_max, row_sum):
    """The softmax of a KV tile: (weights, new maxima, sums, alpha)."""
    slots = kv_tile * tile.BLOCK_N + gl.arange(0, tile.BLOCK_N, gl.SliceLayout(0, s.type.layout))
    scores = score_tile(problem, s, slots, rows, False)
    if is_edge:
        visible = is_visible(slots[None, :], rows.first[:, None], rows.last[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    row_max, subtrahend, alpha = raise_max(row_max, gl.max(scores, 1), True)
    weights = gl.exp2(scores - subtrahend[:, None])
    return weights, row_max, row_sum * alpha + gl.sum(weights, 1), alpha


@gluon.jit
def store(tensors, problem, tile, part, shares, work, state, WHICH: gl.constexpr, ACC: gl.constexpr):
    """The output of a whole work tile, or a split: this consumer's rows of it."""
    GROUP: gl.constexpr = problem.queries.GROUP
    CONSUMERS: gl.constexpr = tile.BLOCK_M // ROWS
    row = WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    columns = gl.arange(0, problem.cache.BLOCK_DV, gl.SliceLayout(0, ACC))
    i = row // GROUP
    head = part.kv_head * GROUP + row % GROUP
    owned = (i < work.owned_rows) & (row < tile.ROWS)
    is_done = part.count == part.work_end - part.work_begin
    if tile.SPLIT_KV:
        if not is_done:
            work_tile = part.b * problem.cache.HEADS + part.kv_head
            store_split(tensors, problem, tile, work_tile + gl.program_id(0), state, row, columns, owned)
            if tensors.semaphores is not None:
                first_cta = cta_of(part.work_begin, shares)
                last_cta = cta_of(part.work_end - 1, shares)
                is_done = is_last(tensors.semaphores + work_tile * CONSUMERS + WHICH, last_cta - first_cta)
                if is_done:
                    first, last = work_tile + first_cta, work_tile + last_cta
                    state = reduce_few(tensors, problem, tile, first, last, row, columns, owned)
    if is_done:
        store_output(tensors, problem, state, part.b, work.first_row, i, part.kv_head, head, owned, columns)


@gluon.jit
def decode_rows_hopper(tensors: Tensors, problem: ProblemParams, tile: DecodeTile, k_tiles, v_tiles):
    """A CTA takes its share of the KV tiles, work tile by work tile."""
    DTYPE: gl.constexpr = tensors.q.dtype.element_ty
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, problem.cache.BLOCK_D], DTYPE)
    CONSUMERS: gl.constexpr = tile.BLOCK_M // ROWS
    STAGES: gl.constexpr = tile.STAGES
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if tile.PDL:
        gdc_launch_dependents()  # combine may be set up while this runs
    share = share_of(tensors, problem, tile, gl.program_id(0), gl.arange(0, tile.BLOCK_B, LANES))
    q = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, problem.cache.BLOCK_D], Q_LAYOUT)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, tile.BLOCK_N, problem.cache.BLOCK_D], k_tiles.layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, tile.BLOCK_N, problem.cache.BLOCK_DV], v_tiles.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=CONSUMERS)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=CONSUMERS)
    mbarrier.init(v_ready.index(STAGES), count=1)
    fence_async_shared()
    buffers = Buffers((q,), (k,), (v,), k_ready, k_free, v_ready, v_free)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (tensors, problem, tile, buffers, share, 0)),
                (produce, (tensors, problem, tile, buffers, (k_tiles,), (v_tiles,), share)),
            ],
            [1],  # warps of the producer
            [24],  # their registers; the consumer gets what is left
        )
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, problem, tile, buffers, share, 0)),
                (consume, (tensors, problem, tile, buffers, share, 1)),
                (produce, (tensors, problem, tile, buffers, (k_tiles,), (v_tiles,), share)),
            ],
            [4, 1],
            [240, 24],
        )
