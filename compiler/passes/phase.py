"""One graph for prefill and one for decode, over the same weights."""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.ir import Graph, Shape, TensorType

PHASES = ("prefill", "decode")
LOGITS = ("last", "all")  # of which tokens of a prefill


def split_phase(graph: Graph, phase: str, logits: str = "last") -> Graph:
    """decode: T -> B (one token a sequence), so last_token is the identity and goes;  prefill: as it is, and where
    every token's logits are wanted, last_token goes there too: B -> T behind it"""
    if phase == "prefill" and logits == "last":
        return replace(graph, phase=phase)
    old, new = ("T", "B") if phase == "decode" else ("B", "T")
    same = {node.value(): node.inputs["x"] for node in graph.nodes if node.op == "last_token"}
    nodes = [
        replace(node, inputs={slot: same.get(value, value) for slot, value in node.inputs.items()})
        for node in graph.nodes
        if node.op != "last_token"
    ]
    return graph.with_nodes(
        nodes,
        phase=phase,
        inputs={name: _with_rows(t, old, new) for name, t in graph.inputs.items()},
        outputs={name: same.get(value, value) for name, value in graph.outputs.items()},
        types={value: _with_rows(t, old, new) for value, t in graph.types.items()},
    )


def _with_rows(t: TensorType, old: str, new: str) -> TensorType:
    shape: Shape = tuple(new if dim == old else dim for dim in t.shape)
    return replace(t, shape=shape)
