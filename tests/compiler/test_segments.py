"""Segments keep libatb's limits and compute what the flat graph computes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import generated
import pytest
import yaml

from llmc.compiler.artifact import files_of, make_manifest
from llmc.compiler.diagnostics import UserError
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports import show

LAYERS = Path(os.environ.get("LLMC_ATB_LAYERS", Path(__file__).parents[2] / "../shared/data/atb-layers"))
MODES = [(a, f) for a in ("paged", "flash") for f in ((), ("swiglu",), ("swiglu", "add_norm"))]


@pytest.mark.parametrize(("attention", "fusions"), MODES, ids=str)
@pytest.mark.parametrize("model", ["llama2-7b", "llama2-70b", "smollm2-135m"])
def test_every_segment_keeps_the_limits_and_no_layer_is_lost(model, attention, fusions):
    compiled = compile_model(model, Options(attention=attention, fusions=fusions))
    for phase, parts in compiled.segments.items():
        assert all(count <= 256 for part in parts for count in part.counts.values())
        nodes = [node for part in parts for node in part.graph.nodes]
        assert [n.name for n in nodes] == [n.name for n in compiled.lowered[phase].nodes]


REUSED = "intermediate names reused by every layer"
# Chip -> device and the fusions of its plain layer.
CHIPS = {"910B": ("atlas-800i-a2", ("swiglu",)), "310P": ("atlas-300i-duo", ())}


def recorded() -> list:
    """The rows of segments.json whose layers are ours: float, plain, the same names in every layer."""
    if not LAYERS.is_dir():
        return []
    rows = json.loads((LAYERS / "segments.json").read_text())["rows"]
    found = []
    for row in rows:
        case, _, how = row["case"].partition(", ")
        if how == REUSED and "w8a8" not in case and "int8" not in case:
            ranks = 8 if "rank of tp8" in case else 1
            attention, phase = case.replace(" with AllReduce", "").split(" ")[-2:]
            found.append(pytest.param(row, ranks, attention, phase, id=f"{row['chip']}-{attention}-{phase}-{ranks}"))
    return found


@pytest.mark.parametrize(("row", "ranks", "attention", "phase"), recorded())
def test_a_segment_holds_as_many_layers_as_the_vendors_library_accepted(row, ranks, attention, phase):
    """With the counts of the library's graph; RoPE's lengths are one input more here."""
    device, fusions = CHIPS[row["chip"]]
    options = Options(device=device, dtype="float16", attention=attention, world_size=ranks, fusions=fusions,
                      allow_unsupported=True)  # fmt: skip
    parts = compile_model("llama2-70b", options).segments[phase]
    whole = [part for part in parts if all(label.startswith("layers.") for label in part.layers)]
    longest = max(whole, key=lambda part: len(part.layers))
    assert len(longest.layers) == row["max_layers"]
    counts = {**longest.counts, "inputs": longest.counts["inputs"] - 1}
    assert [counts[kind] for kind in ("nodes", "inputs", "outputs")] == [row["nodes"], row["inputs"], row["outputs"]]
    assert counts["internals"] <= 256  # names are given up only where the limit asks for it
    assert longest.bound_by == ("nodes",)
    assert row["one_more"]["nodes"] > 256


def test_recorded_segments_cover_both_chips_attentions_and_phases():
    if not LAYERS.is_dir():
        pytest.skip(f"no recorded layer graphs in {LAYERS} (set LLMC_ATB_LAYERS)")
    assert len({param.id for param in recorded()}) == 9


@pytest.mark.parametrize(
    ("layers", "limit", "words"),
    [(0, "nodes", "one more exceeds 256 nodes"), (8, "layers-per-segment", "one more exceeds --layers-per-segment")],
)
def test_manifest_and_reports_say_which_limit_binds(layers, limit, words):
    compiled = compile_model("llama2-7b", Options(layers_per_segment=layers))
    for phase, parts in compiled.segments.items():
        told = [part["bound_by"] for part in make_manifest(compiled)["phases"][phase]["segments"]]
        assert told == [[limit]] * (len(parts) - 1) + [["end"]]
        assert [part["bound_by"] for part in show.summary(compiled)["segments"][phase]] == told
        assert (
            f"{phase} {len(compiled.lowered[phase].nodes)} operations in {len(parts)} segments (bound by {limit})"
            in (show.summary_line(compiled))
        )
    assert show.show_model(compiled).count(words) == sum(len(parts) - 1 for parts in compiled.segments.values())
    assert show.show_model(compiled).count("the model ends") == len(compiled.segments)


def test_inputs_and_internals_bind_where_it_is_they_that_are_exceeded(tmp_path):
    many_weights = {
        f"n{n}": {"op": "linear", "x": f"n{n - 1}" if n else "x", "out": 32,
                  "weight": f"l.{{i}}.{n}.w", "bias": f"l.{{i}}.{n}.b"}
        for n in range(10)
    }  # fmt: skip
    layers = {"layers": {"repeat": 40, "carry": {"x": "embed"}, "nodes": many_weights, "next": {"x": "n9"}}}
    assert bound_by(tmp_path, layers, last="layers.x") == {"inputs"}

    outside: dict[str, dict] = {}  # outside layers every value has a name of its own: 4 nodes make 6 here
    before = "embed"
    for n in range(80):
        parts = {part: {"out": 32, "weight": f"{n}.{part}"} for part in "abc"}
        outside[f"n{n}"] = {"op": "linear", "x": before, "parts": parts}
        outside[f"s{n}"] = {"op": "add", "a": f"n{n}.a", "b": f"n{n}.b"}
        before = f"t{n}"
        outside[before] = {"op": "add", "a": f"s{n}", "b": f"n{n}.c"}
    assert bound_by(tmp_path, outside, last=before) == {"internals"}


def bound_by(folder: Path, nodes: dict[str, dict], last: str) -> set[str]:
    """The limits that cut a model of these nodes between an embedding and a head."""
    embed = {"op": "embedding", "ids": "token_ids", "rows": 64, "width": 32, "weight": "embed"}
    head = {"op": "linear", "x": last, "out": 64, "weight": "head"}
    model = {"name": "cut", "dtype": "float16", "inputs": ["token_ids"], "sizes": {"max_positions": 64},
             "graph": {"embed": embed, **nodes, "head": head}, "outputs": {"logits": "head"}}  # fmt: skip
    path = folder / "cut.yaml"
    path.write_text(yaml.safe_dump(model, sort_keys=False))
    parts = [part for parts in compile_model(str(path), Options()).segments.values() for part in parts]
    assert len(parts) > 2
    return {limit for part in parts for limit in part.bound_by} - {"end"}


def test_equal_segments_share_one_function():
    compiled = compile_model("llama2-70b", Options())
    text = files_of(compiled)["decode.py"]
    assert text.count("\ndef segment_") == 3 < len(compiled.segments["decode"])


def test_layers_per_segment_can_be_chosen():
    compiled = compile_model("llama2-7b", Options(layers_per_segment=8))
    layers = [sum(label.startswith("layers.") for label in p.layers) for p in compiled.segments["prefill"]]
    assert layers == [8, 8, 8, 8]


def test_every_weight_cache_and_step_input_is_bound_by_exactly_one_name():
    compiled = compile_model("smollm2-135m", Options())
    for phase, parts in compiled.segments.items():
        flat = compiled.lowered[phase]
        bound = {name for part in parts for name in part.inputs}
        assert set(flat.inputs) <= bound
        assert {name for part in parts for name in part.outputs} >= set(flat.outputs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(device="atlas-900"), "unknown device"),
        (Options(dtype="float32"), "float32"),
        (Options(attention="ring"), "attention"),
        (Options(fusions=("everything",)), "unknown fusion"),
        (Options(world_size=3), "world size 3 .offered: 1, 2, 4, 8"),
        (Options(world_size=9, allow_unsupported=True), "world size 9 is not possible"),
        (Options(world_size=2, backend="nccl"), "backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_the_device_lacks_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        compile_model("llama2-7b", options)


def test_values_that_share_a_name_are_of_one_size_and_one_is_dead_before_the_other_is_made(tmp_path):
    path = tmp_path / "mixed.yaml"
    rule = '{nodes: "layers.*.mlp.*", layers: "0-1", dtype: float32}'
    path.write_text(f"extends: smollm2-135m\nname: mixed\npolicy: [{rule}]\n")
    for model in (str(path), "llama2-7b", "llama2-70b"):
        for phase, text in modules(compile_model(model, Options())):
            for graph, part in zip(generated.recorded(text), phase, strict=True):
                flat, names = part.graph, {}
                shared = 0
                for node, told in zip(flat.nodes, graph.nodes, strict=True):
                    read = {names[name]: name for name in node.ins if name in names}
                    for name, at in zip(node.ins, told.ins, strict=True):
                        assert name not in names or graph.views.get(at, (at,))[0] == names[name]
                    for name, at in zip(node.outs, told.outs, strict=True):
                        if name in part.outputs or flat.tensors[name].role != "internal":
                            continue
                        before = next((n for n, place in names.items() if place == at), name)
                        shared += before != name
                        assert flat.tensors[before].form == flat.tensors[name].form
                        assert at not in read
                        names.pop(before, None)
                        names[name] = at
                assert shared or len(flat.nodes) < 200


def modules(compiled):
    """Segments and generated module of each phase."""
    files = files_of(compiled)
    return [(parts, files[f"{phase}.py"]) for phase, parts in compiled.segments.items()]
