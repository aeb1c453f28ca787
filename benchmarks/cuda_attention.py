"""Decode, prefill and call overhead on a CUDA GPU: the tables of docs/cuda.md.

    python benchmarks/cuda_attention.py [decode] [prefill] [overhead] [grid | grid:24]

``grid:24`` takes 24 shapes of the grid at random (always the same ones).

Every GPU time is the median over replays of a CUDA graph that holds one call, the empty graph's time (printed first)
included. Before each replay the L2 cache is filled with other data: by reading a buffer of five times its size, or,
where a table says "written", by writing one, so that the call also waits for up to 50 MB to be written back. Bandwidths
count every key and value read once, against what a plain sum over 2 GiB reads in the same run.

Where FlashInfer is installed it is measured beside: BatchDecodeWithPagedKVCacheWrapper with its plan made outside the
timing, the better of tensor cores on and off.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pagedflash

HAS_FLASHINFER = importlib.util.find_spec("flashinfer") is not None
REPLAYS = 30
COMPILERS = 14
DEVICE = "cuda"


class Decode(NamedTuple):
    """A shape of the decode table."""

    lengths: list[int]
    heads: int
    kv_heads: int
    head_dim: int = 128
    page_size: int = 16

    @property
    def kv_bytes(self) -> int:
        return 2 * sum(self.lengths) * self.kv_heads * self.head_dim * 2

    def __str__(self) -> str:
        longest, shortest = max(self.lengths), min(self.lengths)
        context = str(longest) if longest == shortest else f"{shortest}..{longest}"
        return f"B={len(self.lengths)} {self.heads}/{self.kv_heads} D={self.head_dim} {context} page {self.page_size}"


def ragged(batch: int, longest: int) -> list[int]:
    """Lengths from an eighth of the longest to the longest, spread evenly, shuffled by a stride."""
    low = longest // 8
    return [low + (longest - low) * ((i * 7) % batch) // max(batch - 1, 1) for i in range(batch)]


TARGETS = (
    Decode([4096] * 8, 32, 8),
    Decode([8192], 32, 8),
    Decode([65536], 32, 8),
    Decode([4096] * 32, 32, 8),
    Decode(ragged(32, 4473), 32, 8),
    Decode([50] * 4, 16, 16),
)


def grid() -> list[Decode]:
    """The grid of the issue, less what needs more than 4 GB of keys and values or has next to none."""
    shapes = []
    for batch in (1, 8, 32, 128):
        for context in (512, 4096, 65536):
            for heads, kv_heads in ((32, 8), (64, 8), (16, 16), (9, 3)):
                for head_dim in (64, 128, 256):
                    page_size = 16 if (batch + context // 512 + heads + head_dim // 64) % 2 else 256
                    lengths = ragged(batch, context) if heads in (64, 9) and batch > 1 else [context] * batch
                    shape = Decode(lengths, heads, kv_heads, head_dim, page_size)
                    if shape.kv_bytes <= 2**32:
                        shapes.append(shape)
    return shapes


class Timer:
    """Times graph replays with a cold L2."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(64 * 2**20, device=DEVICE)
        self._sink = torch.empty((), device=DEVICE)
        self.written = False

    def _flush(self) -> None:
        """Fill the L2 cache with other data: unwritten lines that cost nothing to evict, or written ones."""
        if self.written:
            self._buffer.zero_()
        else:
            torch.sum(self._buffer, 0, out=self._sink)

    def __call__(self, run: Callable[[], object], replays: int = REPLAYS) -> float:
        """Median microseconds of one ``run()``."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        for _ in range(3):
            graph.replay()
        for begin, end in events:
            self._flush()
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return 1000 * statistics.median(begin.elapsed_time(end) for begin, end in events)


def read_bandwidth(timer: Timer) -> float:
    """Bytes a second that a sum over 2 GiB reads."""
    values = torch.randn(2**29, device=DEVICE)
    total = torch.empty((), device=DEVICE)
    return 4 * values.numel() / timer(lambda: torch.sum(values, 0, out=total)) * 1e6


def decode_inputs(shape: Decode) -> dict[str, Tensor]:
    """Random bf16 queries and pages, the pages of all sequences shuffled."""
    batch, page_size = len(shape.lengths), shape.page_size
    width = -(-max(shape.lengths) // page_size)
    needed = [-(-n // page_size) for n in shape.lengths]
    pages = torch.randperm(sum(needed)).to(torch.int32)
    table = torch.full((batch, width), -1, dtype=torch.int32)
    for row, count, mine in zip(table, needed, pages.split(needed)):
        row[:count] = mine
    k, v = (
        torch.randn(sum(needed), page_size, shape.kv_heads, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(2)
    )
    q = torch.randn(batch, 1, shape.heads, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)
    return dict(q=q, k_cache=k, v_cache=v, cache_seqlens=lengths, block_table=table.to(DEVICE))


def decode_call(inputs: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: pagedflash.flash_attn_with_kvcache(**inputs, causal=True)  # type: ignore[arg-type]


def flashinfer_call(shape: Decode, inputs: dict[str, Tensor], tensor_cores: bool) -> Callable[[], object]:
    """FlashInfer's decode over the same pages, planned."""
    import flashinfer  # here: it is slow to import, and processes that only compile do not need it

    pages = torch.tensor([-(-n // shape.page_size) for n in shape.lengths])
    offsets = F.pad(pages.cumsum(0), (1, 0)).int().to(DEVICE)
    indices = torch.cat([row[:count] for row, count in zip(inputs["block_table"], pages.tolist())])
    last = torch.tensor([(n - 1) % shape.page_size + 1 for n in shape.lengths]).int().to(DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 * 2**20, dtype=torch.uint8, device=DEVICE),
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=offsets.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    data = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    wrapper.plan(offsets, indices, last, shape.heads, shape.kv_heads, shape.head_dim, shape.page_size, **data)
    q, out = inputs["q"][:, 0], torch.empty_like(inputs["q"][:, 0])
    return lambda: wrapper.run(q, (inputs["k_cache"], inputs["v_cache"]), out=out)


def decode_times(timer: Timer, shape: Decode) -> tuple[float, float | None]:
    """Microseconds: (ours, FlashInfer's or None)"""
    inputs = decode_inputs(shape)
    ours = timer(decode_call(inputs))
    if not HAS_FLASHINFER:
        return ours, None
    return ours, min(timer(flashinfer_call(shape, inputs, cores)) for cores in (False, True))


def compile_ahead(shape: Decode) -> None:
    """In a process of its own: the compiled kernels stay in Triton's cache on disk."""
    few = shape._replace(lengths=[1] * (len(shape.lengths) - 1) + [shape.page_size])
    table_width = -(-max(shape.lengths) // shape.page_size)
    inputs = decode_inputs(few)
    inputs["block_table"] = F.pad(inputs["block_table"], (0, table_width - inputs["block_table"].shape[1]))
    decode_call(inputs)()


def decode_table(timer: Timer, bandwidth: float) -> None:
    for written in (False, True):
        timer.written = written
        title = "decode, bf16, L2 written" if written else "decode, bf16"
        print(f"\n| {title} | KV MB | us | of read bandwidth | FlashInfer us | x FlashInfer |")
        print("|---|---|---|---|---|---|")
        for shape in TARGETS:
            ours, theirs = decode_times(timer, shape)
            share = shape.kv_bytes / ours * 1e6 / bandwidth
            compared = "- | -" if theirs is None else f"{theirs:.1f} | {theirs / ours:.2f}"
            print(f"| {shape} | {shape.kv_bytes / 1e6:.1f} | {ours:.1f} | {share:.0%} | {compared} |", flush=True)
    timer.written = False


def grid_table(timer: Timer, bandwidth: float, count: int | None) -> None:
    shapes = grid() if count is None else random.Random(0).sample(grid(), count)
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        pool.map(compile_ahead, shapes)
    print("\n| grid, bf16 | KV MB | us | of read bandwidth | FlashInfer us | x FlashInfer |")
    print("|---|---|---|---|---|---|")
    results = []
    for shape in shapes:
        ours, theirs = decode_times(timer, shape)
        share = shape.kv_bytes / ours * 1e6 / bandwidth
        results.append((shape, share, None if theirs is None else theirs / ours))
        compared = "- | -" if theirs is None else f"{theirs:.1f} | {theirs / ours:.2f}"
        print(f"| {shape} | {shape.kv_bytes / 1e6:.1f} | {ours:.1f} | {share:.0%} | {compared} |", flush=True)

    print("\n| grid | shapes | of read bandwidth: least, geometric mean | x FlashInfer: least, geometric mean |")
    print("|---|---|---|---|")
    groups: dict[str, Callable[[Decode], bool]] = {"all": lambda shape: True}
    for low, high in ((0, 30), (30, 134), (134, 500), (500, 5000)):
        groups[f"{low} to {high} MB"] = lambda shape, low=low, high=high: low <= shape.kv_bytes / 1e6 < high  # type: ignore[misc]
    for head_dim in (64, 128, 256):
        groups[f"D={head_dim}"] = lambda shape, head_dim=head_dim: shape.head_dim == head_dim  # type: ignore[misc]
    for name, belongs in groups.items():
        shares = [share for shape, share, _ in results if belongs(shape)]
        ratios = [ratio for shape, _, ratio in results if belongs(shape) and ratio is not None]
        print(f"| {name} | {len(shares)} | {least_and_mean(shares)} | {least_and_mean(ratios)} |")


def least_and_mean(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{min(values):.2f}, {math.exp(statistics.fmean(map(math.log, values))):.2f}"


PREFILL_HEADS, PREFILL_KV_HEADS = 32, 8


def prefill_inputs(tokens: int, head_dim: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for heads in (PREFILL_HEADS, PREFILL_KV_HEADS, PREFILL_KV_HEADS)
    )
    return q, k, v


def sdpa_time(timer: Timer, q: Tensor, k: Tensor, v: Tensor) -> float:
    """torch's flash kernel, causal; only for as many queries as keys, since it aligns the mask to the top left."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return timer(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 10)


def prefill_row(name: str, us: float, sdpa_us: float, pairs: float, head_dim: int = 128) -> None:
    tflops = 4 * pairs * PREFILL_HEADS * head_dim / us / 1e6
    print(f"| {name} | {us:.0f} | {tflops:.0f} | {sdpa_us:.0f} | {sdpa_us / us:.2f} |", flush=True)


def dense_prefill(timer: Timer, tokens: int, head_dim: int) -> None:
    q, k, v = prefill_inputs(tokens, head_dim)
    ours = timer(lambda: pagedflash.flash_attn_func(q, k, v, causal=True), 10)
    prefill_row(f"dense {tokens} D={head_dim}", ours, sdpa_time(timer, q, k, v), tokens**2 / 2, head_dim)


def varlen_prefill(timer: Timer, lengths: list[int]) -> None:
    """Against SDPA over the same sequences one by one, its times added up."""
    q, k, v = (x[0] for x in prefill_inputs(sum(lengths)))
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(DEVICE)
    longest = max(lengths)
    ours = timer(lambda: pagedflash.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True), 10)
    parts = zip(*(x.split(lengths) for x in (q, k, v)))
    theirs = sum(sdpa_time(timer, *(x[None] for x in part)) for part in parts)
    prefill_row(f"varlen {lengths}", ours, theirs, sum(n * n / 2 for n in lengths))


def paged_prefill(timer: Timer, tokens: int, page_size: int, chunk: int) -> None:
    """A whole prompt on pages, and its last chunk. SDPA's flash kernel has no mask aligned to the bottom right: the
    chunk's share of its time over the whole prompt stands in."""
    q, k, v = prefill_inputs(tokens)
    theirs = sdpa_time(timer, q, k, v)
    table = torch.randperm(tokens // page_size).to(torch.int32).to(DEVICE)[None]
    pages = [x.view(-1, page_size, PREFILL_KV_HEADS, 128) for x in (k, v)]
    lengths = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    kvcache = pagedflash.flash_attn_with_kvcache
    ours = timer(lambda: kvcache(q, *pages, cache_seqlens=lengths, block_table=table, causal=True), 10)
    prefill_row(f"paged {tokens}, page {page_size}", ours, theirs, tokens**2 / 2)

    cu = torch.tensor([0, chunk], dtype=torch.int32, device=DEVICE)
    last = q[0, -chunk:]
    options = dict(seqused_k=lengths, block_table=table, causal=True)
    ours = timer(lambda: pagedflash.flash_attn_varlen_func(last, *pages, cu, None, chunk, tokens, **options), 10)
    pairs = chunk * (tokens - chunk / 2)
    prefill_row(f"paged chunk {chunk} of {tokens}, page {page_size}", ours, theirs * pairs / (tokens**2 / 2), pairs)


def window_time(timer: Timer, tokens: int, window: int) -> float:
    q, k, v = prefill_inputs(tokens)
    return timer(lambda: pagedflash.flash_attn_func(q, k, v, causal=True, window_size=(window, 0)), 10)


def prefill_table(timer: Timer) -> None:
    """Against torch's flash SDPA in the same run."""
    print("\n| prefill, bf16 causal, 32/8 | us | TFLOP/s | torch flash SDPA us | x SDPA |")
    print("|---|---|---|---|---|")
    for tokens, head_dim in ((8192, 128), (2048, 128), (8192, 64), (8192, 80), (8192, 96), (8192, 192), (8192, 256)):
        dense_prefill(timer, tokens, head_dim)
    for lengths in ([4096, 2048, 1024, 512, 512], [300, 5000, 17, 1200, 64, 1611]):
        varlen_prefill(timer, lengths)
    for page_size in (16, 256):
        paged_prefill(timer, 8192, page_size, 2048)

    print("\n| window, us, 32/8, D=128 | 8192 tokens | 32768 tokens |")
    print("|---|---|---|")
    for window in (128, 1024, 4096):
        short, long = (window_time(timer, tokens, window) for tokens in (8192, 32768))
        print(f"| {window} | {short:.0f} | {long:.0f} |", flush=True)


def overhead_table() -> None:
    """Host microseconds of eager calls, the device never the bottleneck: the median of short rounds, and the least, which
    a host shared with others disturbs less."""
    print("\n| eager call, host | us | least |")
    print("|---|---|---|")
    shape = Decode([50] * 4, 32, 8)
    inputs, long_inputs = decode_inputs(shape), decode_inputs(Decode([4096] * 4, 32, 8))
    new = torch.randn(4, 1, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
    appending = dict(k=new, v=new, rotary_cos=angles, rotary_sin=angles)
    q = torch.randn(1, 200, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: pagedflash.flash_attn_with_kvcache(**inputs, causal=True),  # type: ignore[arg-type]
        "decode of 4096 keys, shared by programs": lambda: pagedflash.flash_attn_with_kvcache(**long_inputs, causal=True),  # type: ignore[arg-type]
        "append + rotary + decode": lambda: pagedflash.flash_attn_with_kvcache(**inputs, **appending, causal=True),  # type: ignore[arg-type]
        "prefill": lambda: pagedflash.flash_attn_func(q, q[:, :, :8], q[:, :, :8], causal=True),
    }
    if HAS_FLASHINFER:
        calls["FlashInfer's decode, without its plan"] = flashinfer_call(shape, inputs, False)
    for name, call in calls.items():
        times = []
        for _ in range(100):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                call()
            times.append((time.perf_counter() - begin) / 20 * 1e6)
        print(f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} |", flush=True)


def main() -> None:
    wanted = sys.argv[1:] or ["decode", "prefill", "overhead", "grid"]
    torch.manual_seed(0)
    timer = Timer()
    bandwidth = read_bandwidth(timer)
    one = torch.empty(1, device=DEVICE)
    empty = timer(one.zero_)
    theirs = importlib.metadata.version("flashinfer-python") if HAS_FLASHINFER else "not installed"
    print(
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__};"
        f" FlashInfer {theirs};"
        f" read bandwidth {bandwidth / 1e12:.2f} TB/s; an empty graph {empty:.1f} us"
    )
    for table in wanted:
        name, _, count = table.partition(":")
        if name == "decode":
            decode_table(timer, bandwidth)
        elif name == "prefill":
            prefill_table(timer)
        elif name == "overhead":
            overhead_table()
        elif name == "grid":
            grid_table(timer, bandwidth, int(count) if count else None)
        else:
            sys.exit(f"there is no table {table!r}: decode, prefill, overhead, grid")


if __name__ == "__main__":
    main()
