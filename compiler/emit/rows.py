"""Rows for the templates: every decision about the generated text is made here.

one distinct layer    ->  one Function with the layer's index and the names of what it is handed as arguments
one distinct segment  ->  one Function: its outer operations, and a loop over each run of equal layers
one view              ->  one View: a small function from the old shape to the new one
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from keyword import iskeyword
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import ENUMS, AtbOp, Field
from llmc.compiler.diagnostics import portable
from llmc.compiler.emit.python import Call, quote, statement
from llmc.compiler.ir import LAYER, AtbNode, Shape, show_shape
from llmc.compiler.layers import Group, Layer
from llmc.compiler.passes.names import Place
from llmc.compiler.passes.segment import Segment

# Parameters that are arguments of `build`: the same code serves every rank and every group of that size.
BUILD_ARGUMENTS = ("rank", "rankSize", "rankTableFile", "commDomain")


@dataclass(frozen=True, kw_only=True)
class View:
    """`name(shape)` returns `expression`."""

    name: str
    doc: str
    expression: str


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of the generated module: its signature, docstring and lines."""

    name: str
    arguments: str
    doc: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Everything that a template prints for one phase."""

    views: Sequence[View]
    functions: Sequence[Function]
    instances: Sequence[str]  # lines: for each segment a call of the function that builds it
    ranks: bool  # whether any operation takes the communicator


COMMON_AT_LEAST = 3  # operations that are worth a function of their own


def python_rows(segments: Sequence[Segment], model: str) -> Rows:
    """Segments of one phase -> rows; equal layers share one function, and so do equal segments."""
    return _Module(segments).rows(model)


def code_of(segments: Sequence[Segment]) -> Mapping[tuple[Layer, str], Sequence[str]]:
    """The lines of each operation as `python_rows` prints them, by layer and name in it."""
    module = _Module(segments)
    module.rows("")
    return module.code


def graph_name(model: str, phase: str, index: int) -> str:
    """Letters, digits and underscores, at most 128 (atb-operations.md 1.2)."""
    word = "".join(c if c.isalnum() and c.isascii() else "_" for c in model)
    return f"{word[:100]}_{phase}_{index}"


def takes_ranks(op: AtbOp) -> bool:
    return {f.name for f in op.fields} >= set(BUILD_ARGUMENTS)


def ranks_of(nodes: Iterable[AtbNode]) -> list[str]:
    """The argument of a function with these operations: the communicator, where any of them takes it."""
    return ["ranks"] if any(takes_ranks(ATB[node.op]) for node in nodes) else []


@dataclass(kw_only=True)
class Scope:
    """How a function writes the names of a layer: `own` in front of what stands behind it, `args` as they are."""

    part: Segment
    group: Group
    own: str  # "{layer}."; "" outside layers
    args: Mapping[str, str]  # value of the layer that the function is given by name -> expression

    def name(self, name: str) -> str:
        """Expression for the place of a value."""
        layer, rest = self.group.layer, self.group.layer.own(name)
        if name in self.args:
            return self.args[name]
        if not rest:
            return text(name)
        place = self.part.names.get(layer, {}).get(rest, Place(value=rest))
        return self.args.get(layer.prefix + place.value) or text(place.name(layer.block, self.own))

    def view(self, name: str, view: str) -> str:
        """Expression for the name of a view: no other layer makes one of that name."""
        rest = self.group.layer.own(name)
        if name in self.args or not rest:
            rest = re.sub(r"\W", "_", self.args.get(name, name)) if self.own else name
        return text(f"{self.own}{rest}:{view}")


def text(name: str) -> str:
    """A string literal, formatted where it has an expression in it."""
    return f"f{quote(name)}" if "{" in name else quote(name)


@dataclass(kw_only=True)
class _Run:
    """Groups that one loop makes: of one layer, one index after the other, handed on in the same way."""

    groups: list[Group]

    @property
    def layer(self) -> Layer:
        return self.groups[0].layer


class _Module:
    """The functions of one phase's module, made as they are first needed."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.views: dict[str, View] = {}
        self.groups: dict[Layer, list[Group]] = {}
        for group in (group for part in segments for group in part.groups if group.label):
            self.groups.setdefault(group.layer, []).append(group)
        self.code: dict[tuple[Layer, str], list[str]] = {}  # of each operation, by its name in the layer
        self.functions: dict[Layer, Function] = {}
        self.outside: set[str] = set()  # views that nodes outside layers made in the segment that is printed
        self.tails: dict[str, Function] = {}  # what several functions have in common
        self.inputs: dict[tuple[str, ...], Function] = {}  # what layers are given -> the function that lists it

    def rows(self, model: str) -> Rows:
        shapes: dict[tuple, list[Segment]] = {}
        for part in self.segments:
            shapes.setdefault(_shape(part), []).append(part)
        names = {shape: f"segment_{number}" for number, shape in enumerate(shapes)}
        built = [self.segment(names[shape], parts) for shape, parts in shapes.items()]
        instances = []
        for number, part in enumerate(self.segments):
            shape = _shape(part)
            args = ["atb", quote(graph_name(model, part.phase, number)), *self.ranks(part)]
            if len(shapes[shape]) > 1:
                args.append(str(part.groups[0].index))
            instances += statement(Call(name=names[shape], args=args), 8, end=",")
        return Rows(
            views=list(self.views.values()),
            functions=[*self.inputs.values(), *self.tails.values(), *self.functions.values(), *built],
            instances=instances,
            ranks=any(map(self.ranks, self.segments)),
        )

    @staticmethod
    def ranks(part: Segment) -> list[str]:
        return ranks_of(node for group in part.groups for node in group.layer.nodes)

    # ---- segments

    def segment(self, name: str, parts: Sequence[Segment]) -> Function:
        part, shared = parts[0], len(parts) > 1
        start = part.groups[0].index

        def index(number: int, inside: bool = False) -> str:
            """An index in code; `inside`: in a formatted string."""
            if not shared:
                return str(number)
            word = "first" if number == start else f"first {'+' if number > start else '-'} {abs(number - start)}"
            return f"{{{word}}}" if inside else word

        def actual(name: str) -> str:
            """The name of another layer's value, by the first layer of the segment where that is an argument."""
            match = LAYER.fullmatch(name)
            is_layer = match and shared and match[1] == part.groups[0].layer.block
            return text(f"{match[1]}.{index(int(match[2]), True)}.{match[3]}") if match and is_layer else text(name)

        runs = list(_runs(part.groups))
        self.outside = set()
        lines = ["    graph = atb.GraphBuilder(name)"]
        lines += statement(self.signature(part, runs, index, actual), 4)
        for run in runs:
            lines += self.run(part, run, index, actual)
        return Function(
            name=name,
            arguments=", ".join(["atb", "name", *self.ranks(part), *(["first"] if shared else [])]),
            doc="; ".join(dict.fromkeys(map(describe, parts))),
            lines=[*lines, "    return graph.build()"],
        )

    def signature(self, part: Segment, runs: Sequence[_Run], index: Any, actual: Any) -> Call:
        own = {group.name(rest) for group in part.groups for rest in group.layer.given}
        inputs: list[Call | str] = [actual(name) for name in part.inputs if name not in own]
        layers = [(group.index, self.given(group.layer)) for group in part.groups if group.layer.given]
        for function, members in groupby(layers, key=lambda pair: pair[1]):
            numbers = [number for number, _ in members]
            inputs.append(f"*(name for i in {_range(numbers, index)} for name in {function}(i))")
        outputs = [actual(name) for name in part.outputs]
        return Call(name="graph.set_input_output", args=[_list(inputs), _list(outputs)])

    def run(self, part: Segment, run: _Run, index: Any, actual: Any) -> Iterator[str]:
        """A loop over the run, a call, or the operations of a node outside layers."""
        group, layer = run.groups[0], run.layer
        if not layer.block:
            given = dict(zip(layer.args, map(actual, group.reads), strict=True))
            yield from self.operations(Scope(part=part, group=group, own="", args=given), layer.nodes, self.outside)
            return
        function = self.function(part, layer).name
        more = ranks_of(layer.nodes)
        if len(run.groups) == 1:
            args = ["atb", "graph", index(group.index), *map(actual, group.reads), *more]
            yield from statement(Call(name=function, args=args), 4)
            return
        reads = [self.carried(name, back) if back else actual(name)
                 for name, back in zip(group.reads, group.back, strict=True)]  # fmt: skip
        yield f"    for i in {_range([g.index for g in run.groups], index)}:"
        yield from statement(Call(name=function, args=["atb", "graph", "i", *reads, *more]), 8)

    @staticmethod
    def carried(name: str, back: int) -> str:
        block, _, rest = name.split(".", 2)
        return text(f"{block}.{{i - {back}}}.{rest}")

    # ---- layers

    def function(self, part: Segment, layer: Layer) -> Function:
        """The function of a distinct layer; its arguments have the names that most layers give them."""
        if layer not in self.functions:
            args = _arguments_of(layer.args, self.groups[layer][-1].reads)
            scope = Scope(part=part, group=self.groups[layer][0], own="{layer}.", args=args)
            start, function = self.tail(part, layer)
            lines = [*self.shared_places(scope), f'    layer = f"{layer.block}.{{i}}"']
            lines += self.operations(scope, layer.nodes[:start] if function else layer.nodes)
            if function:
                reads = [scope.name(name) for name in _outer(layer, start)]
                args_of_call = ["atb", "graph", "layer", *reads, *ranks_of(layer.nodes[start:])]
                lines += statement(Call(name=function.name, args=args_of_call), 4)
            self.functions[layer] = Function(
                name=f"{layer.block}_{layer.like}",
                arguments=", ".join(["atb", "graph", "i", *args.values(), *ranks_of(layer.nodes)]),
                doc=_told(self.groups[layer]),
                lines=lines,
            )
        return self.functions[layer]

    def tail(self, part: Segment, layer: Layer) -> tuple[int, Function | None]:
        """Where the operations begin that this layer has in common with most layers of its block, and their function:
        the first layer and the others mostly differ in their first norm."""
        block = [other for other in self.groups if other.block == layer.block]
        base = max(block, key=lambda other: len(self.groups[other]))
        count = max((_common_end(base, other) for other in block if other is not base), default=0)
        if count < COMMON_AT_LEAST or _common_end(base, layer) < count:
            return 0, None
        start = len(layer.nodes) - count
        outer = _outer(base, len(base.nodes) - count)
        args = _arguments_of(outer, outer)
        if len(_outer(layer, start)) != len(outer):
            return 0, None

        def lines(of: Layer) -> list[str]:
            given = dict(zip(_outer(of, len(of.nodes) - count), args.values(), strict=True))
            scope = Scope(part=part, group=self.groups[of][0], own="{layer}.", args=given)
            return list(self.operations(scope, of.nodes[-count:]))

        name = f"{layer.block}_common"
        if name not in self.tails:
            self.tails[name] = Function(
                name=name,
                arguments=", ".join(["atb", "graph", "layer", *args.values(), *ranks_of(base.nodes[-count:])]),
                doc="What the functions of layers below have in common.",
                lines=lines(base),
            )
        return (start, self.tails[name]) if lines(layer) == self.tails[name].lines else (0, None)

    @staticmethod
    def shared_places(scope: Scope) -> Iterator[str]:
        """A comment for each name under which several values lie, one after the other."""
        places: dict[str, list[str]] = {}
        for value, place in scope.part.names.get(scope.group.layer, {}).items():
            places.setdefault(place.value, []).append(value)
        for first, values in places.items():
            if others := [value for value in values if value != first]:
                yield f"    # {first} is also the place of {', '.join(others)}"

    def given(self, layer: Layer) -> str:
        """The name of the function that lists the weights and caches of a layer."""
        key = (layer.block, *layer.given)
        if key not in self.inputs:
            alike = [g for like, groups in self.groups.items() for g in groups if (like.block, *like.given) == key]
            names = _list(text(f"{layer.block}.{{i}}.{rest}") for rest in layer.given)
            self.inputs[key] = Function(
                name=f"{layer.block}_{layer.like}_inputs",
                arguments="i",
                doc=f"Weights and caches of {_told(sorted(alike, key=lambda g: g.index), 'layer i, one of ')}",
                lines=statement(names, 4, prefix="return "),
            )
        return self.inputs[key].name

    def operations(self, scope: Scope, nodes: Sequence[AtbNode], done: set[str] | None = None) -> Iterator[str]:
        """`done`: names of views that the graph has already."""
        done = set() if done is None else done
        for node in nodes:
            self.code[scope.group.layer, node.name] = lines = statements(scope, node, self.views, done)
            yield from lines


