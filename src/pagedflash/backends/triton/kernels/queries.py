"""Where the queries lie and how their rows are loaded. A row is one query of one query head."""

import triton
import triton.language as tl

from .params import in_elements
from .rotary import load_rotated


@triton.jit
def output_rows(tensors, problem, b):
    """First row of sequence ``b`` in the output, and how many rows are its own (used or not)."""
    if tensors.cu_seqlens_q is None:
        first = b * problem.queries.max_seqlen_q
        count = problem.queries.max_seqlen_q
    else:
        first = tl.load(tensors.cu_seqlens_q + b)
        count = tl.load(tensors.cu_seqlens_q + b + 1) - first
    return first, count


@triton.jit
def load_queries(tensors, problem, b, first_row, i, head, used):
    """``(rows, BLOCK_D)``: query ``i`` of the sequence for query head ``head`` (each a vector, or one for all rows).

    Rotated if there are tables; zeros where not ``used``.
    """
    strides = in_elements(problem.queries.strides)
    if tensors.cu_seqlens_q is None:
        start = tensors.q + b.to(tl.int64) * strides.batch
    else:
        start = tensors.q + first_row.to(tl.int64) * strides.token
    rows = start + (i.to(tl.int64) * strides.token + head * strides.head)
    position = i
    if tensors.rotary_cos is not None:
        position = i * 0 + tl.load(tensors.seqused_k + b)
        if problem.append.QUERIES_BY_POSITION:
            position = tl.minimum(position + i, problem.append.rotary_len - 1)
    return load_rotated(tensors, problem, rows, used, position)
