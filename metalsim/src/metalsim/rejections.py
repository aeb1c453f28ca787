"""What Apple's compiler rejects and clang for a CPU accepts.

Three looks at the source: at its words, at the messages of a parse with real address spaces, and at that parse's
syntax tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import CompileError
from .tokens import Tokens
from .toolchain import LANGUAGE, MSL, readable, run_clang
from .translate import ADDRESS_SPACES, NOT_SCOPES, SCALARS, VECTORS, attributes_in, translate

FORBIDDEN_WORDS = frozenset(
    ("virtual", "throw", "try", "catch", "new", "delete", "dynamic_cast", "typeid", "goto", "double", "thread_local", "asm")
)
# A copy of a structure between address spaces is right in Metal, where clang finds no constructor for it.
_STRUCTURE_COPIES = ("no matching constructor for initialization of", "no viable overloaded '='")


def reject(preprocessed: str) -> None:
    """Raise for what Apple's compiler would reject.

    Args:
        preprocessed: Metal source after its macros.

    Raises:
        CompileError: with one line for each rejection.
    """
    tokens = Tokens(preprocessed)
    found = [*_forbidden_words(tokens), *_missing_spaces(tokens)]
    diagnostics, tree = parse(preprocessed)
    found += _mixed_spaces(diagnostics)
    found += tree.rejections()
    if found:
        raise CompileError("\n".join(dict.fromkeys(found)))


def parse(preprocessed: str) -> tuple[str, SyntaxTree]:
    """Clang's messages and syntax tree, with address spaces."""
    translation = translate(preprocessed, keep_spaces=True)
    source = f'#include "{MSL / "prelude.h"}"\n{translation.source}'
    done = run_clang(
        [
            *LANGUAGE,
            "-DMETALSIM_SPACES",
            "-w",
            "-fsyntax-only",
            "-fno-color-diagnostics",
            "-Xclang",
            "-ast-dump",
            "-",
        ],
        source,
    )
    return done.stderr, SyntaxTree(done.stdout)


def _forbidden_words(tokens: Tokens) -> Iterator[str]:
    for token in tokens.code:
        if token.kind == "word" and token.text in FORBIDDEN_WORDS:
            yield f"line {token.line}: Metal has no '{token.text}'"


# -- pointers and references without an address space -------------------------------------------------------------------


def _missing_spaces(tokens: Tokens) -> Iterator[str]:
    """`T* p` and `T& r`, where Metal wants `device T* p`, `thread T& r` and so on. `auto*` and `auto&` are deduced."""
    for first, last in attributes_in(tokens, 0, len(tokens)):
        tokens.erase(first, last + 1)
    types, templates = _declared_types(tokens)
    for i in range(len(tokens)):
        if tokens.text(i) not in ("*", "&", "&&"):
            continue
        specifiers = list(_specifiers(tokens, i, types, templates))
        if specifiers and not ADDRESS_SPACES.intersection(specifiers) and "auto" not in specifiers:
            what = "pointer" if tokens.text(i) == "*" else "reference"
            yield f"line {tokens[i].line}: {what} to '{' '.join(reversed(specifiers))}' without an address space"


def _declared_types(tokens: Tokens) -> tuple[set[str], set[str]]:
    """Names of types, and names of templates of types."""
    types = {*SCALARS, *VECTORS, "void", "size_t", "auto", "unsigned", "signed"}
    types |= {f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)}
    types |= {f"atomic_{t}" for t in ("int", "uint", "bool", "float", "ulong")}
    templates = {"vec", "packed_vec", "atomic", "simdgroup_matrix", "array"}
    for i in range(len(tokens)):
        if tokens.text(i) in ("struct", "class", "typename", "using", "enum", "union") and tokens.is_word(i + 1):
            if tokens.text(i + 2) in ("{", ":", ";", "=", ",", ">", "final"):
                opening = tokens.text(i - 1) == ">" and tokens.opening_angle(i - 1)
                templated = opening and tokens.text(opening - 1) == "template"
                (templates if templated and tokens.text(i) != "typename" else types).add(tokens.text(i + 1))
        elif tokens.text(i) == "typedef":
            end = next((j for j in range(i, len(tokens)) if tokens.text(j) == ";"), i)
            types.add(tokens.text(end - 1))
    return types, templates