def _arguments_of(names: Sequence[str], said: Sequence[str]) -> dict[str, str]:
    """Identifiers for values: what stands behind the layer in the names that are said of them."""
    known = {"atb", "graph", "i", "layer", "ranks"}
    args: dict[str, str] = {}
    for name, read in zip(names, said, strict=True):
        word = re.sub(r"\W", "_", LAYER.sub(r"\3", read))
        while word in known or iskeyword(word) or not word.isidentifier():
            word = f"_{word}"
        known.add(word)
        args[name] = word
    return args


def _common_end(a: Layer, b: Layer) -> int:
    """How many operations are the same in both, from the end."""
    count = 0
    for one, other in zip(reversed(a.nodes), reversed(b.nodes), strict=False):
        same = a.own(one.name) == b.own(other.name) and one.op == other.op and one.place == other.place
        if not same or one.param != other.param or one.views != other.views:
            break
        count += 1
    return min(count, len(a.nodes) - 1, len(b.nodes) - 1)


def _outer(layer: Layer, start: int) -> list[str]:
    """Values of this or another layer that the operations from `start` read and that are made before."""
    made = {name for node in layer.nodes[start:] for name in node.outs}
    reads = dict.fromkeys(name for node in layer.nodes[start:] for name in node.ins)
    values = {*layer.args, *filter(layer.own, layer.made)}
    return [name for name in reads if name in values - made]


