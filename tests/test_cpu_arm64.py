"""The arm64 kernels, cross-compiled with zig and run by qemu-user: recorded problems are replayed without Python or torch.

Skipped where ``ziglang`` or ``qemu-aarch64-static`` is missing. For macOS on arm64 it is only compiled.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pagedflash.backends.cpu import launch
from pagedflash.problem import AttentionProblem, KVCache, Queries, Scores
from pagedflash.signature import addresses_of
from pagedflash.testing import DTYPES, LAYOUTS, assert_matches_reference, random_problem

pytest.importorskip("ziglang")

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "src/pagedflash/backends/cpu/native"
SOURCES = [NATIVE / f"{name}.cpp" for name in ("entry", "validate", "plan", "isa", "kernels")]
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fno-threadsafe-statics"]
ISA = ["-DPAGEDFLASH_ISA=neon", "-DPAGEDFLASH_ISA_neon=1", "-DPAGEDFLASH_HAS_neon=1"]
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def zig(command: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "ziglang", command, *map(str, arguments)], check=True)


def compile_for(target: str, directory: Path, sources: list[Path], *options: str) -> list[Path]:
    objects = [directory / f"{source.stem}.o" for source in sources]
    for source, compiled in zip(sources, objects):
        zig("c++", "-target", target, *options, *FLAGS, *ISA, "-Wall", "-Wextra", "-Werror", "-c", source, "-o", compiled)
    return objects


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if QEMU is None:
        pytest.skip("no qemu-aarch64 to run arm64 programs with")
    directory = tmp_path_factory.mktemp("arm64")
    objects = compile_for("aarch64-linux-musl", directory, [*SOURCES, ROOT / "tests/native/replay.cpp"], "-O1")
    zig("cc", "-target", "aarch64-linux-musl", "-static", *objects, "-o", directory / "replay")
    return directory / "replay"


class Recording:
    """A problem as one file: its packed addresses and shape, then every storage the addresses lead to."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.out = torch.zeros(problem.out_shape, dtype=problem.queries.q.dtype)
        self.lse = torch.zeros(problem.lse_shape)
        addresses = addresses_of(*problem.tensors, self.out, self.lse)
        self.tensors = [tensor for tensor in (*problem.tensors, self.out, self.lse) if tensor is not None]
        self.data = bytearray(addresses + launch.make_plan(problem).shape)
        self.places: dict[int, int] = {}  # address of a storage -> where it is in the file
        for tensor in self.tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in self.places:
                self.data.extend(b"\0" * (-len(self.data) % 64))
                self.places[storage.data_ptr()] = len(self.data)
                self.data.extend(bytes(_bytes_of(tensor).numpy()))
        for position in range(0, len(addresses), 8):
            word = int.from_bytes(addresses[position : position + 8], sys.byteorder)
            for tensor in self.tensors:
                if word == tensor.data_ptr() != 0:
                    storage = tensor.untyped_storage().data_ptr()
                    place = self.places[storage] + word - storage
                    self.data[position : position + 8] = place.to_bytes(8, sys.byteorder)

    def take_output(self, data: bytes) -> tuple[Tensor, Tensor]:
        """Bring what the replay wrote back into the tensors: output, LSE, caches."""
        for tensor in self.tensors:
            place = self.places.get(tensor.untyped_storage().data_ptr())
            if place is not None:
                stored = _bytes_of(tensor)
                stored.copy_(torch.frombuffer(bytearray(data[place : place + stored.numel()]), dtype=torch.uint8))
        return self.out, self.lse


def _bytes_of(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def run_recorded(replay: Path, problem: AttentionProblem, directory: Path) -> tuple[Tensor, Tensor]:
    recording = Recording(problem)
    file = directory / "problem"
    file.write_bytes(recording.data)
    subprocess.run([QEMU, str(replay), str(file)], check=True)
    return recording.take_output(file.read_bytes())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options(replay: Path, rng: random.Random, rounds, dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    for _ in range(rounds(2)):
        problem = random_problem(rng, dtype=dtype, layout=layout, max_keys=400)
        assert_matches_reference(problem, lambda problem: run_recorded(replay, problem, tmp_path))


@pytest.mark.parametrize("queries", (1, 40))
def test_lse_of_scores_of_zero_is_exact(replay: Path, queries: int, tmp_path: Path) -> None:
    q, k, v = torch.zeros(1, queries, 1, 64), torch.ones(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    problem = AttentionProblem.of(Queries(q, max_seqlen_q=queries), KVCache(k, v, max_seqlen_k=1), None, Scores())
    out, lse = run_recorded(replay, problem, tmp_path)
    assert torch.equal(lse, torch.zeros(1, 1, queries)) and torch.equal(out, v.expand_as(out))


def test_macos_compiles(tmp_path: Path) -> None:
    compile_for("aarch64-macos", tmp_path, SOURCES, "-O0", "-fno-sanitize=all")
