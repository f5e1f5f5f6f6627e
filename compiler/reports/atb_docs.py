"""The ATB table as a page.

python -m llmc.compiler.reports.atb_docs > docs/atb-operations.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import ENUMS, GRAPH_LIMITS, AtbOp, Field

HEAD = """# ATB operations

Generated from `compiler/atb/` by `python -m llmc.compiler.reports.atb_docs`; lowering, verification, emission and
hostatb read the same table. Names are C++ / torch_atb. Rules and dtype rows depend on parameters and are functions
there; this page lists what does not. Sources are sections of the maintainers' reference of ATB 8.5.0, from which the
table was made and which is not in this repository, and files of ATB's own sources.
"""


def page() -> str:
    """The whole page."""
    limits = ", ".join(f"{n} {kind}" for kind, n in GRAPH_LIMITS.items())
    lines = [HEAD, f"A graph holds at most {limits} (nodes: at Setup).", ""]
    for name in sorted(OPS):
        lines.extend(_operation(OPS[name]))
    return "\n".join(lines).rstrip() + "\n"


def _operation(op: AtbOp) -> Iterator[str]:
    yield f"## {op.name}"
    yield ""
    bound = f"`torch_atb.{op.param_class}`" if op.bound else "not in torch_atb (C++ only)"
    yield f"{bound}. Chips: {', '.join(op.chips)}. Source: {op.source}"
    yield ""
    rows = list(_fields(op, op.fields, ""))
    if rows:
        yield "| field | torch_atb | type | default |"
        yield "|---|---|---|---|"
        yield from rows
    else:
        yield "No parameters."
    for enum, members in sorted(op.enums.items()):
        yield ""
        yield f"{enum}: {', '.join(f'{member} {value}' for member, value in members.items())}"
    yield ""


def _fields(op: AtbOp, fields: Sequence[Field], prefix: str) -> Iterator[str]:
    for f in fields:
        if f.kind == "struct":
            yield from _fields(op, f.fields, f"{prefix}{f.name}.")
            continue
        python = f.python_name if f.bound else "not bound"
        members = op.enums.get(f.kind) or ENUMS.get("AclDataType" if f.kind == "dtype" else f.kind) or {}
        default = next((name for name, value in members.items() if value == f.default), repr(f.default))
        yield f"| {prefix}{f.name} | {python} | {f.kind} | {default} |"


if __name__ == "__main__":
    print(page(), end="")
