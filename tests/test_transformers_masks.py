"""Every mask that transformers asks for: attention as with its own 4D mask, or refused, over random lengths and padding."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor
from transformers import masking_utils

import pagedflash
from pagedflash.integrations.transformers import attention, masks

HEADS, KV_HEADS, DIM = 4, 2, 16
LIAR = SimpleNamespace(is_causal=True)  # a layer that says of itself what its model's mask is not
KINDS = ("causal", "window", "bidirectional", "bidirectional window")
PADDINGS = ("none", "left", "right", "both", "holes")
PLACES = ("alone", "behind a cache", "static cache", "static cache with a tensor", "sliding cache")


def mask_arguments(kind: str, window: int, **places: Any) -> dict[str, Any]:
    """What transformers' create_*_mask functions pass to a mask function."""
    functions = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(window),
        "bidirectional": masking_utils.bidirectional_mask_function,
        "bidirectional window": masking_utils.sliding_window_bidirectional_mask_function(window),
    }
    skip = {"allow_is_causal_skip": "bidirectional" not in kind}
    if "bidirectional" in kind:
        skip["allow_is_bidirectional_skip"] = True
    local = {"local_size": window} if "window" in kind else {}
    return {"mask_function": functions[kind], "device": "cpu", "use_vmap": False, **local, **skip, **places}


def matrix(arguments: dict[str, Any]) -> Tensor:
    """transformers' own mask, ``(B, Sq, Sk)``."""
    all_of_it = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**{**arguments, **all_of_it})[:, 0]


def states(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, HEADS, queries, DIM), *torch.randn(2, batch, KV_HEADS, keys, DIM)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``(B, Sq, Hq, D)``."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    return out.transpose(1, 2)


def padding_mask(padding: str, batch: int, length: int, rng: random.Random) -> Tensor | None:
    if padding == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        if padding in ("left", "both"):
            mask[row, : rng.randrange(length)] = False
        if padding in ("right", "both"):
            mask[row, length - rng.randrange(length) :] = False
        if padding == "holes":
            mask[row] = torch.tensor([rng.random() < 0.6 for _ in range(length)])
    return mask


