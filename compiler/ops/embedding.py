"""embedding: rows of a table by token id.  last_token: each sequence's last row, before the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, Sharding, WeightSlot, same_shard
from llmc.compiler.sharding import WHOLE, deal, split_on

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


def embedding_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """int64 [T] -> [T, width]"""
    (ids,) = types
    if len(ids.shape) != 1 or not ids.dtype.startswith("int"):
        raise NoRule("'ids' must be a row of token ids", found=str(ids), needed="int64 [T]")
    return [TensorType(dtype=node.weights["weight"].type.dtype, shape=(*ids.shape, node.attrs["width"]))]


def embedding_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """replicate -> R; hidden: each rank has some columns of the table -> S(1)"""
    if node.weights["weight"].split == "replicate":
        return Sharding(outputs=[WHOLE])
    columns = split_on(1, deal(node.attrs["width"], world_size))
    return Sharding(outputs=[columns], weights={"weight": columns})


def embedding_lower(node: Node, low: Lowering) -> None:
    low.emit(node, "Gather", {}, [low.weight(node, "weight"), low.read(node.inputs["ids"])])


def last_token_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, n] -> [B, n]"""
    (x,) = types
    return [TensorType(dtype=x.dtype, shape=("B", *x.shape[1:]))]


def last_token_lower(node: Node, low: Lowering) -> None:
    """Prefill only: in decode every sequence has one row, and the node is gone (passes/phase.py)."""
    rows = low.input("last_rows", "int64", ("B",))
    low.emit(node, "Gather", {}, [low.read(node.inputs["x"]), rows])


OPS = (
    Op(
        name="embedding",
        doc="Rows of a table, one per token.",
        inputs=("ids",),
        weights=(WeightSlot(name="weight", doc="the table", shape=("rows", "width")),),
        attrs=(
            Attr(name="rows", kind="size", doc="rows of the table (vocabulary)", required=True),
            Attr(name="width", kind="size", doc="width of a row (hidden size)", required=True),
        ),
        splits=("replicate", "hidden"),
        shape=embedding_shape,
        shard=embedding_shard,
        lower=embedding_lower,
        source="ATB Gather, axis 0 (atb-operations.md 3.1)",
    ),
    Op(
        name="last_token",
        doc="The last row of each sequence: only these need logits. In decode and with --logits all that is every row.",
        inputs=("x",),
        shape=last_token_shape,
        shard=same_shard,
        lower=last_token_lower,
        source="ATB Gather with int64 row numbers (atb-operations.md 6, step 5)",
    ),
)
