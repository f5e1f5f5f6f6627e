"""Source tree -> model graph: the language is checked, repeats and blocks are written out, every edge finds its maker.

    model = load_model("graphs/llama2-13b.yaml")
    model.graph.by_name["layers.3.attn.o"]      # Node(op="linear", inputs={"x": "layers.3.attn.core"}, ...)

Three stages, each of which reports all that it finds: the language (keys, types, expressions), the edges (names, cycles,
unused nodes), the tensors (shapes of values and weights).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from llmc.compiler import source
from llmc.compiler.diagnostics import Place, Report, did_you_mean
from llmc.compiler.expressions import ExpressionError, Number, UnknownName, evaluate
from llmc.compiler.ir import Graph, Node, Rows, Source, TensorType, Weight
from llmc.compiler.ops import OPS, Attr, NoRule, Op
from llmc.compiler.source import Document, List, Map, Scalar, Value, show

MAX_NODES = 10_000
MAX_NESTING = 20
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PATTERN = re.compile(r"[A-Za-z0-9_.*]+")
LAYERS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
TENSOR = re.compile(r"(?:[^{}\s]|\{i\})+")

MODEL_KEYS: Mapping[str, str] = {
    "name": "name of the model",
    "sizes": "sizes by name, as numbers or expressions over other sizes",
    "dtype": "dtype of weights and activations",
    "rope": "settings of the rotary position embedding",
    "config": "what the checkpoint's config.json must say",
    "inputs": "inputs of the graph",
    "blocks": "groups of nodes with a name, used by `block:`",
    "graph": "the nodes by name",
    "outputs": "outputs of the graph: name and node",
    "policy": "nodes that compute in another dtype",
    "support": "devices that the model is offered on",
}
BLOCK_KEYS = ("inputs", "nodes", "output", "outputs")
REPEAT_KEYS = ("repeat", "carry", "nodes", "next")
PART_KEYS = ("out", "heads", "weight", "bias")
RULE_KEYS = ("is", "text", "or")
POLICY_KEYS = ("nodes", "layers", "dtype")
SUPPORT_KEYS = ("tp", "dtypes", "attention")

INPUTS: Mapping[str, TensorType] = {"token_ids": TensorType(dtype="int64", shape=("T",))}
DTYPES = ("float16", "bfloat16", "float32")
ATTENTION = ("paged", "flash")
DEVICES = ("atlas-800i-a2", "atlas-300i-duo", "host")
PAIRINGS = ("half", "interleaved")
# type -> settings that it needs, settings that it may have (arXiv 2306.15595, 2309.00071; llama-models 3.1)
SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_max_positions"), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"), ()),
    "yarn": (
        ("factor", "original_max_positions"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a key of config.json must say. `default` is what its absence means, None where it must be there."""

    value: Number | bool | str
    default: Number | bool | str | None
    place: Place


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as described: its graph, and what is known beside the graph."""

    name: str
    graph: Graph
    support: Mapping[str, Mapping[str, tuple]]  # device -> {"tp": (1, 2), and if stated "dtypes", "attention"}
    config: Mapping[str, Rule]
    places: Mapping[str, Place]  # "sizes.hidden", "rope.theta", ... -> where it is said
    sources: Mapping[str, str]  # file -> text, in reading order
    source_hash: str

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.sources)


@dataclass(frozen=True, kw_only=True)
class Ref:
    """An edge as written: `qkv.q`."""

    text: str
    place: Place


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One checkpoint tensor of a weight, or some rows of it. `rows` of the whole tensor is `total`; 0 = the weight's."""

    tensor: Scalar
    rows: Rows | None = None
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class NodeDef:
    """A node as written, with its expressions evaluated: shared by all iterations."""

    name: str
    place: Place
    op: Op
    inputs: Mapping[str, Ref]
    attrs: Mapping[str, Any]
    weights: Mapping[str, tuple[Piece, ...]]
    split: str
    parts: tuple[tuple[str, int], ...] = ()  # name, rows


@dataclass(frozen=True, kw_only=True)
class CallDef:
    name: str
    place: Place
    block: str
    inputs: Mapping[str, Ref]


@dataclass(frozen=True, kw_only=True)
class RepeatDef:
    name: str
    place: Place
    count: int
    carry: Mapping[str, Ref]
    nodes: tuple[Def, ...]
    next: Mapping[str, Ref]


Def = NodeDef | CallDef | RepeatDef


