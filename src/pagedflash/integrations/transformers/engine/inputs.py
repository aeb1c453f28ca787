"""The inputs of a step: block tables for every batch, and no index of what to gather."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs, stream_context

from .. import hooks
from . import StepTables, check_methods

PADDING = -1
"""The length of a row that is no request, and the entry of a table that is no page."""

USED = ("_setup_static_tensors", "prepare_batch_tensors", "get_model_kwargs", "_transfer_inputs", "_get_num_sequences")
"""Methods of transformers' that :class:`PagedInputs` calls or replaces."""


def check_places() -> None:
    """That transformers still has what is replaced here.

    Raises:
        AttributeError: it has not.
    """
    check_methods(ContinuousBatchingIOs, PagedInputs, USED)


def install() -> None:
    """Batches for "pagedflash" are prepared by :class:`PagedInputs`."""
    initialize = ContinuousBatchingIOs.__init__

    @functools.wraps(initialize)
    def initialize_ours(self: Any, cache: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # A user turns block tables off by allowing a request no blocks.
        if hooks.base_name(config._attn_implementation) == hooks.NAME and cache.max_blocks_per_request > 0:
            self.__class__ = PagedInputs
        initialize(self, cache, config, *args, **kwargs)

    hooks.replace(ContinuousBatchingIOs, "__init__", initialize_ours)


class PagedInputs(ContinuousBatchingIOs):  # type: ignore[misc]  # no types there
    """transformers' inputs of a step, with block tables for every batch.

    Where each request has one token, transformers fills the tables itself. For any other batch they are filled here, in the
    same static storage; the index of what to gather is not built, stored or transferred.
    """

    block_table: Tensor
    """``(groups of layers, max_requests, max_pages)`` int32, static."""
    cache_seqlens: Tensor
    """``(max_requests,)`` int32, static: the tokens of each request before the step."""
    read_index_storage: Tensor
    graphs: Any

    def _setup_static_tensors(self, logit_processor: Any) -> None:
        super()._setup_static_tensors(logit_processor)
        self.read_index_storage = self.read_index_storage.new_empty(len(self.read_index_storage), 0)
        self.cache_seqlens = self._static(self.max_requests_per_batch)
        self.cache.max_decode_fast_path_length = sys.maxsize  # the tables grow with the requests

    def prepare_batch_tensors(
        self,
        requests_in_batch: list[Any],
        logits_processors: Any,
        use_decode_fast_path: bool,
        num_q_tokens: int,
        max_kv_read: int,
        use_padding: bool,
    ) -> None:
        states = [request.state for request in requests_in_batch]
        lengths = [state.position_offset for state in states]  # transformers moves them on
        allocators = list(self.cache.cache_allocators.values())
        self._make_room(max(len(each.block_table[state.request_id]) for each in allocators for state in states))
        super().prepare_batch_tensors(
            requests_in_batch, logits_processors, use_decode_fast_path, num_q_tokens, 0, use_padding
        )
        rows = self._get_num_sequences(use_padding)
        lengths += [PADDING] * (rows - len(lengths))
        self.cache_seqlens[:rows] = torch.tensor(lengths, dtype=torch.int32)
        if not self.use_block_table:
            self.block_table[:, :rows] = PADDING
            for row, state in enumerate(states):
                self.cache.fill_block_table(state.request_id, 0, 0, self.block_table[:, row])

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        kwargs = super().get_model_kwargs(use_padding)
        rows, lengths = self._get_num_sequences(use_padding), self.cache_seqlens
        kwargs["block_table"] = tuple(
            StepTables(table[:rows], lengths[:rows], self.use_block_table) for table in self.block_table
        )
        return kwargs

    def _transfer_inputs(self, other: Any, stream: Any, non_blocking: bool = False) -> None:
        other._make_room(self.block_table.shape[-1])
        super()._transfer_inputs(other, stream, non_blocking)
        with stream_context(stream):
            other.cache_seqlens.copy_(self.cache_seqlens, non_blocking=non_blocking)
            if not self.use_block_table:
                other.block_table.copy_(self.block_table, non_blocking=non_blocking)

    def _make_room(self, pages: int) -> None:
        """Widen the tables to a power of two. What was captured in graphs reads the old ones: forget it."""
        groups, requests, width = self.block_table.shape
        if pages > width:
            self.block_table = self._static(groups, requests, 1 << (pages - 1).bit_length())
            self.graphs = type(self.graphs)()

    def _static(self, *shape: int) -> Tensor:
        pinned = self.block_table.is_pinned()
        return torch.full(shape, PADDING, dtype=torch.int32, device=self.device, pin_memory=pinned)
