"""Rotary embedding of rows as they are loaded."""

import triton
import triton.language as tl


@triton.jit
def load_rotated(tensors, problem, rows, used, position, d, END: tl.constexpr):
    """Load the elements ``d`` (a vector), as far as they lie in ``[0, END)``, of the rows at the pointers ``rows``, rotated
    to ``position`` if there are tables.

    Each element is loaded with its partner of the pair: ``(2i, 2i + 1)`` if INTERLEAVED, else ``(i, i + ROTARY_DIM / 2)``.
    Elements from ROTARY_DIM on are left as they are. Rounded to the type they come in. Zeros where not ``used``.
    """
    loaded = used[:, None] & ((d >= 0) & (d < END))[None, :]
    x = tl.load(rows[:, None] + d[None, :], loaded, other=0.0)
    if tensors.rotary_cos is not None:
        HALF: tl.constexpr = problem.append.ROTARY_DIM // 2
        if problem.append.INTERLEAVED:
            is_first = d % 2 == 0
            pair = d // 2
            partner = d ^ 1
        else:
            is_first = d < HALF
            pair = tl.where(is_first, d, d - HALF)
            partner = tl.where(is_first, d + HALF, d - HALF)
        rotated = loaded & (d < problem.append.ROTARY_DIM)[None, :]
        y = tl.load(rows[:, None] + partner[None, :], rotated, other=0.0).to(tl.float32)
        angle = position.to(tl.int64)[:, None] * HALF + pair[None, :]
        cos = tl.load(tensors.rotary_cos + angle, rotated, other=1.0).to(tl.float32)
        sin = tl.load(tensors.rotary_sin + angle, rotated, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + tl.where(is_first[None, :], -y, y) * sin).to(x.dtype)
    return x


@triton.jit
def load_rotated_parts(tensors, problem, rows, used, position, lead):
    """:func:`load_rotated` of whole rows as (what tiles hold of D, their TAIL), behind ``lead`` columns of zeros.

    Without a TAIL the two are the same.
    """
    WIDTH: tl.constexpr = problem.cache.D - problem.cache.TAIL
    d = tl.arange(0, problem.cache.BLOCK_D) - lead
    x = load_rotated(tensors, problem, rows, used, position, d, WIDTH)
    tail = x
    if problem.cache.TAIL > 0:
        d_tail = WIDTH + tl.arange(0, problem.cache.BLOCK_TAIL)
        tail = load_rotated(tensors, problem, rows, used, position, d_tail, problem.cache.D)
    return x, tail
