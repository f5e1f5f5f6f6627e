"""The picture: one HTML page that draws a model and, on click, its lowered layers: `llmc show GRAPH --html FILE`.

    write(compile_model("llama2-13b", Options()), Path("llama2-13b.html"))

The page needs no server and no network. Python prepares the rows, `templates/html/page.js` makes boxes of them, and
dagre (`templates/html/vendor`, which also says why dagre) lays them out. The same model gives the same bytes.

    drawing   {"nodes": [node], "edges": [edge], "facts": [[label, text]]}
    node      {"id", "kind": operator|operation|in|out, "title", "name", "letter", "lines": [line], "details": [line],
               "place", "links": {phase: [id]}, "goto": id}
    line      [label, name, text, letter]; any but the label may be ""
    times     {phase: {operation: [us, share, operations that it has one time with]}}, where somebody measured
    edge      {"from", "to", "lines": [line]}

A layer's drawing says `{i}` for its number in every string that starts with the name of its block; layers with equal
drawings share one (`kinds`, and for each layer the index of its kind in `kind_of`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import GRAPH_LIMITS
from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import Place, portable
from llmc.compiler.emit.render import render
from llmc.compiler.emit.rows import param_call
from llmc.compiler.files import write_whole
from llmc.compiler.ir import AtbGraph, AtbNode, AtbTensor, Graph, Node, TensorType, Weight, show_shape
from llmc.compiler.listing import LAYER, in_layer, plain_param, show_plain_tensor
from llmc.compiler.memory import cached_bytes, known_bytes
from llmc.compiler.ops import OPS
from llmc.compiler.passes.segment import Segment, why_it_ends
from llmc.compiler.reports.explain import Stages, became, operations_of, plain, stages
from llmc.compiler.reports.show import head_line, show_bytes, summary

Row = dict[str, Any]
Line = list[str]


def write(compiled: Compiled, target: Path, times: Mapping[str, Any] | None = None) -> int:
    """Write the page, whole or not at all; returns its size in bytes. UserError where it cannot be written."""
    return write_whole(target, page(compiled, times), "--html")


def page(compiled: Compiled, times: Mapping[str, Any] | None = None) -> str:
    """The text of the page. `times`: what was measured (times.py), which then stands in the boxes."""
    drawn = picture(compiled)
    if times:
        drawn = {**drawn, "facts": [*drawn["facts"], ["measured", times["note"]]], "times": times["phases"]}
    data = json.dumps(drawn, separators=(",", ":"))
    return render(
        "html/page.html.j2",
        title=html.escape(f"llmc: {head_line(compiled)}"),
        style=_part("page.css"),
        notice=_part("vendor/dagre.LICENSE").strip(),
        library="\n".join(
            line for line in _part("vendor/dagre.min.js").splitlines() if not line.startswith("//# sourceMappingURL")
        ),
        script=_part("page.js"),
        data=data.replace("<", "\\u003c"),  # no "</script>" can end the block it stands in
    )


def _part(name: str) -> str:
    return files("llmc.templates").joinpath("html").joinpath(name).read_text(encoding="utf-8")


def picture(compiled: Compiled) -> Row:
    """Everything that the page shows, as plain data."""
    graph = compiled.graph
    blocks = _blocks(graph)
    steps = {phase: stages(compiled, phase) for phase in compiled.segments}
    done_by = {phase: operations_of(compiled, phase, steps[phase]) for phase in steps}
    return {
        "head": head_line(compiled),
        "facts": _facts(compiled),
        "blocks": blocks,
        "model": _model(graph, blocks, steps, done_by),
        "views": _views(blocks),
        "phases": {phase: _phase(compiled, phase, blocks) for phase in compiled.segments},
    }


def _facts(compiled: Compiled) -> list[list[str]]:
    known = summary(compiled)
    return [
        *([name, str(value)] for name, value in compiled.graph.sizes.items()),
        ["weights of a rank", show_bytes(known["weight_bytes"])],
        ["cache of a rank", f"{show_bytes(known['cache_bytes_per_token'])} a token"],
    ]


# ---- layers


def _blocks(graph: Graph) -> dict[str, int]:
    """Repeated block -> how many layers it has, in order."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if match := LAYER.match(node.name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _label(name: str, blocks: Mapping[str, int]) -> tuple[str, int] | None:
    """`layers.3.attn.o`  ->  ("layers", 3); None outside layers."""
    match = LAYER.match(f"{name}.")
    return (match[1], int(match[2])) if match and match[1] in blocks else None


def _kinds(block: str, drawings: Sequence[Row]) -> Row:
    """One drawing a layer  ->  the different ones, and which of them each layer has."""
    kinds: dict[str, tuple[int, Row]] = {}
    kind_of = []
    for layer, drawing in enumerate(drawings):
        said = in_layer(f"{block}.{layer}.", drawing)
        number, _ = kinds.setdefault(json.dumps(said, sort_keys=True), (len(kinds), said))
        kind_of.append(number)
    return {"kinds": [kind for _, kind in kinds.values()], "kind_of": kind_of}


