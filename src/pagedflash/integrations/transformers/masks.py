"""The mask function of "pagedflash": which keys each query sees, said in lengths instead of a matrix.

transformers asks an implementation's mask function once a forward pass and hands what it returns to every layer. Ours
returns a ``(batch, keys)`` bool tensor that is True for keys that may be seen. It carries a :class:`KeyMask`, which knows
what the tensor cannot say (causal or not, window, packed sequences) and works out once, not once a layer, how to say it to
a kernel. Nothing relies on what layers say of themselves: some say that they are causal, and their model's mask is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from .refusals import refuse

_ATTRIBUTE = "_pagedflash_key_mask"

_PIECE = 2**24
"""Entries of a mask that are looked at together."""


class KeyRanges(NamedTuple):
    """Every sequence sees one range of its keys, where they lie: a call of ``flash_attn_with_kvcache``."""

    ends: Tensor  # (B,) int32
    starts: Tensor | None  # (B,) int32; None = 0


class Packing(NamedTuple):
    """Sequences within the tokens of all rows, one after another: a call of ``flash_attn_varlen_func``."""

    cu_seqlens_q: Tensor  # (sequences + 1,) int32
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused: Tensor | None = None  # (sequences,) int32, used queries and keys of each; None = all
    rows_q: Tensor | None = None  # rows of the flattened (B * Sq) queries that are used; None = all
    rows_k: Tensor | None = None  # the same of the keys


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What transformers' ``ALL_MASK_ATTENTION_FUNCTIONS`` calls, with the arguments of its ``sdpa_mask``.

    Returns:
        ``(batch_size, kv_length)`` bool with a :class:`KeyMask`; ``(batch_size, 1, kv_length)`` if there may be more to it.
    """
    if attention_mask is not None and hasattr(attention_mask, _ATTRIBUTE):
        return attention_mask  # made by an outer model for the one inside; transformers leaves 4D masks as they are, too
    causal = mask_function is not bidirectional_mask_function and "allow_is_bidirectional_skip" not in kwargs
    first_query = q_offset - kv_offset  # a tensor's value now: a static cache moves it on before the layers attend
    end = first_query + q_length if causal else kv_length
    window = local_size if local_size is not None and kv_length > local_size else None
    # transformers forbids these shortcuts where the mask is more than causal or bidirectional with a window.
    standard = (
        mask_function is causal_mask_function
        or mask_function is bidirectional_mask_function
        or kwargs.get("allow_is_causal_skip", False)
        or kwargs.get("allow_is_bidirectional_skip", False)
    )
    padding = _padding(attention_mask, kv_offset, kv_length)
    everything = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    visible = everything if padding is None else padding.clone()  # the caller's mask may come again, in another pass
    if not (isinstance(end, int) and end >= kv_length):
        visible &= torch.arange(kv_length, device=visible.device) < end
    key_mask = KeyMask(causal, window, first_query, q_length, kv_length, end, padding)
    if not standard:
        visible = visible[:, None]  # so that it is refused, should it lose its KeyMask on the way to another device
        use_vmap = kwargs.get("use_vmap", False)
        key_mask.function = MaskFunction(mask_function, use_vmap, first_query, kv_offset, batch_size, visible.device)
    if q_length == 1 and not torch.compiler.is_compiling():
        key_mask.where(batch_size, visible.device)  # generate() compiles the step that gets this mask: it finds it done
    setattr(visible, _ATTRIBUTE, key_mask)
    return visible


def key_mask_of(mask: Tensor, causal: bool, window: int | None, queries: int, keys: int) -> KeyMask:
    """The :class:`KeyMask` of a mask as it came to a layer.

    ``causal`` and ``window`` are what the layer says of itself: they count only for masks that models make on their own, or
    that were copied to the device of a layer.
    """
    known: KeyMask | None = getattr(mask, _ATTRIBUTE, None)
    if known is not None:
        any_queries = not known.causal and known.window is None
        if known.keys != keys or not (any_queries or known.queries == queries):
            made_for = f"{known.queries} queries and {known.keys} keys"
            refuse(f"a mask made for {made_for} with {queries} queries and {keys} keys", "it cannot be cut to fit")
        return known
    if mask.dim() != 2:
        refuse(f"a mask of shape {tuple(mask.shape)}", "flash attention takes padding masks of shape (batch, keys)")
    if mask.is_floating_point() and (torch.compiler.is_compiling() or not mask.any() or ((mask != 0) & (mask != 1)).any()):
        refuse("a mask that is added to the scores", "flash attention takes padding masks, 1 for tokens and 0 for padding")
    padding = mask[:, -keys:].bool()
    if (missing := keys - padding.shape[1]) > 0:  # slots of a static cache that are not written yet
        padding = torch.nn.functional.pad(padding, (0, missing))
    written = min(mask.shape[1], keys)
    return KeyMask(causal, window, written - queries, queries, keys, written if causal else keys, padding)


