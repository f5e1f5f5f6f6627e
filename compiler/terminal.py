"""Text for a terminal: how wide it is, lines that fit, and nothing in them that it would obey.

print(fold(text, columns(sys.stdout)))
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

from llmc.compiler.diagnostics import visible

NARROWEST = 40
COLUMN = re.compile(r" *\S.*? {2,}(?=\S)")  # up to where the text of the next column begins
SOURCE = re.compile(r" *\d* \| ")  # a quoted line of a file, or the caret below it
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHAPE = re.compile(r"\[[^\[\]]{1,40}\]( (R|P|S\(\d\))(?=\W|$))?")  # with the letter behind it


def columns(stream: TextIO | None) -> int | None:
    """COLUMNS, else the terminal's own width; None for files and pipes, whose lines are whole."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return max(NARROWEST, int(said))
    try:
        return max(NARROWEST, os.get_terminal_size(stream.fileno()).columns) if stream and stream.isatty() else None
    except (OSError, ValueError):  # no terminal after all; 0 columns where nobody told it
        return None


def fold(text: str, width: int | None) -> str:
    """Everything that is printed goes through here. Control characters, of file names, of names in files, are escaped.
    Lines that are longer go on in the next, under their last column where that leaves room. Words, and
    shapes as [T, 4096], stay in one piece; so do quoted lines of a file."""
    text = visible(text)
    if width is None:
        return text
    return "\n".join(_folded(line, width) for line in text.split("\n"))


def generated(text: str, stream: TextIO | None) -> str:
    """A prompt or an answer. Files and pipes get it as it is, because their readers want the model's own characters; a
    terminal gets no control characters but tab and line feed, or a model could move its cursor and set its title.
    Marks of direction stay: they are part of Arabic and Hebrew text."""
    if stream is None or not stream.isatty():
        return text
    return CONTROL.sub(lambda found: visible(found[0]), text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> Iterator[str]:
    """Columns to the right, the first `left` ones to the left, under heads of one line or more; narrow enough for a
    terminal of 80 where that is possible."""
    height = max(head.count("\n") + 1 for head in heads)
    above = [[""] * (height - 1 - head.count("\n")) + head.split("\n") for head in heads]
    lines = [*zip(*above, strict=True), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    gap = "  " if sum(widths) + 2 * len(widths[1:]) <= 80 else " "
    for line in lines:
        cells = zip(line, widths, strict=True)
        yield gap.join(f"{cell:{'<' if i < left else '>'}{width}}" for i, (cell, width) in enumerate(cells)).rstrip()


def _folded(line: str, width: int) -> str:
    if len(line) <= width or SOURCE.match(line):
        return line
    column = COLUMN.match(line)
    hang = column.end() if column and column.end() <= width * 3 // 5 else len(line) - len(line.lstrip()) + 4
    whole = SHAPE.sub(lambda shape: shape[0].replace(" ", "\0"), line)
    folded = textwrap.wrap(whole, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)
    return "\n".join(folded).replace("\0", " ")
