"""`llmc modeltest`: lines of the original tests, as their own pages show them, and the commands they become."""

from __future__ import annotations

import argparse
import json
import shlex
from types import SimpleNamespace

import pytest

from llmc.compiler.cli import COMMANDS, main
from llmc.compiler.diagnostics import UserError
from llmc.runtime.flags import EVAL_FLAGS
from llmc.runtime.measure import modeltest
from llmc.runtime.measure.modeltest import translate

HAS_TASKS = "tasks" in {flag.name for flag in EVAL_FLAGS}
# Examples of tests/modeltest/README.md of the original stack, and of the seed document, word for word.
LINES = {
    "bash run.sh pa_fp16 performance [[512,512]] 16 llama W 8":
        "llmc bench --model-path W --dtype float16 --tp 8 --cases '[[512,512]]' --batch 16",
    "pa_fp16 performance [[256,256]] 1 llama WEIGHTS 8":
        "llmc bench --model-path WEIGHTS --dtype float16 --tp 8 --cases '[[256,256]]' --batch 1",
    "pa_fp16 performance [[256,256]] 1 llama True W 8":
        "llmc bench --model-path W --dtype float16 --tp 8 --cases '[[256,256]]' --batch 1",
    "pa_bf16 performance [[2048,2048],[1024,1024],[512,512],[256,256]] 1 zhinao W 2":
        "llmc bench --model-path W --dtype bfloat16 --tp 2 "
        "--cases '[[2048,2048],[1024,1024],[512,512],[256,256]]' --batch 1",
    "pa_fp16 performance [[256,256],[512,512]] [[1,4],[1,8]] llama W 4 2048":
        "llmc bench --model-path W --dtype float16 --tp 4 --max-position-embeddings 2048 "
        "--cases '[[256,256],[512,512]]' --batch '[[1,4],[1,8]]'",
    "pa_fp16 performance [[256,256]] [1,4] 2 llama base W trust_remote_code 8 [1,8,-1,-1,-1,-1]":
        "llmc bench --model-path W --dtype float16 --tp 8 --cases '[[256,256]]' --batch 1,4 --max-prefill-tokens 512",
    "pa_fp16 performance [[256,256]] 8 prefill_length 4096 llama W 1":
        "llmc bench --model-path W --dtype float16 --tp 1 --cases '[[256,256]]' --batch 8 --max-prefill-tokens 4096",
    "fa performance [[256,256]] 1 llama chat W 1":
        "llmc bench --model-path W --attention flash --tp 1 --cases '[[256,256]]' --batch 1",
    "bash run.sh pa_fp16 performance_maxbs [[256,256],[512,512]] [[1,2048],[1,2048]] 50 internlm W trust_remote_code 4":
        "llmc bench --model-path W --dtype float16 --tp 4 --cases '[[256,256],[512,512]]' --max-batch-under 50 "
        "--batch-range '[[1,2048],[1,2048]]'",
    "pa_fp16 performance_maxbs [[256,256]] 50 llama W 8":
        "llmc bench --model-path W --dtype float16 --tp 8 --cases '[[256,256]]' --max-batch-under 50 "
        "--batch-range '[1,2000]'",
    """pa_fp16 performance_single [[256,256]] '["hello","what is your name"]' 2 llama W 8""":
        "llmc run --model-path W --dtype float16 --tp 8 --input-text hello 'what is your name' --ignore-eos "
        "--max-output-length 256",
    "fa precision_single [[256,128],[64,32]] input.txt 1 llama chat W 2":
        "llmc run --model-path W --attention flash --tp 2 --chat --input-file input.txt --max-output-length 128 && "
        "llmc run --model-path W --attention flash --tp 2 --chat --input-file input.txt --max-output-length 32",
    """pa_fp16 precision_single [[256,16]] '["it is it"]' 4 llama W 1""":
        "llmc run --model-path W --dtype float16 --tp 1 --input-text 'it is it' --batch-size 4 --max-output-length 16",
}  # fmt: skip
TASKS = {
    "pa_fp16 full_BoolQ 1 starcoder W 8":
        "llmc eval --model-path W --dtype float16 --tp 8 --tasks boolq --data data --batch-size 1",
    "fa full_MMLU 5 4 llama W 2":
        "llmc eval --model-path W --attention flash --tp 2 --tasks mmlu --data data --shots 5 --batch-size 4",
    "pa_fp16 full_CEval 1 llama False W 8":
        "llmc eval --model-path W --dtype float16 --tp 8 --tasks ceval --data data --batch-size 1",
}  # fmt: skip


def parse(line: str) -> None:
    """Each command of the line by its real flags; argparse ends the process for one that does not exist."""
    for command in line.split(" && "):
        llmc, name, *words = shlex.split(command)
        assert llmc == "llmc"
        parser = argparse.ArgumentParser(exit_on_error=False)
        COMMANDS[name][1](parser)
        _, unknown = parser.parse_known_args(words)
        assert unknown == []


@pytest.mark.parametrize(("line", "wanted"), LINES.items(), ids=LINES)
def test_a_line_of_the_original_tests_becomes_commands_that_exist(line, wanted):
    assert translate(shlex.split(line)).line == wanted
    parse(wanted)


