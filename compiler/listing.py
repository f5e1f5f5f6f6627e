"""The ATB operations of a phase as plain data, equal layers once: what the manifest keeps and `llmc diff` compares.

    {"name": "layers.{i}.attn.o", "layers": "0-39", "op": "Linear", "param": {"hasBias": False},
     "ins": ["layers.{i}.attn.core", "layers.{i}.attn.o.weight"], "views": {},
     "outs": [["layers.{i}.attn.o", "float16 [T, 5120] R"]]}

Names are the model's. `{i}` stands for the layer, `{i-1}` for the one before it; shapes are one rank's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import ENUMS, AtbOp, Field
from llmc.compiler.ir import AtbNode, AtbTensor, show_shape
from llmc.compiler.layers import Group, nodes_of

LAYER = re.compile(r"(.*?)\.(\d+)\.")


def operations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The operations in order, those of equal layers as one entry."""
    entries: dict[str, tuple[dict[str, Any], list[int]]] = {}
    known: dict[tuple, list[str]] = {}  # groups that read alike -> the keys of their operations
    for group in groups:
        if group.form not in known:
            nodes, tensors = nodes_of([group])
            found = [in_layer(node.name, _operation(node, tensors)) for node in nodes]
            known[group.form] = [json.dumps(entry, sort_keys=True) for entry in found]
            for key, entry in zip(known[group.form], found, strict=True):
                entries.setdefault(key, (entry, []))
        for key in known[group.form]:
            entries[key][1].extend([group.index] if group.label else [])
    return [{"name": entry.pop("name"), "layers": ranges(layers), **entry} for entry, layers in entries.values()]


def _operation(node: AtbNode, tensors: Mapping[str, AtbTensor]) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "param": plain_param(ATB[node.op], ATB[node.op].fields, node.param),
        "ins": list(node.ins),
        "views": {str(i): show_shape(shape) for i, shape in node.views.items()},
        "outs": [[name, show_tensor(tensors[name])] for name in node.outs],
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
