"""May continuous batching decode through block tables? transformers says yes on CUDA and XPU only; here, on every device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from . import hooks

_decodes_through_block_tables: set[str] = set()


def open_gate(seen: Mapping[str, Any]) -> None:
    """Replace transformers' check by itself, its other conditions included, with one answer in it changed.

    Args:
        seen: what else the check sees for "pagedflash" in place of globals of its module.

    Warns:
        RuntimeWarning: this transformers decides elsewhere.
    """
    try:
        module = _module()
        decide_elsewhere = module.ensure_decode_fast_path_is_available
        decide_on_any_device = hooks.with_globals(
            decide_elsewhere, is_flash_attention_requested=_yes, is_torch_xpu_available=_yes
        )
        decide_for_us = hooks.with_globals(decide_on_any_device, **seen)
    except (AttributeError, ImportError, TypeError):
        _warn_closed()
        return

    @functools.wraps(decide_elsewhere)
    def decide(config: Any, *args: Any, **kwargs: Any) -> None:
        name = hooks.base_name(config._attn_implementation)
        on_any_device = decide_for_us if name == hooks.NAME else decide_on_any_device
        (on_any_device if name in _decodes_through_block_tables else decide_elsewhere)(config, *args, **kwargs)

    allow((hooks.NAME,))
    hooks.replace(module, "ensure_decode_fast_path_is_available", decide)
    if not is_open():
        hooks.undo_last()
        _warn_closed()


def allow(names: Iterable[str]) -> None:
    """These implementations decode through block tables, until the changes are taken back."""
    if not _decodes_through_block_tables:
        hooks.on_undo(_decodes_through_block_tables.clear)
    _decodes_through_block_tables.update(names)


def is_open() -> bool:
    """Whether continuous batching would decode through block tables with "pagedflash" now, by transformers' own answer.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = hooks.NAME
    batching = ContinuousBatchingConfig(max_blocks_per_request=1)
    try:
        _module().ensure_decode_fast_path_is_available(config, batching, False)
    except (AttributeError, ImportError, TypeError):
        return False
    return bool(batching.max_blocks_per_request == 1)


def _module() -> Any:
    import transformers.generation.continuous_batching.initialization as gate

    return gate


def _yes(*args: Any, **kwargs: Any) -> bool:
    return True


def _warn_closed() -> None:
    warnings.warn(
        f"pagedflash: transformers {hooks.version()} decides elsewhere whether to decode through block tables, so "
        "continuous batching decodes through flash_attn_varlen_func, which is slower.",
        RuntimeWarning,
        stacklevel=4,
    )
