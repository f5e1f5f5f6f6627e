"""`llmc bench` with several ranks, from outside: one table, and one way through a search. Needs processes and torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LLMC = [sys.executable, "-m", "llmc.run", "bench"]


@pytest.mark.parametrize(
    "words", [["--batch", "1,3"], ["--max-batch-under", "5000", "--batch-range", "[1,3]"]], ids=" ".join
)
def test_two_ranks_measure_the_same_cases_and_one_of_them_tells(model, words, tmp_path):
    target = tmp_path / "out.csv"
    cases = ["--cases", "[[12,4]]", "--repeats", "2", "--csv", str(target)]
    done = subprocess.run([*LLMC, *model, *cases, *words, "--tp", "2", "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["world_size"] == 2
    assert max(case["batch"] for case in said["cases"]) == 3
    assert all(len(run["decode_ms"]) == 3 for case in said["cases"] for run in case["runs"])
    assert len(target.read_text().splitlines()) == 1 + len(said["rows"])
