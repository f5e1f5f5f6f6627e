"""The vendor's operation cases as our table sees them: reading the CSV files and giving our verdict on a row.

    for row in read_table(path).rows:
        for chip in row.chips:
            verdict(row, chip)            # "NO_ERROR float16[2,4]" or "I:ERROR_INVALID_TENSOR_DIM"

    python tests/conformance/vendor_cases.py FOLDER      # all tables below FOLDER: counts, and each row that disagrees

Columns and the grammar of ExpectedError are described in the README of the data folder. Tables are read as the vendor's
own tool reads them (blank lines and spaces mean nothing, `CumsumOperation_0_1` is Cumsum, "reserved" outputs are not
stated), and more leniently where nothing is lost: other encodings, columns in another order or absent. A line that says
nothing certain (shifted cells, no OpParam) is never dropped silently: it is counted with its reason.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import AtbError, AtbOp, Desc, Field

DATA = Path(__file__).parents[3] / "shared" / "data"
CASES = Path(os.environ.get("LLMC_ATB_CASES", DATA / "atb-cases"))
GOLDEN = Path(os.environ.get("LLMC_ATB_GOLDEN", DATA / "atb-golden"))
LAYERS = Path(os.environ.get("LLMC_ATB_LAYERS", DATA / "atb-layers"))
LAYERS2 = Path(os.environ.get("LLMC_ATB_LAYERS2", DATA / "atb-layers-2"))
MODELLED = {"Ascend910B": "Ascend910B", "Ascend910_93": "Ascend910B", "Ascend310P": "Ascend310P"}
STAGES = {"create": "C", "infer": "I", "setup": "S", "execute": "E"}
# What the vendor's tool makes of a row's words: it generates signed tensors for unsigned ones, and NCHW is ND to it.
DTYPES = {
    "float": "float32", "double": "float64", "bf16": "bfloat16", "uint16": "int16", "uint32": "int32",
    "uint64": "int64",
}  # fmt: skip
FORMATS = {"fractal_nz": "nz", "nchw": "nd"}
EXPECTED = re.compile(r"NO_ERROR|[CISE]:(NO_ERROR|ERROR_[A-Z_]+)")
NOT_STATED = ("", "nan", "reserved")
ENCODINGS = ("utf-8-sig", "gb18030")  # besides UTF-16, which says so in its first two bytes
OUTPUTS = ("OutDType", "OutFormat", "OutShape")


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One row: `number` is CaseNum, unique with the name; `expected` is "C:NO_ERROR", "I:ERROR_...", or "NO_ERROR";
    `outs` is None where the row does not state its outputs."""

    file: str
    number: str
    name: str
    op: str
    param: Mapping[str, Any]
    ins: tuple[Desc, ...]
    outs: tuple[Desc, ...] | None
    chips: tuple[str, ...]
    expected: str

    def __str__(self) -> str:
        return f"{self.file} case {self.number} ({self.name})"


@dataclass(frozen=True, kw_only=True)
class Table:
    """`unreadable`: a line that states no case, with the reason."""

    rows: list[CaseRow] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def read_table(path: Path) -> Table:
    lines = csv.reader(_text(path).splitlines(), delimiter="|")
    cells = ((lines.line_num, [cell.replace(" ", "") for cell in line]) for line in lines)
    filled = [(number, line) for number, line in cells if any(line)]
    table = Table()
    if not filled:
        return table
    header = filled[0][1]
    if "OpName" not in header:
        table.unreadable.append(f"{path.name}: no column OpName, so not a table of cases")
        return table
    for number, line in filled[1:]:
        try:
            if any(line[len(header) :]):
                raise ValueError(f"{len(line)} cells under {len(header)} columns")
            table.rows.append(_row(path.name, number, dict(zip(header, line, strict=False))))
        except (ValueError, KeyError) as error:
            table.unreadable.append(f"{path.name} line {number}: {error}")
    return table


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    for encoding in ENCODINGS:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def _row(file: str, line: int, cells: Mapping[str, str]) -> CaseRow:
    socs = [soc.strip() for soc in cells.get("SocVersion", "").split(",") if soc.strip() not in NOT_STATED]
    if shifted := [soc for soc in socs if not soc.startswith("Ascend")]:
        raise ValueError(f"SocVersion {shifted[0]!r}")
    expected = cells.get("ExpectedError", "").replace(" ", "")
    if not EXPECTED.fullmatch(expected):
        raise ValueError(f"ExpectedError {expected!r}")
    param = json.loads(cells.get("OpParam") or "{}")
    return CaseRow(
        file=file,
        number=cells.get("CaseNum", "") or str(line),
        name=cells.get("CaseName", ""),
        op=cells["OpName"].partition("_")[0].removesuffix("Operation"),
        param={name.strip(): value for name, value in param.items()},
        ins=_descs(cells.get("InNum", ""), *(cells.get(name, "") for name in ("InDType", "InFormat", "InShape"))),
        outs=_outs(cells),
        chips=tuple(dict.fromkeys(chip for soc in socs or MODELLED for chip in _modelled(soc))),
        expected=expected,
    )


