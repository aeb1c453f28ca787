"""The Triton backend: ``kv_write``, ``decode``, ``combine`` and ``prefill`` for NVIDIA GPUs, and what else Triton runs on.

A call with few queries is ``decode``, which appends new tokens itself, and ``combine`` where keys are split over many CTAs.
A call with many is ``kv_write``, if it appends, and ``prefill``. Nothing is read on the host, so every call can be captured
in a CUDA graph, and replayed with other lengths, tables and contents.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ...problem import QUANTIZED, AttentionProblem, CacheWrite
from ..backward import Gradients
from ..protocol import Capabilities, Support

NAME = "triton"
OLDEST = "3.6.0"  # what torch 2.10 brings
CAPABILITIES = Capabilities(cache_dtypes=(torch.float16, torch.bfloat16, *QUANTIZED), dropout=True)


@cache
def available() -> Support:
    """Whether Triton can be imported and has a device, or its interpreter, to run on."""
    try:
        import triton

        from .compiled import INTERPRETED
    except ImportError as error:
        return Support(False, f"Triton cannot be imported: {error}")
    if TorchVersion(triton.__version__) < OLDEST:
        return Support(False, f"Triton {triton.__version__} is too old: install {OLDEST} or newer")
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return Support(True)
    return Support(False, "there is no CUDA or XPU device (TRITON_INTERPRET=1 runs the kernels without one)")


def supports(problem: AttentionProblem) -> Support:
    """Every valid problem."""
    return Support(True)


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Append (if asked), then attend: ``(out, lse)`` of the problem's ``out_shape`` and ``lse_shape``."""
    results: tuple[Tensor, Tensor | None] = _launch().attention(problem, out, with_lse)
    return results


def backward(problem: AttentionProblem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Gradients:
    """The gradients of a problem, as :func:`pagedflash.backends.backward.backward` gives them."""
    from . import gradients

    return gradients.backward(problem, out, lse, d_out, d_lse)


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    _launch().kv_write(write)


@cache
def _launch() -> Any:
    """Imported for the first call: Triton need not be there. An import statement in each call would cost a microsecond."""
    return import_module(f"{__name__}.launch")
