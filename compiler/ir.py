"""The compiler's data: types, weights, nodes, and the two immutable graphs (model level and ATB level).

A value is named by the node that makes it (`layers.3.attn.o`) or, where a node has several outputs, by node and
output (`layers.3.attn.qkv.split.q`). Shapes hold ints and symbols:

    T  tokens in the step          B  sequences in the step      N  cache blocks (paged)
    M  blocks of the longest sequence (block table width)        S  positions per sequence (flash cache)
    P  rows of the rope tables
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from llmc.compiler.diagnostics import Place
from llmc.compiler.sharding import WHOLE, Shard

Dim = int | str
Shape = tuple[Dim, ...]


def show_shape(shape: Shape) -> str:
    """`[T, 5120]`, as people say it."""
    return f"[{', '.join(map(str, shape))}]"


def evaluate(shape: Shape, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The shape in numbers."""
    return tuple(symbols[d] if isinstance(d, str) else d for d in shape)


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """dtype, whole shape, and how the value lies over the ranks: R whole, S(d) split on axis d, P partial sums."""

    dtype: str
    shape: Shape
    shard: Shard = WHOLE

    @property
    def local(self) -> Shape:
        """The shape on one rank, the same on all."""
        return self.shard.local(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {show_shape(self.shape)} {self.shard}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which rows of a checkpoint tensor a piece takes: within each of `groups` runs of `stride` rows, `size` rows from
    `offset`. A plain range is one group; InternLM2's wqkv has one group a kv head."""

    groups: int
    stride: int
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checkpoint tensor (or some of its rows) that goes into a weight. `shape` is the whole checkpoint tensor's;
    `pattern` its name with `{i}` for the iteration of a repeat."""

    tensor: str
    pattern: str
    shape: tuple[int, ...]
    rows: Rows | None = None
    place: Place | None = None

    def of_iteration(self, i: int) -> str:
        """The name of the tensor in another iteration."""
        return self.pattern.replace("{i}", str(i))

    @property
    def rows_taken(self) -> int:
        return self.rows.groups * self.rows.size if self.rows else self.shape[0]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the graph that comes from the checkpoint: its sources concatenated on axis 0."""

    name: str
    sources: tuple[Source, ...]
    type: TensorType
    split: str = "replicate"  # column | row | vocab | hidden | replicate


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator. `inputs`: slot -> value; `weights`: slot -> Weight; `outputs`: output names, ("",) for one."""

    name: str
    op: str
    inputs: Mapping[str, str]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("",)
    place: Place | None = None

    def value(self, output: str = "") -> str:
        return f"{self.name}.{output}" if output else self.name

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.value(output) for output in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """How often a block of the graph is repeated, and which iterations stand in the graph, in order. One that is left
    out is as those at both ends of the gap (compiler/layers.py)."""

    count: int
    kept: tuple[int, ...]

    @property
    def left_out(self) -> int:
        return self.count - len(self.kept)

    def stands_for(self, index: int) -> range:
        """The iterations that a kept one stands for: itself and those left out behind it."""
        at = self.kept.index(index)
        return range(index, self.kept[at + 1] if at + 1 < len(self.kept) else self.count)


LAYER = re.compile(r"([^.]+)\.(\d+)\.(.+)")  # block, index, rest: repeats stand in `graph` only, not in blocks


def standing_for(repeats: Mapping[str, Repeat], name: str) -> list[tuple[str, int]]:
    """The names for which a name of a graph stands, each with its iteration: itself, and those of iterations that are
    left out behind its own. A name outside repeats has iteration 0."""
    match = LAYER.fullmatch(name)
    if not match or match[1] not in repeats:
        return [(name, 0)]
    return [(f"{match[1]}.{i}.{match[3]}", i) for i in repeats[match[1]].stands_for(int(match[2]))]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The model graph. Passes return new ones. `nodes` are in execution order; `types` is filled by type inference."""

    name: str
    inputs: Mapping[str, TensorType]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, str]  # output name -> value
    sizes: Mapping[str, int | float]
    dtype: str
    rope: Mapping[str, Any]
    policy: tuple[Mapping[str, Any], ...] = ()  # rules {nodes, layers, dtype}, first match wins
    types: Mapping[str, TensorType] = field(default_factory=dict)
    phase: str = ""  # "" before the split, then "prefill" or "decode"
    world_size: int = 1  # of the sharding that the types say
    repeats: Mapping[str, Repeat] = field(default_factory=dict)  # by the name of the repeat
    tapped: tuple[str, ...] = ()  # outputs that are there to be looked at (passes/tap.py): each rank gives its share

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """value -> the node that makes it."""
        return {value: node for node in self.nodes for value in node.values}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """value -> the nodes that read it, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs.values()):
                found.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    def with_nodes(self, nodes: Iterable[Node], **changes: Any) -> Graph:
        """The graph with other nodes; types of values that no longer exist are dropped."""
        nodes = tuple(nodes)
        alive = set(self.inputs) | {value for node in nodes for value in node.values}
        types = changes.pop("types", self.types)
        kept = {value: t for value, t in types.items() if value in alive}
        return replace(self, nodes=nodes, types=kept, **changes)

    @property
    def weights(self) -> dict[str, Weight]:
        return {w.name: w for node in self.nodes for w in node.weights.values()}

    @property
    def size(self) -> int:
        """How many nodes there are in all iterations."""
        return sum(len(standing_for(self.repeats, node.name)) for node in self.nodes)


@dataclass(frozen=True, kw_only=True)
class AtbTensor:
    """A tensor of an ATB graph on one rank. `role`: weight | cache | input | constant | internal."""

    dtype: str
    shape: Shape
    format: str = "nd"
    role: str = "internal"
    host: bool = False  # libatb reads the host copy: a CPU tensor with torch_atb
    shard: Shard = WHOLE  # how the value lies over the ranks; `shape` is one rank's

    @property
    def form(self) -> tuple[str, str, int, tuple[str, ...]]:
        """Equal for tensors whose bytes are as many whatever the symbols are."""
        symbols = tuple(sorted(d for d in self.shape if isinstance(d, str)))
        return self.dtype, self.format, prod(d for d in self.shape if isinstance(d, int)), symbols

    def __str__(self) -> str:
        return f"{self.dtype} {self.format} {show_shape(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class AtbNode:
    """One ATB operation. `param`: C++ field names, only what differs from the defaults. `views`: input index -> shape
    under which the node sees that input. An output that names an already valued tensor is written in place."""

    name: str
    op: str
    param: Mapping[str, Any]
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    views: Mapping[int, Shape] = field(default_factory=dict)
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class AtbGraph:
    """A flat list of ATB operations. `inputs` names the graph inputs in order; `tensors` describes every name."""

    name: str
    phase: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[AtbNode, ...]
    tensors: Mapping[str, AtbTensor]
    repeats: Mapping[str, Repeat] = field(default_factory=dict)  # as in the model graph

    @property
    def internals(self) -> tuple[str, ...]:
        known = {*self.inputs, *self.outputs}
        return tuple(dict.fromkeys(o for node in self.nodes for o in node.outs if o not in known))