@dataclass
class MaskFunction:
    """A mask function that may be more than causal or bidirectional with a window, and where its queries and keys are."""

    function: Callable[..., Any]
    use_vmap: bool
    first_query: int | Tensor  # counted in keys of the cache, as in KeyMask
    kv_offset: int
    batch_size: int
    device: torch.device

    def shows(self, first: int, queries: int, keys: int) -> Tensor:
        """``(B, queries, keys)`` bool: which keys the queries from the ``first`` on see."""
        return sdpa_mask(  # type: ignore[no-any-return]
            self.batch_size,
            queries,
            keys,
            q_offset=self.first_query + self.kv_offset + first,
            kv_offset=self.kv_offset,
            mask_function=self.function,
            allow_is_causal_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )[:, 0]

    def shows_one_before(self, queries: int) -> Tensor:
        """``(B, queries)`` bool: whether each query sees the key before its own."""
        positions = torch.arange(queries, device=self.device) + self.first_query + self.kv_offset
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        seen: Tensor = self.function(rows, torch.zeros_like(rows), positions, (positions - 1).clamp(min=0))
        return seen.expand(self.batch_size, queries)


@dataclass
class KeyMask:
    """Which keys each query sees. Query ``i`` sits at key slot ``first_query + i``; it sees keys that are not padding, up to
    its own slot if causal, and none further away than the window allows. Only :meth:`where` knows whether ``causal`` is all
    there is to a mask that comes with a function, so ask it first.
    """

    causal: bool
    window: int | None  # keys that a query sees with itself (causal), or to either side (bidirectional)
    first_query: int | Tensor
    queries: int
    keys: int
    end: int | Tensor  # no query sees keys from here on
    padding: Tensor | None  # (B, keys) bool, False = padding
    function: MaskFunction | None = None  # if this may not be all there is to the mask
    _where: KeyRanges | Packing | None = None
    _found: bool = False

    @property
    def window_size(self) -> tuple[int, int]:
        """As the functions take it."""
        if self.window is None:
            return -1, -1
        return (self.window - 1, 0) if self.causal else (self.window, self.window)

    def where(self, batch_size: int, device: torch.device) -> KeyRanges | Packing | None:
        """The keys of each sequence, as a kernel wants to know it; None = all of them. Worked out once.

        Raises:
            ValueError: flash attention cannot express this mask.
        """
        if not self._found:
            self._where, self._found = self._find(batch_size, device), True
        return self._where

    def _find(self, batch_size: int, device: torch.device) -> KeyRanges | Packing | None:
        if self.function is not None and (first_keys := self._check(self.function)) is not None:
            return _packed(first_keys)
        if self.window is not None and not self.causal and not (self.first_query == 0 and self.queries == self.keys):
            refuse("a window to both sides over a cache", "flash attention aligns queries with the last key")
        if self.padding is None and isinstance(self.end, int) and self.end == self.keys:
            return None
        ends = torch.zeros(batch_size, dtype=torch.int32, device=device) + self.end
        if self.padding is None:
            return self._ranges(ends, None)

        slots = torch.arange(self.keys, dtype=torch.int32, device=device)
        seen = (self.padding & (slots < self.end)).expand(batch_size, -1)
        counts = seen.sum(-1, dtype=torch.int32)
        lasts = torch.where(seen, slots + 1, 0).amax(-1)
        firsts = torch.where(seen, slots, self.keys).amin(-1).minimum(lasts)
        in_one_piece, any_seen = (lasts - firsts == counts).all(), (counts > 0).all()
        decoding = self.causal and self.queries == 1
        if torch.compiler.is_compiling():
            ranges = in_one_piece & any_seen if decoding else in_one_piece
            torch._assert_async(ranges, "pagedflash: attention_mask has padding between tokens, which cannot be compiled")
        else:
            in_one_piece, any_seen = torch.stack((in_one_piece, any_seen)).tolist()  # one synchronization
            if decoding and not any_seen:
                refuse("a mask that shows a new token no key", "eager attention would average keys that are not there")
            if not in_one_piece:
                return self._without_holes(seen, counts)
        if self.causal:  # padding behind the last token is seen by padding only
            return self._ranges(ends, firsts.minimum(ends))
        return self._ranges(lasts, firsts)

    def _ranges(self, ends: Tensor, starts: Tensor | None) -> KeyRanges | Packing:
        if self.causal or self.window is None:
            return KeyRanges(ends, starts)
        # A window to both sides is counted from the last key, so padding behind it would move every query.
        return _packed_ranges(ends, torch.zeros_like(ends) if starts is None else starts, self.keys)

    def _without_holes(self, seen: Tensor, counts: Tensor) -> Packing:
        """Padding between tokens: the keys are packed, and of causal queries those that are tokens."""
        if self.window is not None:
            refuse("a mask with padding between tokens and a sliding window", "the window would count packed tokens only")
        rows_k, max_k = seen.flatten().nonzero()[:, 0], int(counts.max())
        if not self.causal:
            rows = torch.arange(len(counts) + 1, dtype=torch.int32, device=seen.device) * self.queries
            return Packing(rows, _cumulative(counts), self.queries, max_k, None, None, rows_k)
        first = int(self.first_query)
        tokens = seen[:, first : first + self.queries]
        lengths = tokens.sum(-1, dtype=torch.int32)
        rows_q = tokens.flatten().nonzero()[:, 0]
        return Packing(_cumulative(lengths), _cumulative(counts), int(lengths.max()), max_k, None, rows_q, rows_k)

    def _check(self, function: MaskFunction) -> Tensor | None:
        """Compare the whole mask with what this one says of it. A prompt that sees all of itself (PaliGemma) becomes
        bidirectional.

        Returns:
            ``(B, queries)``, the first key of each query's sequence, if there are several; None if it is as this one says.
        """
        nowhere = torch.zeros(1, self.queries, dtype=torch.int64, device=function.device)
        if torch.compiler.is_compiling():
            message = "pagedflash: sequences packed without cu_seq_lens_q, or a mask of the model's own, cannot be compiled"
            torch._assert_async(self._agrees(function, nowhere, 0, self.queries), message)
            return None
        if self._agrees_in_pieces(function, nowhere):
            return None
        if self.causal and self.window is None and replace(self, causal=False)._agrees_in_pieces(function, nowhere):
            self.causal = False
            return None
        if self.causal and not function.use_vmap and self.padding is None and self.queries == self.keys:
            first_keys = _first_keys(~function.shows_one_before(self.queries))
            if self._agrees_in_pieces(function, first_keys):
                return first_keys
        refuse("this model's mask", "flash attention takes causal masks, windows, padding and packed sequences")

    def _agrees_in_pieces(self, function: MaskFunction, first_keys: Tensor) -> bool:
        step = max(1, _PIECE // (function.batch_size * self.keys))
        pieces = range(0, self.queries, step)
        return all(bool(self._agrees(function, first_keys, first, min(first + step, self.queries))) for first in pieces)

    def _agrees(self, function: MaskFunction, first_keys: Tensor, first: int, end: int) -> Tensor:
        """Whether ``function`` shows the queries from ``first`` to ``end`` what this mask does, from their
        ``first_keys (1 or B, queries)`` on."""
        queries = torch.arange(first, end, device=function.device)[:, None] + self.first_query
        keys = torch.arange(self.keys, device=function.device)
        expected = keys >= first_keys[:, first:end, None]
        left, right = self.window_size
        if left >= 0:
            expected = expected & (keys >= queries - left)
        if self.causal or right >= 0:
            expected = expected & (keys <= queries + max(right, 0))
        else:
            expected = expected & (keys < self.end)
        return (function.shows(first, end - first, self.keys) == expected).all()


def _padding(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    """The columns of a padding mask that belong to the keys, or None if none of them is padding."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if (missing := kv_length - padding.shape[1]) > 0:  # slots of a static cache that are not written yet
        return torch.nn.functional.pad(padding, (0, missing))
    return None if not torch.compiler.is_compiling() and padding.all() else padding


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _first_keys(begins: Tensor) -> Tensor:
    """``(B, S)``, where the sequence of each token begins, counted in its row. ``begins (B, S)``: where one does."""
    batch, length = begins.shape
    begins = begins | (torch.arange(length, device=begins.device) == 0)
    sequence = begins.flatten().cumsum(0) - 1
    return begins.nonzero()[:, 1][sequence].view(batch, length)


def _packed(first_keys: Tensor) -> Packing:
    """Sequences packed into rows: ``first_keys (B, S)`` changes where one begins, and rows do not share one."""
    batch, length = first_keys.shape
    begins = torch.ones_like(first_keys, dtype=torch.bool)
    begins[:, 1:] = first_keys.diff(dim=-1) != 0
    offsets = begins.flatten().nonzero()[:, 0]
    cu_seqlens = torch.nn.functional.pad(offsets, (0, 1), value=batch * length).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, cu_seqlens, longest, longest)


def _packed_ranges(ends: Tensor, starts: Tensor, length: int) -> Packing:
    """Each row of ``length`` tokens as two sequences, the padding before the first token and the rest, of which only the
    tokens are used."""
    rows = torch.arange(len(ends), dtype=torch.int32, device=ends.device) * length
    cu_seqlens = torch.nn.functional.pad(torch.stack((rows, rows + starts), -1).flatten(), (0, 1), value=len(ends) * length)
    seqused = torch.stack((torch.zeros_like(ends), ends - starts), -1).flatten()
    return Packing(cu_seqlens, cu_seqlens, length, length, seqused)
