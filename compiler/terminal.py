"""Text for a terminal: how wide it is, and lines that fit.

print(fold(text, columns(sys.stdout)))
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

NARROWEST = 40
COLUMN = re.compile(r" *\S.*? {2,}(?=\S)")  # up to where the text of the next column begins
SOURCE = re.compile(r" *\d* \| ")  # a quoted line of a file, or the caret below it
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
    """Lines that are longer go on in the next, under their last column where that leaves room. Words, and
    shapes as [T, 4096], stay in one piece; so do quoted lines of a file."""
    if width is None:
        return text
    return "\n".join(_folded(line, width) for line in text.split("\n"))


def _folded(line: str, width: int) -> str:
    if len(line) <= width or SOURCE.match(line):
        return line
    column = COLUMN.match(line)
    hang = column.end() if column and column.end() <= width * 3 // 5 else len(line) - len(line.lstrip()) + 4
    whole = SHAPE.sub(lambda shape: shape[0].replace(" ", "\0"), line)
    folded = textwrap.wrap(whole, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)
    return "\n".join(folded).replace("\0", " ")
