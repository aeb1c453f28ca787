"""Continuous batching on a CUDA GPU, with and without CUDA graphs, beside sdpa: tokens/s, and tokens against the CPU's.

    python benchmarks/cuda_generate.py

A Llama of SmolLM2-135M's shape with random weights, so that nothing needs to be downloaded.
"""

from __future__ import annotations

import time

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import pagedflash.transformers

PROMPT_LENGTHS = (5, 33, 300, 64, 17, 120, 256, 700)
NEW_TOKENS = 32


def model(implementation: str) -> LlamaForCausalLM:
    """The same weights each time."""
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


def generate(on: LlamaForCausalLM, prompts: list[list[int]], graphs: bool) -> tuple[list[list[int]], float]:
    """(tokens of each prompt, seconds)"""
    start = time.perf_counter()
    outputs = on.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=graphs, num_blocks=64, max_batch_tokens=2048),
        progress_bar=False,
    )
    in_order = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    return [output.generated_tokens for output in in_order], time.perf_counter() - start


def main() -> None:
    pagedflash.transformers.enable()
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 49152, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    on_cpu, _ = generate(model("sdpa"), prompts, False)
    total = sum(map(len, on_cpu))

    table = Table("dtype", "attention", "CUDA graphs", "tokens/s", "tokens as on the CPU")
    for dtype in (torch.float32, torch.bfloat16):
        for implementation, graphs in (("pagedflash", True), ("pagedflash", False), ("sdpa", True)):
            on_gpu = model(implementation).to("cuda", dtype)
            generate(on_gpu, prompts, graphs)  # compiles
            tokens, seconds = generate(on_gpu, prompts, graphs)
            same = sum(a == b for mine, cpu in zip(tokens, on_cpu) for a, b in zip(mine, cpu))
            table.add_row(
                str(dtype), implementation, "on" if graphs else "off", f"{total / seconds:.1f}", f"{same} of {total}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
