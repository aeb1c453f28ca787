"""Any CPU: C++ kernels behind a plain C ABI, on torch's own thread pool.

``native/`` holds the kernels, ``launch.py`` loads the library and packs descriptions for it. See docs/cpu.md.
"""

from __future__ import annotations

from ...call import AttentionCall
from .launch import Unavailable, attention, kv_write, library

__all__ = ["CHECKS_VALUES", "NAME", "attention", "available", "kv_write", "supports"]

NAME = "cpu"
CHECKS_VALUES = True


def available() -> tuple[bool, str]:
    try:
        library()
    except Unavailable as error:
        return False, str(error)
    return True, ""


def supports(call: AttentionCall) -> tuple[bool, str]:
    """Every option of the interface is native; the tensors must lie in CPU memory."""
    if call.q.device.type != "cpu":
        return False, f"it reads CPU memory, the tensors are on {call.q.device.type}"
    return True, ""
