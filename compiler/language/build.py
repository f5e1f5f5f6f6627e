"""Source tree -> model graph: the language is checked, repeats and blocks are written out, every edge finds its maker.

    model = load_model("graphs/llama2-13b.yaml")
    model.graph.by_name["layers.3.attn.o"]      # Node(op="linear", inputs={"x": "layers.3.attn.core"}, ...)

Three stages, each of which reports all that it finds: the language (`language.py`: keys, types, expressions), the edges
(names, cycles, unused nodes), the tensors (shapes of values and weights).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import networkx as nx

from llmc.compiler.diagnostics import Place, did_you_mean
from llmc.compiler.ir import Graph, Node, Repeat, Source, TensorType, Weight, standing_for
from llmc.compiler.language import source
from llmc.compiler.language.definitions import (
    INPUTS,
    MAX_CARRIED,
    MAX_NODES,
    CallDef,
    Def,
    Language,
    NodeDef,
    RepeatDef,
    Rule,
)
from llmc.compiler.language.reading import Ref
from llmc.compiler.language.source import Document, Scalar
from llmc.compiler.ops import OPS, NoRule
from llmc.compiler.passes.types import in_layers, is_named


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as described: its graph, and what is known beside the graph."""

    name: str
    graph: Graph
    support: Mapping[str, Mapping[str, tuple]]  # device -> {"tp": (1, 2), and if stated "dtypes", "attention"}
    config: Mapping[str, Rule]
    unused: Mapping[str, str]  # tensors of the checkpoint that stay unread: pattern -> why
    places: Mapping[str, Place]  # "sizes.hidden", "rope.theta", ... -> where it is said
    sources: Mapping[str, str]  # file -> text, in reading order
    source_hash: str

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.sources)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Names that an edge may say, and the values they mean. A repeat's body also sees what is around it."""

    values: dict[str, str]
    parent: Scope | None = None


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A node of the graph before its inputs are known."""

    name: str
    node: NodeDef
    scope: Scope
    iteration: int | None


def load_model(
    path_or_name: str | os.PathLike[str],
    allow_extends: Iterable[str | os.PathLike[str]] = (),
    *,
    every_layer: bool = True,
) -> Model:
    """The model of a YAML file, or of the catalogue by name; DiagnosticError with everything that is wrong.
    `allow_extends`: folders beside the file's own whose files may be extended. Without `every_layer` the graph holds
    the iterations of a repeat that may differ, and two of many alike."""
    return build_model(source.load(path_or_name, allow_extends), every_layer=every_layer)


def build(document: Document) -> Graph:
    return build_model(document).graph


def build_model(document: Document, *, every_layer: bool = True) -> Model:
    language = Language(document)
    language.report.raise_if_any()
    graph = _Expansion(language, every_layer).graph()
    language.check_policy(graph)
    language.report.raise_if_any()
    return Model(
        name=language.name,
        graph=graph,
        support=language.support,
        config=language.config,
        unused=language.unused,
        places=language.places,
        sources=document.sources,
        source_hash=document.hash,
    )


class _Expansion:
    """The second and third stage: every node with its path, its inputs, its weights."""

    def __init__(self, language: Language, every_layer: bool) -> None:
        self.language, self.report, self.every_layer = language, language.report, every_layer
        self.repeats: dict[str, Repeat] = {}
        self.instances: list[Instance] = []
        self.carried: dict[str, tuple[Ref, Scope]] = {}  # name of a carried value or block input -> what it is
        self.made_by: dict[str, str] = {}  # name of a carried value -> the value that it turned out to be
        self.counted = 0  # nodes and scopes, with those of iterations that are left out
        self.told: set[Any] = set()

    def once(self, code: str, message: str, place: Place | None, **more: str) -> None:
        """A definition that is wrong in 80 layers is told once."""
        if (code, place) not in self.told:
            self.told.add((code, place))
            self.report.add(code, message, place, **more)

    def graph(self) -> Graph:
        language = self.language
        scope = Scope(values={name: name for name in language.inputs})
        self.declare(language.graph, "", scope, None)
        edges = [
            {slot: self.resolve(ref, instance.scope) for slot, ref in instance.node.inputs.items()}
            for instance in self.instances
        ]
        outputs = {name: self.resolve(ref, scope) for name, ref in language.outputs.items()}
        self.report.raise_if_any()
        order = self.order(edges, outputs)
        self.report.raise_if_any()
        nodes = self.typed(order, edges)
        self.report.raise_if_any()
        return Graph(
            name=language.name,
            inputs={name: INPUTS[name] for name in language.inputs},
            nodes=tuple(nodes),
            outputs=outputs,
            sizes=language.sizes,
            dtype=language.dtype,
            rope=language.rope,
            policy=tuple(rule for rule, _ in language.policy),
            repeats=self.repeats,
        )

    def declare(self, defs: Iterable[Def], prefix: str, scope: Scope, iteration: int | None) -> None:
        """Name every node and every value of a scope; edges may be written before what they name."""
        self.counted += 1
        for d in defs:
            self.check_count(d)
            path = prefix + d.name
            if isinstance(d, NodeDef):
                self.counted += 1
                self.instances.append(Instance(name=path, node=d, scope=scope, iteration=iteration))
                for output in [name for name, _ in d.parts] or d.op.outputs:
                    text = f"{d.name}.{output}" if output else d.name
                    value = f"{path}.split.{output}" if len(d.parts) > 1 else path if d.parts else prefix + text
                    scope.values[text] = value
            elif isinstance(d, CallDef):
                block = self.language.blocks[d.block]
                inner = Scope(values={})
                for name, ref in d.inputs.items():
                    inner.values[name] = self.alias(f"{path}.{name}", ref, scope)
                self.declare(block.nodes, f"{path}.", inner, iteration)
                for output, ref in block.outputs.items():
                    text = f".{output}" if output else ""
                    scope.values[d.name + text] = self.alias(f"{path}{text} ", ref, inner)
            else:
                previous = scope
                steps = d.carry
                self.repeats[d.name] = repeat = self.repeat(d)
                before = self.counted
                for i in repeat.kept:
                    values = {name: self.alias(f"{path}.{i}.{name}", ref, previous) for name, ref in steps.items()}
                    inner = Scope(values=values, parent=scope)
                    self.declare(d.nodes, f"{path}.{i}.", inner, i)
                    previous, steps = inner, d.next
                self.counted = before + (self.counted - before) // len(repeat.kept) * d.count
                self.check_count(d)
                for name, ref in d.next.items():
                    scope.values[f"{d.name}.{name}"] = self.alias(f"{path}.{name}", ref, previous)

    def check_count(self, d: Def) -> None:
        if self.counted > MAX_NODES:
            self.report.add("E106", f"the graph has more than {MAX_NODES} nodes", d.place)
            self.report.raise_if_any()

    def repeat(self, d: RepeatDef) -> Repeat:
        """Which iterations to write out: all, or of each run that `policy:` treats alike the first and the last two."""
        every = range(d.count)
        if self.every_layer:
            return Repeat(count=d.count, kept=tuple(every))
        names = list(self.names(d.nodes))
        if d.count * len(names) > MAX_NODES:  # before every rule of `policy:` is asked about every one of them
            self.report.add("E106", f"the graph has more than {MAX_NODES} nodes", d.place)
            self.report.raise_if_any()

        def rules(i: int) -> list[bool]:
            nodes = [f"{d.name}.{i}.{name}" for name in names]
            return [is_named(rule, node) and in_layers(rule, node)
                    for rule, _ in self.language.policy for node in nodes]  # fmt: skip

        runs = [list(run) for _, run in groupby(every, key=rules)]
        return Repeat(count=d.count, kept=tuple(i for run in runs for i in dict.fromkeys((*run[:2], *run[-2:]))))

    def names(self, defs: Iterable[Def]) -> Iterator[str]:
        """Of all nodes of a scope, as paths in it."""
        for d in defs:
            if isinstance(d, CallDef):
                yield from (f"{d.name}.{name}" for name in self.names(self.language.blocks[d.block].nodes))
            else:
                yield d.name

    def alias(self, name: str, ref: Ref, scope: Scope) -> str:
        self.carried[name] = (ref, scope)
        if len(self.carried) > MAX_CARRIED:
            self.report.add("E004", f"repeats and blocks pass on more than {MAX_CARRIED} values", ref.place)
            self.report.raise_if_any()
        return name

    def resolve(self, ref: Ref, scope: Scope) -> str:
        """The value that an edge means: made by a node, or an input of the graph."""
        seen: dict[str, None] = {}
        while True:
            value = scope.values.get(ref.text)
            if value is None and scope.parent is not None:
                value = scope.parent.values.get(ref.text)
            if value is None:
                self.unknown(ref, scope)
                return ""
            value = self.made_by.get(value, value)
            if value not in self.carried:
                self.made_by.update(dict.fromkeys(seen, value))  # each carried value is followed once
                return value
            if value in seen:
                self.once("E202", f"'{ref.text}' is carried or passed in a circle and never made", ref.place)
                return ""
            seen[value] = None
            ref, scope = self.carried[value]

    def unknown(self, ref: Ref, scope: Scope) -> None:
        known = [*scope.values, *(scope.parent.values if scope.parent else ())]
        outputs = [name for name in known if name.startswith(f"{ref.text}.")]
        if outputs:
            self.once(
                "E201", f"'{ref.text}' has several outputs; say which", ref.place, needed=f"one of {', '.join(outputs)}"
            )
        else:
            self.once("E201", f"there is no '{ref.text}' here", ref.place, likely=did_you_mean(ref.text, known))

    def order(self, edges: list[dict[str, str]], outputs: Mapping[str, str]) -> list[int]:
        """Instances in execution order, as written where that is possible; cycles and unused nodes are reported."""
        makers: dict[str, int] = {}
        for number, instance in enumerate(self.instances):
            for value in self.values(instance):
                makers[value] = number
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.instances)))
        for number, inputs in enumerate(edges):
            graph.add_edges_from((makers[value], number) for value in inputs.values() if value in makers)
        try:
            order = list(nx.lexicographical_topological_sort(graph))
        except nx.NetworkXUnfeasible:
            loop = [a for a, *_ in nx.find_cycle(graph)]
            names = [self.instances[number].name for number in (*loop, loop[0])]
            self.report.add(
                "E202", f"'{names[0]}' needs itself", self.instances[loop[0]].node.place, found=" -> ".join(names)
            )
            return []
        alive = {makers[value] for value in outputs.values() if value in makers}
        for number in reversed(order):
            if number in alive:
                alive.update(graph.predecessors(number))
        # A node that only the next iteration would read is dropped from the last one.
        living = {id(self.instances[number].node) for number in alive}
        for instance in self.instances:
            if id(instance.node) not in living:
                self.once("E203", f"nothing uses '{instance.name}' ({instance.node.op.name})", instance.node.place,
                          likely="remove it, or read it in a node that leads to an output")  # fmt: skip
        return [number for number in order if number in alive]

    @staticmethod
    def values(instance: Instance) -> list[str]:
        parts = instance.node.parts
        if len(parts) > 1:
            return [f"{instance.name}.split.{name}" for name, _ in parts]
        outputs = ("",) if parts else instance.node.op.outputs
        return [f"{instance.name}.{output}" if output else instance.name for output in outputs]

    def typed(self, order: list[int], edges: list[dict[str, str]]) -> list[Node]:
        """The nodes, with weights: their shapes follow from the attributes and from the inputs."""
        types: dict[str, TensorType] = {name: INPUTS[name] for name in self.language.inputs}
        tensors: dict[str, tuple[tuple[int, ...], Place]] = {}
        nodes: list[Node] = []
        for number in order:
            instance, inputs = self.instances[number], edges[number]
            if any(value not in types for value in inputs.values()):
                continue  # the maker is reported
            weights = self.weights(instance, {slot: types[value] for slot, value in inputs.items()}, tensors)
            d = instance.node
            node = Node(name=instance.name, op=d.op.name, inputs=inputs, attrs=d.attrs, weights=weights,
                        outputs=d.op.outputs, place=d.place)  # fmt: skip
            made = [node]
            if len(d.parts) > 1:
                names, sizes = zip(*d.parts, strict=True)
                made.append(Node(name=f"{node.name}.split", op="split", inputs={"x": node.name},
                            attrs={"sizes": sizes}, outputs=names, place=d.place))  # fmt: skip
            for node in made:
                op = OPS[node.op]
                try:
                    outputs = op.shape(node, [types[node.inputs[slot]] for slot in op.inputs])
                except NoRule as error:
                    self.once(error.code, f"'{node.name}' ({node.op}): {error.message}", node.place, **error.details)
                    break
                types.update(zip(node.values, outputs, strict=True))
                nodes.append(node)
        return nodes

    def weights(
        self,
        instance: Instance,
        types: Mapping[str, TensorType],
        tensors: dict[str, tuple[tuple[int, ...], Place]],
    ) -> dict[str, Weight]:
        d = instance.node
        found = {}
        for slot in d.op.weights:
            if slot.name not in d.weights:
                continue
            shape = tuple(self.extent(extent, d, types) for extent in slot.shape)
            sources = []
            for piece in d.weights[slot.name]:
                whole = (piece.total or shape[0], *shape[1:])
                name = self.tensor_name(piece.tensor, instance.iteration)
                place = piece.tensor.place
                for _, i in standing_for(self.repeats, instance.name):
                    tensor = name if instance.iteration is None else piece.tensor.text.replace("{i}", str(i))
                    first = tensors.setdefault(tensor, (whole, place))
                    if first[0] != whole:
                        self.once("E204", f"the tensor '{tensor}' is used with two shapes", place,
                                  found=f"{list(whole)} here, {list(first[0])} at {first[1]}")  # fmt: skip
                sources.append(
                    Source(tensor=name, pattern=piece.tensor.text, shape=whole, rows=piece.rows, place=place)
                )
            # The bias of a row-split linear is added once, to the whole sum.
            split = "replicate" if slot.name == "bias" and d.split == "row" else d.split
            kind = TensorType(dtype=self.language.dtype, shape=shape)
            name = f"{instance.name}.{slot.name}"
            found[slot.name] = Weight(name=name, sources=tuple(sources), type=kind, split=split)
        return found

    @staticmethod
    def extent(extent: str, d: NodeDef, types: Mapping[str, TensorType]) -> int:
        """`out` is an attribute, `x.-1` the last axis of the input x."""
        name, dot, axis = extent.partition(".")
        size: Any = types[name].shape[int(axis)] if dot else d.attrs[name]
        return size if isinstance(size, int) else 0

    def tensor_name(self, tensor: Scalar, iteration: int | None) -> str:
        counted = "{i}" in tensor.text
        if counted and iteration is None:
            self.once("E111", "{i} stands for the iteration, and this is not in a repeat", tensor.place)
        elif not counted and iteration is not None:
            self.once("E111", "every iteration would take the same tensor", tensor.place,
                      needed="{i} in the name of a weight inside a repeat")  # fmt: skip
        return tensor.text.replace("{i}", str(iteration)) if counted else tensor.text
