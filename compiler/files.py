"""Files that anybody may have written: regular ones only, and never more of them than the caller expects.

Written are whole files only.

data = read_bytes("graphs/mine.yaml", 1 << 20)      # or Unreadable("it is a pipe, not a regular file")
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmc.compiler.diagnostics import UserError, shorten

JSON_BYTES = 64 << 20  # indices and tokenizer settings of the largest models have a few MiB
JSON_DEPTH = 100
DIGITS = 400  # a float ends at 309; tokenizers say 1000000000000000019884624838656 for "no limit"

KINDS = {
    stat.S_IFDIR: "it is a directory",
    stat.S_IFIFO: "it is a pipe, not a regular file",
    stat.S_IFCHR: "it is a device, not a regular file",
    stat.S_IFBLK: "it is a device, not a regular file",
    stat.S_IFSOCK: "it is a socket, not a regular file",
}


class Unreadable(Exception):
    """`str(error)` says why, as the end of a sentence that names the file."""


class TooLarge(Unreadable):
    """The file has more bytes than the caller reads."""


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; FileNotFoundError or Unreadable otherwise.

    Nothing else is opened: a pipe would wait for its writer, a device may do something or never end."""
    try:
        _refuse_special(os.stat(path).st_mode)
        # Non-blocking, in case a pipe took its place meanwhile.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
            _refuse_special(os.fstat(stream.fileno()).st_mode)
            data = stream.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    except ValueError as error:  # a name with a NUL
        raise Unreadable(str(error)) from None
    if len(data) > limit:
        raise TooLarge(f"it is larger than {_size(limit)}")
    return data


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """The same, as UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start}") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file. FileNotFoundError or Unreadable."""
    return parse_json(read_text(path, JSON_BYTES))


def parse_json(text: str) -> Any:
    """The same of a text. Unreadable also for what Python would take and nobody means: a key that is said twice."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise Unreadable(f"it is nested more than {JSON_DEPTH} deep") from None
    except ValueError as error:
        raise Unreadable(f"it is not valid JSON: {error}") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [
            v
            for one in level
            if isinstance(one, (dict, list))
            for v in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise Unreadable(f"it is nested more than {JSON_DEPTH} deep")
    return value


def sha256_of(path: Path) -> str:
    """Of a file's content, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """The text of a .csv file. A cell is written as `str` has it, None as nothing."""
    import csv  # here: every command imports this file
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def check_target(target: Path, flag: str) -> None:
    """UserError where a file cannot be written there: before the work whose result it takes."""
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is not a file")
        if target.parent.exists() and not target.parent.is_dir():
            raise OSError(f"{target.parent} is not a directory")
        if not os.access(next(one for one in target.absolute().parents if one.exists()), os.W_OK):
            raise OSError("the directory may not be written")
    except OSError as error:
        raise _cannot_write(target, flag, error) from None


def write_whole(target: Path, text: str, flag: str) -> int:
    """Write the file, whole or not at all; returns its size in bytes. UserError, which names the flag, where it cannot
    be written."""
    check_target(target, flag)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}-") as scratch:
            new = Path(scratch) / "new"
            new.write_text(text, encoding="utf-8", newline="\n")
            os.replace(new, target)
    except OSError as error:
        raise _cannot_write(target, flag, error) from None
    return len(text.encode())


def _cannot_write(target: Path, flag: str, error: OSError) -> UserError:
    return UserError(f"cannot write {target}: {error.strerror or error}", hint=f"give {flag} a file that you may write")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Unreadable(f"the key {shorten(twice)!r} is said twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise Unreadable(f"it holds a number of {len(digits)} digits")
    return int(digits)


def kind(path: str | os.PathLike[str]) -> str:
    """Why a path that is there cannot be read as a file, "" where it can."""
    return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "")


def is_within(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a resolved path lies in one of these resolved folders, or below."""
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _refuse_special(mode: int) -> None:
    if why := KINDS.get(stat.S_IFMT(mode)):
        raise Unreadable(why)


def _size(limit: int) -> str:
    return f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit >> 10} KiB"
