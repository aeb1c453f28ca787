"""The cache of ``generate()``: it grows in place, and keeps keys and values in the format in force.

transformers' own copies all keys and values of a sequence for each new token.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from . import formats, hooks

_SLACK = 64
"""Tokens that there is room for at the least, when a layer grows; or a quarter of what it holds."""

_SMALL = 2**17
"""Bytes of keys, up to which copying all of them takes less time than finding the place of the new ones."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A :class:`DynamicLayer` whose keys and values are views of larger tensors, into which new tokens are written.

    Whatever else replaces ``keys`` and ``values`` (cropping, beam search, offloading, a copy of the layer) is left as it is:
    the next update moves them to tensors of their own, so no view taken earlier changes.
    """

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor] | None = None  # (B, Hkv, capacity, D) and Dv
    _left: tuple[Tensor, Tensor] | None = None  # keys and values as the last update left them
    _owner: int = 0  # the layer that the room belongs to, and not to a copy of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``(B, Hkv, tokens, D)`` and ``(B, Hkv, tokens, Dv)``; returns all keys and values."""
        if not self._can_grow(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        start, new = self.keys.shape[-2], key_states.shape[-2]
        end = start + new
        if not self._has_room(end):
            self._room, self._owner = (self._larger(self.keys, end), self._larger(self.values, end)), id(self)
        assert self._room is not None
        keys, values = self._room
        keys.narrow(-2, start, new).copy_(key_states)
        values.narrow(-2, start, new).copy_(value_states)
        self.keys, self.values = self._left = keys.narrow(-2, 0, end), values.narrow(-2, 0, end)
        return self._left

    def _has_room(self, length: int) -> bool:
        if self._room is None or self._left is None or self._owner != id(self):
            return False
        untouched = self.keys is self._left[0] and self.values is self._left[1]
        return untouched and length <= self._room[0].shape[-2]

    def _can_grow(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether there is enough to append to, by plain tensors that nothing is recorded for."""
        if torch.compiler.is_compiling() or not self.is_initialized or self.keys.nbytes <= _SMALL:
            return False
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad)
        return not recorded and _alike(key_states, self.keys) and _alike(value_states, self.values)

    @staticmethod
    def _larger(tensor: Tensor, length: int) -> Tensor:
        batch, heads, filled, dim = tensor.shape
        larger = tensor.new_empty(batch, heads, length + max(_SLACK, length // 4), dim)
        larger[:, :, :filled] = tensor
        return larger


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and one.device == other.device


class _InFormat(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps keys and values as :func:`.formats.store` returns them. Models see :class:`.formats.Stored`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*formats.store(key_states, value_states), *args, **kwargs)
        return formats.Stored.of(keys, key_states), formats.Stored.of(values, value_states)


class GrowingLayerInFormat(_InFormat, GrowingLayer):
    pass


class SlidingWindowLayerInFormat(_InFormat, DynamicSlidingWindowLayer):  # type: ignore[misc]
    pass


def install() -> None:
    """Give caches that are made for a model with "pagedflash" such layers, until the changes are taken back."""
    make_elsewhere, make_static_elsewhere = DynamicCache.__init__, StaticCache.__init__

    @functools.wraps(make_elsewhere)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        make_elsewhere(self, *args, **kwargs)
        config = kwargs.get("config")
        if config is not None and _is_ours(config):
            if formats.kv_cache_dtype is not None and config.is_encoder_decoder:
                _refuse_format("the caches of encoders and decoders")
            self.layers = [_ours(layer) for layer in self.layers]

    @functools.wraps(make_static_elsewhere)
    def make_static(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if formats.kv_cache_dtype is not None and _is_ours(config):
            _refuse_format("static caches")
        make_static_elsewhere(self, config, *args, **kwargs)

    hooks.replace(DynamicCache, "__init__", make)
    hooks.replace(StaticCache, "__init__", make_static)


def _is_ours(config: Any) -> bool:
    return hooks.base_name(config.get_text_config(decoder=True)._attn_implementation) == hooks.NAME


def _ours(layer: Any) -> Any:
    """The layer to have in place of one of transformers': another for keys and values, where it holds nothing yet."""
    in_format = formats.kv_cache_dtype is not None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.is_initialized:
        return layer
    if type(layer) is DynamicLayer:
        return GrowingLayerInFormat() if in_format else GrowingLayer()
    return SlidingWindowLayerInFormat(layer.sliding_window) if in_format else layer


def _refuse_format(what: str) -> NoReturn:
    raise ValueError(
        f"pagedflash: kv_cache_dtype is {formats.kv_cache_dtype_name()!r}, but {what} are kept in the model's dtype; call "
        "disable(), and enable() without it"
    )