def _shape(part: Segment) -> tuple:
    """Equal for segments that share one function: layers of one block only, the same but for their indices."""
    first = part.groups[0]
    if any(group.layer.block != first.layer.block for group in part.groups) or not first.label:
        return (part.inputs,)
    return tuple((group.form, group.index - first.index) for group in part.groups)


def _runs(groups: Sequence[Group]) -> Iterator[_Run]:
    run = _Run(groups=[])
    for group in groups:
        last = run.groups[-1] if run.groups else None
        follows = last and group.label and last.form == group.form and last.index + 1 == group.index
        if last and not (follows and _regular(group)):
            yield run
            run = _Run(groups=[])
        run.groups.append(group)
    if run.groups:
        yield run


def _regular(group: Group) -> bool:
    """All that it is handed comes from layers of its own block: the index says which."""
    return all(name.startswith(f"{group.layer.block}.{group.index - back}.")
               for name, back in zip(group.reads, group.back, strict=True))  # fmt: skip


def _range(numbers: Sequence[int], index: Any) -> str:
    first, stop = index(numbers[0]), index(numbers[-1] + 1)
    return f"range({stop})" if first == "0" else f"range({first}, {stop})"


def _told(groups: Sequence[Group], one_of: str = "One of ") -> str:
    """`One of layers.1 to layers.39.`, `layers.0.`"""
    runs: list[list[Group]] = []
    for group in groups:
        if runs and runs[-1][-1].index + 1 == group.index:
            runs[-1].append(group)
        else:
            runs.append([group])
    words = [run[0].label if len(run) == 1 else f"{run[0].label} to {run[-1].label}" for run in runs]
    return f"{one_of if len(groups) > 1 else ''}{', '.join(words)}."


