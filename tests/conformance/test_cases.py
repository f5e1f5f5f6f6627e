"""Every row of the vendor's case tables gets the vendor's verdict from our table: stage, error code, output descs.

Rows that we hold to be wrong, or that depend on what is not modelled, are in disagreements.yaml with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from vendor_cases import CASES, CaseRow, expectation, read_rows, verdict

from llmc.compiler.atb import OPS

FILES = sorted(CASES.glob("*.csv"))
LISTED = yaml.safe_load(Path(__file__).with_name("disagreements.yaml").read_text(encoding="utf-8"))["cases"]
MOST = 0.02  # of the rows may be listed as disagreements


def _disagreements(rows: list[CaseRow]) -> dict[tuple[str, str], str]:
    """(CaseNum, CaseName) -> what is said, for rows of which some chip disagrees."""
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        for chip in row.chips if row.op in OPS else ():
            if (ours := verdict(row, chip)) != expectation(row):
                found[row.number, row.name] = f"{row} on {chip}: ours {ours}, expected {expectation(row)}"
    return found


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_get_the_vendors_verdict(path: Path) -> None:
    rows = read_rows(path)
    assert rows
    found = _disagreements(rows)
    listed = {(str(entry["case"]), entry["name"]) for entry in LISTED if entry["file"] == path.name}
    unlisted = [text for case, text in found.items() if case not in listed]
    assert not unlisted, "\n".join(unlisted)
    agreeing = sorted(listed & {(row.number, row.name) for row in rows} - set(found))
    assert not agreeing, f"{path.name}: {agreeing} are listed as disagreements but agree; remove them"


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
def test_disagreements_are_few_and_argued() -> None:
    rows = [row for path in FILES for row in read_rows(path) if row.chips and row.op in OPS]
    assert len(LISTED) <= MOST * len(rows)
    for entry in LISTED:
        assert set(entry) == {"file", "case", "name", "expected", "ours", "reason"}
        assert len(entry["reason"]) > 20, entry


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
def test_most_rows_of_modelled_chips_are_run() -> None:
    """Left out: rows for chips that are not modelled, and those of operations without a table entry."""
    rows = [row for path in FILES for row in read_rows(path) if row.chips]
    run = [row for row in rows if row.op in OPS]
    unknown = sorted({row.op for row in rows} - set(OPS))
    assert len(run) > 0.9 * len(rows), f"{len(run)} of {len(rows)} rows; no entry for {', '.join(unknown)}"
