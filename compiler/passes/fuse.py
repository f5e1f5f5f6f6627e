"""Fusions: several operators become one that ATB has a kernel for. Each is on or off by name (device, phase, flag)."""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.atb.collective import fused_param
from llmc.compiler.atb.core import Desc
from llmc.compiler.atb.elementwise import SWIGLU_FORWARD
from llmc.compiler.ir import Graph, Node, evaluate
from llmc.compiler.target.legality import refusal

SOME_TOKENS = 16  # kernels look at the width only


def fuse_swiglu(graph: Graph, chip: str) -> Graph:
    """split, silu, mul  ->  swiglu        (one rounding instead of two), where the chip's kernel takes the width"""
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
        packed = graph.types[split.inputs["x"]]
        x = Desc(dtype=packed.dtype, shape=(SOME_TOKENS, *evaluate(packed.local[1:], {})))
        if refusal(("Activation", {"activationType": SWIGLU_FORWARD}, [x]), chip):
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


def fuse_linear_all_reduce(graph: Graph, chip: str, backend: str) -> Graph:
    """linear, all_reduce  ->  linear_all_reduce     (the sum starts while the product is made)

    Without bias, and where the chip's LinearParallel takes this world size; backend "": the chip has no such kernel."""
    communicator = {"rank": 0, "rankSize": graph.world_size, "backend": backend}
    if not backend or refusal(("LinearParallel", fused_param(communicator), []), chip):
        return graph
    drop: set[str] = set()
    put: dict[str, Node] = {}
    for reduce in graph.nodes:
        linear = graph.producer.get(reduce.inputs.get("x", "")) if reduce.op == "all_reduce" else None
        if not linear or linear.op != "linear" or "bias" in linear.weights:
            continue
        if graph.consumers[linear.value()] == (reduce,):
            drop.add(linear.name)
            put[reduce.name] = replace(linear, name=reduce.name, op="linear_all_reduce", attrs={"backend": backend})
    return graph.with_nodes(put.get(node.name, node) for node in graph.nodes if node.name not in drop)


FUSIONS = ("swiglu", "add_norm", "linear_all_reduce")
