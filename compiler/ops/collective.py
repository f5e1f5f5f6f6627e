"""all_reduce, all_gather: what makes a value whole on every rank. Inserted by the sharding pass, never written.

linear_all_reduce: a row-parallel linear and its all_reduce in one kernel (LinearParallel, backend lcoc).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.atb.collective import fused_param
from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import NoRule, Op, Sharding, WeightSlot, describe
from llmc.compiler.ops.linear import linear_shape, linear_shard
from llmc.compiler.sharding import PARTIAL, WHOLE

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


def same_type(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, n] -> [T, n]"""
    return [TensorType(dtype=types[0].dtype, shape=types[0].shape)]


def all_reduce_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """P -> R"""
    if types[0].shard != PARTIAL:
        raise NoRule("what is summed over the ranks must be partial sums", found=describe(types[0]), needed="P")
    return Sharding(outputs=[WHOLE])


def all_reduce_lower(node: Node, low: Lowering) -> None:
    low.emit(node, "AllReduce", {**low.communicator(), "allReduceType": "sum"}, [low.read(node.inputs["x"])])


def all_gather_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """S(1) -> R, where the shares in rank order are the axis"""
    shard = types[0].shard
    if shard.letter != "S" or len(shard.splits) != 1 or not shard.split.in_order:
        raise NoRule("only shares that follow each other rank by rank can be gathered", found=describe(types[0]),
                     needed="S(1) of one piece, no head on two ranks", code="E303")  # fmt: skip
    return Sharding(outputs=[WHOLE])


def all_gather_lower(node: Node, low: Lowering) -> None:
    """ATB's AllGather adds a leading rank axis: [W, T, n/W], then [T, W, n/W], seen as [T, n]; padding is cut off."""
    value, ranks = node.inputs["x"], low.graph.world_size
    (rows, share), (_, size) = low.local(value), low.graph.types[node.value()].shape
    everyone = low.step(node, "AllGather", low.communicator(), [low.read(value)], "gathered", (ranks, rows, share))
    if share * ranks == size:
        low.emit(node, "Transpose", {"perm": [1, 0, 2]}, [everyone], shape=(rows, ranks, share))
        return
    turned = low.step(node, "Transpose", {"perm": [1, 0, 2]}, [everyone], "turned", (rows, ranks, share))
    padded = low.view(turned, (rows, ranks * share))
    low.emit(node, "Slice", {"offsets": [0, 0], "size": [-1, size]}, [padded])


def linear_all_reduce_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """S(1) -> R: the sum is made inside"""
    return Sharding(outputs=[WHOLE], weights=linear_shard(node, types, world_size).weights)


def linear_all_reduce_lower(node: Node, low: Lowering) -> None:
    param = fused_param({**low.communicator(), "backend": node.attrs["backend"]})
    low.emit(node, "LinearParallel", param, [low.read(node.inputs["x"]), low.weight(node, "weight", matmul=True)])


OPS = (
    Op(
        name="all_reduce",
        doc="Sum of the partial sums of all ranks. Made where P is read as R.",
        inputs=("x",),
        shape=same_type,
        shard=all_reduce_shard,
        lower=all_reduce_lower,
        authored=False,
        source="ATB AllReduce (atb-operations.md 3.17, 4)",
    ),
    Op(
        name="all_gather",
        doc="The shares of all ranks one after the other. Made where S is read as R.",
        inputs=("x",),
        shape=same_type,
        shard=all_gather_shard,
        lower=all_gather_lower,
        authored=False,
        source="ATB AllGather, Transpose (atb-operations.md 3.17, 6 steps 1 and 5)",
    ),
    Op(
        name="linear_all_reduce",
        doc="linear and all_reduce in one kernel. Made by the linear_all_reduce fusion.",
        inputs=("x",),
        weights=(WeightSlot(name="weight", doc="[out, in] as in the checkpoint", shape=("out", "x.-1")),),
        shape=linear_shape,
        shard=linear_all_reduce_shard,
        lower=linear_all_reduce_lower,
        authored=False,
        source="ATB LinearParallel, LINEAR_ALL_REDUCE, backend lcoc (atb-operations.md 3.3)",
    ),
)
