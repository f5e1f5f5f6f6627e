"""What `verify` is for: a pass that loses a sum, sums twice or cuts unevenly is found at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.ir import AtbGraph, Graph, Node
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.sharding import PARTIAL, WHOLE, Split, split_on
from llmc.compiler.verify import verify_atb, verify_graph

OPTIONS = Options(world_size=2, fusions=())


@pytest.fixture(scope="module")
def sharded() -> Graph:
    return compile_model("llama2-7b", OPTIONS, until="shard").phases["model"]


@pytest.fixture(scope="module")
def lowered() -> AtbGraph:
    return compile_model("llama2-7b", OPTIONS).lowered["prefill"]


def without(graph: Graph, name: str) -> Graph:
    """Readers of the node's value read its input."""
    source = graph.by_name[name].inputs["x"]
    nodes = [
        replace(node, inputs={slot: source if value == name else value for slot, value in node.inputs.items()})
        for node in graph.nodes
        if node.name != name
    ]
    return graph.with_nodes(nodes)


def with_second_sum(graph: Graph) -> Graph:
    first = graph.by_name["layers.0.attn.o.all_reduce"]
    again = Node(name="again", op="all_reduce", inputs={"x": first.name})
    at = graph.nodes.index(first) + 1
    return graph.with_nodes(
        (*graph.nodes[:at], again, *graph.nodes[at:]), types={**graph.types, "again": graph.types[first.name]}
    )


def with_type(graph: Graph, value: str, shard) -> Graph:
    return replace(graph, types={**graph.types, value: replace(graph.types[value], shard=shard)})


BROKEN: dict[str, Callable[[Graph], Graph]] = {
    "the sum after a row split is lost": lambda g: without(g, "layers.0.attn.o.all_reduce"),
    "a sum is made twice": with_second_sum,
    "shares of the logits are not put together": lambda g: replace(g, outputs={"logits": "lm_head"}),
    "a partial sum is called whole": lambda g: with_type(g, "layers.0.mlp.down", WHOLE),
    "a rank holds more than its share": lambda g: with_type(
        g, "layers.0.mlp.gated", split_on(1, Split(11008, 5504, ((0, 5000), (5000, 6008))))
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_graph_is_refused_when(name, sharded):
    verify_graph(sharded)
    with pytest.raises(DiagnosticError):
        verify_graph(BROKEN[name](sharded))


def test_an_atb_graph_is_refused_when_a_rank_would_read_its_own_part_of_a_sum(lowered):
    verify_atb(lowered, "Ascend910B")
    lost = "layers.0.attn.o.all_reduce"
    nodes = tuple(
        replace(node, ins=tuple("layers.0.attn.o" if n == lost else n for n in node.ins))
        for node in lowered.nodes
        if node.name != lost
    )
    with pytest.raises(DiagnosticError, match="sums over the ranks wrongly"):
        verify_atb(replace(lowered, nodes=nodes), "Ascend910B")


def test_an_atb_graph_is_refused_when_what_is_whole_is_summed(lowered):
    value = "layers.0.attn.o"
    tensors = {**lowered.tensors, value: replace(lowered.tensors[value], shard=WHOLE)}
    assert lowered.tensors[value].shard == PARTIAL
    with pytest.raises(DiagnosticError, match="sums over the ranks wrongly"):
        verify_atb(replace(lowered, tensors=tensors), "Ascend910B")
