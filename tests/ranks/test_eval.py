"""`llmc eval` over ranks: the numbers of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def evaluated(folder: Path, *words: str) -> dict:
    command = [sys.executable, "-m", "llmc.run", "eval", "--model-path", str(folder), "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--graph", str(folder / "mine.yaml"), *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_two_ranks_give_the_perplexity_of_one(save_words_model, tmp_path):
    save_words_model(tmp_path, 64)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 61}" for i in range(200)))
    one, two = (evaluated(tmp_path, "--text", str(text), "--stride", "40", "--tp", tp) for tp in ("1", "2"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["tokens"] == two["tokens"] == 199
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-5)


def test_two_ranks_pass_the_goldens_that_one_wrote_and_write_the_same_tokens(save_words_model, tmp_path):
    save_words_model(tmp_path, 64)
    prompts = ["--input-text", "w1 w5 w9", "w3", "--max-output-length", "5"]
    for name, tp in (("one", "1"), ("two", "2")):
        said = evaluated(tmp_path, "--golden-out", str(tmp_path / name), *prompts, "--tp", tp)
        assert (said["sequences"], said["steps"]) == (2, 5)
    for name, tp in (("one", "2"), ("two", "1")):
        said = evaluated(tmp_path, "--golden", str(tmp_path / name), "--tp", tp)
        assert (said["world_size"], said["passed"]) == (int(tp), True)
        assert said["greatest_kl"] < 1e-8
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    given = ["--input-ids", "1,5,9", "3"]  # as in the files
    assert evaluated(tmp_path, "--golden", str(tmp_path / "one"), *given, "--tp", "2")["passed"]
