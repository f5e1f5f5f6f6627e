"""`--json` of every command: one object on stdout that says ok, whatever happens; problems have one shape."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from llmc.compiler import cli
from llmc.compiler.cli import COMMANDS, main

PROBLEM = {"code", "title", "message", "file", "line", "column", "end_column", "found", "needed", "likely"}
WORKS = {  # each command, as it ends well; {} is the checkpoint
    "compile": "compile smollm2-135m -o {}/built",
    "check": "check smollm2-135m",
    "show": "show smollm2-135m",
    "show --html": "show smollm2-135m --html {}/page.html",
    "diff": "diff smollm2-135m smollm2-135m@attention=flash",
    "explain": "explain smollm2-135m lm_head",
    "plan": "plan smollm2-135m --tp 1",
    "init": "init --model-path {}",
    "ops": "ops",
    "ops linear": "ops linear",
    "env": "env",
    "schema": "schema",
}
RUNS = {  # these compute
    "run": "run --model-path {} --graph {}/mine.yaml --max-output-length 2",
    "trace": "trace --model-path {} --graph {}/mine.yaml --input-ids 5,6,7",
    "modeltest": "modeltest pa_fp16 performance [[4,2]] 1 llama {} 1",
    "bench": "bench --model-path {} --graph {}/mine.yaml --cases [[4,2]] --repeats 1",
    "eval": "eval --model-path {} --graph {}/mine.yaml --text {}/mine.yaml",
    "demo": "demo question --max-output-length 2 --cache-dir {}",
    "convert": "convert {}/bin -o {}/converted",
}
USAGE = {  # wrong usage: the likely way out, or a word of the message
    "complie smollm2-135m": "did you mean 'compile'?",
    "xyz": "compile, convert, demo, diff",
    "": "required: COMMAND",
    "compile": "required: graph",
    "compile smollm2-135m --devise host": "did you mean '--device'?",
    "compile smollm2-135m --devise=host": "did you mean '--device'?",
    "check smollm2-135m --tp two": "invalid int value: 'two'",
    "show smollm2-135m --html": "expected one argument",
    "explain smollm2-135m": "required: node",
    "diff smollm2-135m": "required: B",
    "plan smollm2-135m --promt 5": "did you mean '--prompt'?",
    "init": "required: --model-path",
    "init --modelpath x": "did you mean '--model_path'?",
    "ops a b": "unrecognized arguments: b",
    "schema x": "unrecognized arguments: x",
    "env --attenton flash": "did you mean '--attention'?",
    "run": "--model-path is needed",
    "run --model-path x --temperature hot": "'hot'",
    "run --model-path x --num-bemas 2": "did you mean '--num-beams'?",
    "trace": "--model-path is needed",
    "bench": "--model-path is needed",
    "bench --model-path x --repeats 0": "'0' is not a whole number",
    "demo --max-output-length 0": "'0' is not a whole number",
    "convert": "needs one source",
    "convert x --dtype int3": "invalid choice: 'int3'",
}
REFUSED = {  # what the user can mend: code 1
    "compile nowhere.yaml": "nowhere.yaml",
    "check smollm2-135m --tp 99": "99",
    "show smollm2-135m --device atlas-900": "atlas-900",
    "diff smollm2-135m smollm2-135m@tp=x": "argument --tp",
    "explain smollm2-135m nothing": "nothing",
    "plan smollm2-135m --memory 5": "5",
    "init --model-path nowhere": "nowhere",
    "ops linaer": "linaer",
    "env --device atlas-900": "atlas-900",
    "run --model-path nowhere": "nowhere",
    "run --model-path nowhere --num-beams 2": "beam search",
    "eval --model-path nowhere --tasks boolq": "nowhere",
    "eval --model-path nowhere --tasks ,": "expected names",
    "eval --model-path nowhere --tasks boolq --input-text a": "a task brings its questions",
    "trace --model-path nowhere": "nowhere",
    "trace --model-path nowhere --decode-steps=-2": "--decode-steps -2",
    "trace --model-path nowhere --dump a --against b": "--dump and --against",
    "trace --model-path nowhere --against b": "nowhere",
    "convert nowhere": "nowhere",
}


def said(capsys, words):
    """The exit code and the one object on stdout."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert err == "" or code == 0
    return code, json.loads(out)


