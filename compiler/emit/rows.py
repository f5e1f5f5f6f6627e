"""Rows for the templates: every decision about the generated text is made here.

one distinct segment  ->  one Function: name, docstring, sections of statements, each with its YAML place
one view              ->  one View: a small function from the old shape to the new one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import ENUMS, AtbOp, Field
from llmc.compiler.diagnostics import portable
from llmc.compiler.emit.python import Call, listing, quote, statement
from llmc.compiler.ir import AtbGraph, AtbNode, Shape, show_shape
from llmc.compiler.passes.segment import LAYER, Segment

# Parameters that are arguments of `build`: the same code serves every rank and every group of that size.
BUILD_ARGUMENTS = {
    "rank": "rank",
    "rankSize": "world_size",
    "rankTableFile": "rank_table_file",
    "commDomain": "comm_domain",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """`name(shape)` returns `expression`."""

    name: str
    doc: str
    expression: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """Statements of one layer."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Function:
    """The function that builds one distinct segment."""

    name: str
    arguments: str  # after `atb`
    doc: str
    signature: Sequence[str]  # the set_input_output statement
    sections: Sequence[Section]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Everything that a template prints for one phase."""

    views: Sequence[View]
    functions: Sequence[Function]
    instances: Sequence[str]  # lines: for each segment a call of the function that builds it


def python_rows(segments: Sequence[Segment], model: str) -> Rows:
    """Segments of one phase -> rows; equal segments share one function."""
    views: dict[str, View] = {}
    shared: dict[tuple, list[Segment]] = {}
    for part in segments:
        shared.setdefault(part.code, []).append(part)
    names = {code: f"segment_{i}" for i, code in enumerate(shared)}
    return Rows(
        functions=[_function(names[code], parts, views) for code, parts in shared.items()],
        views=list(views.values()),
        instances=[
            line
            for i, part in enumerate(segments)
            for line in statement(_instance(names[part.code], graph_name(model, part.graph.phase, i), part), 8, end=",")
        ],
    )


def _instance(function: str, name: str, part: Segment) -> Call:
    return Call(name=function, args=["atb", quote(name), *communicator(part)])


def communicator(part: Segment) -> Sequence[str]:
    """Arguments of `build` that the segment's operations take; none where it has no collective."""
    return list(BUILD_ARGUMENTS.values()) if any(takes_ranks(ATB[node.op]) for node in part.graph.nodes) else []


def takes_ranks(op: AtbOp) -> bool:
    return {f.name for f in op.fields} >= set(BUILD_ARGUMENTS)


def graph_name(model: str, phase: str, index: int) -> str:
    """Letters, digits and underscores, at most 128 (atb-operations.md 1.2)."""
    word = "".join(c if c.isalnum() and c.isascii() else "_" for c in model)
    return f"{word[:100]}_{phase}_{index}"


def _function(name: str, parts: Sequence[Segment], views: dict[str, View]) -> Function:
    graph = parts[0].graph
    sections: list[tuple[str, list[str]]] = []  # title, statements
    done: set[str] = set()
    for node in graph.nodes:
        match = LAYER.match(node.name)
        title = f"layer {parts[0].layers.index(match[1]) - _outside(parts[0])}" if match else ""
        if not sections or sections[-1][0] != title:
            sections.append((title, []))
        sections[-1][1].extend(statements(graph, node, views, done))
    return Function(
        name=name,
        arguments=", ".join(["name", *communicator(parts[0])]),
        doc="; ".join(dict.fromkeys(describe(part) for part in parts)),
        signature=statement(
            Call(name="graph.set_input_output", args=[listing(graph.inputs), listing(graph.outputs)]), 4
        ),
        sections=[Section(title=title, lines=lines) for title, lines in sections],
    )


def _outside(part: Segment) -> int:
    """Nodes outside layers that stand before the first layer."""
    return next((i for i, label in enumerate(part.layers) if LAYER.match(f"{label}.")), 0)


def describe(part: Segment) -> str:
    """'embed, rope.cos, rope.sin, layers.0 to layers.18'"""
    words: list[str] = []
    run: list[str] = []
    for label in (*part.layers, ""):
        if label and LAYER.match(f"{label}."):
            run.append(label)
            continue
        if run:
            words.append(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}")
            run = []
        if label:
            words.append(label)
    return ", ".join(words)


def statements(graph: AtbGraph, node: AtbNode, views: dict[str, View], done: set[str]) -> list[str]:
    """reshape statements for views not yet named, then add_operation."""
    lines: list[str] = []
    ins = list(node.ins)
    for index, shape in node.views.items():
        source = node.ins[index]
        view = _view(graph.tensors[source].shape, shape)
        views.setdefault(view.name, view)
        ins[index] = f"{source}:{view.name}"
        if ins[index] not in done:
            done.add(ins[index])
            lines += statement(Call(name="graph.reshape", args=[quote(source), view.name, quote(ins[index])]), 4)
    operation = Call(name="atb.Operation", args=[param_call(ATB[node.op], node.param)])
    call = Call(name="graph.add_operation", args=[operation, listing(ins), listing(node.outs)])
    return lines + statement(call, 4, comment=portable(str(node.place)) if node.place else "tables of all layers")


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
    return Call(name=f"atb.{op.param_class}", args=_arguments(op, op.fields, param))


def _arguments(op: AtbOp, fields: Sequence[Field], param: Mapping[str, Any]) -> list[Call | str]:
    args: list[Call | str] = []
    for f in fields:
        if f.name in BUILD_ARGUMENTS and takes_ranks(op):
            args.append(f"{f.python_name}={BUILD_ARGUMENTS[f.name]}")
            continue
        if f.name not in param:
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
