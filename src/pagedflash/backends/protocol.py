"""What a backend is: a module with the functions of :class:`Backend`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import AttentionProblem, CacheWrite


class Support(NamedTuple):
    """Whether something can be done here, and if not, why, as the end of a sentence."""

    ok: bool
    reason: str = ""


class Capabilities(NamedTuple):
    """What a backend takes; anything else is rejected before it is asked."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    cache_dtypes: tuple[torch.dtype, ...] = ()
    """Formats of a cache besides q's own: float16 and bfloat16, under float32, and those of ``problem.QUANTIZED``."""
    max_head_dim: int = 576
    max_v_head_dim: int = 512
    head_dim_multiple: int = 1
    dropout: bool = False
    checks_values: bool = False
    """Whether ``attention`` and ``kv_write`` validate lengths and tables themselves before they write."""


class Backend(Protocol):
    """One may also have a ``backward``, with the arguments and results of :func:`pagedflash.backends.backward.backward`,
    which runs where it has none."""

    NAME: str
    CAPABILITIES: Capabilities

    def available(self) -> Support:
        """Whether it can run on this machine."""
        ...

    def supports(self, problem: AttentionProblem) -> Support:
        """Whether it has kernels for a valid problem. It sees the signature; its word is kept for problems like it."""
        ...

    def attention(
        self, problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Append (if asked), then attend: ``(out, lse)`` of the problem's ``out_shape`` and ``lse_shape``, into ``out`` if
        one is given, which is contiguous and starts at a multiple of 16 bytes. Not ``with_lse``, lse may be None."""
        ...

    def kv_write(self, write: CacheWrite) -> None:
        """Rotate the new keys (if asked) and put each token into its slot."""
        ...
