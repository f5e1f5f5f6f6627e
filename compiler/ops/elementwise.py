"""add, mul, silu, swiglu, cast: element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmc.compiler.atb.elementwise import ADD, CAST, CASTS, MUL, SWIGLU_FORWARD, SWISH
from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, Sharding, element_shard, same_dtype, same_shard, unlike
from llmc.compiler.sharding import split_on

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


def binary_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, n], [T, n] -> [T, n]"""
    a, b = types
    same_dtype(types, ("a", "b"))
    if a.shape != b.shape:
        raise NoRule("'a' and 'b' have different shapes", found=f"{a} and {b}", needed="equal shapes")
    return [a]


def binary_lower(kind: int) -> Callable[[Node, Lowering], None]:
    def lower(node: Node, low: Lowering) -> None:
        low.emit(node, "Elewise", {"elewiseType": kind}, [low.read(node.inputs["a"]), low.read(node.inputs["b"])])

    return lower


def same_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, n] -> [T, n]"""
    return [types[0]]


def silu_lower(node: Node, low: Lowering) -> None:
    low.emit(node, "Activation", {"activationType": SWISH}, [low.read(node.inputs["x"])])


def swiglu_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, 2n] (gate, up) -> [T, n]"""
    (x,) = types
    width = x.shape[-1]
    if not isinstance(width, int) or width % 2:
        raise NoRule("the width is odd", found=str(x), needed="gate and up of equal width")
    return [TensorType(dtype=x.dtype, shape=(*x.shape[:-1], width // 2))]


def swiglu_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """R -> R; S of two equal pieces, gate and up -> S of one"""
    (x,) = types
    if x.shard.letter != "S":
        return element_shard(node, types, world_size)
    if len(x.shard.splits) != 2 or x.shard.splits[0] != x.shard.splits[1]:
        raise unlike(types)
    return Sharding(outputs=[split_on(1, x.shard.splits[0])])


def swiglu_lower(node: Node, low: Lowering) -> None:
    low.emit(node, "Activation", {"activationType": SWIGLU_FORWARD}, [low.read(node.inputs["x"])])


def cast_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """any float -> `to`"""
    return [TensorType(dtype=node.attrs["to"], shape=types[0].shape)]


def cast_lower(node: Node, low: Lowering) -> None:
    param = {"elewiseType": CAST, "outTensorType": CASTS[node.attrs["to"]]}
    low.emit(node, "Elewise", param, [low.read(node.inputs["x"])])


OPS = (
    Op(
        name="add",
        doc="a + b (the residual connection).",
        inputs=("a", "b"),
        shape=binary_shape,
        shard=same_shard,
        lower=binary_lower(ADD),
        source="ATB Elewise ADD (atb-operations.md 3.13)",
    ),
    Op(
        name="mul",
        doc="a * b.",
        inputs=("a", "b"),
        shape=binary_shape,
        shard=element_shard,
        lower=binary_lower(MUL),
        source="ATB Elewise MUL (atb-operations.md 3.13)",
    ),
    Op(
        name="silu",
        doc="x * sigmoid(x).",
        inputs=("x",),
        shape=same_shape,
        shard=element_shard,
        lower=silu_lower,
        source="ATB Activation SWISH (atb-operations.md 3.12)",
    ),
    Op(
        name="swiglu",
        doc="silu(first half) * second half, rounded once. Made by the swiglu fusion.",
        inputs=("x",),
        shape=swiglu_shape,
        shard=swiglu_shard,
        lower=swiglu_lower,
        authored=False,
        source="ATB Activation SWIGLU_FORWARD (atb-operations.md 3.12)",
    ),
    Op(
        name="cast",
        doc="Another dtype. Made by the dtype policy.",
        inputs=("x",),
        attrs=(Attr(name="to", kind="choice", doc="target dtype", required=True, choices=tuple(CASTS)),),
        shape=cast_shape,
        shard=element_shard,
        lower=cast_lower,
        authored=False,
        source="ATB Elewise CAST (atb-operations.md 3.13)",
    ),
)