def wrong(facts):
    assert facts["ok"] is False
    assert facts["problems"]
    assert all(set(problem) == PROBLEM for problem in facts["problems"])
    return " ".join(f"{problem['message']} {problem['likely']}" for problem in facts["problems"])


@pytest.mark.parametrize("words", WORKS.values(), ids=WORKS)
def test_what_works_says_ok(words, tmp_path, capsys):
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu",
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, facts = said(capsys, [*words.replace("{}", str(tmp_path)).split(), "--json"])
    assert (code, facts["ok"]) == (0, True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_words_model):
    """A checkpoint, the same as .bin, and a directory that `llmc demo` takes for its weights."""
    import torch
    from safetensors.torch import load_file

    from llmc.runtime.demo import DIRECTORY

    folder = tmp_path_factory.mktemp("words")
    save_words_model(folder, 64)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    shutil.copytree(folder, folder / DIRECTORY)
    (folder / "bin").mkdir()
    torch.save(load_file(folder / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    shutil.copy(folder / "config.json", folder / "bin")
    return folder


@pytest.mark.torch
@pytest.mark.transformers
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_what_computes_says_ok(words, weights, capsys, monkeypatch):
    from llmc.runtime import session

    monkeypatch.setattr(session, "choose_variant", lambda *_: str(weights / "mine.yaml"))
    code, facts = said(capsys, [*words.replace("{}", str(weights)).split(), "--json"])
    assert (code, facts["ok"]) == (0, True)


def test_no_command_is_left_out():
    assert {words.split()[0] for words in (*WORKS.values(), *RUNS.values())} == set(COMMANDS)


@pytest.mark.parametrize(("words", "part"), USAGE.items(), ids=USAGE)
def test_wrong_usage_is_one_object_and_code_2(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, facts = said(capsys, [*words.split(), "--json"])
    assert part in wrong(facts)
    assert (code, {problem["code"] for problem in facts["problems"]}) == (2, {"E601"})


@pytest.mark.parametrize(("words", "part"), USAGE.items(), ids=USAGE)
def test_wrong_usage_as_text_says_the_same_on_stderr(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words.split())
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert part in err


@pytest.mark.parametrize(("words", "part"), REFUSED.items(), ids=REFUSED)
def test_what_is_refused_is_one_object_and_code_1(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, facts = said(capsys, [*words.split(), "--json"])
    assert code == 1
    assert part in wrong(facts)


@pytest.mark.parametrize("words", ["--json complie x", "compile --json --devise host", "--json", "ops --js --tpp 2"])
def test_the_flag_counts_wherever_it_stands(words, capsys):
    code, facts = said(capsys, words.split())
    assert wrong(facts)
    assert code == 2


def test_the_flag_may_stand_before_the_command(capsys):
    assert said(capsys, ["--json", "check", "smollm2-135m"])[1]["ok"] is True


def test_behind_two_dashes_it_is_a_word(capsys):
    with pytest.raises(SystemExit):
        main(["ops", "--", "linear", "--json"])
    assert "unrecognized arguments: --json" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_on_the_way_is_one_object(capsys, monkeypatch):
    def fail(args):
        raise PermissionError(13, "Permission denied", "secret.yaml")

    monkeypatch.setitem(cli.COMMANDS, "check", (fail, *COMMANDS["check"][1:]))
    code, facts = said(capsys, ["check", "x", "--json"])
    assert (code, wrong(facts)) == (1, "secret.yaml: Permission denied None")


def test_an_interrupt_is_one_object(capsys, monkeypatch):
    monkeypatch.setitem(
        cli.COMMANDS, "check", (lambda args: signal.raise_signal(signal.SIGINT), *COMMANDS["check"][1:])
    )
    code, facts = said(capsys, ["check", "x", "--json"])
    assert (code, wrong(facts)) == (130, "interrupted None")
