"""Nothing that a file or a name holds reaches a terminal as more than text. Needs torch for `llmc run`."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from llmc.compiler.cli import main
from llmc.compiler.diagnostics import DiagnosticError, UserError, visible
from llmc.compiler.language.build import load_model
from llmc.compiler.terminal import generated

# ESC, BEL, CR, backspace, DEL, CSI (C1), override and isolate of direction, zero width, line separator, tag, NUL
NASTY = "\x1b[31m\x07\r\x08\x7f\x9b2J\u202e\u2066\u200b\u2028\U000e0041"
ALLOWED = re.compile(r"[\t\n -~\u00a1-\u00ac\u00ae-\u02ff\u4e00-\u9fff\ufffd…]*")
YAML = '"' + "".join(f"\\U{ord(c):08x}" for c in NASTY) + '"'

MODEL = "extends: llama2-7b\nname: mine\nsizes: {layers: 1}\n"


def clean(text: str) -> str:
    assert ALLOWED.fullmatch(text), sorted({hex(ord(c)) for c in text if not ALLOWED.fullmatch(c)})
    return text


@pytest.mark.parametrize(
    "text",
    [
        "{nasty}: 1",
        "name: {nasty}",
        "dtype: {nasty}",
        "extends: {nasty}",
        "sizes: {{{nasty}: 1}}",
        "sizes: {{layers: {nasty}}}",
        "sizes: {{layers: 1, layers: {nasty}, {nasty}: 1, {nasty}: 2}}",
        "graph: {{{nasty}: {{op: silu, x: norm}}}}",
        "graph: {{extra: {{op: {nasty}}}}}",
        "graph: {{norm: {{x: {nasty}, {nasty}: 1}}}}",
        "graph: {{norm: {{weight: {nasty}}}}}",
        "blocks: {{mlp: {{nodes: {{down: {{weight: {nasty}}}}}}}}}",
        "config: {{{nasty}: {{is: {nasty}}}}}",
        "rope: {{pairing: {nasty}}}",
        "policy: [{{nodes: {nasty}, dtype: {nasty}}}]",
        "support: {{{nasty}: {{tp: [{nasty}]}}}}",
        "a: &x 1\nb: *\u202e",
        "a: !\u202etag 1",
        "# \u202e comment\nname: [\u202ex",
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_what_a_model_file_holds_is_escaped_in_messages(text, flags, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    lines = text.format(nasty=YAML)
    keep = [line for line in MODEL.splitlines() if line.split(":")[0] != lines.split(":")[0]]
    path.write_text("\n".join([*keep, lines]), encoding="utf-8")
    assert main(["check", str(path), *flags]) == 1
    said = capsys.readouterr()
    clean(said.err + said.out)
    if not flags:
        with pytest.raises(DiagnosticError) as caught:
            load_model(path)
        clean(str(caught.value))


COMMANDS = {
    "check": [],
    "compile": ["-o", "out"],
    "show": [],
    "explain": ["norm"],
    "plan": ["--tp", "1"],
    "diff": ["llama2-7b"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_file_names_are_escaped_in_what_commands_print(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = f"a{NASTY}\udcff.yaml"
    Path(name).write_text(MODEL)
    assert main([command, name, *COMMANDS[command]]) == 0
    assert len(clean(capsys.readouterr().out)) > 50
    assert main([command, f"gone{NASTY}.yaml", *COMMANDS[command]]) == 1
    assert "gone\\x1b[31m" in clean(capsys.readouterr().err)


def test_the_command_line_is_escaped_where_it_is_repeated(capsys):
    with pytest.raises(SystemExit):
        main(["check", "llama2-7b", f"--{NASTY}"])
    clean(capsys.readouterr().err)
    for words in (["--device", NASTY], ["--dtype", NASTY], ["--fuse", NASTY], ["--allow-extends", NASTY]):
        assert main(["check", "llama2-7b", *words]) == 1
        clean(capsys.readouterr().err)


def test_tensor_names_of_a_checkpoint_are_escaped(checkpoint, tmp_path, capsys):
    import shutil

    import torch
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    save_file({f"{NASTY}\nE001 model.norm.weight": torch.zeros(1)}, folder / "model.safetensors")
    words = ["--graph", str(folder / "mine.yaml"), "--input-ids", "1", "--dtype", "float32"]
    assert main(["run", "--model-path", str(folder), *words]) == 1
    said = clean(capsys.readouterr().err)
    assert not [line for line in said.splitlines() if line.startswith("E001")]


@pytest.mark.parametrize("key", ["model_type", "hidden_act", "torch_dtype"])
def test_settings_of_a_checkpoint_are_escaped(key, checkpoint, tmp_path, capsys):
    import shutil

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: NASTY, "dtype": None}))
    main(["init", "--model-path", str(folder), "--name", "mine"])
    main(["run", "--model-path", str(folder), "--input-ids", "1", "--max-output-length", "1"])
    said = capsys.readouterr()
    clean(said.err + said.out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_is_raw_in_a_pipe_and_text_on_a_terminal():
    answer = "line one\n\tline two \x1b]0;title\x07 \u05e9\u05dc\u05d5\u05dd\u200f é 漢字 🙂\u200d\U0001f525"
    assert generated(answer, io.StringIO()) == answer
    assert generated(answer, Terminal()) == answer.replace("\x1b", "\\x1b").replace("\x07", "\\x07")


def test_questions_and_answers_of_a_run_obey_that(checkpoint, monkeypatch, capsys):
    words = ["run", "--model-path", str(checkpoint), "--graph", str(checkpoint / "mine.yaml"), "--dtype", "float32"]
    words += ["--input-text", "w1 \x1b[2J", "--max-output-length", "1"]
    assert main(words) == 0
    assert "Question[0]: w1 \x1b[2J\n" in capsys.readouterr().out
    for more in ([], ["--stream"]):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        assert main([*words, *more]) == 0
        assert "Question[0]: w1 \\x1b[2J\n" in clean(screen.getvalue())
        monkeypatch.undo()


def test_ordinary_text_of_any_language_stays():
    for text in ("größe.yaml", "模型.yaml", "модель", "שלום", "🙂", "a\tb\nc", "日本語\u3000"):
        assert visible(text) == text


@pytest.mark.parametrize(
    "text",
    ["{long}: 1", "name: {long}", "dtype: {long}", "extends: {long}", "sizes: {{layers: {long}}}", "name: *{long}",
     "support: {{{long}: 1}}", "graph: {{{long}: {{op: {long}}}}}", "graph: {{norm: {{x: {long}, weight: {long}}}}}",
     "config: {{{long}: {{is: {long}}}}}", "policy: [{{nodes: {long}}}]", "name: !{long} 1", "sizes: [{long}, {long}]",
     "sizes: {long} + 1"],
)  # fmt: skip
def test_long_values_are_shortened_in_messages(text, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    lines = text.format(long="x" * 100_000)
    path.write_text("\n".join([*(li for li in MODEL.splitlines() if li.split(":")[0] != lines.split(":")[0]), lines]))
    for flags in ([], ["--json"]):
        assert main(["check", str(path), *flags]) == 1
        said = capsys.readouterr()
        assert 20 < len(said.err + said.out) < 6_000
    assert all(len(line) < 600 for line in said.err.splitlines())


def test_lines_of_other_errors_are_bounded_too():
    assert len(str(UserError("x" * 10**6, hint="y" * 10**6))) < 2_100
