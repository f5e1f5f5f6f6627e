"""What a user is told when something is wrong: places, diagnostics, the table of codes, and how they print.

A stage collects `Diagnostic`s in a `Report` and raises `DiagnosticError` once, with all of them.

    graphs/tiny.yaml:6:20: E301 'out' (add) reads 'down' as R, but it holds partial sums (P)
       6 |   out: {op: add, a: x, b: down}
         |                           ^^^^
      likely: insert an all_reduce after 'down'
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """A position in a source file; line and column count from 1. `end_column` is exclusive, 0 if unknown."""

    file: str
    line: int
    column: int
    end_column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


def portable(place: str) -> str:
    """A file or place as generated code may say it: as typed, but never an absolute path of this machine, and without
    the characters that would end a comment or a docstring."""
    name = os.path.basename(place) if os.path.isabs(place) else place
    return "".join(c if c.isprintable() and c not in "\"'\\" else "_" for c in name)


# Characters that a terminal obeys or that hide what is written: controls (C0 but tab and line feed, DEL, C1), invisible
# ones, separators of lines, marks and overrides of direction, halves of surrogate pairs, tags.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
LINE_LIMIT = 1000  # characters of a line of a message
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FIELD_LIMIT = 400  # of a field of a diagnostic


def visible(text: str) -> str:
    """The text as it may be printed, whoever wrote it: what would be obeyed or hidden is escaped, as \\x1b."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The same without line feeds and tabs: a name cannot make a message that it is part of look like two."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def shorten(text: str, limit: int = 60) -> str:
    """A value of somebody's input as a message may quote it: long ones lose their middle."""
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[3 - limit // 3 :]}"


CODES: Mapping[str, str] = {
    # 0xx: reading
    "E001": "file cannot be read",
    "E002": "not valid YAML",
    "E003": "duplicate key",
    "E004": "the document is too large or expands too far",
    "E005": "extends: unknown, circular or outside the model's folder",
    # 1xx: the language
    "E101": "unknown key",
    "E102": "missing key",
    "E103": "wrong type of value",
    "E104": "bad expression",
    "E105": "unknown size",
    "E106": "value out of range",
    "E107": "unknown operator",
    "E108": "override or removal of something that does not exist",
    "E109": "bad name",
    "E110": "size that nothing uses",
    "E111": "{i} outside a repeat, or missing inside one",
    # 2xx: the graph
    "E201": "edge to a node that does not exist",
    "E202": "cycle",
    "E203": "node that nothing uses",
    "E204": "two nodes or weights with one name",
    "E205": "repeat block without a carried value",
    # 3xx: types
    "E301": "shapes do not agree",
    "E302": "dtypes do not agree",
    "E303": "values lie over the ranks in a way that has no rule",
    # 4xx: devices
    "E401": "device, dtype, attention or world size not offered",
    "E402": "operation refused by ATB's rules",
    "E403": "graph exceeds a limit of ATB",
    # 5xx: artifacts and checkpoints
    "E501": "artifact is damaged, incomplete or of another format version",
    "E502": "checkpoint does not match the variant",
    "E503": "weights missing, extra or mis-shaped",
    # 6xx: the command line
    "E601": "wrong usage of a command",
    # 9xx
    "E900": "internal check failed; please report",
}


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One problem: code (see CODES), message, place if known, what was found, what was needed, a likely way out."""

    code: str
    message: str
    place: Place | None = None
    found: str = ""
    needed: str = ""
    likely: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"diagnostic code {self.code} is not in CODES")
        for field in ("message", "found", "needed", "likely"):  # each is one line, and quotes what may have any length
            object.__setattr__(self, field, shorten(getattr(self, field), FIELD_LIMIT))


class UserError(Exception):
    """Something the user can mend. `str(error)` is complete: what, where, expected, what to do."""

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        text = f"{message}\n  likely: {hint}" if hint else message
        super().__init__("\n".join(shorten(visible(line), LINE_LIMIT) for line in text.split("\n")))
        self.message, self.hint, self.code = message, hint, code

    def problems(self) -> list[dict[str, Any]]:
        """The machine form, one object a problem; every error has these keys."""
        return [_problem(self.code, self.message, likely=self.hint)]


class DiagnosticError(UserError):
    """All problems of one stage."""

    def __init__(self, diagnostics: Iterable[Diagnostic], sources: Mapping[str, str] | None = None) -> None:
        self.diagnostics = sort(diagnostics)
        self.sources = dict(sources or {})
        Exception.__init__(self, render(self.diagnostics, self.sources))
        self.message, self.hint, self.code = str(self), "", self.diagnostics[0].code

    def problems(self) -> list[dict[str, Any]]:
        return to_json(self.diagnostics)


MAX_REPORTED = 100  # nobody reads more, and a file can hold a hundred thousand mistakes


class Report:
    """Collects the problems of one stage. `sources` maps a file name as in `Place.file` to its text, for carets."""

    def __init__(self, sources: Mapping[str, str] | None = None) -> None:
        self.diagnostics: list[Diagnostic] = []
        self.sources = sources or {}

    def add(self, code: str, message: str, place: Place | None = None, **more: str) -> None:
        self.diagnostics.append(Diagnostic(code=code, message=message, place=place, **more))
        if len(self.diagnostics) >= MAX_REPORTED:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        if self.diagnostics:
            raise DiagnosticError(self.diagnostics, self.sources)


def sort(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """By place, then code; those without a place last; duplicates once."""
    unique = dict.fromkeys(diagnostics)
    return sorted(unique, key=lambda d: (d.place is None, d.place or Place(file="", line=0, column=0), d.code))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?" for a near miss, else the known words; empty when there are none."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(word[:100], names[:2000], n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names and len(names) <= 40 else ""


def render(diagnostics: Iterable[Diagnostic], sources: Mapping[str, str]) -> str:
    """The text form: place, code and message; the line with a caret; found / needed / likely."""
    lines = {file: text.splitlines() for file, text in sources.items()}
    return "\n".join("\n".join(_lines(d, lines)) for d in diagnostics)


def _lines(d: Diagnostic, sources: Mapping[str, list[str]]) -> Iterable[str]:
    where = f"{d.place}: " if d.place else ""
    yield one_line(f"{where}{d.code} {d.message}")
    text = sources.get(d.place.file, []) if d.place else []
    if d.place and 0 < d.place.line <= len(text):
        line, number = text[d.place.line - 1].rstrip(), f"{d.place.line:>6}"
        start = d.place.column - 1
        width = max(1, min(d.place.end_column - d.place.column, len(line) - start))
        # A very long line (a minified file) is cut around the caret so that it stays readable.
        cut = max(0, start - 60)
        yield f"{number} | {HIDDEN.sub(REPLACEMENT, line[cut : cut + 120])}"  # one for one: the caret stays below
        yield f"{'':>6} | {' ' * (start - cut)}{'^' * min(width, 60)}"
    for label in ("found", "needed", "likely"):
        if value := getattr(d, label):
            yield one_line(f"  {label}: {value}")


def to_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    """The machine form: one object a problem."""
    return [_problem(d.code, d.message, d.place, d.found, d.needed, d.likely) for d in diagnostics]


def _problem(
    code: str, message: str, place: Place | None = None, found: str = "", needed: str = "", likely: str = ""
) -> dict[str, Any]:
    return {
        "code": code or None,
        "title": CODES.get(code),
        "message": message,
        "file": place.file if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
        "end_column": place.end_column or None if place else None,
        "found": found or None,
        "needed": needed or None,
        "likely": likely or None,
    }
