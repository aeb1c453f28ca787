"""Metal Shading Language to C++ for clang: a pass over tokens, not a parser.

Kernels become functions with an entry that binds their parameters, threadgroup variables become shared storage,
vector constructors and casts become calls (see msl/convert.h), address spaces disappear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import CompileError
from .tokens import Tokens

SCALARS = (
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "float",
    "bfloat",
)
VECTORS = frozenset(f"{p}{t}{n}" for p in ("", "packed_") for t in SCALARS for n in (2, 3, 4))
ADDRESS_SPACES = frozenset(("device", "constant", "threadgroup", "thread"))
# Words before a `::` that begins at the global scope.
NOT_SCOPES = ADDRESS_SPACES.union(
    ("return", "case", "else", "const", "volatile", "constexpr", "static", "inline", "typename", "using")
)
# Metal wants the same number of components for all of these.
POSITIONS = frozenset(
    (
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threads_per_threadgroup",
        "threads_per_grid",
        "threadgroups_per_grid",
        "dispatch_threads_per_threadgroup",
    )
)
BUILTINS = POSITIONS | {
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "dispatch_simdgroups_per_threadgroup",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
}
_FLOATING = re.compile(r"(?!0[xX])(\d*\.\d*|\d+(?=[eE]))([eE][+-]?\d+)?(f|F|h|H|bf|BF)?$|\d+(h|H|bf|BF)$")


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: `buffer` is the C++ expression of its index, or None for a built-in position."""

    name: str
    buffer: str | None
    builtin: str | None
    components: str = "1"


@dataclass(frozen=True)
class KernelEntry:
    """A kernel by the name that the host uses; `symbol` numbers its entry in the compiled library."""

    name: str
    symbol: int
    parameters: list[Parameter]


@dataclass
class Translation:
    """Rewritten source and its kernels."""

    source: str
    kernels: list[KernelEntry] = field(default_factory=list)


def translate(preprocessed: str, keep_spaces: bool = False) -> Translation:
    """Rewrite preprocessed Metal source as C++ for the headers in msl/.

    Args:
        preprocessed: the source after its macros.
        keep_spaces: keep address spaces, for the parse of rejections.py; the result is not meant to run.

    Raises:
        CompileError: what the pass itself does not understand or Metal does not allow.
    """
    return _Translator(Tokens(preprocessed), keep_spaces).run()


def attributes_in(tokens: Tokens, first: int, last: int) -> list[tuple[int, int]]:
    """Ranges [first `[`, last `]`] of the `[[...]]` attributes in [first, last)."""
    found, i = [], first
    while i < last:
        if tokens.text(i) == "[" and tokens.text(i + 1) == "[" and tokens.text(i - 1) != "operator":
            end = tokens.closing(i)
            found.append((i, end))
            i = end
        i += 1
    return found


