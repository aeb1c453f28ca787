"""Infinities and NaN, which fast math leaves undefined."""

from __future__ import annotations

from .tokens import Tokens
from .toolchain import preprocess

_WORDS = frozenset(
    ("INFINITY", "HUGE_VALF", "HUGE_VALH", "NAN", "infinity", "quiet_NaN", "isnan", "isinf", "isfinite", "isnormal")
)


def infinities(source: str) -> list[str]:
    """Where a source speaks of infinity or NaN: ``INFINITY``, ``isnan`` and the like.

    With ``PYTORCH_MPS_FAST_MATH=1`` PyTorch has kernels compiled with fast math, which leaves them undefined.
    ``as_type<float>(0x7f800000u)`` stores an infinity in either case; nothing may be computed from it.

    Args:
        source: one Metal file.

    Returns:
        one line for each; none is good.

    Raises:
        CompileError: its macros do not expand.
    """
    tokens = Tokens(preprocess(source)).code
    found = [f"line {token.line}: {token.text} is undefined under fast math" for token in tokens if token.text in _WORDS]
    return list(dict.fromkeys(found))
