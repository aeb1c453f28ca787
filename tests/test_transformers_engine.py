"""Continuous batching through pages: tokens as eager's, no gather in any step, every page given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from models import SIZES, enabled, greedy, implementation, layouts, padded  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import pagedflash
import pagedflash.transformers as integration
from pagedflash.integrations.transformers import engine, hooks

if hooks.version_numbers() < engine.FIRST_VERSION:
    pytest.skip("transformers before 5.19 batches in its own way", allow_module_level=True)

from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching import input_outputs, offloading_manager
from transformers.generation.continuous_batching import initialization as gate
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

from pagedflash.integrations.transformers.engine import inputs, windows

WINDOW, PAGE_SIZE, LAYERS = 6, 4, 2
EXPERTS = dict(num_experts_per_tok=2)
GEMMA = dict(sliding_window=WINDOW, query_pre_attn_scalar=16)
FULL_AND_WINDOW = dict(layer_types=["full_attention", "sliding_attention"])

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen2-moe": ("qwen2_moe", dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **EXPERTS)),
    "gpt-neox": ("gpt_neox", dict(num_key_value_heads=4)),
    "mistral": ("mistral", dict(sliding_window=WINDOW)),
    "phi3": ("phi3", dict(sliding_window=WINDOW)),
    "qwen2 with windows": ("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "gemma2": ("gemma2", dict(attn_logit_softcapping=1.5, **GEMMA)),
    "gemma3": ("gemma3_text", dict(**GEMMA, **FULL_AND_WINDOW)),
    "gpt-oss": ("gpt_oss", dict(sliding_window=WINDOW, num_local_experts=4, **EXPERTS)),
    "cohere2": ("cohere2", dict(sliding_window=WINDOW, **FULL_AND_WINDOW)),
}
PROMPTS = [[5, 7, 11], [13] * 3 + list(range(17, 60)), [43, 47], [53, 59, 61, 67, 71, 73] * 4]
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def gathers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Copies of keys and values out of the cache, by allocator; and for every test: none while "pagedflash" is enabled."""
    counts: Counter[str] = Counter()
    for allocator in (FullAttentionCacheAllocator, SlidingAttentionCacheAllocator):

        def update(self: Any, *args: Any, original: Any = allocator.update) -> Any:
            counts[type(self).__name__] += 1
            return original(self, *args)

        monkeypatch.setattr(allocator, "update", update)
    yield counts
    integration.disable()
    assert not counts


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[PagedAttentionCache]:
    """Every cache that is made."""
    made: list[PagedAttentionCache] = []
    initialize = PagedAttentionCache.__init__

    def record(self: PagedAttentionCache, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PagedAttentionCache, "__init__", record)
    return made


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Query tokens of each request, for every step that is prepared."""
    seen: list[list[int]] = []
    prepare = inputs.PagedInputs.prepare_batch_tensors

    def record(self: Any, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        seen.append([request.query_length for request in requests_in_batch])
        prepare(self, requests_in_batch, *args, **kwargs)

    monkeypatch.setattr(inputs.PagedInputs, "prepare_batch_tensors", record)
    return seen


def random_model(family: str, name: str = "pagedflash") -> Any:
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32).eval()


def expected_tokens(model: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Each prompt alone, by eager attention."""
    with implementation(model, "eager"):
        return [padded(model, [prompt], new_tokens)[0] for prompt in prompts]


def configuration(**options: Any) -> ContinuousBatchingConfig:
    """Small pages, and chunks of prompts beside decoding requests."""
    sizes = dict(page_size=PAGE_SIZE, num_blocks=64, max_batch_tokens=16, safety_margin=0.0)
    return ContinuousBatchingConfig(**{**sizes, **options})


def batched(model: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, **options: Any) -> list[Any]:
    """The outputs of ``generate_batch()``."""
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy(model, new_tokens),
        continuous_batching_config=configuration(**options),
        warmup=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return list(outputs.values())


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.generated_tokens for output in outputs]


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_goes_through_pages(family: str, steps: list[list[int]]) -> None:
    """Whole prompts, chunks of them, chunks beside decoding requests, decoding: tokens as eager's, one call a layer."""
    model = random_model(family)
    expected = expected_tokens(model, PROMPTS)
    with pagedflash.count_calls() as calls:
        assert tokens(batched(model, PROMPTS)) == expected
    decoding = sum(set(step) == {1} for step in steps)
    assert any(1 in step and max(step) > 1 for step in steps) and 0 < decoding < len(steps)
    others = LAYERS * (len(steps) - decoding)
    assert layouts(calls) == {"paged": LAYERS * decoding, "paged varlen": others, "write": others}
