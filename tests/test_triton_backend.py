"""The Triton kernels against the reference.

On any machine they run through Triton's interpreter, on a GPU with ``pytest --device cuda``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton_interpreter  # noqa: F401
from cases import LAYOUTS, assert_matches_reference, random_call

import pagedflash
from pagedflash.backends import triton as backend
from pagedflash.backends.triton import compiled, launch, semaphores, tiling
from pagedflash.call import AttentionCall


@pytest.fixture(params=("a stage", "a kernel"))
def combine_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether splits are reduced in ``decode``, or by a kernel of its own."""
    _reduce_up_to(2**20 if request.param == "a stage" else 0, monkeypatch)
    return request.param


def _reduce_up_to(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``decode`` itself reduce up to so many splits of a work tile."""
    monkeypatch.setattr(launch, "MAX_FUSED_SPLITS", splits)
    monkeypatch.setattr("pagedflash.call._kept", {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("combine_is")
def test_all_options(rng: random.Random, rounds, device: str, layout: str) -> None:  # type: ignore[no-untyped-def]
    for _ in range(rounds(2)):
        assert_matches_reference(random_call(rng, layout=layout, device=device), backend.attention)


@dataclass
class Launches:
    kernels: list[str]
    ctas: list[int]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The kernels launched while the test runs, and the size of their grids."""
    seen = Launches([], [])
    original = compiled.CompiledLaunch.__call__

    def spy(self, tensors, addresses):  # type: ignore[no-untyped-def]
        seen.kernels.append(self.kernel.__name__)
        seen.ctas.append(self.grid[0])
        original(self, tensors, addresses)

    monkeypatch.setattr(compiled.CompiledLaunch, "__call__", spy)
    yield seen


def _decode_call(device: str, lengths: list[int], *, page_size: int = 16, width: int | None = None, append: bool = False,
                 heads: int = 4, kv_heads: int = 2, head_dim: int = 32, window_left: int = -1,
                 dtype: torch.dtype = torch.float32) -> AttentionCall:  # fmt: skip
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
    fields: dict[str, object] = dict.fromkeys(AttentionCall._fields)
    fields |= dict(
        q=normal(batch, 1, heads, head_dim), k=k, v=v, seqused_k=torch.tensor(lengths, dtype=torch.int32), block_table=table,
        max_seqlen_q=1, max_seqlen_k=width * page_size, scale=0.2, window_left=window_left, window_right=0, softcap=0.0,
        rotary_interleaved=False, num_splits=0,
    )  # fmt: skip
    if append:
        fields |= dict(
            k_new=normal(batch, 1, kv_heads, head_dim), v_new=normal(batch, 1, kv_heads, head_dim),
            rotary_cos=angles.cos().to(dtype), rotary_sin=angles.sin().to(dtype),
        )  # fmt: skip
    return AttentionCall(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in fields.values()))  # type: ignore[arg-type]


def kernels_of_split_keys(combine_is: str) -> list[str]:
    return ["decode"] if combine_is == "a stage" else ["decode", "combine"]


