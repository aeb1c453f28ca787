"""Pages of sliding-window layers, by position: what block tables need, and transformers' ring of slots cannot give."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from .. import hooks
from . import check_methods

GONE = 0
"""The block in place of one that has left the window. Block 0 is never given to a request."""

USED = (
    *("needs_new_blocks", "_compute_blocks_needed", "allocate_cache_to_request", "free_blocks", "fill_block_table"),
    *("count_shareable_blocks", "fork_blocks", "acquire_prefix_blocks", "mark_complete_blocks"),
)
"""Methods of transformers' that :class:`WindowPages` calls or replaces."""


def check_places() -> None:
    """That transformers still has what is replaced here.

    Raises:
        AttributeError, KeyError: it has not.
    """
    check_methods(FullAttentionCacheAllocator, WindowPages, USED)
    kind = WindowPages.layer_type
    if ATTN_TYPE_TO_ALLOCATOR[kind] is not SlidingAttentionCacheAllocator:
        raise AttributeError(f"the allocator of {kind} layers is {ATTN_TYPE_TO_ALLOCATOR[kind]}")
    for scheduler in SCHEDULER_MAPPING.values():
        if list(inspect.signature(scheduler.schedule_batch).parameters) != ["self", "token_budget", "cache_budget"]:
            raise AttributeError(f"{scheduler.__name__}.schedule_batch takes something else")


def install() -> Mapping[str, Any]:
    """Caches of sliding-window layers for "pagedflash" are :class:`WindowPages`.

    Returns:
        As :func:`pagedflash.integrations.transformers.engine.install`.
    """
    kind = WindowPages.layer_type

    def allocator(*, config: Any, **kwargs: Any) -> Any:
        ours = hooks.base_name(config._attn_implementation) == hooks.NAME
        return (WindowPages if ours else SlidingAttentionCacheAllocator)(config=config, **kwargs)

    allocator.supports_block_table = SlidingAttentionCacheAllocator.supports_block_table  # type: ignore[attr-defined]
    hooks.replace_item(ATTN_TYPE_TO_ALLOCATOR, kind, allocator)
    for scheduler in SCHEDULER_MAPPING.values():
        hooks.replace(scheduler, "schedule_batch", _cutting_chunks(scheduler.schedule_batch))
    return {"ATTN_TYPE_TO_ALLOCATOR": {**ATTN_TYPE_TO_ALLOCATOR, kind: WindowPages}}


def _cutting_chunks(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """A ring of slots takes a chunk of any length, pages by position one that fits them. Where none does, cut it."""

    @functools.wraps(schedule)
    def schedule_batch(self: Any, token_budget: int, cache_budget: int) -> Any:
        batch, *rest = schedule(self, token_budget, cache_budget)
        if any(isinstance(allocator, WindowPages) for allocator in self.cache.cache_allocators.values()):
            if batch is None and self.cache.evict_cached_blocks():
                batch, *rest = schedule(self, token_budget, cache_budget)
            while batch is None and token_budget > 1:
                token_budget //= 2
                batch, *rest = schedule(self, token_budget, cache_budget)
        return batch, *rest

    return schedule_batch


class WindowPages(FullAttentionCacheAllocator):  # type: ignore[misc]  # no types there
    """Allocates pages to sliding-window layers by absolute position, and gives back those that have left the window.

    A request's table is as long as the request, as in full attention. Its first entries, whose pages no later query sees,
    are ``GONE``. Since a page belongs to a position, full pages can be shared between requests with the same prefix.
    """

    layer_type = SlidingAttentionCacheAllocator.layer_type

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        self.sliding_window: int = config.sliding_window
        self.first_live: dict[str, int] = {}
        """Request -> number of ``GONE`` entries at the start of its table."""
        self.hashes: dict[str, list[int]] = {}
        """Request -> hash of each of its complete blocks, those gone too: each builds on the one before."""
        super().__init__(config=config, **kwargs)

    # -- allocation

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        """Blocks needed for ``query_length`` more tokens, after giving back those that they do not see."""
        self._let_go(request_id, past_length)
        allocated = max(len(self.block_table.get(request_id, ())), self._gone(past_length))
        return int(self._compute_blocks_needed(allocated, past_length, query_length))

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        if request_id not in self.block_table:  # new, or back after it was offloaded
            self.first_live[request_id] = self._gone(past_length)
            self.block_table[request_id] = [GONE] * self.first_live[request_id]
        super().allocate_cache_to_request(request_id, past_length, query_length)

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        if request_id in self.block_table:
            del self.block_table[request_id][: self.first_live.pop(request_id, 0)]
        self.hashes.pop(request_id, None)
        super().free_blocks(request_id, no_cache)

    def _gone(self, past_length: int) -> int:
        """Whole pages before the window of the next query, and of the one before: that one may be asked again when a
        request is offloaded while it is under way."""
        return int(max(0, past_length - self.sliding_window) // self.tokens_per_page)

    def _let_go(self, request_id: str, past_length: int) -> None:
        table = self.block_table.get(request_id, [])
        live, gone = self.first_live.get(request_id, 0), min(self._gone(past_length), len(table))
        if gone > live:
            self.pool.free_blocks(self.index, [block for block in table[live:gone] if self.ledger.release(block)])
            table[live:gone] = [GONE] * (gone - live)
            self.first_live[request_id] = gone

    # -- sharing

    def count_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        shareable = super().count_shareable_blocks(source_request_id, past_length)
        return max(int(shareable), self.first_live.get(source_request_id, 0))

    def fork_blocks(self, source_request_id: str, dest_request_id: str, past_length: int) -> tuple[list[int], list[int]]:
        table, live = self.block_table[source_request_id], self.first_live.get(source_request_id, 0)
        shared = self.count_shareable_blocks(source_request_id, past_length)
        for block in table[live:shared]:
            self.ledger.acquire(block)
        copies = self.pool.get_free_blocks(self.index, len(table) - shared)
        self.block_table[dest_request_id] = table[:shared] + copies
        self.first_live[dest_request_id] = live
        self.hashes[dest_request_id] = self.hashes.get(source_request_id, [])[:]
        return table[shared:], copies

    def acquire_prefix_blocks(self, request_id: str, prefix_len: int, block_ids: list[int]) -> None:
        super().acquire_prefix_blocks(request_id, prefix_len, block_ids)
        self.hashes[request_id] = [self.ledger.block_to_hash[block] for block in self.block_table[request_id]]

    def mark_complete_blocks(self, request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        table, hashes = self.block_table[request_id], self.hashes.setdefault(request_id, [])
        for index in range(len(hashes), len(hashes) + new_new_blocks):
            tokens = token_ids[index * self.tokens_per_page : (index + 1) * self.tokens_per_page]
            if len(tokens) < self.tokens_per_page:
                break
            hashes.append(compute_block_hash(hashes[-1] if hashes else None, tokens))
            if index >= self.first_live.get(request_id, 0):
                table[index] = self._shared(table[index], hashes[-1])

    def _shared(self, block: int, block_hash: int) -> int:
        """The block to keep of this one and one with the same content."""
        same: int | None = self.ledger.register_new_hash(block, block_hash)
        if same is None:
            return block
        self.ledger.acquire(same)
        if self.ledger.release(block):
            self.pool.free_blocks(self.index, [block])
        return same
