"""Every row of the vendor's case tables gets the vendor's verdict from our table: stage, error code, output descs.

Rows that we hold to be wrong, or that depend on what is not modelled, are in disagreements.yaml with the reason. Tables
of operations that we lack, and rows for other chips, are counted in the summary of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from vendor_cases import CASES, counts, disagreements, read_table

from llmc.compiler.atb import OPS

FILES = sorted(CASES.rglob("*.csv"))
LISTED = yaml.safe_load(Path(__file__).with_name("disagreements.yaml").read_text(encoding="utf-8"))["cases"]
MOST = 0.02  # of the rows may be listed as disagreements


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CASES).with_suffix("")))
def test_rows_get_the_vendors_verdict(path: Path, record_property: Callable[[str, object], None]) -> None:
    table = read_table(path)
    found = disagreements(table.rows)
    record_property("vendor rows", counts(table, len(found)))
    listed = {(str(entry["case"]), entry["name"]) for entry in LISTED if entry["file"] == path.name}
    unlisted = [text for case, text in found.items() if case not in listed]
    assert not unlisted, "\n".join(unlisted)
    agreeing = sorted(listed & {(row.number, row.name) for row in table.rows} - set(found))
    assert not agreeing, f"{path.name}: {agreeing} are listed as disagreements but agree; remove them"


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
def test_disagreements_are_few_and_argued() -> None:
    rows = {(row.file, row.number, row.name): row for path in FILES for row in read_table(path).rows}
    judged = [case for case, row in rows.items() if row.chips and row.op in OPS]
    here = [entry for entry in LISTED if (entry["file"], str(entry["case"]), entry["name"]) in rows]
    assert len(here) <= MOST * len(judged)
    for entry in LISTED:
        assert set(entry) == {"file", "case", "name", "expected", "ours", "reason"}
        assert len(entry["reason"]) > 20, entry
