"""Segmentation: one flat list of ATB operations becomes graphs that libatb's limits allow.

A graph may have 256 inputs, 256 outputs and 256 internal tensors, and Setup works up to 256 nodes
(data/atb-layers/segments.json). Cuts fall between layers. Inside a segment names are local, so that two segments of the
same shape are the same code: layer k of the segment is `k`, intermediates are reused from layer to layer.

    layers.19.attn.qkv.weight  ->  0.attn.qkv.weight       weights and caches, by layer of the segment
    layers.19.attn.qkv         ->  attn.qkv                intermediates: every layer writes the same tensor
    layers.18.mlp.down         ->  in.mlp.down             from an earlier segment
    layers.37.mlp.down         ->  out.mlp.down            for a later one
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmc.compiler.atb.core import GRAPH_LIMITS
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError
from llmc.compiler.ir import AtbGraph, AtbNode, AtbTensor

LAYER = re.compile(r"(.*?\.\d+)\.(.*)")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One ATB graph in local names, and the model's names of its inputs and outputs in the same order."""

    graph: AtbGraph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]  # "layers.0", ... and names of nodes outside layers
    bound_by: tuple[str, ...] = ()  # limits that one group more would exceed, or "end": of the model

    @property
    def counts(self) -> dict[str, int]:
        g = self.graph
        return {
            "inputs": len(g.inputs),
            "outputs": len(g.outputs),
            "internals": len(g.internals),
            "nodes": len(g.nodes),
        }

    @cached_property
    def code(self) -> tuple:
        """What the generated function depends on: equal for segments that share one function."""
        g = self.graph
        layer = {label: k for k, label in enumerate(self.layers)}
        nodes = tuple(
            (n.op, repr(n.param), n.ins, n.outs, tuple(n.views.items()), str(n.place), layer.get(_group(n)))
            for n in g.nodes
        )
        return (g.inputs, g.outputs, nodes)


def segment(graph: AtbGraph, layers_per_segment: int = 0) -> tuple[Segment, ...]:
    """one graph of any length  ->  as few graphs as the limits allow (or at most so many layers each)"""
    groups = list(_groups(graph.nodes))
    last_use = {name: i for i, (_, nodes) in enumerate(groups) for node in nodes for name in node.ins}
    last_use |= dict.fromkeys(graph.outputs, len(groups))
    segments: list[Segment] = []
    start = 0
    while start < len(groups):
        stop, bound_by = _farthest(groups, start, layers_per_segment or len(groups))
        part = _localise(graph, groups[start:stop], last_use, stop)
        while (over := over_limits(part)) and stop > start + 1:
            stop, bound_by = stop - 1, over
            part = _localise(graph, groups[start:stop], last_use, stop)
        if over:
            raise DiagnosticError([_too_large(groups[start], part)])
        start = stop
        segments.append(replace(part, bound_by=bound_by))
    return tuple(segments)


def _farthest(groups: Sequence[tuple[str, list[AtbNode]]], start: int, max_layers: int) -> tuple[int, tuple[str, ...]]:
    """Where a segment from `start` ends at the latest, by nodes and layers alone, and why; at least one group."""
    nodes = layers = 0
    for stop in range(start, len(groups)):
        label, run = groups[stop]
        nodes, layers = nodes + len(run), layers + (label != "")
        over = {"nodes": nodes > GRAPH_LIMITS["nodes"], "layers-per-segment": layers > max_layers}
        if stop > start and any(over.values()):
            return stop, tuple(limit for limit, exceeded in over.items() if exceeded)
    return len(groups), ("end",)


def over_limits(part: Segment) -> tuple[str, ...]:
    """The limits that the segment exceeds."""
    return tuple(kind for kind, n in part.counts.items() if n > GRAPH_LIMITS[kind])


