"""Forward and backward pass of any attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pagedflash.cli.measure import Contender


def with_gradients(attention: Callable[..., Any], *tensors: Tensor) -> Contender:
    """A forward pass, and the gradients of a loss that weighs all elements differently."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0)).to(tensors[0])

    def run() -> tuple[Tensor, ...]:
        with torch.inference_mode(False):
            return torch.autograd.grad(attention(*tensors), tensors, weights)

    return Contender(run, lambda gradients: torch.cat([gradient.flatten() for gradient in gradients]))
