"""Writes src/pagedflash/__init__.pyi: what the functions return depends on an argument, which takes overloads to say.

python tools/stubs.py          writes it from the signatures
python tools/stubs.py --check  says whether it is up to date
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/pagedflash"
STUB = PACKAGE / "__init__.pyi"
PROBS, LSE = "return_attn_probs", "return_softmax_lse"
TENSORS = {1: "Tensor", 2: "tuple[Tensor, Tensor]", 3: "tuple[Tensor, Tensor, Tensor]"}
HEAD = '''"""Written by tools/stubs.py from the signatures: a function returns one tensor, or as many as it is asked for."""

from typing import Literal, overload

from torch import Tensor
'''
VARIABLES = """
_Output = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
__version__: str
"""


def functions() -> Iterator[ast.FunctionDef]:
    for module in ("interface", "qkvpacked"):
        for node in ast.parse((PACKAGE / f"{module}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node


def stub() -> str:
    written = {function.name: function for function in functions()}
    imports, public = [], ""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and not any(name.name in written for name in node.names):
            imports.append(ast.unparse(node))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.unparse(node)
    declared = [line for function in written.values() for line in signatures(function)]
    source = "\n".join([HEAD, *imports, VARIABLES, public, *declared])
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def signatures(function: ast.FunctionDef) -> Iterator[str]:
    """One for each number of tensors, and one for callers whose arguments are not known before it runs."""
    names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    options = [name for name in (PROBS, LSE) if name in names]
    if not options:
        yield signature(function, {}, ast.unparse(function.returns or ast.Constant(None)))
        return
    for count, asked_for in ((1, ""), (2, LSE), (3, PROBS)):
        if not asked_for or asked_for in options:
            literals = {name: str(name == asked_for) for name in options}
            yield "@overload\n" + signature(function, literals, TENSORS[count])
    yield "@overload\n" + signature(function, {}, "_Output")


def signature(function: ast.FunctionDef, literals: dict[str, str], returns: str) -> str:
    """``literals``: what an option has to be. One that must be True has no default, and is given by its name."""
    given = function.args
    defaults: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    words, by_name = [], False
    for argument, default, is_by_name in (
        *((a, d, False) for a, d in zip(given.args, defaults)),
        *((a, d, True) for a, d in zip(given.kwonlyargs, given.kw_defaults)),
    ):
        literal = literals.get(argument.arg)
        if (is_by_name or literal == "True") and not by_name:
            words.append("*")
            by_name = True
        annotation = f"Literal[{literal}]" if literal else ast.unparse(argument.annotation or ast.Constant(None))
        has_default = default is not None and literal != "True"
        words.append(f"{argument.arg}: {annotation}" + (f" = {ast.unparse(default)}" if default and has_default else ""))
    return f"def {function.name}({', '.join(words)},) -> {returns}: ..."


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(STUB.read_text() != stub() and f"{STUB.name} is out of date; run: python tools/stubs.py")
    STUB.write_text(stub())
