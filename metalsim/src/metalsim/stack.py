"""Arrays of a thread that are not in registers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .errors import CompileError
from .rejections import parse
from .toolchain import CODE, INLINED, LANGUAGE, MSL, cached, preprocess, readable, run_clang
from .translate import translate


def stack_arrays(source: str) -> list[str]:
    """What keeps arrays of a thread in memory, where each access costs a load or a store.

    An array is in registers only if every index into it is known when loops are unrolled. Two things are looked for: arrays
    that are left in what clang makes of the kernels, everything inlined; and ``condition ? a[i] : a[j]``, which is the
    address of one of two elements, as C++ has it, and which clang 16 to 19 and compilers made of them turn into an index
    that is not known.

    Args:
        source: one Metal file.

    Returns:
        one line for each finding; none is good.

    Raises:
        CompileError: the source does not compile.
    """
    folder = cached("library", f"stack arrays\n{source}", lambda folder: _look(source, folder / "found.json"))
    found: list[str] = json.loads((folder / "found.json").read_text())
    return found


def _look(source: str, output: Path) -> None:
    preprocessed = preprocess(source)
    _, tree = parse(preprocessed)
    found = [f"line {line}: a choice between elements of an array; load both, then choose" for line in tree.choices]
    program = f'#include "{MSL / "prelude.h"}"\n{translate(preprocessed).source}'
    done = run_clang([*LANGUAGE, *CODE, *INLINED, "-emit-llvm", "-"], program)
    if done.returncode:
        raise CompileError(readable(done.stderr))
    function = ""
    for line in done.stdout.splitlines():
        if line.startswith("define "):
            function = re.findall(r"@([\w.$]+)", line)[0]
        array = re.search(r"= alloca \[(.*)\], align", line)
        # The simulator's own simd operations have arrays of lanes.
        if array and not function.startswith("_ZN8metalsim"):
            found.append(f"{function}: an array of {array[1]} stays in memory")
    output.write_text(json.dumps(list(dict.fromkeys(found))))
