"""The cache layer that grows in place holds what transformers' own would, whatever is done to it between two updates."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from models import SIZES, enabled, padded  # noqa: F401
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from pagedflash.integrations.transformers import growing
from pagedflash.integrations.transformers.growing import GrowingLayer


@pytest.fixture(autouse=True)
def small_caches_grow_in_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_SMALL", 0)


def tokens(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, count, 8), torch.randn(batch, 3, count, 4)


def assert_same(layer: DynamicLayer, expected: DynamicLayer) -> None:
    torch.testing.assert_close((layer.keys, layer.values), (expected.keys, expected.values), rtol=0, atol=0)
    assert layer.get_seq_length() == expected.get_seq_length()


def pair() -> tuple[GrowingLayer, DynamicLayer]:
    return GrowingLayer(), DynamicLayer()


def append(layers: Any, count: int, batch: int = 2) -> None:
    new = tokens(count, batch)
    for layer in layers:
        came = layer.update(*new)
        assert came[0] is layer.keys and came[1] is layer.values


CHANGES: dict[str, Any] = {
    "nothing": lambda layer: None,
    "cropped": lambda layer: layer.crop(-3),
    "beams": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "beams, twice": lambda layer: (layer.reorder_cache(torch.tensor([1, 0])), layer.reorder_cache(torch.tensor([1, 1]))),
    "other rows": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "set from outside": lambda layer: setattr(layer, "keys", layer.keys * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_as_transformers_layer(change: str) -> None:
    layers = pair()
    for count in (5, 1, 1, 80, 1, 300, 1, 1):
        append(layers, count)
        assert_same(*layers)
        for layer in layers:
            CHANGES[change](layer)
        assert_same(*layers)


def test_more_rows() -> None:
    layers = pair()
    append(layers, 4)
    append(layers, 1)
    for layer in layers:
        layer.batch_repeat_interleave(2)
    append(layers, 1, batch=4)
    assert_same(*layers)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_its_own_way(copied: Any) -> None:
    first = pair()
    append(first, 4)
    append(first, 1)
    second = tuple(copied(layer) for layer in first)
    append(first, 2)
    append(second, 2)
    append(first, 1)
    assert_same(*first)
    assert_same(*second)


def test_what_was_handed_out_does_not_change() -> None:
    layer, _ = pair()
    append([layer], 4)
    append([layer], 1)
    keys, before = layer.keys, layer.keys.clone()
    layer.crop(-2)
    append([layer], 2)
    torch.testing.assert_close(keys, before, rtol=0, atol=0)


def test_a_token_copies_itself_only() -> None:
    layer, _ = pair()
    append([layer], 100)
    append([layer], 1)
    place = layer.keys.data_ptr()
    for _ in range(50):
        append([layer], 1)
    assert layer.keys.data_ptr() == place


def test_a_small_cache_is_copied_until_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pair()
    append(layers, 100)
    monkeypatch.setattr(growing, "_SMALL", layers[0].keys.nbytes + 1)
    grows = []
    for _ in range(4):
        append(layers, 1)
        grows.append(layers[0]._room is not None)
        assert_same(*layers)
    assert grows == [False, True, True, True]


def test_gradients_and_other_dtypes_take_transformers_way() -> None:
    layer, expected = pair()
    append((layer, expected), 3)
    new = tuple(tensor.requires_grad_() for tensor in tokens(2))
    layer.update(*new)
    layer.keys.sum().backward()
    assert new[0].grad is not None
    with torch.no_grad():
        layer, expected = pair()
        append((layer, expected), 3)
        halves = tuple(tensor.bfloat16() for tensor in tokens(1))
        layer.update(*halves), expected.update(*halves)
        assert_same(layer, expected)


@pytest.mark.usefixtures("enabled")
def test_only_for_models_with_pagedflash() -> None:
    for name, layer in (("pagedflash", GrowingLayer), ("sdpa", DynamicLayer)):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=name).eval()
        assert {type(layer) for layer in DynamicCache(config=model.config).layers} == {layer}
        with torch.no_grad():
            assert type(model(torch.tensor([[5, 6]])).past_key_values.layers[0]) is layer
    windows = LlamaConfig(**SIZES, sliding_window=4)
    windows._attn_implementation = "pagedflash"
    assert GrowingLayer not in {type(layer) for layer in DynamicCache(config=windows).layers}


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(prompt_lookup_num_tokens=2)], ids=["beams", "prompt lookup"])
def test_generate_as_eager(options: dict[str, Any]) -> None:
    """Generation that reorders and crops its cache."""
    ids, answers = torch.tensor([[5, 7, 11, 5, 7, 11, 5, 7]]), []
    for name in ("eager", "pagedflash"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=name).eval()
        model.generation_config.eos_token_id = None
        answers.append(model.generate(ids, max_new_tokens=24, do_sample=False, **options).tolist())
    assert answers[0] == answers[1]
