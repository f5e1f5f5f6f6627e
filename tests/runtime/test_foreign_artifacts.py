"""Artifacts that somebody changed: a message or an answer, never a traceback. Needs torch and transformers."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.cli import main

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**12, 10**30, -(2**63), 1.5, float("nan"), float("inf"), "", "x", "../x.py",
    "/etc/passwd", "\x1b[31m", "\ud800", [], [1], [[]], {}, {"a": 1}, "N", "B", "P", "float16", "int8", "nz", "S(1)",
    "0-99999",
)  # fmt: skip


def forge(path: Path, manifest: Any) -> None:
    """A manifest that fits its own hash, as whoever writes artifacts can make one."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "sha256": digest}))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def mutate(manifest: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        every = list(places(changed))
        # Operations and memory make most of a manifest: each part has its turn.
        part = draw.choice(list(changed))
        inside = [(c, k) for c, k in places({part: changed[part]})]
        container, key = draw.choice(inside if len(inside) > 1 and draw.random() < 0.8 else every)
        if isinstance(container, dict) and list(container) == [part]:
            container = changed
        match draw.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[draw.randrange(len(container))]))
            case 1:
                container[draw.choice(("x", "", "\x1b", "__class__"))] = copy.deepcopy(container.pop(key))
            case 2 if type(container[key]) in (int, float):
                container[key] += draw.choice((-1, 1, 0.5, 10**9))
            case 3:
                other, there = draw.choice(every)
                container[key] = copy.deepcopy(other[there]) if isinstance(other, list) or there in other else None
            case _:
                container[key] = copy.deepcopy(draw.choice(STRANGE))
    return changed


@pytest.fixture(scope="module", params=["paged", "flash"])
def compiled(request, checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / request.param
    words = ["--device", "host", "--dtype", "float32", "--attention", request.param, "--layers-per-segment", "2"]
    assert main(["compile", str(checkpoint / "mine.yaml"), *words, "-o", str(path)]) == 0
    return path


@pytest.fixture
def written(compiled, tmp_path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "artifact"))


def run(checkpoint: Path, path: Path, *more: str) -> int:
    words = ["--input-ids", "1,5,9", "--max-output-length", "2", "--ignore-eos", "--json"]
    return main(["run", "--model-path", str(checkpoint), "--artifact", str(path), *words, *more])


def check(checkpoint: Path, path: Path, whole: Path, capsys, what: object) -> int:
    """Every way in: a message or an answer."""
    codes = set()
    for command in (lambda: main(["diff", str(path), str(whole)]), lambda: run(checkpoint, path)):
        try:
            codes.add(command())
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        said = capsys.readouterr()
        assert "Traceback" not in said.err, what
        assert len(said.err) < 5_000, what
    assert codes <= {0, 1}, what
    return max(codes)


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_manifest_gives_a_message_or_an_answer(seed, written, compiled, checkpoint, capsys):
    manifest = json.loads((written / "manifest.json").read_text())
    forge(written / "manifest.json", mutate(manifest, random.Random(seed)))
    check(checkpoint, written, compiled, capsys, seed)


def recode(path: Path, text: str) -> None:
    """Another prefill.py, with the hashes that belong to it."""
    (path / "prefill.py").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["prefill.py"] = hashlib.sha256(text.encode()).hexdigest()
    forge(path / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def build(", "SyntaxError"),
        ("x = 1", "'build'"),
        ("def build(): pass", "TypeError"),
        ("def build(atb, *ranks): return []", "builds 0 operations; the manifest has 1 segments"),
        ("def build(atb, *ranks): raise OSError('no')", "OSError: no"),
        (
            "class A:\n  def forward(self, inputs): return []\ndef build(atb, *ranks): return [A()]",
            "prefill cannot run",
        ),
    ],
)
def test_code_that_does_not_fit_the_manifest_is_told_with_its_place(code, words, written, checkpoint, capsys):
    recode(written, code)
    assert run(checkpoint, written) == 1
    said = json.loads(capsys.readouterr().out)["problems"][0]["message"]
    assert words in said
    assert str(written) in said


def test_what_runs_is_the_text_that_was_compared_with_its_hash(written):
    from llmc.compiler.artifact import read
    from llmc.runtime.executor import load_module

    whole = read(written)
    (written / "prefill.py").write_text("raise SystemExit('changed after it was read')")
    assert "build" in load_module(whole, "prefill.py")


def test_a_model_without_attention_is_refused_by_name(written, checkpoint, capsys):
    manifest = json.loads((written / "manifest.json").read_text())
    manifest["caches"] = {}
    for phase in manifest["phases"].values():
        for part in phase["segments"]:
            part["inputs"] = [name for name in part["inputs"] if "cache" not in name]
            part["in_place"] = []
    forge(written / "manifest.json", manifest)
    assert run(checkpoint, written) == 1
    assert "without attention" in capsys.readouterr().out


def test_a_model_without_a_size_called_vocab_runs(written, checkpoint, capsys):
    manifest = json.loads((written / "manifest.json").read_text())
    del manifest["sizes"]["vocab"]
    forge(written / "manifest.json", manifest)
    assert run(checkpoint, written) == 0
