"""What differs between two compiled models: `llmc diff A B`, on the manifests of both.

    changes = diff(manifest_a, manifest_b)           # plain data, for --json
    print(show_diff(changes, "llama2-13b@tp=1", "llama2-13b@tp=8"))

Every manifest is read as sections of named things with fields; fields are compared one by one, and layers that differ
alike are one change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmc.compiler.listing import LAYER, at_layer, collapse, expand, in_layer, layer_numbers
from llmc.compiler.passes.phase import PHASES
from llmc.compiler.reports.show import show_bytes

Fields = dict[str, Any]
Sections = dict[str, dict[str, Fields]]  # section -> name -> field -> value
SETTINGS = ("model", "device", "chip", "dtype", "attention", "logits", "world_size", "backend")
SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changes from a to b: {"section", "kind", "name", "layers", "count", "fields"}. `fields` of a changed thing are
    {field: {"a": ..., "b": ...}} where they differ; of a thing that was added or removed, all of them."""
    left, right = sections(a), sections(b)
    return [change for name in left | right for change in _changes(name, left.get(name, {}), right.get(name, {}))]


def sections(manifest: Mapping[str, Any]) -> Sections:
    """Everything of a manifest that a report compares, in the order in which it prints."""
    memory = manifest["memory"]
    found: Sections = {
        "settings": dict(_settings(manifest)),
        "bytes": {
            "weights of a rank": {"bytes": memory["weight_bytes"]},
            "cache of a token": {"bytes": memory["cache_bytes_per_token"]},
            **{
                f"activations of a token in {phase}": {"bytes": memory["activation_bytes_per_token"][phase]}
                for phase in PHASES
            },
        },
        "inputs": {name: {"type": _type(t), "host": t["host"]} for name, t in manifest["inputs"].items()},
        "constants": {name: {"type": _type(t), "kind": t["kind"]} for name, t in manifest["constants"].items()},
        "caches": {name: {"type": _type(t)} for name, t in manifest["caches"].items()},
        "weights": {name: _weight(name, w, manifest["splits"]) for name, w in manifest["weights"].items()},
    }
    for phase in PHASES:
        operations = expand(manifest["phases"][phase]["operations"])
        found[phase] = {name: _operation(entry) for name, entry in operations}
    return found


def _settings(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Fields]]:
    for key in SETTINGS:
        if key in manifest:
            yield key, {"value": manifest[key]}
    for group in ("sizes", "rope"):
        for key, value in manifest[group].items():
            yield f"{group}.{key}", {"value": value}
    for key, rule in manifest["config"].items():
        yield f"config.{key}", {"value": rule["is"], "if absent": rule["or"]}
    for phase in PHASES:
        counts = [part["counts"]["nodes"] for part in manifest["phases"][phase]["segments"]]
        yield f"{phase}.operations", {"value": sum(counts)}
        yield f"{phase}.segments", {"value": len(counts)}


def _type(t: Mapping[str, Any]) -> str:
    """`float16 [N, 128, 5, 128] S(2)`: of one rank."""
    form = f"{t['format']} " if t["format"] != "nd" else ""
    shard = f" {t['shard']}" if "shard" in t else ""
    return f"{t['dtype']} {form}[{', '.join(map(str, t['shape']))}]{shard}"


def _weight(name: str, w: Mapping[str, Any], splits: Mapping[str, Any]) -> Fields:
    found = {"type": _type(w), "tp": w.get("tp", "")}
    match = LAYER.match(name)
    for number, source in enumerate(w["sources"]):
        tensor = re.sub(rf"(?<=\.){match[2]}(?=\.)", "{i}", source["tensor"]) if match else source["tensor"]
        found[f"tensor.{number}"] = tensor
        if source["rows"]:
            found[f"rows.{number}"] = source["rows"]
    if w["transpose"]:
        found["transpose"] = True
    if w.get("splits"):
        found["ranks"] = [splits[split]["ranks"] for split in w["splits"]]
    return found


def _operation(entry: Mapping[str, Any]) -> Fields:
    return {
        "op": entry["op"],
        **{f"out.{out}": t for out, t in entry["outs"]},
        "reads": entry["ins"],
        **{f"view.{index}": shape for index, shape in entry["views"].items()},
        **{f"param.{key}": value for key, value in entry["param"].items()},
    }


def _changes(section: str, a: Mapping[str, Fields], b: Mapping[str, Fields]) -> list[dict[str, Any]]:
    found = []
    for name in merged(list(a), list(b)):
        if name not in a or name not in b:
            kind, fields = ("added", b[name]) if name in b else ("removed", a[name])
        else:
            kind = "changed"
            fields = {
                key: {"a": a[name].get(key), "b": b[name].get(key)}
                for key in merged(list(a[name]), list(b[name]))
                if a[name].get(key) != b[name].get(key)
            }
            if not fields:
                continue
        found.append((name, {"section": section, "kind": kind, "fields": in_layer(name, fields)}))
    return [{**change, "count": len(layer_numbers(change["layers"]))} for change in collapse(found)]


