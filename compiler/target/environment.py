"""What `llmc env` prints: the variables of the seed document for a device and its attention, with a word on each.

    eval "$(llmc env --device atlas-800i-a2 --attention paged)"

`llmc run` on an NPU applies the same values unless the user has set others (runtime/npu.py).
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from llmc.compiler.target import legality
from llmc.compiler.target.device import Variable, device

TODAY = {True: "read", False: "ignored", None: "unknown"}


def variables(name: str, attention: str) -> list[Variable]:
    """Those of the device in every mode, then those of the mode. UserError for a device or attention that is not."""
    target = device(name)
    legality.check(target, {"attention": attention})
    return [*target.variables.get("common", ()), *target.variables.get(attention, ())]


def facts(name: str, attention: str) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "device": name,
        "attention": attention,
        "variables": [
            {
                "name": v.name,
                "value": v.value,
                "does": v.does,
                "today": TODAY[v.read],
                "note": v.today,
                "choose": v.choose,
            }
            for v in variables(name, attention)
        ],
    }


def exports(name: str, attention: str, columns: int | None = None) -> str:
    """Lines for a shell, values in one column; what users choose for themselves is a comment. Where a line has no room
    for its words (`columns`), they stand above it, as comments that a shell reads over."""
    found = variables(name, attention)
    if not found:
        return f"# {name} needs no variables"
    words = [_export(v) for v in found]
    width = max(map(len, words))
    lines = [f"{word:<{width}}  # {v.does}; {_today(v)}" for word, v in zip(words, found, strict=True)]
    heading = f"# {name}, {attention} attention: what llmc run sets on the NPU unless you have set it"
    if columns and max(map(len, lines)) > columns:
        lines = [f"\n# {v.does}; {_today(v)}\n{word}" for word, v in zip(words, found, strict=True)]
    return "\n".join(
        "\n".join(textwrap.wrap(line, columns, subsequent_indent="# ")) if columns and line.startswith("# ") else line
        for line in "\n".join([heading, *lines, *_closing(found)]).split("\n")
    )


def _export(v: Variable) -> str:
    return f"{'# ' if v.choose else ''}export {v.name}={shlex.quote(v.value)}"


def _today(v: Variable) -> str:
    """`read today: by CANN`, `newer libraries ignore it: always on`, `no reader is known`"""
    if v.read is None:
        return v.today
    return f"{'read today' if v.read else 'newer libraries ignore it'}: {v.today}"


def _closing(found: Sequence[Variable]) -> list[str]:
    ignored = [v.name for v in found if v.read is False]
    return [f"# {len(ignored)} of {len(found)} are ignored by newer libraries and do no harm"] if ignored else []
