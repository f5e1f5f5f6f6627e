"""Lowering for Atlas 300I DUO (Ascend 310P) against layer graphs that the vendor's host library accepted for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_lowering import LAYERS, MODELS, QKV_BIASES, RECORDED, assert_equal, symbols_of, two_layers

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.compiled import Compiled
from llmc.compiler.ir import AtbGraph
from llmc.compiler.language.build import load_model
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model

DEVICE = "atlas-300i-duo"
MATRIX = Path(__file__).parents[2] / "../shared/data/feature-matrix.yaml"

# Recorded variant -> fusions that give it. The plain layer recorded for 310P has Split, Swish and Mul.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "swiglu": ("swiglu",),
    "prenorm": ("add_norm",),
    "prenorm-interlayer": ("add_norm",),
    "qkv-bias": (),
    "mqa": (),
    "window-ignored": (),
}
# Variant of the small graphs -> first words of our nodes' names.
SMALL = {
    "embedding": ("embed",),
    "embedding+hccl": ("embed",),
    "head": ("norm", "last", "lm_head"),
    "head+hccl": ("norm", "last", "lm_head"),
    "rope_tables": ("rope",),
}
NOT_OURS = {
    "rope-in-place": "a value is never written over",
    "residual-in-place": "a value is never written over",
    "linearparallel-hccl": "product and sum in one node, but in no fused kernel: nothing is gained",
    "weights-nd": "the library would convert it in every step",
    "weights-nz-4d": "torch_npu's cast gives the other form, the 2-D shape with format nz",
    "mask-norm": "decode needs no mask",
    "qk-norm": "no operator norms heads",
    **dict.fromkeys(("alibi", "alibi-compress", "alibi-nd-mask"), "no operator with ALiBi"),
    **dict.fromkeys(("swa", "swa-cache", "swa-compress", "swa-norm"), "no operator with a sliding window"),
    **dict.fromkeys(
        ("w8a8", "w8a8-down-float", "w8a8-interlayer", "w8a8-prenorm", "w8a8-scale-uint64", "w8a8-weights-nd",
         "w8a8-weights-nz-4d", "sparse"), "no quantised operator"),
}  # fmt: skip

RECORDS: dict[str, dict[str, Any]] = {
    path.stem.removeprefix("310p-"): json.loads(path.read_text()) for path in sorted(LAYERS.glob("310p-*.json"))
}


def named(table: dict[str, Any]) -> list[str]:
    """The recorded graphs whose variant is in the table."""
    return [name for name, record in RECORDS.items() if record["variant"] in table]


Lower = Callable[..., AtbGraph]


@pytest.fixture(scope="module")
def lower(tmp_path_factory) -> Lower:
    """The lowered phase of a model's text; equal compilations are made once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple, Compiled] = {}

    def lower(text: str, phase: str, **options: Any) -> AtbGraph:
        key = (text, *sorted(options.items()))
        if key not in made:
            path = folder / "model.yaml"
            path.write_text(text)
            made[key] = compile_model(
                str(path), Options(device=DEVICE, dtype="float16", allow_unsupported=True, **options)
            )
        return made[key].lowered[phase]

    return lower


def model_of(record: dict[str, Any]) -> tuple[str, int]:
    """YAML of the recorded graph's model, with two layers, and its world size."""
    dims = record["dims"]
    if dims["model"] in MODELS:
        return MODELS[dims["model"]]
    sizes = {key: dims[key] for key in ("vocab", "hidden", "ffn", "heads", "kv_heads", "head_dim", "eps")}
    model = {"extends": "families/llama", "name": "recorded", "sizes": {**sizes, "layers": 2, "max_positions": 4096}}
    return yaml.safe_dump(model) + (QKV_BIASES if record["variant"] == "qkv-bias" else ""), 1


@RECORDED
@pytest.mark.parametrize("name", named(VARIANTS))
def test_a_lowered_layer_is_what_the_vendors_library_accepted(name, lower):
    record = RECORDS[name]
    variant, attention = record["variant"], record["attention"]
    text, world_size = model_of(record)
    graph = lower(text, record["phase"], attention=attention, world_size=world_size, fusions=VARIANTS[variant])
    # Layer 0 starts with a plain norm; with prenorm, later ones start with the norm that adds the former layer's delta.
    nodes = [node for node in graph.nodes if node.name.startswith("layers.0." if variant == "prenorm" else "layers.1.")]
    theirs = record["nodes"]
    if variant == "prenorm":  # recorded as a layer for itself: its last sum is in our next layer's first norm
        *theirs, last = theirs
        assert last["op"] == "Elewise"
    assert_equal(graph, nodes, theirs, symbols_of(record["dims"], attention, record["inputs"]))
    assert host_inputs(graph) == {n for n, t in record["inputs"].items() if t.get("host_data_required")}


def host_inputs(graph: AtbGraph) -> set[str]:
    return {name for name in graph.inputs if graph.tensors[name].host}


