"""Lowering: operators become ATB operations, one flat list a phase, by the rules in `compiler/ops` (`*_lower`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmc.compiler.diagnostics import Report
from llmc.compiler.ir import AtbGraph, AtbNode, Graph
from llmc.compiler.ops import OPS, NoRule
from llmc.compiler.ops.lowering import Lowering
from llmc.compiler.target.device import Device


def lower(graph: Graph, attention: str, backend: str, device: Device) -> AtbGraph:
    """operators  ->  ATB operations with host tensors, caches written in place, and views"""
    low = Lowering(graph, attention, backend, device)
    report = Report()
    lost: set[str] = set()  # values that were not made, for a reason that is told
    told = set()
    for node in graph.nodes:
        if lost.intersection(node.inputs.values()):
            lost.update(node.values)
            continue
        try:
            OPS[node.op].lower(node, low)
        except NoRule as error:
            lost.update(node.values)
            if (error.code, node.place) not in told:  # once for all layers
                told.add((error.code, node.place))
                report.add(error.code, f"'{node.name}' ({node.op}): {error.message}", node.place, **error.details)
    report.raise_if_any()
    # Outputs carry the name that the author gave them.
    names = {value: name for name, value in graph.outputs.items()}
    nodes = tuple(_rename(node, names) for node in (*low.shared, *low.nodes))
    tensors = {names.get(name, name): tensor for name, tensor in low.tensors.items()}
    return AtbGraph(
        name=graph.name,
        phase=graph.phase,
        inputs=tuple(low.inputs),
        outputs=tuple(graph.outputs),
        nodes=nodes,
        tensors=tensors,
        repeats=graph.repeats,
    )


def _rename(node: AtbNode, names: Mapping[str, str]) -> AtbNode:
    ins, outs = (tuple(names.get(n, n) for n in group) for group in (node.ins, node.outs))
    return replace(node, ins=ins, outs=outs)
