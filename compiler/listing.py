"""The ATB operations of a phase as plain data, equal layers once: what the manifest keeps and `llmc diff` compares.

    {"name": "layers.{i}.attn.o", "layers": "0-39", "op": "Linear", "param": {"hasBias": False},
     "ins": ["layers.{i}.attn.core", "layers.{i}.attn.o.weight"], "views": {},
     "outs": [["layers.{i}.attn.o", "float16 [T, 5120] R"]]}

Names are the model's. `{i}` stands for the layer, `{i-1}` for the one before it; shapes are one rank's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import ENUMS, AtbOp, Field
from llmc.compiler.ir import AtbGraph, AtbNode, AtbTensor, show_shape

LAYER = re.compile(r"(.*?)\.(\d+)\.")


def operations(graph: AtbGraph) -> list[dict[str, Any]]:
    """The operations of the graph in order, equal layers as one entry."""
    entries: dict[str, tuple[AtbNode, list[int]]] = {}
    for node in graph.nodes:
        match = LAYER.match(node.name)
        _, layers = entries.setdefault(_alike(graph, node, match), (node, []))
        layers.extend([int(match[2])] if match else [])
    return [_entry(graph, node, layers) for node, layers in entries.values()]


def _alike(graph: AtbGraph, node: AtbNode, match: re.Match[str] | None) -> str:
    """Equal for nodes that are one entry: what `_operation` reads, with this layer and the one before it unnamed."""
    outs = [graph.tensors[name] for name in node.outs]
    types = [(t.dtype, t.format, t.shape, t.shard.letter, t.shard.axis) for t in outs]
    text = repr((node.name, node.op, node.param, node.ins, node.views, node.outs, types))
    if not match:
        return text
    block, layer = match[1], int(match[2])
    return text.replace(f"'{block}.{layer}.", "'{i}.").replace(f"'{block}.{layer - 1}.", "'{i-1}.")


def _entry(graph: AtbGraph, node: AtbNode, layers: list[int]) -> dict[str, Any]:
    entry = in_layer(node.name, {"name": node.name, **_operation(graph, node)})
    return {"name": entry.pop("name"), "layers": ranges(layers), **entry}


def _operation(graph: AtbGraph, node: AtbNode) -> dict[str, Any]:
    return {
        "op": node.op,
        "param": plain_param(ATB[node.op], ATB[node.op].fields, node.param),
        "ins": list(node.ins),
        "views": {str(i): show_shape(shape) for i, shape in node.views.items()},
        "outs": [[name, show_tensor(graph.tensors[name])] for name in node.outs],
    }


def show_tensor(t: AtbTensor) -> str:
    """`float16 [T, 1728] S(1)`: one rank's shape, and how the ranks' shares make the value."""
    return f"{show_plain_tensor(t)} {t.shard}"


def show_plain_tensor(t: AtbTensor) -> str:
    """The same without the letter; a format is said where it is not nd."""
    return f"{t.dtype} {f'{t.format} ' if t.format != 'nd' else ''}{show_shape(t.shape)}"


def plain_param(op: AtbOp, fields: Iterable[Field], param: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """C++ names to values; enums by name, nested structs with a dot: {"normParam.epsilon": 1e-5}."""
    found: dict[str, Any] = {}
    for f in fields:
        if f.name not in param:
            continue
        value, name = param[f.name], prefix + f.name
        kind = "AclDataType" if f.kind == "dtype" else f.kind
        members = op.enums.get(kind) or ENUMS.get(kind)
        if f.kind == "struct":
            found |= plain_param(op, f.fields, value, f"{name}.")
        elif members:
            found[name] = next(word for word, number in members.items() if number == value)
        else:
            found[name] = list(value) if isinstance(value, (list, tuple)) else value
    return found


def collapse(items: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """(name, facts) of every layer  ->  {"name", "layers", facts}, layers with equal facts as one entry.

    An entry stands where its first layer stood; outside layers "layers" is ""."""
    entries: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for name, facts in items:
        entry = in_layer(name, {"name": name, **facts})
        match = LAYER.match(name)
        _, layers = entries.setdefault(json.dumps(entry, sort_keys=True), (entry, []))
        layers.extend([int(match[2])] if match else [])
    return [{"name": entry.pop("name"), "layers": ranges(layers), **entry} for entry, layers in entries.values()]


def expand(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The inverse, except that facts keep saying `{i}`, so that layers can be compared."""
    for entry in entries:
        facts = {key: value for key, value in entry.items() if key not in ("name", "layers")}
        for layer in layer_numbers(entry["layers"]):
            yield at_layer(entry["name"], layer), facts


def in_layer(name: str, facts: Any) -> Any:
    """The facts with the layer of `name` as `{i}`, in every name that starts with the same block and a layer."""
    match = LAYER.match(name)
    if not match:
        return facts
    block, layer = f"{match[1]}.", int(match[2])

    def said(text: str) -> str:
        if not text.startswith(block):
            return text
        number, dot, rest = text[len(block) :].partition(".")
        if not (dot and number.isdecimal()):
            return text
        distance = int(number) - layer
        return f"{block}{{i{distance:+d}}}.{rest}" if distance else f"{block}{{i}}.{rest}"

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return said(value)
        if isinstance(value, Mapping):
            return {said(key): walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return walk(facts)


def at_layer(text: str, layer: int | str) -> str:
    """`layers.{i}.x`, 3  ->  `layers.3.x`; `layers.{i-1}.x`  ->  `layers.2.x`; a range is put in for `{i}` only."""
    if isinstance(layer, int):
        text = re.sub(r"\{i([+-]\d+)\}", lambda m: str(layer + int(m[1])), text)
    return text.replace("{i}", str(layer))


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5]  ->  "0-2,5" """
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def layer_numbers(text: str) -> list[int]:
    """The inverse of `ranges`; for "", one entry outside layers."""
    if not text:
        return [0]
    pairs = [run.split("-") for run in text.split(",")]
    return [n for pair in pairs for n in range(int(pair[0]), int(pair[-1]) + 1)]
