"""What the vendor's library refuses, we refuse: when compiling where the language can ask for it, else in the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_lowering import LAYERS, RECORDED

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.collective import domain_fits
from llmc.compiler.atb.core import AtbError, Desc
from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.language.build import load_model
from llmc.compiler.language.source import catalogue
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports.legality_docs import page
from llmc.compiler.target.device import device, device_names
from llmc.compiler.target.legality import problems

ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "refusals.yaml").read_text())
SAYABLE = [name for name, entry in ENTRIES.items() if "compile" in entry]
CHIPS = {"910B": "Ascend910B", "310P": "Ascend310P"}


def vendors() -> dict[str, dict[str, Any]]:
    """The vendor's refusals by combination."""
    return {entry["combination"]: entry for entry in json.loads((LAYERS / "refusals.json").read_text())["refusals"]}


@RECORDED
def test_every_refusal_of_the_vendors_library_is_ours_or_cannot_be_asked_for():
    assert list(ENTRIES) == list(vendors())
    assert all(("compile" in entry) != ("why_not" in entry) for entry in ENTRIES.values())
    assert all("node" in entry for name, entry in ENTRIES.items() if not name.startswith("graph of"))


@RECORDED
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "node" in entry])
def test_a_refused_operation_is_refused_by_our_table_at_the_same_stage_with_the_same_code(name):
    theirs, node = vendors()[name], ENTRIES[name]["node"]
    recorded = json.loads((LAYERS / f"{node['like']}.json").read_text())
    original, chip = recorded["nodes"][node["at"]], CHIPS[recorded["chip"]]
    assert original["op"] == theirs.get("node", "6:LinearParallel").partition(":")[2]
    accept(original["op"], original["param"], descs(original, {}), chip)
    changed = {**original["param"], **node.get("param", {})}
    if node.get("runs") == "domain":
        accept(original["op"], changed, descs(original, node), chip)
        assert theirs["code"] == "NO_ERROR_BUT_LOGGED"
        assert not domain_fits(ATB[original["op"]].param(changed))
        return
    with pytest.raises(AtbError) as refused:
        accept(original["op"], changed, descs(original, node), node.get("chip", chip))
    assert (refused.value.stage, refused.value.code) == (theirs["stage"], node.get("code", theirs["code"]))


def descs(node: dict[str, Any], changes: dict[str, Any]) -> list[Desc]:
    """The inputs of a recorded operation with the changes of an entry."""
    source, target = changes.get("every_dtype", ("", ""))
    found = []
    for i, (dtype, layout, shape) in enumerate(node["in_desc"]):
        dtype = changes.get("dtypes", {}).get(i, target if dtype == source else dtype)
        layout = changes.get("formats", {}).get(i, layout)
        found.append(Desc(dtype=dtype, format=layout, shape=tuple(changes.get("shapes", {}).get(i, shape))))
    return found


def accept(name: str, values: dict[str, Any], ins: list[Desc], chip: str) -> None:
    """Create, InferShape and Setup."""
    op = ATB[name]
    param = op.param(values)
    op.create(param, chip)
    op.setup(param, ins, op.infer(param, ins, chip), chip)


@RECORDED
@pytest.mark.parametrize("name", SAYABLE)
def test_what_the_language_can_ask_for_is_refused_when_compiling_for_the_same_reason(name, tmp_path):
    asked = dict(ENTRIES[name]["compile"])
    says = asked.pop("says")
    path = tmp_path / "model.yaml"
    path.write_text(model(asked))
    fusions = tuple(asked.pop("fusions")) if "fusions" in asked else None
    with pytest.raises(UserError) as refused:
        compile_model(str(path), Options(fusions=fusions, allow_unsupported=True, **asked))
    assert says in str(refused.value)
    assert says in vendors()[name]["reason"]


