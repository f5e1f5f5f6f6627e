"""What manifest.json says: one schema, and what must hold between its parts.

    problems(manifest)      # ["weights['embed.weight'].shape[0]: expected a size (1 to 2^48); found -1"]

The schema is data. `{"key": X}` is an object with exactly these keys, `"key?"` one that may be missing, a `Kind` as a
key stands for all others; `[X]` is a list of X; `(X, Y)` is one or the other; a `Kind` is a single value. A manifest
that has the structure is then checked for what nobody else would tell: names that lead nowhere, shares that do not add
up to shapes.

Ours, and not a JSON Schema, because a library's messages for alternatives name the schema, not what is needed, and
because every rank reads an artifact when it starts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.compiler.atb.core import CHIPS, DTYPE_BYTES
from llmc.compiler.diagnostics import shorten
from llmc.compiler.language.definitions import MAX_NODES, PAIRINGS, SCALINGS
from llmc.compiler.passes.phase import LOGITS, PHASES
from llmc.compiler.target.device import ATTENTION, DTYPES, device_names

MOST = 2**48  # elements of a tensor, bytes, ...: far above what is, and products of two stay exact
RANKS = 1024


@dataclass(frozen=True)
class Kind:
    """A value of one kind: what it is called, and whether a value is one."""

    what: str
    holds: Callable[[Any], bool]


def one_of(*words: str) -> Kind:
    return Kind(" or ".join(", ".join(map(repr, words)).rsplit(", ", 1)), lambda value: value in words)


def whole(what: str, least: int, most: int = MOST) -> Kind:
    return Kind(what, lambda value: type(value) is int and least <= value <= most)


def matching(what: str, pattern: str) -> Kind:
    return Kind(what, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def number(what: str, least: float = -math.inf) -> Kind:
    return Kind(what, lambda value: type(value) in (int, float) and math.isfinite(value) and value > least)


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NOTHING = Kind("null", lambda value: value is None)
ANYTHING = Kind("anything", lambda value: True)
NUMBER = number("a finite number")
POSITIVE = number("a finite number above 0", 0)
SIZE = whole("a size (1 to 2^48)", 1)
COUNT = whole("a whole number (0 to 2^48)", 0)
SYMBOL = one_of("T", "B", "M", "N", "P", "S")
HASH = matching("a SHA-256 in hexadecimal", r"[0-9a-f]{64}")
MODULE = matching("the name of a Python file in the artifact's directory", r"[A-Za-z_][A-Za-z0-9_]{0,63}\.py")
FORM_KEY = matching("symbols of T, B, M, N, P, S with * between them", r"|[TBMNPS](\*[TBMNPS])*")
# As listing.ranges writes them.
LAYERS = matching("numbers and ranges of layers, as 0-3,7", r"|\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")

DTYPE = one_of(*DTYPE_BYTES)
FORMAT = one_of("nd", "nz")
TENSOR = {"dtype": DTYPE, "shape": [(SIZE, SYMBOL)], "format": FORMAT}
FORM = {FORM_KEY: COUNT}  # bytes by symbols (memory.py)
STEP = {"tensors": [FORM], "workspace": [FORM]}

SEGMENT = {
    "name": TEXT,
    "layers": [TEXT],
    "inputs": [TEXT],
    "outputs": [TEXT],
    "host": [TEXT],
    "in_place": [TEXT],
    "counts": {"nodes": COUNT, TEXT: COUNT},
    "bound_by": [TEXT],
}
OPERATION = {
    "name": TEXT,
    "layers": LAYERS,
    "op": TEXT,
    "param": {TEXT: ANYTHING},
    "ins": [TEXT],
    "views": {TEXT: TEXT},
    "outs": [[TEXT]],
}
ROWS = {"groups": SIZE, "stride": SIZE, "offset": COUNT, "size": SIZE}
TAP = {
    "name": TEXT,
    "node": TEXT,
    "op": TEXT,
    "place": TEXT,
    "dtype": DTYPE,
    "shape": [(SIZE, SYMBOL)],
    "shard": one_of("R", "S(0)", "S(1)", "P"),
    "splits": [TEXT],
    "reads": [TEXT],
    "head_dim": (NOTHING, SIZE),
    "stands_for": (
        NOTHING,
        {
            "what": one_of("output", "embedding", "input", "rope", "activation"),
            "argument": TEXT,
            "parts": [{"tensor": TEXT, "rows": (NOTHING, ROWS)}],
        },
    ),
}
PHASE = {
    "module": MODULE,
    "inputs": [TEXT],
    "outputs": {TEXT: TENSOR},
    "operations": [OPERATION],
    "taps?": [TAP],
    "segments": [SEGMENT],
}
WEIGHT = {
    "sources": [{"tensor": TEXT, "shape": [SIZE], "rows": (NOTHING, ROWS)}],
    "axis": whole("0 or 1", 0, 1),
    "shape": [SIZE],
    "dtype": DTYPE,
    "transpose": FLAG,
    "format": FORMAT,
    "tp": TEXT,
    "shard": one_of("R", "S(0)", "S(1)", "P"),
    "splits": [TEXT],
}
SCALING = tuple(
    {"type": one_of(kind), **dict.fromkeys(needed, POSITIVE), **{f"{key}?": (NUMBER, FLAG) for key in optional}}
    for kind, (needed, optional) in SCALINGS.items()
)
SETTING = (NOTHING, FLAG, NUMBER, TEXT)

MANIFEST: Mapping[str, Any] = {
    "format": ANYTHING,  # compared before
    "generator": TEXT,
    "model": matching("the name of a model", r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
    "source": {"files": [TEXT], "sha256": HASH},
    "files": {MODULE: HASH},
    "sha256": HASH,
    "device": one_of(*device_names()),
    "chip": one_of(*CHIPS),
    "dtype": one_of(*DTYPES),
    "attention": one_of(*ATTENTION),
    "logits": one_of(*LOGITS),
    "world_size": whole(f"a world size (1 to {RANKS})", 1, RANKS),
    "backend": one_of("", "lccl", "hccl"),
    "sizes": {"max_positions": SIZE, "vocab?": SIZE, TEXT: NUMBER},
    "rope": {"theta?": POSITIVE, "pairing?": one_of(*PAIRINGS), "scaling?": SCALING},  # nothing where no node needs it
    "config": {TEXT: ({"is": SETTING, "or": SETTING}, {"ignore": TEXT})},
    "unused": {TEXT: TEXT},
    "inputs": {TEXT: {**TENSOR, "host": FLAG}},
    "constants": {
        TEXT: (
            {**TENSOR, "kind": one_of("causal_mask"), "value": NUMBER},
            {**TENSOR, "kind": one_of("rope_cos", "rope_sin")},
        )
    },
    "caches": {TEXT: TENSOR},
    "weights": {TEXT: WEIGHT},
    "splits": {TEXT: {"size": SIZE, "local": SIZE, "ranks": [[COUNT]]}},
    "memory": {
        "weight_bytes": COUNT,
        "cache": FORM,
        "cache_bytes_per_token": COUNT,
        "constants": FORM,
        "steps": dict.fromkeys(PHASES, STEP),
        "activation_bytes_per_token": dict.fromkeys(PHASES, COUNT),
        "workspace_at_least": COUNT,
    },
    "phases": dict.fromkeys(PHASES, PHASE),
}


def problems(manifest: Any) -> list[str]:
    """What is wrong with a manifest, each with the field, what was expected and what was found. What must hold between
    parts is looked at when every part is what it should be."""
    return list(mismatches(manifest, MANIFEST, "")) or list(_contradictions(manifest))


def mismatches(value: Any, schema: Any, path: str) -> Iterator[str]:
    """Where a value is not as the schema says."""
    match schema:
        case Kind():
            if not schema.holds(value):
                yield _wanted(path, schema.what, value)
        case tuple():
            tried = [list(mismatches(value, one, path)) for one in schema]
            if all(tried):
                yield from _nearest(value, schema, path, tried)
        case list():
            if not isinstance(value, list):
                yield _wanted(path, "a list", value)
                return
            for i, item in enumerate(value):
                yield from mismatches(item, schema[0], f"{path}[{i}]")
        case _:
            if not isinstance(value, dict):
                yield _wanted(path, "an object", value)
                return
            known = {key.removesuffix("?"): one for key, one in schema.items() if isinstance(key, str)}
            others = [(key, one) for key, one in schema.items() if isinstance(key, Kind)]
            if missing := [key for key in schema if isinstance(key, str) and key[-1] != "?" and key not in value]:
                yield f"{path or 'it'} lacks {', '.join(missing)}"
            for key, item in value.items():
                if key in known:
                    yield from mismatches(item, known[key], _at(path, key))
                elif not others:
                    yield f"{_at(path, key)}: unknown; expected {', '.join(known) or 'nothing'}"
                elif not others[0][0].holds(key):
                    yield f"{path}: expected {others[0][0].what}; found {_found(key)}"
                else:
                    yield from mismatches(item, others[0][1], _at(path, key))


def _nearest(value: Any, schemas: Sequence[Any], path: str, tried: Sequence[list[str]]) -> list[str]:
    """Of alternatives that none fits: the problems of the one that was probably meant."""
    if isinstance(value, dict) and any(isinstance(one, dict) for one in schemas):
        return min((found for one, found in zip(schemas, tried, strict=True) if isinstance(one, dict)), key=len)
    names = [
        one.what if isinstance(one, Kind) else "a list" if isinstance(one, list) else "an object" for one in schemas
    ]
    return [_wanted(path, " or ".join(dict.fromkeys(names)), value)]


def _wanted(path: str, what: str, value: Any) -> str:
    return f"{path or 'it'}: expected {what}; found {_found(value)}"


def _found(value: Any) -> str:
    match value:
        case dict():
            return f"an object with {len(value)} keys"
        case list():
            return f"a list of {len(value)}"
        case _:
            return shorten(json.dumps(value, ensure_ascii=False))


def _at(path: str, key: str) -> str:
    """`weights['embed.weight'].shape`: names have dots of their own."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        return f"{path}.{key}" if path else key
    return f"{path}[{shorten(key)!r}]"


