"""What a source of `llmc convert` becomes, before anything is written: tensors, files, config. And its JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROGRESS_FILE = ".llmc-convert.json"

# torch dtype -> its name and bytes per value in a safetensors header (source: README of safetensors, "Format")
SAFETENSORS_DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor to write. `chunks()` yields its values in order, already in `dtype`, as pieces of any shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * SAFETENSORS_DTYPES[self.dtype][1]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a source becomes: safetensors files, small files, and `config`, which is written last as `config.json`."""

    source: Path
    inputs: tuple[Path, ...]
    default_target: Path
    files: Mapping[str, tuple[Tensor, ...]]
    side_files: Callable[[Path], None]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def write_json(path: Path, value: Any) -> None:
    """Atomic: the file is there complete, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # never through a link that came with a checkpoint
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
