"""What pagedflash cannot do in transformers, said in one sentence."""

from __future__ import annotations

from typing import NoReturn


def refuse(what: str, why: str, instead: str = '"sdpa" or "eager"') -> NoReturn:
    """Raise the one form of error of this package: what came, why it cannot be done, what to use instead."""
    raise ValueError(f"pagedflash: {what} is not supported: {why}; use attn_implementation={instead}")
