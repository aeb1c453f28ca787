"""The Metal backend: its kernels are ``kernels/*.metal``, compiled at run time by ``torch.mps.compile_shader``.

:mod:`.launch` makes a plan for each signature and dispatches it into PyTorch's own command encoder, :mod:`.tiling` chooses
rows, lanes and splits, :mod:`.tuning` has its numbers for the GPU at hand, :mod:`.compiler` builds the kernels. Nothing
waits for the GPU, and nothing is copied.
"""

import torch

from ..protocol import Capabilities
from .compiler import available, use_compiler
from .launch import attention, backward, kv_write, supports
from .tuning import Tuning

__all__ = ["CAPABILITIES", "NAME", "Tuning", "attention", "available", "backward", "kv_write", "supports", "use_compiler"]

NAME = "metal"
CAPABILITIES = Capabilities(cache_dtypes=(torch.float16, torch.bfloat16, torch.int8), dropout=True)
