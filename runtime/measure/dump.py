"""Recorded values: a directory that one machine writes and another compares with.

    recording = Recording()
    recording.add("prefill", entry, rows, value)
    recording.write(Path("dump"), manifest, tokens, lengths)
    side = read_dump(Path("dump"))                 # what a trace compares with (compare.Side)

    dump/manifest.json             what was run (model, device, dtype, ranks, the artifact's hash), prompts, and of each
                                   value what the artifact says of it and where it lies
    dump/values-00001.safetensors  `prefill/layers.0.attn.core`: [rows, width], rows in the order of the prompts

Values are whole: shares of ranks are joined before. Nothing in a dump is run.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, read_json, sha256_of
from llmc.runtime.measure.forced import Row
from llmc.runtime.measure.reference import Original, coarser

KIND, FORMAT = "llmc trace", 1
MANIFEST = "manifest.json"
FILE_BYTES = 1 << 30
SAID = ("model", "device", "chip", "dtype", "attention", "world_size", "backend", "source", "sha256")


class Recording:
    """Values as they come, step by step."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[Sequence[Row], Tensor]]] = {}
        self.entries: dict[tuple[str, str], Mapping[str, Any]] = {}

    def add(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row], value: Tensor) -> None:
        """Sums of float64 are kept in float32, which holds what 16 bit or float32 shares add up to."""
        key = phase, entry["name"]
        self.entries[key] = entry
        self.found.setdefault(key, []).append((rows, value.float() if value.dtype == torch.float64 else value))

    def write(
        self, folder: Path, manifest: Mapping[str, Any], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> int:
        """The directory, complete or not at all; the bytes of its values. UserError where something is in the way."""
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"--dump {folder} exists", hint="name a directory that is not there, or an empty one")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:100]}-") as scratch:
                new = Path(scratch) / "new"
                new.mkdir()
                size = self._write(new, manifest, tokens, lengths)
                os.replace(new, folder)
        except OSError as error:
            raise UserError(f"--dump {folder} cannot be written: {error.strerror or error}") from None
        return size

    def _write(self, new: Path, manifest: Mapping[str, Any], tokens: Any, lengths: Any) -> int:
        values, files, part = list[dict[str, Any]](), dict[str, str](), dict[str, Tensor]()
        size = total = 0

        def flush() -> None:
            nonlocal part, size
            name = f"values-{len(files) + 1:05d}.safetensors"
            save_file(part, new / name)
            files[name] = sha256_of(new / name)
            part, size = {}, 0

        for (phase, name), steps in self.found.items():
            rows = [row for some, _ in steps for row in some]
            order = sorted(range(len(rows)), key=rows.__getitem__)
            value = torch.cat([tensor for _, tensor in steps])[order].contiguous()
            part[f"{phase}/{name}"] = value
            size, total = size + value.nbytes, total + value.nbytes
            file = f"values-{len(files) + 1:05d}.safetensors"
            kept = {"phase": phase, "file": file, "rows": [list(rows[i]) for i in order]}
            values.append({**self.entries[phase, name], **kept})
            if size >= FILE_BYTES:
                flush()
        if part or not files:
            flush()
        said = {
            "kind": KIND,
            "format": FORMAT,
            "generator": f"llmc {version('llmc')}",
            "run": {key: manifest[key] for key in SAID},
            "prompts": [list(t) for t in tokens],
            "prefill_lengths": list(lengths),
            "values": values,
            "files": files,
        }
        (new / MANIFEST).write_text(json.dumps(said, indent=1), encoding="utf-8")
        return total


class Recorded:
    """A dump as the side that is compared with. `scale`: transformers' errors on the same prompts, which tell how far
    two honest runs are apart; None where it does not have the model."""

    def __init__(self, folder: Path, said: Mapping[str, Any]) -> None:
        self.folder, self.said = folder, said
        self.scale: Original | None = None
        self.prompts: list[list[int]] = said["prompts"]
        self.lengths: list[int] = said["prefill_lengths"]
        self.values = {(value["phase"], value["name"]): value for value in said["values"]}
        self.meaning: dict[tuple[str, str], list[str]] = {}
        for value in said["values"]:
            self.meaning.setdefault((value["phase"], _meaning(value)), []).append(value["name"])

    def counterpart(self, phase: str, entry: Mapping[str, Any]) -> str | None:
        """The value of that name, else the one that stands for the same: fusions rename."""
        same = self.meaning.get((phase, _meaning(entry)), []) if entry["stands_for"] else []
        for name in (entry["name"], *same):
            found = self.values.get((phase, name))
            if found and found["shape"][1:] == list(entry["shape"])[1:]:
                return name
        return None

    def truth(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
        name = self.counterpart(phase, entry)
        value = self.values[phase, str(name)]
        index = {tuple(row): i for i, row in enumerate(value["rows"])}
        missing = [row for row in rows if row not in index]
        if missing:
            raise UserError(f"{self.folder} has no row for token {missing[0][1]} of prompt {missing[0][0]} in {name!r}")
        try:
            with safe_open(self.folder / value["file"], framework="pt") as file:
                return file.get_tensor(f"{phase}/{name}")[[index[row] for row in rows]]
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, f"{value['file']}: {error}") from None

    def natural(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> Tensor | None:
        if self.scale is None or self.scale.counterpart(phase, entry) is None:
            return None
        error = self.scale.nearest(phase, entry, rows).double() - self.scale.truth(phase, entry, rows).double()
        return self.truth(phase, entry, rows).double() + math.sqrt(2) * error

    def nearest(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
        return self.truth(phase, entry, rows)

    def usual(self, phase: str, entry: Mapping[str, Any]) -> float:
        has = self.scale is not None and self.scale.counterpart(phase, entry) is not None
        return math.sqrt(2) * self.scale.usual(phase, entry) if has and self.scale else 0.0

    def dtype(self, entry: Mapping[str, Any]) -> str:
        return coarser(entry["dtype"], self.said["run"]["dtype"])


def is_dump(path: Path) -> bool:
    """Whether the directory says that it is one."""
    try:
        said = read_json(path / MANIFEST)
    except (FileNotFoundError, Unreadable):
        return False
    return isinstance(said, dict) and said.get("kind") == KIND


def read_dump(path: Path) -> Recorded:
    """UserError for what is damaged, incomplete or of another format."""
    try:
        said = read_json(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise _damaged(path, f"it has no {MANIFEST}") from None
    except Unreadable as error:
        raise _damaged(path, f"{MANIFEST}: {error}") from None
    if not isinstance(said, dict) or (said.get("kind"), said.get("format")) != (KIND, FORMAT):
        raise _damaged(path, f"{MANIFEST} is not of a dump of format {FORMAT}")
    try:
        found = Recorded(path, said)
        for name, hashed in said["files"].items():
            if os.path.basename(name) != name or sha256_of(path / name) != hashed:
                raise _damaged(path, f"{name} was changed after it was written")
        if any(value["file"] not in said["files"] for value in said["values"]):
            raise _damaged(path, f"{MANIFEST} names files that it has no hash of")
    except OSError as error:
        raise _damaged(path, f"{error.filename}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{MANIFEST} is not what `llmc trace --dump` writes ({error})") from None
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"the dump {path} cannot be used: {why}", hint="llmc trace --dump DIR writes one")


def _meaning(value: Mapping[str, Any]) -> str:
    return json.dumps(value["stands_for"], sort_keys=True)
