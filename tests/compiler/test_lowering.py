"""Lowered layers against layer graphs that the vendor's real host library accepted (folder LLMC_ATB_LAYERS)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.ir import AtbGraph, AtbNode, evaluate
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model

LAYERS = Path(os.environ.get("LLMC_ATB_LAYERS", Path(__file__).parents[2] / "../shared/data/atb-layers"))
RECORDED = pytest.mark.skipif(not LAYERS.is_dir(), reason=f"no recorded layer graphs in {LAYERS} (set LLMC_ATB_LAYERS)")
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}

# Biases on q, k and v; no model of the catalogue has them.
QKV_BIASES = """
blocks:
  attention:
    nodes:
      qkv:
        parts:
          q: {bias: "model.layers.{i}.self_attn.q_proj.bias"}
          k: {bias: "model.layers.{i}.self_attn.k_proj.bias"}
          v: {bias: "model.layers.{i}.self_attn.v_proj.bias"}
"""
QWEN2_7B = (
    "extends: families/llama\nname: qwen2-7b\nsizes: {vocab: 152064, hidden: 3584, ffn: 18944, layers: 2, heads: 28, "
    "kv_heads: 4, max_positions: 32768, eps: 1.0e-6}" + QKV_BIASES
)


def two_layers(name: str) -> str:
    """A model of the catalogue without its equal layers."""
    return f"extends: {name}\nname: two-layers\nsizes: {{layers: 2}}\n"


# Model of the recorded name -> YAML and world size.
MODELS = {
    "llama2-7b": (two_layers("llama2-7b"), 1),
    "smollm2-135m": (two_layers("smollm2-135m"), 1),
    "llama2-70b-tp8": (two_layers("llama2-70b"), 8),
    "llama-33b-tp8": (two_layers("llama-33b"), 8),
    "qwen2-7b-tp4": (QWEN2_7B, 4),
}
# Recorded variant -> options that give it.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {"fusions": ("swiglu",)},
    "split-swish-mul": {"fusions": ()},
    "prenorm": {"fusions": ("swiglu", "add_norm")},
    "prenorm-interlayer": {"fusions": ("swiglu", "add_norm")},
    "allreduce-hccl": {"fusions": ("swiglu",), "backend": "hccl"},
    "linearparallel-lcoc": {"fusions": ("swiglu", "linear_all_reduce")},
    "qkv-bias": {"fusions": ("swiglu",)},
}
CASES = [
    (attention, phase, short, model, variant)
    for attention in ("paged", "flash")
    for phase in ("prefill", "decode")
    for short in DTYPES
    for model in MODELS
    for variant in VARIANTS
]
ENDS = [
    (kind, phase, short, backend)
    for kind in ("embedding", "head")
    for phase in ("prefill", "decode")
    for short in DTYPES
    for backend in ("lccl", "hccl")
]


def recorded(*words: str) -> dict[str, Any] | None:
    path = LAYERS / f"910b-{'-'.join(filter(None, words))}.json"
    return json.loads(path.read_text()) if path.exists() else None


def available() -> list:
    return [pytest.param(*case, id="-".join(filter(None, case))) for case in CASES if recorded(*case)]


def lowered(text: str, phase: str, folder: Path, **options: Any) -> AtbGraph:
    path = folder / "model.yaml"
    path.write_text(text)
    return compile_model(str(path), Options(**options)).lowered[phase]


@RECORDED
@pytest.mark.parametrize(("attention", "phase", "short", "model", "variant"), available())
def test_a_lowered_layer_is_what_the_vendors_library_accepted(attention, phase, short, model, variant, tmp_path):
    reference = recorded(attention, phase, short, model, variant)
    assert reference is not None
    text, world_size = MODELS[model]
    options = {"dtype": DTYPES[short], "attention": attention, "world_size": world_size, **VARIANTS[variant]}
    graph = lowered(text, phase, tmp_path, **options)
    # Layer 0 starts with a plain norm; with prenorm, later ones start with the norm that adds the former layer's delta.
    nodes = [node for node in graph.nodes if node.name.startswith("layers.0." if variant == "prenorm" else "layers.1.")]
    if variant == "prenorm-interlayer":
        assert nodes[0].op == "RmsNorm"
    theirs = reference["nodes"]
    if variant == "prenorm":  # recorded as a layer for itself: its last sum is in our next layer's first norm
        *theirs, last = theirs
        assert last["op"] == "Elewise"
    assert_equal(graph, nodes, theirs, symbols_of(reference["dims"], attention, reference["inputs"]))


@RECORDED
@pytest.mark.parametrize(("kind", "phase", "short", "backend"), ENDS)
def test_a_lowered_embedding_or_head_over_ranks_is_what_the_vendors_library_accepted(
    kind, phase, short, backend, tmp_path
):
    reference = recorded(kind, phase, short, "llama2-70b-tp8", backend)
    assert reference is not None
    text = two_layers("llama2-70b") + "graph: {embed: {tp: hidden}}\n"
    graph = lowered(text, phase, tmp_path, dtype=DTYPES[short], world_size=8, fusions=(), backend=backend)
    first = ("embed",) if kind == "embedding" else ("norm", "last", "lm_head")
    nodes = [node for node in graph.nodes if node.name.split(".")[0] in first]
    dims = reference["dims"]
    assert_equal(graph, nodes, reference["nodes"], {"T": dims["tokens"], "B": dims["batch"]})


def test_recorded_layers_cover_attentions_phases_dtypes_and_forms_of_the_sum_over_ranks():
    if not LAYERS.is_dir():
        pytest.skip(f"no recorded layer graphs in {LAYERS} (set LLMC_ATB_LAYERS)")
    found = [case for case in CASES if recorded(*case)]
    everywhere = {(a, p, d) for a in ("paged", "flash") for p in ("prefill", "decode") for d in DTYPES}
    assert {case[:3] for case in found} == everywhere
    assert {case[:3] for case in found if MODELS[case[3]][1] > 1} == everywhere
    assert {case[4] for case in found if MODELS[case[3]][1] > 1} == {
        "", "prenorm", "allreduce-hccl", "linearparallel-lcoc", "qkv-bias",
    }  # fmt: skip


def assert_equal(graph: AtbGraph, nodes: Sequence[AtbNode], theirs: Sequence[dict], symbols: dict[str, int]) -> None:
    """Operations, effective parameters, and the descs of inputs and outputs."""
    ours = [described(graph, node, symbols) for node in nodes]
    assert ours == [described_reference(node) for node in theirs]


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


@pytest.mark.parametrize("parts", [4, 5, 40])
def test_what_atb_cannot_split_is_told_once_for_all_layers(parts, tmp_path):
    rows = ", ".join(f"p{i}: {{out: hidden}}" for i in range(parts))
    nodes = f'qkv: {{op: linear, x: x, weight: "l.{{i}}.w", parts: {{{rows}}}}}, '
    nodes += "core: {v: qkv.p3}, rope: {q: qkv.p0, k: qkv.p1}"
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: llama2-7b\nname: mine\nblocks: {{attention: {{nodes: {{{nodes}}}}}}}\n")
    with pytest.raises(DiagnosticError) as caught:
        compile_model(str(path), Options(device="host"))
    assert [d.code for d in caught.value.diagnostics] == ["E402"]
    assert f"2 or 3 parts, not {parts}" in str(caught.value)


def described_reference(node: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in ATB[node["op"]].fields}
    param = {k: v for k, v in node["effective_param"].items() if k in known}
    if param.get("hcclComm") == 0:  # null
        param["hcclComm"] = None
    if param.get("backend") == "hccl":  # takes any text; the recorded graphs say "tp", ours what lccl takes as well
        assert param["commDomain"] == "tp"
        param["commDomain"] = "0"
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
