"""The vendor's operation cases as our table sees them: reading the CSV files and giving our verdict on a row.

    for row in read_rows(path):
        for chip in row.chips:
            verdict(row, chip)            # "NO_ERROR float16[2,4]" or "I:ERROR_INVALID_TENSOR_DIM"

Columns and the grammar of ExpectedError are described in the README of the data folder.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import AtbError, AtbOp, Desc, Field

DATA = Path(__file__).parents[3] / "shared" / "data"
CASES = Path(os.environ.get("LLMC_ATB_CASES", DATA / "atb-cases"))
GOLDEN = Path(os.environ.get("LLMC_ATB_GOLDEN", DATA / "atb-golden"))
LAYERS = Path(os.environ.get("LLMC_ATB_LAYERS", DATA / "atb-layers"))
MODELLED = ("Ascend910B", "Ascend310P")
STAGES = {"create": "C", "infer": "I", "setup": "S", "execute": "E"}
DTYPES = {"float": "float32", "bf16": "bfloat16"}
FORMATS = {"fractal_nz": "nz"}


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One row: `number` is CaseNum, unique with the name; `expected` is "C:NO_ERROR", "I:ERROR_...", or "NO_ERROR"."""

    file: str
    number: str
    name: str
    op: str
    param: Mapping[str, Any]
    ins: tuple[Desc, ...]
    outs: tuple[Desc, ...]
    chips: tuple[str, ...]
    expected: str

    def __str__(self) -> str:
        return f"{self.file} case {self.number} ({self.name})"


def read_rows(path: Path) -> list[CaseRow]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, delimiter="|")
        header = [cell.strip() for cell in next(reader)]
        return [_row(path.name, dict(zip(header, (cell.strip() for cell in cells), strict=True))) for cells in reader]


def _row(file: str, cells: Mapping[str, str]) -> CaseRow:
    named = [chip.strip() for chip in cells["SocVersion"].split(",") if chip.strip()]
    return CaseRow(
        file=file,
        number=cells["CaseNum"],
        name=cells["CaseName"],
        op=cells["OpName"].removesuffix("Operation"),
        param={name.strip(): value for name, value in json.loads(cells["OpParam"]).items()},
        ins=_descs(cells["InDType"], cells["InFormat"], cells["InShape"]),
        outs=_descs(cells["OutDType"], cells["OutFormat"], cells["OutShape"]),
        chips=tuple(chip for chip in MODELLED if chip in named or not named),
        expected=cells["ExpectedError"],
    )


def _descs(dtypes: str, formats: str, shapes: str) -> tuple[Desc, ...]:
    if not dtypes:
        return ()
    columns = [[word.strip() for word in text.split(";")] for text in (dtypes, formats, shapes)]
    return tuple(
        Desc(
            dtype=DTYPES.get(dtype, dtype),
            format=FORMATS.get(format, format),
            shape=tuple(int(dim) for dim in shape.split(",") if dim.strip()),
        )
        for dtype, format, shape in zip(*columns, strict=False)
    )


def known_param(fields: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that only steer the vendor's test generator: their tool reads the fields it knows."""
    names = {f.name: f for f in fields}
    known = {name: value for name, value in values.items() if name in names or name == "rsv"}
    return {
        name: known_param(names[name].fields, value) if isinstance(value, dict) else value
        for name, value in known.items()
    }


def verdict(row: CaseRow, chip: str) -> str:
    """What our table says of the row, up to the stage at which the row stops."""
    op = OPS[row.op]
    last, _, code = row.expected.rpartition(":")
    try:
        return "NO_ERROR " + _run(op, row, chip, last if code == "NO_ERROR" else "")
    except AtbError as error:
        return f"{STAGES[error.stage]}:{error.code}"


def _run(op: AtbOp, row: CaseRow, chip: str, last: str) -> str:
    values = known_param(op.fields, row.param)
    if values.get("rank", -1) >= 0:  # the vendor's tool puts the number of its own process there, whatever the row says
        values["rank"] = 0
    param = op.param(values)
    op.create(param, chip)
    if last == "C":
        return ""
    outs = op.infer(param, row.ins, chip)
    if last != "I":  # a row that expects Setup to fail states the outputs it hands in; else they are those inferred
        op.setup(param, row.ins, row.outs if row.expected.startswith("S:ERROR") else outs, chip)
    return " ".join(map(_shown, outs))


def expectation(row: CaseRow) -> str:
    """The row's statement in the words of `verdict`."""
    stage, _, code = row.expected.rpartition(":")
    if code != "NO_ERROR":
        return row.expected
    return "NO_ERROR " + ("" if stage == "C" else " ".join(map(_shown, row.outs)))


def _shown(desc: Desc) -> str:
    return f"{desc.dtype}[{','.join(map(str, desc.shape))}]"
