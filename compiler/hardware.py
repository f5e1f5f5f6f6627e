"""Devices as data: one YAML a device in `graphs/hardware/`, read into a `Device`.

device("atlas-800i-a2").chip       # "Ascend910B", the column of the ATB table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml
from llmc.compiler.diagnostics import UserError, did_you_mean
from llmc.compiler.source import LOADER

DTYPES = ("float16", "bfloat16", "float32")  # of weights and activations
ATTENTION = ("paged", "flash")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the compiler and the runtime need to know of a device."""

    name: str
    chip: str  # Ascend910B | Ascend310P | host
    dtypes: tuple[str, ...]
    attention: tuple[str, ...]
    formats: Mapping[str, str]  # of weight (of a matmul), cache and mask: "nd" or "nz"
    merged_heads: bool  # prefill attention takes q, k, v as [T, H * D]; else [T, H, D]
    fusions: Mapping[str, tuple[str, ...]]  # phase -> fusions that are on by default
    backends: Mapping[str, str]  # of collectives, the default first -> that of the fused LinearParallel, "" if none
    causal_mask: Mapping[str, float]  # dtype -> value above the diagonal of the NORM_COMPRESS mask
    environment: Mapping[str, Mapping[str, str]]  # "common" and attention mode -> variables


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
    return Device(
        name=data["name"],
        chip=data["chip"],
        dtypes=tuple(data["dtypes"]),
        attention=tuple(data["attention"]),
        formats=data["formats"],
        merged_heads=data["merged_heads"],
        fusions={phase: tuple(names) for phase, names in data["fusions"].items()},
        backends=data["backends"],
        causal_mask=data["causal_mask"],
        environment=data["environment"],
    )
