"""The Triton backend on a CUDA GPU, bf16, beside its peers: FlashInfer, FlashAttention 2, 3 and 4, and vLLM's kernels.

Device times are medians over replays of a CUDA graph that holds one call, with a cold L2 cache. Bandwidths count every key
and value read once, against a plain sum over 2 GiB. Peers that are not installed are left out, and it is said.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clocks import GraphClock, HostClock
from benchmarks.gradients import with_gradients
from benchmarks.suite import Figures, Options, Row, compared, measure, suite, that_run
from pagedflash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from pagedflash.cli import baselines
from pagedflash.cli.baselines import flashinfer, sdpa
from pagedflash.cli.baselines.packed import PackedProblem, on_pages, prompts
from pagedflash.cli.bench import OURS, Shape, pagedflash_decode
from pagedflash.cli.measure import Contender
from pagedflash.testing import PagedProblem, paged_problem

DTYPE, DEVICE = torch.bfloat16, "cuda"
HEADS = (32, 8)  # of prefill
PACKED = ([4096, 2048, 1024, 512, 512], [300, 5000, 17, 1200, 64, 1611])  # lengths of packed prompts


def no_cuda() -> str:
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def shape(heads: tuple[int, int], head_dim: int = 128, page_size: int = 16) -> Shape:
    return Shape(heads, head_dim, page_size, DTYPE)


def ragged(batch: int, longest: int) -> list[int]:
    """Lengths from an eighth of the longest to the longest, spread evenly, shuffled by a stride."""
    low = longest // 8
    return [low + (longest - low) * ((i * 7) % batch) // max(batch - 1, 1) for i in range(batch)]


DECODE: list[tuple[Shape, list[int]]] = [
    (shape((32, 8)), [4096] * 8),
    (shape((32, 8)), [8192]),
    (shape((32, 8)), [65536]),
    (shape((32, 8)), [4096] * 32),
    (shape((32, 8)), ragged(32, 4473)),
    (shape((16, 16)), [50] * 4),
]
SPECULATIVE = [
    (shape(heads), [context] * batch, queries)
    for heads, batch, context in (
        ((32, 8), 1, 8192),
        ((32, 8), 8, 4096),
        ((32, 8), 32, 4096),
        ((64, 8), 8, 8192),
        ((8, 1), 1, 131072),
    )
    for queries in (2, 4, 8, 16)
]


def grid() -> list[tuple[Shape, list[int]]]:
    """Batches, contexts, heads and head dims crossed, less what needs more than 4 GiB of keys and values."""
    found = []
    for batch in (1, 8, 32, 128):
        for context in (512, 4096, 65536):
            for heads in ((32, 8), (64, 8), (16, 16), (9, 3)):
                for head_dim in (64, 128, 256):
                    page_size = 16 if (batch + context // 512 + heads[0] + head_dim // 64) % 2 else 256
                    lengths = ragged(batch, context) if heads[0] in (64, 9) and batch > 1 else [context] * batch
                    case = shape(heads, head_dim, page_size)
                    if sum(lengths) * case.token_bytes <= 2**32:
                        found.append((case, lengths))
    return found


def decode_case(case: Shape, lengths: list[int]) -> str:
    least, most = min(lengths), max(lengths)
    context = f"{most}" if least == most else f"{least}..{most}"
    return f"B={len(lengths)} {case.heads[0]}/{case.heads[1]} D={case.head_dim} {context} page {case.page_size}"


def paged(case: Shape, lengths: list[int], num_queries: int = 1) -> PagedProblem:
    return paged_problem(lengths, **case._asdict(), num_queries=num_queries, device=DEVICE)


def decode_peers(problem: PagedProblem) -> dict[str, Contender]:
    return that_run((baselines.cuda_decode if problem.q.shape[1] == 1 else baselines.cuda_speculative)(problem))


def prefill_peers(problem: PackedProblem) -> dict[str, Contender]:
    peers = baselines.cuda_prefill(problem)
    if len(problem.lengths_q) < 10:  # SDPA takes them one by one
        where = "" if problem.block_table is None else " on contiguous keys"
        peers[f"SDPA flash{where}"] = partial(sdpa.one_kernel, problem, SDPBackend.FLASH_ATTENTION)
        if problem.lengths_q == problem.lengths_k:
            peers[f"cuDNN{where}"] = partial(sdpa.one_kernel, problem, SDPBackend.CUDNN_ATTENTION)
    return that_run(peers)


def read_bandwidth(clock: GraphClock, options: Options) -> float:
    """Bytes a second."""
    values, total = torch.randn(options.size(2**29, 2**24), device=DEVICE), torch.empty((), device=DEVICE)
    run = Contender(lambda: torch.sum(values, 0, out=total), output=None)
    return 4 * values.numel() / measure({"sum": run}, options.rounds_or(30), clock).median("sum")


def limits(bandwidth: float, clock: GraphClock, options: Options) -> Row:
    one = torch.empty(1, device=DEVICE)
    empty = measure({"empty": Contender(one.zero_, output=None)}, options.rounds_or(30), clock).median("empty")
    return Row("limits", {"read bandwidth, TB/s": bandwidth / 1e12, "graph of one tiny kernel, us": 1e6 * empty})


@suite("cuda-decode", needs=no_cuda)
def decode(options: Options) -> Iterator[Row]:
    """Paged decode: of read bandwidth, and beside its peers; L2 filled by reading, then by writing"""
    for written in (False, True):
        clock = GraphClock(written)
        bandwidth = read_bandwidth(clock, options)
        yield limits(bandwidth, clock, options)
        for case, lengths in options.size(DECODE, DECODE[-1:]):
            name = decode_case(case, lengths) + (", L2 written" if written else "")
            yield decode_row(name, paged(case, lengths), bandwidth, options.rounds_or(30), clock)


def decode_row(name: str, problem: PagedProblem, bandwidth: float, rounds: int, clock: GraphClock) -> Row:
    torch.cuda.empty_cache()
    contenders = {OURS: pagedflash_decode(problem), **decode_peers(problem)}
    measured = measure({name: with_packed_output(each) for name, each in contenders.items()}, rounds, clock)
    share = problem.cache_bytes / measured.median(OURS) / bandwidth
    return compared(name, measured, "us", {"KV MB": problem.cache_bytes / 1e6, "of read bandwidth": share})


def with_packed_output(contender: Contender) -> Contender:
    """``(B * Sq, Hq, D)`` of a contender that gives ``(B, Sq, Hq, D)`` or that."""
    output = contender.output
    assert output is not None
    return contender._replace(output=lambda result: output(result).flatten(0, -3))


@suite("cuda-quantized", needs=no_cuda)
def quantized(options: Options) -> Iterator[Row]:
    """Paged decode of int8 and fp8 caches, beside the same in bf16 and FlashInfer's on e4m3: how often the time of bf16"""
    clock, case = GraphClock(), shape((32, 8))
    for batch in options.size((8, 16, 32, 64), (2,)):
        torch.cuda.empty_cache()
        problem = paged(case, [options.size(4096, 64)] * batch)
        contenders = {OURS: pagedflash_decode(problem)}
        for dtype, per_token in FORMATS:
            name = str(dtype).removeprefix("torch.") + (", a scale a token and head" if per_token else "")
            contenders[name] = quantized_decode(in_format(problem, dtype), per_token)
        e4m3 = in_format(problem, torch.float8_e4m3fn)
        peers: dict[str, Callable[[], Contender]] = {
            f"FlashInfer e4m3, {variant}": partial(flashinfer.decode, e4m3, variant) for variant in ("CUDA cores", "fa2")
        }
        contenders |= {name: peer._replace(output=None) for name, peer in that_run(peers).items()}
        measured = measure(contenders, options.rounds_or(30), clock)
        figures: Figures = {"KV MB in bf16": problem.cache_bytes / 1e6, "bf16 us": 1e6 * measured.median(OURS)}
        for name in contenders:
            if name != OURS:
                figures |= {f"{name} us": 1e6 * measured.median(name), f"x of {name}": measured.ratio(OURS, name)}
        yield Row(decode_case(case, problem.cache_seqlens.tolist()), figures, (), measured.seconds)


