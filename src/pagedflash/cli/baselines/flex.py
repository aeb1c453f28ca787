"""torch's flex_attention, compiled: a causal mask as blocks. It has no pages."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..measure import Contender


def prefill(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """A causal prompt ``(1, S, H, D)``."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=q.device.type)
    attention = _compiled()
    return Contender(lambda: attention(q, k, v, block_mask=mask, enable_gqa=True), lambda out: out.transpose(1, 2))


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
