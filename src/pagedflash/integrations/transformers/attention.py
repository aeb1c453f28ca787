"""The attention function of "pagedflash": what transformers calls in every layer, and the one call of ours it becomes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from ...errors import InvalidArgument
from ...interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from . import engine, formats, masks
from .refusals import refuse

_CHANGES_SCORES = ("position_bias", "attention_bias", "head_mask", "indices", "block_indices")
"""Arguments of some models' layers that add to the scores or pick keys one by one."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cache: object = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the arguments of transformers' ``ALL_ATTENTION_FUNCTIONS``.

    Args:
        module: the attention layer. ``is_causal`` is read from it where the argument is None.
        query: ``(B, Hq, Sq, D)``.
        key: ``(B, Hkv, Sk, D)``, from the cache if there is one.
        value: ``(B, Hkv, Sk, Dv)``.
        attention_mask: what :func:`masks.visible_keys` returned, or a padding mask ``(B, Sk)`` that the model made.
        cache: in continuous batching, the cache of all requests, which is updated here.
        kwargs: with all of ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` sequences are packed
            into one row; with ``block_table``, ``k_cache`` and ``v_cache`` they decode from pages.

    Returns:
        ``(B, Sq, Hq, Dv)`` and None: there are no attention weights.

    Raises:
        ValueError: flash attention cannot do this; says what to use instead.
    """
    for name in _CHANGES_SCORES:
        if kwargs.get(name) is not None:
            refuse(f"{name} of {type(module).__name__}", "flash attention has no place for it")
    if kwargs.get("output_attentions"):
        refuse("output_attentions", "flash attention never has the weights", instead='"eager"')
    if isinstance(cache, PagedAttentionCache) and isinstance(kwargs.get("cu_seq_lens_k"), dict):
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0, "s_aux": s_aux, "causal": causal}
    if dropout:
        options["dropout_p"] = dropout
    if sliding_window:
        options["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)

    try:
        if isinstance(key, formats.Stored) and isinstance(value, formats.Stored):
            if kwargs.get(_PACKED[0]) is not None:
                refuse("a cache in a format of its own under packed sequences", "these are attended to without a cache")
            if dropout:
                refuse("a cache in a format of its own under dropout", "it has no gradient; train with use_cache=False")
            return _attend_to_stored(query, key, value, attention_mask, sliding_window or None, options), None
        query, key, value = _of_one_dtype(query, key, value)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _attend(q, k, v, attention_mask, sliding_window or None, options, kwargs), None
    except InvalidArgument as error:  # a head dim or dtype that no kernel takes
        refuse(type(module).__name__, str(error).removeprefix("pagedflash: "))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _paged(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Not compiled. Decorated here, not in the engine: the decorator imports torch's compiler, which takes half a second."""
    return engine.paged_attention(q, k, v, kwargs, **options)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, options: dict[str, Any], kwargs: dict[str, Any]
) -> Tensor:
    """The call that the layer's arguments are for: pages, packed sequences, or dense queries over keys where they lie."""
    if engine.is_paged(kwargs):
        return cast(Tensor, _paged(q, k, v, kwargs, options))
    if kwargs.get("block_table") is not None:
        return _decode_from_pages(q, k, v, options, kwargs)
    if kwargs.get(_PACKED[0]) is not None and all(kwargs.get(name) is not None for name in _PACKED):
        cu_seqlens_q, cu_seqlens_k, *longest = (kwargs[name] for name in _PACKED)
        max_seqlen_q, max_seqlen_k = (int(n.item()) if isinstance(n, Tensor) else n for n in longest)
        return _packed(q, k, v, masks.Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), options)
    if mask is None:
        return cast(Tensor, flash_attn_func(q, k, v, **options))

    key_mask = masks.key_mask_of(mask, options["causal"], window, q.shape[1], k.shape[1])
    where = key_mask.where(q.shape[0], q.device)
    options = {**options, "causal": key_mask.causal, "window_size": key_mask.window_size}
    if where is None:
        return cast(Tensor, flash_attn_func(q, k, v, **options))
    if isinstance(where, masks.Packing):
        return _packed(q, k, v, where, options)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=where.ends, cache_leftpad=where.starts, **options)
    return cast(Tensor, out)


def _attend_to_stored(
    query: Tensor,
    key: formats.Stored,
    value: formats.Stored,
    mask: Tensor | None,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    """Dense queries over a cache in the format in force, read where it lies."""
    q, k, v = query.to(_common_dtype(query, value.model_dtype)).transpose(1, 2), key.in_format, value.in_format
    keys: dict[str, Any] = {"cache_seqlens": k.elements.shape[1]}
    if mask is not None:
        key_mask = masks.key_mask_of(mask, options["causal"], window, q.shape[1], k.elements.shape[1])
        options = {**options, "causal": key_mask.causal, "window_size": key_mask.window_size}
        where = key_mask.where(q.shape[0], q.device)
        if isinstance(where, masks.Packing):
            refuse("padding between tokens", "keys of a format of their own cannot be packed")
        if where is not None:
            keys = {"cache_seqlens": where.ends, "cache_leftpad": where.starts}
    scales = formats.descales(k, v)
    return cast(Tensor, flash_attn_with_kvcache(q, k.elements, v.elements, **keys, **scales, **options))


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _common_dtype(query, value.dtype)
    if query.dtype is key.dtype is value.dtype is dtype:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _common_dtype(query: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Under autocast its dtype; where a norm or rotary embedding left float32 behind, that of the values."""
    if query.dtype is torch.float32 and torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return dtype


def _packed(q: Tensor, k: Tensor, v: Tensor, packing: masks.Packing, options: dict[str, Any]) -> Tensor:
    """Sequences packed into the rows of a batch. Queries that are none of them get 0."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused, rows_q, rows_k = packing
    batch, length, *_ = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if rows_k is not None:
        k, v = k[rows_k], v[rows_k]
    rows = q if rows_q is None else q[rows_q]
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out = cast(Tensor, flash_attn_varlen_func(rows, k, v, *lengths, seqused_q=seqused, seqused_k=seqused, **options))
    if rows_q is not None:
        out = q.new_zeros(len(q), *out.shape[1:]).index_copy(0, rows_q, out)
    return out.view(batch, length, *out.shape[1:])


def _decode_from_pages(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], kwargs: dict[str, Any]) -> Tensor:
    """Continuous batching, one token of each request: written into its page, then attended to with the others."""
    cu_seqlens_k, requests = kwargs["cu_seq_lens_k"], q.shape[1]
    lengths = cu_seqlens_k[1 : requests + 1] - cu_seqlens_k[:requests] - 1
    q, k, v = (tensor[0].unsqueeze(1) for tensor in (q, k, v))
    caches, table = (kwargs["k_cache"], kwargs["v_cache"]), kwargs["block_table"]
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, block_table=table, **options)
    return cast(Tensor, out).squeeze(1).unsqueeze(0)
