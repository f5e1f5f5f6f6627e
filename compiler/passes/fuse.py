"""Fusions: several operators become one that ATB has a kernel for. Each is on or off by name (device, phase, flag)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from llmc.compiler.ir import Graph, Node


def fuse_swiglu(graph: Graph) -> Graph:
    """split, silu, mul  ->  swiglu        (one rounding instead of two)"""
    drop: set[str] = set()
    put: dict[str, Node] = {}
    for mul in graph.nodes:
        if mul.op != "mul":
            continue
        act, split = graph.producer.get(mul.inputs["a"]), graph.producer.get(mul.inputs["b"])
        if not (act and split and act.op == "silu" and split.op == "split" and len(split.outputs) == 2):
            continue
        gate, up = split.values
        only_here = graph.consumers[gate] == (act,) and graph.consumers[up] == (mul,)
        exposed = {gate, up, act.value()} & set(graph.outputs.values())
        if act.inputs["x"] != gate or mul.inputs["b"] != up or not only_here or exposed:
            continue
        if graph.consumers[act.value()] != (mul,) or len(set(split.attrs["sizes"])) != 1:
            continue
        drop |= {act.name, split.name}
        put[mul.name] = Node(name=mul.name, op="swiglu", inputs={"x": split.inputs["x"]}, place=act.place)
    return graph.with_nodes(put.get(node.name, node) for node in graph.nodes if node.name not in drop)


def fuse_add_norm(graph: Graph) -> Graph:
    """add, rms_norm  ->  add_rms_norm     (the norm reads the sum before it is rounded)

    The add must be the norm's only source and stand before it; the sum stays available to other readers."""
    renamed: dict[str, str] = {}
    put: dict[str, Node] = {}
    drop: set[str] = set()
    for norm in graph.nodes:
        add = graph.producer.get(norm.inputs.get("x", "")) if norm.op == "rms_norm" else None
        if not add or add.op != "add" or add.name in drop or not _norm_reads_first(graph, add, norm):
            continue
        drop.add(add.name)
        put[norm.name] = replace(
            norm, op="add_rms_norm", inputs={"a": add.inputs["b"], "b": add.inputs["a"]}, outputs=("y", "sum")
        )
        renamed |= {norm.name: f"{norm.name}.y", add.name: f"{norm.name}.sum"}
    nodes = []
    for node in graph.nodes:
        if node.name in drop:
            continue
        node = put.get(node.name, node)
        nodes.append(replace(node, inputs={slot: renamed.get(v, v) for slot, v in node.inputs.items()}))
    outputs = {name: renamed.get(value, value) for name, value in graph.outputs.items()}
    types = {renamed.get(value, value): t for value, t in graph.types.items()}
    return graph.with_nodes(nodes, outputs=outputs, types=types)


def _norm_reads_first(graph: Graph, add: Node, norm: Node) -> bool:
    """No other reader of the sum stands before the norm, which will make it."""
    return graph.consumers[add.value()][0] is norm


FUSIONS: Mapping[str, Callable[[Graph], Graph]] = {"swiglu": fuse_swiglu, "add_norm": fuse_add_norm}
