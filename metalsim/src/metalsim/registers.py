"""How many registers a kernel wants, as another GPU's compiler counts them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from .errors import CompileError
from .toolchain import INLINED, LANGUAGE, MSL, cached, preprocess, readable, run_clang
from .translate import translate

APPLE_REGISTERS = 128
"""Of 32 bits, that a lane may have on the first Apple GPUs before fewer simdgroups run beside each other."""

_GPU = (
    "-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-w", "-fno-strict-aliasing",
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
)  # fmt: skip
# That GPU's compiler has no code for these; others stand for them.
_STAND_INS = (
    *(f"-D__builtin_elementwise_{name}=__builtin_elementwise_exp2"
      for name in ("acos", "asin", "atan", "cosh", "sinh", "tan", "tanh")),
    *(f"-D__builtin_elementwise_{name}=__builtin_elementwise_maxnum" for name in ("atan2", "pow")),
)  # fmt: skip

_ENTRY = re.compile(r"\.name: +(\w+)\n.*?\.private_segment_fixed_size: (\d+)\n.*?\.vgpr_count: +(\d+)\n", re.DOTALL)


class Registers(NamedTuple):
    """Of one kernel, a lane."""

    used: int
    """Registers of 32 bits, with as many as the compiler wants."""
    spilled_bytes: int
    """What is in memory instead if there are no more than the limit, arrays of a thread that are there anyway included."""


def count_registers(source: str, limit: int = APPLE_REGISTERS) -> dict[str, Registers]:
    """An estimate of the registers that each kernel takes.

    Clang compiles the kernels for an AMD GPU (gfx1030, 32 lanes), whose registers belong to a lane as Apple's do; matrices
    are two elements a lane. Apple's compiler has a scheduler of its own, so the estimate says which of two kernels wants
    more, and whether one is far beyond a limit; not the number.

    Args:
        source: one Metal file.
        limit: registers of a lane, at most, for :attr:`Registers.spilled_bytes`.

    Raises:
        CompileError: the source does not compile.
    """
    content = f"registers {limit}\n{source}"
    folder = cached("library", content, lambda folder: _count(source, limit, folder / "registers.json"))
    counted: dict[str, list[int]] = json.loads((folder / "registers.json").read_text())
    return {name: Registers(*numbers) for name, numbers in counted.items()}


def _count(source: str, limit: int, output: Path) -> None:
    translation = translate(preprocess(source))
    counts = "".join(f"METALSIM_COUNT({kernel.symbol}, {limit})\n" for kernel in translation.kernels)
    program = f'#include "{MSL / "registers.h"}"\n{translation.source}\n{counts}'
    done = run_clang([*LANGUAGE, *_GPU, *_STAND_INS, *INLINED, "-"], program)
    if done.returncode:
        raise CompileError(readable(done.stderr))
    found = {name: (int(spilled), int(used)) for name, spilled, used in _ENTRY.findall(done.stdout)}
    numbers = {
        kernel.name: (found[f"metalsim_free_{kernel.symbol}"][1], found[f"metalsim_limited_{kernel.symbol}"][0])
        for kernel in translation.kernels
    }
    output.write_text(json.dumps(numbers))
