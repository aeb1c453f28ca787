"""Any CPU: C++ kernels behind a plain C ABI, on torch's own thread pool.

``native/`` holds the kernels, ``launch.py`` loads the library and packs problems for it. See docs/cpu.md.
"""

from __future__ import annotations

import torch

from ...problem import QUANTIZED, AttentionProblem
from ..protocol import Capabilities, Support
from .launch import Unavailable, attention, backward, kv_write, library

__all__ = ["CAPABILITIES", "NAME", "attention", "available", "backward", "kv_write", "supports"]

NAME = "cpu"
CAPABILITIES = Capabilities(
    cache_dtypes=(torch.float16, torch.bfloat16, *QUANTIZED),
    max_head_dim=1024,
    max_v_head_dim=1024,
    dropout=True,
    checks_values=True,
)


def available() -> Support:
    try:
        library()
    except Unavailable as error:
        return Support(False, str(error))
    return Support(True)


def supports(problem: AttentionProblem) -> Support:
    """Every option of the interface is native; the tensors must lie in CPU memory."""
    device = problem.queries.q.device.type
    return Support(True) if device == "cpu" else Support(False, f"it reads CPU memory, the tensors are on {device}")