def merged(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Both lists as one: a's order, and what only b has behind its neighbour in b, and behind what only a has there."""
    place, common = {name: (number, 0) for number, name in enumerate(a)}, set(a) & set(b)
    last = -1
    for behind, name in enumerate(b, start=1):
        if name in common:
            last = place[name][0]
            while last + 1 < len(a) and a[last + 1] not in common:
                last += 1
        else:
            place[name] = (last, behind)
    return sorted(place, key=place.__getitem__)


# ---- as text


def show_diff(changes: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """One line a change under the heading of its section, and a closing line with the counts."""
    if not changes:
        return f"{a} and {b}: no differences"
    lines = [f"--- {a}", f"+++ {b}"]
    told: dict[str, str] = {}  # line, with tokens for sequences -> section
    for section in dict.fromkeys(change["section"] for change in changes):
        lines += ["", section]
        again: dict[str, int] = {}
        for change in changes:
            if change["section"] != section:
                continue
            line = f"  {SIGNS[change['kind']]} {_name(change):<36} {_facts(change)}"
            before = told.setdefault(line.replace("[B", "[T"), section)
            if before == section:
                lines.append(line)
            else:
                again[before] = again.get(before, 0) + change["count"]
        lines += [
            f"    {count} as in {before}, for B sequences in place of T tokens" for before, count in again.items()
        ]
    return "\n".join([*lines, "", summary_line(changes)])


def summary_line(changes: Sequence[Mapping[str, Any]]) -> str:
    """`differences: settings 1 changed; prefill 80 added, 482 changed`; each layer counts."""
    counts: dict[str, dict[str, int]] = {}
    for change in changes:
        kinds = counts.setdefault(change["section"], dict.fromkeys(SIGNS, 0))
        kinds[change["kind"]] += change["count"]
    parts = (f"{name} {', '.join(f'{n} {kind}' for kind, n in kinds.items() if n)}" for name, kinds in counts.items())
    return f"differences: {'; '.join(parts)}"


def _name(change: Mapping[str, Any]) -> str:
    return change["name"].replace("{i}", change["layers"])


def _facts(change: Mapping[str, Any]) -> str:
    """The fields as words. Where the change is of one layer, names say which."""
    if change["kind"] == "changed":
        words = [_changed(change, key, both["a"], both["b"]) for key, both in change["fields"].items()]
        text = "; ".join(filter(None, words))
    else:
        fields = change["fields"]
        param = ", ".join(f"{key[6:]}={_value(v)}" for key, v in fields.items() if key.startswith("param."))
        words = [_present(change, key, value) for key, value in fields.items() if not key.startswith("param.")]
        text = "  ".join(filter(None, [*words, param and f"{{{param}}}"]))
    return at_layer(text, int(change["layers"])) if change["layers"].isdigit() else text


def _present(change: Mapping[str, Any], key: str, value: Any) -> str:
    """A field of what was added or removed."""
    kind, _, rest = key.partition(".")
    if kind in ("type", "op", "value", "tensor", "kind"):
        return str(value)
    if kind == "out":
        return f"{_short(change, rest)}{value}"
    if kind == "reads":
        return f"<- {', '.join(value)}"
    return f"input {rest} as {value}" if kind == "view" else ""


def _changed(change: Mapping[str, Any], key: str, a: Any, b: Any) -> str:
    kind, _, rest = key.partition(".")
    if kind == "bytes":
        return f"{show_bytes(a)} -> {show_bytes(b)}"
    if kind in ("type", "out"):
        name = _short(change, rest)
        if a is None or b is None:
            return f"makes {name}{b}" if a is None else f"no longer makes {name}{a}"
        same = a.split(" ")[0] == b.split(" ")[0]
        return f"{name}{a} -> {b.partition(' ')[2] if same else b}"
    if kind == "reads":
        return "; ".join(_reads(a, b))
    if kind == "ranks":
        return "" if "type" in change["fields"] else "other shares on the ranks"
    label = {"op": "", "value": "", "param": rest, "view": f"input {rest} as"}.get(kind, f"{kind} {rest}".strip())
    absent = {"param": "(default)", "view": "it is"}.get(kind, "(none)")
    return f"{label} {_value(a, absent)} -> {_value(b, absent)}".strip()


def _reads(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    if len(a) == len(b):
        yield from (f"reads {x} -> {y}" for x, y in zip(a, b, strict=True) if x != y)
        return
    for word, names, others in (("no longer reads", a, b), ("also reads", b, a)):
        if found := [name for name in names if name not in others]:
            yield f"{word} {', '.join(found)}"


def _short(change: Mapping[str, Any], out: str) -> str:
    """How an operation's line calls an output: not at all where it has the operation's name, else by its last word."""
    return "" if out in ("", change["name"]) else f"{out.rpartition('.')[2]} "


def _value(value: Any, absent: str = "(none)") -> str:
    if value in (None, ""):
        return absent
    return value if isinstance(value, str) else json.dumps(value)
