"""Continuous batching through pages: no step of ``generate_batch()`` gathers keys and values.

transformers (5.19 to 5.24) lets a batch read and write its cache through block tables only if every request has one token
and no layer has a sliding window. For any other batch it copies all keys and values out of the cache, in every layer. Here
every batch gets block tables:

* :class:`~.inputs.PagedInputs` builds them once a step and hands them to the model, in transformers' own place for them;
* :class:`~.windows.WindowPages` keeps sliding-window layers on pages that a block table can name;
* :func:`paged_attention` is one layer of a step: new keys and values into their pages, then attention through the table.

Between the first and the last stands transformers' ``PagedAttentionCache.update``, as it is: it picks the entry of
``kwargs["block_table"]`` that belongs to the layer, and adds the layer's pages as ``kwargs["k_cache"]`` and
``kwargs["v_cache"]``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .... import interface
from .. import formats, hooks

FIRST_VERSION = (5, 19)
"""Before it transformers keeps its batches elsewhere, and continuous batching stays as transformers does it."""


class StepTables(NamedTuple):
    """Where the keys and values of a step lie, for one group of layers (full attention, or sliding windows)."""

    block_table: Tensor  # (B, max_pages) int32, in pages of each layer's own view; -1 behind the last page
    cache_seqlens: Tensor  # (B,) int32, tokens of each request before this step; -1 = a row of padding
    decodes: bool  # each request has one new token


def install() -> Mapping[str, Any]:
    """Send every step of continuous batching with "pagedflash" through pages, until the changes are taken back.

    Returns:
        What transformers' check of the decode path has to see for "pagedflash", by name of the global: allocators that
        support block tables. Empty if nothing was changed.

    Warns:
        RuntimeWarning: a newer transformers has moved the places this needs; its own continuous batching goes on.

    Raises:
        RuntimeError: it has, and pages were to have a format.
    """
    if hooks.version_numbers() < FIRST_VERSION:
        return {}
    try:
        from . import inputs, pages, windows

        for check in (_check_update, inputs.check_places, windows.check_places):
            check()
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        if formats.kv_cache_dtype is not None:
            raise RuntimeError(
                f"pagedflash: kv_cache_dtype is {formats.kv_cache_dtype_name()!r}, but transformers {hooks.version()} "
                f"prepares its batches elsewhere ({error}); call enable() without it"
            ) from error
        warnings.warn(
            f"pagedflash: transformers {hooks.version()} prepares its batches elsewhere ({error}), so continuous batching "
            "gathers keys and values in every step that does not only decode, which is slower.",
            RuntimeWarning,
            stacklevel=3,
        )
        return {}
    inputs.install()
    if formats.kv_cache_dtype is not None:
        pages.install()
    return windows.install()


def paged_attention(q: Tensor, k: Tensor, v: Tensor, kwargs: Mapping[str, Any], **options: Any) -> Tensor:
    """One layer of a step: new keys and values into their pages, then attention through the block table, in one call.

    Args:
        q: ``(1, total, Hq, D)``, the new tokens of all requests, one after another.
        k: ``(1, total, Hkv, D)``.
        v: as k.
        kwargs: the layer's keyword arguments as ``PagedAttentionCache.update`` leaves them, with :class:`StepTables` as
            ``block_table``.
        options: ``softmax_scale``, ``causal``, ``window_size``, ``softcap`` and ``s_aux`` of
            :func:`~pagedflash.flash_attn_varlen_func`.

    Returns:
        ``(1, total, Hq, D)``.
    """
    tables: StepTables = kwargs["block_table"]
    k_cache, v_cache = kwargs["k_cache"], kwargs["v_cache"]
    scales: dict[str, Any] = {}
    if isinstance(k_cache, formats.InFormat):
        scales = formats.descales(k_cache, v_cache)
        k_cache, v_cache = k_cache.elements, v_cache.elements
    elif q.dtype is not k_cache.dtype and formats.kv_cache_dtype is None:
        q, k, v = (tensor.to(k_cache.dtype) for tensor in (q, k, v))
    where = {"block_table": tables.block_table, **scales, **options}
    if tables.decodes:
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))  # sequences of one token
        out = interface.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=tables.cache_seqlens, **where)
        return cast(Tensor, out).transpose(0, 1)
    out = interface.flash_attn_varlen_func(
        q[0],
        k_cache,
        v_cache,
        kwargs["cu_seq_lens_q"],
        None,
        kwargs["max_length_q"],
        kwargs["max_length_k"],
        seqused_k=tables.cache_seqlens,
        k_new=k[0],
        v_new=v[0],
        **where,
    )
    return cast(Tensor, out).unsqueeze(0)


def is_paged(kwargs: Mapping[str, Any]) -> bool:
    """Whether a layer's keyword arguments are those of a step for :func:`paged_attention`."""
    return isinstance(kwargs.get("block_table"), StepTables)


def _check_update() -> None:
    """That ``PagedAttentionCache.update`` still hands on the layer's entry of ``block_table`` and the layer's pages.

    Raises:
        AttributeError, ImportError, KeyError, TypeError: it does not.
    """
    from transformers.generation.continuous_batching import PagedAttentionCache

    allocator = SimpleNamespace(index=0, layer_type="full_attention", get_cache_for_block_table=lambda layer: ("k", "v"))
    cache = SimpleNamespace(layer_to_allocator={0: allocator})
    offsets = {"full_attention": torch.zeros(1, dtype=torch.int32)}
    kwargs = dict(block_table=("table",), cu_seq_lens_k=offsets, max_length_k={"full_attention": 1})
    PagedAttentionCache.update(cache, "key", "value", 0, kwargs)
    if (kwargs["block_table"], kwargs["k_cache"], kwargs["v_cache"]) != ("table", "k", "v"):
        raise AttributeError("PagedAttentionCache.update hands on something else")


def check_methods(theirs: type, ours: type, names: tuple[str, ...]) -> None:
    """That these methods are still there, with the parameters that ours have where it replaces them.

    Raises:
        AttributeError: they are not.
    """
    for name in names:
        have, want = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (theirs, ours))
        if have != want:
            raise AttributeError(f"{theirs.__name__}.{name} takes {', '.join(have)}")
