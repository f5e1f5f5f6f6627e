"""`llmc trace` as a user calls it: ranks, dumps, other artifacts, passes, and what it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint, variant

from llmc.compiler.cli import main

PROMPTS = ["5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20", "3,1,4,1,5,9,2,6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint `own`, one with two tensors of layer 1 exchanged, `swapped`, and its variant, `mine.yaml`."""
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder / "own", "gqa")
    (folder / "mine.yaml").write_text(variant(folder / "own"))
    shutil.copytree(folder / "own", folder / "swapped")
    file = folder / "swapped/model.safetensors"
    tensors = load_file(file)
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def words(model: Path, *more: str, weights: str = "own", prompts: bool = True) -> list[str]:
    given = ["--input-ids", *PROMPTS] if prompts else []
    return ["trace", "--model-path", str(model / weights), "--graph", str(model / "mine.yaml"), *given, *more]


def said(capsys, *command: str):
    capsys.readouterr()
    code = main([*command, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_model_that_is_right_is_all_inside_its_budgets(model, capsys):
    code, facts = said(capsys, *words(model, "--dtype", "float32"))
    assert (code, facts["ok"], facts["first"], facts["not_compared"]) == (0, True, None, [])
    assert facts["prompts"] == [{"prefill": 14, "decode": 2}, {"prefill": 6, "decode": 2}]
    assert {node["phase"] for node in facts["nodes"]} == {"prefill", "decode"}
    counts = {node["rows"] for node in facts["nodes"] if node["name"] == "embed"}
    assert counts == {20, 4}, "every token of a phase is compared, and nothing else"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_ranks_find_a_swapped_weight(model, dtype):
    command = words(model, "--reference", str(model / "swapped"), "--tp", "4", "--dtype", dtype, "--json")
    done = subprocess.run([sys.executable, "-m", "llmc.run", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    facts = json.loads(done.stdout)
    assert (facts["ok"], facts["world_size"]) == (False, 4)
    assert facts["first"]["node"] == "layers.1.mlp.gate_up"
    assert facts["first"]["place"].startswith("graphs/families/llama.yaml:")


def test_the_closing_line_names_node_place_and_token(model, capsys):
    code = main(words(model, "--reference", str(model / "swapped"), "--dtype", "float32", "--map"))
    out = capsys.readouterr().out
    assert code == 1
    assert "layers.0.attn.core  is  input of model.layers.0.self_attn.o_proj\n" in out
    closing = out.splitlines()[-1]
    assert "the first that errs is layers.1.mlp.gate_up (linear) at graphs/families/llama.yaml:" in closing
    assert "prompt " in closing


def test_layers_can_be_looked_into_one_at_a_time(model, capsys):
    more = ("--reference", str(model / "swapped"), "--dtype", "bfloat16")
    _, whole = said(capsys, *words(model, *more))
    code, facts = said(capsys, *words(model, *more, "--at-once", "1"))
    assert (code, facts["passes"]) == (1, 2)
    assert facts["first"]["node"] == whole["first"]["node"] == "layers.1.mlp.gate_up"
    names = [node["name"] for node in facts["nodes"] if node["phase"] == "prefill"]
    assert "layers.0.attn.qkv" not in names
    assert names.index("layers.0.mlp.down") < names.index("layers.1.attn.qkv") < names.index("norm.y")


def test_ranks_look_into_the_layer_where_it_begins(model):
    more = ("--reference", str(model / "swapped"), "--dtype", "float32", "--at-once", "1", "--tp", "2", "--json")
    done = subprocess.run([sys.executable, "-m", "llmc.run", *words(model, *more)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    facts = json.loads(done.stdout)
    assert (facts["passes"], facts["first"]["node"]) == (2, "layers.1.mlp.gate_up")


def test_a_dump_of_one_machine_is_compared_with_on_another(model, tmp_path, capsys):
    dump = tmp_path / "dump"
    code, facts = said(capsys, *words(model, "--dump", str(dump), "--dtype", "bfloat16", weights="swapped"))
    assert (code, facts["ok"]) == (0, True)
    assert facts["values"] == len(
        {value["name"] for value in json.loads((dump / "manifest.json").read_text())["values"]}
    )
    code, facts = said(capsys, *words(model, "--against", str(dump), "--dtype", "bfloat16", prompts=False))
    assert (code, facts["first"]["node"]) == (1, "layers.1.mlp.gate_up")
    code, facts = said(
        capsys, *words(model, "--against", str(dump), "--attention", "flash", weights="swapped", prompts=False)
    )
    assert (code, facts["ok"]) == (0, True)


def without_transformers(command: list[str]) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; sys.modules['transformers'] = None\n"  # importing it fails
        "from llmc.compiler.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)


def test_without_transformers_a_dump_is_written_and_compared_with_coarse_budgets(model, tmp_path):
    dump = str(tmp_path / "dump")
    done = without_transformers(words(model, "--dump", dump, "--dtype", "float32"))
    assert (done.returncode, done.stderr) == (0, "")
    done = without_transformers(words(model, "--against", dump, "--dtype", "float32", "--fuse", "none", prompts=False))
    assert done.returncode == 0
    assert "budgets are coarse" in " ".join(done.stderr.split())
    done = without_transformers(
        words(model, "--against", dump, "--dtype", "float32", "--json", weights="swapped", prompts=False)
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["first"]["node"] == "layers.1.mlp.gate_up"


@pytest.mark.parametrize(
    ("mine", "other", "dtype"),
    [
        ([], ["--tp", "4", "--attention", "flash"], "float32"),
        (["--fuse", "none", "--tp", "2"], [], "bfloat16"),
        (["--attention", "flash"], ["--fuse", "none"], "float16"),
    ],
    ids=["flash and four ranks", "fused and unfused", "paged and unfused"],
)
def test_another_artifact_of_the_same_model_is_the_same_model(model, mine, other, dtype, tmp_path):
    compiled = str(tmp_path / "other")
    flags = ["--device", "host", "--dtype", dtype, "--taps", "*", *other]
    assert main(["compile", str(model / "mine.yaml"), *flags, "-o", compiled]) == 0
    command = words(model, "--against", compiled, "--dtype", dtype, *mine, "--json")
    done = subprocess.run([sys.executable, "-m", "llmc.run", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:]
    facts = json.loads(done.stdout)
    assert facts["ok"]
    assert {"layers.1.attn.core", "logits"} < {node["name"] for node in facts["nodes"]}
    assert "of other" in facts["with"]


def test_an_artifact_without_taps_is_refused_with_what_to_do(model, tmp_path, capsys):
    assert main(["compile", str(model / "mine.yaml"), "--device", "host", "-o", str(tmp_path / "plain")]) == 0
    command = ["trace", "--model-path", str(model / "own"), "--artifact", str(tmp_path / "plain"), "--input-ids", "1,2"]
    code, facts = said(capsys, *command)
    assert code == 1
    assert "--taps" in facts["problems"][0]["likely"]


@pytest.mark.parametrize("harm", ["values", "manifest", "missing", "prompts"])
def test_a_dump_that_is_damaged_or_of_other_prompts_is_refused(model, harm, tmp_path, capsys):
    dump = tmp_path / "dump"
    assert main(words(model, "--dump", str(dump), "--dtype", "float32")) == 0
    (file,) = dump.glob("*.safetensors")
    prompts = False
    match harm:
        case "values":
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        case "manifest":
            (dump / "manifest.json").write_text('{"kind": "llmc trace", "format": 1, "files": {}}')
        case "missing":
            file.unlink()
        case "prompts":
            prompts = True
    more = ["--decode-steps", "1"] if prompts else []
    code, facts = said(capsys, *words(model, "--against", str(dump), *more, prompts=prompts))
    assert code == 1
    assert str(dump) in facts["problems"][0]["message"]


def test_a_directory_that_is_not_empty_is_not_written_over(model, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, facts = said(capsys, *words(model, "--dump", str(tmp_path)))
    assert code == 1
    assert str(tmp_path) in facts["problems"][0]["message"]
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_what_does_not_fit_the_memory_is_looked_into_layer_by_layer(model, capsys, monkeypatch):
    from llmc.runtime.measure import trace

    monkeypatch.setattr(trace, "free_memory", lambda: 3 * 205_000 + 2 * 300_000)  # transformers, and some values
    more = ("--reference", str(model / "swapped"), "--dtype", "float32")
    code, facts = said(capsys, *words(model, *more))
    assert (code, facts["passes"], facts["first"]["node"]) == (1, 2, "layers.1.mlp.gate_up")


def test_answers_that_are_not_numbers_are_null_in_json(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model / "own", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    command = words(model, "--dtype", "float32", "--reference", str(model / "own"))
    command[2] = str(broken)
    code, facts = said(capsys, *command)
    assert (code, facts["first"]["node"], facts["first"]["relative"]) == (1, "layers.1.attn.o", None)


def test_nodes_of_another_dtype_are_compared_too(model, tmp_path, capsys):
    graph = tmp_path / "mixed.yaml"
    policy = 'policy: [{nodes: "*norm", dtype: float32}, {nodes: lm_head, dtype: float32}]\n'
    graph.write_text((model / "mine.yaml").read_text() + policy)
    command = words(model, "--dtype", "bfloat16")
    command[4] = str(graph)
    code, facts = said(capsys, *command)
    assert (code, facts["ok"], facts["not_compared"]) == (0, True, [])