def _specifiers(tokens: Tokens, at: int, types: set[str], templates: set[str]) -> Iterator[str]:
    """The words of the declared type before the `*` or `&` at `at`, last first; none when it is an operator."""
    i = at - 1
    words = []
    qualifiers = {"const", "volatile", "static", "constexpr", "inline", "typename", *ADDRESS_SPACES}
    while tokens.text(i) in ("const", "volatile", *ADDRESS_SPACES):
        words.append(tokens.text(i))
        i -= 1
    if tokens.text(i) == "*":  # a pointer to a pointer: the words between the stars speak for the outer one
        inner = list(_specifiers(tokens, i, types, templates))
        if inner:
            yield from words or ["pointer"]
        return
    if tokens.text(i) == ">":
        opening = tokens.opening_angle(i)
        if opening is None or tokens.text(opening - 1) not in templates:
            return
        words.append(tokens.text(opening - 1) + "<>")
        i = opening - 2
    elif tokens.text(i) in types and tokens.text(i - 1) not in (".", "->"):
        words.append(tokens.text(i))
        i -= 1
    else:
        return
    while tokens.text(i) == "::":
        i -= 2 if tokens.is_word(i - 1) and tokens.text(i - 1) not in NOT_SCOPES else 1
    while tokens.text(i) in qualifiers or tokens.text(i) in types:
        words.append(tokens.text(i))
        i -= 1
    yield from words


# -- messages of the parse with address spaces ---------------------------------------------------------------------------


def _mixed_spaces(diagnostics: str) -> Iterator[str]:
    lines = readable(diagnostics).splitlines()
    for n, line in enumerate(lines):
        match = re.match(r"(\S+?):(\d+):\d+: (?:fatal )?error: (.*)", line)
        if not match or any(copy in match[3] for copy in _STRUCTURE_COPIES):
            continue
        notes = []
        for note in lines[n + 1 :]:
            if re.match(r"\S+?:\d+:\d+: (?:fatal )?error:", note):
                break
            if "note: " in note and "address space" in note:
                notes.append(note.split("note: ", 1)[1])
        where = f"line {match[2]}" if match[1] == "program.metal" else f"{match[1]}:{match[2]}"
        yield "; ".join([f"{where}: {match[3]}", *notes[:2]])


# -- the syntax tree -----------------------------------------------------------------------------------------------------

_NODE = re.compile(r"^([ |`-]*)(\w+) (0x[0-9a-f]+)(.*)")
_PLACE = re.compile(r"(<stdin>|[^\s<>,:]+\.h):(\d+):\d+|line:(\d+):\d+|(?<=[<, ])col:\d+")
_CALLEE = re.compile(r"(?:Function|CXXMethod) (0x[0-9a-f]+)|(?:->|\.)[\w~]+ (0x[0-9a-f]+)$")
_FUNCTIONS = ("FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXConversionDecl")


