"""Every family of transformers as eager attention, or refused in one sentence: a quarter of them, all with --nightly."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("transformers")

from families import check
from models import enabled  # noqa: F401
from tiny_models import family_names

FAMILIES = family_names()
WELL_KNOWN = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_next"),
    *("gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "gpt_oss", "opt", "starcoder2", "olmo2"),
    *("cohere2", "deepseek_v3", "glm4", "granite", "smollm3", "jamba", "bamba", "llava", "idefics3"),
    *("bert", "roberta", "modernbert", "distilbert", "bart", "mbart", "pegasus", "m2m_100", "whisper", "wav2vec2"),
    *("vit", "dinov2", "clip_text_model", "siglip_vision_model"),
)
"""Families that must run, and not be refused or left out."""


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_as_eager_or_refused(family: str, rng: random.Random, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--nightly") and family not in WELL_KNOWN and rng.randrange(3):
        pytest.skip("another day: --nightly runs all families, other days other thirds")
    outcomes = check(family, FAMILIES[family])
    assert not {name: outcome for name, outcome in outcomes.items() if outcome.verdict in ("wrong", "error")}
    if family in WELL_KNOWN:
        assert {outcome.verdict for outcome in outcomes.values()} == {"equal"}
