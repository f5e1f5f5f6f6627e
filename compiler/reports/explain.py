"""Everything that is known of one node: `llmc explain GRAPH NODE`.

    facts = explain(compile_model("llama2-70b", options), "layers.0.attn.o")      # plain data, for --json
    print(show_explanation(facts))

A node is named by itself, by a value it makes, a weight, a cache, or an output of the graph. What is no node of the
model (inputs of the step, rope tables) is explained by the ATB operations that make and read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import UserError, did_you_mean
from llmc.compiler.emit.rows import code_of
from llmc.compiler.ir import Graph, Node, TensorType, Weight, show_shape
from llmc.compiler.listing import LAYER
from llmc.compiler.memory import known_bytes
from llmc.compiler.ops import OPS
from llmc.compiler.passes.phase import split_phase
from llmc.compiler.pipeline import PHASE_PASSES
from llmc.compiler.reports.show import head_line, show_bytes

Stages = list[tuple[str, str, Graph]]  # name of a pass, its reason, the graph after it


def explain(compiled: Compiled, name: str) -> dict[str, Any]:
    """The facts of what is called `name`. UserError with near names where nothing is."""
    graph = compiled.graph
    node = find_node(compiled, name)
    if node is None:
        return _tensor(compiled, name)
    op = OPS[node.op]
    return {
        "compiled": head_line(compiled),
        "node": node.name,
        "op": node.op,
        "doc": op.doc,
        "authored": node.name in compiled.model.graph.by_name and op.authored,
        "place": str(node.place),
        "world_size": graph.world_size,
        "attributes": {key: value for key, value in node.attrs.items() if value is not None},
        "inputs": [_input(graph, slot, value) for slot, value in node.inputs.items()],
        "weights": [_weight(slot, weight) for slot, weight in node.weights.items()],
        "outputs": [_output(graph, value) for value in node.values],
        "rules": {
            "type": rule(op.shape),
            **({"sharding": rule(op.shard)} if graph.world_size > 1 else {}),
            "lowering": rule(op.lower),
            "source": op.source,
        },
        "phases": {phase: _phase(compiled, phase, node) for phase in compiled.segments},
    }


# ---- names


def find_node(compiled: Compiled, name: str) -> Node | None:
    """The node of the model graph that is called so, or makes, reads or keeps what is called so; None for a tensor that
    only the ATB graphs have."""
    graph = compiled.graph
    value = graph.outputs.get(name, name)
    if value in graph.by_name or value in graph.producer:
        return graph.by_name.get(value) or graph.producer[value]
    for node in graph.nodes:
        if any(weight.name == name for weight in node.weights.values()):
            return node
    if any(name in low.tensors or name in (n.name for n in low.nodes) for low in compiled.lowered.values()):
        return owner(graph, name)
    raise UserError(f"{compiled.model.name} has no node or value {name!r}", hint=_likely(graph, name))


def owner(graph: Graph, name: str) -> Node | None:
    """The node whose operation or tensor this is: the longest one that the name starts with."""
    while name and name not in graph.by_name:
        name = name.rpartition(".")[0]
    return graph.by_name.get(name)


def _likely(graph: Graph, name: str) -> str:
    """A near name: of the same layer where one is said, else of layer 0 or outside layers."""
    known = [*graph.inputs, *graph.by_name, *graph.producer]
    if inside := [node for node in graph.by_name if node.startswith(f"{name}.")]:
        more = f" and {len(inside) - 12} more" if len(inside) > 12 else ""
        return f"it is a block: {', '.join(inside[:12])}{more}"
    match = LAYER.match(f"{name}.")
    layers = sorted({int(m[2]) for k in known if (m := LAYER.match(k)) and match and m[1] == match[1]})
    if match and layers and int(match[2]) not in layers:
        return f"{match[1]} goes from {layers[0]} to {layers[-1]}"
    label = match[0] if match else "0"
    near = [k for k in known if not (m := LAYER.match(k)) or m[0] == label or (not match and m[2] == label)]
    if ending := [k for k in near if k.endswith(f".{name}")]:
        return f"did you mean {ending[0]!r}?"
    return did_you_mean(name, near) or "llmc show GRAPH lists the nodes"


# ---- facts


def describe(t: TensorType) -> dict[str, Any]:
    return {"dtype": t.dtype, "shape": list(t.shape), "shard": str(t.shard), "local": list(t.local)}


def _input(graph: Graph, slot: str, value: str) -> dict[str, Any]:
    maker = graph.producer.get(value)
    by = {"node": maker.name, "op": maker.op} if maker else None
    return {"slot": slot, "value": value, **describe(graph.types[value]), "producer": by}


def _output(graph: Graph, value: str) -> dict[str, Any]:
    readers = [
        {"node": node.name, "op": node.op, "slot": slot}
        for node in graph.consumers.get(value, ())
        for slot, read in node.inputs.items()
        if read == value
    ]
    names = [name for name, made in graph.outputs.items() if made == value]
    return {"value": value, **describe(graph.types[value]), "consumers": readers, "graph_outputs": names}


def _weight(slot: str, weight: Weight) -> dict[str, Any]:
    t = weight.type
    return {
        "slot": slot,
        "name": weight.name,
        **describe(t),
        "tp": weight.split,
        "bytes": known_bytes(t.dtype, t.shape),
        "bytes_per_rank": known_bytes(t.dtype, t.local),
        "tensors": [
            {
                "tensor": s.tensor,
                "shape": list(s.shape),
                "rows": asdict(s.rows) if s.rows else None,
                "place": str(s.place),
            }
            for s in weight.sources
        ],
        "ranks": [{"size": s.size, "local": s.local, "runs": [list(run) for run in s.runs]} for s in t.shard.splits],
    }


def rule(function: Callable) -> dict[str, str]:
    """Where a rule is, and what it says: the first line of its docstring."""
    says = (function.__doc__ or "").strip().partition("\n")[0]
    return {"function": f"{function.__module__}.{function.__qualname__.partition('.<locals>')[0]}", "says": says}


# ---- phases


def _phase(compiled: Compiled, phase: str, node: Node) -> dict[str, Any]:
    """What became of the node in one phase: the fusions that took it, and the ATB operations that compute it."""
    steps = stages(compiled, phase)
    taken, current = became(steps, node.name)
    if not current:
        return {"fused": taken, "node": None, "operations": []}
    final = steps[-1][2]
    mine = [n.name for n in compiled.lowered[phase].nodes if (o := owner(final, n.name)) and o.name == current]
    return {
        "fused": taken,
        "node": current,
        "op": final.by_name[current].op,
        "operations": list(_operations(compiled, phase, mine)),
    }


def became(steps: Stages, name: str) -> tuple[list[dict[str, str]], str]:
    """The fusions that took a node of the first graph, and the node of the last that stands in its place ("": none)."""
    taken: list[dict[str, str]] = []
    current = name
    for (_, _, before), (step, reason, after) in pairwise(steps):
        if current in before.by_name and current not in after.by_name:
            into = _successor(before, after, current)
            taken.append({"pass": step, "reason": reason, "into": into})
            if not into:
                return taken, ""
            current = into
        elif current in before.by_name and before.by_name[current].op != after.by_name[current].op:
            taken.append({"pass": step, "reason": reason, "into": current})
    return taken, current


def stages(compiled: Compiled, phase: str) -> Stages:
    """The phase's graph as the model's, after the split, and after each fusion."""
    options, graph = compiled.options, compiled.graph
    found: Stages = [("model", "", graph)]
    graph = split_phase(graph, phase)
    found.append(("phase", rule(split_phase)["says"], graph))
    for step in PHASE_PASSES:
        if step.name == "lower":
            break
        if step.when(step.name, graph, options):
            graph = step.run(graph, options)
            found.append((step.name, step.reason, graph))
    return found


def operations_of(compiled: Compiled, phase: str, steps: Stages) -> dict[str, list[str]]:
    """Node of the fused graph -> the names of its ATB operations."""
    found: dict[str, list[str]] = {}
    for node in compiled.lowered[phase].nodes:
        if mine := owner(steps[-1][2], node.name):
            found.setdefault(mine.name, []).append(node.name)
    return found


def operations_by_node(compiled: Compiled, phase: str) -> dict[str, list[str]]:
    """Node of the model -> the names of the ATB operations that compute it, alone or with others."""
    steps = stages(compiled, phase)
    done_by = operations_of(compiled, phase, steps)
    return {node.name: done_by.get(became(steps, node.name)[1], []) for node in compiled.graph.nodes}


def _successor(before: Graph, after: Graph, name: str) -> str:
    """The node that a pass made in place of `name`: the nearest neighbour, over nodes that went as well, with another
    operator than before; "" where nothing replaces it."""
    queue, seen = [name], {name}
    for at in queue:
        node = before.by_name[at]
        makers = [before.producer[value] for value in node.inputs.values() if value in before.producer]
        readers = [reader for value in node.values for reader in before.consumers.get(value, ())]
        for near in (*readers, *makers):
            now = after.by_name.get(near.name)
            if now and now.op != near.op:
                return near.name
            if not now and near.name not in seen:
                seen.add(near.name)
                queue.append(near.name)
    return ""


def _operations(compiled: Compiled, phase: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """ATB operations by name, as the generated module says them."""
    low = compiled.lowered[phase]
    flat = {node.name: node for node in low.nodes}
    parts = compiled.segments[phase]
    code = code_of(parts)
    for number, part in enumerate(parts, start=1):
        for group, written in ((g, node) for g in part.groups for node in g.layer.nodes):
            if group.actual(written.name) not in names:
                continue
            node = whole = flat[group.actual(written.name)]
            yield {
                "name": node.name,
                "op": node.op,
                "param": dict(node.param),
                "ins": [{"name": n, "shape": list(low.tensors[n].shape)} for n in whole.ins],
                "views": {str(i): list(shape) for i, shape in node.views.items()},
                "outs": [{"name": n, "shape": list(low.tensors[n].shape)} for n in whole.outs],
                "place": str(node.place) if node.place else None,
                "segment": number,
                "segments": len(parts),
                "code": [line.removeprefix("    ") for line in code[group.layer, written.name]],
            }


def _tensor(compiled: Compiled, name: str) -> dict[str, Any]:
    """A tensor that is no value of the model graph's nodes: an input of the step, a constant, a table of all layers."""
    found: dict[str, Any] = {"compiled": head_line(compiled), "tensor": name, "phases": {}}
    for phase, low in compiled.lowered.items():
        if name not in low.tensors:
            continue
        t = low.tensors[name]
        facts = {"dtype": t.dtype, "shape": list(t.shape), "shard": str(t.shard), "role": t.role, "host": t.host}
        makers = [node.name for node in low.nodes if name in node.outs and name not in low.inputs]
        found["phases"][phase] = {
            **facts,
            "operations": list(_operations(compiled, phase, makers)),
            "readers": [{"name": node.name, "op": node.op} for node in low.nodes if name in node.ins],
        }
    return found


