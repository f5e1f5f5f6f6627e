"""Whatever a vendor's table looks like, its rows are read or counted with a reason; none vanishes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from vendor_cases import CaseRow, counts, disagreements, expectation, read_table, summary, verdict

COLUMNS = (
    "CaseNum|CaseName|OpName|OpParam|InNum|InDType|InFormat|InShape|OutNum|OutDType|OutFormat|OutShape|SocVersion|"
    "ExpectedError"
)
GOOD = '1|tanh|ElewiseOperation|{"elewiseType": 20}|1|float16|nd|2,3|1|float16|nd|2,3|Ascend910B|NO_ERROR'


def _read(tmp_path: Path, text: str | bytes) -> tuple[list[CaseRow], list[str]]:
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = read_table(path)
    return table.rows, table.unreadable


def _agrees(row: CaseRow) -> bool:
    return all(verdict(row, chip) == expectation(row) for chip in row.chips)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_of_any_encoding_is_read(tmp_path: Path, encoding: str, newline: str) -> None:
    text = newline.join((COLUMNS, "", "   ", GOOD.replace("tanh", "双曲"), "||||", ""))
    rows, unreadable = _read(tmp_path, text.encode(encoding))
    assert not unreadable
    assert [row.name for row in rows] == ["双曲"]
    assert _agrees(rows[0])


@pytest.mark.parametrize("missing", ["CaseNum", "CaseName", "InNum", "InFormat", "OutNum", "OutFormat", "SocVersion"])
def test_a_column_that_says_nothing_new_may_be_missing(tmp_path: Path, missing: str) -> None:
    spot = COLUMNS.split("|").index(missing)
    lines = (line.split("|") for line in (COLUMNS, GOOD))
    rows, unreadable = _read(tmp_path, "\n".join("|".join(line[:spot] + line[spot + 1 :]) for line in lines))
    assert not unreadable
    assert _agrees(rows[0])


@pytest.mark.parametrize("outs", ["reserved|reserved|reserved|reserved", None])
def test_outputs_that_a_row_does_not_state_are_not_compared(tmp_path: Path, outs: str | None) -> None:
    text = f"{COLUMNS}\n{GOOD}"
    if outs:
        text = text.replace("1|float16|nd|2,3|Ascend", f"{outs}|Ascend")
    else:
        text = text.replace("OutNum|OutDType|OutFormat|OutShape|", "").replace("1|float16|nd|2,3|Ascend", "Ascend")
    rows, unreadable = _read(tmp_path, text)
    assert not unreadable
    assert rows[0].outs is None
    assert _agrees(rows[0])


def test_words_are_read_as_the_vendors_tool_reads_them(tmp_path: Path) -> None:
    """Spaces and suffixes of a name mean nothing, unsigned tensors are generated signed, NCHW counts as ND, and a
    tensor without elements arrives without dimensions."""
    rows, _ = _read(
        tmp_path,
        f"{COLUMNS}\n7|a|CumsumOperation_0_1|{{\"axes\": [0 ]}}|3|uint32; uint64;bf16|nchw;nd;fractal_nz|2, 3;4;2,0|0"
        "||||Ascend310P, Ascend910B2|I: NO_ERROR",
    )  # fmt: skip
    row = rows[0]
    assert (row.op, row.chips, row.expected) == ("Cumsum", ("Ascend310P", "Ascend910B"), "I:NO_ERROR")
    assert [str(desc) for desc in row.ins] == ["int32 nd [2, 3]", "int64 nd [4]", "bfloat16 nz []"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD.replace("|Ascend910B|NO_ERROR", "|NO_ERROR|"), "SocVersion 'NO_ERROR'"),
        (GOOD.replace("NO_ERROR", "FINE"), "ExpectedError 'FINE'"),
        (GOOD + GOOD, "27 cells under 14 columns"),
        (GOOD.replace('{"elewiseType": 20}', "{elewise"), "Expecting property name"),
        (GOOD.replace("|2,3|", "|2,x|"), "invalid literal"),
    ],
)
def test_a_line_that_states_no_case_is_counted_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    rows, unreadable = _read(tmp_path, f"{COLUMNS}\n{GOOD}\n{line}")
    assert len(rows) == 1
    assert reason in unreadable[0]
    assert "line 3" in unreadable[0]


def test_a_table_that_is_no_table_of_cases_is_named(tmp_path: Path) -> None:
    said = ["table.csv: no column OpName, so not a table of cases"]
    assert _read(tmp_path, "CaseNum|BaseLine(us)\n1|2") == ([], said)
    assert _read(tmp_path, "") == ([], [])


def test_the_summary_counts_what_is_not_judged(tmp_path: Path) -> None:
    lacking = "2|x|RingMLAOperation|{}|0||||0||||Ascend910B|NO_ERROR"
    text = "\n".join((COLUMNS, GOOD, lacking, GOOD.replace("Ascend910B", "Ascend950"), "2|broken"))
    path = tmp_path / "table.csv"
    path.write_text(text)
    table = read_table(path)
    assert summary(Counter(counts(table, len(disagreements(table.rows))))) == [
        "1 of 1 rows of modelled operations and chips agree; 3 rows in all",
        "1 chips that are not modelled",
        "1 unreadable lines",
        "1 rows of operations that are not modelled: RingMLA 1",
    ]
