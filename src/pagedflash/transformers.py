"""Hugging Face transformers on pagedflash: a short name of :mod:`pagedflash.integrations.transformers`."""

from .integrations.transformers import NAME, decode_fast_path_is_open, disable, enable, is_enabled

__all__ = ["NAME", "decode_fast_path_is_open", "disable", "enable", "is_enabled"]
