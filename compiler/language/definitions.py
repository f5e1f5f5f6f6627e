"""Source tree -> definitions: keys, types, names and expressions are checked against the language and the operators.

    language = Language(load("graphs/llama2-13b.yaml"))
    language.blocks["mlp"].nodes[0]     # NodeDef(name="gate_up", parts=(("gate", 13824), ("up", 13824)), ...)

Every problem goes to `language.report`. What a definition becomes in each layer is `build.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from llmc.compiler.diagnostics import Place, Report, did_you_mean
from llmc.compiler.ir import Graph, Rows, TensorType
from llmc.compiler.language.expressions import ExpressionError, Number, UnknownName, evaluate, names_in
from llmc.compiler.language.reading import TOLD, Reader, Ref
from llmc.compiler.language.source import Document, List, Map, Scalar, Value, show
from llmc.compiler.ops import OPS, Attr, Op
from llmc.compiler.passes.types import in_layers, is_named
from llmc.compiler.target.device import ATTENTION, DTYPES, device_names

MAX_NODES = 10_000
MAX_SIZES = 10_000
MAX_CARRIED = 100_000  # values that repeats carry and blocks take and give, all iterations together
MAX_RULES = 200  # of policy
MAX_NESTING = 20
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
    "unused": "tensors of the checkpoint that the model leaves unread: name, in which * stands for anything, and why",
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
RULE_KEYS = ("is", "text", "or", "ignore")
POLICY_KEYS = ("nodes", "layers", "dtype")
SUPPORT_KEYS = ("tp", "dtypes", "attention")

INPUTS: Mapping[str, TensorType] = {"token_ids": TensorType(dtype="int64", shape=("T",))}
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
    """What a key of config.json must say. `default` is what its absence means, None where it must be there. `ignore`
    is why the key may say anything; then there is no value."""

    value: Number | bool | str | None
    default: Number | bool | str | None
    place: Place
    ignore: str = ""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One checkpoint tensor of a weight, or some rows of it. It has `total` rows in all; 0: as many as the weight."""

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


