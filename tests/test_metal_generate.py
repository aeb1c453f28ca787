"""End to end: a model generates through continuous batching with block tables, on the Metal kernels."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from metal_harness import kernels_on
from models import SIZES, batched, enabled  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaConfig

import pagedflash
from pagedflash import CallKind

PROMPTS = [[5, 7, 11], [13] * 3 + [17, 19, 23, 29, 31, 37, 41], [43, 47], [53, 59, 61, 67, 71, 73] * 4]


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | dict(head_dim=32))
    return AutoModelForCausalLM.from_config(config, attn_implementation="pagedflash", dtype=torch.float32).eval()


def test_generate_batch_on_the_metal_kernels(enabled, device) -> None:  # noqa: F811
    model = tiny_llama()
    options = dict(max_new_tokens=8, page_size=8, num_blocks=48)
    with pagedflash.use_backend("reference"):
        want = batched(model, PROMPTS, **options)
    with kernels_on(device) as launches, pagedflash.use_backend("metal"), pagedflash.count_calls() as calls:
        got = batched(model.to(device), PROMPTS, **options)
    assert got == want
    assert len({tuple(tokens) for tokens in got}) == len(PROMPTS), "attention must matter for this test to mean anything"
    assert calls[CallKind("paged", "metal", device)] > 0, "no decode went through a block table"
    assert {kind.backend for kind in calls} == {"metal"}
    assert {"prefill", "decode"} <= {launch.kernel for launch in launches}
