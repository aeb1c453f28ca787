"""What a call costs besides its kernel: Python, validation, dispatch, and a backend's launcher."""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from benchmarks.suite import Options, Row, leave_out, suite
from pagedflash import (
    availability,
    dispatch,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    kv_paged_write,
    use_backend,
)
from pagedflash.backends.protocol import Capabilities, Support
from pagedflash.cli.measure import Contender, WallClock, interleave


@suite("overhead")
def overhead(options: Options) -> Iterator[Row]:
    """Microseconds of host time a call, on a CPU: with no backend, and with the CPU's and Metal's launchers, kernels idle

    Calls go by many short rounds. The least is what the code costs; the median has what else the machine was doing in it.
    """
    backends = {"no backend": idle_backend, "CPU launcher": idle_cpu_kernels, "Metal launcher": idle_metal_kernels}
    native = availability()["cpu"]
    if not native.ok:
        del backends["CPU launcher"]
        leave_out("the CPU launcher", native.reason)
    clock = WallClock(calls=50, settle=0.0)
    for backend, idle in backends.items():
        with idle():
            contenders = {name: Contender(call, output=None) for name, call in calls().items()}
            measured = interleave(contenders, options.rounds_or(400), clock)
        for name, seconds in measured.seconds.items():
            figures = {"us": 1e6 * statistics.median(seconds), "least us": 1e6 * min(seconds)}
            yield Row(f"{name}: {backend}", figures, (), {name: seconds})


def calls() -> dict[str, Callable[[], object]]:
    """One small call of each function, with the arguments that decoding and prefill use."""
    batch, heads, dim, page_size = 4, 16, 128, 16
    k_pages, v_pages = torch.randn(2, 64, page_size, heads, dim)
    table = torch.arange(16, dtype=torch.int32).view(batch, 4)
    lengths = torch.full((batch,), 50, dtype=torch.int32)
    q, k, v = torch.randn(3, batch, 1, heads, dim)
    q_rows, k_rows, v_rows = q[:, 0], k[:, 0], v[:, 0]
    offsets = torch.arange(batch + 1, dtype=torch.int32)
    return {
        "flash_attn_with_kvcache, append, block table": lambda: flash_attn_with_kvcache(
            q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, causal=True
        ),
        "flash_attn_with_kvcache, block table": lambda: flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table
        ),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            q_rows, k_rows, v_rows, offsets, offsets, 1, 1, causal=True
        ),
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "kv_paged_write": lambda: kv_paged_write(k, v, k_pages, v_pages, table, lengths),
    }


@contextmanager
def idle_backend() -> Iterator[None]:
    """A backend that returns at once."""
    module = ModuleType("idle_backend")
    output = torch.empty(0), torch.empty(0)
    vars(module).update(
        NAME="idle",
        CAPABILITIES=Capabilities(checks_values=True),
        available=lambda: Support(True),
        supports=lambda problem: Support(True),
        attention=lambda problem, out=None, with_lse=True: output,
        kv_write=lambda write: None,
    )
    sys.modules[module.__name__] = module
    dispatch.BACKEND_MODULES["idle"] = module.__name__
    try:
        with use_backend("idle"):
            yield
    finally:
        del dispatch.BACKEND_MODULES["idle"]


@contextmanager
def idle_cpu_kernels() -> Iterator[None]:
    """The CPU backend, calling a C function that returns at once."""
    from pagedflash.backends.cpu import launch

    native = launch.library()
    kernels = native.run_attention, native.run_write
    idle = ctypes.CDLL(None).abs
    idle.argtypes, idle.restype = kernels[0].argtypes, lambda returned: 0
    native.run_attention = native.run_write = idle
    try:
        with use_backend("cpu"):
            yield
    finally:
        native.run_attention, native.run_write = kernels


@contextmanager
def idle_metal_kernels() -> Iterator[None]:
    """The Metal backend, with a compiler whose kernels do nothing."""
    from pagedflash.backends import metal

    class IdleLibrary:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments, **grid: None

    capabilities = metal.CAPABILITIES
    # Lengths and tables are validated on the host for CPU tensors only, and on a Mac there are none here.
    metal.CAPABILITIES = capabilities._replace(checks_values=True)
    try:
        with metal.use_compiler(lambda source: IdleLibrary(), core_count=40), use_backend("metal"):
            yield
    finally:
        metal.CAPABILITIES = capabilities
