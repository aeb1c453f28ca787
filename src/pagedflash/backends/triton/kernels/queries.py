"""Where the queries lie and how their rows are loaded. A row is one query of one query head."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .params import in_elements
from .rotary import load_rotated_parts
from .sequence import load_cached
from .words import split_columns


class QueryTile(NamedTuple):
    q: Any  # (rows, BLOCK_D)
    tail: Any  # (rows, BLOCK_TAIL); anything where there is none
    q_odd: Any  # the odd columns, where keys are read in words: the two above have the even ones then. Else anything
    tail_odd: Any


@triton.jit
def load_queries(tensors, problem, b, first_row, i, head, used, lead):
    """Query ``i`` of the sequence for query head ``head`` (each a vector, or one for all rows), behind ``lead`` zeros.

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
        position = i * 0 + load_cached(tensors, problem, b, True)
        if problem.append.QUERIES_BY_POSITION:
            position += i
        position = tl.minimum(position, problem.append.rotary_len - 1)
    q, tail = load_rotated_parts(tensors, problem, rows, used, position, lead)
    q_odd = q
    tail_odd = tail
    if problem.cache.K_WORDS is not None:
        q, q_odd = split_columns(q)
        tail, tail_odd = split_columns(tail)
    return QueryTile(q, tail, q_odd, tail_odd)
