"""Every row of the vendor's case tables gets the vendor's verdict from our table: stage, error code, output descs.

Rows that we hold to be wrong, or that depend on what is not modelled, are in disagreements.yaml with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from llmc.compiler.atb import OPS
from vendor_cases import CASES, CaseRow, expectation, read_rows, verdict

FILES = sorted(CASES.glob("*.csv"))
LISTED = yaml.safe_load(Path(__file__).with_name("disagreements.yaml").read_text(encoding="utf-8"))["cases"]
MOST = 0.02  # of the rows may be listed as disagreements


def _disagreements(rows: list[CaseRow]) -> dict[int, str]:
    """Row number -> what is said, for rows of which some chip disagrees."""
    found: dict[int, str] = {}
    for row in rows:
        for chip in row.chips if row.op in OPS else ():
            if (ours := verdict(row, chip)) != expectation(row):
                found[row.number] = f"{row} on {chip}: ours {ours}, expected {expectation(row)}"
    return found


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_get_the_vendors_verdict(path: Path) -> None:
    rows = read_rows(path)
    assert rows
    found = _disagreements(rows)
    listed = {entry["row"] for entry in LISTED if entry["file"] == path.name and _is_here(entry, rows)}
    unlisted = [text for number, text in found.items() if number not in listed]
    assert not unlisted, "\n".join(unlisted)
    agreeing = sorted(listed - set(found))
    assert not agreeing, f"{path.name}: rows {agreeing} are listed as disagreements but agree; remove them"


def _is_here(entry: dict[str, object], rows: list[CaseRow]) -> bool:
    """A list entry names its row by number and name, so a table with other rows is not mistaken for this one."""
    number = entry["row"]
    return isinstance(number, int) and number < len(rows) and rows[number].name == entry["name"]


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
def test_disagreements_are_few_and_argued() -> None:
    rows = [row for path in FILES for row in read_rows(path) if row.chips and row.op in OPS]
    assert len(LISTED) <= MOST * len(rows)
    for entry in LISTED:
        assert set(entry) == {"file", "row", "name", "expected", "ours", "reason"}
        assert len(entry["reason"]) > 20, entry


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
def test_rows_of_other_chips_are_the_only_ones_left_out(record_property: pytest.RecordProperty) -> None:  # type: ignore[name-defined]
    rows = [row for path in FILES for row in read_rows(path)]
    left_out = [row for row in rows if not row.chips]
    unknown = sorted({row.op for row in rows if row.op not in OPS})
    record_property("rows_of_other_chips", len(left_out))
    assert not unknown, f"operations without a table entry: {', '.join(unknown)}"
