"""The operator registry -> the JSON Schema that editors use, and the operator tables of the language reference.

    python -m llmc.compiler.language.schema        # writes graphs/schema.json

The schema accepts what a file may say on its own. A file that `extends` another states parts of nodes, so keys that a
whole model needs are not required here; `llmc check` looks at the merged model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from llmc.compiler.language import reading
from llmc.compiler.language.definitions import BLOCK_KEYS, INPUTS, MODEL_KEYS, MODEL_NAME, PAIRINGS, PATTERN, SCALINGS
from llmc.compiler.language.source import GRAPHS
from llmc.compiler.ops import FAMILIES, OPS, Attr, Op
from llmc.compiler.target.device import ATTENTION, DTYPES, device_names

WORD = reading.NAME.pattern
NAME = f"^{WORD}$"
EDGE = {"type": "string", "pattern": rf"^{WORD}(\.{WORD})*$"}
EXPRESSION = {"type": ["integer", "number", "string"], "description": "a number, or an expression over sizes"}
TENSOR = {"type": "string", "description": "name in the checkpoint; {i} is the iteration"}
REMOVE = {"type": "null", "description": "removes what the extended file says"}


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a model file."""
    properties = {
        "extends": {"type": "string", "description": "file whose contents this one changes"},
        "name": {"type": "string", "pattern": f"^{MODEL_NAME.pattern}$"},
        "sizes": table(EXPRESSION),
        "dtype": {"enum": list(DTYPES)},
        "rope": {"$ref": "#/$defs/rope"},
        "config": table({"$ref": "#/$defs/rule"}, names={}),
        "unused": table({"type": "string", "description": "why"}, names={"pattern": r"^\S+$"}),
        "inputs": {"type": "array", "items": {"enum": list(INPUTS)}, "minItems": 1},
        "blocks": table({"$ref": "#/$defs/block"}),
        "graph": table({"anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/repeat"}]}),
        "outputs": table(EDGE),
        "policy": {"type": "array", "items": {"$ref": "#/$defs/policy"}, "minItems": 1},
        "support": {
            "type": "object",
            "properties": {device: removable({"$ref": "#/$defs/offer"}) for device in device_names()},
            "additionalProperties": False,
        },
    }
    for key, doc in MODEL_KEYS.items():
        properties[key] = {"description": doc, **removable(properties[key])}
    defs = {
        "rope": settings(
            {"theta": EXPRESSION, "pairing": {"enum": list(PAIRINGS)}, "scaling": {"$ref": "#/$defs/scaling"}}
        ),
        "scaling": scaling(),
        "rule": settings(
            {
                "is": {"type": ["boolean", "number", "string"]},
                "text": {"type": "string"},
                "or": {},
                "ignore": {"type": "string", "description": "why the key may say anything"},
            }
        ),
        "block": settings(
            {
                "inputs": {"type": "array", "items": {"type": "string", "pattern": NAME}},
                "nodes": table({"$ref": "#/$defs/node"}),
                "output": EDGE,
                "outputs": table(EDGE),
            }
        ),
        "repeat": settings(
            {"repeat": EXPRESSION, "carry": table(EDGE), "nodes": table({"$ref": "#/$defs/node"}), "next": table(EDGE)}
        ),
        "policy": settings(
            {
                "nodes": {"type": "string", "pattern": f"^{PATTERN.pattern}$"},
                "layers": {"type": ["integer", "string"], "pattern": "^[0-9]+(-[0-9]+)?$", "minimum": 0},
                "dtype": {"enum": list(DTYPES)},
            },
            required=["dtype"],
        ),
        "offer": settings(
            {
                "tp": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
                "dtypes": {"type": "array", "items": {"enum": list(DTYPES)}, "minItems": 1},
                "attention": {"type": "array", "items": {"enum": list(ATTENTION)}, "minItems": 1},
            }
        ),
        "node": node(),
        **{f"op.{op.name}": operator(op) for op in authored()},
        **{f"op.{op.name}.part": part() for op in authored() if op.parts},
    }
    assert set(BLOCK_KEYS) == set(defs["block"]["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmc model",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "anyOf": [{"required": ["extends"]}, {"required": ["graph"]}],
        "$defs": defs,
    }


def authored() -> list[Op]:
    """The operators that a YAML file may name."""
    return [op for op in OPS.values() if op.authored]


def removable(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(rule), REMOVE]}