# ---- between the parts


def _contradictions(m: Mapping[str, Any]) -> Iterator[str]:
    yield from _files(m)
    yield from _caches(m)
    yield from _shares(m)
    for name, weight in m["weights"].items():
        yield from _weight(_at("weights", name), weight, m["splits"])
    for phase, facts in m["phases"].items():
        yield from _flow(f"phases.{phase}", facts, m)
    for phase, step in m["memory"]["steps"].items():
        if not step["tensors"]:
            yield f"memory.steps.{phase}: expected a form of tensors; found none"


def _files(m: Mapping[str, Any]) -> Iterator[str]:
    for phase, facts in m["phases"].items():
        if facts["module"] not in m["files"]:
            yield f"phases.{phase} names the module {facts['module']} but not its sha256 (files)"


def _caches(m: Mapping[str, Any]) -> Iterator[str]:
    """The runtime sizes caches by N, or by B and S, and reads the size of a block off their shape."""
    wanted = {"N"} if m["attention"] == "paged" else {"B", "S"}
    for name, cache in m["caches"].items():
        shape, at = cache["shape"], _at("caches", name)
        symbols = [dim for dim in shape if isinstance(dim, str)]
        if sorted(symbols) != sorted(wanted) or len(shape) < 4 or (m["attention"] == "paged" and shape[0] != "N"):
            form = "[N, ...]" if m["attention"] == "paged" else "[1, B, ..., S, ...]"
            yield f"{at}.shape: expected {form}, as {m['attention']} attention has it; found {_shape(shape)}"
    for name, constant in m["constants"].items():
        shape, table = constant["shape"], constant["kind"] != "causal_mask"
        if not (len(shape) == 2 and shape[0] == "P" and isinstance(shape[1], int) if table else _is_square(constant)):
            form = "[P, head_dim]" if table else "[n, n], as nz [1, n / 16, n, 16]"
            yield f"{_at('constants', name)}.shape: expected {form}; found {_shape(shape)}"
    rope = any(constant["kind"] != "causal_mask" for constant in m["constants"].values())
    if rope and "theta" not in m["rope"]:
        yield "rope lacks theta, and there are rope tables"