@pytest.mark.parametrize(("line", "wanted"), TASKS.items(), ids=TASKS)
def test_a_precision_test_becomes_a_task_or_says_that_there_are_none(line, wanted):
    if HAS_TASKS:
        assert translate(shlex.split(line)).line == wanted
        parse(wanted)
        assert "--data DATA " in translate(shlex.split(line), "DATA").line
    else:
        with pytest.raises(UserError, match="llmc eval has no tasks in this version"):
            translate(shlex.split(line))


def test_data_of_an_edge_test_and_consent_to_run_programs_are_the_users_to_give(monkeypatch):
    monkeypatch.setattr(modeltest, "EVAL_FLAGS", [SimpleNamespace(name="tasks")])  # also where there are none yet
    line = "basic edge_BoolQ 1 llama W 1"
    with pytest.raises(UserError, match="edge_BoolQ: its questions are a set of their own"):
        translate(shlex.split(line))
    assert translate(shlex.split(line), "EDGE").line.endswith("--tasks boolq --data EDGE --batch-size 1")
    made = translate(shlex.split("pa_fp16 full_HumanEval 1 llama W 8"))
    assert "--run-generated-code" not in made.line
    assert any("--run-generated-code" in note for note in made.notes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pa_fp32 performance [[256,256]] 1 llama W 8", "pa_fp32: unknown model type"),
        ("pa_fp16 perfomance [[256,256]] 1 llama W 8", "perfomance: unknown test mode"),
        ("pa_fp16 full_LongBench 1 llama W 8", "full_LongBench: this test is not offered"),
        ("pa_fp16 full_HumanEval_X 1 llama W 8", "full_HumanEval_X: this test is not offered"),
        ("pa_fp16 simplified_GSM8K 1 llama W 8", "simplified_GSM8K: "),
        ("pa_fp16 performance [[256,256]] 1 llama lora l.jsonl W 2", r"lora l.jsonl: LoRA is not offered"),
        ("pa_fp16 performance [[256,256]] 1 llama W ranks.json 16 2 0 10.0.0.1", "ranks.json, in the place of CHIPS"),
        ("pa_fp16 performance [[256,256]] 1 llama W 8 [8,1,1,8,-1,-1,-1,-1]", "dp 8 is not offered"),
        ("pa_fp16 performance [[256,256]] 1 llama W 8 [1,2]", r"parallel \[1,2\]: expected \[dp,tp,sp"),
        ("pa_fp16 performance [[256,256]] 1 dataset boolq llama W 8", "dataset: prompts of a dataset are not offered"),
        ("pa_fp16 performance [[256,256],[8,8]] 4 2 llama W 8", "prefill batch size 2 with prompts of several lengths"),
        ("pa_fp16 performance 256 1 llama W 8", r"case pairs 256: expected \[\[256,256\]\]"),
        ("pa_fp16 performance [[256,256]] 1 llama W", "chips is missing behind"),
        ("pa_fp16 performance [[256,256]] 1 llama W 8 2048 x", "x: one word too many"),
        ("pa_fp16 precision_single [[8,8]] [hello] 1 llama W 8", r"texts \[hello\]: expected a list of texts"),
        ("pa_fp16 performance [[8,8]] 1 llama W encrypt=1 8", "encrypted weights are not offered"),
        ("", "model type is missing"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(line, message):
    with pytest.raises(UserError, match=message):
        translate(shlex.split(line))


def test_the_line_is_printed_alone_and_what_was_understood_beside_it(capsys):
    words = ["pa_fp16", "performance", "[[256,256]]", "4", "2", "llama", "True", "W", "trust_remote_code", "8"]
    assert main(["modeltest", *words]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.startswith("llmc bench --model-path W ")
    said = err.replace("\n", " ")
    for part in (
        "understood: model type pa_fp16, test mode performance, case pairs [[256,256]], batch 4, prefill batch size 2",
        "the number behind the batch was understood as the prefill batch size: 2",
        "use_refactor True is left out",
        "trust_remote_code is left out: code of a checkpoint is never run",
        "the name 'llama' is left out",
    ):
        assert part in said
    assert main(["modeltest", *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["ok"], facts["line"] + "\n") == (True, out)
    assert facts["understood"]["chips"] == "8"


def test_a_dtype_that_the_checkpoint_does_not_have_is_told(save_words_model, tmp_path, capsys):
    save_words_model(tmp_path, 64)  # float32
    assert main(["modeltest", "pa_fp16", "performance", "[[8,4]]", "1", "llama", str(tmp_path), "1"]) == 0
    assert "config.json says float32, for which the original tests refuse pa_fp16" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_with_run_the_command_runs(save_words_model, tmp_path, capsys, monkeypatch):
    from llmc.runtime import session

    save_words_model(tmp_path, 64)
    monkeypatch.setattr(session, "choose_variant", lambda config, path: str(tmp_path / "mine.yaml"))
    words = ["pa_fp16", "performance", "[[8,4]]", "2", "llama", str(tmp_path), "1"]
    assert main(["modeltest", "--run", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llmc bench --model-path ")
    assert "mine on host, float16, paged attention, world size 1" in out
    assert main(["modeltest", "--run", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["batch"] == 2
    monkeypatch.undo()
    assert main(["modeltest", "--run", *words]) == 1