def assert_as_transformers(arguments: dict[str, Any], keys: int) -> None:
    q, k, v = states(arguments["batch_size"], arguments["q_length"], keys)
    expected_mask = matrix(arguments)
    mask = masks.visible_keys(**arguments)
    if isinstance(offset := arguments.get("q_offset"), Tensor):
        offset.add_(arguments["q_length"])  # as a static cache does in its first layer
    for _ in range(2):  # two layers
        out, _ = attention.forward(LIAR, q, k, v, mask, sliding_window=3)
    expected = attend(q, k, v, expected_mask)
    rows = expected_mask.any(-1)
    padding, queries = arguments["attention_mask"], arguments["q_length"]
    if padding is not None and ("local_size" in arguments or "allow_is_bidirectional_skip" not in arguments):
        rows &= padding[:, -queries:]  # what a query that is padding gets is not used
    torch.testing.assert_close(out[rows], expected[rows], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_as_with_the_matrix(kind: str, padding: str, place: str, rng: random.Random, rounds: Any) -> None:
    torch.manual_seed(rng.randrange(2**31))
    for _ in range(rounds(6)):
        batch, queries, window = rng.randint(1, 3), rng.randint(1, 12), rng.randint(2, 9)
        past = 0 if place == "alone" else rng.randint(0, 9)
        places: dict[str, Any] = dict(batch_size=batch, q_length=queries, q_offset=past, kv_offset=0)
        keys = past + queries
        if place.startswith("static"):
            keys += rng.randint(1, 8)
            places["q_offset"] = torch.tensor(past) if place.endswith("tensor") else past
        elif place == "sliding cache":
            places["kv_offset"] = max(0, past - window + 1)
            keys = past + queries - places["kv_offset"]
        mask = padding_mask(padding, batch, past + queries, rng)
        arguments = mask_arguments(kind, window, kv_length=keys, attention_mask=mask, **places)
        if place == "sliding cache" and kind != "window":
            continue  # transformers makes no such mask
        try:
            assert_as_transformers(arguments, keys)
        except ValueError as error:
            assert str(error).startswith("pagedflash: ") and 'use attn_implementation="sdpa" or "eager"' in str(error)
            nothing_seen = "shows a new token no key" in str(error) and padding in ("both", "holes")
            assert nothing_seen or ("window" in kind and (padding == "holes" or place != "alone")), error


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences(window: int | None, rng: random.Random, rounds: Any) -> None:
    """Told by position_ids, in several rows; transformers hands on what it found in them."""
    for _ in range(rounds(6)):
        batch, length = rng.randint(1, 3), rng.randint(2, 20)
        starts = torch.tensor([[i == 0 or rng.random() < 0.3 for i in range(length)] for _ in range(batch)])
        sequences = starts.cumsum(-1)
        of_one_sequence = masking_utils.packed_sequence_mask_function(sequences)
        arguments = mask_arguments("window" if window else "causal", window or 1)
        packed = masking_utils.and_masks(arguments["mask_function"], of_one_sequence)
        places = dict(batch_size=batch, q_length=length, kv_length=length, attention_mask=None)
        assert_as_transformers({**arguments, **places, "mask_function": packed, "allow_is_causal_skip": False}, length)


@pytest.mark.parametrize("use_vmap", [True, False])
def test_a_function_of_the_models_own_is_looked_at_as_a_whole(use_vmap: bool) -> None:
    """Images that see all of themselves, as in Gemma 3, anywhere; and what comes to the usual mask after all."""
    length = 9
    arguments = mask_arguments("causal", 1, batch_size=2, q_length=length, kv_length=length, attention_mask=None)

    def with_images(images: list[int]) -> dict[str, Any]:
        image = torch.tensor([[-1] * length, images])
        both = masking_utils.or_masks(masking_utils.causal_mask_function, same(image))
        return {**arguments, "mask_function": both, "allow_is_causal_skip": False, "use_vmap": use_vmap}

    def same(image: Tensor) -> Any:
        return lambda b, h, q, kv: (image[b, q] == image[b, kv]) & (image[b, q] >= 0)

    q, k, v = states(2, length, length)
    for images in ([-1, -1, 0, 0, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1, 0, -1, -1], [0] * length):
        mask = masks.visible_keys(**with_images(images))
        with pytest.raises(ValueError, match=r"pagedflash: this model's mask is not supported.*sdpa"):
            attention.forward(LIAR, q, k, v, mask)
    assert_as_transformers(with_images([-1] * length), length)
    over_a_static_cache = dict(q_length=1, q_offset=torch.tensor(4))
    assert_as_transformers({**with_images([-1, 0, 0, -1, -1, -1, -1, -1, -1]), **over_a_static_cache}, length)
    assert_as_transformers(with_images([0, -1, -1, -1, -1, -1, -1, -1, 1]), length)


def test_a_long_mask_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_PIECE", 64)
    test_packed_sequences(3, random.Random(0), lambda usual: usual)
    test_a_function_of_the_models_own_is_looked_at_as_a_whole(use_vmap=False)


def test_what_layers_say_counts_for_masks_that_models_make_themselves() -> None:
    """A plain padding mask, longer or shorter than the keys, of any dtype that says 1 and 0."""
    q, k, v = states(2, 3, 7)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :4] = 0
    seen = padding[:, None, -7:].bool() & torch.ones(3, 7).tril(4).bool()
    for mask in (padding, padding.float(), padding[:, -7:].bool()):
        out, _ = attention.forward(SimpleNamespace(is_causal=True), q, k, v, mask)
        torch.testing.assert_close(out, attend(q, k, v, seen), rtol=1e-4, atol=1e-5)
    out, _ = attention.forward(SimpleNamespace(), q, k, v, padding, is_causal=False)
    torch.testing.assert_close(out, attend(q, k, v, padding[:, None, -7:].bool().expand(2, 3, 7)), rtol=1e-4, atol=1e-5)
    out, _ = attention.forward(SimpleNamespace(is_causal=True), q, k, v, None, sliding_window=2)
    seen = torch.ones(3, 7).tril(4).triu(3).bool().expand(2, 3, 7)
    torch.testing.assert_close(out, attend(q, k, v, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 3, 7),
        torch.ones(2, 3, 7, dtype=torch.bool),
        torch.zeros(2, 7),
        torch.tensor([[0.0] * 6 + [-1e9]] * 2),
    ],
    ids=["4D", "3D", "added, nothing", "added"],
)
def test_other_masks_are_refused(mask: Tensor) -> None:
    q, k, v = states(2, 3, 7)
    with pytest.raises(
        ValueError, match=r'^pagedflash: a mask .* is not supported: .*; use attn_implementation="sdpa" or "eager"$'
    ):
        attention.forward(LIAR, q, k, v, mask)


