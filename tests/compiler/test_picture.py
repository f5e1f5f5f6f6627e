"""`llmc show --html` without a browser: the file, the library in it, and the data that the page draws."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler import files
from llmc.compiler.cli import main
from llmc.compiler.diagnostics import UserError
from llmc.compiler.listing import at_layer
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports import picture

VENDOR = Path(picture.__file__).parents[2] / "templates" / "html" / "vendor"
DAGRE = "54a503e346f93ca0bb10abe7999587e037262935687aca45eb4e4b0f64bbb578"  # of 3.1.3, dist/dagre.min.js


@pytest.fixture(scope="module")
def ranks8():
    return compile_model("llama2-13b", Options(world_size=8))


def test_the_library_is_the_released_file_with_its_licence():
    text = (VENDOR / "dagre.min.js").read_bytes()
    assert hashlib.sha256(text).hexdigest() == DAGRE
    assert "@dagrejs/dagre" in (VENDOR / "README.md").read_text()
    assert "Permission is hereby granted, free of charge" in (VENDOR / "dagre.LICENSE").read_text()


def test_the_page_holds_all_it_needs_and_the_licence(ranks8):
    text = picture.page(ranks8)
    assert (VENDOR / "dagre.LICENSE").read_text().strip() in text
    for word in ("src=", "<link", "@import", "url(", "sourceMappingURL", "fetch(", "XMLHttpRequest"):
        ours = text.replace("url(#tip", "")  # the arrow of an edge, in the page itself
        assert word not in ours, word
    assert "default-src 'none'" in text


@pytest.mark.processes
def test_the_same_model_gives_the_same_bytes(tmp_path):
    hashes = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.html"
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "llmc.compiler.cli", "show", "llama2-7b", "--html", str(path)]
        subprocess.run(command, check=True, env=env, capture_output=True)
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1


# ---- the data


def test_layers_share_drawings_and_none_is_lost(ranks8):
    data = json.loads(json.dumps(picture.picture(ranks8)))
    for phase, low in ranks8.lowered.items():
        layers = data["phases"][phase]["views"]["layers"]
        assert layers["kind_of"] == [0, *[1] * 38, 2]  # the first reads `embed`, the last is read by `norm`
        said = [
            at_layer(node["id"], i)
            for i, kind in enumerate(layers["kind_of"])
            for node in layers["kinds"][kind]["nodes"]
            if node["kind"] == "operation"
        ]
        assert said == [node.name for node in low.nodes if node.name.startswith("layers.")]


def test_a_layer_of_its_own_dtype_is_drawn_as_it_is(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: llama2-7b\nname: mine\npolicy:\n  - {nodes: layers.*.mlp.*, layers: 3, dtype: float32}\n")
    compiled = compile_model(str(path), Options(device="host"))
    data = picture.picture(compiled)
    kinds = data["model"]["blocks"]["layers"]["kind_of"]
    assert kinds.count(kinds[3]) == 1
    drawn = data["model"]["blocks"]["layers"]["kinds"][kinds[3]]["nodes"]
    assert sorted(at_layer(n["id"], 3) for n in drawn) == sorted(n for n in compiled.graph.by_name if ".3." in n)


def test_bytes_of_a_layer_are_those_of_its_published_parameters(ranks8):
    view = picture.picture(ranks8)["phases"]["decode"]["views"]["layers"]
    hidden, ffn = 5120, 13824
    weights = (4 * hidden * hidden + 3 * hidden * ffn) // 8 + 2 * hidden  # matrices over 8 ranks, norms whole
    facts = dict(view["kinds"][1]["facts"])
    assert facts["weights"] == f"{weights * 2 / 2**20:.2f} MiB"
    assert facts["cache"] == f"{2 * hidden // 8 * 2 / 1024:.1f} KiB a token"  # keys and values


# ---- the file


def test_show_writes_the_page_and_says_so(tmp_path, capsys):
    path = tmp_path / "new" / "page.html"
    assert main(["show", "llama2-7b", "--html", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: a page of llama2-7b on atlas-800i-a2, float16, paged attention")
    assert main(["show", "llama2-7b", "--html", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"ok": True, "path": str(path), "bytes": path.stat().st_size}
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("target", "reason"), [
    ("folder", "it is not a file"),
    ("file/page.html", "file is not a directory"),
    ("x" * 300, "File name too long"),
])  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_with_its_name(target, reason, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["show", "llama2-7b", "--html", str(tmp_path / target)]) == 1
    said = capsys.readouterr().err
    assert f"cannot write {tmp_path / target}: " in said
    assert reason in said
    assert "likely: " in said


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch, ranks8):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        picture.write(ranks8, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
