"""Running the Metal kernels in tests and benchmarks: on metalsim for CPU tensors, on the GPU for MPS tensors."""

from __future__ import annotations

import sys
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import metalsim
import torch
from torch import Tensor

import pagedflash
from pagedflash.backends import metal
from pagedflash.testing import PagedProblem, paged_problem

BASELINE = Path(__file__).parent / "metal_baseline.metal"
ELEMENT_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


class Launch(NamedTuple):
    kernel: str
    arguments: tuple[Any, ...]
    threads: tuple[int, ...]
    group_size: tuple[int, ...]

    @property
    def simdgroups(self) -> int:
        return self.threads[0] * self.threads[1] * self.threads[2] // 32


class _RecordedKernel(NamedTuple):
    name: str
    kernel: Callable[..., None]
    launches: list[Launch]

    def __call__(self, *arguments: Any, threads: tuple[int, ...], group_size: tuple[int, ...]) -> None:
        self.launches.append(Launch(self.name, arguments, threads, group_size))
        self.kernel(*arguments, threads=threads, group_size=group_size)


class _RecordedLibrary(NamedTuple):
    library: Any
    launches: list[Launch]

    def __getattr__(self, name: str) -> _RecordedKernel:
        return _RecordedKernel(name, getattr(self.library, name), self.launches)


def require_simulator() -> None:
    """Skip the test where metalsim does not run."""
    if sys.platform != "linux":
        raise unittest.SkipTest("metalsim runs on Linux; --device mps runs the kernels on a Mac")


@contextmanager
def kernels_on(device: str, core_count: int | None = None) -> Iterator[list[Launch]]:
    """Let the Metal backend run on ``device``: ``"cpu"`` through metalsim. Yields the launches made, as they come."""
    if device == "cpu":
        require_simulator()
    launches: list[Launch] = []
    compile_shader = metalsim.compile_shader if device == "cpu" else torch.mps.compile_shader
    with metal.use_compiler(lambda source: _RecordedLibrary(compile_shader(source), launches), core_count):
        yield launches


def sources_of(run: Callable[[], object], tuning: metal.Tuning | None = None) -> dict[str, list[str]]:
    """Kernel -> the sources that ``run`` has compiled for it. The kernels do nothing."""
    sources: dict[str, list[str]] = {}

    class Library(NamedTuple):
        source: str

        def __getattr__(self, name: str) -> Callable[..., None]:
            sources.setdefault(name, []).append(self.source)
            return lambda *arguments, threads, group_size: None

    with metal.use_compiler(lambda source: Library(source), 40, tuning), pagedflash.use_backend("metal"):
        run()
    return sources


def paged_decode(
    batch: int, heads: int, kv_heads: int, head_dim: int, keys: int, dtype: torch.dtype, page_size: int = 16
) -> PagedProblem:
    """One query a sequence, all sequences of the same length, every page with values of its own."""
    torch.manual_seed(keys)
    problem = paged_problem([keys] * batch, heads=(heads, kv_heads), head_dim=head_dim, page_size=page_size, dtype=dtype)
    problem.k_cache.normal_()
    problem.v_cache.normal_()
    return problem


def pairs(problem: PagedProblem) -> int:
    """(key, query head) pairs."""
    return int(problem.cache_seqlens.sum()) * problem.q.shape[2]


def gathered_sdpa(problem: PagedProblem) -> Tensor:
    """What upstream does without a paged kernel: gather K and V, then torch's SDPA. Returns ``(B, 1, Hq, D)``."""
    outs = []
    for q, pages, length in zip(problem.q, problem.block_table.long(), problem.cache_seqlens.tolist()):
        k, v = (cache[pages].flatten(0, 1)[:length].transpose(0, 1) for cache in (problem.k_cache, problem.v_cache))
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, enable_gqa=True).transpose(0, 1)
        )
    return torch.stack(outs)


def plain_decode(problem: PagedProblem) -> Tensor:
    """The baseline kernel, on metalsim."""
    q, k, v, lengths, table = problem
    batch, _, heads, head_dim = q.shape
    source = (
        f"#define T {ELEMENT_TYPES[q.dtype]}\n#define HEAD_DIM {head_dim}\n#define PAGE_SIZE {k.shape[1]}\n"
        + BASELINE.read_text()
    )
    out = torch.empty_like(q)
    metalsim.compile_shader(source).plain_decode(
        q, k, v, out, table, lengths, table.shape[1], heads, k.shape[2], head_dim**-0.5,
        threads=(32 * heads, batch, 1), group_size=(32, 1, 1), arg_casts={6: "int32", 7: "int32", 8: "int32"},
    )  # fmt: skip
    return out


def counted(run: Callable[[], object]) -> list[metalsim.Dispatch]:
    """The dispatches of ``run`` on metalsim, with their counters."""
    with ExitStack() as stack:
        simulation = stack.enter_context(metalsim.simulate(check=True))
        stack.enter_context(kernels_on("cpu"))
        run()
    return simulation.dispatches
