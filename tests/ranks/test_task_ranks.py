"""`llmc eval --tasks` with several ranks, from outside: one of them asks, all of them answer, as one rank does."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from generated_tasks import TASKS, save_checkpoint, save_tasks

pytest.importorskip("lm_eval")
LLMC = [sys.executable, "-m", "llmc.run", "eval"]


def test_two_ranks_give_the_metrics_and_answers_of_one(tmp_path):
    checkpoint, tasks = tmp_path / "tiny", tmp_path / "tasks"
    checkpoint.mkdir()
    tasks.mkdir()
    save_checkpoint(checkpoint, bos=True)
    save_tasks(tasks)
    names = ",".join(str(tasks / f"{name}.yaml") for name in TASKS)
    model = ["--model-path", str(checkpoint), "--graph", str(checkpoint / "mine.yaml"), "--dtype", "float32"]
    said, answers = {}, {}
    for count in ("1", "2"):
        target = tmp_path / f"{count}.csv"
        words = ["--tasks", names, "--data", str(tasks / "data"), "--debug-csv", str(target), "--json", "--tp", count]
        done = subprocess.run([*LLMC, *model, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[count] = json.loads(done.stdout)
        answers[count] = list(csv.DictReader(target.open()))
    assert said["2"]["world_size"] == 2
    assert said["1"]["tasks"].keys() == set(TASKS)
    for name, one in said["1"]["tasks"].items():
        for metric, other in zip(one["metrics"], said["2"]["tasks"][name]["metrics"], strict=True):
            assert metric["value"] == pytest.approx(other["value"], rel=1e-4), (name, metric["metric"])
    for row, other in zip(answers["1"], answers["2"], strict=True):
        if not row["key"].startswith("rolling"):  # whose answer is a number
            assert row == other
