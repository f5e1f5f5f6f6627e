"""One graph for prefill and one for decode, over the same weights."""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.ir import Graph, Shape, TensorType

PHASES = ("prefill", "decode")


def split_phase(graph: Graph, phase: str) -> Graph:
    """decode: T -> B (one token a sequence), so last_token is the identity and goes;  prefill: as it is"""
    if phase == "prefill":
        return replace(graph, phase=phase)
    same = {node.value(): node.inputs["x"] for node in graph.nodes if node.op == "last_token"}
    nodes = [
        replace(node, inputs={slot: same.get(value, value) for slot, value in node.inputs.items()})
        for node in graph.nodes
        if node.op != "last_token"
    ]
    return graph.with_nodes(
        nodes,
        phase=phase,
        inputs={name: _one_token(t) for name, t in graph.inputs.items()},
        outputs={name: same.get(value, value) for name, value in graph.outputs.items()},
        types={value: _one_token(t) for value, t in graph.types.items()},
    )


def _one_token(t: TensorType) -> TensorType:
    shape: Shape = tuple("B" if dim == "T" else dim for dim in t.shape)
    return replace(t, shape=shape)
