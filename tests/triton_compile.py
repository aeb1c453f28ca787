"""Compiles the kernels for an H100, on a machine without one: what Triton's interpreter takes, its compiler may reject.

TRITON_INTERPRET=0 python tests/triton_compile.py          each kernel with all its options, and the widest tiles
TRITON_INTERPRET=0 python tests/triton_compile.py --all    each kernel with each format, wide tiles of every kind: minutes
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from pagedflash.backends.triton import backward, compiled, gradients, launch, tiling
from pagedflash.problem import QUANTIZED, AttentionProblem

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10


def compile_kernel(kernel: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    backend = make_backend(H100)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*arguments, **options, debug=False)
    options_of_target, *source = kernel._pack_args(backend, rest, bound, specialization, rest)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    binary = triton.compile(kind(kernel, *source), target=H100, options=options_of_target.__dict__)
    assert binary.metadata.shared <= SHARED_BYTES, f"{kernel.__name__} wants {binary.metadata.shared} bytes of shared memory"


def compile_launch(self: compiled.CompiledLaunch, tensors: tuple[Any, ...], addresses: tuple[Any, ...]) -> None:
    """In the place of a launch."""
    compile_kernel(self.kernel, [*self.arguments(tensors), *self.descriptors(tensors)], self.options)
    print(self.kernel.__name__)


def everything(
    num_queries: int, dtype: torch.dtype, k_format: torch.dtype | None = None, v_format: torch.dtype | None = None
) -> AttentionProblem:
    """A problem with every option of a paged cache."""
    batch, heads, kv_heads, head_dim, page_size, width = 3, 6, 2, 80, 16, 300
    cos, sin = torch.randn(2, width * page_size, 16).to(dtype)
    pages = torch.zeros(width, page_size, kv_heads, head_dim, dtype=dtype)
    new = torch.zeros(batch, num_queries, kv_heads, head_dim, dtype=dtype)
    k, v = pages.to(k_format or dtype), pages[..., :72].to(v_format or dtype)
    return AttentionProblem.of_fields(
        q=torch.zeros(batch, num_queries, heads, head_dim, dtype=dtype), k=k, v=v, k_new=new,
        k_descale=torch.zeros(pages.shape[:-1]) if k_format in QUANTIZED else None,
        v_descale=torch.zeros(batch, kv_heads) if v_format in QUANTIZED else None,
        v_new=new[..., :72], block_table=torch.zeros(batch, width, dtype=torch.int32),
        cache_leftpad=torch.zeros(batch, dtype=torch.int32), seqused_k=torch.zeros(batch, dtype=torch.int32), rotary_cos=cos,
        rotary_sin=sin, alibi_slopes=torch.zeros(batch, heads), sinks=torch.zeros(heads), max_seqlen_q=num_queries,
        max_seqlen_k=width * page_size, softcap=1.0, window_left=2000, window_right=0,
    )  # fmt: skip


def all_ones(num_queries: int) -> AttentionProblem:
    """Every size is 1 where it can be: Triton makes such numbers constants."""
    offsets = torch.zeros(2, dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int32)
    row = torch.zeros(1, 1, 8)
    return AttentionProblem.of_fields(
        q=row.expand(num_queries, 1, 8), k=row[None], v=row[None], cu_seqlens_q=offsets, cu_seqlens_k=offsets, seqused_q=one,
        block_table=torch.zeros(1, 1, dtype=torch.int32), max_seqlen_q=num_queries, max_seqlen_k=1, window_left=1,
        window_right=1, num_splits=2,
    )  # fmt: skip


def wide(
    num_queries: int, heads: int, dtype: torch.dtype, head_dim: int, v_head_dim: int, v_in_k: bool = False
) -> AttentionProblem:
    """The largest tiles: many query heads of one KV head, whose head dims are wide."""
    k = torch.zeros(300, 16, 1, head_dim, dtype=dtype)
    v = k[..., :v_head_dim] if v_in_k else torch.zeros(300, 16, 1, v_head_dim, dtype=dtype)
    new = torch.zeros(3, num_queries, 1, max(head_dim, v_head_dim), dtype=dtype)
    return AttentionProblem.of_fields(
        q=torch.zeros(3, num_queries, heads, head_dim, dtype=dtype), k=k, v=v, k_new=new[..., :head_dim],
        v_new=new[..., :v_head_dim], block_table=torch.zeros(3, 300, dtype=torch.int32), max_seqlen_q=num_queries,
        seqused_k=torch.zeros(3, dtype=torch.int32), max_seqlen_k=4800, window_right=0,
    )  # fmt: skip


def mixed(problem: AttentionProblem, total_q: int) -> AttentionProblem:
    """The same with packed queries, fewer than if all sequences were as long as the longest."""
    q, batch_size = problem.queries.q, problem.batch_size
    offsets = torch.zeros(batch_size + 1, dtype=torch.int32)
    return problem.replace(
        q=q.new_zeros(total_q, *q.shape[-2:]), cu_seqlens_q=offsets, k_new=None, v_new=None, rotary_cos=None, rotary_sin=None
    )


def trained(problem: AttentionProblem) -> AttentionProblem:
    """The same over dense keys, without an append: one with gradients."""
    batch_size, cache = problem.batch_size, problem.cache
    k, v = (keys.new_zeros(batch_size, 100, *keys.shape[-2:]) for keys in cache[:2])
    append = dict.fromkeys(("k_new", "v_new", "rotary_cos", "rotary_sin"))
    return problem.replace(k=k, v=v, block_table=None, cache_leftpad=None, **append)


def with_dropout(problem: AttentionProblem) -> AttentionProblem:
    return problem.replace(dropout_seed=torch.tensor(1), dropout_p=0.1)


def packed(problem: AttentionProblem) -> AttentionProblem:
    """The same over packed keys."""
    k, v = (keys[0] for keys in problem.cache[:2])
    return problem.replace(k=k, v=v, block_table=None)


def long(head_dim: int, page_size: int | None, dtype: torch.dtype = torch.bfloat16) -> AttentionProblem:
    """What Hopper's prefill takes: many keys, in pages or packed, with a window, sinks and unused queries."""
    offsets = torch.tensor([0, 100, 300], dtype=torch.int32)
    pages = torch.zeros(64, page_size or 16, 2, head_dim, dtype=dtype)
    packed = pages.flatten(0, 1)
    table = torch.zeros(2, 64, dtype=torch.int32)
    keys: dict[str, Any] = dict(k=pages, v=pages.clone(), block_table=table, seqused_k=offsets[1:].clone())
    if page_size is None:
        keys = dict(k=packed, v=packed.clone(), cu_seqlens_k=offsets)
    return AttentionProblem.of_fields(
        q=torch.zeros(300, 6, head_dim, dtype=dtype), cu_seqlens_q=offsets, seqused_q=offsets[1:].clone(),
        sinks=torch.zeros(6), max_seqlen_q=200, max_seqlen_k=1024, window_left=700, window_right=0, **keys,
    )  # fmt: skip