def model(asked: dict[str, Any]) -> str:
    """The YAML of an entry; takes its words out of `asked`."""
    if "chain" in asked:
        return one_layer(asked.pop("chain"), {"op": "add"})
    if "weights" in asked:  # two inputs of the graph each, one node
        return one_layer(asked.pop("weights") // 2, {"op": "linear", "out": 32})
    return f"extends: {asked.pop('model')}\nname: asked\n{asked.pop('yaml', '')}\n"


def one_layer(length: int, kind: dict[str, Any]) -> str:
    """A model whose only layer is a chain of so many equal nodes."""
    nodes = {}
    before = "x"
    for n in range(length):
        weights = {"weight": f"l.{{i}}.{n}.w", "bias": f"l.{{i}}.{n}.b"}
        slots = {"a": before, "b": before} if kind["op"] == "add" else {"x": before, **weights}
        before = f"n{n}"
        nodes[before] = {**kind, **slots}
    embed = {"op": "embedding", "ids": "token_ids", "rows": 64, "width": 32, "weight": "embed"}
    layers = {"repeat": 1, "carry": {"x": "embed"}, "nodes": nodes, "next": {"x": before}}
    head = {"op": "linear", "x": "layers.x", "out": 64, "weight": "head"}
    return yaml.safe_dump({"name": "chain", "dtype": "float16", "inputs": ["token_ids"], "sizes": {"max_positions": 64},
                           "graph": {"embed": embed, "layers": layers, "head": head},
                           "outputs": {"logits": "head"}})  # fmt: skip


ROWS = [(name, row) for name in device_names() for row in device(name).legal]
REFUSED = [pytest.param(n, row, id=f"{n}-{row.axis}-{row.values[0]}") for n, row in ROWS if row.refused]


@pytest.mark.parametrize(("name", "row"), REFUSED)
def test_a_refused_row_refuses_with_its_reason_its_name_and_a_way_out(name, row):
    for value in row.values:
        choice = {row.axis: value, **{axis: values[0] for axis, values in row.when.items()}}
        (problem,) = problems(device(name), choice)
        assert row.refused in problem.message
        assert f"{row.axis} {value}" in problem.found
        assert problem.likely == row.instead != ""


@pytest.mark.parametrize(("name", "row"), [(n, row) for n, row in ROWS if not row.refused], ids=str)
def test_a_legal_row_is_legal(name, row):
    choice = {"dtype": device(name).dtypes[0], "world_size": 1, **{axis: v[0] for axis, v in row.when.items()}}
    assert not [problem for value in row.values for problem in problems(device(name), {**choice, row.axis: value})
                if row.axis != "policy"]  # fmt: skip


@RECORDED
def test_rows_that_name_a_refusal_of_the_vendor_name_one_that_exists():
    named = [word for _, row in ROWS for word in row.source.split("; ") if word.startswith(("310p-", "910b-"))]
    assert named
    assert set(named) <= set(vendors())


@RECORDED
@pytest.mark.parametrize("name", ["atlas-800i-a2", "atlas-300i-duo"])
def test_the_mask_of_a_device_is_one_that_the_vendors_library_takes(name):
    target = device(name)
    compiled = compile_model("smollm2-135m", Options(device=name, dtype="float16"))
    mask = compiled.lowered["prefill"].tensors["mask"]
    rows = json.loads((LAYERS / "masks.json").read_text())["rows"]
    form = {"format": mask.format, "shape": list(mask.shape)}
    wanted = {"mask": form, "mask_type": "NORM_COMPRESS", "phase": "prefill", "is_triu_mask": 1}
    taken = [row["accepted"] for row in rows if CHIPS[row["chip"]] == target.chip and wanted.items() <= row.items()]
    assert len(taken) > 1
    assert all(taken)


def test_all_that_is_refused_is_told_at_once():
    wrong = Options(device="atlas-300i-duo", dtype="bfloat16", attention="ring", world_size=9, backend="lccl",
                    fusions=("swiglu", "swigl", "linear_all_reduce"))  # fmt: skip
    with pytest.raises(DiagnosticError) as refused:
        compile_model("llama2-7b", wrong)
    found = [problem.found.partition(" (")[0] for problem in refused.value.diagnostics]
    assert sorted(found) == sorted([
        "dtype bfloat16", "attention ring on atlas-300i-duo", "world size 9 on atlas-300i-duo", "backend lccl",
        "fusion swigl on atlas-300i-duo", "fusion linear_all_reduce",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "own", "words"),
    [
        ("atlas-300i-duo", "float16", "bfloat16", "has no bfloat16"),
        ("atlas-800i-a2", "float16", "bfloat16", "cannot have policy bfloat16"),
        ("atlas-800i-a2", "bfloat16", "float16", "cannot have policy float16"),
    ],
)
def test_a_dtype_of_single_nodes_is_refused_at_the_node(name, dtype, own, words, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(f'extends: llama2-7b\nname: mixed\npolicy: [{{nodes: "layers.*.mlp.*", dtype: {own}}}]\n')
    with pytest.raises(DiagnosticError, match=words) as refused:
        compile_model(str(path), Options(device=name, dtype=dtype, world_size=2))
    (problem,) = refused.value.diagnostics
    assert problem.place
    assert "gate_up" in str(refused.value)  # the line that the place shows


def test_a_fusion_of_the_device_is_left_out_and_one_asked_for_is_refused_where_ranks_are_no_power_of_two():
    three = Options(world_size=3, allow_unsupported=True)
    assert compile_model("llama2-7b", three)
    with pytest.raises(UserError, match="a power of two"):
        compile_model("llama2-7b", replace(three, fusions=("linear_all_reduce",)))


def test_the_page_is_what_the_tables_say():
    stored = (Path(__file__).parents[2] / "docs/legality.md").read_text(encoding="utf-8")
    assert stored == page(), "run: python -m llmc.compiler.reports.legality_docs > docs/legality.md"


@pytest.mark.parametrize(("head_dim", "words"), [(24, "a multiple of 16"), (8, "16 to 4096"), (512, "at most 256")])
@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_head_size_that_the_kernels_of_310p_have_not_is_refused_at_its_node(head_dim, words, attention, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(f"extends: llama2-7b\nname: heads\nsizes: {{layers: 1, heads: 4, head_dim: {head_dim}}}\n")
    options = Options(device="atlas-300i-duo", attention=attention, world_size=1, allow_unsupported=True)
    with pytest.raises(DiagnosticError, match=words) as refused:
        compile_model(str(path), options)
    assert {problem.code for problem in refused.value.diagnostics} == {"E402"}
    assert all(problem.place for problem in refused.value.diagnostics)


@pytest.mark.parametrize("name", catalogue())
def test_what_the_catalogue_offers_is_legal(name):
    model = load_model(name)
    assert model.support
    for target, offer in model.support.items():
        for dtype in offer.get("dtypes", device(target).dtypes):
            for attention in offer.get("attention", device(target).attention):
                for world_size in offer["tp"]:
                    choice = {"dtype": dtype, "attention": attention, "world_size": world_size}
                    assert not list(problems(device(target), choice))
