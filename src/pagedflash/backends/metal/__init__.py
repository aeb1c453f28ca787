"""The Metal backend: four kernels in ``kernels/*.metal``, compiled at run time by ``torch.mps.compile_shader``.

:mod:`.plan` chooses the layout of a call, :mod:`.compiler` builds the kernel for it, :mod:`.launch` dispatches it into
PyTorch's own command encoder. Nothing waits for the GPU, and nothing is copied.
"""

from .compiler import available, use_compiler
from .launch import attention, kv_write, supports

NAME = "metal"
CHECKS_VALUES = False

__all__ = ["CHECKS_VALUES", "NAME", "attention", "available", "kv_write", "supports", "use_compiler"]