def why_it_ends(part: Segment) -> str:
    """`one more exceeds 256 nodes`, `one more exceeds --layers-per-segment` or `the model ends`"""
    if part.bound_by == ("end",):
        return "the model ends"
    limits = [f"{GRAPH_LIMITS[kind]} {kind}" if kind in GRAPH_LIMITS else f"--{kind}" for kind in part.bound_by]
    return f"one more exceeds {' and '.join(limits)}"


def _too_large(group: tuple[str, list[AtbNode]], part: Segment) -> Diagnostic:
    over = over_limits(part)
    label = group[0] or group[1][0].name
    return Diagnostic(
        code="E403",
        message=f"'{label}' alone does not fit in one ATB graph",
        place=group[1][0].place,
        found=", ".join(f"{part.counts[kind]} {kind}" for kind in over),
        needed=", ".join(f"at most {GRAPH_LIMITS[kind]} {kind}" for kind in over),
    )


def _group(node: AtbNode) -> str:
    match = LAYER.match(node.name)
    return match[1] if match else ""


def _groups(nodes: Sequence[AtbNode]) -> Iterator[tuple[str, list[AtbNode]]]:
    """Runs of nodes of one layer; a node outside layers is a group of its own."""
    run: list[AtbNode] = []
    for node in nodes:
        if run and (_group(node) != _group(run[-1]) or not _group(node)):
            yield _group(run[-1]), run
            run = []
        run.append(node)
    if run:
        yield _group(run[-1]), run


def _localise(
    graph: AtbGraph, groups: Sequence[tuple[str, list[AtbNode]]], last_use: Mapping[str, int], stop: int
) -> Segment:
    """The nodes of these groups as a graph of its own, in local names."""
    nodes = [node for _, run in groups for node in run]
    index = {label: str(k) for k, label in enumerate(dict.fromkeys(label for label, _ in groups if label))}
    made = {out for node in nodes for out in node.outs}
    reads = {name: i for i, node in enumerate(nodes) for name in node.ins}
    local: dict[str, str] = {}
    taken: set[str] = set()
    holder: dict[str, str] = {}  # local name -> value it holds now
    first_of: dict[str, AtbTensor] = {}  # a tensor keeps its type when layers write it again

    def name_of(name: str, at: int) -> str:
        """Local name of a value that node `at` reads or makes."""
        if name in local:
            return local[name]
        match = LAYER.match(name)
        label, rest = (match[1], match[2]) if match else ("", name)
        if graph.tensors[name].role != "internal":
            short = f"{index[label]}.{rest}" if label in index else name
        elif name not in made:
            short = f"in.{rest}" if label else name
        elif last_use.get(name, -1) >= stop:
            short = f"out.{rest}" if label else name
        else:
            tensor = graph.tensors[name]
            short = rest if first_of.setdefault(rest, tensor) == tensor else f"{rest}.{tensor.dtype}"
            if holder.get(short, name) != name and reads.get(holder[short], -1) >= at:
                short = f"{index[label]}.{rest}"  # the value it held is still needed
            holder[short] = name
        if short in taken and short not in holder:
            short = name  # two layers hand over a value of one name
        taken.add(short)
        local[name] = short
        return short

    new_nodes = []
    for at, node in enumerate(nodes):
        ins = tuple(name_of(name, at) for name in node.ins)
        outs = tuple(name_of(name, at) for name in node.outs)
        new_nodes.append(replace(node, ins=ins, outs=outs))
    inputs = tuple(
        dict.fromkeys(n for node in nodes for n in node.ins if n not in made or graph.tensors[n].role == "cache")
    )
    outputs = tuple(
        n for n in local if n in made and graph.tensors[n].role == "internal" and last_use.get(n, -1) >= stop
    )
    return Segment(
        graph=AtbGraph(
            name=graph.name,
            phase=graph.phase,
            inputs=tuple(local[n] for n in inputs),
            outputs=tuple(local[n] for n in outputs),
            nodes=tuple(new_nodes),
            tensors={short: graph.tensors[name] for name, short in local.items()},
        ),
        inputs=inputs,
        outputs=outputs,
        layers=tuple(label or run[0].name for label, run in groups),
    )
