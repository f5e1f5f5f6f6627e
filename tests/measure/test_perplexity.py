"""`llmc eval --text`: the numbers of transformers on the same tokens, and what is refused."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.cli import main
from llmc.runtime.demo import demo_weights
from llmc.runtime.measure.perplexity import windows

WORDS = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_words_model) -> Path:
    """A llama of 2 layers whose tokens are the words w0 to w63, with 64 positions; and texts."""
    path = tmp_path_factory.mktemp("tiny")
    save_words_model(path, 64)
    chance = random.Random(3)
    texts = [" ".join(f"w{chance.randrange(64)}" for _ in range(n)) for n in (WORDS, 70, 1, 5)]
    (path / "text.txt").write_text(texts[0])
    lines = [json.dumps({"text": texts[0]}), json.dumps(texts[1]), "", json.dumps({"text": texts[2]}), '{"text": ""}']
    (path / "texts.jsonl").write_text("\n".join([*lines, json.dumps({"text": texts[3]})]))
    return path


def evaluate(checkpoint: Path, *words: str) -> int:
    graph = ["--graph", str(checkpoint / "mine.yaml"), "--dtype", "float32"]
    return main(["eval", "--model-path", str(checkpoint), *graph, *words])


def measured(checkpoint: Path, capsys: Any, *words: str) -> dict[str, Any]:
    assert evaluate(checkpoint, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def expected(checkpoint: Path, documents: list[list[int]], window: int, stride: int) -> tuple[float, int]:
    """Mean negative log-likelihood and the tokens it is over: the loop of transformers' page, whose labels say with
    -100 what does not count; the loss is a mean over the others."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    total, count = 0.0, 0
    for tokens in documents:
        before = 0
        for begin in range(0, len(tokens), stride):
            end = min(begin + window, len(tokens))
            ids = torch.tensor([tokens[begin:end]])
            labels = ids.clone()
            labels[:, : -(end - before)] = -100
            counted = int((labels[:, 1:] != -100).sum())  # the shift inside loses the first
            if counted:
                total += model(ids, labels=labels).loss.double().item() * counted
            count, before = count + counted, end
            if end == len(tokens):
                break
    return total / count, count


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize(
    ("flags", "window", "stride"),
    [
        ([], 64, 64),
        (["--window", "40"], 40, 40),
        (["--window", "40", "--stride", "7"], 40, 7),
        (["--stride", "64", "--batch-size", "3"], 64, 64),
        (["--window", "33", "--stride", "32", "--batch-size", "5", "--max-prefill-tokens", "100"], 33, 32),
        (["--window", "2", "--stride", "1"], 2, 1),
    ],
)
def test_perplexity_of_a_text_is_that_of_transformers(checkpoint, capsys, attention, flags, window, stride):
    path = checkpoint / "text.txt"
    said = measured(checkpoint, capsys, "--text", str(path), "--attention", attention, *flags)
    ids = ids_of(path.read_text())
    mean, count = expected(checkpoint, [ids], window, stride)
    assert (said["tokens"], said["text_tokens"], said["documents"]) == (count, WORDS, 1)
    assert (said["window"], said["stride"]) == (window, stride)
    assert said["nll_per_token"] == pytest.approx(mean, rel=1e-5)
    assert said["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert said["bits_per_byte"] == pytest.approx(mean / math.log(2) * WORDS / path.stat().st_size, rel=1e-5)


def test_documents_of_a_jsonl_file_stand_for_themselves(checkpoint, capsys):
    path = checkpoint / "texts.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    documents = [ids_of(line if isinstance(line, str) else line["text"]) for line in lines]
    said = measured(checkpoint, capsys, "--text", str(path), "--batch-size", "2")
    mean, count = expected(checkpoint, [ids for ids in documents if ids], 64, 64)
    assert said["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert (said["tokens"], said["documents"], said["text_tokens"]) == (count, 4, 376)


def test_lines_for_people_say_what_was_counted(checkpoint, capsys):
    assert evaluate(checkpoint, "--text", str(checkpoint / "text.txt"), "--quiet") == 0
    said = capsys.readouterr()
    assert "windows of 64 tokens, one every 64: 295 tokens count" in said.out
    assert said.out.splitlines()[-1].startswith("perplexity ")
    assert said.err == ""


@pytest.mark.parametrize(
    ("size", "stride"), [(2, 1), (2, 2), (3, 2), (8, 1), (8, 3), (8, 7), (8, 8), (50, 8), (50, 50)]
)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 49])
def test_a_token_counts_once_and_with_overlap_all_but_the_first_do(length, stride, size):
    found = list(windows(list(range(length)), size, stride))
    counted = [token for window in found for token in window.ids[-window.counted :]]
    assert sorted(set(counted)) == counted
    lost = set(range(0, length, stride)) if stride == size else {0}
    assert counted == [token for token in range(length) if token not in lost]
    assert all(window.counted < len(window.ids) <= size for window in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of --text"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: there is no such file"),
        (["--text", "text.txt", "--window", "65"], "--window 65: a sequence can have 64 tokens"),
        (["--text", "text.txt", "--window", "1"], "--window 1: expected at least 2 tokens"),
        (["--text", "text.txt", "--window", "8", "--stride", "9"], "--stride 9: windows of 8 tokens would leave"),
        (["--text", "text.txt", "--stride", "65"], "--stride 65: windows of 64 tokens would leave"),
        (["--text", "text.txt", "--logits", "last"], "--logits last: perplexity needs those of every token"),
        (["--text", "text.txt", "--input-ids", "1"], "--input-ids is a prompt of --golden or --golden-out"),
        (["--text", "text.txt", "--csv", "a.csv"], "--csv: a perplexity is no table"),
        (["--text", "one.txt"], "there is nothing to count"),
        (["--text", "bytes.txt"], "it is not UTF-8 text: byte 0xff at 2"),
        (["--text", "bad.jsonl"], "bad.jsonl:2: expected a text"),
        (["--text", "."], "--text .: it is a directory"),
        (["--text", "text.txt", "--memory", "400KiB", "--window", "64"], "needs at least"),
    ],
)
def test_a_mistake_is_one_message_and_code_1(checkpoint, capsys, monkeypatch, words, message):
    monkeypatch.chdir(checkpoint)
    Path("one.txt").write_text("w5")
    Path("bytes.txt").write_bytes(b"w1\xff")
    Path("bad.jsonl").write_text('"w1 w2"\n{"words": 3}\n')
    assert evaluate(checkpoint, *words) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_an_artifact_of_last_tokens_is_refused_by_name(checkpoint, capsys, tmp_path):
    made = [
        "compile",
        str(checkpoint / "mine.yaml"),
        "--device",
        "host",
        "--dtype",
        "float32",
        "-o",
        str(tmp_path / "a"),
    ]
    assert main(made) == 0
    words = ["eval", "--model-path", str(checkpoint), "--artifact", str(tmp_path / "a")]
    assert main([*words, "--text", str(checkpoint / "text.txt")]) == 1
    assert "compiled for logits last, and all is asked for" in capsys.readouterr().err


