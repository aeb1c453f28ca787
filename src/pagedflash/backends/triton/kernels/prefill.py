# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
r"""``prefill``: many queries a sequence. Bound by the matrix units.

A CTA takes BLOCK_M queries of one head and walks the KV tiles that any of them sees. Only the tiles at the edges of what
they see are masked::

    keys        ->
    queries  |  . . / # # # # \ . .        .  no query of the block sees it: not visited
             |  . . . / # # # # \ .        /  left edge of a window, or left padding: masked
             v                             #  seen by every query: no mask
                                           \  the diagonal, or the end of the keys: masked

Blocks with the most keys (the last ones, under a causal mask) start first. Query heads of one KV head run side by side,
so that they find its keys in the L2 cache. Pages are read where they lie.

In a mixed batch most sequences are ``decode``'s. There the blocks of the others are numbered, sequence by sequence, and each
CTA takes one, or some if there are more than CTAs: it finds out from the lengths on the device.
Source: Dao, "FlashAttention-2" (2023).
"""

import triton
import triton.language as tl

from .kv_format import load_kv
from .output import clear_rows_behind, store_output
from .paging import load_pages, view_kv
from .params import PrefillTile, ProblemParams, Tensors
from .queries import load_queries
from .schedule import sequence_of
from .score import row_scores
from .sequence import load_leftpad, load_rows, load_seqlen_k, load_seqlen_q
from .softmax import SoftmaxState, attend_tile


@triton.jit
def attend_tiles(problem, tile, state, q_tile, kv, rows, first_tile, end_tile, MASKED: tl.constexpr):
    """KV tiles ``first_tile`` to ``end_tile`` into the state. Pages are looked up one tile ahead."""
    pages = load_pages(problem, kv, first_tile, tile.BLOCK_N)
    for kv_tile in range(first_tile, end_tile):
        loaded = load_kv(problem, kv, pages, kv_tile, tile.BLOCK_N, MASKED)
        pages = load_pages(problem, kv, kv_tile + 1, tile.BLOCK_N)
        state = attend_tile(problem, state, q_tile, loaded, rows, MASKED, False)
    return state


@triton.jit
def blocks_of(tensors, problem, tile, b, inside):
    """Blocks of sequence ``b``, 0 if it is ``decode``'s."""
    _, rows = load_rows(tensors, problem, b, inside)
    return tl.where(rows > problem.queries.DECODE_LIMIT, tl.cdiv(rows, tile.BLOCK_M), 0)


@triton.jit
def attend_block(tensors, problem, tile, head, b, block, first_row, owned_rows):
    """BLOCK_M queries of one head of sequence ``b``, the ``block``-th of its own."""
    # ---- The rows ----
    seqlen_k = load_seqlen_k(tensors, problem, b, True)
    seqlen_q = load_seqlen_q(tensors, problem, b, True)
    i = block * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    used = (i < seqlen_q) & (seqlen_k >= 0)

    # ---- The slots that any of them sees, [begin, end), and those that all of them see, [all_begin, all_end) ----
    shift = seqlen_k - seqlen_q  # query i sits at key position i + shift
    first_position = block * tile.BLOCK_M + shift
    last_position = tl.minimum(block * tile.BLOCK_M + tile.BLOCK_M, seqlen_q) - 1 + shift
    begin = load_leftpad(tensors, b, True)
    end = tl.maximum(seqlen_k, 0)
    all_begin = begin
    all_end = end
    if problem.score.window_left is not None:
        all_begin = tl.maximum(begin, last_position - problem.score.window_left)
        begin = tl.maximum(begin, first_position - problem.score.window_left)
    if problem.score.window_right is not None:
        all_end = tl.minimum(end, first_position + problem.score.window_right + 1)
        end = tl.minimum(end, last_position + problem.score.window_right + 1)
    end = tl.where(block * tile.BLOCK_M < seqlen_q, tl.maximum(end, 0), 0)
    begin = tl.minimum(begin, end)
    rows = row_scores(tensors, problem, b, head + i * 0, i, used, seqlen_q, seqlen_k, begin, end)

    # ---- The keys: left edge, the middle that needs no mask, right edge ----
    kv_head = head // problem.queries.GROUP
    kv = view_kv(tensors, problem, b, kv_head, begin, end)
    q_tile = load_queries(tensors, problem, b, first_row, i, head, used, kv.k_lead)
    first_tile = begin // tile.BLOCK_N
    end_tile = tl.cdiv(end, tile.BLOCK_N)
    left_end = first_tile
    if problem.score.window_left is not None or tensors.cache_leftpad is not None:
        left_end = tl.minimum(tl.maximum(tl.cdiv(all_begin, tile.BLOCK_N), first_tile), end_tile)
    middle_end = tl.minimum(tl.maximum(all_end // tile.BLOCK_N, left_end), end_tile)
    state = SoftmaxState(
        tl.zeros([tile.BLOCK_M, problem.cache.BLOCK_DV], tl.float32),
        tl.full([tile.BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([tile.BLOCK_M], tl.float32),
    )
    if problem.score.window_left is not None or tensors.cache_leftpad is not None:
        state = attend_tiles(problem, tile, state, q_tile, kv, rows, first_tile, left_end, True)
    state = attend_tiles(problem, tile, state, q_tile, kv, rows, left_end, middle_end, False)
    state = attend_tiles(problem, tile, state, q_tile, kv, rows, middle_end, end_tile, True)

    # Rows past the used ones saw the middle as if they were there.
    state = SoftmaxState(state.acc, state.row_max, tl.where(used, state.row_sum, 0.0))
    columns = tl.arange(0, problem.cache.BLOCK_DV)
    store_output(tensors, problem, state, b, first_row, i, kv_head, head + i * 0, i < owned_rows, columns)


@triton.jit
def prefill(tensors: Tensors, problem: ProblemParams, tile: PrefillTile):
    head = tl.program_id(0)
    if problem.queries.DECODE_LIMIT is None:
        b = tl.program_id(1)
        block = tl.num_programs(2) - 1 - tl.program_id(2)
        if tensors.cu_seqlens_q is not None:
            if (head == 0) & (b == 0):
                clear_rows_behind(tensors, problem, block, tl.num_programs(2))
        first_row, owned_rows = load_rows(tensors, problem, b, True)
        if block * tile.BLOCK_M >= owned_rows:
            return
        attend_block(tensors, problem, tile, head, b, block, first_row, owned_rows)
    else:  # decode clears the rows behind
        index = tl.program_id(1)
        b, first_block = sequence_of(tensors, problem, tile, index, tl.arange(0, tile.BLOCK_B), blocks_of)
        while b < problem.queries.batch_size:
            first_row, owned_rows = load_rows(tensors, problem, b, True)
            block = tl.cdiv(owned_rows, tile.BLOCK_M) - 1 - (index - first_block)
            attend_block(tensors, problem, tile, head, b, block, first_row, owned_rows)
            index += tl.num_programs(1)
            b, first_block = sequence_of(tensors, problem, tile, index, tl.arange(0, tile.BLOCK_B), blocks_of)
