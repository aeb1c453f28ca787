"""``pagedflash bench``: decode bandwidth against context length, for every implementation present.

A decode step reads each cached key and value once, so its speed is the bytes of the cache over the time of a call, and its
limit is what the machine streams from memory. All contenders answer the same problem in interleaved rounds in one process;
what is reported are medians. The figures of docs/cpu.md come from ``benchmarks/cpu_attention.py``, on the same contenders.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..dispatch import DEVICE_BACKENDS, availability
from ..interface import flash_attn_with_kvcache

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
CACHE_BYTES = 160 << 20
"""Keys and values of all sequences together: more than a processor's cache, so that memory is what is measured."""

SETTLE_SECONDS = 0.03
"""Idle threads of the previous contender spin for a while and would slow the next one: they get this long to stop."""

STREAM_BYTES = 1 << 30

Contender = Callable[[], object]


@dataclass(frozen=True)
class DecodeShape:
    """Heads and pages of a decode problem; the defaults are Llama 3's 8B."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class DecodeProblem(NamedTuple):
    """One query token for each of ``len(lengths)`` sequences, over shuffled pages."""

    q: Tensor  # (B, Sq, Hq, D)
    k_pages: Tensor  # (num_pages, page_size, Hkv, D)
    v_pages: Tensor
    lengths: Tensor  # (B,) int32
    block_table: Tensor  # (B, max_pages) int32

    @property
    def cache_bytes(self) -> int:
        token = self.k_pages[0, 0].numel() * self.k_pages.element_size()
        return 2 * token * int(self.lengths.sum())


def decode_problem(shape: DecodeShape, lengths: list[int], device: str = "cpu", num_queries: int = 1) -> DecodeProblem:
    """Random keys and values of the given lengths, their pages in random order."""
    pages = [-(-length // shape.page_size) for length in lengths]
    cache = (sum(pages), shape.page_size, shape.kv_heads, shape.head_dim)
    order = torch.randperm(sum(pages)).split(pages)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=-1)
    # One random page, repeated: drawing gigabytes of random numbers would take longer than measuring.
    k_pages, v_pages = (torch.randn(cache[1:]).to(device, shape.dtype).repeat(cache[0], 1, 1, 1) for _ in range(2))
    return DecodeProblem(
        torch.randn(len(lengths), num_queries, shape.q_heads, shape.head_dim).to(device, shape.dtype),
        k_pages,
        v_pages,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table.to(device, torch.int32),
    )


# --------------------------------------------------------------------------------------------------------------------
# Contenders
# --------------------------------------------------------------------------------------------------------------------


def pagedflash_decode(problem: DecodeProblem) -> Contender:
    q, k_pages, v_pages, lengths, table = problem
    return lambda: flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=True)


def gather_sdpa(problem: DecodeProblem, fold: bool) -> Contender:
    """What to do without a paged kernel: index the pages into one tensor, then SDPA, sequence by sequence.

    Query heads of a group share keys either through ``enable_gqa``, or folded into query rows (one query token only).
    """
    q, k_pages, v_pages, lengths, table = problem
    num_queries, group = q.shape[1], q.shape[2] // k_pages.shape[2]
    assert not fold or num_queries == 1
    counts = lengths.tolist()
    page_size = k_pages.shape[1]
    rows = [row[: -(-count // page_size)].long() for row, count in zip(table, counts, strict=True)]

    def run() -> list[Tensor]:
        outs = []
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            k, v = (pages[row].flatten(0, 1)[:count].transpose(0, 1).unsqueeze(0) for pages in (k_pages, v_pages))
            if fold:
                queries = q[b].view(1, -1, group, q.shape[3])
                outs.append(scaled_dot_product_attention(queries, k, v))
            else:
                queries = q[b].transpose(0, 1).unsqueeze(0)
                mask = None
                if num_queries > 1:
                    mask = torch.ones(num_queries, count, dtype=torch.bool, device=q.device).tril(count - num_queries)
                outs.append(scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=group > 1))
        return outs

    return run


OPENVINO_PAGE = 32


def openvino_decode(problem: DecodeProblem) -> Contender:
    """OpenVINO's CPU PagedAttention operator, on a cache of its own layout filled with the same keys and values.

    The operator also writes the last token into its cache, so it is given all tokens but that one. Its bfloat16 cache
    needs a processor with bfloat16 instructions (the answers are wrong on others): elsewhere it gets a float16 cache.

    Raises:
        ImportError: openvino is not installed.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.op import _PagedAttentionExtension

    q, k_pages, v_pages, lengths, table = problem
    batch, _, q_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    counts = lengths.tolist()
    blocks = [-(-count // OPENVINO_PAGE) for count in counts]
    core = ov.Core()
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    cache_dtype = torch.float16 if q.dtype == torch.bfloat16 and not has_bfloat16 else q.dtype
    element = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16, torch.float16: ov.Type.f16}[cache_dtype]
    float_type = ov.Type.f32

    def parameter(shape: list[int], type_: Any) -> Any:
        return ops.parameter(ov.PartialShape(shape), type_)

    def constant(values: list[float], type_: Any, shape: list[int]) -> Any:
        return ops.constant(np.array(values).reshape(shape), type_)

    i32, none = ov.Type.i32, [0]
    inputs = [
        parameter([-1, q_heads * head_dim], float_type),
        parameter([-1, kv_heads * head_dim], float_type),
        parameter([-1, kv_heads * head_dim], float_type),
        parameter([-1, kv_heads, OPENVINO_PAGE, head_dim], element),
        parameter([-1, kv_heads, OPENVINO_PAGE, head_dim], element),
        *(parameter([-1], i32) for _ in range(4)),  # past_lens, subsequence_begins, block_indices, block_indices_begins
    ]
    options = [
        constant([head_dim**-0.5], float_type, []),
        constant([0], i32, []),  # sliding_window
        constant([], float_type, none),  # alibi_slopes
        constant([max(counts)], i32, []),  # max_context_len
        constant([], i32, none),  # score_aggregation_window
        constant([], i32, none),  # rotated_block_indices
        constant([], i32, none),  # rotation_deltas
        constant([], float_type, none),  # rotation_trig_lut
        constant([], float_type, none),  # xattention_threshold
        constant([64], i32, []),  # xattention_block_size
        constant([8], i32, []),  # xattention_stride
        constant([], float_type, [0, 0, 0, 0]),  # sinks
        constant([0], i32, []),  # adaptive_rkv_start_size
        constant([], i32, none),  # adaptive_rkv_evictable_sizes
        constant([], i32, none),  # adaptive_rkv_diversity_block_set_indices
        constant([], i32, none),  # adaptive_rkv_diversity_block_set_indices_begins
        constant([], i32, none),  # token_type_ids
        constant([], ov.Type.u8, none),  # qq_bias
        constant([], i32, none),  # qq_bias_begins
    ]
    attention = _PagedAttentionExtension([node.output(0) for node in [*inputs, *options]])
    for kind in ("k", "v"):
        attention.get_rt_info()[f"num_{kind}_heads"] = kv_heads
        attention.get_rt_info()[f"{kind}_head_size"] = head_dim
    model = ov.Model([attention.output(0)], inputs)
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if cache_dtype == torch.bfloat16 else "f32",
            "KV_CACHE_PRECISION": element,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    caches = [_openvino_cache(pages, table, counts, blocks, cache_dtype) for pages in (k_pages, v_pages)]
    last = [
        (row[(count - 1) // k_pages.shape[1]], (count - 1) % k_pages.shape[1])
        for row, count in zip(table, counts, strict=True)
    ]
    new = [
        torch.stack([pages[page, slot] for page, slot in last]).float().reshape(batch, -1) for pages in (k_pages, v_pages)
    ]

    def offsets(sizes: list[int]) -> Any:
        return np.cumsum([0, *sizes]).astype(np.int32)

    values = [
        q.float().reshape(batch, -1).numpy(),
        *(tensor.numpy() for tensor in new),
        *caches,
        np.array([count - 1 for count in counts], np.int32),
        offsets([1] * batch),
        np.arange(sum(blocks), dtype=np.int32),
        offsets(blocks),
    ]
    for i, value in enumerate(values):
        request.set_input_tensor(i, value if isinstance(value, ov.Tensor) else ov.Tensor(np.ascontiguousarray(value)))

    def run() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data).view(batch, 1, q_heads, head_dim)

    return run


def _openvino_cache(pages: Tensor, table: Tensor, counts: list[int], blocks: list[int], dtype: torch.dtype) -> Any:
    """The cached tokens as OpenVINO lays them out: ``[blocks, Hkv, 32, D]``."""
    import openvino as ov

    kv_heads, head_dim = pages.shape[2:]
    cache = torch.zeros(sum(blocks), kv_heads, OPENVINO_PAGE, head_dim, dtype=dtype)
    first = 0
    for row, count, size in zip(table, counts, blocks, strict=True):
        tokens = pages[row[: -(-count // pages.shape[1])].long()].flatten(0, 1)[:count]
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, size * OPENVINO_PAGE - count))
        cache[first : first + size] = padded.view(size, OPENVINO_PAGE, kv_heads, head_dim).transpose(1, 2)
        first += size
    if dtype == torch.bfloat16:  # numpy has no bfloat16: hand over the bits
        return ov.Tensor(cache.view(torch.int16).numpy(), list(cache.shape), ov.Type.bf16)
    return ov.Tensor(cache.numpy())


def streaming(device: str = "cpu", size: int = STREAM_BYTES) -> Contender:
    """Read ``size`` bytes, far more than any cache holds, with all of torch's threads."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return lambda: data.sum()


def decode_contenders(problem: DecodeProblem) -> dict[str, Contender]:
    """Every implementation that can run here, by name."""
    contenders = {"pagedflash": pagedflash_decode(problem)}
    if problem.q.device.type == "cpu":
        with suppress(ImportError):
            contenders["OpenVINO"] = openvino_decode(problem)
    contenders["gather + SDPA"] = gather_sdpa(problem, fold=False)
    if problem.q.shape[2] != problem.k_pages.shape[2] and problem.q.shape[1] == 1:
        contenders["gather + SDPA, folded"] = gather_sdpa(problem, fold=True)
    return contenders


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


def interleave(
    contenders: Mapping[str, Contender], rounds: int, device: str = "cpu", calls: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of each contender, in each of ``rounds`` rounds; every round runs all of them, one after another.

    ``calls`` are timed together. Each contender gets a call that is not timed first, after the others' threads have come
    to rest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for run in contenders.values():
            run()
        for _ in range(rounds):
            for name, run in contenders.items():
                time.sleep(SETTLE_SECONDS)
                if calls > 1:
                    run()
                synchronize(device)
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                synchronize(device)
                seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


class Ratio(NamedTuple):
    """How much longer one contender takes than another."""

    median: float  # of the rounds' ratios: what the machine does meanwhile hits both
    best: float  # of the fastest rounds: what a machine with nothing else to do shows


def ratio(theirs: list[float], ours: list[float], scale: float = 1.0) -> Ratio:
    """``scale`` x the time of one contender to another's."""
    return Ratio(
        scale * statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), scale * min(theirs) / min(ours)
    )


# --------------------------------------------------------------------------------------------------------------------
# pagedflash bench
# --------------------------------------------------------------------------------------------------------------------


def main(
    device: str | None = None,
    dtype: torch.dtype | None = None,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    contexts: tuple[int, ...] = CONTEXTS,
    rounds: int = 7,
) -> list[dict[str, Any]]:
    """Measure, print a table, and write JSON and a picture if asked. Returns what the JSON file holds.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; the best one present if None.
        dtype: of the cache; float32 on a CPU and float16 elsewhere if None.
        json_file: where to write the results as JSON.
        plot_file: where to draw them (any format matplotlib knows, by its suffix).
        contexts: tokens in the cache of each sequence.
        rounds: how often every contender is measured.
    """
    device = device or best_device()
    shape = DecodeShape(dtype=dtype or (torch.float32 if device == "cpu" else torch.float16))
    results = []
    stream = streaming(device)
    for context in contexts:
        batch = max(1, CACHE_BYTES // (context * shape.token_bytes))
        problem = decode_problem(shape, [context] * batch, device)
        seconds = interleave({"streaming": stream, **decode_contenders(problem)}, rounds, device)
        bandwidth = {
            name: (STREAM_BYTES if name == "streaming" else problem.cache_bytes) / statistics.median(times) / 1e9
            for name, times in seconds.items()
        }
        results.append({"context": context, "batch": batch, "gb_per_second": bandwidth})
        del problem
    report = {
        "device": describe_device(device),
        "torch": torch.__version__,
        "shape": {**vars(shape), "dtype": str(shape.dtype)},
    }
    _print_table(report, results)
    if json_file is not None:
        json_file.write_text(json.dumps({**report, "results": results}, indent=2) + "\n")
    if plot_file is not None:
        _plot(report, results, plot_file)
    return results


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_device(device: str) -> str:
    """The processor, and for a CPU its threads and the instruction set that the kernels use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu" or not availability()[DEVICE_BACKENDS["cpu"]][0]:
        return device
    from ..backends.cpu.launch import library

    native = library()
    isa = next(name for name, number in native.isas.items() if number == native.isa)
    return f"{_processor_name()}, {torch.get_num_threads()} threads, {isa}"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _print_table(report: dict[str, Any], results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shape = report["shape"]
    names = list(results[0]["gb_per_second"])
    table = Table(
        title=f"Decode, GB/s of cached keys and values read\n{report['device']}, torch {report['torch']}\n"
        f"{shape['q_heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, {shape['dtype']}, "
        f"pages of {shape['page_size']}"
    )
    for column in ("context", "batch", *names):
        table.add_column(column, justify="right")
    for result in results:
        figures = [f"{result['gb_per_second'][name]:.1f}" for name in names]
        table.add_row(str(result["context"]), str(result["batch"]), *figures)
    Console().print(table)


def _plot(report: dict[str, Any], results: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    contexts = [result["context"] for result in results]
    for name in results[0]["gb_per_second"]:
        figures = [result["gb_per_second"][name] for result in results]
        if name == "streaming":
            axes.plot(contexts, figures, color="0.6", linestyle="--", label="streaming limit")
        else:
            axes.plot(contexts, figures, marker="o", linewidth=2.5 if name == "pagedflash" else 1.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache of each sequence")
    axes.set_ylabel("GB/s of keys and values read")
    axes.set_title(f"Paged decode, {report['shape']['dtype'].removeprefix('torch.')}, {report['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(axes.lines), frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