class _Translator:
    def __init__(self, tokens: Tokens, keep_spaces: bool) -> None:
        self.t = tokens
        self.keep_spaces = keep_spaces
        self.kernels: list[KernelEntry] = []
        self.parameters: dict[str, list[Parameter]] = {}
        self.kernel_bodies: list[tuple[int, int]] = []
        self.type_names = set(VECTORS)
        self.variables = 0

    def run(self) -> Translation:
        self._collect_type_names()
        self._kernels()
        for first, last in attributes_in(self.t, 0, len(self.t)):
            self.t.erase(first, last + 1)
        self._threadgroup_variables()
        self._constructors_and_casts()
        self._literals()
        self._address_spaces()
        return Translation(self.t.render(), self.kernels)

    def _address_spaces(self) -> None:
        for i, token in enumerate(self.t.code):
            if token.text in ("kernel", "thread") or (token.text in ADDRESS_SPACES and not self.keep_spaces):
                token.text = "const" if token.text == "constant" else " " * len(token.text)
            elif token.text == "constant" and self._declares_scalar(i):
                token.text = "metalsim_program_constant"

    def _declares_scalar(self, at: int) -> bool:
        """Whether the `constant` at `at` declares one value, not an array nor what a pointer or reference reaches."""
        for i in range(at, len(self.t)):
            if self.t.text(i) in ("=", ";", "(", ")", ",", "{", "[", "*", "&"):
                return self.t.text(i) in ("=", ";")
        return False

    # -- names of types, for constructors and casts -----------------------------------------------------------------

    def _collect_type_names(self) -> None:
        t = self.t
        for i in range(len(t)):
            text = t.text(i)
            if (
                (text in ("typename", "class") and t.is_word(i + 1) and t.text(i + 2) in (",", ">", "="))
                and t.text(i - 1) in ("<", ",")
            ) or (text == "using" and t.is_word(i + 1) and t.text(i + 2) == "="):
                self.type_names.add(t.text(i + 1))
            elif text == "typedef":
                end = i
                while t.text(end) not in (";", ""):
                    end += 1
                if t.is_word(end - 1):
                    self.type_names.add(t.text(end - 1))

    # -- kernels ----------------------------------------------------------------------------------------------------

    def _kernels(self) -> None:
        t, i = self.t, 0
        while i < len(t):
            if t.text(i) == "template" and t.text(i + 1) != "<":
                i = self._instantiation(i)
            elif t.text(i) == "kernel" and t.text(i - 1) not in (".", "->", "::"):
                i = self._definition(i)
            i += 1

    def _definition(self, at: int) -> int:
        """A kernel function that begins near the word `kernel` at `at`."""
        t = self.t
        start = at
        while start > 0 and t.text(start - 1) not in (";", "}", "{"):
            start -= 1
        templated = t.text(start) == "template"
        within = {i: last for first, last in attributes_in(t, start, min(at + 64, len(t))) for i in range(first, last + 1)}
        opening = at
        while t.text(opening) not in ("(", ";", "{", "") or opening in within:
            opening = within.get(opening, opening) + 1
        if t.text(opening) != "(":
            raise CompileError(f"line {t[at].line}: 'kernel' is not followed by a function")
        name, closing = t.text(opening - 1), t.closing(opening)
        body = closing + 1
        while t.text(body) not in ("{", ";", ""):
            body += 1
        if t.text(body) != "{":  # a declaration
            return body
        self.parameters[name] = [
            self._parameter(name, first, last, position)
            for position, (first, last) in enumerate(t.split(opening + 1, closing))
        ]
        self._number_implicit_buffers(name)
        self._check_parameters(name, t[at].line)
        end = t.closing(body)
        self.kernel_bodies.append((body, end))
        if not templated:
            host_name = self._host_name(start, opening) or name
            t[end].after += self._entry(host_name, name, self.parameters[name])
        return body

    def _instantiation(self, at: int) -> int:
        """`template [[host_name("x")]] [[kernel]] void f<half, 128>(...);` or `... decltype(f<half>) f<half>;`"""
        t = self.t
        end = at
        while t.text(end) not in (";", ""):
            end = t.closing(end) if t.text(end) in ("(", "[", "{") else end
            end += 1
        attributes = attributes_in(t, at, end)
        if not attributes and all(t.text(i) != "kernel" for i in range(at, end)):
            return end
        host_name = self._host_name(at, end)
        inside = {i for first, last in attributes for i in range(first, last + 1)}
        words = [i for i in range(at + 1, end) if i not in inside and t.text(i) != "kernel"]
        type_end = t.closing(words[1]) if t.text(words[0]) == "decltype" else words[0]  # decltype(...), or void
        words = [i for i in words if i > type_end]
        first, last = words[0], words[0]
        while last < end and t.text(last) != "(":
            closing = t.closing_angle(last) if t.text(last) == "<" else None
            last = closing + 1 if closing is not None else last + 1
        function = t.join(first, last)
        name = function.split("<")[0].split("::")[-1].strip()
        if name not in self.parameters:
            raise CompileError(f"line {t[at].line}: instantiation of '{name}', which is no kernel")
        t[end].after += self._entry(host_name or name, function, self.parameters[name])
        return end

    def _host_name(self, first: int, last: int) -> str | None:
        for i in range(first, last):
            if self.t.text(i) == "host_name" and self.t.text(i + 1) == "(":
                strings = [self.t.text(j)[1:-1] for j in range(i + 2, self.t.closing(i + 1))]
                return "".join(strings)
        return None

    def _parameter(self, kernel: str, first: int, last: int, position: int) -> Parameter:
        t = self.t
        attributes = attributes_in(t, first, last)
        components = next((t.text(i)[-1] for i in range(first, last) if t.text(i)[-1] in "234"), "1")
        declared_end = attributes[0][0] if attributes else last
        name_at = declared_end - 1
        name = t.text(name_at) if t.is_word(name_at) else f"#{position}"
        where = f"line {t[first].line}: kernel '{kernel}', parameter '{name}'"
        for begin, end in attributes:
            word = t.text(begin + 2)
            if word == "buffer":
                return Parameter(name, t.join(begin + 4, t.closing(begin + 3)), None)
            if word in BUILTINS:
                return Parameter(name, None, word, components)
            raise CompileError(f"{where}: attribute [[{t.join(begin + 2, end - 1)}]] is not supported")
        if any(t.text(i) in ("*", "&") for i in range(first, last)):
            return Parameter(name, "", None)
        raise CompileError(f"{where} has no attribute, and only pointers and references can do without")

    def _number_implicit_buffers(self, kernel: str) -> None:
        """Buffers without an index get the lowest free ones, in order, as Apple's compiler assigns them."""
        parameters = self.parameters[kernel]
        taken = {p.buffer for p in parameters if p.buffer}
        free = (str(n) for n in range(len(parameters) + len(taken)) if str(n) not in taken)
        self.parameters[kernel] = [Parameter(p.name, next(free), None) if p.buffer == "" else p for p in parameters]

    def _check_parameters(self, kernel: str, line: int) -> None:
        buffers = [p.buffer for p in self.parameters[kernel] if p.buffer is not None]
        if twice := {b for b in buffers if buffers.count(b) > 1}:
            raise CompileError(f"line {line}: kernel '{kernel}' has two parameters [[buffer({twice.pop()})]]")
        positions = [p for p in self.parameters[kernel] if p.builtin in POSITIONS]
        if len({p.components for p in positions}) > 1:
            names = ", ".join(f"'{p.name}'" for p in positions)
            raise CompileError(f"line {line}: kernel '{kernel}': {names} must have the same number of components")

    def _entry(self, host_name: str, function: str, parameters: list[Parameter]) -> str:
        n = len(self.kernels)
        self.kernels.append(KernelEntry(host_name, n, parameters))
        if self.keep_spaces:
            return ""
        bindings = [
            f"{{{p.buffer}, nullptr}}" if p.buffer is not None else f"{{-1, &metalsim::Position::{p.builtin}}}"
            for p in parameters
        ]
        return (
            f" extern constexpr metalsim::Binding metalsim_bindings_{n}[] = {{"
            f"{', '.join(bindings) or '{-1, nullptr}'}}}; METALSIM_ENTRY({n}, {function}) "
        )

    # -- threadgroup variables --------------------------------------------------------------------------------------

    def _threadgroup_variables(self) -> None:
        t = self.t
        for i in range(len(t)):
            if t.text(i) == "threadgroup" and (end := self._declaration_end(i)) is not None:
                if not any(first < i < last for first, last in self.kernel_bodies):
                    raise CompileError(f"line {t[i].line}: threadgroup variables can be declared only in a kernel function")
                self._threadgroup_declaration(i, end)

    def _declaration_end(self, at: int) -> int | None:
        """The `;` that ends a variable declared `threadgroup` at `at`; None for a pointer, reference or parameter."""
        t, i = self.t, at + 1
        while i < len(t):
            text = t.text(i)
            if text in ("*", "&", "&&", ")", ">", "{", "("):
                return None
            if text == "=":
                raise CompileError(f"line {t[i].line}: threadgroup variables cannot be initialised")
            if text == ";":
                return i
            if text == "[":
                i = t.closing(i)
            elif text == "<":
                i = t.closing_angle(i) or i
            elif text == "alignas":
                i = t.closing(i + 1)
            i += 1
        return None

    def _threadgroup_declaration(self, at: int, end: int) -> None:
        """`threadgroup T a[N], b;` -> references to shared storage."""
        t = self.t
        begin = at
        while begin > 0 and t.text(begin) != "alignas" and t.text(begin - 1) not in (";", "{", "}"):
            begin -= 1
        if t.text(begin) != "alignas":
            begin = at
        words = [i for i in range(begin, end) if t.text(i) != "threadgroup" and t[i].text.strip()]
        align = "0"
        if t.text(words[0]) == "alignas":
            closing = t.closing(words[0] + 1)
            align = t.join(words[0] + 2, closing)
            words = [i for i in words if i > closing]
        groups = self._by_comma(words)
        name_at = max(i for i in groups[0] if t.is_word(i) and self._ends_declarator(i, groups[0]))
        kind = " ".join(t.text(i) for i in groups[0] if i < name_at)
        out = []
        for group in groups:
            name = name_at if group is groups[0] else group[0]
            shape = " ".join(t.text(i) for i in group if i > name)
            n, self.variables = self.variables, self.variables + 1
            type_name = f"{'threadgroup ' if self.keep_spaces else ''}metalsim_type_{n}"
            out.append(
                f"typedef {kind} metalsim_type_{n} {shape}; {type_name}& {t.text(name)} = "
                f'metalsim::threadgroup_variable<{type_name}>({n}, "{t.text(name)}", {align});'
            )
        t.erase(begin, end + 1)
        t[end].after += " ".join(out)

    def _by_comma(self, words: list[int]) -> list[list[int]]:
        ranges = self.t.split(words[0], words[-1] + 1)
        return [[i for i in words if first <= i < last] for first, last in ranges]

    def _ends_declarator(self, i: int, group: list[int]) -> bool:
        """Whether the word at i is the declared name: only dimensions follow."""
        following = i + 1
        while following <= group[-1]:
            if self.t.text(following) != "[":
                return False
            following = self.t.closing(following) + 1
        return True

    # -- constructors and casts -------------------------------------------------------------------------------------

    def _constructors_and_casts(self) -> None:
        t = self.t
        for i in range(len(t)):
            text = t.text(i)
            if text == "static_cast" and t.text(i + 1) == "<":
                closing = t.closing_angle(i + 1)
                if closing is not None and t.text(closing - 1) not in ("*", "&", "&&"):
                    t[i].text = "metalsim_cast"
            elif text == "vec" and t.text(i + 1) == "<":
                closing = t.closing_angle(i + 1)
                if closing is not None and t.text(closing + 1) == "(" and t.text(i - 1) != "operator":
                    self._constructor(i, closing)
            elif text in self.type_names and t.is_word(i):
                if t.text(i + 1) == "(" and not self._declares(i):
                    self._constructor(i, i)
                elif t.text(i - 1) == "(" and t.text(i + 1) == ")" and self._casts(i):
                    t[i - 1].text, t[i + 1].text = "metalsim_cast_to<", ">{} ->* "

    def _literals(self) -> None:
        """Floating literals are float, or of the type their suffix names: there is no double."""
        for token in self.t.code:
            if token.kind != "number" or not _FLOATING.match(token.text):
                continue
            digits = re.match(r"(.*?)(f|F|h|H|bf|BF)?$", token.text)
            assert digits
            kind = {"h": "half", "bf": "bfloat"}.get((digits[2] or "").lower(), "")
            token.text = f"{kind}({digits[1]}f)" if kind else f"{digits[1]}f"

    def _constructor(self, first: int, last: int) -> None:
        t = self.t
        while t.text(first - 1) == "::":
            first -= 1
            if t.text(first - 1) == ">" and (opening := t.opening_angle(first - 1)) is not None:
                first = opening - 1
            elif t.is_word(first - 1) and t.text(first - 1) not in NOT_SCOPES:
                first -= 1
        if t.text(first - 1) == "typename":
            first -= 1
        t[first].before += "metalsim_make<"
        t[last].after += ">"

    def _declares(self, i: int) -> bool:
        """Whether `T (` begins a declarator such as `T (&x)[4]`, a conversion operator or a declared type."""
        t = self.t
        if t.text(i - 1) in ("operator", "using", "typename", "struct", "class", "~"):
            return True
        closing = t.closing(i + 1)
        return t.text(i + 2) in ("*", "&") and closing == i + 4 and t.text(closing + 1) in ("[", "(")

    def _casts(self, i: int) -> bool:
        """Whether `(T)` at i casts what follows."""
        t = self.t
        before, after = t.text(i - 2), i + 2
        if before in (")", "]", ">") or (t.is_word(i - 2) and before not in ("return", "case", "else")):
            return False
        return t.is_word(after) or t[after].kind == "number" or t.text(after) in ("(", "-", "!", "~", "*", "&")
