"""What pagedflash is compared with: one module each, of functions from a problem to a contender; and which run where.

A function raises ImportError where its package is not installed, and :class:`CannotRun` where the package cannot do the
problem; measuring then goes on without it, and says so. ``pagedflash bench`` and the suites of ``benchmarks/`` share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from ...testing import PagedProblem
from ..measure import Contender
from .packed import PackedProblem

Peers = dict[str, Callable[[], Contender]]
"""Name -> what makes the contender. What is behind a comma in a name is a variant."""


class CannotRun(Exception):
    """A baseline cannot run here, or not this problem; the message says why."""


def that_run(peers: Mapping[str, Callable[[], Contender]], leave_out: Callable[[str, str], None]) -> dict[str, Contender]:
    """Those that can be made and run here. ``leave_out`` gets the name of each other one, and why."""
    contenders: dict[str, Contender] = {}
    for name, make in peers.items():
        try:
            contender = make()
            contender.run()
        except Exception as error:  # someone else's code, in whatever state
            known = isinstance(error, (CannotRun, ImportError))
            leave_out(name, str(error) if known else f"{type(error).__name__}: {str(error)[:300]}")
        else:
            contenders[name] = contender
    return contenders


def cpu_decode(problem: PagedProblem) -> Peers:
    from . import openvino, vllm_cpu

    peers: Peers = {"OpenVINO": partial(openvino.decode, problem)}
    for size in vllm_cpu.PAGE_SIZES:
        peers[f"vLLM, pages of {size}"] = partial(vllm_cpu.decode, problem, size)
    return peers


def cpu_prefill(q: Tensor, k: Tensor, v: Tensor) -> Peers:
    """A causal prompt ``(1, S, H, D)``."""
    from . import vllm_cpu, zentorch

    peers: Peers = {"zentorch": partial(zentorch.prefill, q, k, v)}
    for size in vllm_cpu.PAGE_SIZES:
        peers[f"vLLM, pages of {size}"] = partial(vllm_cpu.prefill, q, k, v, size)
    return peers


def cuda_decode(problem: PagedProblem) -> Peers:
    from . import flash_attention, flashinfer

    peers: Peers = {
        f"FlashInfer, {variant}": partial(flashinfer.decode, problem, variant) for variant in flashinfer.DECODE_VARIANTS
    }
    peers["FA2"] = partial(flash_attention.fa2_decode, problem)
    peers["FA3 on contiguous keys"] = partial(flash_attention.fa3_decode, problem)
    peers["FA4"] = partial(flash_attention.fa4_decode, problem)
    return peers | vllm_kernels(PackedProblem.of(problem))


def cuda_mla(problem: PagedProblem) -> Peers:
    from . import flashinfer

    return {f"FlashInfer, {variant}": partial(flashinfer.mla, problem, variant) for variant in flashinfer.MLA_VARIANTS}


def cuda_prefill(problem: PackedProblem) -> Peers:
    from . import flash_attention, flashinfer

    peers: Peers = {
        f"FlashInfer, {variant}": partial(flashinfer.prefill, problem, variant) for variant in flashinfer.PREFILL_VARIANTS
    }
    peers["FA2"] = partial(flash_attention.fa2_prefill, problem)
    peers["FA4"] = partial(flash_attention.fa4_prefill, problem)
    peers |= vllm_kernels(problem) if problem.block_table is not None else {}
    where = "" if problem.block_table is None else " on contiguous keys"
    peers[f"FA3{where}"] = partial(flash_attention.fa3_prefill, problem)
    return peers


def cuda_speculative(problem: PagedProblem) -> Peers:
    """Several queries a sequence: what prompts take, and what a cache takes with more than one query."""
    from . import flash_attention

    peers = cuda_prefill(PackedProblem.of(problem))
    peers["FA3 on contiguous keys, of a cache"] = partial(flash_attention.fa3_decode, problem)
    peers["FA4, of a cache"] = partial(flash_attention.fa4_decode, problem)
    return peers


def vllm_kernels(problem: PackedProblem) -> Peers:
    from . import vllm

    return {f"vLLM, {variant}": partial(vllm.attention, problem, variant) for variant in vllm.VARIANTS}
