"""Types: the dtype of the model, and shape and dtype of every edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from llmc.compiler.diagnostics import Report
from llmc.compiler.ir import Graph, Node, TensorType, Weight
from llmc.compiler.ops import OPS, NoRule


def apply_dtypes(graph: Graph) -> Graph:
    """weights of node n: model dtype  ->  dtype of the first `policy:` rule that names n; casts around such nodes"""
    if not graph.policy:
        return graph
    nodes: list[Node] = []
    casts: dict[tuple[str, str], str] = {}
    made = {value: node_dtype(graph, node) for node in graph.nodes for value in node.values}

    def cast(value: str, dtype: str, reader: Node) -> str:
        """The value in that dtype; the cast node is shared by all readers."""
        if made.get(value, dtype) == dtype:
            return value
        if (value, dtype) not in casts:
            casts[value, dtype] = name = f"{value}.{dtype}"
            nodes.append(Node(name=name, op="cast", inputs={"x": value}, attrs={"to": dtype}, place=reader.place))
        return casts[value, dtype]

    for node in graph.nodes:
        dtype = node_dtype(graph, node)
        inputs = {slot: cast(value, dtype, node) for slot, value in node.inputs.items()}
        weights = {slot: in_dtype(weight, dtype) for slot, weight in node.weights.items()}
        nodes.append(replace(node, inputs=inputs, weights=weights))
    return graph.with_nodes(nodes)


def in_dtype(weight: Weight, dtype: str) -> Weight:
    return replace(weight, type=replace(weight.type, dtype=dtype))


def node_dtype(graph: Graph, node: Node) -> str:
    """The dtype in which a node computes: the first rule's that fits, else the model's."""
    fits = (rule["dtype"] for rule in graph.policy if is_named(rule, node.name) and in_layers(rule, node.name))
    return next(fits, graph.dtype)


def is_named(rule: Mapping[str, Any], node: str) -> bool:
    """Does a rule of `policy:` name this node? A split follows the matmul that it splits."""
    return fnmatchcase(node.removesuffix(".split"), rule["nodes"])


def in_layers(rule: Mapping[str, Any], node: str) -> bool:
    """Is the node in the rule's range of iterations? True where the rule has none."""
    first, last = rule.get("layers", (None, None))
    layer = next((int(part) for part in node.split(".") if part.isdigit()), None)
    return first is None or (layer is not None and first <= layer <= last)


def infer_types(graph: Graph) -> Graph:
    """every edge gets shape and dtype, or all places where no rule fits are reported"""
    report = Report()
    types: dict[str, TensorType] = dict(graph.inputs)
    for node in graph.nodes:
        if any(value not in types for value in node.inputs.values()):
            continue  # the node that should have made it is reported already
        try:
            outputs = OPS[node.op].shape(node, [types[node.inputs[slot]] for slot in OPS[node.op].inputs])
        except NoRule as error:
            report.add(error.code, f"'{node.name}' ({node.op}): {error.message}", node.place, **error.details)
            continue
        types.update(zip(node.values, outputs, strict=True))
    report.raise_if_any()
    return replace(graph, types=types)


def with_dtype(graph: Graph, dtype: str) -> Graph:
    """model dtype  ->  the dtype asked for"""
    nodes = [
        replace(node, weights={slot: in_dtype(weight, dtype) for slot, weight in node.weights.items()})
        if node.weights
        else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes), dtype=dtype)