FORMATS = ((torch.int8, False), (torch.int8, True), (torch.float8_e4m3fn, False), (torch.float8_e5m2, False))
"""Formats, and whether there is a scale for each token and head."""

UNITS = {torch.int8: 32.0}
"""What a 1 is in a format, where it is not 1."""


def in_format(problem: PagedProblem, dtype: torch.dtype) -> PagedProblem:
    k_cache, v_cache = ((cache * UNITS.get(dtype, 1.0)).to(dtype) for cache in problem[1:3])
    return problem._replace(k_cache=k_cache, v_cache=v_cache)


def quantized_decode(problem: PagedProblem, per_token: bool) -> Contender:
    k_cache = problem.k_cache
    scale = torch.full(k_cache.shape[:-1] if per_token else (), 1 / UNITS.get(k_cache.dtype, 1.0), device=DEVICE)
    arguments: Any = problem._asdict() | dict(k_descale=scale, v_descale=scale.clone(), causal=True)
    return Contender(partial(flash_attn_with_kvcache, **arguments), output=None)


@suite("cuda-speculative", needs=no_cuda)
def speculative(options: Options) -> Iterator[Row]:
    """Paged decode of 2 to 16 tokens a sequence, beside its peers"""
    cases = options.size(SPECULATIVE, SPECULATIVE[:1])
    compile_ahead(cases)
    clock = GraphClock()
    bandwidth = read_bandwidth(clock, options)
    for case, lengths, queries in cases:
        name = f"{decode_case(case, lengths)}, {queries} tokens"
        yield decode_row(name, paged(case, lengths, queries), bandwidth, options.rounds_or(30), clock)