# ---- as text


def show_explanation(facts: Mapping[str, Any]) -> str:
    return "\n".join(_tensor_lines(facts) if "tensor" in facts else _node_lines(facts))


def _node_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield facts["compiled"]
    yield f"{facts['node']}: {facts['op']}. {facts['doc']}"
    yield f"  {'place':<10} {facts['place']}{'' if facts['authored'] else ', inserted by the compiler'}"
    if facts["attributes"]:
        yield f"  {'attributes':<10} {', '.join(f'{key} {plain(v)}' for key, v in facts['attributes'].items())}"
    for t in facts["inputs"]:
        maker = f"made by {t['producer']['node']} ({t['producer']['op']})" if t["producer"] else "an input of the graph"
        yield f"  {'reads':<10} {t['slot']} = {t['value']}: {_type(t)}; {maker}"
    for w in facts["weights"]:
        yield from _weight_lines(w, facts["world_size"])
    for t in facts["outputs"]:
        readers = [f"{c['node']} ({c['op']}, {c['slot']})" for c in t["consumers"]]
        readers += [f"the graph's output {name}" for name in t["graph_outputs"]]
        yield f"  {'makes':<10} {t['value']}: {_type(t)}"
        yield f"  {'read by':<10} {', '.join(readers)}"
    for kind, what in facts["rules"].items():
        if kind != "source":
            says = f": {what['says']}" if what["says"] else ""
            yield f"  {kind + ' rule':<14} {what['function']}{says}"
    yield f"  {'source':<14} {facts['rules']['source']}"
    for phase, found in facts["phases"].items():
        yield ""
        yield from _phase_lines(phase, found, facts["node"])


