"""Models that are split over several ranks: which number of ranks can share the heads of a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from . import hooks

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
"""Layers whose output holds keys; split by columns, each rank has its own KV heads."""


def check_ranks(config: Any, ranks: int, plan: Mapping[str, str] | None = None) -> None:
    """Refuse a number of ranks that leaves some with a part of a KV head.

    transformers would load the model and fail in its first layer, on the shape of a view.

    Args:
        config: of the model.
        ranks: how many processes share the model.
        plan: how each layer is split; by default the model's own, which is what ``tp_plan="auto"`` takes.

    Raises:
        ValueError: the KV heads do not divide by the ranks.
    """
    text = config.get_text_config()
    plan = plan or text.base_model_tp_plan or {}
    splits_heads = any(style == "colwise" and layer.rpartition(".")[2] in _KEY_PROJECTIONS for layer, style in plan.items())
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if not splits_heads or not isinstance(heads, int) or heads % ranks == 0:
        return
    numbers = [str(n) for n in range(1, heads + 1) if heads % n == 0]
    raise ValueError(
        f"pagedflash: {ranks} ranks cannot share the KV heads of {text.model_type} ({heads}) evenly; use {_one_of(numbers)}"
    )


def check_when_split() -> None:
    """Have transformers ask :func:`check_ranks` before it splits a model that runs on "pagedflash" and loads its weights."""
    from transformers import PreTrainedModel

    name = "maybe_distribute_model"  # a class method of some base
    owner = next((base for base in PreTrainedModel.__mro__ if name in vars(base)), None)
    if owner is None:
        return  # the check is a courtesy
    original = vars(owner)[name]

    @functools.wraps(original.__func__)
    def distribute(cls: type, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        ranks = getattr(distributed_config, "tp_size", None) or 1
        if hooks.base_name(model.config._attn_implementation) == hooks.NAME:
            plan = getattr(distributed_config, "tp_plan", None)
            check_ranks(model.config, ranks, plan if isinstance(plan, dict) else None)
        return original.__func__(cls, model, distributed_config, *args, **kwargs)

    setattr(owner, name, classmethod(distribute))
    hooks.on_undo(lambda: setattr(owner, name, original))


def _one_of(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} or {numbers[-1]}"
