"""`llmc eval --tasks`: lm-eval through the engine equals lm-eval through transformers on the same data; what is
written, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from generated_tasks import TASKS, save_checkpoint, save_tasks

from llmc.compiler.cli import main

pytest.importorskip("lm_eval")
BOOTSTRAPS = 1000


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    save_tasks(path)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def any_checkpoint(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path, bos=request.param)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path, bos=True)
    return path


def evaluate(checkpoint: Path, *words: str) -> int:
    graph = ["--graph", str(checkpoint / "mine.yaml"), "--dtype", "float32"]
    return main(["eval", "--model-path", str(checkpoint), *graph, *words])


def paths(tasks: Path, *names: str) -> list[str]:
    return ["--tasks", ",".join(str(tasks / f"{name}.yaml") for name in names), "--data", str(tasks / "data")]


@pytest.fixture
def spied(monkeypatch) -> Callable[[], Mapping[str, Any]]:
    """What lm-eval's `evaluate` gave last, samples included."""
    import lm_eval.evaluator

    seen, plain = [], lm_eval.evaluator.evaluate

    def evaluate(*args: Any, **more: Any) -> Any:
        seen.append(plain(*args, **more))
        return seen[-1]

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", evaluate)
    return lambda: seen[-1]


def by_transformers(checkpoint: Path, specs: list[str], data: Path, *, shots: int | None, chat: bool) -> Any:
    """lm-eval as it comes: its own model class for transformers, float32, one request at a time."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llmc.runtime.measure.task_data import from_files

    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_defaults=not all(spec.endswith(".yaml") for spec in specs))
    made = []
    for spec in specs:
        with from_files(data, [Path(spec).stem], one=True, run_code=False):
            made += manager.load([spec])["tasks"].values()
    return simple_evaluate(
        model,
        tasks=made,
        task_manager=manager,
        num_fewshot=shots,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=chat,
    )


def assert_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """The same requests, answers and metrics; log-likelihoods to 1e-4."""
    assert ours["samples"].keys() == theirs["samples"].keys()
    for name, expected in theirs["samples"].items():
        found = ours["samples"][name]
        assert [one["arguments"] for one in found] == [one["arguments"] for one in expected]
        for one, other in zip(found, expected, strict=True):
            for mine, reference in zip(flat(one["resps"]), flat(other["resps"]), strict=True):
                if isinstance(reference, (str, bool)):
                    assert mine == reference, name
                else:
                    assert mine == pytest.approx(reference, abs=1e-4, rel=0), name
        for key, value in theirs["results"][name].items():
            same = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert ours["results"][name][key] == same, key


def flat(value: Any) -> list[Any]:
    return [one for part in value for one in flat(part)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("batch", ["1", "4"])
def test_each_kind_of_request_gets_the_answers_of_transformers(any_checkpoint, tasks, spied, batch, capsys):
    words = paths(tasks, *TASKS)
    assert evaluate(any_checkpoint, *words, "--batch-size", batch, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    ours = spied()
    theirs = by_transformers(any_checkpoint, words[1].split(","), tasks / "data", shots=None, chat=False)
    assert_equal(ours, theirs)
    assert said["tasks"]["choices"]["shots"] == 2
    kinds = {(m["metric"], m["filter"]): m["value"] for m in said["tasks"]["choices"]["metrics"]}
    assert kinds["acc", "none"] == theirs["results"]["choices"]["acc,none"]
    assert 0 < said["cut"] < said["requests"], "some questions are longer than a sequence"
    texts = [one["resps"][0][0] for one in ours["samples"]["answers"]]
    assert {"x" in text for text in texts} == {False}
    assert len({len(text) for text in texts}) > 1


def test_a_chat_template_and_other_shots_reach_the_prompts(checkpoint, tasks, spied, capsys):
    words = paths(tasks, "choices", "answers")
    assert evaluate(checkpoint, *words, "--chat", "--shots", "1", "--json") == 0
    ours = spied()
    asked = flat(ours["samples"]["choices"][0]["arguments"])[0]
    assert asked.count("<|user|>") == 2
    theirs = by_transformers(checkpoint, words[1].split(","), tasks / "data", shots=1, chat=True)
    assert_equal(ours, theirs)


def test_a_task_of_lm_eval_reads_the_published_files(checkpoint, tasks, spied, capsys, tmp_path):
    table, debug = tmp_path / "out.csv", tmp_path / "debug.csv"
    files = ["--csv", str(table), "--debug-csv", str(debug)]
    assert evaluate(checkpoint, "--tasks", "BoolQ", "--data", str(tasks / "data"), *files, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    ours = spied()
    assert_equal(ours, by_transformers(checkpoint, ["boolq"], tasks / "data", shots=None, chat=False))
    (metric,) = said["tasks"]["boolq"]["metrics"]
    assert (said["ok"], said["tasks"]["boolq"]["samples"], said["files"]) == (True, 6, [str(table), str(debug)])
    (row,) = csv.DictReader(table.open())
    assert (row["Model"], row["Dataset"], row["Metric"], row["Samples"]) == ("mine", "boolq", "acc", "6")
    assert float(row["Result"]) == metric["value"] == ours["results"]["boolq"]["acc,none"]
    rows = list(csv.DictReader(debug.open()))
    assert list(rows[0]) == [
        "key", "queries", "input_token_ids", "output_token_ids", "test_result", "golden_result", "pass",
    ]  # fmt: skip
    assert sum(one["pass"] == "True" for one in rows) / len(rows) == metric["value"]
    for one in rows:
        assert one["test_result"].strip() in ("no", "yes")
        assert (one["test_result"].strip() == one["golden_result"]) == (one["pass"] == "True")


def test_what_was_generated_is_in_the_debug_table(checkpoint, tasks, spied, capsys, tmp_path):
    from transformers import AutoTokenizer

    target = tmp_path / "debug.csv"
    assert evaluate(checkpoint, *paths(tasks, "answers"), "--limit", "3", "--debug-csv", str(target)) == 0
    assert "answers" in capsys.readouterr().out
    rows = list(csv.DictReader(target.open()))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(rows) == 3
    for row in rows:
        assert row["input_token_ids"] == " ".join(map(str, tokenizer.encode(row["queries"])))
        answer = tokenizer.decode([int(i) for i in row["output_token_ids"].split()], skip_special_tokens=True)
        assert answer.startswith(row["test_result"])


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_repeated_questions_are_drawn_apart_and_a_run_can_be_repeated(checkpoint, tasks, spied, attention, tmp_path):
    sampled = tmp_path / "sampled.yaml"
    text = (tasks / "answers.yaml").read_text().replace("task: answers", "task: sampled\nrepeats: 2")
    sampled.write_text(text.replace("do_sample: false", "do_sample: true, temperature: 0.9, top_p: 0.95"))
    runs = []
    for _ in range(2):
        words = ["--tasks", str(sampled), "--data", str(tasks / "data"), "--attention", attention, "--quiet"]
        assert evaluate(checkpoint, *words) == 0
        runs.append([one["resps"][0] for one in spied()["samples"]["sampled"]])
    assert runs[0] == runs[1]
    assert all(len(set(texts)) == 2 for texts in runs[0])


# ---- programs


def test_humaneval_counts_the_programs_whose_tests_pass(checkpoint, tasks, spied, capsys, tmp_path):
    from lm_eval.tasks import TaskManager

    from llmc.runtime.measure.task_data import from_files

    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def add{i}(a, b):\n",
            "entry_point": f"add{i}",
            "canonical_solution": f"    return a + b + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n",
        }
        for i in range(2)
    ]
    target = tmp_path / "openai_humaneval" / "openai_humaneval" / "test.jsonl"
    target.parent.mkdir(parents=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with from_files(tmp_path, ["humaneval"], one=True, run_code=True):
        (task,) = TaskManager().load(["humaneval"])["tasks"].values()
    solved = [row["prompt"] + row["canonical_solution"] for row in rows]
    assert task.process_results(rows[0], [[solved[0]]]) == {"pass@1": 1.0}
    assert task.process_results(rows[1], [[solved[0]]]) == {"pass@1": 0.0}

    small = tmp_path / "small.yaml"  # as published, but for answers that fit a sequence of this checkpoint
    small.write_text(
        f"include: {task.config.metadata['config_source']}\ntask: small\ngeneration_kwargs: {{max_gen_toks: 8}}"
    )
    words = ["--tasks", str(small), "--data", str(tmp_path), "--run-generated-code", "--json"]
    assert evaluate(checkpoint, *words) == 0
    (metric,) = json.loads(capsys.readouterr().out)["tasks"]["small"]["metrics"]
    assert (metric["metric"], metric["filter"], metric["value"]) == ("pass@1", "create_test", 0.0)


# ---- data


@pytest.mark.parametrize(
    ("place", "ending"),
    [
        ("choices/{}.jsonl", ".jsonl"),
        ("choices/{}.json", ".json"),
        ("choices/data/{}-00000-of-00001.parquet", ".parquet"),
        ("mine/choices/{}/0000.parquet", ".parquet"),
        ("Choices/default/{}.parquet", ".parquet"),
        ("{}.jsonl", ".jsonl"),
    ],
)
def test_data_lies_as_one_gets_it(tasks, tmp_path, place, ending):
    import pyarrow
    import pyarrow.parquet

    from llmc.runtime.measure.task_data import find

    for split in ("train", "test"):
        target = tmp_path / place.format(split)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (tasks / "data" / "choices" / f"{split}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        match ending:
            case ".jsonl":
                target.write_text(text)
            case ".json":
                target.write_text(json.dumps({"version": 1, "data": rows}))
            case _:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    found = find(tmp_path, "mine/choices", None, ["choices"], one=True)
    assert {split: list(found[split]) for split in found.files} == {"train": found["train"].to_list(), "test": rows}


def test_a_group_reads_a_folder_for_each_subset_and_never_another_ones(tmp_path):
    from llmc.compiler.diagnostics import UserError
    from llmc.runtime.measure.task_data import find

    (tmp_path / "mmlu" / "anatomy").mkdir(parents=True)
    (tmp_path / "mmlu" / "test.csv").write_text("question\nwrong\n")
    (tmp_path / "mmlu" / "anatomy" / "test.csv").write_text("question\nright\n")
    assert find(tmp_path, "cais/mmlu", "anatomy", ["MMLU", "mmlu"], one=False)["test"][0] == {"question": "right"}
    with pytest.raises(
        UserError, match=r"no files of the data set cais/mmlu, subset virology in .*; looked for .* mmlu/vir"
    ):
        find(tmp_path, "cais/mmlu", "virology", ["mmlu"], one=False)


# ---- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", ","], "expected names with commas"),
        (["--tasks", "boolqq"], "did you mean 'boolq'?"),
        (["--tasks", "boolq"], "boolq needs the data set aps/super_glue, subset boolq"),
        (["--tasks", "boolq", "--data", "nowhere"], "--data nowhere: there is no such directory"),
        (["--tasks", "gsm8k", "--data", "{tasks}/data"], "hf download --repo-type dataset openai/gsm8k"),
        (["--tasks", "{tasks}/none.yaml"], "none.yaml cannot be read: No such file"),
        (["--tasks", "boolq", "--data", "{tasks}/data", "--shots", "2"], "needs the split train"),
        (
            ["--tasks", "{tasks}/odd_label.yaml", "--data", "{tasks}/data"],
            "which is none of its choices: ['",
        ),
        (["--tasks", "{tasks}/odd_field.yaml", "--data", "{tasks}/data"], "the fields after, before"),
        (["--tasks", "{tasks}/odd_setting.yaml", "--data", "{tasks}/data"], "num_beams is not known here"),
        (["--tasks", "{tasks}/odd_metric.yaml", "--data", "{tasks}/data"], "a script that is downloaded"),
        (["--tasks", "{tasks}/odd_split.yaml", "--data", "{tasks}/data"], "needs the split validation"),
        (["--tasks", "boolq,boolq,BoolQ", "--data", "{tasks}/data"], "boolq is in it twice"),
        (["--tasks", "mbpp", "--data", "{tasks}/data"], "mbpp runs programs that the model writes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_told_before_anything_runs(checkpoint, tasks, words, message, capsys):
    odd = {
        "odd_label": ("choices", "doc_to_target: answer", "doc_to_target: question"),
        "odd_field": ("last_word", "{{before}}", "{{passage}}"),
        "odd_setting": ("answers", "do_sample: false", "num_beams: 4"),
        "odd_metric": ("answers", "exact_match", "meteor"),
        "odd_split": ("rolling", "test_split: test", "validation_split: validation"),
    }
    for name, (source, before, after) in odd.items():
        text = (tasks / f"{source}.yaml").read_text()
        (tasks / f"{name}.yaml").write_text(text.replace(before, after).replace(f"task: {source}", f"task: {name}"))
    assert evaluate(checkpoint, *(word.format(tasks=tasks) for word in words)) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


def test_without_lm_eval_one_sentence_says_what_to_install(checkpoint, tasks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    assert evaluate(checkpoint, *paths(tasks, "rolling")) == 1
    assert "pip install 'llmc[eval]'" in capsys.readouterr().err
