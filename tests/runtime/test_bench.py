"""`llmc bench` as a user calls it, on a tiny random checkpoint: what is counted, and what the columns are made of."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from llmc.compiler.cli import main
from llmc.runtime.engine.engine import Engine
from llmc.runtime.measure import bench

# mindie-stack reference, section 8
COLUMNS = [
    "Model", "Batchsize", "In_seq", "Out_seq", "Total time(s)", "Prefill all time(ms)", "Prefill average time(ms)",
    "Non-first token time(ms)", "Non-first token Throughput(Tokens/s)", "E2E Throughput(Tokens/s)",
    "Non-first token Throughput Average", "E2E Throughput Average",
]  # fmt: skip


def run(checkpoint: Path, *words: str) -> int:
    graph = ["--graph", str(checkpoint / "mine.yaml")]
    return main(["bench", "--model-path", str(checkpoint), *graph, "--dtype", "float32", *words])


@pytest.fixture
def measured(checkpoint, capsys):
    def go(*words: str):
        assert run(checkpoint, *words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return go


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_prefill_first_token_and_later_tokens_are_apart_and_make_the_columns(measured, attention):
    said = measured("--cases", "[[12,6],[5,3]]", "--batch", "1,4", "--attention", attention, "--repeats", "5")
    assert said["columns"] == COLUMNS
    assert [(c["batch"], c["prompt"], c["answer"]) for c in said["cases"]] == [
        (1, 12, 6), (1, 5, 3), (4, 12, 6), (4, 5, 3)
    ]  # fmt: skip
    for case, values in zip(said["cases"], said["rows"], strict=True):
        row, runs = dict(zip(COLUMNS, values, strict=True)), case["runs"]
        assert len(runs) == said["repeats"] == 5
        for one in runs:
            assert (len(one["prefill_ms"]), len(one["decode_ms"])) == (1, case["answer"] - 1)
            assert len(one["first_token_ms"]) == case["batch"]
            assert sum(one["prefill_ms"]) + sum(one["decode_ms"]) <= one["total_ms"]
            assert all(time >= one["prefill_ms"][0] for time in one["first_token_ms"])
        token = median([time for one in runs for time in one["decode_ms"]])
        prefill = median(sum(one["prefill_ms"]) for one in runs)
        total = median(one["total_ms"] for one in runs) / 1e3
        assert row["Total time(s)"] == pytest.approx(total)
        assert row["Prefill all time(ms)"] == pytest.approx(prefill)
        assert row["Prefill average time(ms)"] == pytest.approx(prefill / case["batch"])
        assert row["Non-first token time(ms)"] == pytest.approx(token)
        assert row["Non-first token Throughput(Tokens/s)"] == pytest.approx(case["batch"] / token * 1e3)
        assert row["E2E Throughput(Tokens/s)"] == pytest.approx(case["batch"] * case["answer"] / total)
    first, last = said["rows"][2:]
    assert first[10:] == [None, None]
    assert last[10:] == [pytest.approx((first[i] + last[i]) / 2) for i in (8, 9)]


def test_each_case_may_have_batches_of_its_own(measured):
    said = measured("--cases", "[[4,2],[6,2]]", "--batch", "[[1,3],[2]]", "--repeats", "1", "--warm-up", "0")
    assert [(c["prompt"], c["batch"]) for c in said["cases"]] == [(4, 1), (6, 2), (4, 3)]


def test_an_answer_of_one_token_has_no_later_token(measured):
    said = measured("--cases", "[[4,1]]", "--repeats", "1")
    row = dict(zip(COLUMNS, said["rows"][0], strict=True))
    assert row["Non-first token time(ms)"] is None
    assert row["Non-first token Throughput(Tokens/s)"] is None
    assert row["E2E Throughput(Tokens/s)"] > 0


def test_files_have_the_columns_plain_and_with_bars(checkpoint, capsys, tmp_path):
    plain, bars = tmp_path / "new" / "out.csv", tmp_path / "out.txt"
    words = ["--cases", "[[4,3]]", "--batch", "2", "--repeats", "1", "--csv", str(plain), "--formatted", str(bars)]
    assert run(checkpoint, *words) == 0
    assert f"written: {plain}, {bars}" in capsys.readouterr().out.replace("\n", " ")
    head, row = csv.reader(plain.read_text().splitlines())
    assert head == COLUMNS
    assert row[:4] == ["mine", "2", "4", "3"]
    lines = [line.split("|") for line in bars.read_text().splitlines()]
    assert [[cell.strip() for cell in line] for line in lines] == [head, row]
    assert len({tuple(map(len, line)) for line in lines}) == 1


def test_runs_before_are_not_counted_and_the_same_prompts_come_again(checkpoint, capsys, monkeypatch):
    prompts = []
    generate = Engine.generate

    def watched(self, given, *more, **named):
        prompts.append([list(ids) for ids in given])
        return generate(self, given, *more, **named)

    monkeypatch.setattr(Engine, "generate", watched)
    words = ["--cases", "[[30,2]]", "--batch", "3", "--repeats", "2", "--warm-up", "3", "--json"]
    said = []
    for seed in ("7", "7", "8"):
        prompts.clear()
        assert run(checkpoint, *words, "--seed", seed) == 0
        capsys.readouterr()
        assert len(prompts) == 1 + 3 + 2  # the engine's own first
        assert all(one == prompts[1] for one in prompts[1:])
        said.append(prompts[1])
    assert said[0] == said[1] != said[2]
    drawn = [token for ids in said[0] + said[2] for token in ids]
    assert not {1, 2} & set(drawn)
    assert set(drawn) <= set(range(64))


def test_the_time_of_a_run_that_warms_up_is_in_no_median():
    seconds = itertools.chain([9.0, 9.0], itertools.repeat(1.0))

    class Slow:
        def generate(self, prompts, params, on_step):
            each = next(seconds)
            self.steps = [SimpleNamespace(phase=p, seconds=each) for p in ("prefill", "decode", "decode")]
            return [SimpleNamespace(first_token_s=each)]

    case = bench.Case(4, 3, 1)
    runs = bench.measure(Slow(), case, [[0] * 4], repeats=3, warm_up=2)
    assert bench.details(case, runs)["spread"]["non_first_token_ms"]["max"] == 1000


def test_weights_are_made_up_where_only_the_configuration_is_there(checkpoint, capsys, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    shutil.copy(checkpoint / "mine.yaml", tmp_path)
    words = ["--cases", "[[4,3]]", "--repeats", "1"]
    assert run(tmp_path, *words, "--random-weights") == 0
    assert "made-up weights" in capsys.readouterr().out
    assert run(tmp_path, *words, "--random-weights", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "random"
    assert run(tmp_path, *words) == 1
    assert "safetensors" in capsys.readouterr().err


# ---- the largest batch


@pytest.mark.parametrize("limit", [0.5, 1, 4.5, 13, 20, 100])
@pytest.mark.parametrize("fits", [20, 11])
def test_the_search_finds_the_largest_batch_that_is_fast_enough_and_fits(limit, fits):
    """A token takes as many ms as there are sequences."""
    asked = Counter()

    def timed(case):
        asked[case.batch] += 1
        return [bench.Run(total=1.0, prefill=[0.1], decode=[case.batch / 1e3] * 3, first_token=[0.1])]

    search = bench.Search(prompt=8, answer=4, least=1, most=20)
    args = SimpleNamespace(max_batch_under=limit)
    found, rounds = bench.largest_batch(args, search, fits, timed, None)
    right = [batch for batch in range(1, 21) if batch <= limit and batch <= fits]
    assert [case.batch for case in found] == right[-1:]
    assert max(asked.values(), default=1) == 1
    assert max(asked, default=0) <= fits
    assert len(rounds) <= 5
    for one in rounds:
        why = "it does not fit the memory" if one["batch"] > fits else "too slow" if one["batch"] > limit else ""
        assert (one["within"], one["why"]) == (not why, why)


def test_a_search_reports_rounds_and_result(checkpoint, capsys, tmp_path):
    target = tmp_path / "best.csv"
    words = ["--cases", "[[4,4],[8,2]]", "--batch-range", "[[1,4],[2,3]]", "--repeats", "1", "--csv", str(target)]
    assert run(checkpoint, *words, "--max-batch-under", "100000") == 0
    said = capsys.readouterr().out
    assert "[4,4]: the largest batch with at most 100000 ms for a token after the first is 4 (searched from 1" in said
    assert "[8,2]: the largest batch" in said
    assert [row[1:4] for row in csv.reader(target.read_text().splitlines())][1:] == [["4", "4", "4"], ["3", "8", "2"]]
    rounds = list(csv.DictReader((tmp_path / "best_rounds.csv").read_text().splitlines()))
    assert [(r["Batchsize"], r["In_seq"], r["Within"]) for r in rounds] == [
        ("2", "4", "yes"), ("3", "4", "yes"), ("4", "4", "yes"), ("2", "8", "yes"), ("3", "8", "yes"),
    ]  # fmt: skip
    assert run(checkpoint, *words, "--max-batch-under", "0.000001") == 0
    assert "[4,4]: no batch from 1 to 4 has at most 1e-06 ms" in capsys.readouterr().out


def test_a_batch_beyond_the_memory_counts_as_too_large_and_is_told(checkpoint, capsys):
    words = ["--cases", "[[8,4]]", "--batch-range", "[1,60000]", "--max-batch-under", "100000", "--repeats", "1"]
    assert run(checkpoint, *words, "--memory", "20MiB", "--warm-up", "0", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rounds"][0] == {
        "prompt": 8, "answer": 4, "batch": 30000, "non_first_token_ms": None, "within": False,
        "why": "it does not fit the memory",
    }  # fmt: skip
    assert any(one["within"] for one in said["rounds"])
    assert len(said["rows"]) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "[[4]]"], r"--cases \[\[4\]\]: expected pairs of prompt and answer tokens"),
        (["--cases", "4,4"], "--cases 4,4: expected pairs"),
        (["--cases", "[[4,0]]"], "expected pairs"),
        (["--batch", "0"], "--batch 0: expected 1,4 for every case"),
        (["--batch", "[[1],[2]]"], "2 lists for 1 cases"),
        (["--batch", "1", "--batch-range", "[1,2]"], "--batch-range is where --max-batch-under searches"),
        (["--max-batch-under", "5", "--batch", "2"], "--batch and --max-batch-under cannot be used together"),
        (["--max-batch-under", "5", "--batch-range", "[4,2]"], r"--batch-range \[4,2\]: expected \[1,64\]"),
        (["--max-batch-under", "-1"], "--max-batch-under -1: expected milliseconds above 0"),
        (["--cases", "[[60,5]]"], r"--cases \[60,5\]: 65 tokens; a sequence can have 64"),
        (["--cases", "[[8,4]]", "--batch", "100000", "--memory", "20MiB"], r"\[8,4\] batch 100000"),
        (["--csv", "/dev/null/out.csv"], "cannot write /dev/null/out.csv"),
        (["--warm-up", "-1"], "--warm-up -1: expected 0 or more runs"),
        (["--profile", "--max-batch-under", "5"], "--profile and --max-batch-under cannot be used together"),
        (["--profile", "--host-compile"], "--profile times operations, and --host-compile makes one of many"),
        (["--batch", "1,2", "--host-compile"], "--host-compile compiles the step of one batch"),
    ],
)
def test_what_cannot_be_measured_is_one_message(checkpoint, capsys, words, message):
    cases = [] if "--cases" in words else ["--cases", "[[8,4]]"]
    assert run(checkpoint, *cases, *words) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err.replace("\n", " "))
    assert captured.out == ""
    assert "Traceback" not in captured.err
