"""Artifacts: complete or absent, and refused by name when damaged."""

from __future__ import annotations

import json
import os

import pytest
from llmc.compiler import artifact
from llmc.compiler.diagnostics import UserError
from llmc.compiler.pipeline import Options, compile_model


@pytest.fixture(scope="module")
def compiled():
    return compile_model("smollm2-135m", Options(device="host", dtype="float32"))


@pytest.fixture
def written(compiled, tmp_path):
    path = tmp_path / "out"
    artifact.write(compiled, path)
    return path


def test_a_written_artifact_reads_back_with_everything_named(written):
    manifest = artifact.read(written).manifest
    assert sorted(p.name for p in written.iterdir()) == ["decode.py", "manifest.json", "prefill.py"]
    for phase in ("prefill", "decode"):
        known = {*manifest["weights"], *manifest["caches"], *manifest["constants"], *manifest["inputs"]}
        for part in manifest["phases"][phase]["segments"]:
            assert set(part["inputs"]) <= known
            known |= set(part["outputs"])
        assert "logits" in known
        hosts = {n for part in manifest["phases"][phase]["segments"] for n in part["host"]}
        assert hosts == {n for n in manifest["phases"][phase]["inputs"] if manifest["inputs"][n]["host"]}


def test_tied_embeddings_are_counted_once(written):
    manifest = artifact.read(written).manifest
    assert manifest["weights"]["lm_head.weight"]["sources"] == manifest["weights"]["embed.weight"]["sources"]
    parameters = 134_515_008  # published parameter count of SmolLM2-135M
    assert manifest["memory"]["weight_bytes"] == parameters * 4


def test_writing_again_replaces_the_artifact_and_leaves_nothing_else(compiled, written):
    (written / "prefill.py").write_text("broken")
    artifact.write(compiled, written)
    artifact.read(written)
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def test_a_directory_that_is_no_artifact_is_not_overwritten(compiled, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not an artifact"):
        artifact.write(compiled, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_interrupted_write_leaves_the_old_artifact(compiled, written, monkeypatch):
    before = (written / "manifest.json").read_bytes()
    monkeypatch.setattr(
        artifact.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        artifact.write(compiled, written)
    assert (written / "manifest.json").read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def change(path, **values):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, **values}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "manifest.json").unlink(), "half-written"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "format"),
        (lambda p: change(p / "manifest.json", format=99), "newer format 99"),
        (lambda p: change(p / "manifest.json", format=0), "older or foreign format 0"),
        (lambda p: change(p / "manifest.json", dtype="float16"), "changed after it was written"),
        (lambda p: (p / "decode.py").unlink(), "decode.py is missing"),
        (lambda p: (p / "decode.py").write_text("import os"), "decode.py was changed"),
        (lambda p: os.truncate(p / "prefill.py", 100), "prefill.py was changed"),
    ],
    ids=[
        "no manifest",
        "cut manifest",
        "binary",
        "list",
        "newer",
        "older",
        "edited",
        "missing",
        "foreign code",
        "cut code",
    ],
)
def test_a_damaged_artifact_is_refused_with_its_path_and_the_reason(written, damage, words):
    damage(written)
    with pytest.raises(UserError, match=words) as error:
        artifact.read(written)
    assert str(written) in str(error.value)
