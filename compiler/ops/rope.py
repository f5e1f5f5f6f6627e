"""rope: rotary position embedding of queries and keys; the tables come from the model's `rope:` settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, Sharding, describe, same_dtype

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


def rope_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """q [T, H*D], k [T, Hk*D] -> the same"""
    same_dtype(types, ("q", "k"))
    d = node.attrs["head_dim"]
    for name, t in zip(("q", "k"), types, strict=True):
        width = t.shape[-1]
        if not isinstance(width, int) or width % d:
            raise NoRule(f"the width of '{name}' is not a multiple of head_dim {d}", found=str(t))
    return list(types)


def rope_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """q and k each R -> R or S -> S, where no rank holds a piece of a head"""
    d = node.attrs["head_dim"]
    for name, t in zip(("q", "k"), types, strict=True):
        if t.shard.letter == "P" or not all(split.keeps_whole(d) for split in t.shard.splits):
            raise NoRule(f"'{name}' does not have whole heads of {d} on each rank", found=describe(t),
                         needed="R, or S in whole heads", code="E303",
                         likely="say `heads` where the weight is")  # fmt: skip
    return Sharding(outputs=[t.shard for t in types])


def rope_lower(node: Node, low: Lowering) -> None:
    """`rope_len` is a length tensor of its own: with torch_atb a tensor is on the host or on the device, and
    attention reads its lengths on the host. The values are unused with cosFormat 0."""
    d = node.attrs["head_dim"]
    cos, sin = low.rope_tables(d)
    # rotaryCoeff: 2 = rotate halves (LLaMA), head_dim = rotate adjacent pairs (GPT-J).
    coeff = 2 if low.graph.rope["pairing"] == "half" else d
    lengths = low.input("rope_len", "int32", ("B",))
    ins = [low.read(node.inputs["q"]), low.read(node.inputs["k"]), cos, sin, lengths]
    low.emit(node, "Rope", {"rotaryCoeff": coeff}, ins)


OPS = (
    Op(
        name="rope",
        doc="Rotary position embedding of q and k (settings: the model's `rope:`).",
        inputs=("q", "k"),
        outputs=("q", "k"),
        attrs=(Attr(name="head_dim", kind="size", doc="size of a head; all of it is rotated", required=True),),
        shape=rope_shape,
        shard=rope_shard,
        gathers=False,
        lower=rope_lower,
        source="ATB Rope, cosFormat 0 (atb-operations.md 3.7); arXiv 2104.09864",
    ),
)
