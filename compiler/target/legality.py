"""What is legal where: the tables of devices and of ATB, read by one function.

A device's YAML (`graphs/hardware`) has the table `legal:`. A row is about values of one axis, its first key; it holds
where its other axes hold too. It is legal unless `refused` says why not, and then `instead` says what to choose:

    - {dtype: float16, source: "0"}
    - {fusion: linear_all_reduce, backend: hccl, refused: "...", instead: --backend lccl, source: "3.3"}

What the ATB table (`compiler/atb`) states already is asked there (ASKED) and not written down again. `check` raises
with every refusal of a choice, each with its row and a way out.

    check(device("atlas-300i-duo"), {"dtype": "bfloat16"})      # E401 ... has no bfloat16: ... likely: --dtype float16
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.collective import fused_param
from llmc.compiler.atb.core import AtbError, Desc, Param
from llmc.compiler.atb.elementwise import CAST, CASTS
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError, Place, did_you_mean
from llmc.compiler.target.device import Device
from llmc.compiler.target.table import COMMON, Row, legal_values

# Axis -> the question to the ATB table, as (operation, parameters, inputs): legal when the table takes it.
Question = tuple[str, Mapping[str, Any], Sequence[Desc]]


def ask_cast(device: Device, value: str, choice: Mapping[str, Any]) -> Iterator[Question]:
    """Values come to a node with a dtype of its own by a cast, and leave it by another."""
    model = choice["dtype"]
    for source, target in ((model, value), (value, model)) if value != model else ():
        yield "Elewise", {"elewiseType": CAST, "outTensorType": CASTS[target]}, [Desc(dtype=source, shape=(16, 16))]


def ask_fused(device: Device, value: str, choice: Mapping[str, Any]) -> Iterator[Question]:
    """The fused kernel's own rule for world sizes. The host leaves the fusion out where the kernel has no such size."""
    fused = device.backends.get(choice.get("backend", ""), "")
    if value == "linear_all_reduce" and fused and choice["world_size"] > 1 and device.chip != "host":
        yield "LinearParallel", fused_param({"rank": 0, "rankSize": choice["world_size"], "backend": fused}), []


ASKED: Mapping[str, Callable[[Device, Any, Mapping[str, Any]], Iterator[Question]]] = {
    "policy": ask_cast,
    "fusion": ask_fused,
}


def refusal(question: Question, chip: str) -> AtbError | None:
    """What the ATB table has against an operation: at creation and, with inputs, at InferShape and Setup."""
    name, values, ins = question
    op = ATB[name]
    try:
        param: Param = op.param(values)
        op.create(param, chip)
        if ins:
            op.setup(param, ins, op.infer(param, ins, chip), chip)
    except AtbError as error:
        return error
    return None


def problems(device: Device, choice: Mapping[str, Any], place: Place | None = None) -> Iterator[Diagnostic]:
    """Everything that the tables have against a choice: axis -> value, or a tuple of values for `fusion`."""
    for axis, chosen in choice.items():
        for value in chosen if isinstance(chosen, tuple) else (chosen,):
            yield from _problems_of(device, axis, value, choice, place)


def _problems_of(
    device: Device, axis: str, value: Any, choice: Mapping[str, Any], place: Place | None
) -> Iterator[Diagnostic]:
    known = [row for row in (*COMMON, *device.legal) if row.axis == axis]
    found = [row for row in known if value in row.values]
    refused = [row for row in found if row.refused and row.holds(choice)]
    for row in refused:
        yield _refused(device, row, value, place)
    if not found:
        yield _unknown(device, axis, value, known)
    if refused or not found or axis not in ASKED:
        return
    for question in ASKED[axis](device, value, choice):
        if error := refusal(question, device.chip):
            yield _by_table(device, axis, value, question, error, place)
            return


def check(device: Device, choice: Mapping[str, Any], place: Place | None = None) -> None:
    """DiagnosticError with every refusal of the choice."""
    if found := list(problems(device, choice, place)):
        raise DiagnosticError(found)


def _unknown(device: Device, axis: str, value: Any, rows: Sequence[Row]) -> Diagnostic:
    word, known = axis.replace("_", " "), [str(value) for value in legal_values(rows, axis)]
    why = "".join(f": {row.note}" for row in rows if row.note and isinstance(value, int))
    near = did_you_mean(str(value), known)
    return Diagnostic(
        code="E401",
        message=f"{word} {value} is not possible{why}" if isinstance(value, int) else f"unknown {word} {value}",
        found=f"{word} {value} on {device.name}",
        needed=", ".join(known),
        likely=near if near.startswith("did") and not isinstance(value, int) else "",
    )


def _refused(device: Device, row: Row, value: Any, place: Place | None) -> Diagnostic:
    return Diagnostic(
        code="E401",
        message=f"{device.name} ({device.chip}) has no {value}{_with(row.when)}: {row.refused}",
        place=place,
        found=f"{row.axis} {value} (row of docs/legality.md, source {row.source})",
        likely=row.instead,
    )


def _by_table(
    device: Device, axis: str, value: Any, question: Question, error: AtbError, place: Place | None
) -> Diagnostic:
    return Diagnostic(
        code="E401",
        message=f"{device.name} ({device.chip}) cannot have {axis} {value} here: {question[0]}: {error.message}",
        place=place,
        found=error.found,
        needed=error.expected,
    )


def _with(when: Mapping[str, Sequence[Any]]) -> str:
    """`` with backend hccl``"""
    said = " and ".join(f"{axis.replace('_', ' ')} {' or '.join(map(str, values))}" for axis, values in when.items())
    return f" with {said}" if said else ""