def describe(part: Segment) -> str:
    """'embed, rope.cos, rope.sin, layers.0 to layers.18'"""
    words: list[str] = []
    for block, groups in groupby(part.groups, key=lambda group: group.layer.block):
        labels = list(dict.fromkeys(group.label or group.layer.nodes[0].name for group in groups))
        words += labels if not block else labels if len(labels) == 1 else [f"{labels[0]} to {labels[-1]}"]
    return ", ".join(words)


# ---- one operation


def statements(scope: Scope, node: AtbNode, views: dict[str, View], done: set[str]) -> list[str]:
    """reshape statements for views not yet named, then add_operation."""
    lines: list[str] = []
    ins: list[Call | str] = [scope.name(name) for name in node.ins]
    for at, shape in node.views.items():
        name = node.ins[at]
        view = _view(scope.group.layer.tensors[name].shape, shape)
        views.setdefault(view.name, view)
        ins[at] = seen = scope.view(name, view.name)
        if seen not in done:
            done.add(seen)
            lines += statement(Call(name="graph.reshape", args=[scope.name(name), view.name, seen]), 4)
    operation = Call(name="atb.Operation", args=[param_call(ATB[node.op], node.param)])
    call = Call(name="graph.add_operation", args=[operation, _list(ins), _list(map(scope.name, node.outs))])
    return lines + statement(call, 4, comment=portable(str(node.place)) if node.place else "tables of all layers")


