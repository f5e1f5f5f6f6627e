"""Lowered layers against layer graphs that the vendor's real host library accepted (folder LLMC_ATB_LAYERS)."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from llmc.compiler.atb import OPS as ATB
from llmc.compiler.ir import AtbGraph, AtbNode, evaluate
from llmc.compiler.pipeline import Options, compile_model

LAYERS = Path(os.environ.get("LLMC_ATB_LAYERS", Path(__file__).parents[2] / "../shared/data/atb-layers"))
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
FUSIONS = {"": ("swiglu",), "split-swish-mul": (), "prenorm-interlayer": ("swiglu", "add_norm")}
CASES = [
    (attention, phase, short, model, variant)
    for attention in ("paged", "flash")
    for phase in ("prefill", "decode")
    for short in DTYPES
    for model in ("llama2-7b", "smollm2-135m")
    for variant in FUSIONS
]


def recorded(attention: str, phase: str, short: str, model: str, variant: str) -> dict[str, Any] | None:
    name = f"910b-{attention}-{phase}-{short}-{model}{'-' + variant if variant else ''}.json"
    path = LAYERS / name
    return json.loads(path.read_text()) if path.exists() else None


def available() -> list:
    return [pytest.param(*case, id="-".join(filter(None, case))) for case in CASES if recorded(*case)]


@pytest.mark.skipif(not LAYERS.is_dir(), reason=f"no recorded layer graphs in {LAYERS} (set LLMC_ATB_LAYERS)")
@pytest.mark.parametrize(("attention", "phase", "short", "model", "variant"), available())
def test_a_lowered_layer_is_what_the_vendors_library_accepted(attention, phase, short, model, variant):
    reference = recorded(attention, phase, short, model, variant)
    assert reference is not None
    compiled = compile_model(model, Options(dtype=DTYPES[short], attention=attention, fusions=FUSIONS[variant]))
    graph = compiled.lowered[phase]
    nodes = [node for node in graph.nodes if node.name.startswith("layers.1.")]
    if variant == "prenorm-interlayer":  # the recorded layer starts with the norm that adds the former layer's delta
        assert nodes[0].op == "RmsNorm"
    symbols = symbols_of(reference["dims"], attention, reference["inputs"])
    ours = [described(graph, node, symbols) for node in nodes]
    theirs = [described_reference(node) for node in reference["nodes"]]
    assert ours == theirs


def test_recorded_layers_cover_both_attentions_phases_and_dtypes():
    if not LAYERS.is_dir():
        pytest.skip(f"no recorded layer graphs in {LAYERS} (set LLMC_ATB_LAYERS)")
    covered = {case[:3] for case in CASES if recorded(*case)}
    assert covered == {(a, p, d) for a in ("paged", "flash") for p in ("prefill", "decode") for d in DTYPES}


def symbols_of(dims: dict[str, Any], attention: str, inputs: dict[str, Any]) -> dict[str, int]:
    symbols = {"T": dims["tokens"], "B": dims["batch"], "P": 0}
    if attention == "paged":
        symbols["N"] = dims["cache_blocks"]
        symbols["M"] = inputs.get("block_tables", {"shape": [0, 0]})["shape"][1]
    else:
        symbols["S"] = dims["max_seq"]
    return symbols


def described(graph: AtbGraph, node: AtbNode, symbols: dict[str, int]) -> dict[str, Any]:
    ins = []
    for i, name in enumerate(node.ins):
        t = graph.tensors[name]
        ins.append([t.dtype, t.format, list(evaluate(node.views.get(i, t.shape), symbols))])
    outs = [
        [graph.tensors[n].dtype, graph.tensors[n].format, list(evaluate(graph.tensors[n].shape, symbols))]
        for n in node.outs
    ]
    return {"op": node.op, "param": plain(ATB[node.op].param(node.param)), "in": ins, "out": outs}


def described_reference(node: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in ATB[node["op"]].fields}
    param = {k: v for k, v in node["effective_param"].items() if k in known}
    if param.get("splitDim", 0) < 0:  # -1 names the last axis, which we count from the front
        param["splitDim"] += len(node["in_desc"][0][2])
    return {
        "op": node["op"],
        "param": plain(ATB[node["op"]].param(param)),
        "in": node["in_desc"],
        "out": node["out_desc"],
    }


def plain(value: Any) -> Any:
    """Parameters with floats as the library holds them, in float32."""
    if hasattr(value, "__dict__"):
        return {k: plain(v) for k, v in vars(value).items()}
    if isinstance(value, float):
        return struct.unpack("f", struct.pack("f", value))[0]
    return list(value) if isinstance(value, (list, tuple)) else value
