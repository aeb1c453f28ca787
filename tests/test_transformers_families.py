"""Tiny random models of the families whose attention differs: logits as eager, and every option arrives at the kernel."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from models import SIZES, batched, enabled, implementation, layouts, padded  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pagedflash
from pagedflash import dispatch
from pagedflash.integrations.transformers import engine, hooks
from pagedflash.problem import AttentionProblem

EXPERTS = dict(num_experts_per_tok=2)
WINDOW = 5
ALL_FULL = dict(layer_types=["full_attention"] * 2)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2-moe": ("qwen2_moe", dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **EXPERTS)),
    "mistral": ("mistral", dict(sliding_window=WINDOW)),
    "gemma2": ("gemma2", dict(sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=16)),
    "gemma2 without windows": (
        "gemma2",
        dict(attn_logit_softcapping=1.5, query_pre_attn_scalar=16, **ALL_FULL),
    ),
    "gpt-oss": ("gpt_oss", dict(sliding_window=WINDOW, num_local_experts=4, **EXPERTS)),
    "gpt-oss without windows": ("gpt_oss", dict(num_local_experts=4, **ALL_FULL, **EXPERTS)),
}
# transformers 5.17 loses softcap and Mistral's window on the way from continuous batching to a flash kernel.
OLD_BATCHING = "paged|flash_attention_2" in ALL_ATTENTION_FUNCTIONS
EVERY_STEP_IS_PAGED = hooks.version_numbers() >= engine.FIRST_VERSION
REFUSED_BY_OLD_BATCHING = ("mistral", "gemma2", "gemma2 without windows")
WITH_WINDOWS = ("mistral", "gemma2", "gpt-oss")
PROMPTS = [[5, 7, 11], [13] * 3 + [17, 19, 23, 29, 31, 37, 41], [43, 47], [53, 59, 61, 67, 71, 73] * 4]


def random_model(family: str, name: str) -> Any:
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32).eval()


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[AttentionProblem]:
    """Every call that reaches dispatch."""
    seen: list[AttentionProblem] = []
    run = dispatch.attention

    def record(problem: AttentionProblem, *args: Any) -> Any:
        seen.append(problem)
        return run(problem, *args)

    monkeypatch.setattr(dispatch, "attention", record)
    return seen


def assert_options_arrived(family: str, calls: list[AttentionProblem]) -> None:
    assert calls
    assert all(call.scores.window_right == 0 for call in calls), "every one of these models is causal"
    assert {call.scores.softcap for call in calls} == ({1.5} if family.startswith("gemma2") else {0.0})
    assert all((call.scores.sinks is not None) == family.startswith("gpt-oss") for call in calls)
    windows = {call.scores.window_left for call in calls}
    layers_differ = family in ("gemma2", "gpt-oss")
    assert windows == ({-1} if family not in WITH_WINDOWS else {WINDOW - 1, -1} if layers_differ else {WINDOW - 1})


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_as_eager(family: str, described: list[AttentionProblem]) -> None:
    """One left-padded batch and one prompt alone, both read where they lie."""
    model = random_model(family, "pagedflash")
    assert model.config._attn_implementation == "pagedflash"
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    alone = torch.tensor(PROMPTS[-1:])

    with torch.no_grad(), pagedflash.count_calls() as calls:
        logits, logits_alone = model(ids, attention_mask=mask).logits, model(alone).logits
    assert layouts(calls) == {"dense": 4}
    assert_options_arrived(family, described)

    with torch.no_grad(), implementation(model, "eager"):
        expected, expected_alone = model(ids, attention_mask=mask).logits, model(alone).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_alone, expected_alone, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_as_eager(family: str, described: list[AttentionProblem]) -> None:
    """Block tables in every step; before transformers 5.19 for steps that only decode, in models without windows."""
    model = random_model(family, "pagedflash")
    with implementation(model, "eager"):
        expected = [padded(model, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    if OLD_BATCHING and family in REFUSED_BY_OLD_BATCHING:
        with pytest.raises(AssertionError, match=r"(softcap|sliding_window) is .* drops it"):
            batched(model, PROMPTS, max_new_tokens=12, page_size=4, num_blocks=24)
        return
    with pagedflash.count_calls() as calls:
        assert batched(model, PROMPTS, max_new_tokens=12, page_size=4, num_blocks=24) == expected
    assert_options_arrived(family, described)
    counts = layouts(calls)
    if EVERY_STEP_IS_PAGED:
        assert set(counts) == {"paged", "paged varlen"} and counts["paged"] > counts["paged varlen"]
    elif family in WITH_WINDOWS:
        assert set(counts) == {"varlen"}
    else:
        assert set(counts) == {"paged", "varlen"} and counts["paged"] > counts["varlen"]


@pytest.mark.usefixtures("enabled")
def test_a_list_of_flash_kernels_gets_one_more_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers replaces an implementation that gpt-oss does not list. A list of other kernels is another attention."""
    model = random_model("gpt-oss", "pagedflash")
    assert model.config._attn_implementation == "pagedflash"
    assert "pagedflash" not in type(model)._compatible_flash_implementations
    monkeypatch.setattr(type(model), "_compatible_flash_implementations", ["org/block-sparse"])
    with pytest.raises(
        ValueError, match="pagedflash: GptOssForCausalLM is not supported: it runs with org/block-sparse only"
    ):
        random_model("gpt-oss", "pagedflash")
