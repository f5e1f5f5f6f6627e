"""`llmc eval --golden`: logits of transformers, and of the model itself, step by step; what passes and what fails."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.cli import main
from llmc.runtime.measure.golden import divergence

COLUMNS = ["Model", "Dataset", "Batchsize", "Logits Num", "Greatest KLL", "Error Rate", "Result"]
PROMPTS = ["1,5,9,2", "3,3,3,3,3,3,3", "7"]
STEPS = 6


@pytest.fixture(scope="module")
def goldens(checkpoint) -> Path:
    """Of transformers in float32."""
    target = checkpoint / "goldens"
    assert evaluate(checkpoint, *out(target), "--golden-from", "transformers", "--quiet") == 0
    return target


def out(target: Path) -> list[str]:
    return ["--golden-out", str(target), "--input-ids", *PROMPTS, "--max-output-length", str(STEPS)]


def evaluate(checkpoint: Path, *words: str, dtype: str = "float32") -> int:
    graph = ["--graph", str(checkpoint / "mine.yaml"), "--dtype", dtype]
    return main(["eval", "--model-path", str(checkpoint), *graph, *words])


def checked(checkpoint: Path, capsys: Any, *words: str, code: int = 0, **more: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate(checkpoint, *words, "--json", **more) == code
    return json.loads(capsys.readouterr().out)


def end(checkpoint: Path, goldens: Path) -> int:
    """Steps that count: up to each sequence's first end token (2), with it."""
    tokens = torch.stack([torch.load(goldens / f"tokens_{n}.pth") for n in range(STEPS)])
    return sum(next((n + 1 for n in range(STEPS) if tokens[n, i] == 2), STEPS) for i in range(len(PROMPTS)))


def test_what_transformers_writes_has_its_logits_and_the_layout_of_the_original(checkpoint, goldens):
    from transformers import AutoModelForCausalLM

    names = {f"{kind}_{n}.pth" for kind in ("logits", "tokens") for n in range(STEPS)}
    assert {path.name for path in goldens.iterdir()} == names | {f"input_ids_{i}.pth" for i in range(len(PROMPTS))}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for i, prompt in enumerate(PROMPTS):
        ids = [int(word) for word in prompt.split(",")]
        assert torch.load(goldens / f"input_ids_{i}.pth").tolist() == ids
        for n in range(STEPS):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(torch.load(goldens / f"logits_{n}.pth")[i], logits, rtol=1e-4, atol=1e-4)
            assert int(torch.load(goldens / f"tokens_{n}.pth")[i]) == int(logits.argmax())
            ids.append(int(logits.argmax()))


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_float32_passes_against_transformers_and_a_table_says_so(checkpoint, goldens, capsys, tmp_path, attention):
    target = tmp_path / "out.csv"
    words = ["--golden", str(goldens), "--attention", attention, "--csv", str(target)]
    said = checked(checkpoint, capsys, *words)
    assert (said["ok"], said["passed"], said["errors"]) == (True, True, 0)
    assert (said["logits"], said["batch_size"], said["dataset"]) == (end(checkpoint, goldens), 3, "goldens")
    assert 0 <= said["greatest_kl"] < 1e-8
    assert said["columns"] == COLUMNS
    head, row = csv.reader(target.open())
    assert head == COLUMNS
    assert row[:4] == ["mine", "goldens", "3", str(said["logits"])]
    assert (float(row[4]), row[5:]) == (pytest.approx(said["greatest_kl"], rel=1e-9), ["0", "Pass"])


def test_a_generation_of_one_sequence_at_a_time_is_the_same_check(checkpoint, goldens, capsys):
    assert evaluate(checkpoint, "--golden", str(goldens), "--batch-size", "1", "--dataset", "mine") == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("Pass: 0 of ")
    assert " mine " in said


def test_bfloat16_is_told_how_far_it_is_from_float32_and_where(checkpoint, goldens, capsys):
    said = checked(checkpoint, capsys, "--golden", str(goldens), dtype="bfloat16", code=1)
    assert (said["ok"], said["passed"], said["rows"][0][-1]) == (False, False, "Fail")
    assert said["greatest_kl"] > 1e-3 or said["error_rate"] > 0.005
    loose = ["--max-kl", "1", "--step-kl", "0.5"]
    again = checked(checkpoint, capsys, "--golden", str(goldens), *loose, dtype="bfloat16")
    assert again["greatest_kl"] == said["greatest_kl"]
    assert again["passed"]
    assert set(said["worst"]) == {"folder", "sequence", "step"}


