"""The table `legal:` of a device's YAML, as rows. `legality.py` says how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmc.compiler.atb.collective import DEVICE_COUNT

# Axis -> what it is. Those with a flag are chosen by users, the others by the compiler.
AXES: Mapping[str, str] = {
    "dtype": "dtype of the model (--dtype)",
    "policy": "dtype of single nodes (`policy:`)",
    "attention": "attention and its cache (--attention)",
    "world_size": "ranks (--tp)",
    "backend": "backend of collectives (--backend)",
    "fusion": "fusion (--fuse)",
    "weight_format": "memory format of matmul weights",
    "cache_format": "memory format of KV caches",
    "cache_dtype": "dtype of KV caches",
    "bias_dtype": "dtype of a matmul's bias",
    "mask": "causal mask of prefill",
    "heads": "q, k, v of paged prefill",
}
FACTS = ("fused", "format", "values")  # what the compiler reads from a legal row besides
WORDS = ("note", "refused", "instead")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: `axis` may, or may not, be one of `values`, where the choices in `when` hold."""

    axis: str
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""  # of a legal row
    refused: str = ""
    instead: str = ""
    source: str

    def holds(self, choice: Mapping[str, Any]) -> bool:
        return all(choice.get(axis) in values for axis, values in self.when.items())


def read_row(entry: Mapping[str, Any]) -> Row:
    """A row as YAML has it; the first key is the axis. KeyError for a key that no row has: the files are ours."""
    axis, *_ = entry
    lists = {key: tuple(v) if isinstance(v, list) else (v,) for key, v in entry.items() if key in AXES}
    words = {key: entry[key] for key in WORDS if key in entry}
    facts = {key: entry[key] for key in FACTS if key in entry}
    if unknown := set(entry) - {*AXES, *FACTS, *WORDS, "source"}:
        raise KeyError(f"legal: {', '.join(sorted(unknown))} in {dict(entry)}")
    when = {key: values for key, values in lists.items() if key != axis}
    return Row(axis=axis, values=lists[axis], when=when, facts=facts, **words, source=entry["source"])


# On every device.
COMMON = (
    Row(
        axis="world_size",
        values=tuple(range(1, DEVICE_COUNT + 1)),
        note=f"a host has {DEVICE_COUNT} devices",
        source="4",
    ),
)


def legal_rows(rows: Sequence[Row], axis: str) -> list[Row]:
    """The rows of an axis that allow something."""
    return [row for row in rows if row.axis == axis and not row.refused]


def legal_values(rows: Sequence[Row], axis: str) -> list[Any]:
    """What is allowed under some choice of the other axes, in the table's order."""
    return [value for row in legal_rows(rows, axis) for value in row.values]