class SyntaxTree:
    """Clang's dump of the syntax tree, read line by line."""

    def __init__(self, dump: str) -> None:
        self.found: list[str] = []
        self.choices: list[int] = []
        """Lines with ``condition ? array[i] : array[j]`` for an array of a thread."""
        self.calls: dict[str, set[str]] = {}
        self.names: dict[str, tuple[str, int]] = {}
        self.same: dict[str, str] = {}  # a redeclaration's first declaration
        self._read(dump)

    def rejections(self) -> list[str]:
        """One line for each rejection."""
        return self.found + self._recursion()

    def _read(self, dump: str) -> None:
        file, line = "", 0
        kinds: dict[int, str] = {}
        choices: dict[int, bool] = {}  # by depth: whether a node is a choice between values in thread memory
        functions: list[tuple[int, str]] = []
        globals_without_space: dict[int, str] = {}  # by depth, until an annotation speaks for them
        for text in dump.splitlines():
            node = _NODE.match(text)
            if not node:
                continue
            depth, kind, address, rest = len(node[1]), node[2], node[3], node[4]
            begin: int | None = None
            for place in _PLACE.finditer(rest):
                if place[1]:
                    file, line = place[1], int(place[2])
                elif place[3]:
                    line = int(place[3])
                begin = line if begin is None else begin
            begin = line if begin is None else begin
            kinds[depth] = kind
            is_choice = kind == "ConditionalOperator" and rest.endswith("lvalue") and "address_space" not in rest
            choices[depth] = is_choice or (kind == "ParenExpr" and choices.get(depth - 2, False))
            while functions and functions[-1][0] >= depth:
                functions.pop()
            for d in [d for d in globals_without_space if d >= depth]:
                self.found.append(globals_without_space.pop(d))
            if kind == "AnnotateAttr" and '"constant"' in rest:  # where the macro that writes it stands
                globals_without_space.pop(depth - 2, None)
            if file != "<stdin>":
                continue
            if kind in _FUNCTIONS:
                if first := re.match(r" (?:parent 0x[0-9a-f]+ )?prev (0x[0-9a-f]+)", rest):
                    self.same[address] = first[1]
                functions.append((depth, self._first(address)))
                if name := re.search(r"(\S+) '", rest):
                    self.names.setdefault(self._first(address), (name[1], begin))
            elif kind in ("DeclRefExpr", "MemberExpr") and functions:
                if callee := _CALLEE.search(rest):
                    self.calls.setdefault(functions[-1][1], set()).add(callee[1] or callee[2])
            elif kind == "VarDecl":
                self._variable(depth, kinds.get(depth - 2, ""), rest, begin, globals_without_space)
            elif kind == "ArraySubscriptExpr" and choices.get(depth - 2):
                self.choices.append(begin)
            elif kind.endswith("CastExpr"):
                self._cast(kind, rest, begin)
        self.found += globals_without_space.values()

    def _first(self, address: str) -> str:
        while address in self.same:
            address = self.same[address]
        return address

    def _variable(self, depth: int, parent: str, rest: str, line: int, pending: dict[int, str]) -> None:
        name_and_type = re.search(r"(\w+) '([^']*)'", rest)
        if not name_and_type:
            return
        name, kind = name_and_type.groups()
        if parent in ("TranslationUnitDecl", "NamespaceDecl"):
            if "address_space(2)" not in kind and not kind.startswith("const constant") and "constant " not in kind:
                pending[depth] = f"line {line}: the variable '{name}' of the program is not in the constant address space"
        elif re.search(r"\bstatic\b", rest) and not kind.startswith("const") and "constant" not in kind:
            self.found.append(f"line {line}: the static variable '{name}' is not in the constant address space")

    def _cast(self, kind: str, rest: str, line: int) -> None:
        if "<AddressSpaceConversion>" in rest:
            self.found.append(f"line {line}: cast between address spaces")
        if kind == "ImplicitCastExpr" and "part_of_explicit_cast" not in rest:
            to = re.search(r"'([^']*)' <FloatingCast>", rest)
            if to and "__bf16" in to[1]:
                self.found.append(f"line {line}: implicit conversion of a floating point value to bfloat")

    def _recursion(self) -> list[str]:
        found = []
        for start in self.calls:
            reached: set[str] = set()
            ahead = [self._first(c) for c in self.calls[start]]
            while ahead:
                function = ahead.pop()
                if function not in reached:
                    reached.add(function)
                    ahead += [self._first(c) for c in self.calls.get(function, ())]
            if start in reached:
                name, line = self.names.get(start, ("?", 0))
                found.append(f"line {line}: the function '{name}' is recursive")
        return found
