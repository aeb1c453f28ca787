"""The backward pass: from a problem and its results to launches of the kernels in :mod:`.kernels.backward`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import AttentionProblem
from ...signature import addresses_of
from .. import backward as common
from ..backward import Gradients
from .compiled import CompiledLaunch, are_aligned, num_sms
from .kernels.backward import keys_backward, queries_backward, row_gradients
from .kernels.params import BackwardTile
from .launch import is_elsewhere, lengths_together, precision_of, problem_params
from .tiling import backward_tilings, block_width

MAX_HEAD_DIM = 256
"""Larger ones do not fit the tiles of these kernels."""

BLOCK_ROWS = 32
"""Rows of the output whose delta a CTA computes."""


class _Plan(NamedTuple):
    """What problems of one signature share."""

    parts: int  # of each KV head's query heads, whose gradients of keys are summed
    launches: tuple[CompiledLaunch, ...]  # none where there is nothing to do


def backward(problem: AttentionProblem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """The gradients of a problem, as :func:`pagedflash.backends.backward.backward` gives them.

    That function itself takes problems over a cache of which a row may be shared, or begins with padding: nobody trains so;
    and those of head dims above MAX_HEAD_DIM.
    """
    cache, sinks = problem.cache, problem.scores.sinks
    widest = max(cache.k.shape[-1], cache.v.shape[-1])
    if cache.cache_batch_idx is not None or cache.cache_leftpad is not None or widest > MAX_HEAD_DIM:
        return common.backward(problem, out, lse, d_out, d_lse)
    if is_elsewhere(out.device):
        with torch.cuda.device(out.device):
            return backward(problem, out, lse, d_out, d_lse)
    out, lse, d_out, d_lse = (tensor.contiguous() for tensor in (out, lse, d_out, d_lse))
    gradients = common.empty_gradients(problem)
    if problem.queries.cu_seqlens_q is not None or cache.seqused_k is not None or cache.cu_seqlens_k is not None:
        for gradient in gradients[:3]:  # of what belongs to no sequence
            gradient.zero_()
    delta = torch.zeros_like(lse)

    inputs = (*problem.tensors, out, lse, d_out, d_lse, delta)
    aligned = are_aligned(addresses_of(*inputs, *gradients[:3]))
    precision = precision_of(out.dtype)
    plan = problem.plan(
        ("triton backward", aligned, precision), lambda signature: _plan(signature, aligned, precision)
    )  # fmt: skip
    d_keys = tuple(_in_parts(gradient, plan.parts) for gradient in gradients[1:3])
    tensors = (*inputs, gradients.q, *d_keys)
    addresses = addresses_of(*tensors)
    for launch in plan.launches:
        launch(tensors, addresses)
    if plan.parts > 1:
        for gradient, parts in zip(gradients[1:3], d_keys):
            torch.sum(parts.unflatten(-2, (-1, plan.parts)), -2, out=gradient)
    if not plan.launches:
        for gradient in gradients[:3]:
            gradient.zero_()
    if sinks is not None:
        gradients.sinks.copy_(common.sinks_gradient(problem, lse, delta))
    return gradients


def _in_parts(gradient: Tensor, parts: int) -> Tensor:
    """Where the gradient of keys is written: room for each part of a KV head's query heads, zeros if it holds zeros."""
    if parts == 1:
        return gradient
    *tokens, heads, width = gradient.shape
    return gradient.new_zeros(*tokens, heads * parts, width)


def _plan(problem: AttentionProblem, aligned: bool, precision: str) -> _Plan:
    q, k, v = problem.queries.q, problem.cache.k, problem.cache.v
    batch_size, (*_, heads, head_dim), kv_heads = problem.batch_size, q.shape, k.shape[-2]
    if batch_size == 0 or 0 in q.shape or 0 in k.shape:
        return _Plan(1, ())
    keys, queries = backward_tilings(block_width(max(head_dim, v.shape[-1])), q.element_size())
    is_packed_q, is_packed_k = problem.queries.cu_seqlens_q is not None, problem.cache.cu_seqlens_k is not None

    def grid(tokens: int, block: int, heads: int, is_packed: bool) -> tuple[int, int, int]:
        """Of packed sequences each has a last block that is not full."""
        blocks = -(-tokens // block)
        return (blocks + batch_size, heads, 1) if is_packed else (blocks, heads, batch_size)

    # Query heads of a KV head share a CTA, and its keys, where there are CTAs enough.
    tiles = grid(k.shape[-3], keys.block_n, kv_heads, is_packed_k)
    parts = next(
        parts
        for parts in range(1, problem.group + 1)
        if problem.group % parts == 0 and (parts == problem.group or math.prod(tiles) * parts >= 3 * num_sms(q.device))
    )
    params = problem_params(problem, aligned, precision, None, False, leads=False)
    of_keys = BackwardTile(keys.block_m, keys.block_n, problem.group // parts, lengths_together(batch_size))
    of_queries = of_keys._replace(BLOCK_M=queries.block_m, BLOCK_N=queries.block_n)
    rows = q.shape[0] * (1 if is_packed_q else q.shape[1]) * heads
    of_rows = of_keys._replace(BLOCK_M=BLOCK_ROWS)
    launches = (
        (row_gradients, (-(-rows // BLOCK_ROWS), 1, 1), of_rows, dict(num_warps=4, num_stages=1)),
        (keys_backward, (tiles[0], kv_heads * parts, tiles[2]), of_keys, keys.options),
        (queries_backward, grid(q.shape[-3], queries.block_m, heads, is_packed_q), of_queries, queries.options),
    )
    return _Plan(
        parts,
        tuple(
            CompiledLaunch(kernel, of_kernel, params, tile, q.device, aligned, **options)
            for kernel, of_kernel, tile, options in launches
        ),
    )
