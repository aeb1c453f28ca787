# ruff: noqa: SIM102 (an if on constants chooses code when the kernel is compiled)
"""How long each sequence is, and which of its keys any of its queries sees.

These functions take a sequence ``b``, one number or a vector of them alike; ``inside`` masks those past the batch. Nobody
has checked the lengths and offsets that a call gives: whatever they are, what comes out lies within what q and the cache
hold.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(tensors, problem, b, inside):
    """First row of sequence ``b`` in the output, and how many rows are its own (used or not)."""
    if tensors.cu_seqlens_q is None:
        first = b * problem.queries.max_seqlen_q
        count = b * 0 + problem.queries.max_seqlen_q
    else:
        first = clamp(tl.load(tensors.cu_seqlens_q + b, inside, other=0), 0, problem.queries.total_q)
        end = clamp(tl.load(tensors.cu_seqlens_q + b + 1, inside, other=0), first, problem.queries.total_q)
        count = end - first
    return first, count


@triton.jit
def load_seqlen_q(tensors, problem, b, inside):
    """Queries of sequence ``b`` that are used."""
    _, seqlen_q = load_rows(tensors, problem, b, inside)
    if tensors.cu_seqlens_q is not None:
        if tensors.seqused_q is not None:
            seqlen_q = clamp(tl.load(tensors.seqused_q + b, inside, other=0), 0, seqlen_q)
    return seqlen_q


@triton.jit
def load_seqlen_k(tensors, problem, b, inside):
    """Keys of sequence ``b``, the append included, never more than its cache can hold. -1 = skip the sequence."""
    capacity = problem.cache.capacity - load_first_key(tensors, problem, b, inside)
    if tensors.seqused_k is not None:
        cached = load_cached(tensors, problem, b, inside)
        seqlen_k = tl.where(cached < 0, -1, tl.minimum(cached + load_seqlen_new(tensors, problem, b, inside), capacity))
    elif tensors.cu_seqlens_k is not None:
        start = tl.load(tensors.cu_seqlens_k + b, inside, other=0)
        seqlen_k = clamp(tl.load(tensors.cu_seqlens_k + b + 1, inside, other=0) - start, -1, capacity)
    else:
        seqlen_k = capacity
    return seqlen_k


@triton.jit
def load_cached(tensors, problem, b, inside):
    """``seqused_k``: keys of sequence ``b`` before the append, less than 0 = skip it. Adding to them never overflows."""
    return tl.minimum(tl.load(tensors.seqused_k + b, inside, other=-1), problem.cache.capacity)


@triton.jit
def load_seqlen_new(tensors, problem, b, inside):
    """New tokens of sequence ``b``."""
    if tensors.cu_seqlens_new is None:
        seqlen_new = b * 0 + problem.append.seqlen_new
    else:
        first = clamp(tl.load(tensors.cu_seqlens_new + b, inside, other=0), 0, problem.append.seqlen_new)
        end = clamp(tl.load(tensors.cu_seqlens_new + b + 1, inside, other=0), first, problem.append.seqlen_new)
        seqlen_new = end - first
    return seqlen_new


@triton.jit
def load_first_key(tensors, problem, b, inside):
    """Where the keys of sequence ``b`` begin among packed ones, else 0."""
    first = b * 0
    if tensors.block_table is None:
        if tensors.cu_seqlens_k is not None:
            first = clamp(tl.load(tensors.cu_seqlens_k + b, inside, other=0), 0, problem.cache.capacity)
    return first


@triton.jit
def load_leftpad(tensors, b, inside):
    """First slot of sequence ``b`` that holds a key."""
    if tensors.cache_leftpad is not None:
        leftpad = tl.maximum(tl.load(tensors.cache_leftpad + b, inside, other=0), 0)
    else:
        leftpad = b * 0
    return leftpad


@triton.jit
def kv_range(problem, leftpad, seqlen_q, seqlen_k):
    """Slots ``[begin, end)`` that at least one query of a sequence sees.

    The last query sits at ``seqlen_k - 1`` and so sees the last key, whatever the right window is.
    """
    end = tl.where(seqlen_q > 0, tl.maximum(seqlen_k, 0), 0)
    begin = leftpad
    if problem.score.window_left is not None:
        begin = tl.maximum(begin, seqlen_k - seqlen_q - problem.score.window_left)
    return tl.minimum(begin, end), end


@triton.jit
def clamp(number, least, most):
    """``number`` from ``least`` to ``most``, of integers."""
    return tl.minimum(tl.maximum(number, least), most)
