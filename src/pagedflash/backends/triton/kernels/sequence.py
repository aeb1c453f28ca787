# ruff: noqa: SIM108 (an if on constants chooses code when the kernel is compiled)
"""How long each sequence is, and which of its keys any of its queries sees.

These functions take a sequence ``b``, one number or a vector of them alike; ``inside`` masks those past the batch.
"""

import triton
import triton.language as tl


@triton.jit
def load_seqlen_q(tensors, problem, b, inside):
    """Queries of sequence ``b`` that are used."""
    if tensors.cu_seqlens_q is None:
        seqlen_q = b * 0 + problem.queries.max_seqlen_q
    elif tensors.seqused_q is not None:
        seqlen_q = tl.load(tensors.seqused_q + b, inside, other=0)
    else:
        start = tl.load(tensors.cu_seqlens_q + b, inside, other=0)
        seqlen_q = tl.load(tensors.cu_seqlens_q + b + 1, inside, other=0) - start
    return seqlen_q


@triton.jit
def load_seqlen_k(tensors, problem, b, inside):
    """Keys of sequence ``b``, the append included, never more than its cache can hold. -1 = skip the sequence."""
    if tensors.seqused_k is not None:
        cached = tl.load(tensors.seqused_k + b, inside, other=-1)
        seqlen_k = tl.where(cached < 0, -1, tl.minimum(cached + problem.append.seqlen_new, problem.cache.capacity))
    elif tensors.cu_seqlens_k is not None:
        start = tl.load(tensors.cu_seqlens_k + b, inside, other=0)
        seqlen_k = tl.load(tensors.cu_seqlens_k + b + 1, inside, other=0) - start
    else:
        seqlen_k = b * 0 + problem.cache.capacity
    return seqlen_k


@triton.jit
def load_leftpad(tensors, b, inside):
    """First slot of sequence ``b`` that holds a key."""
    if tensors.cache_leftpad is not None:
        leftpad = tl.load(tensors.cache_leftpad + b, inside, other=0)
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
