"""enable() and disable(): nothing but "pagedflash" changes, and everything goes back."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from models import PAGE_SIZE_OPTION, batched, enabled, layouts, padded  # noqa: F401
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, masking_utils
from transformers import modeling_flash_attention_utils as flash
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization as gate
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pagedflash
import pagedflash.transformers as integration


@pytest.fixture(autouse=True)
def disabled_afterwards() -> Any:
    yield
    integration.disable()


def state() -> list[dict[str, Any]]:
    """Everything of transformers that enable() could touch."""
    attributes = [dict(vars(owner)) for owner in (flash, gate, PreTrainedModel, DynamicCache)]
    return [*attributes, dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)]


def llama(name: str = "pagedflash") -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=63
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=name).eval()


def blocks_allowed(name: str) -> int:
    """What the gate leaves of two blocks a request."""
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = name
    batching = ContinuousBatchingConfig(max_blocks_per_request=2)
    gate.ensure_decode_fast_path_is_available(config, batching, False)
    return batching.max_blocks_per_request


def test_disable_puts_everything_back() -> None:
    before = state()
    integration.enable()
    assert state() != before
    padded(llama(), [[1, 2], [3]], max_new_tokens=2)  # leaves loaded functions behind
    integration.disable()
    assert state() == before
    with pytest.raises((ValueError, ImportError)):
        llama()


def test_enable_twice_is_enable_once() -> None:
    before = state()
    integration.enable()
    once = state()
    integration.enable()
    assert state() == once
    integration.disable()
    assert state() == before
    integration.disable()
    assert state() == before


def test_only_pagedflash_decodes_through_block_tables() -> None:
    others = ("flash_attention_2", "flash_attention_3", "sdpa", "paged|eager", "kernels-community/metal-flash-sdpa")
    before = [blocks_allowed(name) for name in others]
    assert blocks_allowed("pagedflash") == 0 and not integration.decode_fast_path_is_open()
    integration.enable()
    assert blocks_allowed("pagedflash") == 2 and integration.decode_fast_path_is_open()
    assert [blocks_allowed(name) for name in others] == before


def test_a_user_who_turned_block_tables_off_keeps_them_off() -> None:
    integration.enable()
    model = llama()
    with pagedflash.count_calls() as calls:
        model.generate_batch(
            [[1, 2, 3]],
            max_new_tokens=4,
            continuous_batching_config=ContinuousBatchingConfig(
                **{PAGE_SIZE_OPTION: 4, "num_blocks": 8, "max_batch_tokens": 16, "max_blocks_per_request": 0}
            ),
        )
    assert set(layouts(calls)) == {"varlen"}


@pytest.mark.parametrize("change", ["gone", "other conditions", "another kind"])
def test_a_moved_gate_is_said_in_one_sentence_and_varlen_serves(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closes_for_reasons_of_its_own(config: Any, cb_config: Any, user_requested: bool) -> None:
        cb_config.max_blocks_per_request = 0

    with monkeypatch.context() as patch:
        if change == "gone":
            patch.delattr(gate, "ensure_decode_fast_path_is_available")
        else:
            no_function = functools.partial(gate.ensure_decode_fast_path_is_available)
            replacement = closes_for_reasons_of_its_own if change == "other conditions" else no_function
            patch.setattr(gate, "ensure_decode_fast_path_is_available", replacement)
        there = vars(gate).get("ensure_decode_fast_path_is_available")
        with pytest.warns(RuntimeWarning, match=f"transformers {transformers.__version__} decides elsewhere") as caught:
            integration.enable()
        assert str(caught[0].message).count(". ") == 0 and caught[0].filename == __file__
        assert not integration.decode_fast_path_is_open()
        assert vars(gate).get("ensure_decode_fast_path_is_available") is there

    with pagedflash.count_calls() as calls:
        batched(llama(), [[1, 2, 3], [4]], max_new_tokens=4, page_size=4, num_blocks=8)
    assert set(layouts(calls)) == {"varlen"}
    integration.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        integration.enable()
    assert integration.decode_fast_path_is_open()


@pytest.mark.parametrize(
    "owner, name",
    [
        (flash, "_lazy_imports"),
        (masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS"),
        (PreTrainedModel, "get_correct_attn_implementation"),
    ],
)
def test_no_place_for_an_implementation_leaves_no_trace(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name)
    before = state()
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__} has no place"):
        integration.enable()
    assert state() == before and not integration.is_enabled()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers is not installed"):
        integration.enable()
    assert not integration.is_enabled()


def test_names_come_as_a_list() -> None:
    with pytest.raises(TypeError, match="decode_fast_path_for is of type str"):
        integration.enable(decode_fast_path_for="kernels-community/metal-flash-sdpa")


@pytest.mark.usefixtures("enabled")
def test_compiled_forward_as_plain() -> None:
    model = llama()
    ids = torch.arange(1, 17).view(2, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
        torch.testing.assert_close(compiled, model(ids).logits)
