"""Files of a checkpoint: what is told where one is not what its name says.

A name may stand for a pipe (opening it waits for ever), a device (reading it never ends), a broken link (an incomplete
download, silently as good as absent), a Git LFS pointer or a login page. Each is told in its own words.

    if present(folder / "generation_config.json"):
        settings = read_object(folder / "generation_config.json")
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

from llmc.compiler import files
from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import kind

MAX_TEXT_BYTES = 1 << 26  # of a configuration or an index; the largest that are published have a sixth of it
# How files begin that lie under the name of another kind: what it is, what to do
LFS = b"version https://git-lfs"
BEGINNINGS = (
    (LFS, "a Git LFS pointer: the content was not downloaded", "git lfs install && git lfs pull, in its repository"),
    (b"GGUF", "a GGUF file", "llmc convert FILE.gguf --output DIR"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file (Keras)", "get the checkpoint as safetensors"),
)


def present(path: Path | str, *, code: str = "") -> bool:
    """Whether there is such a file. UserError for what has the name and is no file, and for a link to nothing."""
    try:
        why = kind(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which is not there",
                hint="the download is incomplete, or only the links were copied",
                code=code,
            ) from None
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror or "" if isinstance(error, OSError) else str(error)
    if why:
        raise UserError(f"{path} cannot be read: {why}", code=code)
    return True


def read_text(path: Path | str, *, code: str = "") -> str:
    """UTF-8 text of a file that must be there. UserError."""
    try:
        return files.read_text(path, MAX_TEXT_BYTES)
    except FileNotFoundError:
        present(path, code=code)
        raise UserError(f"{path} cannot be read: No such file or directory", code=code) from None
    except files.Unreadable as error:
        raise UserError(f"{path} cannot be read: {error}", code=code) from None


def read_json(path: Path | str, *, code: str = "") -> Any:
    """What a JSON file holds; it must be there. UserError."""
    text = read_text(path, code=code)
    try:
        return files.parse_json(text)
    except files.Unreadable as error:
        if other := nature(path):
            raise UserError(f"{path} is {other[0]}", hint=other[1], code=code) from None
        raise UserError(f"{path} cannot be read: {error}", code=code) from None


def read_object(path: Path | str, *, code: str = "") -> dict[str, Any]:
    """A JSON object from a file that must be there. UserError."""
    value = read_json(path, code=code)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; found {type(value).__name__}", code=code)
    return value


def indexed_files(index: Path, suffix: str, *, code: str = "") -> list[Path]:
    """The files that an index of shards names, by name, whether or not they are there. UserError."""
    content = read_json(index, code=code)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        why = "it has no weight_map of tensor names to file names"
        raise UserError(f"{index} cannot be read: {why}", hint="download it again", code=code)
    if not weight_map:
        raise UserError(
            f"{index} cannot be read: its weight_map is empty", hint="download it again, or remove it", code=code
        )
    for name in weight_map.values():  # a file elsewhere is never what a download wrote
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or not name.endswith(suffix):
            why = "" if plain else "; it is not the name of a file"
            raise UserError(f"{index} names {name!r}, which is not a {suffix} file of this directory{why}", code=code)
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def nature(path: Path | str, *, binary: bool = False) -> tuple[str, str] | None:
    """What a regular file is that cannot be read as what its name says, and what to do; None if it does not show.
    `binary`: text is not expected there either; a server's answer often lies in the place of weights."""
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        return "empty", "download it again"
    for beginning, what, hint in BEGINNINGS:
        if head.startswith(beginning):
            return what, hint
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip("\ufeff").strip()  # a last half is left
    except UnicodeDecodeError:
        return None
    if text.lower().startswith(("<!doctype", "<html", "<head", "<?xml", "<!--")):
        hint = "download it again; a gated model needs a login and an accepted licence"
        return "a web page (HTML), as a server sends instead of a file", hint
    if binary and text and all(c.isprintable() or c.isspace() for c in text):
        return f"text, which begins with {text[:60]!r}", "download it again"
    return None