def test_on_an_npu_sums_are_told_to_be_repeatable_unless_the_user_says_otherwise(checkpoint, capsys, monkeypatch):
    """mindie-stack reference section 8; no NPU is here, so the command is told that one is."""
    wanted = {"LCCL_DETERMINISTIC": "1", "HCCL_DETERMINISTIC": "true", "ATB_MATMUL_SHUFFLE_K_ENABLE": "0"}
    for name in wanted:
        monkeypatch.delenv(name, raising=False)
    words = ["--text", str(checkpoint / "text.txt"), "--quiet"]
    assert evaluate(checkpoint, *words) == 0
    assert not wanted.keys() & os.environ.keys()
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    monkeypatch.setattr("llmc.runtime.measure.evaluate.on_npu", lambda device: True)
    for device in ("atlas-800i-a2", "atlas-300i-duo"):
        for name in wanted.keys() - {"HCCL_DETERMINISTIC"}:
            monkeypatch.delenv(name, raising=False)
        code = main(["eval", "--model-path", str(checkpoint), "--graph", str(checkpoint / "mine.yaml"),
                     "--dtype", "float16", "--device", device, "--allow-unsupported", *words])  # fmt: skip
        assert code == 0
        assert {name: os.environ[name] for name in wanted} == {**wanted, "HCCL_DETERMINISTIC": "false"}
    for name in wanted:
        monkeypatch.delenv(name)


def test_a_real_model_has_the_perplexity_that_transformers_gives_it(capsys, tmp_path):
    from transformers import AutoTokenizer

    checkpoint = demo_weights()
    text = Path(__file__).parents[2] / "README.md"
    words = ["eval", "--model-path", str(checkpoint), "--dtype", "float32", "--text", str(text), "--json"]
    assert main([*words, "--window", "256", "--stride", "128"]) == 0
    said = json.loads(capsys.readouterr().out)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text())["input_ids"]
    mean, count = expected(checkpoint, [ids], 256, 128)
    assert (said["tokens"], said["text_tokens"]) == (count, len(ids))
    assert count > 1000
    assert said["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