@dataclass(frozen=True, kw_only=True)
class BlockDef:
    inputs: tuple[str, ...]
    nodes: tuple[Def, ...]
    outputs: Mapping[str, Ref]  # "" for a single one


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Names that an edge may say, and the values they mean. A repeat's body also sees what is around it."""

    values: dict[str, str]
    parent: Scope | None = None


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A node of the graph before its inputs are known."""

    name: str
    node: NodeDef
    scope: Scope
    iteration: int | None


def load_model(path_or_name: str | os.PathLike[str]) -> Model:
    """The model of a YAML file, or of the catalogue by name; DiagnosticError with everything that is wrong."""
    return build_model(source.load(path_or_name))


def build(document: Document) -> Graph:
    return build_model(document).graph


def build_model(document: Document) -> Model:
    language = _Language(document)
    language.report.raise_if_any()
    graph = _Expansion(language).graph()
    language.check_policy(graph)
    language.report.raise_if_any()
    return Model(
        name=language.name,
        graph=graph,
        support=language.support,
        config=language.config,
        places=language.places,
        sources=document.sources,
        source_hash=document.hash,
    )


class _Language:
    """The first stage: what the tree says, checked against the language and the operators."""

    def __init__(self, document: Document) -> None:
        self.document, self.report = document, Report(document.sources)
        self.places: dict[str, Place] = {}
        self.cache: dict[str, Number | ExpressionError] = {}
        self.told: set[str] = set()
        self.used: set[str] = set()
        root = document.root
        self.root = root
        self.known_keys(root, MODEL_KEYS, "a model", required=("name", "sizes", "graph", "outputs"))
        self.name = self.model_name(root.items.get("name"))
        self.open: list[str] = []
        self.sizes: dict[str, Number] = {}
        self.size_defs = self.read_sizes()
        self.dtype = self.choice(root.items.get("dtype"), DTYPES, "dtype") or "float16"
        self.rope = self.read_rope(root.items.get("rope"))
        self.config = self.read_config(root.items.get("config"))
        self.inputs = self.read_inputs(root.items.get("inputs"))
        self.blocks = self.read_blocks(root.items.get("blocks"))
        self.graph = self.read_nodes(root.items.get("graph"), "graph", repeats=True)
        self.outputs = self.read_refs(root.items.get("outputs"), "outputs")
        self.policy = self.read_policy(root.items.get("policy"))
        self.support = self.read_support(root.items.get("support"))
        if not self.report.diagnostics:
            self.check_blocks()
            self.check_sizes()
            self.check_rope()

    # -- small readers: each reports and returns something harmless

    def map(self, value: Value | None, what: str, *, empty: bool = False) -> Map:
        if isinstance(value, Map) and (value.items or empty):
            return value
        if value is not None:
            found = "nothing in it" if isinstance(value, Map) else show(value)
            self.report.add("E103", f"{what} must be a mapping", value.place, found=found)
        return Map(items={}, keys={}, place=self.root.place)

    def list(self, value: Value | None, what: str) -> tuple[Value, ...]:
        if value is None:
            return ()
        if not isinstance(value, List) or not value.items:
            found = "an empty list" if isinstance(value, List) else show(value)
            self.report.add("E103", f"{what} must be a list, as [a, b]", value.place, found=found)
            return ()
        return value.items

    def known_keys(self, value: Map, known: Iterable[str], what: str, required: Iterable[str] = ()) -> None:
        known = list(known)
        for key in value.items:
            if key not in known:
                self.report.add("E101", f"{what} has no key '{key}'", value.keys[key], likely=did_you_mean(key, known))
        for key in required:
            if key not in value.items:
                self.report.add("E102", f"{what} needs the key '{key}'", value.place)

    def name_ok(self, name: str, place: Place, what: str) -> bool:
        if NAME.fullmatch(name) and len(name) <= 64:
            return True
        self.report.add("E109", f"{name[:40]!r} cannot be the name of {what}", place,
                        needed="letters, digits and _, not a digit first, at most 64")  # fmt: skip
        return False

    def text(self, value: Value | None, what: str) -> str:
        if isinstance(value, Scalar) and isinstance(value.value, str) and value.value.strip():
            return value.value
        if value is not None:
            self.report.add("E103", f"{what} must be text", value.place, found=show(value))
        return ""

    def choice(self, value: Value | None, known: Iterable[str], what: str) -> str:
        known = list(known)
        if value is None or (isinstance(value, Scalar) and value.value in known):
            return value.text if isinstance(value, Scalar) else ""
        word = value.text if isinstance(value, Scalar) else ""
        self.report.add("E103", f"{what} must be one of {', '.join(known)}", value.place, found=show(value),
                        likely=did_you_mean(word, known) if word else "")  # fmt: skip
        return ""

    def boolean(self, value: Value, what: str) -> bool:
        if isinstance(value, Scalar) and isinstance(value.value, bool):
            return value.value
        self.report.add("E103", f"{what} must be true or false", value.place, found=show(value))
        return False

    def number(self, value: Value | None, what: str) -> Number | None:
        """The value of an expression; each distinct text is evaluated once."""
        if value is None:
            return None
        if not isinstance(value, Scalar) or isinstance(value.value, bool) or value.value is None:
            self.report.add("E103", f"{what} must be a number or an expression", value.place, found=show(value))
            return None
        if isinstance(value.value, (int, float)):
            return value.value
        known = self.cache.get(value.text)
        if known is None:
            try:
                known = evaluate(value.text, self.lookup)
            except ExpressionError as error:
                known = error
            self.cache[value.text] = known
        if not isinstance(known, ExpressionError):
            return known
        if known.message not in self.told or not known.message.startswith("unknown size"):
            self.told.add(known.message)
            place = value.within(known.start, known.end)
            self.report.add(known.code, f"{what}: {known.message}", place, likely=known.likely)
        return None

    def whole(self, value: Value | None, what: str, limit: int = 2**31 - 1) -> int | None:
        """A whole number of at least 1."""
        number = self.number(value, what)
        if number is None or value is None:
            return None
        if not isinstance(number, int) or not 1 <= number <= limit:
            self.report.add("E106", f"{what} must be a whole number from 1 to {limit}", value.place,
                            found=_equals(value, number))  # fmt: skip
            return None
        return number

    def positive(self, value: Value | None, what: str) -> Number | None:
        number = self.number(value, what)
        if number is not None and value is not None and number <= 0:
            self.report.add("E106", f"{what} must be larger than 0", value.place, found=_equals(value, number))
            return None
        return number

    def ref(self, value: Value | None, what: str) -> Ref:
        text = self.text(value, what)
        place = value.place if value is not None else self.root.place
        if text and not all(NAME.fullmatch(word) for word in text.split(".")):
            self.report.add("E109", f"{what}: {text[:40]!r} is not an edge", place,
                            needed="the name of a node, or node.output")  # fmt: skip
        return Ref(text=text, place=place)

    def read_refs(self, value: Value | None, what: str) -> dict[str, Ref]:
        found = {}
        for key, item in self.map(value, what).items.items():
            if self.name_ok(key, item.place, f"a key of {what}"):
                found[key] = self.ref(item, f"{what}.{key}")
        return found

    # -- the parts of a model

    def model_name(self, value: Value | None) -> str:
        name = self.text(value, "name")
        if name and not MODEL_NAME.fullmatch(name) and value is not None:
            self.report.add("E109", f"{name[:40]!r} cannot be the name of a model", value.place,
                            needed="letters, digits, '.', '_' and '-', at most 64")  # fmt: skip
        return name

    def read_sizes(self) -> Map:
        sizes = self.map(self.root.items.get("sizes"), "sizes")
        for name, value in sizes.items.items():
            self.places[f"sizes.{name}"] = value.place
            if self.name_ok(name, sizes.keys[name], "a size"):
                self.size_defs = sizes
                number = self.positive(value, name)
                if number is not None:
                    self.sizes[name] = number
        if "sizes" in self.root.items and "max_positions" not in sizes.items:
            self.report.add("E102", "sizes needs the key 'max_positions'", sizes.place,
                            needed="the longest context that the model was trained for")  # fmt: skip
        return sizes

    def lookup(self, name: str) -> Number:
        """The value of a size, or of a rope setting."""
        self.used.add(name)
        if name.startswith("rope."):
            value: Any = self.rope_of(name)
            if value is not None:
                return value
        if name in self.sizes:
            return self.sizes[name]
        definition = self.size_defs.items.get(name)
        if definition is None:
            raise UnknownName(f"unknown size {name!r}", likely=did_you_mean(name, self.size_defs.items)
                              or "state it under `sizes:`")  # fmt: skip
        if name in self.open:
            loop = " -> ".join([*self.open[self.open.index(name) :], name])
            raise UnknownName(f"the size {name!r} depends on itself: {loop}", code="E202")
        if len(self.open) >= MAX_NESTING:
            raise UnknownName(f"more than {MAX_NESTING} sizes depend on each other", code="E104")
        if not isinstance(definition, Scalar) or isinstance(definition.value, bool):
            raise UnknownName(f"the size {name!r} is not a number")
        self.open.append(name)
        try:
            if isinstance(definition.value, (int, float)):
                return definition.value
            try:
                return evaluate(definition.text, self.lookup)
            except ExpressionError as error:
                raise UnknownName(error.message, code=error.code, likely=error.likely) from None
        finally:
            self.open.pop()

    def rope_of(self, name: str) -> Number | None:
        found: Any = getattr(self, "rope", {})
        for key in name.split(".")[1:]:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    def read_rope(self, value: Value | None) -> dict[str, Any]:
        """{"theta": 10000.0, "pairing": "half", "scaling": {"type": "linear", "factor": 2.0}}"""
        if value is None:
            return {}
        rope = self.map(value, "rope")
        self.known_keys(rope, ("theta", "pairing", "scaling"), "rope", required=("theta",))
        theta = self.positive(rope.items.get("theta"), "rope.theta")
        pairing = self.choice(rope.items.get("pairing"), PAIRINGS, "rope.pairing") or "half"
        for key, item in rope.items.items():
            self.places[f"rope.{key}"] = item.place
        settings: dict[str, Any] = {"theta": float(theta or 1), "pairing": pairing}
        if "scaling" in rope.items and (scaling := self.read_scaling(rope.items["scaling"])):
            settings["scaling"] = scaling
        return settings

    def read_scaling(self, value: Value) -> dict[str, Any]:
        scaling = self.map(value, "rope.scaling")
        if "type" not in scaling.items:
            if scaling.items:
                self.report.add("E102", "rope.scaling needs the key 'type'", scaling.place,
                                needed=f"one of {', '.join(SCALINGS)}")  # fmt: skip
            return {}
        kind = self.choice(scaling.items["type"], SCALINGS, "rope.scaling.type")
        if not kind:
            return {}
        needed, optional = SCALINGS[kind]
        self.known_keys(scaling, ("type", *needed, *optional), f"rope.scaling of type {kind}", required=needed)
        found: dict[str, Any] = {"type": kind}
        for key, item in scaling.items.items():
            self.places[f"rope.scaling.{key}"] = item.place
            what = f"rope.scaling.{key}"
            if key == "truncate":
                found[key] = self.boolean(item, what)
            elif key == "original_max_positions":
                found[key] = self.whole(item, what)
            elif key in needed or key in optional:
                number = self.positive(item, what)
                found[key] = None if number is None else float(number)
        return found

    def read_config(self, value: Value | None) -> dict[str, Rule]:
        rules: dict[str, Rule] = {}
        config = self.map(value, "config")
        for key, item in config.items.items():
            what = f"config.{key}"
            rule = self.map(item, what)
            self.known_keys(rule, RULE_KEYS, what)
            if ("is" in rule.items) == ("text" in rule.items):
                if rule.items:
                    self.report.add("E102", f"{what} needs `is` (a number or an expression) or `text`, one of the two",
                                    rule.place)  # fmt: skip
                continue
            kind = "is" if "is" in rule.items else "text"
            expected = self.rule_value(rule.items[kind], f"{what}.{kind}", kind)
            default = self.rule_value(rule.items["or"], f"{what}.or", kind) if "or" in rule.items else None
            if expected is not None:
                rules[key] = Rule(value=expected, default=default, place=rule.items[kind].place)
        return rules

    def rule_value(self, value: Value, what: str, kind: str) -> Number | bool | str | None:
        if kind == "text":
            return self.text(value, what) or None
        if isinstance(value, Scalar) and isinstance(value.value, bool):
            return value.value
        return self.number(value, what)

    def read_inputs(self, value: Value | None) -> tuple[str, ...]:
        """The graph's inputs. Only token ids exist, so a model may leave them out."""
        if value is None:
            return tuple(INPUTS)
        return tuple(self.choice(item, INPUTS, "an input") for item in self.list(value, "inputs"))

    def read_blocks(self, value: Value | None) -> dict[str, BlockDef]:
        blocks = self.map(value, "blocks")
        self.block_maps = {name: item for name, item in blocks.items.items() if isinstance(item, Map)}
        found = {}
        for name, item in blocks.items.items():
            self.name_ok(name, blocks.keys[name], "a block")
            found[name] = self.read_block(name, self.map(item, f"block '{name}'"))
        return found

    def read_block(self, name: str, block: Map) -> BlockDef:
        what = f"block '{name}'"
        if block.items:
            self.known_keys(block, BLOCK_KEYS, what, required=("nodes",))
            if ("output" in block.items) == ("outputs" in block.items):
                self.report.add("E102", f"{what} needs `output` or `outputs`, one of the two", block.place)
        inputs = []
        for item in self.list(block.items.get("inputs"), f"inputs of {what}"):
            input = self.text(item, f"an input of {what}")
            if input and self.name_ok(input, item.place, "an input"):
                if input in inputs:
                    self.report.add("E204", f"{what} has two inputs '{input}'", item.place)
                inputs.append(input)
        nodes = self.read_nodes(block.items.get("nodes"), f"nodes of {what}", taken=inputs)
        if "outputs" in block.items:
            outputs = self.read_refs(block.items["outputs"], f"outputs of {what}")
        else:
            outputs = {"": self.ref(block.items.get("output"), f"output of {what}")}
        return BlockDef(inputs=tuple(inputs), nodes=nodes, outputs=outputs)

    def read_nodes(
        self, value: Value | None, what: str, *, repeats: bool = False, taken: Iterable[str] = ()
    ) -> tuple[Def, ...]:
        nodes = self.map(value, what)
        found: list[Def] = []
        for name, item in nodes.items.items():
            place = nodes.keys[name]
            self.name_ok(name, place, "a node")
            if name in taken:
                self.report.add("E204", f"'{name}' is an input here, so no node can have that name", place)
            node = self.map(item, f"node '{name}'")
            kinds = [k for k in ("op", "block", "repeat") if k in node.items]
            if not node.items:
                continue
            if len(kinds) != 1:
                missing = "op, block or repeat" if repeats else "op or block"
                problem = f"says both {' and '.join(kinds)}" if kinds else f"needs one of {missing}"
                near = [did_you_mean(k, ("op", "block", "repeat")) for k in node.items] if not kinds else []
                likely = next((hint for hint in near if hint.startswith("did")), "")
                self.report.add("E102", f"node '{name}' {problem}", node.place if kinds else place, likely=likely)
            elif kinds == ["op"]:
                if definition := self.read_node(name, node, place):
                    found.append(definition)
            elif kinds == ["block"]:
                if call := self.read_call(name, node, place):
                    found.append(call)
            elif not repeats:
                self.report.add("E103", f"node '{name}': a repeat stands in `graph` only", node.keys["repeat"])
            else:
                found.append(self.read_repeat(name, node, place))
        return tuple(found)

    def read_call(self, name: str, node: Map, place: Place) -> CallDef | None:
        block = self.text(node.items["block"], f"block of '{name}'")
        if block not in self.block_maps:
            if block:
                self.report.add("E107", f"node '{name}': there is no block '{block}'", node.items["block"].place,
                                likely=did_you_mean(block, self.block_maps))  # fmt: skip
            return None
        declared = self.block_maps[block].items.get("inputs")
        slots = [i.text for i in declared.items if isinstance(i, Scalar)] if isinstance(declared, List) else []
        self.known_keys(node, ("block", *slots), f"node '{name}' (block {block})", required=slots)
        inputs = {slot: self.ref(node.items[slot], f"'{slot}' of '{name}'") for slot in slots if slot in node.items}
        return CallDef(name=name, place=place, block=block, inputs=inputs)

    def read_repeat(self, name: str, node: Map, place: Place) -> RepeatDef:
        what = f"repeat '{name}'"
        self.known_keys(node, REPEAT_KEYS, what, required=("nodes",))
        count = self.whole(node.items["repeat"], f"repeat of '{name}'", MAX_NODES)
        carry = self.read_refs(node.items.get("carry"), f"carry of {what}")
        after = self.read_refs(node.items.get("next"), f"next of {what}")
        if not carry and "carry" not in node.items:
            self.report.add("E205", f"{what} carries nothing from one iteration to the next", place,
                            needed="carry: {x: where it starts}  and  next: {x: what it becomes}")  # fmt: skip
        for key in sorted(set(carry) ^ set(after)):
            missing = "next" if key in carry else "carry"
            self.report.add("E205", f"{what}: '{key}' is missing under `{missing}`", (carry | after)[key].place)
        nodes = self.read_nodes(node.items.get("nodes"), f"nodes of {what}", taken=carry)
        return RepeatDef(name=name, place=place, count=count or 1, carry=carry, nodes=nodes, next=after)

    def read_node(self, name: str, node: Map, place: Place) -> NodeDef | None:
        word = self.text(node.items["op"], f"op of '{name}'")
        op = OPS.get(word)
        if op is None or not op.authored:
            if word:
                known = [o.name for o in OPS.values() if o.authored]
                why = "is made by the compiler only" if op else "is not an operator"
                self.report.add("E107", f"node '{name}': '{word}' {why}", node.items["op"].place,
                                likely=did_you_mean(word, known))  # fmt: skip
            return None
        what = f"node '{name}' ({word})"
        slots, attrs = [w.name for w in op.weights], {a.name: a for a in op.attrs}
        known_keys = ["op", *op.inputs, *attrs, *slots]
        known_keys += ["tp"] if op.weights else []
        known_keys += ["parts"] if op.parts else []
        required = [*op.inputs, *(a.name for a in op.attrs if a.required)]
        if "parts" not in node.items:
            required += [w.name for w in op.weights if w.required]
            required += ["out"] if op.parts else []
        self.known_keys(node, known_keys, what, required=required)
        inputs = {slot: self.ref(node.items[slot], f"'{slot}' of '{name}'") for slot in op.inputs if slot in node.items}
        values = {a.name: self.attr(a, node.items.get(a.name), f"'{a.name}' of '{name}'") for a in op.attrs}
        split = self.choice(node.items.get("tp"), op.splits, f"tp of '{name}'") or op.splits[0]
        weights = {
            slot: (Piece(tensor=tensor),)
            for slot in slots
            if slot in node.items and (tensor := self.tensor(node.items[slot], f"{slot} of '{name}'"))
        }
        parts: tuple[tuple[str, int], ...] = ()
        if "parts" in node.items and op.parts:
            parts = self.read_parts(what, node, values, weights)
        groups = values.pop("groups", None)
        if groups is not None and "parts" not in node.items:
            self.report.add("E101", f"{what}: `groups` says how `parts` lie in a packed weight, and there are no parts",
                            node.keys["groups"])  # fmt: skip
        return NodeDef(
            name=name, place=place, op=op, inputs=inputs, attrs=values, weights=weights, split=split, parts=parts
        )

    def attr(self, attr: Attr, value: Value | None, what: str) -> Any:
        if value is None:
            return attr.default
        match attr.kind:
            case "size":
                return self.whole(value, what)
            case "number":
                number = self.positive(value, what)
                return None if number is None else float(number)
            case "bool":
                return self.boolean(value, what)
            case "choice":
                return self.choice(value, attr.choices, what)
            case _:
                return self.text(value, what)

    def tensor(self, value: Value, what: str) -> Scalar | None:
        name = self.text(value, what)
        if not name:
            return None
        if not TENSOR.fullmatch(name) or len(name) > 200:
            self.report.add("E109", f"{what}: {name[:60]!r} cannot be the name of a tensor", value.place,
                            needed="a name without spaces; {i} stands for the iteration")  # fmt: skip
            return None
        assert isinstance(value, Scalar)
        return value

    def read_parts(
        self, what: str, node: Map, attrs: dict[str, Any], weights: dict[str, tuple[Piece, ...]]
    ) -> tuple[tuple[str, int], ...]:
        """Fills `attrs` and `weights` from the parts: each has a tensor of its own, or rows of the node's."""
        if "out" in node.items:
            self.report.add("E101", f"{what}: with `parts`, each part says its `out`", node.keys["out"])
        parts = self.map(node.items["parts"], f"parts of {what}")
        sizes: dict[str, int] = {}
        heads: list[int | None] = []
        items: dict[str, Map] = {}
        for name, item in parts.items.items():
            self.name_ok(name, parts.keys[name], "a part")
            part = items[name] = self.map(item, f"part '{name}' of {what}")
            if part.items:
                self.known_keys(part, PART_KEYS, f"part '{name}' of {what}", required=("out",))
            sizes[name] = self.whole(part.items.get("out"), f"out of part '{name}'") or 0
            heads.append(self.whole(part.items.get("heads"), f"heads of part '{name}'"))
        for slot, required in (("weight", True), ("bias", False)):
            having = [name for name, part in items.items() if slot in part.items]
            lacking = [name for name in items if name not in having]
            if slot in node.items and having:
                self.report.add("E101", f"{what}: `{slot}` is said by the node and by its part '{having[0]}'",
                                items[having[0]].keys[slot],
                                needed="one packed tensor at the node, or one tensor in each part")  # fmt: skip
            elif slot in weights:
                weights[slot] = self.packed(what, weights[slot][0].tensor, sizes, attrs.get("groups"), node)
            elif lacking and (having or (required and slot not in node.items)):
                self.report.add("E102", f"{what}: no `{slot}` for {', '.join(lacking)}", parts.place,
                                needed=f"a {slot} in each part, or one for the node")  # fmt: skip
            elif having:
                tensors = [self.tensor(items[name].items[slot], f"{slot} of part '{name}'") for name in items]
                pieces = zip(tensors, sizes.values(), strict=True)
                weights[slot] = tuple(Piece(tensor=tensor, total=size) for tensor, size in pieces if tensor)
        if "groups" in node.items and "weight" not in node.items:
            self.report.add("E101", f"{what}: `groups` says how parts lie in a packed weight, and each part has its own",
                            node.keys["groups"])  # fmt: skip
        attrs["out"] = sum(sizes.values())
        if any(h is not None for h in heads):
            attrs["heads"] = tuple(heads)
        return tuple(sizes.items())

    def packed(
        self, what: str, tensor: Scalar, sizes: Mapping[str, int], groups: int | None, node: Map
    ) -> tuple[Piece, ...]:
        """Rows of one checkpoint tensor: parts one after the other, or group by group (InternLM2's wqkv)."""
        groups = groups or 1
        total, offset, pieces = sum(sizes.values()), 0, []
        for name, size in sizes.items():
            if size % groups:
                self.report.add("E106", f"{what}: part '{name}' has {size} rows, which {groups} groups do not divide",
                                node.items["groups"].place)  # fmt: skip
            rows = Rows(groups=groups, stride=total // groups, offset=offset, size=size // groups)
            pieces.append(Piece(tensor=tensor, rows=rows, total=total))
            offset += size // groups
        return tuple(pieces)

    def read_policy(self, value: Value | None) -> tuple[tuple[dict[str, Any], Place], ...]:
        """({"nodes": "layers.*.mlp.*", "layers": (0, 3), "dtype": "float32"}, place), the first match wins."""
        found = []
        for item in self.list(value, "policy"):
            rule = self.map(item, "a rule of policy")
            if not rule.items:
                continue
            self.known_keys(rule, POLICY_KEYS, "a rule of policy", required=("dtype",))
            settings: dict[str, Any] = {"nodes": self.text(rule.items.get("nodes"), "nodes of a rule") or "*"}
            settings["dtype"] = self.choice(rule.items.get("dtype"), DTYPES, "dtype of a rule")
            if not PATTERN.fullmatch(settings["nodes"]):
                self.report.add("E109", f"{settings['nodes'][:40]!r} is not a pattern", rule.items["nodes"].place,
                                needed="a node name in which * stands for anything")  # fmt: skip
            if "layers" in rule.items:
                settings["layers"] = self.layer_range(rule.items["layers"])
            found.append((settings, rule.items["nodes"].place if "nodes" in rule.items else rule.place))
        return tuple(found)

    def layer_range(self, value: Value) -> tuple[int, int]:
        match = LAYERS.fullmatch(value.text) if isinstance(value, Scalar) else None
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            self.report.add("E103", "layers of a rule must be a number or a range", value.place, found=show(value),
                            needed="as 3 or 0-3")  # fmt: skip
        return first, last

    def read_support(self, value: Value | None) -> dict[str, dict[str, tuple]]:
        found: dict[str, dict[str, tuple]] = {}
        support = self.map(value, "support")
        known = sorted({*DEVICES, *_hardware()})
        for device, item in support.items.items():
            if device not in known:
                self.report.add("E101", f"support: unknown device '{device}'", support.keys[device],
                                likely=did_you_mean(device, known))  # fmt: skip
            what = f"support of {device}"
            offer = self.map(item, what)
            if offer.items:
                self.known_keys(offer, SUPPORT_KEYS, what, required=("tp",))
            found[device] = settings = {}
            if "tp" in offer.items:
                tp = [self.whole(v, f"tp of {what}", 1024) for v in self.list(offer.items["tp"], f"tp of {what}")]
                settings["tp"] = tuple(size for size in tp if size)
            for key, choices in (("dtypes", DTYPES), ("attention", ATTENTION)):
                if key in offer.items:
                    listed = self.list(offer.items[key], f"{key} of {what}")
                    settings[key] = tuple(self.choice(v, choices, f"{key} of {what}") for v in listed)
        return found

    # -- checks across the parts

    def check_blocks(self) -> None:
        """No block may contain itself."""
        calls = {name: [d for d in block.nodes if isinstance(d, CallDef)] for name, block in self.blocks.items()}
        graph = nx.DiGraph((name, call.block) for name, found in calls.items() for call in found)
        if not nx.is_directed_acyclic_graph(graph):
            loop = [a for a, *_ in nx.find_cycle(graph)]
            call = next(c for c in calls[loop[0]] if c.block == (loop[1] if len(loop) > 1 else loop[0]))
            self.report.add("E202", "blocks contain each other", call.place, found=" -> ".join([*loop, loop[0]]))
        elif nx.dag_longest_path_length(graph) >= MAX_NESTING:
            self.report.add("E004", f"blocks are nested more than {MAX_NESTING} deep", self.root.keys["blocks"])

    def check_sizes(self) -> None:
        """A size that nothing reads is a spelling mistake. `max_positions` is for the runtime."""
        for name in self.size_defs.items:
            if name not in self.used and name != "max_positions":
                self.report.add("E110", f"nothing uses the size '{name}'", self.size_defs.keys[name],
                                likely=did_you_mean(name, set(self.size_defs.items) - {name}))  # fmt: skip

    def check_rope(self) -> None:
        nodes = [d for defs in self.all_nodes() for d in defs if isinstance(d, NodeDef)]
        user = next((d for d in nodes if d.op.name == "rope"), None)
        if user and not self.rope:
            self.report.add("E102", f"node '{user.name}' needs the model's `rope:` settings", user.place,
                            needed="as rope: {theta: 10000.0}")  # fmt: skip

    def all_nodes(self) -> Iterable[tuple[Def, ...]]:
        yield self.graph
        yield from (block.nodes for block in self.blocks.values())
        yield from (d.nodes for d in self.graph if isinstance(d, RepeatDef))

    def check_policy(self, graph: Graph) -> None:
        for (rule, place), pattern in zip(self.policy, self.patterns, strict=True):
            names = [node.name for node in graph.nodes if pattern.fullmatch(node.name)]
            if not names:
                self.report.add("E201", f"policy: no node is called {rule['nodes']!r}", place,
                                likely=did_you_mean(rule["nodes"], graph.by_name))  # fmt: skip
            elif "layers" in rule and not any(_in_layers(name, rule["layers"]) for name in names):
                first, last = rule["layers"]
                self.report.add(
                    "E106", f"policy: no node called {rule['nodes']!r} is in layers {first} to {last}", place
                )

    @property
    def patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(".*".join(map(re.escape, rule["nodes"].split("*")))) for rule, _ in self.policy]