class Language(Reader):
    """The first stage: what the tree says, checked against the language and the operators."""

    def __init__(self, document: Document) -> None:
        super().__init__(document.root, Report(document.sources))
        self.document = document
        root = self.root
        self.places: dict[str, Place] = {}
        self.used: set[str] = set()  # sizes that something reads
        self.values: dict[str, Number | UnknownName] = {}  # sizes that were evaluated
        self.known_keys(root, MODEL_KEYS, "a model", required=("name", "sizes", "graph", "outputs"))
        self.name = self.model_name(root.items.get("name"))
        self.size_defs = self.mapping(root.items.get("sizes"), "sizes")
        self.sizes = self.read_sizes()
        self.dtype = self.choice(root.items.get("dtype"), DTYPES, "dtype") or "float16"
        self.rope = self.read_rope(root.items.get("rope"))
        self.config = self.read_config(root.items.get("config"))
        self.unused = self.read_unused(root.items.get("unused"))
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

    # -- the parts of a model

    def model_name(self, value: Value | None) -> str:
        name = self.text(value, "name")
        if name and not MODEL_NAME.fullmatch(name) and value is not None:
            self.report.add("E109", f"{name[:40]!r} cannot be the name of a model", value.place,
                            needed="letters, digits, '.', '_' and '-', at most 64")  # fmt: skip
        return name

    def read_sizes(self) -> dict[str, Number]:
        sizes: dict[str, Number] = {}
        if len(self.size_defs.items) > MAX_SIZES:
            self.report.add("E004", f"{len(self.size_defs.items)} sizes; a model has at most {MAX_SIZES}",
                            self.size_defs.place)  # fmt: skip
            self.report.raise_if_any()
        for name, value in self.size_defs.items.items():
            self.places[f"sizes.{name}"] = value.place
            if self.name_ok(name, self.size_defs.keys[name], "a size"):
                if name not in self.values:
                    self.evaluate_size(name)
                number = self.positive(value, name)
                if number is not None:
                    sizes[name] = number
        if "max_positions" in sizes:
            self.whole(self.size_defs.items["max_positions"], "max_positions")
        for name in set(self.size_defs.items) - set(sizes):
            self.values[name] = UnknownName(name, code=TOLD)  # also where the value is no size
        if self.size_defs.items and "max_positions" not in self.size_defs.items:
            self.report.add("E102", "sizes needs the key 'max_positions'", self.size_defs.place,
                            needed="the longest context that the model was trained for")  # fmt: skip
        return sizes

    def lookup(self, name: str) -> Number:
        """The value of a size, or of a rope setting."""
        self.used.add(name)
        value = self.rope_of(name) if name.startswith("rope.") else None
        if value is not None:
            return value
        if name not in self.size_defs.items:
            raise UnknownName(f"unknown size {name!r}", likely=self.meant(name))
        if name not in self.values:
            self.evaluate_size(name)
        known = self.values[name]
        if isinstance(known, UnknownName):
            raise known
        return known

    def evaluate_size(self, name: str) -> None:
        """Fills `values` for a size and those that it needs: each is evaluated once, what it needs before it, without
        recursion, so that a chain may have any length. What is wrong with a definition is told where it stands."""
        path = {name: self.needs(name)}  # sizes that wait for the one behind them -> what they still need
        while path:
            top, needs = next(reversed(path.items()))
            waits_for = next((other for other in needs if other not in self.values), None)
            if waits_for in path:
                loop = [*path][[*path].index(waits_for) :]
                shown = loop if len(loop) <= 12 else [*loop[:6], f"... {len(loop) - 9} more ...", *loop[-3:]]
                words = f"the size {waits_for!r} depends on itself: {' -> '.join([*shown, waits_for])}"
                self.values.update(dict.fromkeys(path, UnknownName(words, code="E202")))
                return
            if waits_for is not None:
                path[waits_for] = self.needs(waits_for)
                continue
            path.popitem()
            definition = self.size_defs.items[top]
            if not isinstance(definition, Scalar) or isinstance(definition.value, bool) or definition.value is None:
                self.values[top] = UnknownName(top, code=TOLD)
            elif isinstance(definition.value, (int, float)):
                self.values[top] = definition.value
            else:
                try:
                    self.values[top] = evaluate(definition.text, self.lookup)
                except ExpressionError as error:
                    self.values[top] = UnknownName(error.message, code="E202" if error.code == "E202" else TOLD)

    def needs(self, name: str) -> Iterator[str]:
        """The sizes in the definition of a size."""
        definition = self.size_defs.items[name]
        text = definition.text if isinstance(definition, Scalar) and isinstance(definition.value, str) else ""
        return (name for name in names_in(text) if name in self.size_defs.items)

    def meant(self, name: str) -> str:
        if name.lower() in ("yes", "no", "on", "off", "true", "false"):
            return "a boolean is true or false"
        near = did_you_mean(name, self.size_defs.items)
        return near if near.startswith("did") else "state it under `sizes:`" + (f"; {near}" if near else "")

    def rope_of(self, name: str) -> Number | None:
        found: Any = getattr(self, "rope", {})
        for key in name.split(".")[1:]:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    def read_rope(self, value: Value | None) -> dict[str, Any]:
        """{"theta": 10000.0, "pairing": "half", "scaling": {"type": "linear", "factor": 2.0}}"""
        if value is None:
            return {}
        rope = self.mapping(value, "rope")
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
        scaling = self.mapping(value, "rope.scaling")
        if "type" not in scaling.items:
            if scaling.items:
                self.report.add(
                    "E102", "rope.scaling needs the key 'type'", scaling.place, needed=f"one of {', '.join(SCALINGS)}"
                )
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
        config = self.mapping(value, "config")
        for key, item in config.items.items():
            what = f"config.{key}"
            rule = self.mapping(item, what)
            self.known_keys(rule, RULE_KEYS, what)
            if "ignore" in rule.items:  # also over the rule of an extended file
                why = self.text(rule.items["ignore"], f"{what}.ignore")
                rules[key] = Rule(value=None, default=None, place=rule.place, ignore=why)
                continue
            if ("is" in rule.items) == ("text" in rule.items):
                if rule.items:
                    self.report.add(
                        "E102", f"{what} needs `is` (a number or an expression) or `text`, one of the two", rule.place
                    )
                continue
            kind = "is" if "is" in rule.items else "text"
            expected = self.rule_value(rule.items[kind], f"{what}.{kind}", kind)
            if expected is not None:  # else the default, mostly the same expression, would repeat the mistake
                default = self.rule_value(rule.items["or"], f"{what}.or", kind) if "or" in rule.items else None
                rules[key] = Rule(value=expected, default=default, place=self.origin(rule.items[kind]).place)
        return rules

    def read_unused(self, value: Value | None) -> dict[str, str]:
        """{"*.rotary_emb.inv_freq": why}"""
        unused = self.mapping(value, "unused")
        for name, place in unused.keys.items():
            if not TENSOR.fullmatch(name) or len(name) > 200:
                self.report.add("E109", f"unused: {name[:60]!r} cannot be the name of a tensor", place,
                                needed="a name without spaces, in which * stands for anything")  # fmt: skip
        return {name: self.text(item, f"unused: {name[:60]}") for name, item in unused.items.items()}

    def origin(self, value: Value) -> Value:
        """Where the number is said that a size's name stands for."""
        for _ in range(MAX_NESTING):
            named = self.size_defs.items.get(value.text) if isinstance(value, Scalar) else None
            if named is None:
                break
            value = named
        return value

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
        return tuple(self.choice(item, INPUTS, "an input") for item in self.listed(value, "inputs"))

    def read_blocks(self, value: Value | None) -> dict[str, BlockDef]:
        blocks = self.mapping(value, "blocks")
        self.block_maps = {name: item for name, item in blocks.items.items() if isinstance(item, Map)}
        found = {}
        for name, item in blocks.items.items():
            self.name_ok(name, blocks.keys[name], "a block")
            found[name] = self.read_block(name, self.mapping(item, f"block '{name}'"))
        return found

    def read_block(self, name: str, block: Map) -> BlockDef:
        what = f"block '{name}'"
        if block.items:
            self.known_keys(block, BLOCK_KEYS, what, required=("nodes",))
            if ("output" in block.items) == ("outputs" in block.items):
                self.report.add("E102", f"{what} needs `output` or `outputs`, one of the two", block.place)
        inputs: dict[str, None] = {}  # in written order
        for item in self.listed(block.items.get("inputs"), f"inputs of {what}"):
            input = self.text(item, f"an input of {what}")
            if input and self.name_ok(input, item.place, "an input"):
                if input in inputs:
                    self.report.add("E204", f"{what} has two inputs '{input}'", item.place)
                inputs[input] = None
        nodes = self.read_nodes(block.items.get("nodes"), f"nodes of {what}", taken=inputs)
        if "outputs" in block.items:
            outputs = self.read_refs(block.items["outputs"], f"outputs of {what}")
        else:
            outputs = {"": self.ref(block.items.get("output"), f"output of {what}")}
        return BlockDef(inputs=tuple(inputs), nodes=nodes, outputs=outputs)

    def read_nodes(
        self, value: Value | None, what: str, *, repeats: bool = False, taken: Iterable[str] = ()
    ) -> tuple[Def, ...]:
        nodes = self.mapping(value, what)
        found: list[Def] = []
        for name, item in nodes.items.items():
            place = nodes.keys[name]
            self.name_ok(name, place, "a node")
            if name in taken:
                self.report.add("E204", f"'{name}' is an input here, so no node can have that name", place)
            node = self.mapping(item, f"node '{name}'")
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
                self.report.add(
                    "E107", f"node '{name}': '{word}' {why}", node.items["op"].place, likely=did_you_mean(word, known)
                )
            return None
        what = f"node '{name}' ({word})"
        slots, attrs = [w.name for w in op.weights], {a.name: a for a in op.attrs}
        known_keys = ["op", *op.inputs, *attrs, *slots]
        known_keys += ["tp"] if len(op.splits) > 1 else []
        known_keys += ["parts"] if op.parts else []
        required = [*op.inputs, *(a.name for a in op.attrs if a.required)]
        if "parts" not in node.items:
            required += [w.name for w in op.weights if w.required]
            required += ["out"] if op.parts else []
        self.known_keys(node, known_keys, what, required=required)
        inputs = {slot: self.ref(node.items[slot], f"'{slot}' of '{name}'") for slot in op.inputs if slot in node.items}
        values = {a.name: self.attr(a, node.items.get(a.name), f"'{a.name}' of '{name}'") for a in op.attrs}
        split = self.choice(node.items.get("tp"), op.splits, f"tp of '{name}'") or op.splits[0]
        weights: dict[str, tuple[Piece, ...]] = {
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
        if not TENSOR.fullmatch(name) or len(name) > 200 or not name.isprintable():
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
        parts = self.mapping(node.items["parts"], f"parts of {what}")
        sizes: dict[str, int] = {}
        heads: list[int | None] = []
        items: dict[str, Map] = {}
        for name, item in parts.items.items():
            self.name_ok(name, parts.keys[name], "a part")
            part = items[name] = self.mapping(item, f"part '{name}' of {what}")
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
            self.report.add(
                "E101", f"{what}: `groups` is for a packed weight, and each part has its own", node.keys["groups"]
            )
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
        if isinstance(value, List) and len(value.items) > MAX_RULES:
            self.report.add("E004", f"policy has {len(value.items)} rules; at most {MAX_RULES}", value.place)
            return ()
        for item in self.listed(value, "policy"):
            rule = self.mapping(item, "a rule of policy")
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
        support = self.mapping(value, "support")
        known = device_names()
        for device, item in support.items.items():
            if device not in known:
                self.report.add("E101", f"support: unknown device '{device}'", support.keys[device],
                                likely=did_you_mean(device, known))  # fmt: skip
            what = f"support of {device}"
            offer = self.mapping(item, what)
            if offer.items:
                self.known_keys(offer, SUPPORT_KEYS, what, required=("tp",))
            settings: dict[str, tuple] = {}
            found[device] = settings
            if "tp" in offer.items:
                tp = [self.whole(v, f"tp of {what}", 1024) for v in self.listed(offer.items["tp"], f"tp of {what}")]
                settings["tp"] = tuple(size for size in tp if size)
            for key, choices in (("dtypes", DTYPES), ("attention", ATTENTION)):
                if key in offer.items:
                    listed = self.listed(offer.items[key], f"{key} of {what}")
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
        """A size that nothing reads is a spelling mistake, in the file itself: one that it extends may offer more.
        `max_positions` is for the runtime."""
        file = next(iter(self.document.sources))
        for name in self.size_defs.items:
            if name not in self.used and name != "max_positions" and self.size_defs.keys[name].file == file:
                self.report.add("E110", f"nothing uses the size '{name}'", self.size_defs.keys[name],
                                likely=did_you_mean(name, set(self.size_defs.items) - {name}))  # fmt: skip

    def check_rope(self) -> None:
        nodes = [d for defs in self.all_nodes() for d in defs if isinstance(d, NodeDef)]
        user = next((d for d in nodes if d.op.name == "rope"), None)
        if user and not self.rope:
            self.report.add("E102", f"node '{user.name}' needs the model's `rope:` settings", user.place,
                            needed="as rope: {theta: 10000.0}")  # fmt: skip
        scaling, positions = self.rope.get("scaling") or {}, self.sizes.get("max_positions")
        trained = scaling.get("original_max_positions")
        if scaling.get("type") == "dynamic" and trained and positions and positions > trained:
            self.report.add("E106", f"rope.scaling of type dynamic: max_positions {positions} is beyond the trained "
                            f"length, original_max_positions {trained}", self.places["rope.scaling.type"],
                            needed=f"max_positions of at most {trained}: beyond it each length of a sequence has "
                            "frequencies of its own, and cached keys have others")  # fmt: skip

    def all_nodes(self) -> Iterable[tuple[Def, ...]]:
        yield self.graph
        yield from (block.nodes for block in self.blocks.values())
        yield from (d.nodes for d in self.graph if isinstance(d, RepeatDef))

    def check_policy(self, graph: Graph) -> None:
        for rule, place in self.policy:
            names = [node.name for node in graph.nodes if is_named(rule, node.name)]
            if not names:
                self.report.add("E201", f"policy: no node is called {rule['nodes']!r}", place,
                                likely=did_you_mean(rule["nodes"], graph.by_name))  # fmt: skip
            elif not any(in_layers(rule, name) for name in names):
                first, last = rule["layers"]
                self.report.add(
                    "E106", f"policy: no node called {rule['nodes']!r} is in layers {first} to {last}", place
                )
