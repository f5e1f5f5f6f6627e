"""A flat ATB graph as a sequence of groups: the layers of its repeats, and single nodes outside them.

Equal layers are one `Layer`; a `Group` is a layer at its place: its index, and where the values come from that other
groups make. What is asked of every layer (lowering, verification, code) is asked of each `Layer` once.

    groups = groups_of(lowered)
    [(g.label, g.reads) for g in groups][3]      # ("layers.2", ("layers.1.mlp.down", "layers.1.post_norm.sum"))

A graph may hold some iterations of a repeat only (`Graph.repeats`): those left out are as the ones at both ends of the
gap, where these are equal and read alike. A layer's form follows from its definition, from what reaches it and from who
reads it; two neighbours that are equal and read alike have equal neighbours, so any number of them fits in.
`NotPeriodic` says that they are not, and then the model is compiled with all its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmc.compiler.ir import LAYER, AtbGraph, AtbNode, AtbTensor, Repeat


class NotPeriodic(Exception):
    """The iterations that were left out are not as those that were kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Nodes that are never cut apart, in the names of the iteration `like` of `block` (block "": one node outside).

    `args`: names of values that other groups make and that differ from group to group, in order of first reading.
    `tensors` describes every name of the nodes."""

    block: str
    like: int
    nodes: tuple[AtbNode, ...]
    args: tuple[str, ...]
    tensors: Mapping[str, AtbTensor]

    @cached_property
    def prefix(self) -> str:
        return f"{self.block}.{self.like}." if self.block else ""

    @cached_property
    def rests(self) -> Mapping[str, str]:
        """Name of the nodes -> what it says behind the layer; "" for a name of something else."""
        names = dict.fromkeys((*self.tensors, *(node.name for node in self.nodes)))
        return {name: name[len(self.prefix) :] if self.block and name.startswith(self.prefix) else "" for name in names}

    def own(self, name: str) -> str:
        return self.rests.get(name, "")

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Every name that a node reads, once, in order."""
        return tuple(dict.fromkeys(name for node in self.nodes for name in node.ins))

    @cached_property
    def made(self) -> tuple[str, ...]:
        """Every value that a node makes, once, in order; caches are written, not made."""
        names = dict.fromkeys(name for node in self.nodes for name in node.outs)
        return tuple(name for name in names if self.tensors[name].role == "internal")

    @cached_property
    def given(self) -> tuple[str, ...]:
        """Its own inputs of the graph, weights and caches: what stands behind the layer in their names."""
        return tuple(filter(None, (self.own(name) for name in self.reads if self.tensors[name].role != "internal")))

    @cached_property
    def common(self) -> tuple[str, ...]:
        """Other names that the nodes read from outside, the same in every group of this layer."""
        made = set(self.made)
        return tuple(n for n in self.reads if not self.own(n) and n not in made and n not in self.args)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A layer at its place. `reads`: the values for `layer.args`, by name; `back`: how many groups before this one
    their makers stand (0: a node outside layers, which has a name of its own)."""

    layer: Layer
    index: int
    reads: tuple[str, ...]
    back: tuple[int, ...]

    @property
    def label(self) -> str:
        """`layers.7`; "" outside layers."""
        return f"{self.layer.block}.{self.index}" if self.layer.block else ""

    @property
    def form(self) -> tuple:
        """Equal for groups that are the same but for their index: what they do, and what they read of whom."""
        reads = (rest_of(name) if back else name for name, back in zip(self.reads, self.back, strict=True))
        return self.layer, self.back, tuple(reads)

    def name(self, rest: str) -> str:
        return f"{self.label}.{rest}"

    def actual(self, name: str) -> str:
        """A name of the layer as it is in this group."""
        if rest := self.layer.own(name):
            return self.name(rest)
        return self.reads[self.layer.args.index(name)] if name in self.layer.args else name

    @property
    def made(self) -> Iterator[str]:
        return map(self.actual, self.layer.made)


def groups_of(graph: AtbGraph) -> tuple[Group, ...]:
    """The groups in order of execution, with the iterations that `graph.kept` leaves out."""
    runs = list(_runs(graph.nodes))
    maker = {out: at for at in range(len(runs) - 1, -1, -1) for node in runs[at][2] for out in node.outs}
    readers: dict[str, set[int]] = {}
    for at, (block, _, nodes) in enumerate(runs):
        for node in nodes if block else ():
            for name in node.ins:
                readers.setdefault(name, set()).add(at)

    def is_argument(name: str, at: int) -> bool:
        """Made by another group, and not the same name for all layers that read it."""
        if graph.tensors[name].role != "internal" or maker[name] == at:
            return False
        return bool(runs[maker[name]][0]) or (bool(runs[at][0]) and len(readers[name]) == 1)

    layers: dict[Any, Layer] = {}
    groups: list[Group] = []
    for at, (block, index, nodes) in enumerate(runs):
        reads = dict.fromkeys(name for node in nodes for name in node.ins)
        args = tuple(name for name in reads if is_argument(name, at))
        names = dict.fromkeys(name for node in nodes for name in (*node.ins, *node.outs))
        layer = Layer(block=block, like=index, nodes=nodes, args=args, tensors={n: graph.tensors[n] for n in names})
        layer = layers.setdefault(_alike(layer), layer)
        back = tuple(at - maker[name] if runs[maker[name]][0] else 0 for name in args)
        groups.append(Group(layer=layer, index=index, reads=args, back=back))
    return _filled(groups, graph.repeats)


def _runs(nodes: Sequence[AtbNode]) -> Iterator[tuple[str, int, tuple[AtbNode, ...]]]:
    """Block, index and nodes of each run of nodes of one layer; a node outside layers is a run of its own."""
    run: list[AtbNode] = []
    last = ("", 0)
    for node in nodes:
        match = LAYER.match(node.name)
        key = (match[1], int(match[2])) if match else ("", 0)
        if run and (key != last or not key[0]):
            yield *last, tuple(run)
            run = []
        run.append(node)
        last = key
    if run:
        yield *last, tuple(run)


def _alike(layer: Layer) -> tuple:
    """Equal for layers that are one: all that is written and asked of them, without their indices."""

    def plain(name: str) -> str | int:
        return layer.args.index(name) if name in layer.args else f".{layer.own(name)}" if layer.own(name) else name

    nodes = tuple(
        (plain(node.name), node.op, repr(node.param), tuple(map(plain, node.ins)), tuple(map(plain, node.outs)),
         tuple(node.views.items()), node.place)
        for node in layer.nodes
    )  # fmt: skip
    return layer.block, nodes, tuple((plain(name), tensor) for name, tensor in layer.tensors.items())


def _filled(groups: Sequence[Group], repeats: Mapping[str, Repeat]) -> tuple[Group, ...]:
    """The groups, with those of the iterations between two kept ones."""
    full: list[Group] = []
    for at, group in enumerate(groups):
        before = groups[at - 1] if at else group
        if group.layer.block and group.layer.block == before.layer.block and group.index > before.index + 1:
            if before.form != group.form:
                raise NotPeriodic(group.layer.block)
            full += [replace(group, index=index) for index in range(before.index + 1, group.index)]
        full.append(group)
    for block, repeat in repeats.items():
        if repeat.left_out and [g.index for g in full if g.layer.block == block] != list(range(repeat.count)):
            raise NotPeriodic(block)
    return tuple(resolved(full, at) for at in range(len(full)))


def resolved(groups: Sequence[Group], at: int) -> Group:
    """The group with the names that its makers have in this sequence; what stands before it keeps its name."""
    group = groups[at]
    reads = tuple(
        groups[at - back].name(rest_of(name)) if 0 < back <= at else name
        for name, back in zip(group.reads, group.back, strict=True)
    )
    return group if reads == group.reads else replace(group, reads=reads)


def rest_of(name: str) -> str:
    """What a layer's name says behind the layer."""
    return name.split(".", 2)[2]


def shortened(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with few of many equal ones: every way in which two groups follow each other is still there."""
    few: list[Group] = []
    longest = 2 + max((back for group in groups for back in group.back), default=1)
    run = 0
    for at, group in enumerate(groups):
        run = run + 1 if at and group.label and group.form == groups[at - 1].form else 0
        last = at + 1 == len(groups) or groups[at + 1].form != group.form
        if run < longest or last:
            few.append(group)
    return tuple(resolved(few, at) for at in range(len(few)))


def nodes_of(groups: Sequence[Group]) -> tuple[tuple[AtbNode, ...], dict[str, AtbTensor]]:
    """The nodes of all groups and their tensors."""
    nodes: list[AtbNode] = []
    tensors: dict[str, AtbTensor] = {}
    for group in groups:
        names = {name: group.actual(name) for name in group.layer.tensors}
        tensors.update((names[name], tensor) for name, tensor in group.layer.tensors.items())
        nodes += [
            replace(node, name=group.actual(node.name), ins=tuple(names[n] for n in node.ins),
                    outs=tuple(names[n] for n in node.outs))
            for node in group.layer.nodes
        ]  # fmt: skip
    return tuple(nodes), tensors
