"""A real model, SmolLM2-135M-Instruct in float32, gives the tokens it gives with sdpa, through every path."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from models import batched, enabled, implementation, layouts, padded, smollm2  # noqa: F401

import pagedflash
from pagedflash.cli import generate
from pagedflash.integrations.transformers import engine, hooks

NEW_TOKENS = 64
PAGE_SIZE = 64
QUESTIONS = (
    "Say yes.",
    "Name a colour.",
    "What is 2 + 2?",
    "Count from one to ten.",
    "Who wrote Hamlet?",
    "Why is the sky blue?",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Translate 'good morning' into Spanish.",
    "What is the boiling point of water?",
    "Give me three uses of a paper clip.",
    "Explain to a child what a computer does.",
    "Describe a sunset in the mountains in detail.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise: The quick brown fox jumps over the lazy dog. The dog sleeps on. The fox is gone before anyone sees it.",
    "Continue this story, and do not hurry: " + "Once upon a time there was a river that ran uphill at night. " * 8,
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    ids = generate.encode(smollm2().tokenizer, QUESTIONS)
    assert len(ids) == 16 and max(map(len, ids)) > 2 * PAGE_SIZE > PAGE_SIZE > min(map(len, ids))
    return ids


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """What sdpa answers."""
    answers = padded(smollm2().model, prompts, NEW_TOKENS)
    assert len(set(map(len, answers))) > 3, "the requests should end at different times"
    return answers


@pytest.mark.usefixtures("enabled")
def test_generate_with_left_padding(prompts: list[list[int]], expected: list[list[int]]) -> None:
    with implementation(smollm2().model, "pagedflash") as model, pagedflash.count_calls() as calls:
        assert padded(model, prompts, NEW_TOKENS) == expected
    assert layouts(calls) == {"dense": model.config.num_hidden_layers * max(map(len, expected))}


@pytest.mark.usefixtures("enabled")
def test_generate_without_padding(prompts: list[list[int]], expected: list[list[int]]) -> None:
    with implementation(smollm2().model, "pagedflash") as model, pagedflash.count_calls() as calls:
        assert padded(model, prompts[:1], NEW_TOKENS) == expected[:1]
    assert layouts(calls) == {"dense": model.config.num_hidden_layers * len(expected[0])}


@pytest.mark.usefixtures("enabled")
def test_continuous_batching_decodes_through_block_tables(prompts: list[list[int]], expected: list[list[int]]) -> None:
    """More requests than fit at once, which end at different times, some longer than a page."""
    pages_for_all = sum(-(-(len(prompt) + NEW_TOKENS) // PAGE_SIZE) for prompt in prompts)
    with implementation(smollm2().model, "pagedflash") as model, pagedflash.count_calls() as calls:
        answers = batched(model, prompts, NEW_TOKENS, page_size=PAGE_SIZE, num_blocks=pages_for_all // 3)
    assert answers == expected
    layers, counts = model.config.num_hidden_layers, layouts(calls)
    every_step_is_paged = hooks.version_numbers() >= engine.FIRST_VERSION
    assert set(counts) == ({"paged", "paged varlen"} if every_step_is_paged else {"paged", "varlen"})
    assert counts["paged"] > layers * NEW_TOKENS, "decoding should take the block tables, not varlen"
