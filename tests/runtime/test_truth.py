"""The nightly report (benchmarks/truth.py) on a tiny checkpoint: figures, pictures, and how it tells a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TRUTH = Path(__file__).resolve().parents[2] / "benchmarks" / "truth.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_words_model) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_words_model(path, 256)
    return path


def truth(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TRUTH), *words], capture_output=True, text=True)


def test_figures_and_pictures_come_from_the_commands(checkpoint, tmp_path):
    graph = checkpoint / "mine.yaml"
    text = tmp_path / "some.txt"
    text.write_text(" ".join(f"w{i * 7 % 61}" for i in range(160)))
    words = ["--model-path", str(checkpoint), "--graph", str(graph), "--text", str(text), "--only", "eval", "trace"]
    done = truth(*words, "--out", str(tmp_path / "report"))
    page = (tmp_path / "report" / "report.md").read_text()
    assert done.returncode == 0, page
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"| perplexity in {dtype} | ok |" in page
        assert f"| value by value in {dtype} | ok |" in page
        assert f"| {dtype} |" in page
    for picture in ("quality.svg", "errors.svg"):
        assert f"({picture})" in page
        assert (tmp_path / "report" / picture).read_text().startswith("<?xml")


def test_a_failed_step_is_told_with_its_last_lines_and_the_exit_code(tmp_path):
    done = truth("--model-path", str(tmp_path), "--only", "eval", "--out", str(tmp_path / "report"))
    page = (tmp_path / "report" / "report.md").read_text()
    assert done.returncode == 1
    assert "## Failed: perplexity in float32" in page
    assert "config.json" in page
    assert "3 failed" in done.stdout
