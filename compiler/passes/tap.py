"""Taps: values of the inside become outputs of the graph, so that what runs can be looked into, on any device.

    tap(graph, ("layers.3.*",))      # outputs: logits, layers.3.input_norm.y, layers.3.attn.qkv, ...

It runs after the fusions: what a fusion has made superfluous does not exist, and nothing is computed otherwise because
somebody looks. `stands_for` says which value of the checkpoint's own model code a value is, by the names of weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any

from llmc.compiler.diagnostics import UserError, did_you_mean, portable
from llmc.compiler.ir import LAYER, Graph, Node, Source
from llmc.compiler.sharding import Split

HANDED_ON = "@layers"  # in place of a pattern: what layers hand on, and everything outside layers
SAME = ("all_reduce", "all_gather", "cast", "last_token")  # their output is their input, whole, rounded or fewer rows


def check_taps(graph: Graph, patterns: Sequence[str]) -> None:
    """UserError for a pattern that no node fits, before fusions take nodes away."""
    for pattern in patterns:
        if pattern != HANDED_ON and not any(_fits(node, (pattern,)) for node in graph.nodes):
            names = [node.name for node in graph.nodes]
            raise UserError(
                f"--taps {pattern}: no node of {graph.name} is called so", hint=did_you_mean(pattern, names)
            )


def tap(graph: Graph, patterns: Sequence[str]) -> Graph:
    """nodes that a pattern names  ->  their values are outputs of the graph too, under their own names"""
    handed = set(handed_on(graph)) if HANDED_ON in patterns else set()
    known = {*graph.outputs.values()}
    tapped = [
        value
        for node in graph.nodes
        for value in node.values
        if value not in known and (value in handed or _fits(node, patterns))
    ]
    return replace(graph, outputs={**graph.outputs, **{v: v for v in tapped}}, tapped=tuple(tapped))


def _fits(node: Node, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (node.name, *node.values))


def handed_on(graph: Graph) -> Iterator[str]:
    """Values that leave the layer which makes them, and all that are made outside layers."""

    def layer(node: Node) -> str:
        match = LAYER.match(node.name)
        return f"{match[1]}.{match[2]}" if match and match[1] in graph.repeats else ""

    for node in graph.nodes:
        for value in node.values:
            readers = graph.consumers.get(value, ())
            if not layer(node) or any(layer(reader) != layer(node) for reader in readers):
                yield value


def described(graph: Graph, splits: Mapping[Split, str]) -> list[dict[str, Any]]:
    """What the manifest says of each tapped value and of the graph's own outputs, in the order of the graph: `shape`
    is the whole value's, `reads` names what its node reads, `stands_for` see there."""
    names = {value: name for name, value in graph.outputs.items()}
    found = []
    for node in graph.nodes:
        for value in node.values:
            if value not in names:
                continue
            t = graph.types[value]
            found.append({
                "name": names[value],
                "node": node.name,
                "op": node.op,
                "place": portable(str(node.place)) if node.place else "",
                "dtype": t.dtype,
                "shape": list(t.shape),
                "shard": str(t.shard),
                "splits": [splits[split] for split in t.shard.splits],
                "reads": [names.get(v, v) for v in node.inputs.values()],
                "head_dim": head_dim(graph, value),
                "stands_for": stands_for(graph, value),
            })  # fmt: skip
    return found


def head_dim(graph: Graph, value: str) -> int | None:
    """Size of a head, where the value's last axis is heads: it goes into rope or attention, or comes out of one."""
    around = (graph.producer[value], *graph.consumers.get(value, ()))
    return next((node.attrs["head_dim"] for node in around if node.op in ("rope", "attention")), None)


def stands_for(graph: Graph, value: str) -> dict[str, Any] | None:
    """The value of the checkpoint's own model code that this one is, or None where the weights do not tell.

    Modules are named by tensors: `model.layers.3.mlp.down_proj.weight` belongs to `model.layers.3.mlp.down_proj`.

    output      of the modules of these tensors, one after the other; of each the columns that its rows of the tensor
                make (a packed linear, or a part of one)
    embedding   output of the module with this table, which may be that of a head too
    input       of the module of this tensor: what a node with that weight reads (so attention's result is the input of
                o_proj, and a residual sum that of a norm)
    rope        the first (q) or second (k) result of `apply_rotary_pos_emb` in the module that holds these tensors'
    activation  of the module that holds these tensors': its activation function
    """
    node = graph.producer[value]
    made = _made_by_weight(graph, node, value)
    if made:
        return made
    if node.op in SAME:
        return stands_for(graph, node.inputs["x"]) if node.inputs["x"] in graph.producer else None
    if node.op == "rope":
        slot = node.outputs[node.values.index(value)]
        below = _sources(graph, node.inputs[slot])
        return _said("rope", below, slot) if below else None
    for reader in graph.consumers.get(value, ()):
        if reader.op in SAME and (found := _read(graph, reader.value())):
            return found
    return _read(graph, value) or _activation(graph, node)


def _made_by_weight(graph: Graph, node: Node, value: str) -> dict[str, Any] | None:
    if node.op == "split":
        sources = _sources(graph, value)
        return _said("output", sources) if sources else None
    if "weight" not in node.weights:
        return None
    sources = node.weights["weight"].sources
    if node.op == "add_rms_norm" and value != node.value("y"):
        return _said("input", sources)
    return _said("embedding" if node.op == "embedding" else "output", sources)


def _sources(graph: Graph, value: str) -> Sequence[Source]:
    """The tensors that made the value: all of a linear's, one for a part of it."""
    node = graph.producer.get(value)
    if node is None:
        return ()
    if node.op == "split":
        sources = _sources(graph, node.inputs["x"])
        return sources[(at := node.values.index(value)) : at + 1] if len(sources) == len(node.outputs) else ()
    if node.op == "cast":
        return _sources(graph, node.inputs["x"])
    return node.weights["weight"].sources if node.op == "linear" else ()


def _read(graph: Graph, value: str) -> dict[str, Any] | None:
    """The input of a module that reads the value: its node has a weight and one input."""
    for reader in graph.consumers.get(value, ()):
        if "weight" in reader.weights and list(reader.inputs) == ["x"]:
            return _said("input", reader.weights["weight"].sources[:1])
    return None


def _activation(graph: Graph, node: Node) -> dict[str, Any] | None:
    sources = _sources(graph, node.inputs["x"]) if node.op == "silu" else ()
    return _said("activation", sources) if sources else None


def _said(what: str, sources: Collection[Source], argument: str = "") -> dict[str, Any]:
    return {
        "what": what,
        "argument": argument,
        "parts": [
            {"tensor": source.tensor, "rows": asdict(source.rows) if source.rows else None} for source in sources
        ],
    }
