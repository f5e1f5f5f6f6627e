"""The tables of legality as a page.

python -m llmc.compiler.reports.legality_docs > docs/legality.md
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import ENUMS, GRAPH_LIMITS, MAX_NODES_AT_CREATE, MAX_TENSOR_BYTES, Desc
from llmc.compiler.atb.elementwise import CAST, CASTS
from llmc.compiler.ir import AtbGraph, AtbNode, evaluate
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.target.device import ATTENTION, DTYPES, Device, device, device_names
from llmc.compiler.target.legality import refusal
from llmc.compiler.target.table import AXES, COMMON, Row, legal_values
from llmc.compiler.verify import SAMPLES

HEAD = """# What is legal where

Generated from `graphs/hardware/` and `compiler/atb/` by `python -m llmc.compiler.reports.legality_docs`.
`compiler/target/legality.py` reads the same tables when it refuses a choice, and names the row. `--allow-unsupported`
passes over what a model's `support:` does not offer, never over these tables. A source is a section of the maintainers'
reference of ATB 8.5.0, which is not in this repository, or the name of a refusal that the vendor's own host library
gave.
"""
KERNELS = """## Kernels

What the operations of lowered graphs take, as the ATB table answers: each was asked with its tensors in each dtype, in
the formats of the device. A node gets a dtype of its own by `policy:`.
"""
LIMITS = """## Limits

`segment` cuts the model where one layer more would exceed a limit; a layer that exceeds one alone is refused (E403).
"""
SAMPLE = "llama2-7b"
SHOWN = ("atlas-800i-a2", "atlas-300i-duo")  # the host takes what 910B takes, and float32 wherever 16-bit floats


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name in device_names():
        lines.extend(_choices(device(name)))
    lines.extend(_kernels())
    lines.extend(_limits())
    return "\n".join(lines).rstrip() + "\n"


def _choices(target: Device) -> Iterator[str]:
    yield f"## {target.name} ({target.chip})"
    yield ""
    yield "| what | value | with | legal | why not, instead | source |"
    yield "|---|---|---|---|---|---|"
    for axis, what in AXES.items():
        yield from (_choice(what, row) for row in target.legal if row.axis == axis)
    defaults = "; ".join(f"{phase} {', '.join(names)}" for phase, names in target.fusions.items())
    yield ""
    yield f"Fusions by default: {defaults}."
    yield ""


def _choice(what: str, row: Row) -> str:
    when = ", ".join(f"{axis.replace('_', ' ')} {' or '.join(map(str, v))}" for axis, v in row.when.items())
    facts = [f"{name} {value}" for name, value in row.facts.items() if not isinstance(value, dict)]
    facts += [f"{dtype} {value:g}" for dtype, value in row.facts.get("values", {}).items()]
    why = f"{row.refused}; {row.instead}" if row.refused else ", ".join([*facts, row.note] if row.note else facts)
    values = ", ".join(map(str, row.values))
    return f"| {what} | {values} | {when} | {'no' if row.refused else 'yes'} | {_plain(why)} | {row.source} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _kernels() -> Iterator[str]:
    yield KERNELS
    yield f"| operation | {' | '.join(device(name).chip for name in SHOWN)} |"
    yield f"|---|{'---|' * len(SHOWN)}"
    asked = [_asked(device(name)) for name in SHOWN]
    for key in sorted({key for answers in asked for key in answers}):
        cells = ["-" if key not in answers else ", ".join(answers[key]) or "none" for answers in asked]
        yield f"| {key} | {' | '.join(cells)} |"
    yield f"| Elewise, ELEWISE_CAST | {' | '.join(', '.join(_casts(device(name).chip)) for name in SHOWN)} |"
    yield ""
    yield "`-`: the compiler does not emit it there."
    yield ""


def _asked(target: Device) -> dict[str, list[str]]:
    """Operation -> the dtypes that all its uses in lowered graphs take."""
    answers: dict[str, list[str]] = {}
    legal = tuple(legal_values(target.legal, "fusion"))
    for attention, (backend, fused), fuse in product(ATTENTION, target.backends.items(), (False, True)):
        fusions = tuple(name for name in legal if fuse and (fused or name != "linear_all_reduce"))
        options = Options(device=target.name, attention=attention, backend=backend, world_size=2, fusions=fusions)
        for low in compile_model(SAMPLE, options).lowered.values():
            for node in low.nodes:
                if node.name.startswith("layers.") and not node.name.startswith("layers.1."):
                    continue  # equal layers
                taken = [dtype for dtype in DTYPES if _takes(low, node, dtype, target.chip)]
                before = answers.setdefault(_kernel(node), taken)
                answers[_kernel(node)] = [dtype for dtype in before if dtype in taken]
    return answers


def _kernel(node: AtbNode) -> str:
    """The operation with the parameters that choose its kernel: enums, and the backend of a collective."""
    op = ATB[node.op]
    chosen = [member for f in op.fields for member, value in op.enums.get(f.kind, ENUMS.get(f.kind, {})).items()
              if f.name in node.param and node.param[f.name] == value]  # fmt: skip
    if "backend" in {f.name for f in op.fields}:
        chosen.append(op.param(node.param).backend)
    return ", ".join([node.op, *chosen])


def _takes(graph: AtbGraph, node: AtbNode, dtype: str, chip: str) -> bool:
    """Whether the table takes the operation with all its float tensors in that dtype."""
    ins = []
    for i, name in enumerate(node.ins):
        t = graph.tensors[name]
        shape = evaluate(node.views.get(i, t.shape), SAMPLES[0])
        ins.append(Desc(dtype=dtype if t.dtype in DTYPES else t.dtype, format=t.format, shape=shape))
    return refusal((node.op, node.param, ins), chip) is None


def _casts(chip: str) -> Iterator[str]:
    for source, target in product(DTYPES, DTYPES):
        param = {"elewiseType": CAST, "outTensorType": CASTS[target]}
        if source != target and refusal(("Elewise", param, [Desc(dtype=source, shape=(16, 16))]), chip) is None:
            yield f"{source} to {target}"


def _limits() -> Iterator[str]:
    yield LIMITS
    yield "| limit | | source |"
    yield "|---|---|---|"
    for kind, most in GRAPH_LIMITS.items():
        more = f"creation takes {MAX_NODES_AT_CREATE}, Setup does not" if kind == "nodes" else ""
        yield f"| {kind} of a graph | {most}{'; ' if more else ''}{more} | 1.2; segments.json |"
    yield f"| bytes of a tensor | {MAX_TENSOR_BYTES >> 30} GiB | 0 |"
    for row in COMMON:
        yield f"| {row.axis.replace('_', ' ')} | {max(row.values)}; {row.note} | {row.source} |"


if __name__ == "__main__":
    print(page(), end="")
