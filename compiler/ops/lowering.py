"""What the lowering rules of operators (`*_lower`) write to: the ATB graph of one phase under construction.

It declares graph inputs when they are first read, keeps the ATB shape of every value, and adds a view where a reader
wants another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.ir import AtbNode, AtbTensor, Graph, Node, Shape
from llmc.compiler.sharding import WHOLE
from llmc.compiler.target.device import Device


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A tensor as a node reads it: its name, and the shape to view it in (None: as it is)."""

    name: str
    view: Shape | None = None


class Lowering:
    """The ATB graph under construction, and the choices that the rules read: phase, attention, tokens symbol."""

    def __init__(self, graph: Graph, attention: str, backend: str, device: Device) -> None:
        self.graph, self.attention, self.phase, self.backend = graph, attention, graph.phase, backend
        self.device = device
        self.tokens = "T" if graph.phase == "prefill" else "B"
        self.tensors: dict[str, AtbTensor] = {}
        self.shared: list[AtbNode] = []  # used by all layers, so they come first
        self.nodes: list[AtbNode] = []
        self.inputs: list[str] = []
        self.tables: dict[int, tuple[Ref, Ref]] = {}

    def _declare(self, name: str, tensor: AtbTensor) -> Ref:
        if name not in self.tensors:
            self.tensors[name] = tensor
            self.inputs.append(name)
        return Ref(name=name)

    def input(self, name: str, dtype: str, shape: Shape) -> Ref:
        """A tensor that the runtime gives with every step; on the host where an operation reads it there."""
        return self._declare(name, AtbTensor(dtype=dtype, shape=shape, role="input"))

    def constant(self, name: str, shape: Shape, layout: str = "nd") -> Ref:
        """A tensor that the runtime makes once, in the model's dtype."""
        return self._declare(name, AtbTensor(dtype=self.graph.dtype, shape=shape, format=layout, role="constant"))

    def weight(self, node: Node, slot: str, *, matmul: bool = False) -> Ref:
        """`matmul`: it is the second matrix of a product, which a device may want in a format of its own."""
        weight = node.weights[slot]
        t, layout = weight.type, self.device.formats["weight"] if matmul else "nd"
        tensor = AtbTensor(dtype=t.dtype, shape=t.local, format=layout, role="weight", shard=t.shard)
        return self._declare(weight.name, tensor)

    def cache(self, node: Node, slot: str, shape: Shape, *, axis: int) -> Ref:
        """The KV cache of this attention node for its input `slot` (k or v), whose heads lie on `axis`."""
        layout = self.device.formats["cache"]
        shard = replace(self.graph.types[node.inputs[slot]].shard, axis=axis)
        tensor = AtbTensor(dtype=self.graph.dtype, shape=shape, format=layout, role="cache", shard=shard)
        return self._declare(f"{node.name}.{slot}_cache", tensor)

    def causal_mask(self) -> Ref:
        """The NORM_COMPRESS mask: one [128, 128] triangle for any length; as NZ [1, 8, 128, 16]."""
        if self.device.formats["mask"] == "nz":
            return self.constant("mask", (1, 8, 128, 16), "nz")
        return self.constant("mask", (128, 128))

    def rope_tables(self, head_dim: int) -> tuple[Ref, Ref]:
        """cos and sin of the tokens of the step, [tokens, head_dim]; gathered once for all layers."""
        if head_dim not in self.tables:
            suffix = f"_{head_dim}" if self.tables else ""
            positions = self.input("position_ids", "int64", (self.tokens,))
            cos, sin = (
                self._gather(f"rope.{kind}{suffix}", f"{kind}_table{suffix}", head_dim, positions)
                for kind in ("cos", "sin")
            )
            self.tables[head_dim] = cos, sin
        return self.tables[head_dim]

    def _gather(self, name: str, table: str, head_dim: int, positions: Ref) -> Ref:
        ref = self.constant(table, ("P", head_dim))
        self._append(name, "Gather", {}, [ref, positions], [(name, self.graph.dtype, (self.tokens, head_dim))])
        return Ref(name=name)

    def read(self, value: str) -> Ref:
        """A model value in its model shape."""
        if value in self.graph.inputs:
            t = self.graph.inputs[value]
            return self.input(value, t.dtype, t.shape)
        return self.view(Ref(name=value), self.graph.types[value].local)

    def local(self, value: str) -> Shape:
        """A model value's shape on one rank."""
        return self.graph.types[value].local

    def communicator(self) -> dict[str, Any]:
        """Parameters of a collective. Rank and domain are arguments of the generated `build`; these are rank 0's."""
        return {"rank": 0, "rankSize": self.graph.world_size, "backend": self.backend, "commDomain": "0"}

    def view(self, ref: Ref, shape: Shape) -> Ref:
        """The tensor under another shape (same elements)."""
        return Ref(name=ref.name, view=None if self.tensors[ref.name].shape == shape else shape)

    def emit(
        self,
        node: Node,
        op: str,
        param: Mapping[str, Any],
        ins: Sequence[Ref],
        *,
        outs: Sequence[Ref] | None = None,
        shape: Shape | None = None,
        suffix: str = "",
    ) -> None:
        """Add one ATB operation. Outputs are the node's values; `outs` names tensors to write in place instead; `shape`
        is the ATB shape of the single output where it is not the model's."""
        name = f"{node.name}.{suffix}" if suffix else node.name
        if outs is not None:
            made = [(o.name, self.tensors[o.name].dtype, self.tensors[o.name].shape) for o in outs]
        else:
            types = [self.graph.types[value] for value in node.values]
            made = [(v, t.dtype, shape or t.local) for v, t in zip(node.values, types, strict=True)]
        self._append(name, op, param, ins, made, node)

    def step(self, node: Node, op: str, param: Mapping[str, Any], ins: Sequence[Ref], suffix: str, shape: Shape) -> Ref:
        """Add an operation before the node's last; its output is no value of the model graph."""
        name = f"{node.name}.{suffix}"
        self._append(name, op, param, ins, [(name, self.graph.types[node.value()].dtype, shape)], node)
        return Ref(name=name)

    def _append(
        self,
        name: str,
        op: str,
        param: Mapping[str, Any],
        ins: Sequence[Ref],
        outs: Sequence[tuple[str, str, Shape]],
        node: Node | None = None,
    ) -> None:
        if any(self.tensors[ref.name].role == "input" for ref in ins):
            for i in ATB[op].host(ATB[op].param(param), self.device.chip):
                self.tensors[ins[i].name] = replace(self.tensors[ins[i].name], host=True)
        for out, dtype, shape in outs:
            known = self.graph.types.get(out)
            self.tensors.setdefault(out, AtbTensor(dtype=dtype, shape=shape, shard=known.shard if known else WHOLE))
        (self.nodes if node else self.shared).append(
            AtbNode(
                name=name,
                op=op,
                param=without_defaults(op, param),
                ins=tuple(ref.name for ref in ins),
                outs=tuple(out for out, _, _ in outs),
                views={i: ref.view for i, ref in enumerate(ins) if ref.view is not None},
                place=node.place if node else None,
            )
        )


def without_defaults(op: str, param: Mapping[str, Any]) -> dict[str, Any]:
    """Only what differs from ATB's defaults, in the order of the struct: generated code says what was chosen."""
    kept: dict[str, Any] = {}
    for f in ATB[op].fields:
        if f.name not in param:
            continue
        value = param[f.name]
        if f.kind == "struct":
            inner = {g.name: value[g.name] for g in f.fields if g.name in value and value[g.name] != g.default}
            if inner:
                kept[f.name] = inner
        elif value != f.default:
            kept[f.name] = value
    return kept