class _Expansion:
    """The second and third stage: every node with its path, its inputs, its weights."""

    def __init__(self, language: _Language) -> None:
        self.language, self.report = language, language.report
        self.instances: list[Instance] = []
        self.carried: dict[str, tuple[Ref, Scope]] = {}  # name of a carried value or block input -> what it is
        self.scopes = 0
        self.told: set[Any] = set()

    def once(self, code: str, message: str, place: Place | None, **more: str) -> None:
        """A definition that is wrong in 80 layers is told once."""
        if (code, place) not in self.told:
            self.told.add((code, place))
            self.report.add(code, message, place, **more)

    def graph(self) -> Graph:
        language = self.language
        scope = Scope(values={name: name for name in language.inputs})
        self.declare(language.graph, "", scope, None)
        edges = [
            {slot: self.resolve(ref, instance.scope) for slot, ref in instance.node.inputs.items()}
            for instance in self.instances
        ]
        outputs = {name: self.resolve(ref, scope) for name, ref in language.outputs.items()}
        self.report.raise_if_any()
        order = self.order(edges, outputs)
        self.report.raise_if_any()
        nodes = self.typed(order, edges)
        self.report.raise_if_any()
        return Graph(
            name=language.name,
            inputs={name: INPUTS[name] for name in language.inputs},
            nodes=tuple(nodes),
            outputs=outputs,
            sizes=language.sizes,
            dtype=language.dtype,
            rope=language.rope,
            policy=tuple(rule for rule, _ in language.policy),
        )

    def declare(self, defs: Iterable[Def], prefix: str, scope: Scope, iteration: int | None) -> None:
        """Name every node and every value of a scope; edges may be written before what they name."""
        self.scopes += 1
        for d in defs:
            if len(self.instances) + self.scopes > MAX_NODES:
                self.report.add("E106", f"the graph has more than {MAX_NODES} nodes", d.place)
                self.report.raise_if_any()
            path = prefix + d.name
            if isinstance(d, NodeDef):
                self.instances.append(Instance(name=path, node=d, scope=scope, iteration=iteration))
                for output in [name for name, _ in d.parts] or d.op.outputs:
                    text = f"{d.name}.{output}" if output else d.name
                    value = f"{path}.split.{output}" if len(d.parts) > 1 else path if d.parts else prefix + text
                    scope.values[text] = value
            elif isinstance(d, CallDef):
                block = self.language.blocks[d.block]
                inner = Scope(values={})
                for name, ref in d.inputs.items():
                    inner.values[name] = self.alias(f"{path}.{name}", ref, scope)
                self.declare(block.nodes, f"{path}.", inner, iteration)
                for output, ref in block.outputs.items():
                    text = f".{output}" if output else ""
                    scope.values[d.name + text] = self.alias(f"{path}{text} ", ref, inner)
            else:
                previous = scope
                steps = d.carry
                for i in range(d.count):
                    values = {name: self.alias(f"{path}.{i}.{name}", ref, previous) for name, ref in steps.items()}
                    inner = Scope(values=values, parent=scope)
                    self.declare(d.nodes, f"{path}.{i}.", inner, i)
                    previous, steps = inner, d.next
                for name, ref in d.next.items():
                    scope.values[f"{d.name}.{name}"] = self.alias(f"{path}.{name}", ref, previous)

    def alias(self, name: str, ref: Ref, scope: Scope) -> str:
        self.carried[name] = (ref, scope)
        return name

    def resolve(self, ref: Ref, scope: Scope) -> str:
        """The value that an edge means: made by a node, or an input of the graph."""
        seen: set[str] = set()
        while True:
            value = scope.values.get(ref.text)
            if value is None and scope.parent is not None:
                value = scope.parent.values.get(ref.text)
            if value is None:
                self.unknown(ref, scope)
                return ""
            if value not in self.carried:
                return value
            if value in seen:
                self.once("E202", f"'{ref.text}' is carried or passed in a circle and never made", ref.place)
                return ""
            seen.add(value)
            ref, scope = self.carried[value]

    def unknown(self, ref: Ref, scope: Scope) -> None:
        known = [*scope.values, *(scope.parent.values if scope.parent else ())]
        outputs = [name for name in known if name.startswith(f"{ref.text}.")]
        if outputs:
            self.once("E201", f"'{ref.text}' has several outputs; say which", ref.place,
                      needed=f"one of {', '.join(outputs)}")  # fmt: skip
        else:
            self.once("E201", f"there is no '{ref.text}' here", ref.place, likely=did_you_mean(ref.text, known))

    def order(self, edges: list[dict[str, str]], outputs: Mapping[str, str]) -> list[int]:
        """Instances in execution order, as written where that is possible; cycles and unused nodes are reported."""
        makers: dict[str, int] = {}
        for number, instance in enumerate(self.instances):
            for value in self.values(instance):
                makers[value] = number
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.instances)))
        for number, inputs in enumerate(edges):
            graph.add_edges_from((makers[value], number) for value in inputs.values() if value in makers)
        try:
            order = list(nx.lexicographical_topological_sort(graph))
        except nx.NetworkXUnfeasible:
            loop = [a for a, *_ in nx.find_cycle(graph)]
            names = [self.instances[number].name for number in (*loop, loop[0])]
            self.report.add("E202", f"'{names[0]}' needs itself", self.instances[loop[0]].node.place,
                            found=" -> ".join(names))  # fmt: skip
            return []
        alive = {makers[value] for value in outputs.values() if value in makers}
        for number in reversed(order):
            if number in alive:
                alive.update(graph.predecessors(number))
        # A node that only the next iteration would read is dropped from the last one.
        living = {id(self.instances[number].node) for number in alive}
        for instance in self.instances:
            if id(instance.node) not in living:
                self.once("E203", f"nothing uses '{instance.name}' ({instance.node.op.name})", instance.node.place,
                          likely="remove it, or read it in a node that leads to an output")  # fmt: skip
        return [number for number in order if number in alive]

    @staticmethod
    def values(instance: Instance) -> list[str]:
        parts = instance.node.parts
        if len(parts) > 1:
            return [f"{instance.name}.split.{name}" for name, _ in parts]
        outputs = ("",) if parts else instance.node.op.outputs
        return [f"{instance.name}.{output}" if output else instance.name for output in outputs]

    def typed(self, order: list[int], edges: list[dict[str, str]]) -> list[Node]:
        """The nodes, with weights: their shapes follow from the attributes and from the inputs."""
        types: dict[str, TensorType] = {name: INPUTS[name] for name in self.language.inputs}
        tensors: dict[str, tuple[tuple[int, ...], Place]] = {}
        nodes: list[Node] = []
        for number in order:
            instance, inputs = self.instances[number], edges[number]
            if any(value not in types for value in inputs.values()):
                continue  # the maker is reported
            weights = self.weights(instance, {slot: types[value] for slot, value in inputs.items()}, tensors)
            d = instance.node
            node = Node(name=instance.name, op=d.op.name, inputs=inputs, attrs=d.attrs, weights=weights,
                        outputs=d.op.outputs, place=d.place)  # fmt: skip
            made = [node]
            if len(d.parts) > 1:
                names, sizes = zip(*d.parts, strict=True)
                made.append(Node(name=f"{node.name}.split", op="split", inputs={"x": node.name},
                                 attrs={"sizes": sizes}, outputs=names, place=d.place))  # fmt: skip
            for node in made:
                op = OPS[node.op]
                try:
                    outputs = op.shape(node, [types[node.inputs[slot]] for slot in op.inputs])
                except NoRule as error:
                    self.once(error.code, f"'{node.name}' ({node.op}): {error.message}", node.place,
                              found=error.found, needed=error.needed, likely=error.likely)  # fmt: skip
                    break
                types.update(zip(node.values, outputs, strict=True))
                nodes.append(node)
        return nodes

    def weights(
        self,
        instance: Instance,
        types: Mapping[str, TensorType],
        tensors: dict[str, tuple[tuple[int, ...], Place]],
    ) -> dict[str, Weight]:
        d = instance.node
        found = {}
        for slot in d.op.weights:
            if slot.name not in d.weights:
                continue
            shape = tuple(self.extent(extent, d, types) for extent in slot.shape)
            sources = []
            for piece in d.weights[slot.name]:
                whole = (piece.total or shape[0], *shape[1:])
                name = self.tensor_name(piece.tensor, instance.iteration)
                place = piece.tensor.place
                first = tensors.setdefault(name, (whole, place))
                if first[0] != whole:
                    self.once("E204", f"the tensor '{name}' is used with two shapes", place,
                              found=f"{list(whole)} here, {list(first[0])} at {first[1]}")  # fmt: skip
                sources.append(Source(tensor=name, shape=whole, rows=piece.rows, place=place))
            # The bias of a row-split linear is added once, to the whole sum.
            split = "replicate" if slot.name == "bias" and d.split == "row" else d.split
            kind = TensorType(dtype=self.language.dtype, shape=shape)
            name = f"{instance.name}.{slot.name}"
            found[slot.name] = Weight(name=name, sources=tuple(sources), type=kind, split=split)
        return found

    @staticmethod
    def extent(extent: str, d: NodeDef, types: Mapping[str, TensorType]) -> int:
        """`out` is an attribute, `x.-1` the last axis of the input x."""
        name, dot, axis = extent.partition(".")
        size: Any = types[name].shape[int(axis)] if dot else d.attrs[name]
        return size if isinstance(size, int) else 0

    def tensor_name(self, tensor: Scalar, iteration: int | None) -> str:
        counted = "{i}" in tensor.text
        if counted and iteration is None:
            self.once("E111", "{i} stands for the iteration, and this is not in a repeat", tensor.place)
        elif not counted and iteration is not None:
            self.once("E111", "every iteration would take the same tensor", tensor.place,
                      needed="{i} in the name of a weight inside a repeat")  # fmt: skip
        return tensor.text.replace("{i}", str(iteration)) if counted else tensor.text


def _equals(value: Value, number: Number) -> str:
    text = value.text if isinstance(value, Scalar) else ""
    return text if text == str(number) else f"{text} = {number}"


def _hardware() -> list[str]:
    folder = os.path.join(source.GRAPHS, "hardware")
    return [f.removesuffix(".yaml") for f in os.listdir(folder) if f.endswith(".yaml")]


def _in_layers(name: str, layers: tuple[int, int]) -> bool:
    return any(layers[0] <= int(part) <= layers[1] for part in name.split(".") if part.isdigit())
