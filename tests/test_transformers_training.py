"""Tiny random models in training: loss and gradients as eager attention's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from models import SIZES, enabled, implementation  # noqa: F401
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import pagedflash

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
GEMMA2 = dict(sliding_window=5, attn_logit_softcapping=1.5, query_pre_attn_scalar=16)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {}),
    "qwen3": (AutoModelForCausalLM, {}),
    "gemma2": (AutoModelForCausalLM, GEMMA2),
    "gpt_oss": (AutoModelForCausalLM, dict(sliding_window=5, **EXPERTS)),
    "bert": (AutoModelForMaskedLM, NO_DROPOUT),
    "modernbert": (AutoModelForMaskedLM, dict(local_attention=6)),
}

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
MASKS = {
    "unpadded": torch.ones_like(IDS),
    "left": torch.tensor([[0] * 4 + [1] * 8, [1] * 12]),
    "right": torch.tensor([[1] * 12, [1] * 7 + [0] * 5]),
}

pytestmark = pytest.mark.usefixtures("enabled")


def training_model(family: str, name: str, **more: Any) -> Any:
    """In training mode, with sinks that matter."""
    auto, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **options, **more})
    model = auto.from_config(config, attn_implementation=name, dtype=torch.float32).train()
    with torch.no_grad():
        for parameter, weights in model.named_parameters():
            if parameter.endswith("sinks"):
                weights.normal_()
    return model


def loss_and_gradients(model: Any, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None}


def assert_trains_as_eager(family: str, **inputs: Tensor) -> None:
    with pagedflash.count_calls() as calls:
        loss, gradients = loss_and_gradients(training_model(family, "pagedflash"), **inputs)
    assert calls, "attention did not come here"
    want_loss, want = loss_and_gradients(training_model(family, "eager"), **inputs)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == want.keys()
    assert family != "gpt_oss" or any(name.endswith("sinks") for name in want)
    for name, gradient in want.items():
        error, largest = (gradients[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 2e-3 * largest.clamp(min=1e-3), f"{name} is off by {error:.3g} of {largest:.3g}"


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_as_eager(family: str, padding: str) -> None:
    mask = MASKS[padding]
    # Nothing is predicted from padding: there eager attention looks at other padding, this one at nothing.
    counted = mask.bool() & mask.roll(1, 1).bool()
    assert_trains_as_eager(family, input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(~counted, -100))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_packed_sequences(family: str) -> None:
    """As trainers pack them: sequences one after another in a row, told apart by their positions."""
    positions = torch.cat((torch.arange(5), torch.arange(7))).unsqueeze(0)
    assert_trains_as_eager(family, input_ids=IDS[:1], position_ids=positions, labels=IDS[:1], use_cache=False)


def test_gradient_checkpointing() -> None:
    plain, checkpointed = (training_model("llama", "pagedflash") for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    inputs = dict(input_ids=IDS, attention_mask=MASKS["left"], labels=IDS)
    (loss, want), (same_loss, got) = loss_and_gradients(plain, **inputs), loss_and_gradients(checkpointed, **inputs)
    assert torch.equal(loss, same_loss) and all(torch.equal(got[name], gradient) for name, gradient in want.items())


def test_under_autocast() -> None:
    """Attention in bfloat16, weights and their gradients in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(training_model("llama", "pagedflash"), input_ids=IDS, labels=IDS)
        want_loss, want = loss_and_gradients(training_model("llama", "eager"), input_ids=IDS, labels=IDS)
    assert abs(loss - want_loss) < 0.02 * want_loss
    for name, gradient in want.items():
        assert gradients[name].dtype == torch.float32
        assert torch.cosine_similarity(gradients[name].flatten(), gradient.flatten(), 0) > 0.95, name


def test_a_step_of_an_optimizer_lowers_the_loss() -> None:
    model = training_model("llama", "pagedflash")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss, _ = loss_and_gradients(model, input_ids=IDS, labels=IDS)
        losses.append(loss.item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attention_dropout(family: str, padding: str) -> None:
    """In training only, other probabilities each time, the same under a seed."""
    option = "attention_dropout" if family == "llama" else "attention_probs_dropout_prob"
    model = training_model(family, "pagedflash", **{option: 0.5})
    inputs = dict(input_ids=IDS, attention_mask=MASKS[padding], labels=IDS)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(loss_and_gradients(model, **inputs)[0].item())
    assert losses[0] == losses[1] != losses[2]
    plain = training_model(family, "pagedflash").eval()
    torch.testing.assert_close(model.eval()(**inputs).loss, plain(**inputs).loss)


@pytest.mark.parametrize("padding", MASKS)
def test_lora(padding: str) -> None:
    """Only the adapters have gradients: those that they have with eager attention."""
    peft = pytest.importorskip("peft")
    mask, results = MASKS[padding], []
    for name in ("pagedflash", "eager"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(training_model("llama", name), config)
        counted = mask.bool() & mask.roll(1, 1).bool()
        results.append(loss_and_gradients(model, input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(~counted, -100)))
    (loss, got), (want_loss, want) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    assert got.keys() == want.keys() and all("lora" in parameter for parameter in want)
    for parameter, gradient in want.items():
        assert (got[parameter] - gradient).abs().max() <= 2e-3 * gradient.abs().max(), parameter
