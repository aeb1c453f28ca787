"""OpenVINO's CPU PagedAttention operator, on a cache of its own layout filled with the same keys and values."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...testing import PagedProblem
from ..measure import Contender
from . import CannotRun

PAGE_SIZE = 32
"""The only one it has."""


def decode(problem: PagedProblem) -> Contender:
    """One query a sequence.

    The operator also writes the last token into its cache, so it is given all tokens but that one. Its bfloat16 cache
    needs a processor with bfloat16 instructions (the outputs are wrong on others): elsewhere it gets a float16 cache.
    """
    import numpy as np
    import openvino as ov

    q, k_cache, v_cache, lengths, table = problem
    if q.shape[1] != 1:
        raise CannotRun(f"it gets one query a sequence here, not {q.shape[1]}")
    batch, _, q_heads, head_dim = q.shape
    counts = lengths.tolist()
    blocks = [-(-count // PAGE_SIZE) for count in counts]
    cache_dtype = _cache_dtype(q.dtype)
    request = _operator(q_heads, k_cache.shape[2], head_dim, max(counts), cache_dtype).create_infer_request()
    last = [(row[(count - 1) // k_cache.shape[1]], (count - 1) % k_cache.shape[1]) for row, count in zip(table, counts)]

    def last_tokens(cache: Tensor) -> Any:
        return torch.stack([cache[page, slot] for page, slot in last]).float().reshape(batch, -1).numpy()

    def offsets(sizes: list[int]) -> Any:
        return np.array([0, *accumulate(sizes)], np.int32)

    values = [
        q.float().reshape(batch, -1).numpy(),
        last_tokens(k_cache),
        last_tokens(v_cache),
        _cache(k_cache, table, counts, blocks, cache_dtype),
        _cache(v_cache, table, counts, blocks, cache_dtype),
        np.array([count - 1 for count in counts], np.int32),
        offsets([1] * batch),
        np.arange(sum(blocks), dtype=np.int32),
        offsets(blocks),
    ]
    for i, value in enumerate(values):
        request.set_input_tensor(i, value if isinstance(value, ov.Tensor) else ov.Tensor(np.ascontiguousarray(value)))
    return Contender(
        request.infer, lambda _: torch.from_numpy(request.get_output_tensor(0).data.copy()).view(q.shape).to(q.dtype)
    )


@cache
def _core() -> Any:
    """Kept for as long as the process lives. On a processor with AMX it gives this thread a stack for signals and takes it
    away again while it is in use: after that the next signal, a Ctrl-C for one, is a segmentation fault.
    """
    import openvino as ov

    return ov.Core()


def _cache_dtype(dtype: torch.dtype) -> torch.dtype:
    has_bfloat16 = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return torch.float16 if dtype == torch.bfloat16 and not has_bfloat16 else dtype


def _operator(q_heads: int, kv_heads: int, head_dim: int, longest: int, cache_dtype: torch.dtype) -> Any:
    """The operator alone, compiled as a model."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.op import _PagedAttentionExtension

    f32, i32 = ov.Type.f32, ov.Type.i32
    element = {torch.float32: f32, torch.bfloat16: ov.Type.bf16, torch.float16: ov.Type.f16}[cache_dtype]

    def parameter(shape: list[int], type_: Any) -> Any:
        return ops.parameter(ov.PartialShape(shape), type_)

    def scalar(value: float, type_: Any) -> Any:
        return ops.constant(np.array(value), type_)

    def none(type_: Any, dims: int = 1) -> Any:
        return ops.constant(np.zeros((0,) * dims), type_)

    inputs = [
        parameter([-1, q_heads * head_dim], f32),
        parameter([-1, kv_heads * head_dim], f32),
        parameter([-1, kv_heads * head_dim], f32),
        parameter([-1, kv_heads, PAGE_SIZE, head_dim], element),
        parameter([-1, kv_heads, PAGE_SIZE, head_dim], element),
        *(parameter([-1], i32) for _ in range(4)),  # past_lens, subsequence_begins, block_indices, block_indices_begins
    ]
    options = [
        scalar(head_dim**-0.5, f32),
        scalar(0, i32),  # sliding_window
        none(f32),  # alibi_slopes
        scalar(longest, i32),  # max_context_len
        none(i32),  # score_aggregation_window
        none(i32),  # rotated_block_indices
        none(i32),  # rotation_deltas
        none(f32),  # rotation_trig_lut
        none(f32),  # xattention_threshold
        scalar(64, i32),  # xattention_block_size
        scalar(8, i32),  # xattention_stride
        none(f32, dims=4),  # sinks
        scalar(0, i32),  # adaptive_rkv_start_size
        none(i32),  # adaptive_rkv_evictable_sizes
        none(i32),  # adaptive_rkv_diversity_block_set_indices
        none(i32),  # adaptive_rkv_diversity_block_set_indices_begins
        none(i32),  # token_type_ids
        none(ov.Type.u8),  # qq_bias
        none(i32),  # qq_bias_begins
    ]
    attention = _PagedAttentionExtension([node.output(0) for node in [*inputs, *options]])
    for kind in ("k", "v"):
        attention.get_rt_info()[f"num_{kind}_heads"] = kv_heads
        attention.get_rt_info()[f"{kind}_head_size"] = head_dim
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if cache_dtype == torch.bfloat16 else "f32",
        "KV_CACHE_PRECISION": element,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return _core().compile_model(ov.Model([attention.output(0)], inputs), "CPU", settings)


def _cache(pages: Tensor, table: Tensor, counts: list[int], blocks: list[int], dtype: torch.dtype) -> Any:
    """The cached tokens as OpenVINO lays them out: ``[blocks, Hkv, 32, D]``."""
    import numpy as np
    import openvino as ov

    kv_heads, head_dim = pages.shape[2:]
    cache = torch.zeros(sum(blocks), kv_heads, PAGE_SIZE, head_dim, dtype=dtype)
    first = 0
    for row, count, size in zip(table, counts, blocks):
        tokens = pages[row[: -(-count // pages.shape[1])].long()].flatten(0, 1)[:count]
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, size * PAGE_SIZE - count))
        cache[first : first + size] = padded.view(size, PAGE_SIZE, kv_heads, head_dim).transpose(1, 2)
        first += size
    if dtype != torch.bfloat16:
        return ov.Tensor(cache.numpy())
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(cache.shape))  # numpy has no bfloat16: copy the bits
    tensor.data.view(np.int16)[:] = cache.view(torch.int16).numpy()
    return tensor
