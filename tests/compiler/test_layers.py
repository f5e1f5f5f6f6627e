"""Equal layers are compiled once, with the same bytes as if every layer were compiled, and faults in one are found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import generated
import pytest

from llmc.compiler import layers
from llmc.compiler.artifact import files_of
from llmc.compiler.atb.core import GRAPH_LIMITS
from llmc.compiler.cli import main
from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.ir import AtbGraph
from llmc.compiler.options import Options
from llmc.compiler.passes.names import Place
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports import show
from llmc.compiler.verify import verify_atb, verify_graph, verify_segments

POLICY = """\
policy:
  - {nodes: "layers.*.mlp.down", layers: 5-7, dtype: float32}
  - {nodes: "layers.12.attn.o", dtype: float32}
  - {nodes: "layers.2*.mlp.*", dtype: float32}
"""
# A repeat of blocks after the layers, whose inner node is called like an outer one (the example of docs/language.md).
MORE = """\
graph:
  more:
    repeat: layers // 4
    carry: {x: layers.x}
    nodes:
      norm: {op: rms_norm, x: x, eps: eps, weight: "more.{i}.norm.weight"}
      sum: {op: add, a: x, b: norm}
    next: {x: sum}
  norm: {x: more.x}
"""
# Two values that change places in every layer: no layer is like its neighbour.
SWAPPED = """\
graph:
  layers:
    carry: {x: embed, y: embed}
    nodes: {attn_sum: {a: y}}
    next: {x: mlp_sum, y: x}
