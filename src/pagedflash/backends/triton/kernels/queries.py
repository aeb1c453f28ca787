# ruff: noqa: SIM108 (an if on constants chooses code when the kernel is compiled)
"""Where the queries are, what each of them sees, and where its results go.

A program holds some rows; row ``r`` is query ``i[r]`` of one sequence for query head ``head[r]`` (or one head for all).
"""

import triton
import triton.language as tl

from .rotary import load_rotated

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_count(b, inside, cu_seqlens_q, seqused_q, dense_queries):
    """Queries of sequence ``b`` that are used."""
    if cu_seqlens_q is None:
        count = b * 0 + dense_queries
    elif seqused_q is not None:
        count = tl.load(seqused_q + b, inside, other=0)
    else:
        count = tl.load(cu_seqlens_q + b + 1, inside, other=0) - tl.load(cu_seqlens_q + b, inside, other=0)
    return count


@triton.jit
def query_rows(b, cu_seqlens_q, dense_queries):
    """First row of sequence ``b`` in the output, and how many rows are its own (used or not)."""
    if cu_seqlens_q is None:
        first = b * dense_queries
        count = dense_queries
    else:
        first = tl.load(cu_seqlens_q + b)
        count = tl.load(cu_seqlens_q + b + 1) - first
    return first, count


@triton.jit
def load_queries(
    q,
    b,
    first_row,
    i,
    head,
    used,
    seqused_k,
    cu_seqlens_q,
    rotary_cos,
    rotary_sin,
    rotary_rows,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POSITIONS_MATTER: tl.constexpr,
):
    """Query rows ``(rows, BLOCK_D)``, rotated if there are tables; zeros where not ``used``.

    Query ``i`` takes the angle of position ``seqused_k + i`` where positions matter (causal or windowed), else all take
    that of ``seqused_k``.
    """
    if cu_seqlens_q is None:
        start = q + b.to(tl.int64) * q_batch_stride
    else:
        start = q + first_row.to(tl.int64) * q_row_stride
    rows = start + (i.to(tl.int64) * q_row_stride + head * q_head_stride)
    position = i
    if ROTARY_DIM > 0:
        position = i * 0 + tl.load(seqused_k + b)
        if POSITIONS_MATTER:
            position = tl.minimum(position + i, rotary_rows - 1)
    return load_rotated(rows, used, position, rotary_cos, rotary_sin, D, BLOCK_D, ROTARY_DIM, INTERLEAVED)


@triton.jit
def visible_bounds(position, begin, end, used, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """First and last slot that each row sees; none (last = -1) for a row that is not used."""
    first = position * 0 + begin
    last = position * 0 + (end - 1)
    if HAS_LEFT:
        first = tl.maximum(first, position - window_left)
    if HAS_RIGHT:
        last = tl.minimum(last, position + window_right)
    return first, tl.where(used, last, -1)


@triton.jit
def load_slopes(alibi_slopes, b, head, used, HEADS: tl.constexpr, PER_SEQUENCE: tl.constexpr):
    """ALiBi slope of each row, in units of log2."""
    slope = used.to(tl.float32)
    if alibi_slopes is not None:
        row = 0
        if PER_SEQUENCE:
            row = b * HEADS
        slope = tl.load(alibi_slopes + row + head, used, other=0.0) * LOG2E
    return slope


@triton.jit
def store_result(
    out,
    lse,
    acc,
    row_max,
    row_sum,
    b,
    first_row,
    i,
    head,
    owned,
    sinks,
    cu_seqlens_q,
    total_rows,
    dense_queries,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Normalise the rows and store them, with their LSE: the sink's weight counted in, 0 and +inf if a row saw no key.

    ``row_max`` and the exponents behind ``row_sum`` are in units of log2.
    """
    seen = row_sum > 0
    if sinks is not None:
        sink = tl.load(sinks + head, owned, other=0.0) * LOG2E
        pivot = tl.maximum(row_max, sink)
        shrink = tl.exp2(row_max - pivot)
        acc = acc * shrink[:, None]
        row_sum = row_sum * shrink + tl.exp2(sink - pivot)
        row_max = pivot
    safe_sum = tl.where(seen, row_sum, 1.0)
    acc = tl.where(seen[:, None], acc / safe_sum[:, None], 0.0)
    log_sum = tl.where(seen, (row_max + tl.log2(safe_sum)) * LN2, float("inf"))

    row = (first_row + i).to(tl.int64)
    d = tl.arange(0, BLOCK_DV)
    pointers = out + ((row * HEADS + head) * DV)[:, None] + d[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), owned[:, None] & (d < DV)[None, :])
    if cu_seqlens_q is None:  # (B, Hq, Sq)
        place = (b.to(tl.int64) * HEADS + head) * dense_queries + i
    else:  # (Hq, total_q)
        place = head * total_rows.to(tl.int64) + row
    tl.store(lse + place, log_sum, owned)


@triton.jit
def clear_rows_behind(
    out,
    lse,
    cu_seqlens_q,
    batch,
    total_rows,
    first,
    step,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Rows of ragged queries behind the last sequence give 0 and +inf. Of them, every ``step``-th from ``first``."""
    d = tl.arange(0, BLOCK_DV)
    zeros = tl.zeros([BLOCK_DV], out.dtype.element_ty)
    behind = tl.load(cu_seqlens_q + batch).to(tl.int64)
    for row in range(behind + first, total_rows.to(tl.int64), step):
        for head in range(0, HEADS):
            tl.store(out + (row * HEADS + head) * DV + d, zeros, d < DV)
            tl.store(lse + head * total_rows.to(tl.int64) + row, float("inf"))
