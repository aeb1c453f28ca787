"""How a model runs in transformers' continuous batching: all requests decode, or a chunk of a prompt comes beside them.

Decoding is the median step between the moment the last request has its first token and the moment the first request has its
last; what comes before is the prefill.
"""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig, MistralForCausalLM

import pagedflash.transformers
from benchmarks.problems import SMOLLM2_SIZES
from pagedflash.cli.generate import PAGE_SIZE, find_model, load
from pagedflash.integrations.transformers import engine

OURS, THEIRS = "pagedflash", "sdpa"
DECODING_ONLY = "pagedflash, decoding only"
"""pagedflash as it is where only steps in which all requests decode go through block tables."""

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
    stamps = [stamp for stamp in next(iter(outputs)).timestamps if begin <= stamp <= end]
    return Run(begin - start, median_step(stamps) / len(outputs), [output.generated_tokens for output in outputs])


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
    return Run(prefill, median_step(stamps) / len(prompts), [done[request].generated_tokens for request in short])


def median_step(stamps: list[float]) -> float:
    """Of the moments at which one request got its tokens: a step in which the machine did something else does not count."""
    return statistics.median(later - sooner for sooner, later in zip(stamps, stamps[1:]))


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
    config = MistralConfig(**SMOLLM2_SIZES, sliding_window=WINDOW, attn_implementation=THEIRS)
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


def switch(model: Any, name: str) -> None:
    """The model on another attention."""
    pagedflash.transformers.disable()
    with mock.patch.object(engine, "install", return_value={}) if name == DECODING_ONLY else nullcontext():
        pagedflash.transformers.enable()
    model.set_attn_implementation(THEIRS if name == THEIRS else OURS)