def _is_square(mask: Mapping[str, Any]) -> bool:
    """[n, n], as nz [1, n / 16, n, 16]."""
    shape = mask["shape"]
    if not all(isinstance(dim, int) for dim in shape):
        return False
    if mask["format"] == "nz":
        return len(shape) == 4 and shape == [1, -(-shape[2] // 16), shape[2], 16]
    return len(shape) == 2 and shape[0] == shape[1]


def _shares(m: Mapping[str, Any]) -> Iterator[str]:
    for name, split in m["splits"].items():
        at, ranks = _at("splits", name), split["ranks"]
        if len(ranks) != m["world_size"]:
            yield f"{at}.ranks: expected one share for each of {m['world_size']} ranks; found {len(ranks)}"
        for rank, run in enumerate(ranks):
            if len(run) != 2 or run[1] > split["local"] or sum(run) > split["size"]:
                limits = f"[start, count] within {split['size']}, at most {split['local']} of them"
                yield f"{at}.ranks[{rank}]: expected {limits}; found {_shape(run)}"
    if m["world_size"] > 1 and not m["backend"]:
        yield f"backend: expected that of the collectives of {m['world_size']} ranks; found none"


def _weight(at: str, weight: Mapping[str, Any], splits: Mapping[str, Any]) -> Iterator[str]:
    """A rank's shares of the sources, one after the other on `axis`, must fill the shape (runtime/weights.py)."""
    sources, shard, axis = weight["sources"], weight["shard"], weight["axis"]
    split_axis = {"S(0)": 0, "S(1)": 1}.get(shard)
    count = 0 if split_axis is None else len(sources) if split_axis == axis else 1
    if not sources:
        yield f"{at}.sources: expected a tensor of the checkpoint; found none"
        return
    if len(weight["splits"]) != count or any(name not in splits for name in weight["splits"]):
        yield f"{at}.splits: expected {count} names of `splits` for {shard}; found {_shape(weight['splits'])}"
        return
    shapes = []
    for i, source in enumerate(sources):
        shape, rows = list(source["shape"]), source["rows"]
        if rows:
            inside = rows["offset"] + rows["size"] <= rows["stride"]
            if not shape or not inside or rows["groups"] * rows["stride"] > shape[0]:
                yield f"{at}.sources[{i}].rows: they do not lie within {_shape(shape)}"
                return
            shape[0] = rows["groups"] * rows["size"]
        if len(shape) <= max(axis, split_axis or 0):
            yield f"{at}.sources[{i}].shape: expected more axes for axis {axis} and {shard}; found {_shape(shape)}"
            return
        if split_axis is not None:
            split = splits[weight["splits"][i if split_axis == axis else 0]]
            if split["size"] != shape[split_axis]:
                yield (
                    f"{at}.sources[{i}].shape: expected {split['size']} on axis {split_axis}, which is split; "
                    f"found {_shape(shape)}"
                )
                return
            shape[split_axis] = split["local"]
        shapes.append(shape)
    whole_shape = [*shapes[0]]
    whole_shape[axis] = sum(shape[axis] for shape in shapes)
    alike = all(shape[:axis] + shape[axis + 1 :] == shapes[0][:axis] + shapes[0][axis + 1 :] for shape in shapes)
    made = whole_shape[::-1] if weight["transpose"] else whole_shape
    if not alike or made != weight["shape"] or (weight["transpose"] and len(made) != 2):
        yield f"{at}.shape: expected what its sources give, {_shape(made)}; found {_shape(weight['shape'])}"
    elif math.prod(made) > MOST:
        yield f"{at}.shape: expected fewer than 2^48 elements; found {_shape(made)}"


def _flow(at: str, facts: Mapping[str, Any], m: Mapping[str, Any]) -> Iterator[str]:
    """Every value that a segment reads must be there by then, and the logits at the end."""
    for name in facts["inputs"]:
        if name not in m["inputs"]:
            yield f"{at}.inputs: {shorten(name)!r} is not among the inputs"
    there = {*m["weights"], *m["constants"], *m["caches"], *facts["inputs"]}
    for i, part in enumerate(facts["segments"]):
        here = f"{at}.segments[{i}]"
        if unknown := [name for name in part["inputs"] if name not in there]:
            yield f"{here}.inputs: nothing before it makes {shorten(unknown[0])!r}"
        for key in ("host", "in_place"):
            if strange := [name for name in part[key] if name not in part["inputs"]]:
                yield f"{here}.{key}: {shorten(strange[0])!r} is not among its inputs"
        there.update(part["outputs"])
    for name in ("logits", *facts["outputs"]):
        if name not in there:
            yield f"{at}.segments: no segment makes {shorten(name)!r}"
    for i, tap in enumerate(facts.get("taps", ())):
        if tap["name"] not in there or any(name not in m["splits"] for name in tap["splits"]):
            yield f"{at}.taps[{i}]: no segment makes {shorten(tap['name'])!r}, or its splits are unknown"
    for i, operation in enumerate(facts["operations"]):
        if any(len(out) != 2 for out in operation["outs"]):
            yield f"{at}.operations[{i}].outs: expected pairs of name and type"
        runs = [[int(n) for n in run.split("-")] for run in operation["layers"].split(",") if run]
        if any(run[0] > run[-1] for run in runs) or sum(run[-1] - run[0] + 1 for run in runs) > MAX_NODES:
            yield f"{at}.operations[{i}].layers: expected rising ranges of at most {MAX_NODES} layers"


def _shape(shape: Sequence[Any]) -> str:
    return shorten(f"[{', '.join(map(str, shape))}]")
