"""Runs Metal compute kernels on a CPU, with the interface of `torch.mps.compile_shader`, and checks them."""

from .counters import Counters, Dispatch
from .errors import CompileError, KernelError, LaunchError, MetalError
from .fast_math import infinities
from .library import Kernel, Library, compile_shader
from .registers import Registers, count_registers
from .settings import ORDERS, Order, Simulation, in_every_order, simulate
from .stack import stack_arrays

__all__ = [
    "ORDERS",
    "CompileError",
    "Counters",
    "Dispatch",
    "Kernel",
    "KernelError",
    "LaunchError",
    "Library",
    "MetalError",
    "Order",
    "Registers",
    "Simulation",
    "compile_shader",
    "count_registers",
    "in_every_order",
    "infinities",
    "simulate",
    "stack_arrays",
]