@suite("cuda-head-dims", needs=no_cuda)
def head_dims(options: Options) -> Iterator[Row]:
    """Paged decode of wide heads, and of odd ones beside the next multiple of 8: of read bandwidth"""
    clock, rounds = GraphClock(), options.rounds_or(30)
    bandwidth = read_bandwidth(clock, options)
    yield limits(bandwidth, clock, options)
    batch, context = options.size((32, 4096), (2, 64))

    for head_dim in (256, 512, 26, 32, 36, 40, 59, 63, 64, 100, 104, 111, 112, 127, 128):
        heads = (16, 4) if head_dim >= 256 else (32, 8)
        problem = paged(shape(heads, head_dim), [context] * batch)
        measured = measure({OURS: pagedflash_decode(problem)}, rounds, clock)
        share = problem.cache_bytes / measured.median(OURS) / bandwidth
        figures = {"KV MB": problem.cache_bytes / 1e6, "of read bandwidth": share}
        yield compared(f"{heads[0]}/{heads[1]} D={head_dim}", measured, "us", figures)


@suite("cuda-mla", needs=no_cuda)
def mla(options: Options) -> Iterator[Row]:
    """Decode of MLA, keys of 576 whose first 512 are the values, on pages of 64: beside FlashInfer's"""
    clock, rounds = GraphClock(), options.rounds_or(30)
    bandwidth = read_bandwidth(clock, options)
    yield limits(bandwidth, clock, options)
    batch, context = options.size((32, 4096), (2, 64))
    even, single = [context] * batch, [batch // 2 * context]
    for q_heads, lengths, queries in ((16, even, 1), (64, even, 1), (128, even, 1), (128, single, 1), (128, even, 4)):
        layout: Any = dict(heads=(q_heads, 1), page_size=64, dtype=DTYPE, device=DEVICE, mla=True)
        problem = paged_problem(lengths, num_queries=queries, **layout)
        contenders = {OURS: pagedflash_decode(problem), **that_run(baselines.cuda_mla(problem))}
        measured = measure({name: with_packed_output(each) for name, each in contenders.items()}, rounds, clock)
        seconds, pairs = measured.median(OURS), queries * q_heads * sum(lengths)
        operations = 2 * pairs * (problem.q.shape[-1] + problem.v_cache.shape[-1])
        figures = {"KV MB": problem.cache_bytes / 1e6, "TFLOP/s": operations / seconds / 1e12}
        name = f"{q_heads} heads, {len(lengths)} x {lengths[0]}" + (f", {queries} tokens" if queries > 1 else "")
        yield compared(name, measured, "us", figures | {"of read bandwidth": problem.cache_bytes / seconds / bandwidth})


@suite("cuda-grid", needs=no_cuda)
def grid_of_decode(options: Options) -> Iterator[Row]:
    """Paged decode over batches, contexts, heads and head dims crossed: least and geometric mean of each group"""
    cases = options.size(grid(), random.Random(0).sample(grid(), 4))
    compile_ahead([(case, lengths, 1) for case, lengths in cases])
    clock = GraphClock()
    bandwidth = read_bandwidth(clock, options)
    rows = []
    for case, lengths in cases:
        row = decode_row(decode_case(case, lengths), paged(case, lengths), bandwidth, options.rounds_or(30), clock)
        rows.append((case, row))
        yield row
    yield from summary(rows)


def compile_ahead(cases: list[tuple[Shape, list[int], int]]) -> None:
    """In processes of their own: the compiled kernels stay in Triton's cache on disk."""
    with multiprocessing.get_context("spawn").Pool(min(len(cases), os.cpu_count() or 1)) as pool:
        pool.starmap(compile_one, cases, 1)


def compile_one(case: Shape, lengths: list[int], queries: int) -> None:
    """With shorter sequences, and as many pages modulo 16: Triton tells numbers that are divisible by it from others."""
    torch.set_num_threads(1)
    page_size, shorter = case.page_size, lengths
    if min(lengths) >= 32 * page_size:
        pages = sum(-(-length // page_size) for length in lengths)
        shorter = [16 * page_size] * (len(lengths) - 1) + [(16 + pages % 16) * page_size]
    problem = paged(case, shorter, queries)
    width = -(-max(lengths) // page_size)
    table = torch.nn.functional.pad(problem.block_table, (0, width - problem.block_table.shape[1]))
    pagedflash_decode(problem._replace(block_table=table)).run()


def summary(rows: list[tuple[Shape, Row]]) -> Iterator[Row]:
    """The rows of decode, grouped by size and by head dim."""
    groups: dict[str, Callable[[Shape, Row], bool]] = {"all": lambda case, row: True}
    for low, high in ((0, 30), (30, 134), (134, 500), (500, 5000)):
        groups[f"{low} to {high} MB"] = lambda case, row, low=low, high=high: low <= row.figures["KV MB"] < high  # type: ignore[misc]
    for head_dim in (64, 128, 256):
        groups[f"D={head_dim}"] = lambda case, row, head_dim=head_dim: case.head_dim == head_dim  # type: ignore[misc]
    columns = dict.fromkeys(
        column for _, row in rows for column in row.figures if column == "of read bandwidth" or column.startswith("x ")
    )
    for name, belongs in groups.items():
        inside = [row for case, row in rows if belongs(case, row)]
        figures: Figures = {"shapes": len(inside)}
        for column in columns:
            values = [row.figures[column] for row in inside if column in row.figures]
            mean = math.exp(statistics.fmean(map(math.log, values))) if values else math.nan
            figures |= {f"{column}, least": min(values, default=math.nan), f"{column}, mean": mean}
        yield Row(name, figures)


@suite("cuda-prefill", needs=no_cuda)
def prefill(options: Options) -> Iterator[Row]:
    """Causal prompts, dense, packed and on pages, and chunks, beside SDPA's kernels and its peers"""
    clock, rounds = GraphClock(), options.rounds_or(10)
    dense = ((8192, 128), (2048, 128), (512, 128), (8192, 64), (8192, 80), (8192, 96), (8192, 192), (8192, 256))
    for tokens, head_dim in options.size(dense, ((256, 64),)):
        yield prefill_row(f"dense {tokens} D={head_dim}", prompts([tokens], HEADS, head_dim, DTYPE, DEVICE), rounds, clock)
    for tokens, head_dim, v_head_dim in options.size(((8192, 192, 128),), ((256, 96, 64),)):
        problem = prompts([tokens], HEADS, head_dim, DTYPE, DEVICE, v_head_dim)
        yield prefill_row(f"dense {tokens} D={head_dim}, V's {v_head_dim}", problem, rounds, clock)
    for lengths in options.size((*PACKED, [128] * 64), ([40, 300],)):
        name = f"packed {len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"packed {lengths}"
        yield prefill_row(name, prompts(lengths, HEADS, 128, DTYPE, DEVICE), rounds, clock)
    for page_size in (16, 256):
        for new, total in options.size(((8192, 8192), (2048, 8192), (512, 32768)), ((64, 512),)):
            problem = on_pages([new], [total], HEADS, 128, page_size, DTYPE, DEVICE)
            yield prefill_row(f"{new} of {total} on pages of {page_size}", problem, rounds, clock)


def prefill_row(name: str, problem: PackedProblem, rounds: int, clock: GraphClock) -> Row:
    torch.cuda.empty_cache()
    measured = measure({OURS: pagedflash_prefill(problem), **prefill_peers(problem)}, rounds, clock)
    return compared(name, measured, "us", {"TFLOP/s": problem.operations / measured.median(OURS) / 1e12})


def pagedflash_prefill(problem: PackedProblem) -> Contender:
    q, k, v, lengths_q, lengths_k, table = problem
    if table is None and len(lengths_q) == 1:
        return Contender(lambda: flash_attn_func(q[None], k[None], v[None], causal=True), lambda out: out[0])
    cu_q, cu_k = problem.cu_seqlens_q, problem.cu_seqlens_k
    longest = max(lengths_q), max(lengths_k)
    return Contender(lambda: flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=True, block_table=table))


@suite("cuda-training", needs=no_cuda)
def training(options: Options) -> Iterator[Row]:
    """Forward and backward pass of causal prompts, dense and packed, beside SDPA's kernels"""
    clock, rounds = GraphClock(), options.rounds_or(20)
    cases = [([tokens], head_dim) for head_dim in (64, 128) for tokens in (2048, 8192)]
    cases += [(lengths, 128) for lengths in PACKED] + [(PACKED[0], 64)]
    for lengths, head_dim in options.size(cases, [([64], 32), ([40, 30], 32)]):
        torch.cuda.empty_cache()
        problem = prompts(lengths, HEADS, head_dim, DTYPE, DEVICE)
        contenders = {OURS: with_gradients(causal_attention(problem), *problem[:3])}
        for name, kernel in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            run = partial(sdpa_of_sequences, problem, kernel)
            contenders |= that_run({name: partial(with_gradients, run, *problem[:3])})
        if len(lengths) > 1:
            contenders |= that_run({"SDPA flash, packed": partial(with_gradients, flash_of_packed(problem), *problem[:3])})
        yield compared(f"{lengths} D={head_dim}", measure(contenders, rounds, clock), "us")


def causal_attention(problem: PackedProblem) -> Callable[..., Any]:
    if len(problem.lengths_q) == 1:
        return lambda q, k, v: flash_attn_func(q[None], k[None], v[None], causal=True)[0]
    offsets, longest = problem.cu_seqlens_q, max(problem.lengths_q)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=True)


def sdpa_of_sequences(problem: PackedProblem, kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One after another."""
    with sdpa_kernel(kernel):
        parts = zip(*(x.split(problem.lengths_q) for x in (q, k, v)))
        return torch.cat([sdpa.attention(*(x[None] for x in part), is_causal=True)[0] for part in parts])


def flash_of_packed(problem: PackedProblem) -> Callable[..., Tensor]:
    """All at once, by the operator that SDPA takes nested tensors to."""
    offsets, longest = problem.cu_seqlens_q, max(problem.lengths_q)
    flash = torch.ops.aten._flash_attention_forward
    return lambda q, k, v: flash(q, k, v, offsets, offsets, longest, longest, 0.0, True, False)[0]


@suite("cuda-window", needs=no_cuda)
def window(options: Options) -> Iterator[Row]:
    """Causal prompts with a sliding window: time against window and length"""
    clock = GraphClock()
    for tokens in options.size((8192, 32768), (256,)):
        q, k, v, *_ = prompts([tokens], HEADS, 128, DTYPE, DEVICE)
        for width in options.size((128, 1024, 4096), (64,)):
            run = Contender(partial(flash_attn_func, q[None], k[None], v[None], causal=True, window_size=(width, 0)))
            yield compared(f"{tokens} tokens, window {width}", measure({OURS: run}, options.rounds_or(10), clock), "us")


@suite("cuda-mixed", needs=no_cuda)
def mixed(options: Options) -> Iterator[Row]:
    """One call for decoding sequences and one chunk of a prompt, beside a call for each of the two, and peers"""
    context, past = options.size((4096, 2048), (64, 32))
    batches = options.size([(n, chunk) for n in (1, 31, 127) for chunk in (128, 512, 2048)], [(3, 32)])
    cases = [(shape((32, 8)), batch) for batch in batches]
    for case in (shape((32, 8), 128, 256), shape((9, 3), 64, 16), shape((9, 3), 64, 256)):
        cases.append((case, batches[len(batches) // 2]))
    clock = GraphClock()
    for case, (decoding, new) in cases:
        torch.cuda.empty_cache()
        lengths = [context] * decoding + [past + new]
        problem = on_pages([1] * decoding + [new], lengths, *case[:3], DTYPE, DEVICE)
        calls = {"decode": decode_alone(problem), "chunk": chunk_alone(problem)}
        contenders = {OURS: pagedflash_prefill(problem), "two calls": two_calls(problem), **calls, **prefill_peers(problem)}
        measured = measure(contenders, options.rounds_or(30), clock)
        ours, apart = measured.median(OURS), sum(map(measured.median, calls))
        name = f"{decode_case(case, [context] * decoding)}, {new} on {past}"
        yield compared(name, measured, "us", {"sum of the calls apart us": 1e6 * apart, "of that sum": ours / apart})


def decode_alone(problem: PackedProblem) -> Contender:
    """All sequences but the last, of one query each."""
    q, k, v, _, _, table = problem
    assert table is not None
    decoding = len(table) - 1
    arguments: Any = dict(cache_seqlens=problem.seqused_k[:decoding], block_table=table[:decoding])
    return Contender(partial(flash_attn_with_kvcache, q[:decoding, None], k, v, causal=True, **arguments), output=None)


def chunk_alone(problem: PackedProblem) -> Contender:
    """The last sequence."""
    table, lengths_q, lengths_k = problem.block_table, problem.lengths_q[-1:], problem.lengths_k[-1:]
    assert table is not None
    q, table = problem.q[-lengths_q[0] :], table[-1:].contiguous()
    last = problem._replace(q=q, lengths_q=lengths_q, lengths_k=lengths_k, block_table=table)
    return pagedflash_prefill(last)._replace(output=None)


def two_calls(problem: PackedProblem) -> Contender:
    """Decode for all sequences but the last, and a chunk for that, in one graph."""
    decode, chunk = decode_alone(problem).run, chunk_alone(problem).run
    return Contender(lambda: (decode(), chunk()), lambda outs: torch.cat((outs[0][:, 0], outs[1])))


@suite("cuda-overhead", needs=no_cuda)
def overhead(options: Options) -> Iterator[Row]:
    """Microseconds of host time an eager call, the device never waited for, beside FlashInfer's decode"""
    short, long = (paged(shape((32, 8)), [tokens] * 4) for tokens in (50, 4096))
    new = torch.randn(4, 1, 8, 128, device=DEVICE, dtype=DTYPE)
    angles = torch.randn(64, 64, device=DEVICE, dtype=DTYPE)
    q = torch.randn(1, 200, 32, 128, device=DEVICE, dtype=DTYPE)
    append: dict[str, Any] = dict(k=new, v=new, rotary_cos=angles, rotary_sin=angles, causal=True)
    calls = {
        "decode": pagedflash_decode(short).run,
        "decode of 4096 keys, split": pagedflash_decode(long).run,
        "append, rotary, decode": lambda: flash_attn_with_kvcache(**short._asdict(), **append),
        "prefill": lambda: flash_attn_func(q, q[:, :, :8], q[:, :, :8], causal=True),
    }
    contenders = {name: Contender(call, output=None) for name, call in calls.items()}
    contenders |= that_run({"FlashInfer, CUDA cores": partial(flashinfer.decode, short, "CUDA cores")})
    measured = measure(contenders, options.rounds_or(100), HostClock())
    for name, seconds in measured.seconds.items():
        figures = {"us": 1e6 * statistics.median(seconds), "least us": 1e6 * min(seconds)}
        yield Row(name, figures, (), {name: seconds})