@RECORDED
@pytest.mark.parametrize("name", named(SMALL))
def test_a_lowered_embedding_head_or_rope_table_is_what_the_vendors_library_accepted(name, lower):
    record = RECORDS[name]
    text, world_size = model_of(record)
    if record["variant"] == "embedding+hccl":
        text += "graph: {embed: {tp: hidden}}\n"
    graph = lower(text, record["phase"], world_size=world_size, fusions=())
    nodes = [node for node in graph.nodes if node.name.split(".")[0] in SMALL[record["variant"]]]
    dims = record["dims"]
    tables = {t["shape"][0] for n, t in record["inputs"].items() if n.endswith("_table")}
    symbols = {"T": dims["tokens"], "B": dims["batch"], **({"P": tables.pop()} if tables else {})}
    assert_equal(graph, nodes, record["nodes"], symbols)


@RECORDED
def test_every_graph_recorded_for_the_chip_is_compared_or_listed_with_the_reason_why_not():
    variants = {record["variant"] for record in RECORDS.values()}
    assert variants == set(VARIANTS) | set(SMALL) | set(NOT_OURS)
    phases = {(r["attention"], r["phase"]) for n in named(VARIANTS) if (r := RECORDS[n])["dims"]["model"] in MODELS}
    assert phases == {(a, p) for a in ("paged", "flash") for p in ("prefill", "decode")}


def matrix() -> dict[str, list[int]]:
    """World sizes that the seed's feature matrix has for the device, by model."""
    if not MATRIX.is_file():
        return {}
    models = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))["models"]
    return {name: entry["seed"][DEVICE] for name, entry in models.items()}


CELLS = [(name, w, attention) for name, sizes in matrix().items() for w in sizes for attention in ("paged", "flash")]


@pytest.mark.skipif(not MATRIX.is_file(), reason=f"no feature matrix in {MATRIX.parent}")
def test_the_catalogue_offers_exactly_the_cells_of_the_feature_matrix():
    offered = {name: load_model(name).support.get(DEVICE, {}).get("tp", ()) for name in matrix()}
    assert {name: list(sizes) for name, sizes in offered.items()} == matrix()


@pytest.mark.skipif(not MATRIX.is_file(), reason=f"no feature matrix in {MATRIX.parent}")
@pytest.mark.parametrize(("name", "world_size", "attention"), CELLS)
def test_every_cell_of_the_feature_matrix_compiles(name, world_size, attention):
    compiled = compile_model(name, Options(device=DEVICE, attention=attention, world_size=world_size))
    assert (compiled.dtype, compiled.options.backend) == ("float16", "hccl")
    for phase, low in compiled.lowered.items():
        sums = [ATB[node.op].param(node.param) for node in low.nodes if node.op == "AllReduce"]
        assert len(sums) == 2 * compiled.graph.sizes["layers"]
        assert {(p.backend, p.rankSize) for p in sums} == {("hccl", world_size)}
        assert compiled.segments[phase]


def test_swiglu_is_one_operation_where_the_kernel_takes_the_width_and_else_three(lower):
    """The chip's SWIGLU wants gate and up together to be a multiple of 32 wide, on one rank."""
    wide = two_layers("llama2-7b")
    narrow = wide.replace("layers: 2", "layers: 2, ffn: 11000")  # 22000 = 687.5 * 32
    assert operations(lower(wide, "decode", world_size=1), "mlp") == ["Linear", "Activation", "Linear"]
    assert operations(lower(narrow, "decode", world_size=1), "mlp") == [
        "Linear",
        "Split",
        "Activation",
        "Elewise",
        "Linear",
    ]
    halves = wide.replace("layers: 2", "layers: 2, ffn: 16")  # 32 in all, 16 on each of two ranks
    assert "Split" not in operations(lower(halves, "decode", world_size=1), "mlp")
    assert "Split" in operations(lower(halves, "decode", world_size=2), "mlp")


def operations(graph: AtbGraph, block: str) -> list[str]:
    return [node.op for node in graph.nodes if node.name.startswith(f"layers.1.{block}.")]


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_the_manifest_says_which_tensors_the_loader_puts_into_nz(attention):
    compiled = compile_model("llama2-7b", Options(device=DEVICE, attention=attention))
    graph = compiled.lowered["prefill"]
    formats = {role: {n: t.format for n, t in graph.tensors.items() if t.role == role} for role in ROLES}
    matmuls = {name for node in graph.nodes if node.op == "Linear" for name in node.ins[1:]}
    assert {n for n, f in formats["weight"].items() if f == "nz"} == matmuls
    assert set(formats["cache"].values()) == {"nz"}
    assert {n for n, f in formats["constant"].items() if f == "nz"} == {"mask"}
    assert set(formats["internal"].values()) == set(formats["input"].values()) == {"nd"}


ROLES = ("weight", "cache", "constant", "internal", "input")
