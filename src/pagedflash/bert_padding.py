"""flash-attn's helpers for padded batches (``flash_attn.bert_padding``): between ``(B, S, ...)`` and packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices (total,)`` of ``tensor (rows, ...)``.

    Examples:
        >>> index_first_axis(torch.arange(3.0), torch.tensor([2, 0])).tolist()
        [2.0, 0.0]
    """
    return tensor[indices]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one sequence after another. Reads the mask on the host.

    Args:
        hidden_states: ``(B, S, ...)``.
        attention_mask: ``(B, S)``, bool or int: 1 = token, 0 = padding.
        unused_mask: ``(B, S)``: 1 = a token that is allocated but not used. It is packed, and not counted in ``seqused``.

    Returns:
        ``(tokens (total, ...), indices (total,) int64, cu_seqlens (B + 1,) int32, max_seqlen, seqused (B,) int32)``.

    Examples:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(torch.arange(6.0).view(2, 3), mask)
        >>> tokens.tolist(), indices.tolist(), cu_seqlens.tolist(), max_seqlen
        ([0.0, 1.0, 3.0], [0, 1, 3], [0, 2, 3], 2)
    """
    mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    tokens = hidden_states.flatten(0, 1)[indices]
    return tokens, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens ``(total, ...)`` back at ``indices`` of a batch ``(batch, seqlen, ...)``, zeros elsewhere.

    Examples:
        >>> pad_input(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 3]), batch=2, seqlen=3).tolist()
        [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]
    """
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy_(0, indices, hidden_states).view(batch, seqlen, *hidden_states.shape[1:])
