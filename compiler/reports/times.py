"""Measured times for the picture: of a file that `llmc bench --profile --json` has printed.

times = read_times(Path("times.json"), compiled)
times["phases"]["decode"]["layers.0.attn.qkv"]      # [92.1, 0.011, []]: us, share of the step's operations, joined with
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, read_json

HINT = "llmc bench --model-path DIR --profile --json > FILE"


def read_times(path: Path, compiled: Compiled) -> dict[str, Any]:
    """The first profile of the file: `note`, what was measured, and `phases`: operation -> [median us, share, other
    operations that it has one time with]. UserError where the file is something else, or of another graph."""
    try:
        said = read_json(path)
    except FileNotFoundError:
        raise UserError(f"--times {path}: no such file", hint=HINT) from None
    except (Unreadable, ValueError, OSError) as error:
        raise UserError(f"--times {path}: {error}", hint=HINT) from None
    profiles = said.get("profiles") if isinstance(said, dict) else None
    if not isinstance(profiles, list) or not profiles:
        raise UserError(f"--times {path} holds no profile", hint=HINT)
    here = {
        "model": compiled.model.name,
        "device": compiled.options.device,
        "dtype": compiled.dtype,
        "attention": compiled.options.attention,
        "world_size": compiled.options.world_size,
    }
    if other := [f"{key} {said.get(key)}, not {value}" for key, value in here.items() if said.get(key) != value]:
        raise UserError(
            f"--times {path} was measured for another graph: {'; '.join(other)}",
            hint="show it as it was measured (--device, --dtype, --attention, --tp)",
        )
    try:
        phases = {one["phase"]: _times(one) for one in _fitting(profiles[0], compiled)}
        return {"note": _note(profiles[0]), "phases": phases}
    except _Unknown as error:
        raise UserError(f"--times {path}: {error}", hint="measure it again") from None
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise UserError(f"--times {path}: its profile is damaged, or of another llmc", hint=HINT) from None


class _Unknown(Exception):
    """An operation that the graph does not have."""


def _fitting(profile: Mapping[str, Any], compiled: Compiled) -> list[Mapping[str, Any]]:
    for one in profile["phases"]:
        known = {node.name for node in compiled.lowered[one["phase"]].nodes}
        for entry in one["operations"]:
            for name in entry["operations"]:
                if name not in known:
                    raise _Unknown(f"the {one['phase']} graph has no operation {name!r}")
    return list(profile["phases"])


def _note(profile: Mapping[str, Any]) -> str:
    """`batch 1, [64,16], 2 threads: a step takes 35.60 ms in prefill, 22.60 ms in decode`"""
    threads = f", {profile['threads']} threads" if profile.get("threads") else ""
    steps = ", ".join(f"{one['step_ms']:.2f} ms in {one['phase']}" for one in profile["phases"])
    return f"batch {profile['batch']}, [{profile['prompt']},{profile['answer']}]{threads}: a step takes {steps}"


def _times(phase: Mapping[str, Any]) -> dict[str, list[Any]]:
    total = sum(entry["us"]["median"] for entry in phase["operations"])
    return {
        name: [round(entry["us"]["median"], 3), round(entry["us"]["median"] / total, 6),
               [other for other in entry["operations"] if other != name]]
        for entry in phase["operations"]
        for name in entry["operations"]
    }  # fmt: skip
