"""Segments keep libatb's limits and compute what the flat graph computes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from llmc.compiler.diagnostics import UserError
from llmc.compiler.pipeline import Options, compile_model

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


@pytest.mark.parametrize(
    ("world_size", "case"), [(1, "llama2-7b float16 paged"), (8, "llama2-70b rank of tp8 float16")]
)
def test_a_segment_holds_as_many_layers_as_the_vendors_library_accepted(world_size, case):
    """segments.json, names reused (paged prefill, 910B): 19 layers of 13 nodes; 17 with the two AllReduce of a rank."""
    if not LAYERS.is_dir():
        pytest.skip(f"no recorded layer graphs in {LAYERS} (set LLMC_ATB_LAYERS)")
    rows = json.loads((LAYERS / "segments.json").read_text())["rows"]
    accepted = max(
        row["max_layers"]
        for row in rows
        if row["chip"] == "910B" and row["case"].startswith(f"{case} ") and "prenorm" not in row["case"].lower()
    )
    compiled = compile_model("llama2-70b", Options(world_size=world_size, allow_unsupported=True, fusions=("swiglu",)))
    whole = [p for p in compiled.segments["prefill"] if all(label.startswith("layers.") for label in p.layers)]
    assert max(len(p.layers) for p in whole) == accepted


def test_equal_segments_share_one_function():
    compiled = compile_model("llama2-70b", Options())
    parts = compiled.segments["decode"]
    assert len({part.code for part in parts}) < len(parts)


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


def test_layers_of_two_dtypes_do_not_share_a_tensor(tmp_path):
    path = tmp_path / "mixed.yaml"
    rule = '{nodes: "layers.*.mlp.*", layers: "0-1", dtype: float32}'
    path.write_text(f"extends: smollm2-135m\nname: mixed\npolicy: [{rule}]\n")
    for parts in compile_model(str(path), Options()).segments.values():
        first = parts[0].graph
        dtypes = {name: t.dtype for name, t in first.tensors.items() if name.startswith("mlp.gate_up")}
        assert sorted(dtypes.values()) == ["bfloat16", "float32"]
