"""Devices as data: one YAML a device in `graphs/hardware/`, read into a `Device`.

device("atlas-800i-a2").chip       # "Ascend910B", the column of the ATB table
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from llmc.compiler.diagnostics import UserError, did_you_mean
from llmc.compiler.language.source import LOADER
from llmc.compiler.target.table import Row, legal_rows, legal_values, read_row

DTYPES = ("float16", "bfloat16", "float32")  # of weights and activations
ATTENTION = ("paged", "flash")
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-z]+)")


def parse_size(text: str) -> int:
    """Bytes: "32GiB" is 32 * 2**30, "29GB" 29 * 10**9, "30000MiB"; UserError for anything else, a bare number too."""
    match = SIZE.fullmatch(text.strip().lower())
    if not match or match[2] not in UNITS:
        raise UserError(f"{text!r} is not a size", hint="a number and a unit: 32GiB, 29GB, 30000MiB", code="E401")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True, kw_only=True)
class Board:
    """What one rank has of a product: bytes of memory, and at best FLOP/s of 16-bit products and bytes/s of memory."""

    memory: int
    flops: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """Bytes/s that a rank can send: to each other rank at the same time (`each_peer`), or to all of them together."""

    bandwidth: float
    each_peer: bool


@dataclass(frozen=True, kw_only=True)
class Held:
    """A line of the reserve: memory of a rank that a library holds for itself."""

    name: str
    size: int  # bytes; with a variable, of one of its units
    source: str
    backend: str = ""  # held only by one of several ranks whose collectives have this backend
    variable: str = ""  # the environment variable that says how many units; `default` where it is not set
    default: int = 1
    workspace: bool = False  # a part of torch_atb's workspace


@dataclass(frozen=True, kw_only=True)
class Variable:
    """An environment variable of the seed document."""

    name: str
    value: str
    does: str
    read: bool | None  # whether anything reads it today; None: no reader is known
    today: str
    choose: bool = False  # an example that users replace


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the compiler and the runtime need to know of a device."""

    name: str
    chip: str  # Ascend910B | Ascend310P | host
    legal: tuple[Row, ...]  # what may be chosen; the next six are read from it
    dtypes: tuple[str, ...]
    attention: tuple[str, ...]
    formats: Mapping[str, str]  # of weight (of a matmul), cache and mask: "nd" or "nz"
    merged_heads: bool  # prefill attention takes q, k, v as [T, H * D]; else [T, H, D]
    fusions: Mapping[str, tuple[str, ...]]  # phase -> fusions that are on by default
    backends: Mapping[str, str]  # of collectives, the default first -> that of the fused LinearParallel, "" if none
    causal_mask: Mapping[str, float]  # dtype -> value above the diagonal of the NORM_COMPRESS mask
    boards: tuple[Board, ...]  # the default first; none where nothing is known
    reserve: int  # bytes of a board's memory that are not for weights, cache and activations
    held: tuple[Held, ...]  # lines of it; the rest has no name
    ceiling: int | None  # bytes that a rank uses at most where nobody says how much memory there is
    ranks_per_card: int
    link: Link | None
    variables: Mapping[str, tuple[Variable, ...]]  # "common" and attention mode -> what the seed document exports

    @property
    def environment(self) -> Mapping[str, Mapping[str, str]]:
        """ "common" and attention mode -> values to apply by name; what users choose for themselves is not there."""
        return {
            mode: {v.name: v.value for v in variables if not v.choose} for mode, variables in self.variables.items()
        }


def held_bytes(target: Device, attention: str, backend: str, environment: Mapping[str, str]) -> dict[str, int]:
    """Lines of a rank's reserve, name -> bytes. `backend`: of its collectives, "" for a rank alone; `environment`: the
    user's, which wins over what the device's profile sets."""
    profile = {
        name: value for mode in ("common", attention) for name, value in target.environment.get(mode, {}).items()
    }
    found = {}
    for line in target.held:
        if line.backend not in ("", backend):
            continue
        text = environment.get(line.variable) or profile.get(line.variable) or str(line.default)
        if not text.strip().isdecimal() or not 0 < int(text) < 2**20:
            raise UserError(f"{line.variable}={text}: expected a whole number, at least 1")
        found[line.name] = line.size * int(text)
    return found


def device_names() -> list[str]:
    """Devices that this version compiles for."""
    folder = files("llmc.graphs") / "hardware"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


@cache
def device(name: str) -> Device:
    """The device of that name; UserError with the known ones otherwise."""
    if name not in device_names():
        raise UserError(f"unknown device {name!r}", hint=did_you_mean(name, device_names()), code="E401")
    data = yaml.load((files("llmc.graphs") / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"), LOADER)
    rows = tuple(map(read_row, data["legal"]))
    (mask,) = legal_rows(rows, "mask")
    formats = {tensor: legal_values(rows, f"{tensor}_format")[0] for tensor in ("weight", "cache")}
    return Device(
        name=data["name"],
        chip=data["chip"],
        legal=rows,
        dtypes=tuple(legal_values(rows, "dtype")),
        attention=tuple(legal_values(rows, "attention")),
        formats={**formats, "mask": mask.facts["format"]},
        merged_heads="merged" in legal_values(rows, "heads"),
        fusions={phase: tuple(names) for phase, names in data["fusions"].items()},
        backends={row.values[0]: row.facts.get("fused", "") for row in legal_rows(rows, "backend")},
        causal_mask=mask.facts["values"],
        boards=tuple(Board(**{**board, "memory": parse_size(board["memory"])}) for board in data["boards"]),
        reserve=parse_size(data["reserve"]["total"]),
        held=tuple(Held(**{**line, "size": parse_size(line["size"])}) for line in data["reserve"]["lines"]),
        ceiling=parse_size(data["ceiling"]) if data["ceiling"] else None,
        ranks_per_card=data["ranks_per_card"],
        link=Link(**data["link"]) if data["link"] else None,
        variables={mode: tuple(map(_variable, entries.items())) for mode, entries in data["environment"].items()},
    )


def _variable(entry: tuple[str, Mapping[str, Any]]) -> Variable:
    name, said = entry
    return Variable(name=name, **{**said, "read": None if said["read"] == "unknown" else said["read"]})
