"""Which models may use "pagedflash": those that transformers runs with flash attention, submodels included.

transformers asks that of its own "flash_attention_2", and not of other names.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from . import hooks
from .refusals import refuse


def install() -> None:
    """Ask every model, until the changes are taken back: when it is made, and when its implementation is set."""
    from transformers import PreTrainedModel

    check_elsewhere = PreTrainedModel._check_and_adjust_attn_implementation
    correct_elsewhere = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(check_elsewhere)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if hooks.base_name(attn_implementation) == hooks.NAME:
            _list(self)
        return check_elsewhere(self, attn_implementation, *args, **kwargs)

    @functools.wraps(correct_elsewhere)
    def correct(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if hooks.base_name(requested_attention) == hooks.NAME:
            _check(self)
        return correct_elsewhere(self, requested_attention, *args, **kwargs)

    hooks.replace(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    hooks.replace(PreTrainedModel, "get_correct_attn_implementation", correct)


def _list(model: Any) -> None:
    """Models with attention sinks list the flash kernels that have them, and pagedflash has them too. transformers would
    replace an implementation that is not listed.

    Raises:
        ValueError: the model lists other kernels (block-sparse).
    """
    listed = model._compatible_flash_implementations
    if listed is None or hooks.NAME in listed:
        return
    if not any("flash" in name for name in listed):
        refuse(type(model).__name__, f"it runs with {' or '.join(listed)} only")
    model._compatible_flash_implementations = [*listed, hooks.NAME]


def _check(model: Any) -> None:
    """Refuse a model, or a part of one, whose attention never asks for ours, or is not what flash attention does.

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