def test_a_mask_copied_to_another_device() -> None:
    """A copy has its values only: with what the layer says that is enough for padding, and for nothing else."""
    arguments = mask_arguments("causal", 1, batch_size=2, q_length=7, kv_length=7)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    q, k, v = states(2, 7, 7)
    copied = masks.visible_keys(**arguments, attention_mask=padding).clone()
    out, _ = attention.forward(SimpleNamespace(is_causal=True), q, k, v, copied)
    expected = attend(q, k, v, matrix({**arguments, "attention_mask": padding}))
    torch.testing.assert_close(out[padding], expected[padding], rtol=1e-4, atol=1e-5)

    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2))
    function = masking_utils.and_masks(masking_utils.causal_mask_function, packed)
    copied = masks.visible_keys(**{**arguments, "mask_function": function, "allow_is_causal_skip": False}).clone()
    with pytest.raises(ValueError, match=r"a mask of shape .* is not supported"):
        attention.forward(SimpleNamespace(is_causal=True), q, k, v, copied)


def test_a_new_token_that_sees_nothing_is_refused() -> None:
    """Recurrent Gemma's masks over a static cache, up to 5.24."""
    arguments = mask_arguments("causal", 1, batch_size=2, q_length=1, kv_length=9)
    padding = torch.tensor([[0, 0] + [1] * 7, [1] * 9]).bool()
    with pytest.raises(ValueError, match="pagedflash: a mask that shows a new token no key is not supported"):
        masks.visible_keys(**arguments, attention_mask=padding)


def test_a_mask_for_other_keys_is_refused() -> None:
    mask = masks.visible_keys(**mask_arguments("causal", 1, batch_size=2, q_length=3, kv_length=7, q_offset=4))
    with pytest.raises(ValueError, match="a mask made for 3 queries and 7 keys with 3 queries and 6 keys is not supported"):
        attention.forward(LIAR, *states(2, 3, 6), mask)


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices"])
def test_what_adds_to_scores_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"pagedflash: {name} of SimpleNamespace is not supported"):
        attention.forward(LIAR, *states(1, 3, 3), None, **{name: torch.zeros(1)})


def test_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r'^pagedflash: output_attentions is not supported: .*; use attn_implementation="eager"$'
    ):
        attention.forward(LIAR, *states(1, 3, 3), None, output_attentions=True)


@pytest.mark.parametrize(
    "change", [lambda x: x.repeat(1, 1, 1, 2000 // DIM), lambda x: x.double()], ids=["head dim", "dtype"]
)
def test_what_no_kernel_takes_names_the_layer(change: Any) -> None:
    """In one sentence, which says what to use instead."""
    with pytest.raises(ValueError, match=r'^pagedflash: SimpleNamespace is not supported: .*; use attn_impl\S+ or "eager"$'):
        attention.forward(LIAR, *map(change, states(1, 3, 3)), None)


def test_packed_by_lengths_whatever_the_mask_says() -> None:
    q, k, v = states(1, 7, 7)
    offsets = torch.tensor([0, 3, 7])
    lengths = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=4, max_length_k=torch.tensor(4))
    mask = masks.visible_keys(**mask_arguments("causal", 1, batch_size=1, q_length=7, kv_length=7))
    sequences = torch.tensor([[0] * 3 + [1] * 4])
    seen = torch.ones(7, 7).tril().bool() & (sequences[..., None] == sequences[:, None])
    for given in (None, mask):
        out, _ = attention.forward(LIAR, q, k, v, given, **lengths)
        torch.testing.assert_close(out, attend(q, k, v, seen), rtol=1e-4, atol=1e-5)


def test_values_of_another_dtype_than_the_queries() -> None:
    """A norm or rotary embedding in float32 in a bfloat16 model, and autocast."""
    q, k, v = states(1, 5, 5)
    seen = torch.ones(1, 5, 5).tril().bool()
    out, _ = attention.forward(LIAR, q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(q, k, v, seen), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention.forward(LIAR, q, k, v, None)
    assert out.dtype == torch.bfloat16


def test_only_holes_copy_keys() -> None:
    """Left and right padding and static caches are read where they lie; what that takes is worked out once."""
    q, k, v = states(2, 1, 9)
    found = []
    find = masks.KeyMask._find
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks.KeyMask, "_find", lambda self, *args: found.append(self) or find(self, *args))
        for padding, layout in (([0, 0] + [1] * 7, "dense"), ([1, 0] + [1] * 7, "varlen")):
            mask = masks.visible_keys(
                **mask_arguments("causal", 1, batch_size=2, q_length=1, kv_length=9, q_offset=8),
                attention_mask=torch.tensor([padding, [1] * 9]).bool(),
            )
            with pagedflash.count_calls() as calls:
                for _ in range(3):
                    attention.forward(LIAR, q, k, v, mask)
            assert {kind.layout for kind in calls} == {layout}
    assert len(found) == 2