def test_one_long_sequence_is_split_over_all_ctas(device: str, launches: Launches, combine_is: str) -> None:
    call = _decode_call(device, [1100, 3, 0])
    assert_matches_reference(call, backend.attention)
    chosen = tiling.decode_tiling(2, 32, 4)
    assert launches.kernels == kernels_of_split_keys(combine_is)
    assert launches.ctas[:1] == [compiled.num_sms(call.q.device) * chosen.ctas_per_sm]
    tiles_of_the_long_one = -(-1100 // chosen.block_n)
    assert tiles_of_the_long_one > 2, "the premise: it has KV tiles for more than one CTA"


@pytest.mark.usefixtures("combine_is")
@pytest.mark.parametrize("last", (1100, 70), ids=("alike", "unlike"))
def test_as_many_work_tiles_as_ctas(device: str, launches: Launches, last: int) -> None:
    """Alike, each has a CTA to itself, which stores its output; else some are split."""
    ctas = compiled.num_sms(torch.device(device)) * tiling.decode_tiling(2, 64, 4).ctas_per_sm
    call = _decode_call(device, [1100] * (ctas // 2 - 1) + [last], head_dim=64)
    assert_matches_reference(call, backend.attention)
    assert launches.ctas[0] == ctas == call.batch_size * call.k.shape[-2]


def test_one_cta_takes_each_of_many_short_work_tiles(device: str, launches: Launches) -> None:
    sms = compiled.num_sms(torch.device(device))
    assert_matches_reference(_decode_call(device, [700] + [20] * (sms // 2)), backend.attention)
    assert launches.kernels == ["decode"]


@pytest.mark.parametrize("num_splits", (1, 3))
def test_num_splits_sets_the_number_of_ctas(device: str, launches: Launches, num_splits: int, combine_is: str) -> None:
    call = _decode_call(device, [700, 700])._replace(num_splits=num_splits)
    assert_matches_reference(call, backend.attention)
    assert launches.kernels == (["decode"] if num_splits == 1 else kernels_of_split_keys(combine_is))
    assert launches.ctas[0] == 2 * 2 * num_splits


@pytest.mark.parametrize("lengths", ([33, 1100], [33, 50]), ids=str)
def test_append_rotary_and_decode_take_at_most_two_launches(
    device: str, launches: Launches, lengths: list[int], combine_is: str
) -> None:
    assert_matches_reference(_decode_call(device, lengths, append=True), backend.attention)
    assert launches.kernels == (["decode"] if max(lengths) < 100 else kernels_of_split_keys(combine_is))


def test_semaphores_are_put_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _reduce_up_to(2**20, monkeypatch)
    given: list[torch.Tensor] = []

    def watched(*arguments: Any) -> torch.Tensor:
        given.append(semaphores.semaphores(*arguments))
        return given[-1]

    monkeypatch.setattr(launch, "semaphores", watched)
    assert_matches_reference(_decode_call(device, [1100, 3, 0, 600]), backend.attention)
    assert given and not any(some.any() for some in given)


def test_more_sequences_than_one_block_of_lengths(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FEW_SEQUENCES", 4)
    monkeypatch.setattr(launch, "MANY_SEQUENCES", 4)
    monkeypatch.setattr("pagedflash.call._kept", {})
    assert_matches_reference(_decode_call(device, [5, 0, 70, 1, 9, 33, 200, 2, 0, 64, 17], heads=2), backend.attention)


@pytest.mark.parametrize("queries", (1, 90))
def test_keys_left_of_the_window_are_not_touched(device: str, launches: Launches, queries: int, combine_is: str) -> None:
    """They are NaN here: read, they would show, since 0 x NaN is NaN."""
    call = _decode_call(device, [1100], window_left=20)
    q = torch.randn(1, queries, 4, 32).to(device)
    call = call._replace(q=q, max_seqlen_q=queries)
    out, _ = backend.attention(call)
    seen_from = 1100 - queries - 20
    for token in range(seen_from):
        page = int(call.block_table[0, token // 16])  # type: ignore[index]
        call.k[page, token % 16] = torch.nan
        call.v[page, token % 16] = torch.nan
    again, _ = backend.attention(call)
    assert launches.kernels == (kernels_of_split_keys(combine_is) if queries == 1 else ["prefill"]) * 2
    assert torch.equal(out, again)


@pytest.mark.usefixtures("combine_is")
def test_results_are_the_same_every_time(device: str) -> None:
    call = _decode_call(device, [600, 300, 3])
    first, _ = backend.attention(call)
    for _ in range(2):
        assert torch.equal(backend.attention(call)[0], first)


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
    call = _decode_call(device, [40, 300, 0, 77], width=64, append=True, dtype=torch.float16)
    backend.attention(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = backend.attention(call)

    for lengths in ([1023, 0, 17, 256], [3, -1, 1000, 0], [500, 500, 500, 500]):
        fresh = _decode_call(device, [max(n, 0) for n in lengths], width=64, append=True, dtype=torch.float16)
        assert fresh.seqused_k is not None
        fresh.seqused_k.copy_(torch.tensor(lengths))

        def replay(new: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
            for mine, theirs in zip(call, new):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(theirs)
            graph.replay()
            new.k.copy_(call.k)
            new.v.copy_(call.v)
            return out, lse

        assert_matches_reference(fresh, replay)


def test_calls_at_the_same_time_share_no_semaphores(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls on several streams, and graphs captured on one stream but replayed on several."""
    _on_gpu(device)
    _reduce_up_to(2**20, monkeypatch)
    call = _decode_call(device, [3000, 600, 5], dtype=torch.float16)
    want, _ = backend.attention(call)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(4)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(backend.attention(call)[0])
    streams = [torch.cuda.Stream() for _ in range(8)]
    for _ in range(50):
        eager = []
        for graph, replaying, calling in zip(graphs, streams[::2], streams[1::2]):
            with torch.cuda.stream(replaying):
                graph.replay()
            with torch.cuda.stream(calling):
                eager.append(backend.attention(call)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in (*outs, *eager))


def test_captured_calls_do_without_the_reserve(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_gpu(device)
    _reduce_up_to(2**20, monkeypatch)
    call = _decode_call(device, [3000, 600, 5], dtype=torch.float16)
    want, _ = backend.attention(call)
    monkeypatch.setattr(semaphores, "_reserves", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = backend.attention(call)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


def test_nothing_waits_for_the_device(device: str) -> None:
    _on_gpu(device)
    decode = _decode_call(device, [40, 300], append=True, dtype=torch.float16)
    prefill = decode._replace(q=decode.q.expand(-1, 200, -1, -1).contiguous(), max_seqlen_q=200)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in (decode, prefill):
            backend.attention(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_64_bit_offsets(device: str) -> None:
    """Pages more than 2^31 elements into the cache."""
    _on_gpu(device)
    pages = torch.zeros(2**31 // (256 * 128) + 8, 256, 1, 128, dtype=torch.float16, device=device)
    call = _decode_call(device, [600], page_size=256, heads=4, kv_heads=1, head_dim=128, dtype=torch.float16)
    want, _ = backend.attention(call)
    far = pages.shape[0] - call.k.shape[0]
    pages[far:] = call.k
    moved = call._replace(k=pages, v=pages.clone(), block_table=call.block_table + far)  # type: ignore[operator]
    moved.v[far:] = call.v
    assert torch.equal(backend.attention(moved)[0], want)
    prompt = call.q.expand(-1, 100, -1, -1).contiguous()
    near, distant = (backend.attention(c._replace(q=prompt, max_seqlen_q=100))[0] for c in (call, moved))
    assert torch.equal(near, distant)
