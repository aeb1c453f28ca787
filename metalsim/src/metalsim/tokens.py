"""Preprocessed Metal source as tokens that can be rewritten in place, keeping lines and columns of the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PATTERN = re.compile(
    r"""
    (?P<directive>^[ \t]*\#[^\n]*)
  | (?P<space>\s+)
  | (?P<string>"(?:\\.|[^"\\\n])*")
  | (?P<char>'(?:\\.|[^'\\\n])*')
  | (?P<number>\.?[0-9](?:[eEpP][+-]|[0-9a-zA-Z_.'])*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<mark>::|->\*?|\+\+|--|<<=|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\.\.\.|.)
    """,
    re.VERBOSE | re.MULTILINE,
)
_CLOSER = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Token:
    """One token. `before` and `after` are text to write around it."""

    kind: str
    text: str
    line: int
    before: str = ""
    after: str = ""


class Tokens:
    """The code tokens of a source (no spaces, no directives); `render` gives the rewritten text back.

    `>` is always a token of its own, so that nested template arguments can be matched.
    """

    def __init__(self, source: str) -> None:
        self._all: list[Token] = []
        line = 0
        for match in _PATTERN.finditer(source):
            kind, text = str(match.lastgroup), match.group()
            if kind == "directive" and (marker := re.match(r"\s*#\s*(?:line\s+)?(\d+)", text)):
                line = int(marker.group(1)) - 1
            self._all.append(Token(kind, text, line))
            line += text.count("\n")
        self.code = [t for t in self._all if t.kind not in ("space", "directive")]

    def __len__(self) -> int:
        return len(self.code)

    def __getitem__(self, i: int) -> Token:
        return self.code[i]

    def text(self, i: int) -> str:
        """The original text of token i, or '' outside."""
        return self.code[i].text if 0 <= i < len(self.code) else ""

    def is_word(self, i: int) -> bool:
        return 0 <= i < len(self.code) and self.code[i].kind == "word"

    def join(self, first: int, last: int) -> str:
        """Tokens [first, last) as text."""
        return " ".join(t.text for t in self.code[first:last])

    def closing(self, i: int) -> int:
        """The index of the bracket that closes the one at i."""
        depth = 0
        for j in range(i, len(self.code)):
            if self.text(j) in _CLOSER:
                depth += 1
            elif self.text(j) in _CLOSER.values():
                depth -= 1
                if depth == 0:
                    return j
        return len(self.code) - 1

    def closing_angle(self, i: int) -> int | None:
        """The index of the `>` that closes the template arguments opened at i; None when `<` only compares."""
        depth, j = 0, i
        while j < len(self.code):
            match self.text(j):
                case "<":
                    depth += 1
                case ">":
                    depth -= 1
                    if depth == 0:
                        return j
                case "(" | "[":
                    j = self.closing(j)
                case ";" | "{" | "}" | ")" | "]" | "&&" | "||":
                    return None
            j += 1
        return None

    def opening_angle(self, i: int) -> int | None:
        """The index of the `<` whose template arguments end at i."""
        depth = 0
        for j in range(i, -1, -1):
            if self.text(j) == ">":
                depth += 1
            elif self.text(j) == "<":
                depth -= 1
                if depth == 0:
                    return j
            elif self.text(j) in (";", "{", "}"):
                return None
        return None

    def split(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Ranges of [first, last) between commas outside any bracket."""
        start, j = first, first
        while j < last:
            text = self.text(j)
            if text in _CLOSER:
                j = self.closing(j)
            elif text == "<" and (end := self.closing_angle(j)) is not None and end < last:
                j = end
            elif text == ",":
                yield start, j
                start = j + 1
            j += 1
        if start < last:
            yield start, last

    def erase(self, first: int, last: int) -> None:
        """Blank the tokens [first, last) out."""
        for token in self.code[first:last]:
            token.text = " " * len(token.text)

    def render(self) -> str:
        return "".join(t.before + t.text + t.after for t in self._all)
