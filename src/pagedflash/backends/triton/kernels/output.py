"""Where results go."""

import triton
import triton.language as tl

from .paging import leads_of
from .softmax import normalize


@triton.jit
def store_output(tensors, problem, state, b, first_row, i, kv_head, head, owned, columns):
    """Normalise rows of query ``i`` for query head ``head`` of ``kv_head``; store those ``owned``, and any wanted LSE.

    ``columns``: those of ``state.acc``, from 0.
    """
    HEADS: tl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    values, lse = normalize(tensors, state, head, owned)
    row = (first_row + i).to(tl.int64)
    _, lead = leads_of(problem, kv_head // problem.cache.SHARE)
    d = columns - lead
    pointers = tensors.out + ((row * HEADS + head) * problem.cache.DV)[:, None] + d[None, :]
    is_value = (d >= 0) & (d < problem.cache.DV)
    tl.store(pointers, values.to(tensors.out.dtype.element_ty), owned[:, None] & is_value[None, :])
    if tensors.lse is not None:
        tl.store(tensors.lse + lse_offsets(tensors, problem, b, row, i, head), lse, owned)


@triton.jit
def lse_offsets(tensors, problem, b, row, i, head):
    """Where the LSE of query ``i`` of sequence ``b``, which is row ``row`` of the output, lies for query head ``head``."""
    HEADS: tl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    if tensors.cu_seqlens_q is None:  # (B, Hq, Sq)
        offsets = (b.to(tl.int64) * HEADS + head) * problem.queries.max_seqlen_q + i
    else:  # (Hq, total_q)
        offsets = head * tl.cast(problem.queries.total_q, tl.int64) + row
    return offsets


@triton.jit
def clear_rows_behind(tensors, problem, first, step):
    """Packed rows behind the last sequence give 0 and +inf. Of them, every ``step``-th from ``first``."""
    HEADS: tl.constexpr = problem.cache.HEADS * problem.queries.GROUP
    d = tl.arange(0, problem.cache.BLOCK_DV)
    zeros = tl.zeros([problem.cache.BLOCK_DV], tensors.out.dtype.element_ty)
    behind = tl.maximum(tl.load(tensors.cu_seqlens_q + problem.queries.batch_size), 0).to(tl.int64)
    total_q = tl.cast(problem.queries.total_q, tl.int64)
    for row in range(behind + first, total_q, step):
        for head in range(0, HEADS):
            tl.store(tensors.out + (row * HEADS + head) * problem.cache.DV + d, zeros, d < problem.cache.DV)
            if tensors.lse is not None:
                tl.store(tensors.lse + head * total_q + row, float("inf"))