"""


def model(folder: Path, name: str, text: str = "", base: str = "smollm2-135m") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"extends: {base}\nname: {name}\n{text}")
    return str(path)


HOST = {"device": "host", "dtype": "float32"}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("", {"attention": "flash", "world_size": 3}),
        ("", {"device": "atlas-300i-duo", "dtype": "float16", "world_size": 2}),
        ("", {"fusions": (), "layers_per_segment": 4}),
        (POLICY, {**HOST, "dtype": "bfloat16"}),
        (POLICY, {**HOST, "dtype": "float16", "world_size": 2}),
        (MORE, {}),
        (MORE.replace("layers // 4", "9"), {"fusions": ()}),
        (SWAPPED, HOST),
        *((f"sizes: {{layers: {count}}}\n", {}) for count in (1, 2, 3, 4, 5, 6)),
    ],
    ids=str,
)
def test_the_files_are_those_of_compiling_every_layer(text, options, tmp_path):
    path, chosen = model(tmp_path, "one", text), Options(**options, allow_unsupported=True)
    whole, once = compile_model(path, chosen), compile_model(path, chosen, every_layer=False)
    assert files_of(once) == files_of(whole)
    assert show.summary(once) == show.summary(whole)
    assert whole.graph.size == len(whole.graph.nodes)


def test_of_80_equal_layers_few_are_compiled():
    once = compile_model("llama2-70b", Options(), every_layer=False)
    assert once.graph.size > 15 * len(once.graph.nodes)


def test_layers_are_not_left_out_where_those_at_the_ends_of_a_gap_differ():
    graph = compile_model("smollm2-135m", Options(), every_layer=False).lowered["decode"]
    assert [group.index for group in layers.groups_of(graph) if group.label] == list(range(30))
    other = [replace(n, param={"hasBias": True}) if n.name == "layers.1.attn.o" else n for n in graph.nodes]
    with pytest.raises(layers.NotPeriodic):
        layers.groups_of(replace(graph, nodes=tuple(other)))


# ---- the generated code


@pytest.mark.parametrize("text", ["", POLICY, MORE, MORE.replace("layers // 4", "1"), SWAPPED], ids=lambda t: t[:12])
@pytest.mark.parametrize("options", [{}, {"attention": "flash"}, {"world_size": 2, "fusions": ()}], ids=str)
def test_the_generated_code_builds_the_segments_node_for_node(text, options, tmp_path):
    compiled = compile_model(model(tmp_path, "one", text), Options(**HOST, **options, allow_unsupported=True))
    files = files_of(compiled)
    for phase, parts in compiled.segments.items():
        for part, graph in zip(parts, generated.recorded(files[f"{phase}.py"]), strict=True):
            assert (graph.inputs, graph.outputs) == (list(part.inputs), list(part.outputs))
            assert same_nodes(graph, part.graph)
            names = {name for node in graph.nodes for name in node.outs} - {*graph.inputs, *graph.outputs}
            assert len(names) == part.counts["internals"] <= GRAPH_LIMITS["internals"]


def same_nodes(told: generated.Recorded, graph: AtbGraph) -> bool:
    """The operations with their parameters, and what each reads and makes, whatever the places are called."""
    expected: list[Any] = []
    value: dict[str, str] = {name: name for name in graph.inputs}
    made = 0
    for node in graph.nodes:
        ins = [value[name] for name in node.ins]
        for name in node.outs:
            if name not in graph.inputs:
                value[name], made = f"%{made}", made + 1
        expected.append((node.op, ins, [value[name] for name in node.outs]))
    found = [
        (kind.removesuffix("Param"), [name[0] if isinstance(name, tuple) else name for name in ins], outs)
        for (kind, _), ins, outs in told.values()
    ]
    return found == expected


@pytest.mark.parametrize("name", ["llama2-13b", "llama2-70b"])
def test_code_for_reading_is_short(name):
    files = files_of(compile_model(name, Options(), every_layer=False))
    assert all(len(files[f"{phase}.py"].splitlines()) < 350 for phase in ("prefill", "decode"))


@pytest.mark.parametrize("text", [POLICY, MORE, MORE.replace("layers // 4", "1"), MORE.replace("layers // 4", "3")])
@pytest.mark.parametrize("options", [[], ["--tp", "2"], ["--attention", "flash", "--fuse", "none"]], ids=str)
def test_documented_files_compile(text, options, tmp_path, capsys):
    path = model(tmp_path, "mine", text)
    words = ["check", path, "--device", "host", "--allow-unsupported", "--json", *options]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


# ---- a fault in layer 37


@pytest.fixture(scope="module")
def whole():
    return compile_model("llama2-70b", Options(world_size=8))


def test_a_fault_in_a_model_graph_is_found_in_its_layer(whole):
    value = "layers.37.mlp.down.all_reduce"
    partial = whole.graph.types["layers.37.mlp.down"].shard
    types = {**whole.graph.types, value: replace(whole.graph.types[value], shard=partial)}
    with pytest.raises(DiagnosticError, match=r"layers\.37\.mlp\.down\.all_reduce"):
        verify_graph(replace(whole.graph, types=types))


def test_a_fault_in_an_atb_graph_is_found_in_its_layer(whole):
    low = whole.lowered["decode"]
    nodes = [replace(n, param={**n.param, "kvHeadNum": 3}) if n.name == "layers.37.attn.core" else n for n in low.nodes]
    with pytest.raises(DiagnosticError, match=r"'layers\.37\.attn\.core'"):
        verify_atb(replace(low, nodes=tuple(nodes)), "Ascend910B")


def test_a_place_that_is_overwritten_too_early_is_found(whole):
    part, *_ = whole.segments["decode"]
    layer = part.groups[-1].layer
    one = Place(value="mlp.gate_up")
    names = {**part.names, layer: {**part.names[layer], "mlp.gated": one, "mlp.gate_up": one}}
    with pytest.raises(DiagnosticError, match=r"where '.*' lies|holds another value"):
        verify_segments([replace(part, names=names)], "Ascend910B")


def test_a_refusal_of_one_layer_names_it(tmp_path):
    path = model(tmp_path, "mine", 'policy: [{nodes: "layers.*.mlp.act", layers: 37, dtype: float32}]\n', "llama2-70b")
    for every in (True, False):
        with pytest.raises(DiagnosticError, match=r"layers\.37\.mlp\.act"):
            compile_model(path, Options(fusions=()), every_layer=every)
