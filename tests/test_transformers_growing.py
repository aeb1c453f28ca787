"""The cache layer that grows in place holds what transformers' own would, whatever is done to it between two updates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from models import SIZES, enabled, layouts, padded, rounded_caches  # noqa: F401
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig, DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

import pagedflash.transformers
from pagedflash.integrations.transformers import attention, formats, growing
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


@pytest.fixture(params=formats.KV_CACHE_DTYPES)
def kv_cache_dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each format, in force."""
    pagedflash.transformers.enable(kv_cache_dtype=request.param)
    yield request.param
    pagedflash.transformers.disable()


def random_model(name: str, config: Any = LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **options), attn_implementation=name).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(
    "options", [{}, dict(num_beams=3), dict(prompt_lookup_num_tokens=2)], ids=["greedy", "beams", "prompt lookup"]
)
@pytest.mark.parametrize("window", [None, 6])
def test_a_format_as_eager_to_rounded_keys(kv_cache_dtype: str, window: int | None, options: dict[str, Any]) -> None:
    """Whole generations, in windows too: the tokens of eager attention to what the format keeps of keys and values."""
    if window and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers cannot crop windows")
    ids, mask = torch.tensor([[5, 7, 11, 5, 7, 11, 5, 7], [0, 0, 0, 13, 17, 19, 13, 17]]), torch.ones(2, 8)
    mask[1, :3] = 0
    if "prompt_lookup_num_tokens" in options:
        ids, mask = ids[:1], mask[:1]
    kind = dict(config=MistralConfig, sliding_window=window) if window else {}
    with rounded_caches(kv_cache_dtype):
        expected = random_model("eager", **kind).generate(ids, attention_mask=mask, max_new_tokens=24, **options)
    ours = random_model("pagedflash", **kind)
    with pagedflash.count_calls() as calls:
        answer = ours.generate(ids, attention_mask=mask, max_new_tokens=24, **options)
    assert answer.tolist() == expected.tolist()
    assert set(layouts(calls)) <= {"dense", "write"}


def test_a_cache_in_a_format_is_small(kv_cache_dtype: str) -> None:
    dtype, model = formats.KV_CACHE_DTYPES[kv_cache_dtype], random_model("pagedflash")
    with torch.no_grad():
        cache = model(torch.arange(3, 43)[None]).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        model(torch.tensor([[6]]), past_key_values=cache)
    per_head = dtype.itemsize * SIZES["head_dim"] + (4 if dtype.itemsize == 1 else 0)
    for layer, place in zip(cache.layers, places):
        assert layer.keys.nbytes == layer.values.nbytes == 42 * SIZES["num_key_value_heads"] * per_head
        assert layer.keys.data_ptr() == place, "it grows in place"


@pytest.mark.parametrize("kv_cache_dtype", ["int8"], indirect=True)
def test_what_a_format_cannot_do(kv_cache_dtype: str) -> None:
    model, ids = random_model("pagedflash"), torch.tensor([[5, 7, 11, 13]])
    with pytest.raises(ValueError, match="'int8', but static caches are kept in the model's dtype"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="'int8', but gradients are tracked"):
        model(ids)
    with torch.no_grad(), pytest.raises(ValueError, match="padding between tokens is not supported"):
        model(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    stored = growing.GrowingLayerInFormat().update(*torch.randn(2, 1, 2, 3, 16))
    with pytest.raises(ValueError, match="under dropout is not supported"):
        attention.forward(torch.nn.Module(), torch.randn(1, 4, 3, 16), *stored, None, dropout=0.5)
    packed = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 2, 4], dtype=torch.int32))
    with torch.no_grad(), pytest.raises(ValueError, match="under packed sequences is not supported"):
        model(ids, **packed, max_length_q=2, max_length_k=2)
    bart = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=32, max_position_embeddings=32)
    bart._attn_implementation = "pagedflash"
    with pytest.raises(ValueError, match="'int8', but the caches of encoders and decoders are kept in the model's dtype"):
        DynamicCache(config=bart)
    layer = growing.GrowingLayerInFormat()
    keys, _ = layer.update(*torch.randn(2, 2, 3, 4, 16))
    assert keys.shape == (2, 3, 4, 16) and keys.dtype is torch.int8
    with pytest.raises(ValueError, match=r"this model computes with what it has cached \(add\)"):
        keys + 1


def test_keys_that_a_norm_left_in_float32(kv_cache_dtype: str) -> None:
    """The output is of the dtype of the values, as without a format."""
    if formats.kv_cache_dtype is torch.float16:
        pytest.skip("not under bfloat16 queries")
    query, key, value = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16).bfloat16()
    module = torch.nn.Module()
    expected, _ = attention.forward(module, query, key, value, None)
    out, _ = attention.forward(module, query, *growing.GrowingLayerInFormat().update(key, value), None)
    assert out.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.2, atol=0.1)