def _weight_lines(w: Mapping[str, Any], ranks: int) -> Iterator[str]:
    size = show_bytes(w["bytes_per_rank"])
    if w["bytes"] != w["bytes_per_rank"]:
        size += f" a rank, of {show_bytes(w['bytes'])}"
    tp = f"tp {w['tp']}, " if ranks > 1 else ""
    yield f"  {'weight':<10} {w['slot']} = {w['name']}: {_type(w)}; {tp}{size}"
    if w["shard"] == "P":
        yield f"  {'':<10}   rank 0 has it, the others have zeros: it is added once to the sum"
    axis = "columns" if w["shard"] == "S(1)" else "rows"
    for number, tensor in enumerate(w["tensors"]):
        what = f"{tensor['tensor']} {show_shape(tensor['shape'])}{_taken(tensor['rows'])}"
        yield f"  {'':<10}   {what}  {tensor['place']}"
        if w["ranks"]:
            split = w["ranks"][number] if axis == "rows" else w["ranks"][0]
            yield f"  {'':<10}   {axis} on ranks 0 to {ranks - 1}: {_shares(split)}"


def _taken(rows: Mapping[str, int] | None) -> str:
    """Which rows of a checkpoint tensor are meant."""
    if not rows:
        return ""
    if rows["groups"] > 1:
        return f", of every {rows['stride']} rows {rows['size']} from the {rows['offset']}th"
    return f", rows {rows['offset']}-{rows['offset'] + rows['size'] - 1}"