# ---- the model


def _model(graph: Graph, blocks: Mapping[str, int], steps: Mapping[str, Stages], done_by: Mapping[str, Any]) -> Row:
    """The operators: those outside layers as one drawing; of each block the layers, and how they are connected."""
    runs: dict[tuple[str, int] | None, list[Node]] = {None: []}
    for node in graph.nodes:
        runs.setdefault(_label(node.name, blocks), []).append(node)

    def drawing(nodes: Sequence[Node]) -> Row:
        return {
            "nodes": [
                _operator(graph, node, {p: _became(steps[p], done_by[p], node.name) for p in steps}) for node in nodes
            ],
            "edges": _merged(edge for node in nodes for edge in _edges(graph, blocks, node)),
        }

    outside = drawing(runs[None])
    outside["nodes"] += [_end(f"{name}:in", "in", "input", name, t) for name, t in graph.inputs.items()]
    for name, value in graph.outputs.items():
        outside["nodes"].append(_end(f"{name}:out", "out", "output", name, graph.types[value]))
        outside["edges"].append(_edge(_source(graph, blocks, None, value), f"{name}:out"))
    return {
        "outside": outside,
        "blocks": {
            block: _kinds(block, [drawing(runs.get((block, layer), [])) for layer in range(count)])
            for block, count in blocks.items()
        },
    }


def _edges(graph: Graph, blocks: Mapping[str, int], node: Node) -> Iterable[Row]:
    """The edges into a node. What a layer reads of the layer before is drawn as what layer 0 reads in its place."""
    label = _label(node.name, blocks)
    for slot, value in node.inputs.items():
        maker = graph.producer.get(value)
        source = _label(maker.name, blocks) if maker else None
        if label and source and source[0] == label[0] and source[1] != label[1]:
            first = graph.by_name.get(node.name.replace(f"{label[0]}.{label[1]}.", f"{label[0]}.0.", 1))
            if not first or slot not in first.inputs:
                continue
            value = first.inputs[slot]
        yield _edge(_source(graph, blocks, label, value), node.name)


def _source(graph: Graph, blocks: Mapping[str, int], reader: tuple[str, int] | None, value: str) -> str:
    """The id of the node that makes the value; a block that is read from outside stands for its last layer."""
    if value not in graph.producer:
        return f"{value}:in"
    name = graph.producer[value].name
    source = _label(name, blocks)
    if source and (not reader or source[0] != reader[0]):
        return name.replace(f"{source[0]}.{source[1]}.", f"{source[0]}.{{i}}.", 1)
    return name


def _edge(source: str, target: str, lines: Sequence[Line] = ()) -> Row:
    return {"from": source, "to": target, "lines": list(lines)}


def _merged(edges: Iterable[Row]) -> list[Row]:
    """One edge a pair of nodes, with what all of them carry."""
    found: dict[tuple[str, str], Row] = {}
    for edge in edges:
        one = found.setdefault((edge["from"], edge["to"]), _edge(edge["from"], edge["to"]))
        one["lines"] += [line for line in edge["lines"] if line not in one["lines"]]
    return list(found.values())


def _end(name: str, kind: str, title: str, value: str, t: TensorType) -> Row:
    """An input or output of the model."""
    return {
        "id": name,
        "kind": kind,
        "title": title,
        "name": value,
        "letter": str(t.shard),
        "lines": [["", "", _type(t), ""]],
        "details": [],
        "place": "",
        "links": {},
        "goto": "",
    }


def _operator(graph: Graph, node: Node, becomes: Mapping[str, tuple[list[tuple[str, str]], list[str]]]) -> Row:
    """One operator of the model."""
    types = [graph.types[value] for value in node.values]
    details: list[Line] = [["what", "", OPS[node.op].doc, ""]]
    details += [[name, "", plain(value), ""] for name, value in node.attrs.items() if value is not None]
    for slot, value in node.inputs.items():
        details.append([f"reads {slot}", value, _type(graph.types[value]), str(graph.types[value].shard)])
    for slot, weight in node.weights.items():
        details += _weight_lines(node.name, slot, weight)
    for value, t in zip(node.values, types, strict=True):
        details.append(["makes", value, _type(t), str(t.shard)])
    for phase, (fusions, operations) in becomes.items():
        details += [
            [phase, into, f"takes it in: {reason}" if into else f"drops it: {reason}", ""] for into, reason in fusions
        ]
        details += [[f"{phase}, ATB", name, "", ""] for name in operations]
        if not operations:
            details.append([f"{phase}, ATB", "", "no operation", ""])
    return {
        "id": node.name,
        "kind": "operator",
        "title": node.op,
        "name": node.name,
        "letter": " ".join(dict.fromkeys(str(t.shard) for t in types)),
        "lines": [["", "", text, ""] for text in dict.fromkeys(_type(t) for t in types)],
        "details": details,
        "place": _place(node.place),
        "links": {phase: operations for phase, (_, operations) in becomes.items()},
        "goto": "",
    }