def narrow_values(head_dim: int) -> AttentionProblem:
    """Values narrower than keys."""
    problem = long(head_dim, None)
    v = problem.cache.v
    return problem.replace(v=v.new_zeros(*v.shape[:-1], 80))


def drafts(heads: int, head_dim: int, page_size: int | None, with_options: bool) -> AttentionProblem:
    """What Hopper's decode of many rows takes: sixteen queries a sequence, over pages or rows of a dense cache."""
    batch, queries, kv_heads, keys = 32, 16, 8, 2048
    cache = torch.zeros(batch * keys // (page_size or keys), page_size or keys, kv_heads, head_dim, dtype=torch.bfloat16)
    table = None if page_size is None else torch.zeros(batch, keys // page_size, dtype=torch.int32)
    options: dict[str, Any] = dict(softcap=1.0, alibi_slopes=torch.zeros(heads), cache_leftpad=torch.zeros(batch).int())
    return AttentionProblem.of_fields(
        q=torch.zeros(batch, queries, heads, head_dim, dtype=torch.bfloat16), k=cache, v=cache.clone(), block_table=table,
        seqused_k=torch.zeros(batch, dtype=torch.int32), max_seqlen_q=queries, max_seqlen_k=keys, window_right=0,
        **(options if with_options else {}),
    )  # fmt: skip


if __name__ == "__main__":
    assert not compiled.INTERPRETED
    launch.num_sms = gradients.num_sms = lambda device: 132
    launch.has_pdl = lambda device: True
    tiling.has_hopper_kernels = lambda device: compiled.knows_gluon()
    tiling.has_words = lambda device, dtype: True
    launch.semaphores = lambda device, count: torch.zeros(count, dtype=torch.int32)
    compiled.CompiledLaunch.__call__ = compile_launch
    formats = ((torch.bfloat16, torch.int8, torch.float8_e4m3fn), (torch.float16, torch.float8_e5m2, torch.float8_e5m2),
               (torch.float32, torch.float16, torch.int8))  # fmt: skip
    with_formats = [everything(queries, *of_formats) for queries, of_formats in zip((1, 1, 70), formats)]
    other_formats = [everything(queries, *of_formats) for queries, of_formats in zip((70, 70, 1), formats)]
    every_width = [
        wide(queries, heads, dtype, *dims)
        for dtype in (torch.bfloat16, torch.float32)
        for dims in ((576, 512, True), (500, 250, True), (512, 512), (64, 512))
        for queries, heads in ((1, 8), (1, 128), (4, 16), (70, 2))
    ]
    inference = (
        with_dropout(everything(1, torch.bfloat16)),
        with_dropout(everything(70, torch.float16)),
        mixed(everything(70, torch.bfloat16), 72),
        all_ones(1),
        all_ones(70),
        mixed(all_ones(70), 69),
        long(64, None),
        long(128, 16),
        long(256, 64, torch.float16),
        long(192, 16),
        drafts(32, 128, 16, False),
        drafts(64, 64, None, True),
        *with_formats,
        wide(1, 128, torch.bfloat16, 576, 512, True),
        wide(70, 2, torch.float32, 512, 512),
        *([*other_formats, *every_width, *map(narrow_values, (64, 96, 160, 192, 256))] if "--all" in sys.argv else ()),
    )
    for number, problem in enumerate(inference):
        launch.attention(problem, with_lse=number % 2 == 0)
    for problem in (
        trained(everything(70, torch.float32)),
        with_dropout(trained(everything(70, torch.bfloat16))),
        packed(all_ones(70)),
    ):
        results = torch.zeros(problem.out_shape, dtype=problem.queries.q.dtype), torch.zeros(problem.lse_shape)
        backward(problem, *results, *results)
