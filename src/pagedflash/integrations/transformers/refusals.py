"""What pagedflash cannot do in transformers, said in one sentence."""

from __future__ import annotations

import sys
from typing import Any, NoReturn


def refuse(what: str, why: str) -> NoReturn:
    """Raise the one form of error of this package: what came, why it cannot be done, what to use instead."""
    raise ValueError(f'pagedflash: {what} is not supported: {why}; use attn_implementation="sdpa" or "eager"')


def check_model(model: Any) -> None:
    """Refuse a model, or a part of one, that transformers does not run with flash attention.

    transformers asks this of its own ``flash_attention_2``, but not of other names.

    Raises:
        ValueError: naming the model's class.
    """
    name = type(model).__name__
    if not model._supports_flash_attn:
        refuse(name, "transformers says that its attention is not one that flash attention can do")
    if (table := _table_without_us(type(model))) is not None:
        refuse(name, f"it picks its attention from a table of its own, {table}")
    if not model._can_set_attn_implementation():
        refuse(name, "it does not ask transformers for its attention function")


def _table_without_us(model_class: type) -> str | None:
    """The name of a table ``{"eager": ..., "sdpa": ...}`` in the modules that define the model."""
    for module in dict.fromkeys(base.__module__ for base in model_class.__mro__):
        if not module.startswith(("transformers.models", "transformers_modules")):
            continue
        for name, value in vars(sys.modules[module]).items():
            if isinstance(value, dict) and "eager" in value:
                return name
    return None