def _modelled(soc: str) -> list[str]:
    return [chip for prefix, chip in MODELLED.items() if soc.startswith(prefix)]


def _outs(cells: Mapping[str, str]) -> tuple[Desc, ...] | None:
    """The vendor's tool takes the outputs of a Generalization row from InferShape, whatever the row says."""
    number, shape = cells.get("OutNum", ""), cells.get("OutShape", "")
    if cells.get("TestType") == "Generalization" or "reserved" in (number, shape):
        return None
    if not shape.strip(";") and number != "0" and any(name not in cells for name in OUTPUTS):
        return None
    return _descs(number, *(cells.get(name, "") for name in OUTPUTS))


def _descs(number: str, dtypes: str, formats: str, shapes: str) -> tuple[Desc, ...]:
    """As many tensors as `number` and the columns allow; a format that is not stated is nd. The vendor's tool hands a
    tensor without elements over without dimensions."""
    columns = [[word.strip() for word in text.split(";")] if text else [] for text in (dtypes, formats, shapes)]
    count = min(len(columns[0]), len(columns[2]), int(number) if number not in NOT_STATED else len(columns[0]))
    columns[1] += ["nd"] * count
    descs = []
    for dtype, format, shape in zip(*(column[:count] for column in columns), strict=True):
        dims = tuple(int(dim) for dim in shape.split(",") if dim)
        dims = () if 0 in dims else dims
        descs.append(Desc(dtype=DTYPES.get(dtype, dtype), format=FORMATS.get(format, format), shape=dims))
    return tuple(descs)


def known_param(fields: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that only steer the vendor's test generator: their tool reads the fields it knows, and cuts the
    fraction off where an integer belongs."""
    names = {f.name: f for f in fields}
    known = {name: value for name, value in values.items() if name in names}
    reserved = {"rsv": values["rsv"]} if "rsv" in values else {}
    return {name: _known_value(names[name], value) for name, value in known.items()} | reserved


def _known_value(f: Field, value: Any) -> Any:
    if isinstance(value, dict):
        return known_param(f.fields, value)
    if isinstance(value, list):
        return [_known_value(f, item) for item in value]
    return int(value) if isinstance(value, float) and f.kind not in ("float", "floats") else value


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
        stated = row.outs is not None and row.expected.startswith("S:ERROR")
        op.setup(param, row.ins, row.outs if stated else outs, chip)  # type: ignore[arg-type]
    return "" if row.outs is None else " ".join(map(_shown, outs))


def expectation(row: CaseRow) -> str:
    """The row's statement in the words of `verdict`."""
    stage, _, code = row.expected.rpartition(":")
    if code != "NO_ERROR":
        return row.expected
    return "NO_ERROR " + ("" if stage == "C" else " ".join(map(_shown, row.outs or ())))


def _shown(desc: Desc) -> str:
    return f"{desc.dtype}[{','.join(map(str, desc.shape)) if desc.elements else ''}]"


def disagreements(rows: Sequence[CaseRow]) -> dict[tuple[str, str], str]:
    """(CaseNum, CaseName) -> what is said, for rows of which some chip disagrees."""
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        for chip in row.chips if row.op in OPS else ():
            if (ours := verdict(row, chip)) != expectation(row):
                found[row.number, row.name] = f"{row} on {chip}: ours {ours}, expected {expectation(row)}"
    return found


def counts(table: Table, disagreeing: int) -> dict[str, int]:
    """Where the lines of a table end up; operations that we lack by name."""
    judged = sum(1 for row in table.rows if row.op in OPS and row.chips)
    lacking = Counter(f"not modelled: {row.op}" for row in table.rows if row.op not in OPS)
    found = {
        "agree": judged - disagreeing,
        "disagree": disagreeing,
        "chips that are not modelled": sum(1 for row in table.rows if row.op in OPS and not row.chips),
        "unreadable lines": len(table.unreadable),
    }
    return {name: number for name, number in (*found.items(), *lacking.items()) if number}


def summary(total: Mapping[str, int]) -> list[str]:
    """The counts of all tables as lines of text."""
    lacking = {name: n for name, n in total.items() if name.startswith("not modelled: ")}
    judged = total.get("agree", 0) + total.get("disagree", 0)
    rows = judged + total.get("chips that are not modelled", 0) + sum(lacking.values())
    lines = [f"{total.get('agree', 0)} of {judged} rows of modelled operations and chips agree; {rows} rows in all"]
    lines += [f"{total[name]} {name}" for name in ("chips that are not modelled", "unreadable lines") if name in total]
    if lacking:
        names = ", ".join(f"{name.partition(': ')[2]} {n}" for name, n in sorted(lacking.items()))
        lines.append(f"{sum(lacking.values())} rows of operations that are not modelled: {names}")
    return lines


def main(folder: Path) -> None:
    total: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.csv")):
        table = read_table(path)
        found = disagreements(table.rows)
        total.update(counts(table, len(found)))
        for text in (*table.unreadable, *found.values()):
            print(text)
    print("\n".join(summary(total)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CASES)