def _weight_lines(node: str, slot: str, weight: Weight) -> list[Line]:
    """The weight, and the tensors of the checkpoint that it is made of."""
    t = weight.type
    size = show_bytes(known_bytes(t.dtype, t.local))
    if t.local != t.shape:
        size += f" a rank, of {show_bytes(known_bytes(t.dtype, t.shape))}"
    lines = [[slot, weight.name, f"{_type(t)}; {size}", str(t.shard)]]
    match = LAYER.match(node)
    for source in weight.sources:
        # The layer's number in the checkpoint's name: there it need not follow the name of our block.
        name = source.tensor.replace(f".{match[2]}.", ".{i}.", 1) if match else source.tensor
        lines.append(["checkpoint", name, show_shape(source.shape), ""])
    return lines


def _became(steps: Stages, done_by: Mapping[str, list[str]], name: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Fusions that took the operator (into what, why), and the ATB operations that compute it in one phase."""
    taken, current = became(steps, name)
    return [(step["into"], step["reason"]) for step in taken], done_by.get(current, [])


# ---- the lowered phases


def _views(blocks: Mapping[str, int]) -> list[str]:
    """Parts of a phase that are drawn by themselves: `before layers`, `layers`, `after layers`."""
    if not blocks:
        return ["model"]
    return [f"before {next(iter(blocks))}", *(view for name in blocks for view in (name, f"after {name}"))]


def _phase(compiled: Compiled, phase: str, blocks: Mapping[str, int]) -> Row:
    """The ATB operations of each view, and the segments."""
    low = compiled.lowered[phase]
    first, *_ = names = _views(blocks)
    runs: dict[tuple[str, int], list[AtbNode]] = {}
    view = first
    for node in low.nodes:
        label = _label(node.name, blocks)
        if label:
            view = f"after {label[0]}"
        runs.setdefault(label or (view, 0), []).append(node)
    readers: dict[str, list[AtbNode]] = {}
    makers: dict[str, AtbNode] = {}
    for node in low.nodes:
        for name in dict.fromkeys(node.ins):
            readers.setdefault(name, []).append(node)
        for name in node.outs:
            makers.setdefault(name, node)
    return {
        "views": {
            name: _kinds(
                name,
                [_drawing(low, runs.get((name, i), []), readers, makers) for i in range(blocks.get(name, 1))],
            )
            for name in names
        },
        "segments": [_segment(part, blocks) for part in compiled.segments[phase]],
    }


def _segment(part: Segment, blocks: Mapping[str, int]) -> Row:
    """Which layers and outer operations it holds; layer -1: none."""
    return {
        "layers": [list(_label(name, blocks) or (name, -1)) for name in part.layers],
        "counts": ", ".join(f"{count} of {GRAPH_LIMITS[kind]} {kind}" for kind, count in part.counts.items()),
        "ends": why_it_ends(part),
    }


def _drawing(
    low: AtbGraph, nodes: Sequence[AtbNode], readers: Mapping[str, Sequence[AtbNode]], makers: Mapping[str, AtbNode]
) -> Row:
    """Operations of one view, what they read from outside of it, and what is read outside."""
    inside = {node.name for node in nodes}
    last: dict[str, AtbNode] = {}  # tensor -> who wrote it last, so far: caches are written in place
    rows: list[Row] = []
    ends: dict[str, Row] = {}
    edges: list[Row] = []
    for node in nodes:
        rows.append(_operation(low, node, [name for name in node.ins if name in makers and _is_table(makers[name])]))
        for i, name in enumerate(node.ins):
            t = low.tensors[name]
            if name in last:
                edges.append(_edge(last[name].name, node.name, [_carried(name, last[name], t, node.views.get(i))]))
            elif t.role == "internal" and not _is_table(makers[name]):
                end = ends.setdefault(name, _pill(f"{name}:in", "in", name, t, makers[name].name))
                edges.append(_edge(end["id"], node.name, [_carried("", None, t, node.views.get(i))]))
        last |= dict.fromkeys(node.outs, node)
    for name, maker in last.items():
        t = low.tensors[name]
        outside = [node.name for node in readers.get(name, ()) if node.name not in inside]
        if t.role != "cache" and (outside or name in low.outputs):
            end = _pill(f"{name}:out", "out", name, t, outside[0] if outside else "")
            ends[end["id"]] = end
            edges.append(_edge(maker.name, end["id"], [_carried(name, maker, t, None)]))
    return {"nodes": [*ends.values(), *rows], "edges": _merged(edges), "facts": _sums(low, nodes)}


def _is_table(maker: AtbNode) -> bool:
    """Made once in front of all layers for all of them (rope's rows): no line in the YAML says it."""
    return maker.place is None


def _pill(name: str, kind: str, value: str, t: AtbTensor, goto: str) -> Row:
    """A tensor that comes from outside of the view or goes there."""
    where = "from" if kind == "in" else "to" if goto else "output"
    return {
        "id": name,
        "kind": kind,
        "title": where,
        "name": value,
        "letter": str(t.shard),
        "lines": [["", "", show_plain_tensor(t), ""]],
        "details": [],
        "place": "",
        "links": {},
        "goto": goto,
    }


def _carried(name: str, maker: AtbNode | None, t: AtbTensor, view: Sequence[int | str] | None) -> Line:
    """What is said on an edge: which output where there are several, and the shape, or that of the reader's view."""
    which = name if maker and len(maker.outs) > 1 else ""
    return ["", which, f"as {show_shape(tuple(view))}" if view else show_shape(t.shape), str(t.shard)]


def _operation(low: AtbGraph, node: AtbNode, tables: Sequence[str]) -> Row:
    """One ATB operation; which of its inputs are tables of all layers."""
    op = ATB[node.op]
    lines = [["param", "", f"{k}={plain(v)}", ""] for k, v in plain_param(op, op.fields, node.param).items()]
    details = [["call", "", param_call(op, node.param).flat(), ""]]
    for i, name in enumerate(node.ins):
        t = low.tensors[name]
        size = _size(t, low.phase)
        view = f" as {show_shape(node.views[i])}" if i in node.views else ""
        host = ", read on the host" if t.host else ""
        details.append(["reads", name, f"{t.role}: {show_plain_tensor(t)}{view}, {size}{host}", str(t.shard)])
        if t.role in ("weight", "cache"):
            lines.append([t.role, name, f"{show_plain_tensor(t)}, {size}", str(t.shard)])
        elif t.role != "internal" or name in tables:
            lines.append(["table" if name in tables else t.role, name, show_plain_tensor(t), str(t.shard)])
    for name in node.outs:
        t = low.tensors[name]
        written = t.role == "cache"
        details.append(
            ["writes" if written else "makes", name, f"{show_plain_tensor(t)}, {_size(t, low.phase)}", str(t.shard)]
        )
        if not written:
            lines.append(["out", name, f"{show_plain_tensor(t)}, {_size(t, low.phase)}", str(t.shard)])
    made = dict.fromkeys(str(low.tensors[name].shard) for name in node.outs)
    return {
        "id": node.name,
        "kind": "operation",
        "title": node.op,
        "name": node.name,
        "letter": " ".join(made),
        "lines": lines,
        "details": details,
        "place": _place(node.place) or "tables of all layers",
        "links": {},
        "goto": "",
    }


def _sums(low: AtbGraph, nodes: Sequence[AtbNode]) -> list[list[str]]:
    """Bytes on one rank: weights and caches that the operations read, and what they make for a token."""
    read = {name: low.tensors[name] for node in nodes for name in node.ins}
    made = {name: low.tensors[name] for node in nodes for name in node.outs}
    rows = "T" if low.phase == "prefill" else "B"
    weights = sum(known_bytes(t.dtype, t.shape) for t in read.values() if t.role == "weight")
    cache = sum(cached_bytes(t.dtype, t.shape) for t in read.values() if t.role == "cache")
    outputs = sum(known_bytes(t.dtype, t.shape) for t in made.values() if t.role != "cache" and rows in t.shape)
    facts = [("weights", weights, ""), ("cache", cache, " a token"), ("outputs of operations", outputs, " a token")]
    return [[label, show_bytes(size) + per] for label, size, per in facts if size]


def _size(t: AtbTensor, phase: str) -> str:
    """`6.25 MiB`, `10.0 KiB a token`: what a dimension without a number stands for."""
    if t.role == "cache":
        return f"{show_bytes(cached_bytes(t.dtype, t.shape))} a token"
    size = show_bytes(known_bytes(t.dtype, t.shape))
    symbols = [dim for dim in t.shape if isinstance(dim, str)]
    words = {"T": "token", "B": "token" if phase == "decode" else "sequence"}
    return size + "".join(f" a {words.get(symbol, symbol)}" for symbol in symbols)


# ---- words


def _type(t: TensorType) -> str:
    """`float16 [T, 13824], a rank [T, 1728]`"""
    local = f", a rank {show_shape(t.local)}" if t.local != t.shape else ""
    return f"{t.dtype} {show_shape(t.shape)}{local}"


def _place(place: Place | None) -> str:
    return portable(str(place)) if place else ""
