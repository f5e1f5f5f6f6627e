"""Text on a terminal: no line is wider than it, and none is folded where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from llmc.compiler.cli import COMMANDS, main
from llmc.compiler.terminal import fold

REPORTS = [
    "ops",
    "ops linear",
    "ops attention",
    "compile llama2-70b -o out",
    "check llama2-13b --fuse none",
    "show llama2-70b",
    "show llama2-7b --device atlas-300i-duo",
    "show llama2-7b --html page.html",
    "diff llama2-13b@tp=1 llama2-13b@tp=8",
    "diff llama2-7b llama2-7b@attention=flash",
    "explain llama-33b layers.0.attn.o --tp 8",
    "explain llama2-70b layers.0.attn.qkv",
    "explain llama2-7b slots",
    "plan llama2-70b --batch 64 --prompt 3000 --answer 1000 --tp 8",
    "plan llama2-7b --device atlas-300i-duo --tp 2 --batch 1000",
    "plan smollm2-135m --device host --tp 1",
    "env",
    "env --device atlas-300i-duo --attention flash",
    "compile smollm2-135m --until types --print",
    "compile smollm2-135m --until segment --print",
]
MISTAKES = [
    "compile llama2-7b --dtype float32 --tp 3",
    "complie",
    "xyz",
    "check llama2-7b --devise host",
    "run --model-path x --num-beams 2 --max-loras 3",
    "explain llama2-7b layers.0.mlp",
    "compile llama2-7b --until nothing",
]


def wide(text):
    return [line for line in text.splitlines() if len(line) > 80]


@pytest.fixture
def eighty(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def said(capsys, words):
    with contextlib.suppress(SystemExit):
        main(words.split())
    return capsys.readouterr()


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_fits(command, eighty, capsys):
    assert wide(said(capsys, f"{command} --help").out) == []


@pytest.mark.parametrize("words", REPORTS)
def test_reports_fit(words, eighty, capsys):
    out, err = said(capsys, words)
    assert (wide(out), err) == ([], "")
    assert out


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_fit(words, eighty, capsys):
    out, err = said(capsys, words)
    assert (out, wide(err)) == ("", [])
    assert err


@pytest.mark.parametrize(
    "words",
    ["ops", "show smollm2-135m", "diff smollm2-135m smollm2-135m@attention=flash", "explain smollm2-135m lm_head",
     "env", "plan smollm2-135m --tp 1", "check smollm2-135m"],
)  # fmt: skip
def test_folded_lines_say_the_same(words, monkeypatch, tmp_path, capsys):
    """But for `env`, whose comments move above their lines."""
    monkeypatch.chdir(tmp_path)

    def squeezed(width):
        monkeypatch.setenv("COLUMNS", str(width))
        text = said(capsys, words).out
        return sorted(re.split(r"[\s#;]+", text)) if words.startswith("env") else text.split()

    assert squeezed(80) == squeezed(1000)


def test_a_file_or_pipe_gets_whole_lines(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert wide(said(capsys, "show llama2-70b").out)


def test_json_is_never_folded(eighty, capsys):
    assert wide(said(capsys, "ops --json").out)


@pytest.mark.processes
def test_a_terminal_of_80_columns_is_asked_for_its_width(tmp_path):
    master, slave = pty.openpty()
    subprocess.run(["stty", "cols", "80", "rows", "24"], stdin=slave, check=True)
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-m", "llmc.compiler.cli", "check", "llama2-70b"]
    subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, env=env, check=True, cwd=tmp_path)
    os.close(slave)
    seen = os.read(master, 65536).decode()
    os.close(master)
    assert wide(seen) == []
    assert seen.count("\n") > 1


def test_a_shell_evaluates_folded_exports(eighty, capsys):
    text = said(capsys, "env").out
    shell = subprocess.run(["bash", "-euc", f"{text}\nenv"], capture_output=True, text=True, check=True)
    assert "ATB_OPERATION_EXECUTE_ASYNC=1" in shell.stdout.split()


# ---- where lines are folded


def test_a_line_goes_on_under_its_last_column_or_a_little_further_in():
    assert fold("  ab   " + "word " * 8, 30) == "  ab   word word word word\n       word word word word"
    assert fold("  - " + "word " * 8, 30) == "  - word word word word word\n      word word word"
    assert fold("short", 30) == "short"
    assert fold("x" * 40, 30) == "x" * 40  # a path stays whole, so that it can be copied


def test_a_shape_stays_in_one_piece():
    line = "a tensor of the dtype float16 [T, 4096, 128]"
    assert fold(line, 40) == "a tensor of the dtype float16\n    [T, 4096, 128]"


def test_a_line_of_a_source_and_its_caret_are_left_alone():
    source = f"     3 | {'word ' * 30}\n       | {' ' * 100}^^^^"
    assert fold(source, 80) == source