def _list(items: Iterable[Call | str]) -> Call:
    return Call(name="", args=list(items), brackets=("[", "]"))


def _view(source: Shape, target: Shape) -> View:
    """A symbol in the target is a dimension of the source; numbers are numbers."""
    dims = [f"shape[{source.index(d)}]" if isinstance(d, str) else str(d) for d in target]
    words = [d.lower() if isinstance(d, str) else str(d) for d in target]
    return View(
        name=f"as_{'_'.join(words)}",
        doc=f"{show_shape(source)} -> {show_shape(target)}",
        expression=f"[{', '.join(dims)}]",
    )


def param_call(op: AtbOp, param: Mapping[str, Any]) -> Call:
    """`atb.LinearParam(has_bias=False)`: torch_atb's names, only what differs from the defaults."""
    ranks = ["**ranks"] if takes_ranks(op) else []
    return Call(name=f"atb.{op.param_class}", args=[*ranks, *_arguments(op, op.fields, param)])


def _arguments(op: AtbOp, fields: Sequence[Field], param: Mapping[str, Any]) -> list[Call | str]:
    args: list[Call | str] = []
    for f in fields:
        if f.name not in param or (f.name in BUILD_ARGUMENTS and takes_ranks(op)):
            continue
        keyword = f"{f.python_name}="
        if f.kind == "struct":
            inner = _arguments(op, f.fields, param[f.name])
            args.append(Call(name=f"atb.{op.param_class}.{f.struct}", args=inner, keyword=keyword))
        else:
            args.append(keyword + python_value(op, f, param[f.name]))
    return args


def python_value(op: AtbOp, f: Field, value: Any) -> str:
    """A parameter value as torch_atb wants it: enum members by name."""
    kind = "AclDataType" if f.kind == "dtype" else f.kind
    members = op.enums.get(kind) or ENUMS.get(kind)
    if members:
        owner = f"atb.{op.param_class}.{kind}" if kind in op.enums else f"atb.{kind}"
        return f"{owner}.{next(name for name, number in members.items() if number == value)}"
    return quote(value) if isinstance(value, str) else repr(value)