def _shares(split: Mapping[str, Any]) -> str:
    """`0-639, 640-1279, ...`, with the zeros that fill a short share."""
    words = []
    for start, count in split["runs"]:
        held = f"{start}-{start + count - 1}" if count else ""
        zeros = f"{split['local'] - count} zeros" if count < split["local"] else ""
        words.append(" + ".join(filter(None, (held, zeros))))
    return ", ".join(words)


def _phase_lines(phase: str, found: Mapping[str, Any], name: str) -> Iterator[str]:
    yield phase
    for step in found["fused"]:
        into = f"into {step['into']}" if step["into"] else "nothing takes its place"
        yield f"  {step['pass']} ({step['reason']}): {into}"
    yield from _operation_lines(found["operations"])


def _operation_lines(operations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for o in operations:
        yield f"  {o['op']} {o['name']}, in segment {o['segment']} of {o['segments']}"
        for i, t in enumerate(o["ins"]):
            view = f" as {show_shape(o['views'][str(i)])}" if str(i) in o["views"] else ""
            yield f"    in   {t['name']} {show_shape(t['shape'])}{view}"
        for t in o["outs"]:
            yield f"    out  {t['name']} {show_shape(t['shape'])}"
        yield from (f"    {line}" for line in o["code"])


def _tensor_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield facts["compiled"]
    for phase, t in facts["phases"].items():
        host = ", read on the host" if t["host"] else ""
        yield f"{facts['tensor']} in {phase}: {t['role']}, {t['dtype']} {show_shape(t['shape'])} {t['shard']}{host}"
        readers = [f"{r['name']} ({r['op']})" for r in t["readers"]]
        more = f" and {len(readers) - 4} more" if len(readers) > 4 else ""
        yield f"  read by {', '.join(readers[:4])}{more}"
        yield from _operation_lines(t["operations"])


def _type(t: Mapping[str, Any]) -> str:
    local = f", a rank {show_shape(t['local'])}" if t["local"] != t["shape"] else ""
    return f"{t['dtype']} {show_shape(t['shape'])} {t['shard']}{local}"


def plain(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)
