"""Running the Metal kernels in tests and benchmarks: on metalsim for CPU tensors, on the GPU for MPS tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import metalsim
import torch
from torch import Tensor

from pagedflash.backends import metal

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


@contextmanager
def kernels_on(device: str, core_count: int | None = None) -> Iterator[list[Launch]]:
    """Let the Metal backend run on ``device``: ``"cpu"`` through metalsim. Yields the launches made, as they come."""
    launches: list[Launch] = []
    compile_shader = metalsim.compile_shader if device == "cpu" else torch.mps.compile_shader
    with metal.use_compiler(lambda source: _RecordedLibrary(compile_shader(source), launches), core_count):
        yield launches


class PagedDecode(NamedTuple):
    """One query a sequence over shuffled pages: a problem that the backend and the baseline can both run."""

    q: Tensor  # (B, 1, Hq, D)
    k: Tensor  # pages
    v: Tensor
    table: Tensor
    lengths: Tensor

    @property
    def kv_bytes(self) -> int:
        """What any decode must read."""
        return int(self.lengths.sum()) * self.k.shape[2] * self.k.shape[3] * 2 * self.k.element_size()

    @property
    def pairs(self) -> int:
        """(key, query head) pairs."""
        return int(self.lengths.sum()) * self.q.shape[2]


def paged_decode(
    batch: int, heads: int, kv_heads: int, head_dim: int, keys: int, dtype: torch.dtype, page_size: int = 16
) -> PagedDecode:
    generator = torch.Generator().manual_seed(keys)
    pages = -(-keys // page_size)
    table = torch.randperm(batch * pages, generator=generator).view(batch, pages).int()
    shape = (batch * pages, page_size, kv_heads, head_dim)
    return PagedDecode(
        torch.randn(batch, 1, heads, head_dim, generator=generator).to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
        table,
        torch.full((batch,), keys, dtype=torch.int32),
    )


def gathered_sdpa(problem: PagedDecode) -> Tensor:
    """What upstream does without a paged kernel: gather K and V, then torch's SDPA. Returns ``(B, 1, Hq, D)``."""
    outs = []
    for q, pages, length in zip(problem.q, problem.table.long(), problem.lengths.tolist()):
        k, v = (cache[pages].flatten(0, 1)[:length].transpose(0, 1) for cache in (problem.k, problem.v))
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, enable_gqa=True).transpose(0, 1)
        )
    return torch.stack(outs)


def plain_decode(problem: PagedDecode) -> Tensor:
    """The baseline kernel, on metalsim."""
    q, k, v, table, lengths = problem
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
