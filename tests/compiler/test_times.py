"""`llmc show --html --times FILE`: what is read of the file, and what is told where it is of something else."""

from __future__ import annotations

import json

import pytest

from llmc.compiler.cli import main

HEAD = {
    "ok": True,
    "model": "smollm2-135m",
    "device": "host",
    "dtype": "bfloat16",
    "attention": "paged",
    "world_size": 1,
}


def profile(*operations):
    entries = [{"operations": list(names), "us": {"median": us}} for names, us in operations]
    phase = {"phase": "decode", "operations": entries, "step_ms": 2.0}
    return {"batch": 1, "prompt": 8, "answer": 4, "threads": None, "phases": [phase]}


GOOD = profile((["embed"], 1.0), (["layers.0.mlp.down", "layers.1.input_norm"], 3.0))


def show(tmp_path, said, *words):
    file = tmp_path / "times.json"
    file.write_text(said if isinstance(said, str) else json.dumps(said))
    page = tmp_path / "page.html"
    code = main(["show", "smollm2-135m", "--device", "host", "--html", str(page), "--times", str(file), *words])
    return code, page


def test_times_are_in_the_page_with_what_they_are_joined_with(tmp_path, capsys):
    code, page = show(tmp_path, {**HEAD, "profiles": [GOOD, profile()]})
    assert code == 0
    text = page.read_text()
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert data["times"]["decode"] == {
        "embed": [1.0, 0.25, []],
        "layers.0.mlp.down": [3.0, 0.75, ["layers.1.input_norm"]],
        "layers.1.input_norm": [3.0, 0.75, ["layers.0.mlp.down"]],
    }
    assert data["facts"][-1] == ["measured", "batch 1, [8,4]: a step takes 2.00 ms in decode"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "times.json: "),
        ({"ok": True}, "times.json holds no profile"),
        ([1], "times.json holds no profile"),
        ({**HEAD, "dtype": "float16", "profiles": [GOOD]}, "for another graph: dtype float16, not bfloat16"),
        ({**HEAD, "model": "x", "world_size": 2, "profiles": [GOOD]}, "model x, not smollm2-135m; world_size 2, not 1"),
        ({**HEAD, "profiles": [profile((["nothing"], 1.0))]}, "the decode graph has no operation 'nothing'"),
        ({**HEAD, "profiles": [{"phases": 3}]}, "its profile is damaged"),
        ({**HEAD, "profiles": [{"phases": [{"phase": "decode"}]}]}, "its profile is damaged"),
    ],
)
def test_a_file_of_something_else_is_told_and_nothing_is_written(tmp_path, capsys, said, message):
    code, page = show(tmp_path, said)
    assert code == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not page.exists()


def test_times_belong_to_a_page(tmp_path, capsys):
    assert main(["show", "smollm2-135m", "--times", str(tmp_path / "x.json")]) == 1
    assert "--times is for the page that --html writes" in capsys.readouterr().err
    assert main(["show", "smollm2-135m", "--html", str(tmp_path / "p.html"), "--times", str(tmp_path / "x.json")]) == 1
    assert "x.json: no such file" in capsys.readouterr().err
