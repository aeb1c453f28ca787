"""A cache layer that grows in place. transformers' own copies all keys and values of a sequence for each new token."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from . import hooks

_SLACK = 64
"""Tokens that there is room for at the least, when a layer grows; or a quarter of what it holds."""


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
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if not self._has_room(end):
            self._room, self._owner = (self._larger(self.keys, end), self._larger(self.values, end)), id(self)
        assert self._room is not None
        keys, values = self._room
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        self._left = self.keys, self.values
        return self._left

    def _has_room(self, length: int) -> bool:
        if self._room is None or self._left is None or self._owner != id(self):
            return False
        untouched = self.keys is self._left[0] and self.values is self._left[1]
        return untouched and length <= self._room[0].shape[-2]

    def _can_grow(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether there is something to append to, by plain tensors that nothing is recorded for."""
        if torch.compiler.is_compiling() or not self.is_initialized or self.get_seq_length() == 0:
            return False
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad)
        alike = all(
            (new.dtype, new.device) == (old.dtype, old.device)
            for new, old in ((key_states, self.keys), (value_states, self.values))
        )
        return alike and not recorded

    @staticmethod
    def _larger(tensor: Tensor, length: int) -> Tensor:
        batch, heads, filled, dim = tensor.shape
        larger = tensor.new_empty(batch, heads, length + max(_SLACK, length // 4), dim)
        larger[:, :, :filled] = tensor
        return larger


def install() -> None:
    """Give caches that are made for a model with "pagedflash" such layers, until the changes are taken back."""
    make_elsewhere = DynamicCache.__init__

    @functools.wraps(make_elsewhere)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        make_elsewhere(self, *args, **kwargs)
        config = kwargs.get("config")
        if config is not None and hooks.base_name(config.get_text_config(decoder=True)._attn_implementation) == hooks.NAME:
            fresh = [type(layer) is DynamicLayer and not layer.is_initialized for layer in self.layers]
            self.layers = [GrowingLayer() if new else layer for layer, new in zip(self.layers, fresh)]

    hooks.replace(DynamicCache, "__init__", make)
