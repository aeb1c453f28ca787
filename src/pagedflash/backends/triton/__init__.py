"""The Triton backend: ``kv_write``, ``decode``, ``combine`` and ``prefill`` for NVIDIA GPUs, and what else Triton runs on.

A call with few queries is ``decode``, which appends new tokens itself, and ``combine`` where keys are split into many parts.
A call with many is ``kv_write``, if it appends, and ``prefill``. Nothing is read on the host, so every call can be captured
in a CUDA graph, and replayed with other lengths, tables and contents.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...call import AttentionCall, CacheWrite

NAME = "triton"
CHECKS_VALUES = False


@cache
def available() -> tuple[bool, str]:
    """Whether Triton can be imported and has a device, or its interpreter, to run on."""
    try:
        from . import compiled
    except ImportError as error:
        return False, f"Triton cannot be imported: {error}"
    if compiled.INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return True, ""
    return False, "there is no CUDA or XPU device (TRITON_INTERPRET=1 runs the kernels without one)"


def supports(call: AttentionCall) -> tuple[bool, str]:
    """Every call that passes :func:`pagedflash.call.check`."""
    return True, ""


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Append (if asked), then attend. Returns ``(out, lse)`` of the shapes the call gives."""
    from . import launch

    return launch.attention(call)


def kv_write(write: CacheWrite) -> None:
    """Rotate the new keys (if asked) and put each token into its slot."""
    from . import launch

    launch.kv_write(write)
