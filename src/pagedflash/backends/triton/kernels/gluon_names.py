"""Names of Gluon that are others in other versions of Triton."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # since 3.9

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # since 3.7
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # since 3.8
load_async = (  # since 3.9
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)


@gluon.jit
def reinterpret(memory, shape, layout: gl.constexpr):
    """Shared memory under another shape and layout."""
    if HAS_REINTERPRET:
        other = memory.reinterpret(memory.dtype, shape, layout)
    else:
        other = memory._reinterpret(memory.dtype, shape, layout)
    return other
