"""Tensor parallelism: how every edge lies over the ranks, by the operators' rules; collectives where readers want R."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from llmc.compiler.atb.collective import DEVICE_COUNT
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError, Report
from llmc.compiler.ir import Graph, Node, TensorType, Weight
from llmc.compiler.ops import OPS, NoRule
from llmc.compiler.ops.core import Sharding
from llmc.compiler.sharding import WHOLE, Shard

MAKES_WHOLE = {"P": "all_reduce", "S": "all_gather"}  # letter -> the collective after which the value is R


def shard(graph: Graph, world_size: int) -> Graph:
    """R on every edge  ->  R, S(d), P by rule; P read as R gets an all_reduce, S read as R an all_gather

    A reader takes its inputs as they lie, else with sums made whole, else with all made whole; what no rule allows then
    is reported."""
    report = Report()
    types: dict[str, TensorType] = dict(graph.inputs)
    nodes: list[Node] = []
    wholes: dict[str, str] = {}  # value -> the same value whole, made once for all readers

    def whole(value: str, letters: str) -> str:
        """The value, made whole where it lies like one of these letters."""
        letter = types[value].shard.letter
        if letter not in letters:
            return value
        if value not in wholes:
            op = MAKES_WHOLE[letter]
            node = Node(name=f"{value}.{op}", op=op, inputs={"x": value}, place=graph.producer[value].place)
            OPS[op].shard(node, [types[value]], world_size)
            nodes.append(node)
            wholes[value] = node.name
            types[node.name] = replace(types[value], shard=WHOLE)
        return wholes[value]

    def place(node: Node) -> tuple[Node, Sharding]:
        """The node with inputs that its rule accepts. The first refusal is the one to tell."""
        first: NoRule | None = None
        for letters in ("", "P", "PS") if OPS[node.op].gathers else ("", "P"):
            lying = [types[v] if types[v].shard.letter not in letters else replace(types[v], shard=WHOLE)
                     for v in node.inputs.values()]  # fmt: skip
            try:
                sharding = OPS[node.op].shard(node, lying, world_size)
            except NoRule as error:
                first = first or error
                continue
            try:
                return replace(node, inputs={s: whole(v, letters) for s, v in node.inputs.items()}), sharding
            except NoRule as error:
                why = f"{first.message if first else ''}, and it cannot be made whole: {error.message}"
                raise NoRule(why, code=error.code, **error.details) from None
        assert first is not None
        raise first

    for node in graph.nodes:
        if any(value not in types for value in node.inputs.values()):
            continue  # the node that should have made it is reported
        try:
            placed, sharding = place(node)
        except NoRule as error:
            report.add(error.code, f"'{node.name}' ({node.op}): {error.message}", node.place, **error.details)
            continue
        nodes.append(with_shards(placed, sharding))
        for value, lies in zip(node.values, sharding.outputs, strict=True):
            types[value] = replace(graph.types[value], shard=lies)
    report.raise_if_any()
    outputs = {}
    for name, value in graph.outputs.items():
        try:
            outputs[name] = whole(value, "PS")
        except NoRule as error:
            report.add(error.code, f"output '{name}': {error.message}", graph.producer[value].place, **error.details)
    report.raise_if_any()
    return replace(graph, nodes=tuple(nodes), types=types, outputs=outputs, world_size=world_size)


def split_over_ranks(graph: Graph, world_size: int) -> Graph:
    """`shard`, and on refusal also the world sizes at which it would not refuse."""
    try:
        return shard(graph, world_size)
    except DiagnosticError as error:
        sizes = ", ".join(map(str, possible_sizes(graph)))
        closing = Diagnostic(
            code="E303", message=f"{graph.name} cannot be split over {world_size} ranks", needed=f"world size {sizes}"
        )
        raise DiagnosticError([*error.diagnostics, closing]) from None


def possible_sizes(graph: Graph) -> list[int]:
    """World sizes of one host over which the graph can be split."""
    sizes = [1]
    for world_size in range(2, DEVICE_COUNT + 1):
        with contextlib.suppress(DiagnosticError):
            shard(graph, world_size)
            sizes.append(world_size)
    return sizes


def with_shards(node: Node, sharding: Sharding) -> Node:
    weights = {slot: lying(weight, sharding.weights.get(slot, WHOLE)) for slot, weight in node.weights.items()}
    return replace(node, weights=weights)


def lying(weight: Weight, how: Shard) -> Weight:
    return replace(weight, type=replace(weight.type, shard=how))
