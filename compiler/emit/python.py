"""Python source text of calls and lists, laid out so that `ruff format` leaves it alone.

A statement stays on one line when it fits in WIDTH; otherwise every argument gets a line and a trailing comma, which
ruff keeps whatever line length the reader has configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 88  # ruff's default


@dataclass(frozen=True, kw_only=True)
class Call:
    """`name(args)`; with brackets "[" and "]" and no name it is a list."""

    name: str
    args: Sequence[Call | str]
    keyword: str = ""  # "keyword=" in front
    brackets: tuple[str, str] = ("(", ")")

    def flat(self) -> str:
        inside = ", ".join(a if isinstance(a, str) else a.flat() for a in self.args)
        return f"{self.keyword}{self.name}{self.brackets[0]}{inside}{self.brackets[1]}"


def listing(names: Sequence[str]) -> Call:
    return Call(name="", args=[quote(n) for n in names], brackets=("[", "]"))


def quote(text: str) -> str:
    return f'"{text}"'


def statement(call: Call, indent: int, comment: str = "", prefix: str = "", end: str = "") -> list[str]:
    """Lines of `prefix call end  # comment`."""
    tail = f"  # {comment}" if comment else ""
    return _lines(call, indent, prefix, end, tail)


def _lines(item: Call | str, indent: int, prefix: str, end: str, tail: str) -> list[str]:
    space = " " * indent
    text = item if isinstance(item, str) else item.flat()
    if isinstance(item, str) or len(space + prefix + text + end + tail) <= WIDTH:
        return [f"{space}{prefix}{text}{end}{tail}"]
    lines = [f"{space}{prefix}{item.keyword}{item.name}{item.brackets[0]}"]
    for arg in item.args:
        lines += _lines(arg, indent + 4, "", ",", "")
    return [*lines, f"{space}{item.brackets[1]}{end}{tail}"]
