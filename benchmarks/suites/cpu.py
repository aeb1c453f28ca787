"""The CPU backend beside what a user could run instead."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.gradients import with_gradients
from benchmarks.suite import Options, Row, compared, measure, suite, that_run
from pagedflash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from pagedflash.cli import baselines
from pagedflash.cli.baselines import sdpa
from pagedflash.cli.bench import (
    CACHE_BYTES,
    CONTEXTS,
    OURS,
    STREAM_BYTES,
    STREAMING,
    Shape,
    decode_contenders,
    dense_prompt,
    dtype_name,
    pagedflash_decode,
    prefill_contenders,
    streaming,
)
from pagedflash.cli.measure import Contender, WallClock
from pagedflash.problem import QUANTIZED
from pagedflash.testing import MLA_HEAD_DIMS, PagedProblem, assert_matches_reference, paged_problem, random_problem

MIB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged(shape: Shape, lengths: list[int], num_queries: int = 1) -> PagedProblem:
    return paged_problem(lengths, **shape._asdict(), num_queries=num_queries)


def long_caches(shape: Shape, cache_bytes: int, context: int) -> list[int]:
    """Lengths of as many sequences as together leave the processor's caches."""
    return [context] * -(-cache_bytes // (context * shape.token_bytes))


def all_decode_contenders(problem: PagedProblem) -> dict[str, Contender]:
    ours, *others = decode_contenders(problem).items()
    return dict([ours]) | that_run(baselines.cpu_decode(problem)) | dict(others)


def all_prefill_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
    return prefill_contenders(q, k, v) | that_run(baselines.cpu_prefill(q, k, v))


@suite("cpu-context")
def context(options: Options) -> Iterator[Row]:
    """Paged decode against context length, float32, GB/s of keys and values"""
    stream_bytes = options.size(STREAM_BYTES, 8 * MIB)
    stream = streaming(size=stream_bytes)
    shape = Shape()
    for tokens in options.size(CONTEXTS, CONTEXTS[:2]):
        batch = max(1, options.size(CACHE_BYTES, 8 * MIB) // (tokens * shape.token_bytes))
        problem = paged(shape, [tokens] * batch)
        measured = measure({**all_decode_contenders(problem), STREAMING: stream}, options.rounds_or(7), WallClock())
        speeds = {name: problem.cache_bytes / measured.median(best) / 1e9 for name, best in measured.fastest().items()}
        speeds[STREAMING] = stream_bytes / measured.median(STREAMING) / 1e9
        place = ("tokens in the cache of each sequence", tokens)
        yield Row(f"{batch} x {tokens} tokens", speeds, measured.disagreements(), measured.seconds, place)


@suite("cpu-decode")
def decode(options: Options) -> Iterator[Row]:
    """Paged decode over long caches, bound by memory: of streaming bandwidth, and beside OpenVINO, vLLM and gather + SDPA"""
    stream_bytes = options.size(STREAM_BYTES, 8 * MIB)
    stream = streaming(size=stream_bytes)
    cache_bytes, context = options.size((128 * MIB, 4096), (2 * MIB, 64))
    cases = []
    for dtype in DTYPES:
        for heads in ((32, 8), (16, 16)):
            for page_size in (16, 256):
                shape = Shape(heads, 128, page_size, dtype)
                cases.append((f"pages of {page_size}", shape, long_caches(shape, cache_bytes, context)))
    for dtype in DTYPES[:2]:
        shape = Shape((9, 3), 64, 16, dtype)
        count = 2 * len(long_caches(shape, cache_bytes, context))
        ragged = [1 + (context - 1) * i // (count - 1) for i in range(count)]
        cases.append((f"pages of 16, 1 to {context}", shape, ragged))
    for name, shape, lengths in options.size(cases, cases[::6]):
        problem = paged(shape, lengths)
        measured = measure({**all_decode_contenders(problem), STREAMING: stream}, options.rounds_or(9), WallClock())
        share = problem.cache_bytes / stream_bytes * measured.ratio(STREAMING, OURS)
        yield compared(f"{shape}, {name}", measured, "ms", {"of streaming": share})


@suite("cpu-formats")
def formats(options: Options) -> Iterator[Row]:
    """Paged decode over caches of other formats than the queries, 8 x 4096 tokens, beside a cache of the queries' dtype"""
    for dtype, others in ((torch.bfloat16, QUANTIZED), (torch.float32, (torch.float16, torch.bfloat16, *QUANTIZED))):
        shape = Shape(dtype=dtype)
        problem = paged(shape, [options.size(4096, 64)] * options.size(8, 2))
        own = dtype_name(dtype)
        contenders = {own: pagedflash_decode(problem)}
        contenders |= {dtype_name(other): decode_in_format(problem, other) for other in others}
        measured = measure(contenders, options.rounds_or(15), WallClock())
        for name in contenders:
            figures = {"ms": 1e3 * measured.median(name), f"x {own}": measured.ratio(own, name)}
            yield Row(f"{shape}, cache of {name}", figures, (), {name: measured.seconds[name]})


def decode_in_format(problem: PagedProblem, dtype: torch.dtype) -> Contender:
    """The problem over its cache in another format, where it is quantized with a scale for each token and head."""
    q, *caches, lengths, table = problem
    scales: dict[str, Any] = {}
    if dtype in QUANTIZED:
        amax = [cache.float().abs().amax(-1, keepdim=True) / QUANTIZED[dtype] for cache in caches]
        caches = [cache / scale for cache, scale in zip(caches, amax)]
        scales = dict(zip(("k_descale", "v_descale"), (scale[..., 0].float() for scale in amax)))
    k_cache, v_cache = ((cache.round() if dtype is torch.int8 else cache).to(dtype) for cache in caches)

    def run() -> Any:
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True, **scales)

    return Contender(run, None)


@suite("cpu-head-dims")
def head_dims(options: Options) -> Iterator[Row]:
    """Paged decode of wide heads, of odd ones beside the next multiple of 8, and of MLA: of streaming bandwidth"""
    stream_bytes = options.size(STREAM_BYTES, 8 * MIB)
    stream = streaming(size=stream_bytes)
    cache_bytes, context = options.size((128 * MIB, 4096), (2 * MIB, 64))

    def rows(dtype: torch.dtype, problems: dict[str, PagedProblem]) -> Iterator[Row]:
        runs = {case: pagedflash_decode(problem)._replace(output=None) for case, problem in problems.items()}
        measured = measure({**runs, STREAMING: stream}, options.rounds_or(9), WallClock())
        for case, problem in problems.items():
            share = problem.cache_bytes / stream_bytes * measured.ratio(STREAMING, case)
            figures = {"ms": 1e3 * measured.median(case), "of streaming": share}
            yield Row(f"{dtype_name(dtype)}, {case}", figures, (), {case: measured.seconds[case]})

    for dtype in DTYPES[:2]:
        for dims in ((256, 512), (59, 64), (100, 104), (111, 112)):
            shapes = {f"D={d}": Shape((16, 4), d, 16, dtype) for d in dims}
            yield from rows(
                dtype, {case: paged(shape, long_caches(shape, cache_bytes, context)) for case, shape in shapes.items()}
            )
        for q_heads in (1, 16, 128):
            lengths = [context] * -(-cache_bytes // (context * MLA_HEAD_DIMS[0] * dtype.itemsize))
            mla = paged_problem(lengths, heads=(q_heads, 1), page_size=64, dtype=dtype, mla=True)
            apart = mla._replace(v_cache=mla.v_cache.clone())
            yield from rows(dtype, {f"MLA, {q_heads} heads": mla, f"MLA, {q_heads} heads, V apart": apart})


@suite("cpu-hot")
def hot(options: Options) -> Iterator[Row]:
    """Paged decode of a cache that stays in the processor's caches, bound by overhead: calls one right after another"""
    for dtype in DTYPES[:2]:
        shape = Shape((16, 16), 128, 16, dtype)
        contenders = all_decode_contenders(paged(shape, [50] * 4))
        measured = measure(contenders, options.rounds_or(45), WallClock(calls=options.size(200, 5)))
        yield compared(f"{shape}, 4 x 50 tokens", measured, "us")


@suite("cpu-prefill")
def prefill(options: Options) -> Iterator[Row]:
    """A causal prompt, beside SDPA, zentorch and vLLM"""
    tokens = options.size(2048, 128)
    for dtype in DTYPES:
        shape = Shape(dtype=dtype)
        measured = measure(all_prefill_contenders(*dense_prompt(tokens, shape)), options.rounds_or(9), WallClock())
        yield compared(f"{shape}, {tokens} tokens", measured, "ms")


@suite("cpu-training")
def training(options: Options) -> Iterator[Row]:
    """Forward and backward pass: a causal prompt, beside SDPA; packed sequences, beside SDPA with a mask"""
    tokens = options.size(2048, 128)
    lengths = [tokens // 2, tokens // 4, tokens // 8, tokens // 8]
    for dtype in DTYPES[:2]:
        shape = Shape(dtype=dtype)
        prompt = dense_prompt(tokens, shape)
        for name, contenders in (
            (f"{tokens} tokens", prompt_training_contenders(*prompt)),
            (f"packed {lengths}", packed_training_contenders(*prompt, lengths)),
        ):
            yield compared(f"{shape}, {name}", measure(contenders, options.rounds_or(7), WallClock()), "ms")


def prompt_training_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
    return {
        OURS: with_gradients(partial(flash_attn_func, causal=True), q, k, v),
        "SDPA, enable_gqa": with_gradients(partial(sdpa.attention, is_causal=True), q, k, v),
        "SDPA, repeated": with_gradients(partial(sdpa.attention, is_causal=True, repeat=True), q, k, v),
    }


def packed_training_contenders(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> dict[str, Contender]:
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        longest = max(lengths)
        out: Any = flash_attn_varlen_func(q[0], k[0], v[0], offsets, offsets, longest, longest, causal=True)
        return out.unsqueeze(0)

    return {
        OURS: with_gradients(ours, q, k, v),
        "SDPA, enable_gqa": with_gradients(partial(sdpa.attention, attn_mask=mask), q, k, v),
        "SDPA, repeated": with_gradients(partial(sdpa.attention, attn_mask=mask, repeat=True), q, k, v),
    }


@suite("cpu-options")
def options_of_prefill(options: Options) -> Iterator[Row]:
    """A causal prompt with softcap and sinks, beside one without; with a window, beside SDPA in blocks of queries"""
    tokens, window, rounds = options.size(2048, 128), options.size(256, 16), options.rounds_or(9)
    q, k, v = dense_prompt(tokens, Shape())
    sinks = torch.randn(q.shape[2])

    def ours(**arguments: Any) -> Contender:
        return Contender(lambda: flash_attn_func(q, k, v, causal=True, **arguments))

    for name, arguments in (("softcap", dict(softcap=30.0)), ("sinks", dict(s_aux=sinks))):
        contenders = {OURS: ours(**arguments), "without": ours()._replace(output=None)}
        measured = measure(contenders, rounds, WallClock())
        figures = {"without ms": 1e3 * measured.median("without"), "x without": measured.ratio("without", OURS)}
        yield compared(f"{Shape()}, {tokens} tokens, {name}", measured, "ms", figures)
    contenders = {OURS: ours(window_size=(window, 0))}
    for block in options.size((128, 256, 512), (32,)):
        for repeat in (False, True):
            name = f"SDPA in blocks, {block}, {'repeated' if repeat else 'enable_gqa'}"
            contenders[name] = sdpa.window_in_blocks(q, k, v, window, block, repeat)
    yield compared(f"{Shape()}, {tokens} tokens, window {window}", measure(contenders, rounds, WallClock()), "ms")


@suite("cpu-chunked")
def chunked(options: Options) -> Iterator[Row]:
    """New tokens of a prompt on those cached in pages of 16, beside vLLM and gather + SDPA"""
    new, cached = options.size((512, 4096), (32, 64))
    for dtype in DTYPES[:2]:
        shape = Shape(dtype=dtype)
        problem = paged(shape, [cached + new], num_queries=new)
        contenders = {OURS: chunk(problem)} | that_run(baselines.cpu_decode(problem))
        contenders["gather + SDPA, enable_gqa"] = sdpa.gather_prefill(problem, repeat=False)
        contenders["gather + SDPA, repeated"] = sdpa.gather_prefill(problem, repeat=True)
        yield compared(f"{shape}, {new} on {cached}", measure(contenders, options.rounds_or(9), WallClock()), "ms")


def chunk(problem: PagedProblem) -> Contender:
    q, k_cache, v_cache, lengths, table = problem
    new, total = q.shape[1], int(lengths[0])
    offsets = torch.tensor([0, new], dtype=torch.int32)
    return Contender(
        lambda: flash_attn_varlen_func(
            q[0], k_cache, v_cache, offsets, None, new, total, causal=True, block_table=table, seqused_k=lengths
        ),
        lambda out: out.unsqueeze(0),
    )


@suite("cpu-speculative")
def speculative(options: Options) -> Iterator[Row]:
    """Decode of several tokens a sequence at once, beside one token, over long caches"""
    cache_bytes, context = options.size((128 * MIB, 4096), (2 * MIB, 64))
    for dtype in DTYPES[:2]:
        shape = Shape(dtype=dtype)
        lengths = long_caches(shape, cache_bytes, context)
        contenders = {
            str(n): pagedflash_decode(paged(shape, lengths, num_queries=n))._replace(output=None) for n in (1, 2, 4, 8, 16)
        }
        measured = measure(contenders, options.rounds_or(9), WallClock())
        for name in list(contenders)[1:]:
            figures = {"ms": 1e3 * measured.median(name), "x 1 token": measured.ratio("1", name)}
            yield Row(f"{shape}, {name} tokens", figures, (), measured.seconds)


@suite("cpu-packed")
def packed_cache(options: Options) -> Iterator[Row]:
    """Paged decode where K and V of a token and head lie in one row, as in vLLM's cache, beside separate pages"""
    cache_bytes, context = options.size((128 * MIB, 4096), (2 * MIB, 64))
    for dtype in DTYPES[:2]:
        for heads in ((32, 8), (16, 16)):
            shape = Shape(heads, dtype=dtype)
            apart = paged(shape, long_caches(shape, cache_bytes, context))
            by_token = torch.cat([apart.k_cache, apart.v_cache], -1)
            by_head = by_token.transpose(1, 2).contiguous().transpose(1, 2)
            problems = {"separate pages": apart}
            for name, rows in (("(pages, tokens, heads, 2 D)", by_token), ("(pages, heads, tokens, 2 D)", by_head)):
                k_cache, v_cache = rows.chunk(2, -1)
                problems[name] = apart._replace(k_cache=k_cache, v_cache=v_cache)
            contenders = {name: pagedflash_decode(problem) for name, problem in problems.items()}
            measured = measure(contenders, options.rounds_or(15), WallClock())
            for name in contenders:
                figures = {"ms": 1e3 * measured.median(name), "x separate": measured.ratio("separate pages", name)}
                yield Row(f"{shape}, {name}", figures, measured.disagreements(), {name: measured.seconds[name]})


@suite("cpu-threads", needs=lambda: "" if torch.get_num_threads() > 1 else "torch has one thread")
def threads(options: Options) -> Iterator[Row]:
    """A causal prompt and paged decode on one thread, and on all"""
    most, tokens = torch.get_num_threads(), options.size(2048, 128)
    cache_bytes, context = options.size((256 * MIB, 4096), (2 * MIB, 64))
    for dtype in DTYPES[:2]:
        shape = Shape(dtype=dtype)
        for name, contender in (
            (f"prompt of {tokens}", prefill_contenders(*dense_prompt(tokens, shape))[OURS]),
            ("decode", pagedflash_decode(paged(shape, long_caches(shape, cache_bytes, context)))),
        ):
            counts = {f"{count} threads": on_threads(count, most, contender) for count in (1, most)}
            measured = measure(counts, options.rounds_or(7), WallClock())
            figures: dict[str, Any] = {f"{name} ms": 1e3 * measured.median(name) for name in counts}
            figures["ratio"] = measured.ratio(*counts)
            yield Row(f"{shape}, {name}", figures, measured.disagreements(), measured.seconds)


def on_threads(count: int, usual: int, contender: Contender) -> Contender:
    def run() -> Any:
        torch.set_num_threads(count)
        try:
            return contender.run()
        finally:
            torch.set_num_threads(usual)

    return contender._replace(run=run)


@suite("isas")
def isas(options: Options) -> Iterator[Row]:
    """The CPU kernels of every instruction set that this processor has: right against the reference, and how fast"""
    from pagedflash.backends.cpu import launch

    names = list(launch.library().isas)
    for name in names:
        yield random_problems(name, options.size(60, 3))
    fast = [name for name in names if name != "generic"]
    clock, rounds = WallClock(), options.rounds_or(5)
    cache_bytes, context, prompt, stream_bytes = options.size(
        (256 * MIB, 4096, 2048, STREAM_BYTES), (2 * MIB, 64, 128, 8 * MIB)
    )
    stream = streaming(size=stream_bytes)
    for dtype in DTYPES:
        shape = Shape(dtype=dtype)
        problem = paged(shape, long_caches(shape, cache_bytes, context))
        contenders = {name: with_isa(name, pagedflash_decode(problem)) for name in fast}
        contenders |= {"gather + SDPA": sdpa.gather_decode(problem, fold=True), STREAMING: stream}
        measured = measure(contenders, rounds, clock)
        speeds = {f"{name} GB/s": problem.cache_bytes / measured.median(name) / 1e9 for name in contenders}
        speeds[f"{STREAMING} GB/s"] = stream_bytes / measured.median(STREAMING) / 1e9
        yield Row(f"decode {shape}", speeds, measured.disagreements(), measured.seconds)
    for dtype in DTYPES[:2]:
        shape = Shape(dtype=dtype)
        prefill = prefill_contenders(*dense_prompt(prompt, shape))
        contenders = {name: with_isa(name, prefill[OURS]) for name in fast}
        contenders |= {"SDPA, repeated": prefill["SDPA, repeated"]}
        measured = measure(contenders, rounds, clock)
        times = {f"{name} ms": 1e3 * measured.median(name) for name in contenders}
        yield Row(f"prefill {prompt} {shape}", times, measured.disagreements(), measured.seconds)


def random_problems(isa: str, count: int) -> Row:
    from pagedflash.backends import cpu
    from pagedflash.backends.cpu import launch

    failures = []
    with launch.use_isa(isa):
        for seed in range(count):
            try:
                assert_matches_reference(random_problem(random.Random(seed), max_keys=600), cpu.attention)
            except AssertionError as error:
                failures.append(f"seed {seed}: {str(error)[:300]}")
    return Row(f"random problems, {isa}", {"right": count - len(failures), "of": count}, failures)


def with_isa(isa: str, contender: Contender) -> Contender:
    from pagedflash.backends.cpu import launch

    def run() -> Any:
        with launch.use_isa(isa):
            return contender.run()

    return contender._replace(run=run)