def test_one_changed_step_is_found_by_its_own_kl(checkpoint, goldens, capsys, tmp_path):
    changed = shutil.copytree(goldens, tmp_path / "batch3")
    logits = torch.load(changed / "logits_1.pth")
    before = logits[2].clone()
    logits[2, 40] += 3.0
    torch.save(logits, changed / "logits_1.pth")
    said = checked(checkpoint, capsys, "--golden", str(changed), code=1)
    p, q = logits[2].double().softmax(-1), before.double().softmax(-1)
    assert said["worst"] == {"folder": str(changed), "sequence": 2, "step": 1}
    assert said["greatest_kl"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
    assert said["errors"] == 1
    assert said["error_rate"] == pytest.approx(1 / said["logits"])
    assert said["dataset"] == tmp_path.name  # as in GPU/BoolQ/batch3
    assert checked(checkpoint, capsys, "--golden", str(changed), "--max-kl", "9", code=1)["errors"] == 1
    assert checked(checkpoint, capsys, "--golden", str(changed), "--max-kl", "9", "--max-error-rate", "0.2")["passed"]


def test_our_own_run_writes_goldens_that_it_passes_exactly(checkpoint, capsys, tmp_path):
    said = checked(checkpoint, capsys, *out(tmp_path / "mine"), dtype="bfloat16")
    assert (said["sequences"], said["steps"], said["golden_from"]) == (3, STEPS, "llmc")
    said = checked(checkpoint, capsys, "--golden", str(tmp_path / "mine"), dtype="bfloat16")
    assert said["greatest_kl"] == 0
    assert torch.load(tmp_path / "mine" / "logits_0.pth").dtype == torch.bfloat16


def test_batches_in_numbered_directories_and_prompts_from_flags(checkpoint, goldens, capsys, tmp_path):
    """As the original leaves them: no prompts beside the logits."""
    for batch in range(2):
        shutil.copytree(goldens, tmp_path / "batch3" / str(batch))
        for path in (tmp_path / "batch3" / str(batch)).glob("input_ids_*"):
            path.unlink()
    words = ["--golden", str(tmp_path / "batch3")]
    assert evaluate(checkpoint, *words) == 1
    assert "input_ids_0.pth: there is no such file" in capsys.readouterr().err
    said = checked(checkpoint, capsys, *words, "--input-ids", *PROMPTS, *PROMPTS)
    assert (said["passed"], said["logits"]) == (True, 2 * end(checkpoint, goldens))
    assert evaluate(checkpoint, *words, "--input-ids", *PROMPTS) == 1
    assert "3 sequences, and 0 prompts are left" in capsys.readouterr().err
    assert evaluate(checkpoint, *words, "--input-ids", *PROMPTS, *PROMPTS, "4") == 1
    assert "1 prompts are left over" in capsys.readouterr().err


def spoil(folder: Path, name: str, value: Any) -> None:
    if isinstance(value, bytes):
        (folder / name).write_bytes(value)
    elif value is None:
        (folder / name).unlink()
    else:
        torch.save(value, folder / name)


class Payload:
    def __reduce__(self) -> Any:
        return print, ("code of a file ran",)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits_0.pth", torch.zeros(3, 65), "expected logits [3, 64]"),
        ("logits_1.pth", torch.zeros(2, 64), "logits_1.pth: expected logits [3, 64]"),
        ("logits_0.pth", b"no tensor", "cannot be read as a tensor"),
        ("logits_0.pth", {"a": torch.zeros(3)}, "expected a dense tensor; found a dict"),
        ("logits_0.pth", Payload(), "cannot be read as a tensor"),
        ("logits_0.pth", torch.full((3, 64), torch.nan), "the golden logits of sequence 0 at step 0 hold NaN"),
        ("tokens_2.pth", torch.zeros(2, dtype=torch.int64), "expected 3 token ids; found int64 [2]"),
        ("tokens_2.pth", torch.zeros(3), "expected 3 token ids; found float32 [3]"),
        ("tokens_2.pth", torch.full((3,), 64), "the token id 64; the model knows 0 to 63"),
        ("tokens_2.pth", None, "tokens_2.pth: there is no such file"),
        ("input_ids_1.pth", torch.zeros(60, dtype=torch.int64), "prompt 1 has 60 tokens"),
        ("tokens_0.pth", torch.tensor([-1, 0, 0]), "the token id -1"),
    ],
    ids=[f"{number}" for number in range(12)],
)
def test_files_that_are_not_what_they_should_be_are_named(checkpoint, goldens, capsys, tmp_path, name, value, message):
    folder = shutil.copytree(goldens, tmp_path / "bad")
    spoil(folder, name, value)
    capsys.readouterr()
    assert evaluate(checkpoint, "--golden", str(folder), "--quiet") == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert "code of a file ran" not in said.out + said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--golden", "nowhere"], "--golden nowhere: there is no such directory"),
        (["--golden", "empty"], "there is no logits_0.pth"),
        (["--golden", "empty", "--text", "a"], "--text and --golden cannot be used together"),
        (["--golden", "empty", "--stride", "4"], "--stride is for --text"),
        (["--golden", "empty", "--max-kl", "-1"], "--max-kl -1: expected 0 or more"),
        (["--golden", "empty", "--golden-from", "transformers"], "--golden-from transformers is who writes"),
        (["--golden-out", "new", "--golden-from", "vllm", "--input-ids", "1"], "expected llmc or transformers"),
        (["--golden-out", "new"], "--golden-out needs prompts"),
        (["--golden-out", "goldens", "--input-ids", "1"], "it is there already, and not empty"),
        (["--golden-out", "new", "--input-ids", "1", "--max-output-length", "64"], "prompt 0 has 1 tokens"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message_and_writes_nothing(checkpoint, goldens, capsys, monkeypatch, words, message):
    monkeypatch.chdir(checkpoint)
    Path("empty").mkdir(exist_ok=True)
    assert evaluate(checkpoint, *words) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not Path("new").exists()


def test_divergence_is_that_of_torch_and_takes_tokens_that_cannot_be():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.kl_div(
        b.double().log_softmax(-1), a.double().log_softmax(-1), log_target=True, reduction="sum"
    )
    assert divergence(a, b) == pytest.approx(expected.item(), rel=1e-12)
    assert divergence(a, a) == 0
    a[3] = b[4] = -torch.inf
    assert divergence(a, b) == float("inf")
    b[4] = 0.0
    assert 0 < divergence(a, b) < 10