def table(rule: Mapping[str, Any], names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A mapping from names to values of one kind."""
    return {
        "type": "object",
        "propertyNames": {"pattern": NAME} if names is None else dict(names),
        "additionalProperties": removable(rule),
        "minProperties": 1,
    }


def settings(properties: Mapping[str, Any], required: Iterable[str] = ()) -> dict[str, Any]:
    """A mapping with known keys."""
    found: dict[str, Any] = {"type": "object", "properties": {k: removable(v) for k, v in properties.items()}}
    found |= {"additionalProperties": False, "minProperties": 1}
    return found | ({"required": list(required)} if required else {})


def scaling() -> dict[str, Any]:
    """Each type of rope scaling has settings of its own; without `type` it changes the extended file's."""
    numbers = dict.fromkeys(
        (key for needed, optional in SCALINGS.values() for key in (*needed, *optional)), EXPRESSION
    ) | {"truncate": {"type": "boolean"}}
    found = settings({"type": {"enum": list(SCALINGS)}, **numbers})
    found["allOf"] = [
        {
            "if": {"properties": {"type": {"const": kind}}, "required": ["type"]},
            "then": {"required": list(needed), "propertyNames": {"enum": ["type", *needed, *optional]}},
        }
        for kind, (needed, optional) in SCALINGS.items()
    ]
    return found


def node() -> dict[str, Any]:
    """By operator where `op` is said; a call where `block` is; else it changes some keys of an extended node."""
    operators = [
        {
            "if": {"properties": {"op": {"const": op.name}}, "required": ["op"]},
            "then": {"$ref": f"#/$defs/op.{op.name}"},
        }
        for op in authored()
    ]
    call = {
        "if": {"required": ["block"]},
        "then": {"propertyNames": {"pattern": NAME}, "not": {"required": ["op"]}, "additionalProperties": EDGE},
    }
    return {
        "type": "object",
        "minProperties": 1,
        "properties": {"op": {"enum": [op.name for op in authored()]}, "block": {"type": "string", "pattern": NAME}},
        "allOf": [*operators, call],
        "not": {"required": ["repeat"]},
    }


def operator(op: Op) -> dict[str, Any]:
    properties: dict[str, Any] = {"op": {"const": op.name, "description": op.doc}}
    properties |= dict.fromkeys(op.inputs, EDGE)
    properties |= {attr.name: attribute(attr) for attr in op.attrs}
    properties |= {slot.name: {**TENSOR, "description": slot.doc} for slot in op.weights}
    if len(op.splits) > 1:
        properties["tp"] = {"enum": list(op.splits), "description": "how the weight lies over the ranks"}
    if op.parts:
        properties["parts"] = table({"$ref": f"#/$defs/op.{op.name}.part"})
    required = ["op", *op.inputs, *(attr.name for attr in op.attrs if attr.required)]
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": required}


def part() -> dict[str, Any]:
    return settings({"out": EXPRESSION, "heads": EXPRESSION, "weight": TENSOR, "bias": TENSOR})


def attribute(attr: Attr) -> dict[str, Any]:
    match attr.kind:
        case "bool":
            return {"type": "boolean", "description": attr.doc}
        case "choice":
            return {"enum": list(attr.choices), "description": attr.doc}
        case "text":
            return {"type": "string", "description": attr.doc}
        case _:
            return {**EXPRESSION, "description": attr.doc}


def schema_text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


def operator_tables() -> str:
    """Markdown: one section an operator family, one table an operator."""
    lines: list[str] = []
    for family in FAMILIES:
        for op in (op for op in family.OPS if op.authored):
            lines += [f"### `{op.name}`", "", op.doc, "", "| key | kind | meaning |", "|---|---|---|"]
            lines += [f"| `{slot}` | edge | input |" for slot in op.inputs]
            for attr in op.attrs:
                kind = " or ".join(f"`{c}`" for c in attr.choices) or attr.kind
                doc = attr.doc if attr.required or attr.default is None else f"{attr.doc}; default {attr.default}"
                lines.append(f"| `{attr.name}`{'' if attr.required else ' (optional)'} | {kind} | {doc} |")
            for weight in op.weights:
                optional = "" if weight.required else " (optional)"
                lines.append(f"| `{weight.name}`{optional} | tensor | {weight.doc} |")
            if len(op.splits) > 1:
                splits = ", ".join(f"`{split}`" for split in op.splits)
                lines.append(f"| `tp` (optional) | choice | {splits}; default `{op.splits[0]}` |")
            if op.parts:
                lines.append("| `parts` (optional) | mapping | several outputs of one matmul |")
            if op.outputs != ("",):
                outputs = ", ".join(f"`NODE.{output}`" for output in op.outputs)
                lines += ["", f"Outputs: {outputs}."]
            lines += ["", f"Source: {op.source}.", ""]
    return "\n".join(lines)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The text with everything between `<!-- generated: NAME -->` and `<!-- end -->` made anew."""
    for name, table in tables.items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{table.rstrip()}\n{end}{after}"
    return text


def error_table() -> str:
    from llmc.compiler.diagnostics import CODES

    return "\n".join(["| code | meaning |", "|---|---|", *(f"| {code} | {title} |" for code, title in CODES.items())])


def documentation(text: str) -> str:
    """docs/language.md with its generated parts up to date."""
    return with_tables(text, {"operators": operator_tables(), "errors": error_table()})


if __name__ == "__main__":
    with open(os.path.join(GRAPHS, "schema.json"), "w", encoding="utf-8") as stream:
        stream.write(schema_text())
    page = os.path.join(os.path.dirname(GRAPHS), "docs", "language.md")
    if os.path.exists(page):
        with open(page, encoding="utf-8") as stream:
            text = stream.read()
        with open(page, "w", encoding="utf-8") as stream:
            stream.write(documentation(text))
