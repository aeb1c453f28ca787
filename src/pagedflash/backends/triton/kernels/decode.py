# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
"""``decode``: few queries a sequence, many keys. Bound by how fast the keys and values can be read.

The query rows that share a KV head (its group of query heads, times the queries: packed GQA) are the rows of one tile, so
that each key is read once. :mod:`.schedule` splits the work over CTAs on the device: nothing is read on the host, a captured
graph follows when lengths change, and one long sequence among short ones occupies all SMs. Splits are reduced by
:mod:`.combine`: by a stage of this kernel if there are semaphores, else by a kernel behind it. Where the host says that
there are none (not SPLIT_KV), each CTA has one work tile.

New tokens are appended here too: the CTA that has a work tile's last KV tile rotates and writes them, and attends to them
from registers. Nobody reads a slot of the cache that is written in the same launch.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .combine import is_last, reduce_few, store_split
from .kv_format import join_acc, load_kv, zero_acc
from .kv_write import append_tokens
from .output import clear_rows_behind, store_output
from .paging import load_pages, view_kv
from .params import DecodeTile, ProblemParams, Tensors
from .queries import load_queries
from .schedule import behind, cta_of, part_of, share_of
from .score import RowScores, row_scores
from .sequence import load_rows
from .softmax import SoftmaxState, attend_tile


@triton.jit
def decode(tensors: Tensors, problem: ProblemParams, tile: DecodeTile):
    """A CTA takes its share of the KV tiles, work tile by work tile."""
    GROUP: tl.constexpr = problem.queries.GROUP
    cta = tl.program_id(0)

    if tile.PDL:
        gdc_launch_dependents()  # combine may be set up while this runs

    if tensors.cu_seqlens_q is not None:
        clear_rows_behind(tensors, problem, cta, tl.num_programs(0))

    row = tl.arange(0, tile.BLOCK_M)
    columns = tl.arange(0, problem.cache.BLOCK_DV)
    i = row // GROUP
    share = share_of(tensors, problem, tile, cta, tl.arange(0, tile.BLOCK_B))
    while share.tile_index < share.tile_end:
        part = part_of(tensors, problem, tile, share)
        b, kv_head, count = part.b, part.kv_head, part.count
        tiles = part.work_end - part.work_begin

        # The pages of a tile are looked up one tile ahead; those of the first one while the queries are on their way.
        kv = view_kv(tensors, problem, b, kv_head, part.begin, part.end)
        pages = load_pages(problem, kv, part.first_tile, tile.BLOCK_N)

        # The rows: query i of the sequence for query head `head`.
        head = kv_head * GROUP + row % GROUP
        first_row, owned_rows = load_rows(tensors, problem, b, True)
        used = (i < part.seqlen_q) & (part.seqlen_k >= 0)
        rows = row_scores(
            tensors, problem, b, head, i, used, part.seqlen_q, part.seqlen_k, part.begin, tl.maximum(part.seqlen_k, 0)
        )  # fmt: skip
        cached_rows = RowScores(
            rows.position, rows.first, tl.minimum(rows.last, part.end - 1), rows.slope, rows.dropout
        )  # fmt: skip
        q_tile = load_queries(tensors, problem, b, first_row, i, head, used, kv.k_lead)

        # The keys.
        state = SoftmaxState(
            zero_acc(problem, tile.BLOCK_M),
            tl.full([tile.BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32),
        )
        for kv_tile in range(part.first_tile, part.first_tile + count):
            loaded = load_kv(problem, kv, pages, kv_tile, tile.BLOCK_N, True)
            pages = load_pages(problem, kv, kv_tile + 1, tile.BLOCK_N)
            state = attend_tile(problem, state, q_tile, loaded, cached_rows, True, True)
        total = SoftmaxState(state.acc, state.row_max, tl.sum(state.row_sum, 1))

        # The new tokens, with the last tile.
        if tile.BLOCK_NEW > 0:
            if share.tile_index + count == part.work_end:
                seqlen_cached = part.seqlen_k - problem.append.seqlen_new
                token = tl.arange(0, tile.BLOCK_NEW)
                seqlen_cached = tl.where(part.seqlen_k < 0, -1, seqlen_cached)
                is_new = token < problem.append.seqlen_new
                new = append_tokens(tensors, problem, b, kv_head, token, token, seqlen_cached, is_new)
                total = attend_tile(problem, total, q_tile, new, rows, True, False)

        # The output, or a split.
        total = SoftmaxState(join_acc(problem, total.acc), total.row_max, total.row_sum)
        owned = i < owned_rows
        if tile.SPLIT_KV:
            if count < tiles:
                work_tile = b * problem.cache.HEADS + kv_head
                store_split(tensors, problem, tile, work_tile + cta, total, row, columns, owned & (row < tile.ROWS))
                if tensors.semaphores is not None:
                    first_cta = cta_of(part.work_begin, share.shares)
                    last_cta = cta_of(part.work_end - 1, share.shares)
                    if is_last(tensors.semaphores + work_tile, last_cta - first_cta):
                        few_row = tl.arange(0, tile.ROWS)
                        few_i = few_row // GROUP
                        few_head = kv_head * GROUP + few_row % GROUP
                        few_owned = few_i < owned_rows
                        first, last = work_tile + first_cta, work_tile + last_cta
                        reduced = reduce_few(tensors, problem, tile, first, last, few_row, columns, few_owned)
                        store_output(tensors, problem, reduced, b, first_row, few_i, kv_head, few_head, few_owned, columns)
        if count == tiles:
            store_output(tensors, problem, total, b, first_row, i, kv_head, head, owned, columns)

        share = behind(problem, share, part)
