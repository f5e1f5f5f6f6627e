"""Segmentation: one flat list of ATB operations becomes graphs that libatb's limits allow.

A graph may have 256 inputs, 256 outputs and 256 internal tensors, and Setup works up to 256 nodes
(data/atb-layers/segments.json). Cuts fall between layers. Names are the model's; those of intermediates are chosen in
`names.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import GRAPH_LIMITS
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError
from llmc.compiler.ir import AtbGraph, AtbTensor
from llmc.compiler.layers import Group, Layer, groups_of, nodes_of, shortened
from llmc.compiler.passes.names import Names, name_intermediates


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Groups that are one ATB graph. `inputs`: first what all layers read, then layer by layer weights and caches."""

    name: str  # of the model
    phase: str
    groups: tuple[Group, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ends: Mapping[str, AtbTensor]  # what inputs and outputs are, except a layer's own weights and caches
    names: Names
    bound_by: tuple[str, ...] = ()  # limits that one group more would exceed, or "end": of the model

    @property
    def layers(self) -> tuple[str, ...]:
        """ "layers.0", ... and names of nodes outside layers."""
        return tuple(group.label or group.layer.nodes[0].name for group in self.groups)

    @cached_property
    def counts(self) -> dict[str, int]:
        own = sum(len(self._own_places(group.layer)) for group in self.groups)
        shared = {place for layer in {group.layer for group in self.groups} for place in self._shared_places(layer)}
        return {
            "inputs": len(self.inputs),
            "outputs": len(self.outputs),
            "internals": own + len(shared) - len(self.outputs),
            "nodes": sum(len(group.layer.nodes) for group in self.groups),
        }

    def _own_places(self, layer: Layer) -> set[str]:
        """Names for the values of one group, those that it shares with no other."""
        places = self.names.get(layer, {})
        found = {name: places.get(layer.own(name)) for name in layer.made}
        return {place.value if place else name for name, place in found.items() if not (place and place.shared)}

    def _shared_places(self, layer: Layer) -> set[str]:
        return {place.name(layer.block, "") for place in self.names.get(layer, {}).values() if place.shared}

    def stored(self, group: Group, name: str) -> str:
        """The graph's name for a value of the group's layer: the model's, or that of the place which it shares."""
        layer = group.layer
        place = self.names.get(layer, {}).get(layer.own(name))
        return place.name(layer.block, group.name("")) if place else group.actual(name)

    @cached_property
    def graph(self) -> AtbGraph:
        """The segment node by node, in the model's names."""
        return self._graph(self.groups)

    @cached_property
    def short(self) -> AtbGraph:
        """The same with few of many equal layers: what holds at each node of the whole holds at one of these."""
        return self._graph(shortened(self.groups))

    @cached_property
    def places(self) -> dict[str, str]:
        """Value of `short` -> the graph's name for it."""
        groups = shortened(self.groups)
        return {group.actual(name): self.stored(group, name) for group in groups for name in group.layer.made}

    def _graph(self, groups: Sequence[Group]) -> AtbGraph:
        nodes, tensors = nodes_of(groups)
        return AtbGraph(
            name=self.name,
            phase=self.phase,
            inputs=tuple(name for name in self.inputs if name in tensors),
            outputs=tuple(name for name in self.outputs if name in tensors),
            nodes=nodes,
            tensors=tensors,
        )


def segment(graph: AtbGraph, layers_per_segment: int = 0) -> tuple[Segment, ...]:
    """one graph of any length  ->  as few graphs as the limits allow (or at most so many layers each)"""
    groups = groups_of(graph)
    names = name_intermediates(groups, graph.outputs, layers_per_segment)
    last_read = _last_reads(groups) | dict.fromkeys(graph.outputs, len(groups))
    made: set[str] = set()  # by the segments before
    segments: list[Segment] = []
    start = 0
    while start < len(groups):
        stop, bound_by = _farthest(groups, start, layers_per_segment or len(groups))
        part = _cut(graph, groups[start:stop], names, last_read, stop, made)
        while (over := over_limits(part)) and stop > start + 1:
            stop, bound_by = stop - 1, over
            part = _cut(graph, groups[start:stop], names, last_read, stop, made)
        if over:
            raise DiagnosticError([_too_large(part)])
        start = stop
        made.update(part.outputs)
        segments.append(replace(part, bound_by=bound_by))
    return tuple(segments)


def _last_reads(groups: Sequence[Group]) -> dict[str, int]:
    """Value -> the last group that reads it from another one."""
    return {
        name: at
        for at, group in enumerate(groups)
        for name in (*group.reads, *(n for n in group.layer.common if group.layer.tensors[n].role == "internal"))
    }


def _cut(
    graph: AtbGraph, groups: Sequence[Group], names: Names, last_read: dict[str, int], stop: int, made: set[str]
) -> Segment:
    common: dict[str, AtbTensor] = {}
    own: list[str] = []
    outputs: dict[str, AtbTensor] = {}
    for group in groups:
        layer = group.layer
        for name, actual in (*((n, n) for n in layer.common), *zip(layer.args, group.reads, strict=True)):
            if actual in made or layer.tensors[name].role != "internal":
                common.setdefault(actual, layer.tensors[name])
        own += map(group.name, layer.given)
        stay = names.get(layer, {})
        for name in layer.made:
            if layer.own(name) not in stay and last_read.get(actual := group.actual(name), -1) >= stop:
                outputs[actual] = layer.tensors[name]
    return Segment(
        name=graph.name,
        phase=graph.phase,
        groups=tuple(groups),
        inputs=(*common, *own),
        outputs=tuple(outputs),
        ends={**common, **outputs},
        names=names,
    )


def _farthest(groups: Sequence[Group], start: int, max_layers: int) -> tuple[int, tuple[str, ...]]:
    """Where a segment from `start` ends at the latest, by nodes and layers alone, and why; at least one group."""
    nodes = layers = 0
    for stop in range(start, len(groups)):
        layer = groups[stop].layer
        nodes, layers = nodes + len(layer.nodes), layers + (layer.block != "")
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


def _too_large(part: Segment) -> Diagnostic:
    over = over_limits(part)
    return Diagnostic(
        code="E403",
        message=f"'{part.layers[0]}' alone does not fit in one ATB graph",
        place=part.groups[0].layer.nodes[0].place,
        found=", ".join(f"{part.counts[kind]} {kind}" for kind in over),
        needed=", ".join(f"at most {GRAPH_LIMITS[kind]} {kind}" for kind in over),
    )


def written(part: Segment) -> list[str]:
    """Inputs that the segment writes: named as outputs, or without a word (flash attention appends to its caches)."""
    by_layer = {layer: list(_written(layer)) for layer in {group.layer for group in part.groups}}
    found = {group.actual(name) for group in part.groups for name in by_layer[group.layer]}
    return [name for name in part.inputs if name in found]


def _written(layer: Layer) -> Iterator[str]:
    for node in layer.nodes:
        op = ATB[node.op]
        yield from (name for name in node.outs if layer.tensors[name].role != "internal")
        yield from (node.ins[i] for i in op.writes(op.param(node.param)))
