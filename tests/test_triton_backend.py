"""The Triton kernels against the reference.

On any machine they run through Triton's interpreter, on a GPU with ``pytest --device cuda``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from ctypes import memmove, string_at
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_interpreter import watch_accesses

import pagedflash
from pagedflash import geometry, plan_cache
from pagedflash.backends import reference
from pagedflash.backends import triton as backend
from pagedflash.backends.triton import compiled, driver, kernels, launch, semaphores, tiling
from pagedflash.backends.triton.kernels import params
from pagedflash.backends.triton.kernels.schedule import cta_of, first_tile_of, share_tiles
from pagedflash.backends.triton.kernels.words import unpack
from pagedflash.problem import WRITE, AttentionProblem, CacheWrite, KVCache
from pagedflash.signature import addresses_of
from pagedflash.testing import LAYOUTS, assert_matches_reference, describe, random_problem
from pagedflash.testing.conformance import BackendConformance
from pagedflash.testing.problems import GROUPS


@pytest.fixture(params=("a stage", "a kernel"))
def combine_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether splits are reduced in ``decode``, or by a kernel of its own."""
    _reduce_up_to(2**20 if request.param == "a stage" else 0, monkeypatch)
    return request.param


def _reduce_up_to(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``decode`` itself reduce up to so many splits of a work tile."""
    monkeypatch.setattr(launch, "MAX_FUSED_SPLITS", splits)
    monkeypatch.setattr(launch, "MAX_FUSED_VALUES", splits * launch.MAX_SPLIT_VALUES)
    monkeypatch.setattr(plan_cache, "_entries", {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("combine_is")
def test_all_options(rng: random.Random, rounds, device: str, layout: str) -> None:
    for _ in range(rounds(2)):
        problem = random_problem(rng, layout=layout, device=device, capabilities=backend.CAPABILITIES)
        assert_matches_reference(problem, backend.attention)


@pytest.mark.usefixtures("combine_is")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("heads, queries", ((16, 1), (20, 2), (128, 1), (3, 70)))
def test_values_that_are_the_first_part_of_keys(device: str, heads: int, queries: int, dtype: torch.dtype) -> None:
    """MLA: V is a view of K. Many query heads of one KV head take several tiles of ``decode``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    latent, new = normal(9, 16, 1, 576), normal(2, queries, 1, 576)
    problem = AttentionProblem.of_fields(
        q=normal(2, queries, heads, 576), k=latent, v=latent[..., :512], k_new=new, v_new=new[..., :512],
        seqused_k=torch.tensor([37, 0], dtype=torch.int32, device=device),
        block_table=torch.tensor([[3, 1, 5, 7, 4, 8, 6], [0] + [2] * 6], dtype=torch.int32, device=device),
        max_seqlen_q=queries, max_seqlen_k=112, scale=0.05, window_right=0, rotary_interleaved=False,
    )  # fmt: skip
    if queries == 70:
        problem = problem.replace(block_table=torch.arange(14, device=device, dtype=torch.int32).view(2, 7) % 9)
        problem = problem.replace(k_new=None, v_new=None)
    assert_matches_reference(problem, backend.attention)


def _mla_problem(
    device: str,
    lengths: list[int],
    heads: int,
    *,
    queries: int = 1,
    page_size: int | None = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> AttentionProblem:
    """Keys of 576 whose first 512 are the values, paged or not; NaN wherever no key is, and no page behind the last."""
    generator = torch.Generator().manual_seed(sum(lengths))
    batch, size = len(lengths), page_size or max(*lengths, 1)
    width = -(-max(*lengths, 1) // size)
    latent = torch.randn(batch * width, size, 1, 576, generator=generator).to(dtype)
    table = torch.randperm(batch * width, generator=generator).to(torch.int32).view(batch, width)
    for pages, length in zip(table, lengths):
        for page, left in zip(pages.tolist(), range(length, length - width * size, -size)):
            latent[page, max(left, 0) :] = torch.nan
        pages[-(-length // size) :] = -1
    problem = AttentionProblem.of_fields(
        q=torch.randn(batch, queries, heads, 576, generator=generator).to(dtype), k=latent, v=latent,
        seqused_k=torch.tensor(lengths, dtype=torch.int32), block_table=table, max_seqlen_q=queries,
        max_seqlen_k=width * size, scale=0.05, window_right=0,
    ).map_tensors(lambda tensor: tensor.to(device))  # fmt: skip
    k = problem.cache.k
    if page_size is None:
        order = table[:, 0].clamp(min=0).long().to(device)
        k = k[torch.where(torch.tensor(lengths, device=device) > 0, order, order[0])].contiguous()
        problem = problem.replace(block_table=None)
    return problem.replace(k=k, v=k[..., :512])


@pytest.mark.parametrize("page_size", (16, 32, 64, 256, None))
@pytest.mark.parametrize("heads, queries", ((1, 1), (20, 3), (64, 1), (128, 4)))
def test_mla_decode(device: str, heads: int, queries: int, page_size: int | None) -> None:
    _on_gpu(device)
    for lengths in ([5000, 1, 63, 64, 65, 777, 2048], [40] * 300):
        problem = _mla_problem(device, lengths, heads, queries=queries, page_size=page_size)
        for options in (
            {},
            dict(window_left=100),
            dict(softcap=3.0),
            dict(sinks=torch.randn(heads, device=device)),
            dict(num_splits=3),
            dict(scale=0.3),  # maxima grow by more than is left to weights
        ):
            assert_matches_reference(problem.replace(**options), backend.attention)


def test_mla_decode_of_wrong_lengths_and_tables(device: str) -> None:
    """What comes out lies within what the cache holds: the sanitizer runs this too."""
    _on_gpu(device)
    problem = _mla_problem(device, [5000, 1, 0, 777], 128)
    for value in WRONG_LENGTHS:
        for name in ("seqused_k", "block_table"):
            tensor = dict(problem.named_fields())[name]
            backend.attention(problem.replace(**{name: torch.full_like(tensor, value)}))
    torch.cuda.synchronize()


def _rows_problem(device: str, lengths: list[int], heads: tuple[int, int], queries: int, head_dim: int, layout: str | int):
    """Several queries a sequence; keys in pages of a size, in rows of a dense cache, or packed. NaN wherever no key is."""
    page_size = layout if isinstance(layout, int) else 16
    options: dict[str, Any] = dict(heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=torch.bfloat16)
    problem = _decode_problem(device, lengths, page_size=page_size, **options)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(lengths), queries, heads[0], head_dim, generator=generator).to(device, torch.bfloat16)
    problem = problem.replace(q=q, max_seqlen_q=queries)
    if layout == "dense":
        rows = problem.cache.block_table.long()
        problem = problem.replace(
            block_table=None,
            k=problem.cache.k[rows].flatten(1, 2),
            v=problem.cache.v[rows].flatten(1, 2).flip(0).contiguous(),
        )
        problem = problem.replace(k=problem.cache.k.flip(0).contiguous())
        order = torch.arange(len(lengths), device=device, dtype=torch.int32).flip(0)
        problem = problem.replace(cache_batch_idx=order)
    if layout == "packed":
        rows = problem.cache.block_table.long()
        k, v = (
            torch.cat([cache[row].flatten(0, 1)[:n] for row, n in zip(rows, lengths)]) for cache in problem.cache[:2]
        )  # fmt: skip
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        problem = problem.replace(
            block_table=None, seqused_k=None, k=k, v=v, cu_seqlens_k=offsets, max_seqlen_k=max(lengths)
        )
    return problem


ROWS_LENGTHS = [2500, 1, 63, 64, 65, 300, 1025] * 2
"""Work tiles for a fifth of the SMs: fewer are decode's."""

ROWS_OPTIONS: dict[str, Callable[[int, int, int, str], dict[str, Any]]] = {
    "none": lambda batch, heads, queries, device: {},
    "window": lambda batch, heads, queries, device: dict(window_left=600),
    "window to both sides": lambda batch, heads, queries, device: dict(window_left=570, window_right=5),
    "not causal": lambda batch, heads, queries, device: dict(window_right=-1),
    "softcap": lambda batch, heads, queries, device: dict(softcap=3.0),
    "slopes": lambda batch, heads, queries, device: dict(alibi_slopes=torch.rand(batch, heads, device=device)),
    "sinks": lambda batch, heads, queries, device: dict(sinks=torch.randn(heads, device=device)),
    "three splits": lambda batch, heads, queries, device: dict(num_splits=3),
    "no splits": lambda batch, heads, queries, device: dict(num_splits=1),
    "left padding": lambda batch, heads, queries, device: dict(
        cache_leftpad=torch.tensor([1000, 0, 0, 30, 0, 200, 1024] * 2, device=device, dtype=torch.int32)
    ),
    "skipped": lambda batch, heads, queries, device: dict(
        seqused_k=torch.tensor([2500, -1, 0, 64, 65, 300, 1025] * 2, device=device, dtype=torch.int32)
    ),
    "unused queries": lambda batch, heads, queries, device: dict(
        cu_seqlens_q=torch.arange(batch + 1, device=device, dtype=torch.int32) * queries,
        seqused_q=torch.tensor([queries, 0, 1, queries, 2, 3, queries] * 2, device=device, dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("option", ROWS_OPTIONS)
@pytest.mark.parametrize(
    "heads, queries, head_dim, layout",
    (
        ((8, 2), 16, 128, 16),
        ((9, 3), 6, 64, 48),
        ((32, 2), 4, 128, 256),
        ((10, 2), 20, 80, "dense"),
        ((8, 2), 16, 64, "packed"),
    ),
)
def test_decode_of_many_rows(
    device: str, launches: Launches, heads: tuple[int, int], queries: int, head_dim: int, layout: str | int, option: str
) -> None:
    _on_gpu(device)
    problem = _rows_problem(device, ROWS_LENGTHS, heads, queries, head_dim, layout)
    changes = ROWS_OPTIONS[option](problem.batch_size, heads[0], queries, device)
    if layout == "packed" and option in ("left padding", "skipped"):
        pytest.skip("not for packed keys")
    if "cu_seqlens_q" in changes:
        changes["q"] = problem.queries.q.flatten(0, 1)
    problem = problem.replace(**changes)
    assert_matches_reference(problem, backend.attention)
    if option == "none":
        in_half = problem.map_tensors(lambda x: x.half() if x.dtype == torch.bfloat16 else x)
        assert_matches_reference(in_half, backend.attention)
    if compiled.has_hopper_kernels(torch.device(device)):
        assert "decode_rows_hopper" in launches.kernels


def test_decode_of_many_rows_appends(device: str, launches: Launches) -> None:
    _on_gpu(device)
    problem = _rows_problem(device, ROWS_LENGTHS, (8, 2), 8, 128, 16)
    new = torch.randn(2, len(ROWS_LENGTHS), 8, 2, 128, device=device).bfloat16()
    lengths = problem.cache.seqused_k - 8
    assert_matches_reference(problem.replace(k_new=new[0], v_new=new[1], seqused_k=lengths.clamp(min=0)), backend.attention)
    if compiled.has_hopper_kernels(torch.device(device)):
        assert launches.kernels[:2] == ["kv_write", "decode_rows_hopper"]


def test_decode_of_many_rows_of_wrong_lengths_and_tables(device: str) -> None:
    """What comes out lies within what the cache holds: the sanitizer runs this too."""
    _on_gpu(device)
    for layout in (16, "dense", "packed"):
        problem = _rows_problem(device, ROWS_LENGTHS, (8, 2), 16, 128, layout)
        offsets = torch.arange(len(ROWS_LENGTHS) + 1, device=device, dtype=torch.int32) * 16
        problem = problem.replace(q=problem.queries.q.flatten(0, 1), cu_seqlens_q=offsets)
        for name, tensor in problem.named_fields().items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32:
                for value in WRONG_LENGTHS:
                    backend.attention(problem.replace(**{name: torch.full_like(tensor, value)}))
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "head_dim, v_head_dim, in_k, widths",
    (
        (64, 64, False, (64, 64, 0, 0)),
        (59, 111, False, (64, 128, 0, 0)),
        (576, 512, False, (512, 512, 64, 64)),
        (576, 512, True, (512, 512, 64, 64)),
        (288, 256, True, (256, 256, 32, 32)),
        (576, 97, True, (512, 512, 64, 64)),
        (192, 128, True, (128, 128, 64, 64)),
        (50, 40, True, (64, 64, 0, 0)),
    ),
)
def test_tile_widths(head_dim: int, v_head_dim: int, in_k: bool, widths: tuple[int, ...]) -> None:
    k = torch.empty(1, 1, 1, head_dim)
    v = k[..., :v_head_dim] if in_k else torch.empty(1, 1, 1, v_head_dim)
    assert tiling.tile_widths(KVCache(k, v), in_k) == widths


@dataclass
class Launches:
    kernels: list[str]
    ctas: list[int]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The kernels launched while the test runs, and the size of their grids."""
    seen = Launches([], [])
    original = compiled.CompiledLaunch.__call__

    def spy(self, *arguments):
        seen.kernels.append(self.kernel.__name__)
        seen.ctas.append(self.grid[0])
        original(self, *arguments)

    monkeypatch.setattr(compiled.CompiledLaunch, "__call__", spy)
    yield seen


def _decode_problem(device: str, lengths: list[int], *, page_size: int = 16, width: int | None = None, append: bool = False,
                 heads: int = 4, kv_heads: int = 2, head_dim: int = 32, window_left: int = -1,
                 dtype: torch.dtype = torch.float32) -> AttentionProblem:  # fmt: skip
    """One query a sequence, paged keys; NaN wherever no key is."""
    batch = len(lengths)
    width = width or max(-(-(n + 1) // page_size) for n in lengths)
    generator = torch.Generator().manual_seed(sum(lengths))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    table = torch.randperm(batch * width, generator=generator).view(batch, width).to(torch.int32)
    k, v = (torch.full((batch * width, page_size, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    for row, length in zip(table.tolist(), lengths):
        for token in range(length):
            k[row[token // page_size], token % page_size] = normal(kv_heads, head_dim)
            v[row[token // page_size], token % page_size] = normal(kv_heads, head_dim)
    angles = torch.rand(width * page_size, head_dim // 2, generator=generator) * 6.28
    fields: dict[str, Any] = dict(
        q=normal(batch, 1, heads, head_dim), k=k, v=v, seqused_k=torch.tensor(lengths, dtype=torch.int32), block_table=table,
        max_seqlen_q=1, max_seqlen_k=width * page_size, scale=0.2, window_left=window_left, window_right=0,
        rotary_interleaved=False,
    )  # fmt: skip
    if append:
        fields |= dict(
            k_new=normal(batch, 1, kv_heads, head_dim), v_new=normal(batch, 1, kv_heads, head_dim),
            rotary_cos=angles.cos().to(dtype), rotary_sin=angles.sin().to(dtype),
        )  # fmt: skip
    return AttentionProblem.of_fields(**fields).map_tensors(lambda tensor: tensor.to(device))


def kernels_of_split_keys(combine_is: str) -> list[str]:
    return ["decode"] if combine_is == "a stage" else ["decode", "combine"]


def test_one_long_sequence_is_split_over_all_ctas(device: str, launches: Launches, combine_is: str) -> None:
    problem = _decode_problem(device, [1100, 3, 0])
    assert_matches_reference(problem, backend.attention)
    chosen = tiling.decode_tiling(2, 32, 4, 4, False)
    assert launches.kernels == kernels_of_split_keys(combine_is)
    assert launches.ctas[:1] == [compiled.num_sms(torch.device(device)) * chosen.ctas_per_sm]
    tiles_of_the_long_one = -(-1100 // chosen.block_n)
    assert tiles_of_the_long_one > 2, "the premise: it has KV tiles for more than one CTA"


@triton.jit
def _share(firsts, owners, total_tiles, longest, work_tiles, num_ctas, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    shares = share_tiles(total_tiles, longest, work_tiles, num_ctas)
    tl.store(firsts + index, first_tile_of(index, shares))
    tl.store(owners + index, cta_of(index, shares))


@pytest.mark.parametrize(
    "total_tiles, longest, work_tiles, num_ctas, splits",
    (
        (64, 8, 8, 32, 4),  # of each work tile, which are alike
        (56, 7, 8, 35, 4),  # some CTAs have none
        (56, 7, 8, 40, 5),  # not as many tiles each
        (24, 3, 8, 40, 3),  # more CTAs than tiles
        (64, 8, 8, 30, 0),  # too many CTAs would have none
        (60, 8, 8, 32, 0),  # not alike
        (60, 60, 1, 7, 7),
        (5, 5, 1, 8, 5),
        (100, 10, 10, 4, 0),
    ),
)
def test_ctas_share_the_tiles(
    total_tiles: int, longest: int, work_tiles: int, num_ctas: int, splits: int, device: str
) -> None:
    """Each tile has one CTA; work tiles that are alike have so many CTAs each, which have no other."""
    firsts, owners = torch.full((2, 128), -1, dtype=torch.int32, device=device)
    _share[(1,)](firsts, owners, total_tiles, longest, work_tiles, num_ctas, 128)
    bounds = firsts[: num_ctas + 1].tolist()
    assert bounds[0] == 0 and bounds[-1] == total_tiles and bounds == sorted(bounds)
    found = [cta for cta in range(num_ctas) for _ in range(bounds[cta], bounds[cta + 1])]
    assert owners[:total_tiles].tolist() == found
    sizes = [found.count(cta) for cta in set(found)]
    assert max(sizes) - min(sizes) <= 1
    for first in range(0, total_tiles, longest) if splits else ():
        assert len(set(found[first : first + longest])) == splits
    assert not splits or len(set(found)) == splits * work_tiles


@pytest.mark.usefixtures("combine_is")
@pytest.mark.parametrize("last", (1100, 70), ids=("alike", "unlike"))
def test_as_many_work_tiles_as_ctas(device: str, launches: Launches, last: int) -> None:
    """Alike, each has a CTA to itself, which stores its output; else some are split."""
    ctas = compiled.num_sms(torch.device(device)) * tiling.decode_tiling(2, 64, 4, 4, False).ctas_per_sm
    problem = _decode_problem(device, [1100] * (ctas // 2 - 1) + [last], head_dim=64)
    assert_matches_reference(problem, backend.attention)
    assert launches.ctas[0] == ctas == problem.batch_size * problem.cache.k.shape[-2]


def test_one_cta_takes_each_of_many_short_work_tiles(device: str, launches: Launches) -> None:
    sms = compiled.num_sms(torch.device(device))
    assert_matches_reference(_decode_problem(device, [700] + [20] * (sms // 2)), backend.attention)
    assert launches.kernels == ["decode"]


@pytest.mark.parametrize("num_splits", (1, 3))
def test_num_splits_sets_the_number_of_ctas(device: str, launches: Launches, num_splits: int, combine_is: str) -> None:
    problem = _decode_problem(device, [700, 700]).replace(num_splits=num_splits)
    assert_matches_reference(problem, backend.attention)
    assert launches.kernels == (["decode"] if num_splits == 1 else kernels_of_split_keys(combine_is))
    assert launches.ctas[0] == 2 * 2 * num_splits


@pytest.mark.parametrize("lengths", ([33, 1100], [33, 50]), ids=str)
def test_append_rotary_and_decode_take_at_most_two_launches(
    device: str, launches: Launches, lengths: list[int], combine_is: str
) -> None:
    assert_matches_reference(_decode_problem(device, lengths, append=True), backend.attention)
    assert launches.kernels == (["decode"] if max(lengths) < 100 else kernels_of_split_keys(combine_is))


def test_semaphores_are_put_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _reduce_up_to(2**20, monkeypatch)
    given: list[torch.Tensor] = []

    def watched(*arguments: Any) -> torch.Tensor:
        given.append(semaphores.semaphores(*arguments))
        return given[-1]

    monkeypatch.setattr(launch, "semaphores", watched)
    assert_matches_reference(_decode_problem(device, [1100, 3, 0, 600]), backend.attention)
    assert given and not any(some.any() for some in given)


def test_more_sequences_than_one_block_of_lengths(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FEW_SEQUENCES", 4)
    monkeypatch.setattr(launch, "MANY_SEQUENCES", 4)
    monkeypatch.setattr(plan_cache, "_entries", {})
    assert_matches_reference(_decode_problem(device, [5, 0, 70, 1, 9, 33, 200, 2, 0, 64, 17], heads=2), backend.attention)


@pytest.mark.parametrize("queries", (1, 90))
def test_keys_left_of_the_window_are_not_touched(device: str, launches: Launches, queries: int, combine_is: str) -> None:
    """They are NaN here: read, they would show, since 0 x NaN is NaN."""
    problem = _decode_problem(device, [1100], window_left=20)
    q = torch.randn(1, queries, 4, 32).to(device)
    problem = problem.replace(q=q, max_seqlen_q=queries, num_splits=3)
    out, _ = backend.attention(problem)
    cache = problem.cache
    seen_from = 1100 - queries - 20
    for token in range(seen_from):
        page = int(cache.block_table[0, token // 16])
        cache.k[page, token % 16] = torch.nan
        cache.v[page, token % 16] = torch.nan
    again, _ = backend.attention(problem)
    assert launches.kernels == (kernels_of_split_keys(combine_is) if queries == 1 else ["prefill"]) * 2
    assert torch.equal(out, again)


def test_a_window_of_few_keys_is_not_split(device: str, launches: Launches) -> None:
    problem = _decode_problem(device, [1100, 900], window_left=20)
    assert_matches_reference(problem, backend.attention)
    assert launches.kernels == ["decode"]
    assert launches.ctas == [problem.batch_size * problem.cache.k.shape[-2]]


# --------------------------------------------------------------------------------------------------------------------
# Mixed batches
# --------------------------------------------------------------------------------------------------------------------


def _mixed_problem(device: str, queries: list[int], lengths: list[int], **options: Any) -> AttentionProblem:
    """Packed queries on the pages of :func:`_decode_problem`."""
    problem = _decode_problem("cpu", lengths, **options)
    _, _, heads, head_dim = problem.queries.q.shape
    generator = torch.Generator().manual_seed(sum(queries))
    q = torch.randn(sum(queries), heads, head_dim, generator=generator).to(problem.queries.q.dtype)
    offsets = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    problem = problem.replace(q=q, cu_seqlens_q=offsets, max_seqlen_q=max(queries))
    return problem.map_tensors(lambda tensor: tensor.to(device))


QUERIES, KEYS = [1, 70, 0, 1, 130, 8, 9, 1], [1100, 90, 3, -1, 200, 8, 20, 0]
"""Of a mixed batch: with two query heads a KV head, those of up to 8 queries are ``decode``'s."""


def _keys_of(keys: list[int]) -> list[int]:
    return [max(n, 0) for n in keys]


def test_a_mixed_batch_is_one_call_of_each_kernel(device: str, launches: Launches, combine_is: str) -> None:
    problem = _mixed_problem(device, QUERIES, _keys_of(KEYS))
    assert problem.cache.seqused_k is not None
    problem.cache.seqused_k.copy_(torch.tensor(KEYS))
    assert_matches_reference(problem, backend.attention)
    assert launches.kernels == [*kernels_of_split_keys(combine_is), "prefill"]


def test_each_kernel_of_a_mixed_batch_has_its_own_sequences(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("only the interpreter shows which rows a kernel writes")
    problem = _mixed_problem(device, QUERIES, _keys_of(KEYS))
    out = torch.empty(problem.out_shape)
    rows: dict[str, set[int]] = {}
    original = compiled.CompiledLaunch.__call__

    def watched(self, *arguments):
        def note(addresses, written: bool) -> None:
            row = (addresses.astype(int) - out.data_ptr()) // out[0].nbytes
            if written:
                rows.setdefault(self.kernel.__name__, set()).update(row[(row >= 0) & (row < len(out))].tolist())

        with watch_accesses(note):
            original(self, *arguments)

    monkeypatch.setattr(compiled.CompiledLaunch, "__call__", watched)
    backend.attention(problem, out)
    few = {row for b, n in enumerate(QUERIES) if n <= 8 for row in range(sum(QUERIES[:b]), sum(QUERIES[: b + 1]))}
    assert rows.pop("decode") | rows.pop("combine", set()) == few
    assert rows == {"prefill": set(range(len(out))) - few}


@pytest.mark.usefixtures("combine_is")
def test_all_options_of_mixed_batches(rng: random.Random, rounds, device: str) -> None:
    seen = 0
    while seen < rounds(4):
        options: dict[str, Any] = dict(layout="paged varlen", max_queries=90, capabilities=backend.CAPABILITIES)
        problem = random_problem(rng, device=device, **options)
        if geometry.may_be_mixed(problem) and geometry.decode_rows(problem) > tiling.MAX_DECODE_ROWS:
            assert_matches_reference(problem, backend.attention)
            seen += 1


def test_a_mixed_batch_of_more_sequences_than_one_block_of_lengths(
    device: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill tiles of many short chunks are more than its CTAs."""
    monkeypatch.setattr(launch, "FEW_SEQUENCES", 4)
    monkeypatch.setattr(launch, "MANY_SEQUENCES", 4)
    monkeypatch.setattr(plan_cache, "_entries", {})
    queries = [1, 40, 1, 1, 1, 1, 20, 21, 22, 1, 23]
    problem = _mixed_problem(device, queries, [n + 5 for n in queries])
    assert_matches_reference(problem, backend.attention)
    blocks = sum(-(-n // tiling.prefill_tiling(40, 32, 4).block_m) for n in queries if n > 8)
    grid = launch._plan_attention(plan_cache.signature_of(problem), True, "ieee", False, True).attend[-1].grid
    assert launches.kernels[-1] == "prefill"
    if device == "cpu":
        assert grid[1] < blocks


@pytest.mark.parametrize("queries", ([1, 1], [70, 70], [64, 5]), ids=str)
def test_an_even_batch_takes_one_kernel(device: str, launches: Launches, queries: list[int]) -> None:
    """All sequences decode, or shapes say that they are of one length; packed keys have no pages to split."""
    problem = _mixed_problem(device, queries, [80, 90])
    if max(queries) != min(queries):
        keys, offsets = torch.randn(2, 170, 2, 32, device=device), torch.tensor([0, 80, 170], dtype=torch.int32)
        problem = problem.replace(
            k=keys[0], v=keys[1], block_table=None, seqused_k=None, cu_seqlens_k=offsets.to(device)
        )  # fmt: skip
    assert_matches_reference(problem, backend.attention)
    assert launches.kernels == ["decode" if max(queries) == 1 else "prefill"]


def test_a_captured_mixed_batch_follows_its_lengths(device: str) -> None:
    """A graph replayed with other sequences decoding."""
    _on_gpu(device)
    options: dict[str, Any] = dict(width=64, dtype=torch.float16)
    problem = _mixed_problem(device, [1, 1, 1, 200], [1000, 30, 300, 200], **options)
    backend.attention(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = backend.attention(problem)
    for queries, keys in (
        ([200, 1, 1, 1], [900, 1, 40, 1000]),
        ([1, 100, 1, 101], [0, 100, 7, 700]),
        ([50, 51, 51, 51], [60] * 4),
    ):
        fresh = _mixed_problem(device, queries, keys, **options).replace(max_seqlen_q=200)

        def replay(new: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
            for mine, theirs in zip(problem.tensors, new.tensors):
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)
            graph.replay()
            return out, lse

        assert_matches_reference(fresh, replay)


# --------------------------------------------------------------------------------------------------------------------
# Wrong values
# --------------------------------------------------------------------------------------------------------------------


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, far from the ends of its memory."""
    if not tensor.numel():
        return tensor
    margin = 1 << 14
    extent = _elements(tensor)
    memory = torch.zeros(extent + 2 * margin, dtype=tensor.dtype, device=tensor.device)
    return memory[margin:].as_strided(tensor.shape, tensor.stride(), margin).copy_(tensor)


def _elements(tensor: torch.Tensor) -> int:
    """From its first element to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


@pytest.fixture
def only_in_bounds(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel touches memory outside of its tensors: seen in the interpreter; on a GPU, as far as the driver sees it.

    Under ``compute-sanitizer`` with PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own.
    """
    original = compiled.CompiledLaunch.__call__

    def watched(self, tensors, addresses):
        if device != "cpu":
            original(self, tensors, addresses)
            return
        given = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
        starts = torch.tensor([tensor.data_ptr() for tensor in given]).sort()
        ends = torch.tensor([t.data_ptr() + _elements(t) * t.element_size() for t in given])[starts.indices].cummax(0).values

        def check(accessed, written: bool) -> None:
            address = torch.from_numpy(accessed.astype("int64")).flatten()
            place = torch.searchsorted(starts.values, address, right=True) - 1
            inside = (place >= 0) & (address < ends[place.clamp(min=0)])
            verb = "writes" if written else "reads"
            if not inside.all():
                raise AssertionError(f"{self.kernel.__name__} {verb} outside of its tensors")

        with watch_accesses(check):
            original(self, tensors, addresses)

    monkeypatch.setattr(compiled.CompiledLaunch, "__call__", watched)
    yield
    if device != "cpu":
        torch.cuda.synchronize()


WRONG_LENGTHS = (-(2**31), -7, 5, 2**20, 2**31 - 1)


@pytest.mark.usefixtures("only_in_bounds", "combine_is")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_values_touch_no_memory_outside(rng: random.Random, rounds, device: str, layout: str) -> None:
    """Lengths and table entries that nobody checks on a GPU: one wrong value at a time, and all of a tensor."""
    conformance = BackendConformance()
    groups = (1, 3) if rounds(1) == 1 else GROUPS  # twenty query heads take the interpreter a minute a problem
    for _ in range(rounds(2)):
        options: dict[str, Any] = dict(layout=layout, groups=groups, max_queries=70, capabilities=backend.CAPABILITIES)
        problem = random_problem(rng, device=device, **options)
        wrong = list(conformance.with_one_value_changed(problem))
        for name, tensor in problem.named_fields().items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32:
                wrong += [problem.replace(**{name: torch.full_like(tensor, value)}) for value in WRONG_LENGTHS]
        for some in rng.sample(wrong, min(len(wrong), rounds(8))):
            guarded = some.map_tensors(_guarded)
            try:
                backend.attention(guarded)
                if guarded.append is not None:
                    backend.kv_write(guarded.write)
            except (AssertionError, InterpreterError) as error:
                values = {
                    n: t.tolist()
                    for n, t in some.named_fields().items()
                    if isinstance(t, torch.Tensor) and t.dtype == torch.int32
                }
                raise AssertionError(f"{error}: {describe(some)} {values}") from error


@pytest.mark.usefixtures("combine_is")
def test_results_are_the_same_every_time(device: str) -> None:
    problem = _decode_problem(device, [600, 300, 3])
    first, _ = backend.attention(problem)
    for _ in range(2):
        assert torch.equal(backend.attention(problem)[0], first)


@pytest.mark.parametrize("new_tokens", (1, 17))
@pytest.mark.parametrize("rotary", (False, True))
def test_kv_write(device: str, new_tokens: int, rotary: bool) -> None:
    problem = _decode_problem(device, [40, 15, 0, -1], append=True, width=6)
    assert problem.append is not None
    k_new, v_new = (new.expand(-1, new_tokens, -1, -1) for new in problem.append[:2])
    append = problem.append._replace(k_new=k_new, v_new=v_new)
    if not rotary:
        append = append._replace(rotary_cos=None, rotary_sin=None)
    write = CacheWrite.of(problem.cache, append)
    expected = write.map_tensors(torch.clone)
    backend.kv_write(write)
    reference.kv_write(expected)
    for got, want in zip(write.cache[:2], expected.cache[:2]):
        torch.testing.assert_close(got, want, equal_nan=True)


FORMATS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def _unpack(words, even, odd, FORMAT: tl.constexpr):
    at = tl.arange(0, 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    first, second = unpack(tl.load(words + at), FORMAT, even.dtype.element_ty)
    tl.store(even + at, first)
    tl.store(odd + at, second)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_word_of_two_elements(device: str, format: torch.dtype, dtype: torch.dtype) -> None:
    """NaN, infinity and the smallest numbers too."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    even, odd = (torch.empty(2**16, dtype=dtype, device=device) for _ in range(2))
    _unpack[(1,)](words, even, odd, str(format).removeprefix("torch."))
    want = words.view(format).float().to(dtype).view(-1, 2)
    torch.testing.assert_close(torch.stack((even, odd), 1), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "k_format, v_format, head_dim, reads_words",
    (
        *((format, format, 64, True) for format in FORMATS),
        (torch.int8, torch.float8_e5m2, 128, True),
        (torch.float8_e4m3fn, None, 96, True),
        (None, torch.int8, 32, True),
        (torch.int8, torch.int8, 16, False),  # half of a tile would be too narrow
        (torch.int8, torch.int8, 63, False),
    ),
    ids=str,
)
def test_formats_of_decode(
    device: str,
    k_format: torch.dtype | None,
    v_format: torch.dtype | None,
    head_dim: int,
    reads_words: bool,
    dtype: torch.dtype,
) -> None:
    """With a new token, which is appended as elements."""
    lengths = [1100, 3, 0, 64]
    problem = _decode_problem(device, lengths, append=True, head_dim=head_dim, dtype=dtype)
    for name, format in (("k", k_format), ("v", v_format)):
        if format is not None:
            keys = getattr(problem.cache, name)
            elements = (keys * 20).nan_to_num(7).to(format)
            scales = torch.full(keys.shape[:-1], torch.nan, device=device)
            scales[~keys[..., 0].isnan()] = 0.05
            problem = problem.replace(**{name: elements, f"{name}_descale": scales})
    assert_matches_reference(problem, backend.attention)
    planned = launch.problem_params(plan_cache.signature_of(problem), True, "ieee", None, False, words=True).cache
    names = [format and str(format).removeprefix("torch.") for format in (k_format, v_format)]
    in_words = [planned.K_WORDS, planned.V_WORDS]
    assert in_words == (names if reads_words else [None, None])


@pytest.mark.parametrize("queries", (1, 70))
@pytest.mark.parametrize(
    "head_dim, kv_heads, pieces", ((59, 2, 2), (59, 8, 4), (111, 8, 8), (36, 2, 8), (26, 4, 8), (59, 3, 1), (104, 2, 8))
)
def test_rows_that_do_not_begin_at_multiples_of_16_bytes(
    device: str, head_dim: int, kv_heads: int, pieces: int, queries: int
) -> None:
    """They are loaded in pieces of so many elements, with some of the heads beside theirs, which may be NaN."""
    lengths = [70, 3, 0, 33]
    problem = _decode_problem(
        device, lengths, append=queries == 1, heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16
    )
    if queries > 1:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(len(lengths), queries, 2 * kv_heads, head_dim, generator=generator).to(device, torch.bfloat16)
        problem = problem.replace(q=q, max_seqlen_q=queries)
    planned = launch.problem_params(plan_cache.signature_of(problem), True, "ieee", None, False).cache
    assert pieces == planned.k_strides.ALIGN
    assert_matches_reference(problem, backend.attention)

    def heads_of(problem: AttentionProblem) -> torch.Tensor:
        out, _ = backend.attention(problem.map_tensors(torch.clone))
        return out.unflatten(2, (kv_heads, 2))

    k, v = (cache.clone() for cache in problem.cache[:2])
    k[:, :, 1], v[:, :, 1] = torch.nan, torch.inf
    others = [head for head in range(kv_heads) if head != 1]
    assert heads_of(problem.replace(k=k, v=v))[:, :, others].equal(heads_of(problem)[:, :, others])


@pytest.mark.parametrize("queries, heads", ((4, 4), (16, 8), (16, 16)))
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decode_takes_several_queries_of_quantized_keys(
    device: str, launches: Launches, format: torch.dtype, queries: int, heads: int
) -> None:
    """Up to 16, in several tiles of rows if need be: ``prefill`` would convert keys and values one by one."""
    problem = _decode_problem(device, [70, 17, 300], heads=heads, kv_heads=2, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, queries, heads, 32, generator=generator).to(device, torch.bfloat16)
    k, v = ((cache * 20).nan_to_num(7).to(format) for cache in problem.cache[:2])
    scale = torch.tensor(0.05, device=device)
    problem = problem.replace(q=q, k=k, v=v, k_descale=scale, v_descale=scale.clone(), max_seqlen_q=queries)
    assert_matches_reference(problem, backend.attention)
    assert launches.kernels[0] == "decode"


def test_decode_takes_several_queries_of_few_work_tiles(device: str, launches: Launches) -> None:
    problem = _decode_problem(device, [300], heads=8, kv_heads=1, dtype=torch.bfloat16)
    q = torch.randn(1, 16, 8, 32, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    assert_matches_reference(problem.replace(q=q, max_seqlen_q=16), backend.attention)
    assert launches.kernels[0] == "decode"


def test_quantized_values_have_tiles_as_wide_as_keys(rng: random.Random, device: str) -> None:
    """On Hopper, narrower ones were wrong."""
    seen = 0
    while seen < 3:
        problem = random_problem(
            rng, layout="paged varlen", head_dims=(64,), max_queries=90, device=device, capabilities=backend.CAPABILITIES
        )
        if problem.cache.v_descale is not None and problem.cache.v.shape[-1] < 64:
            params = launch.problem_params(plan_cache.signature_of(problem), True, "ieee", None, False)
            assert params.cache.BLOCK_DV == params.cache.BLOCK_D == 64
            assert_matches_reference(problem, backend.attention)
            seen += 1


@pytest.mark.parametrize("cache", ("k_cache", "v_cache"))
def test_a_format_that_an_older_gpu_lacks_is_rejected(device: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compute_capability", lambda device: (8, 6))
    monkeypatch.setattr(plan_cache, "_entries", {})
    pages = dict.fromkeys(("k_cache", "v_cache"), torch.zeros(4, 16, 1, 32, device=device))
    table, lengths = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([[0, 1]], [3]))
    new = torch.ones(1, 1, 1, 32, device=device)
    scale = {f"{cache[0]}_descale": torch.ones((), device=device)}

    def in_format(dtype: torch.dtype) -> dict[str, Any]:
        return pages | {cache: torch.zeros(4, 16, 1, 32, device=device).to(dtype)} | scale

    expected = rf"{cache} is of dtype torch.float8_e4m3fn on a GPU of compute capability 8.6, expected torch.int8"
    with pagedflash.use_backend("triton"):
        e4m3 = in_format(torch.float8_e4m3fn)
        with pytest.raises(TypeError, match=expected):
            pagedflash.flash_attn_with_kvcache(new, **e4m3, k=new, v=new, cache_seqlens=lengths, block_table=table)
        with pytest.raises(TypeError, match=expected):
            pagedflash.kv_paged_write(new, new, **e4m3, block_table=table, seq_lens=lengths)
        assert not any(pages.float().any() for pages in (e4m3["k_cache"], e4m3["v_cache"]))
        for dtype in (torch.int8, torch.float8_e5m2):
            pagedflash.kv_paged_write(new, new, **in_format(dtype), block_table=table, seq_lens=lengths)


def test_records_have_the_tensors_of_a_problem_in_its_order() -> None:
    """The launcher hands them on by position."""
    of_problems = params.Tensors, params.BackwardTensors
    for record, problem in (*((record, AttentionProblem) for record in of_problems), (params.WriteTensors, CacheWrite)):
        names = tuple(field.name for field in problem.TENSOR_FIELDS)
        assert record._fields[: len(names)] == names
    assert AttentionProblem.TENSOR_FIELDS[WRITE] == CacheWrite.TENSOR_FIELDS


def test_no_kernel_or_device_function_has_more_than_20_parameters() -> None:
    functions = [
        function
        for module in pkgutil.iter_modules(kernels.__path__)
        for function in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values()
        if hasattr(function, "fn") and function.fn.__module__.startswith(kernels.__name__)
    ]
    assert {"decode", "combine", "prefill", "kv_write"} < {function.__name__ for function in functions}
    for function in functions:
        assert len(inspect.signature(function.fn).parameters) <= 20, function.__name__


def test_kernels_compile_without_a_gpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, Path(__file__).with_name("triton_compile.py")]
    command += ["--all"] if request.config.getoption("--nightly") else []
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = {"decode", "combine", "kv_write", "prefill", "row_gradients", "keys_backward", "queries_backward"}
    kernels |= {"prefill_hopper", "decode_hopper", "decode_rows_hopper"} if compiled.knows_gluon() else set()
    assert set(run.stdout.split()) == kernels


@pytest.mark.parametrize("row, taken", ((128, True), (136, True), (132, False), (130, False), (129, False)))
def test_prefill_on_hopper_takes_only_the_strides_of_tma(monkeypatch: pytest.MonkeyPatch, row: int, taken: bool) -> None:
    """Multiples of 16 bytes; in a cache of other strides rows are loaded in smaller pieces, which is the other kernel's."""
    monkeypatch.setattr(tiling, "has_hopper_kernels", lambda device: True)
    x = torch.zeros(1, 640, 2, row, dtype=torch.bfloat16)[..., :128]
    problem = AttentionProblem.of_fields(q=x, k=x, v=x, max_seqlen_q=640, max_seqlen_k=640)
    tile = tiling.hopper_tile(problem, launch.problem_params(problem, True, "ieee", None, False))
    assert (tile is not None) == taken


@pytest.mark.parametrize(
    "head_dim, parts",
    ((33, (64, 0)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (97, (128, 0)), (128, (128, 0)),
     (129, (128, 16)), (160, (128, 32)), (192, (128, 64)), (193, (256, 0)), (256, (256, 0))),
)  # fmt: skip
def test_parts_of_tiles_of_prefill_on_hopper(head_dim: int, parts: tuple[int, int]) -> None:
    assert tiling.hopper_widths(head_dim) == parts


def test_every_head_dim_of_prefill_on_hopper_has_a_shape() -> None:
    widths = {tiling.hopper_widths(head_dim) for head_dim in tiling.HOPPER_HEAD_DIMS}
    for of_keys in widths:
        for of_values in widths:
            assert any(tiling.fits_hopper(shape, *of_keys, *of_values) for shape in tiling.HOPPER_SHAPES if shape[0] == 64)


@pytest.mark.parametrize("layout", ("cache", "paged", "paged varlen"))
@pytest.mark.parametrize("head_dims", ((40, 40), (80, 80), (96, 64), (64, 192), (160, 160), (192, 128), (256, 72)), ids=str)
def test_prefill_on_hopper_of_every_width(
    rng: random.Random, rounds, device: str, launches: Launches, layout: str, head_dims: tuple[int, int]
) -> None:
    if device != "cuda" or not compiled.has_hopper_kernels(torch.device("cuda", 0)):
        pytest.skip("needs a Hopper GPU")
    taken = 0
    while taken < rounds(1):
        problem = random_problem(
            rng, dtype=rng.choice((torch.float16, torch.bfloat16)), layout=layout, head_dims=head_dims[:1],
            page_sizes=(16, 64, 256), max_queries=300, max_keys=900, device=device, capabilities=backend.CAPABILITIES,
        )  # fmt: skip
        v = problem.cache.v
        if v.dtype != problem.queries.q.dtype or problem.append is not None or problem.queries.max_seqlen_q <= 64:
            continue
        if v.shape[-1] != head_dims[1]:
            problem = problem.replace(v=torch.randn(*v.shape[:-1], head_dims[1], device=device, dtype=v.dtype))
        signature = plan_cache.signature_of(problem)
        if tiling.hopper_tile(signature, launch.problem_params(signature, True, "ieee", None, False)) is None:
            continue
        launches.kernels.clear()
        assert_matches_reference(problem, backend.attention)
        taken += launches.kernels[-1:] == ["prefill_hopper"]


@pytest.mark.parametrize(
    "change, taken",
    (
        ({}, True),
        (dict(page_size=16), True),
        (dict(page_size=None), True),
        (dict(page_size=8), False),
        (dict(dtype=torch.float32), False),
        (dict(queries=4), True),
    ),
    ids=str,
)
def test_mla_decode_on_hopper_takes_what_tma_loads(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], taken: bool
) -> None:
    monkeypatch.setattr(tiling, "has_hopper_kernels", lambda device: True)
    problem = _mla_problem("cpu", [70, 0], 16, **change)
    box = tiling.decode_box(problem, launch.problem_params(problem, True, "ieee", None, True))
    assert (box > 0) == taken
    assert tiling.decode_box(problem, launch.problem_params(problem, True, "ieee", None, False)) == 0, "V of its own"


@pytest.mark.parametrize(
    "change, rows, block_m, most_rows",
    (
        ({}, 64, 64, 128),
        ({}, 128, 128, 128),
        ({}, 16, None, 128),
        (dict(batch=2), 64, None, 64),
        (dict(batch=2, num_splits=3), 64, 64, 128),
        (dict(page_size=8), 64, None, 64),
        (dict(head_dim=256), 64, None, 64),
        (dict(dtype=torch.float32), 64, None, 64),
    ),
    ids=str,
)
def test_decode_on_hopper_takes_many_rows_of_many_work_tiles(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], rows: int, block_m: int | None, most_rows: int
) -> None:
    monkeypatch.setattr(tiling, "has_hopper_kernels", lambda device: True)
    options: dict[str, Any] = dict(batch=8, head_dim=128, page_size=16, dtype=torch.bfloat16, num_splits=0) | change
    batch, head_dim, dtype = options["batch"], options["head_dim"], options["dtype"]
    pages = torch.zeros(16, options["page_size"], 4, head_dim, dtype=dtype)
    problem = AttentionProblem.of_fields(
        q=torch.zeros(batch, rows // 4, 16, head_dim, dtype=dtype), k=pages, v=pages.clone(), max_seqlen_q=rows // 4,
        block_table=torch.zeros(batch, 128, dtype=torch.int32), seqused_k=torch.zeros(batch, dtype=torch.int32),
        max_seqlen_k=128 * options["page_size"], num_splits=options["num_splits"],
    )  # fmt: skip
    params = launch.problem_params(problem, True, "ieee", None, False)
    tile = tiling.rows_tile(problem, params, rows, 132)
    assert (tile and tile.block_m) == block_m
    assert tiling.decode_rows(problem, params, 132) == most_rows


class _Kernel:
    """Stands for a Triton kernel and what it is compiled to."""

    def __init__(self, run: object) -> None:
        self.ordinary: list[tuple[object, ...]] = []
        self.compiled = run

    fn = SimpleNamespace(__annotations__=dict(tensors=params.WriteTensors))

    def __getitem__(self, grid: object) -> Callable[..., object]:
        def launch_ordinarily(*arguments: object, **options: object) -> object:
            self.ordinary.append(arguments)
            return self.compiled

        return launch_ordinarily


_COUNT = len(params.WriteTensors._fields)
_TENSORS = tuple(torch.zeros(16 * _COUNT).split(16))
_STRIDES = params.Strides(64, 32, None, ALIGN=8, HEAD_ALIGN=8)
_SIZES = [8, 8, 8, 4, 8, 8]  # of the parameters of the compiled kernel below: two tensors, two strides, two of Triton's own


class _Driver(SimpleNamespace):
    """CUDA's, as far as a launch calls it; it knows parameters of some sizes."""

    def __init__(self, sizes: list[int], statuses: tuple[int, ...] = ()) -> None:
        super().__init__(sizes=sizes, statuses=list(statuses), seen=[])

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index]
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        config = config._obj
        values = [int.from_bytes(string_at(at, size), "little") for at, size in zip(parameters, self.sizes)]
        launched = [*config.grid, *config.block], config.shared_bytes, config.stream, config.num_attributes
        self.seen.append((*launched, function.value, values))
        return self.statuses.pop(0) if self.statuses else 0

    def cuDeviceGet(self, device, index):
        self.seen.append(("bind", index))
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuGetErrorName(self, status, name):
        name._obj.value = b"CUDA_ERROR_%d" % status


def _compiled(tensors: tuple[str, ...] = ("*fp32", "*bf16"), stride: str = "i32", **metadata: object) -> SimpleNamespace:
    pointers = params.WriteTensors(*tensors, *["constexpr"] * (_COUNT - len(tensors)))
    strides = params.Strides("i64", stride, *["constexpr"] * 3)
    tile = params.WriteTile("constexpr", "constexpr")
    known = dict(
        num_warps=4, num_ctas=1, shared=1024, launch_cooperative_grid=False, launch_pdl=True, global_scratch_size=0,
        tensordesc_meta=[],
    )  # fmt: skip
    return SimpleNamespace(
        src=SimpleNamespace(signature=dict(tensors=pointers, problem=strides, tile=tile)),
        metadata=SimpleNamespace(**(known | metadata)),
        function=11,
    )


def _launch_times(times: int, run: object, cuda: _Driver | None, monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    monkeypatch.setattr(compiled, "INTERPRETED", False)
    active = SimpleNamespace(get_current_stream=lambda index: 7 + index)
    monkeypatch.setattr(compiled.triton.runtime, "driver", SimpleNamespace(active=active))
    if cuda is not None:
        monkeypatch.setattr(driver, "driver", lambda: cuda)
    kernel = _Kernel(run)
    launched = compiled.CompiledLaunch(
        kernel, (5, 1, 2), _STRIDES, params.WriteTile(16, 32), torch.device("cuda", 0), aligned=True
    )
    for first in range(times):
        tensors = (*_TENSORS[first:], *_TENSORS[:first])
        launched(tensors, addresses_of(*tensors))
    return kernel


def test_what_the_first_launch_compiled_is_launched_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Driver(_SIZES)
    kernel = _launch_times(3, _compiled(), cuda, monkeypatch)
    [(tensors, strides, tile)] = kernel.ordinary
    assert tensors == params.WriteTensors(*_TENSORS)
    assert (strides.batch, strides.head, strides.ALIGN.value, tile.BLOCK_NEW.value) == (64, None, 8, 16)
    addresses = [tensor.data_ptr() for tensor in _TENSORS]
    launched = [5, 1, 2, 128, 1, 1], 1024, 7, 1, 11
    assert cuda.seen == [(*launched, [*addresses[i : i + 2], 64, 32, 0, 0]) for i in (1, 2)]


def test_descriptors_are_written_once_but_for_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Driver([*_SIZES[:4], 128, 4, 4, 8, 8, 8, 8])
    cuda.cuTensorMapEncodeTiled = lambda at, *about: memmove(at, b"%dD map" % about[1], 6) and 0
    cuda.cuTensorMapReplaceAddress = lambda at, address: memmove(at + 8, address.to_bytes(8, "little"), 8)
    monkeypatch.setattr(driver, "driver", lambda: cuda)
    one = _compiled(tensordesc_meta=[dict(elem_size=2, block_size=[16, 64], swizzle=3)])
    one.src.signature["k_tiles"] = "tensordesc<bf16[16, 64]>"
    maps = [driver.MapShape(1, 9, [100, 64], [256, 1])]
    described = driver.DriverLaunch(one, 0, (1, 1, 1), (_STRIDES, params.WriteTile(16, 32)), maps)
    for tensors in (_TENSORS, _TENSORS[::-1]):
        described(addresses_of(*tensors), 7)
        values = cuda.seen.pop()[-1]
        assert values[:4] == [tensors[0].data_ptr(), tensors[1].data_ptr(), 64, 32]
        assert values[4] == int.from_bytes(b"2D map\0\0", "little") + (tensors[1].data_ptr() << 64)
        assert values[5:] == [100, 64, 256, 1, 0, 0]


def test_a_thread_that_has_no_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Driver(_SIZES, statuses=(driver.INVALID_CONTEXT, 0, 0))
    _launch_times(3, _compiled(), cuda, monkeypatch)
    assert [seen[0] == "bind" for seen in cuda.seen] == [False, True, False, False]


def test_a_launch_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="refused a launch: CUDA_ERROR_700"):
        _launch_times(2, _compiled(), _Driver(_SIZES, statuses=(700,)), monkeypatch)


@pytest.mark.parametrize(
    "run, sizes, why",
    (
        (_compiled(), [*_SIZES, 8], "its parameters are others"),
        (_compiled(), _SIZES[:-1], "its parameters are others"),
        (_compiled(), [8, 8, 8, 8, 8, 8], "its parameters are others"),
        (_compiled(stride="fp16"), _SIZES, "a parameter of type fp16"),
        (_compiled(num_ctas=2), _SIZES, "clusters"),
        (_compiled(global_scratch_size=64), _SIZES, "scratch memory"),
        (_compiled(), None, "CUDA's driver, 12.4 or newer, cannot be had"),
    ),
)
def test_an_unknown_kernel_takes_the_launch_of_triton(
    run: object, sizes: list[int] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sizes is None:
        monkeypatch.setattr(driver, "CDLL", lambda name: SimpleNamespace())
        driver.driver.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"costs more of the host's time: .*{why}"):
        kernel = _launch_times(3, run, None if sizes is None else _Driver(sizes), monkeypatch)
    assert len(kernel.ordinary) == 3


def test_dispatch_runs_it(device: str) -> None:
    q, k, v = (torch.randn(1, 9, 2, 32, device=device) for _ in range(3))
    with pagedflash.use_backend("triton"), pagedflash.count_calls() as calls:
        pagedflash.flash_attn_func(q, k, v)
    assert calls == {pagedflash.CallKind("dense", "triton", device): 1}


def test_semaphores_of_captured_calls_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(semaphores, "_reserves", {None: torch.zeros(100, dtype=torch.int32)})
    monkeypatch.setattr(semaphores, "_captured", [])
    first, second, beyond = (semaphores._for_capture(cpu, 40) for _ in range(3))
    first += 1
    assert [len(some) for some in (first, second, beyond)] == [40] * 3
    assert not second.any() and not beyond.any()
    semaphores._reserves.clear()  # as when it is filled again
    assert [some.data_ptr() for some in semaphores._captured] == [first.data_ptr(), second.data_ptr()]


def _on_gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")


def test_a_captured_graph_follows_lengths_tables_and_contents(device: str) -> None:
    _on_gpu(device)
    problem = _decode_problem(device, [40, 300, 0, 77], width=64, append=True, dtype=torch.float16)
    backend.attention(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = backend.attention(problem)

    for lengths in ([1023, 0, 17, 256], [3, -1, 1000, 0], [500, 500, 500, 500]):
        fresh = _decode_problem(device, [max(n, 0) for n in lengths], width=64, append=True, dtype=torch.float16)
        assert fresh.cache.seqused_k is not None
        fresh.cache.seqused_k.copy_(torch.tensor(lengths))

        def replay(new: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
            for mine, theirs in zip(problem.tensors, new.tensors):
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)
            graph.replay()
            new.cache.k.copy_(problem.cache.k)
            new.cache.v.copy_(problem.cache.v)
            return out, lse

        assert_matches_reference(fresh, replay)


def test_calls_at_the_same_time_share_no_semaphores(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls on several streams, and graphs captured on one stream but replayed on several."""
    _on_gpu(device)
    _reduce_up_to(2**20, monkeypatch)
    problem = _decode_problem(device, [3000, 600, 5], dtype=torch.float16)
    want, _ = backend.attention(problem)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(4)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(backend.attention(problem)[0])
    streams = [torch.cuda.Stream() for _ in range(8)]
    for _ in range(50):
        eager = []
        for graph, replaying, calling in zip(graphs, streams[::2], streams[1::2]):
            with torch.cuda.stream(replaying):
                graph.replay()
            with torch.cuda.stream(calling):
                eager.append(backend.attention(problem)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in (*outs, *eager))


def test_captured_calls_do_without_the_reserve(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_gpu(device)
    _reduce_up_to(2**20, monkeypatch)
    problem = _decode_problem(device, [3000, 600, 5], dtype=torch.float16)
    want, _ = backend.attention(problem)
    monkeypatch.setattr(semaphores, "_reserves", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = backend.attention(problem)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


def test_nothing_waits_for_the_device(device: str) -> None:
    _on_gpu(device)
    decode = _decode_problem(device, [40, 300], append=True, dtype=torch.float16)
    prefill = decode.replace(q=decode.queries.q.expand(-1, 200, -1, -1).contiguous(), max_seqlen_q=200)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem in (decode, prefill):
            backend.attention(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_64_bit_offsets(device: str) -> None:
    """Pages more than 2^31 elements into the cache."""
    _on_gpu(device)
    pages = torch.zeros(2**31 // (256 * 128) + 8, 256, 1, 128, dtype=torch.float16, device=device)
    problem = _decode_problem(device, [600], page_size=256, heads=4, kv_heads=1, head_dim=128, dtype=torch.float16)
    want, _ = backend.attention(problem)
    k, v, table = problem.cache.k, problem.cache.v, problem.cache.block_table
    assert table is not None
    far = pages.shape[0] - k.shape[0]
    pages[far:] = k
    moved = problem.replace(k=pages, v=pages.clone(), block_table=table + far)
    moved.cache.v[far:] = v
    assert torch.equal(backend.attention(moved)[0], want)
    prompt = problem.queries.q.expand(-1, 100, -1, -1).contiguous()
    near, distant = (backend.attention(p.replace(q=prompt, max_seqlen_q=100))[0] for p in (problem, moved))
    assert torch.equal(near, distant)


def test_a_triton_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.5 compiles constants in a record to None."""
    import triton

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    support = backend.available.__wrapped__()
    assert (
        not support.ok and "Triton 3.5.1 is too old" in support.reason and support.reason.endswith("install 3.6.0 or newer")
    )
    monkeypatch.setattr(triton, "__version__", "3.6.0+git1")
    assert backend.available.__wrapped__().ok
