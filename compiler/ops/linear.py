"""linear: y = x W^T (+ b), one matmul for one weight or for several packed ones.  split: the packed result's parts.

Authors write one `linear` with `parts`; the build step makes a packed `linear` and a `split` of it, so that fusion and
lowering see one matmul. Each part is dealt to the ranks by itself: a rank's weight is its rows of q, of k, of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, Sharding, WeightSlot, describe
from llmc.compiler.sharding import PARTIAL, WHOLE, Split, deal, deal_heads, split_on

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


def linear_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, k], weight [n, k] -> [T, n]"""
    (x,) = types
    weight = node.weights["weight"].type
    if x.dtype != weight.dtype:
        raise NoRule(f"'x' is {x.dtype}, the weight {weight.dtype}", needed="one dtype", code="E302")
    if len(x.shape) != 2 or x.shape[-1] != weight.shape[-1]:
        raise NoRule("the input's width is not the weight's", found=str(x), needed=f"[T, {weight.shape[-1]}]")
    return [TensorType(dtype=x.dtype, shape=(x.shape[0], weight.shape[0]))]


def linear_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """replicate: R -> R.  column, vocab: R -> S(1).  row: S(1) -> P, and rank 0 alone adds the bias"""
    (x,) = types
    split = node.weights["weight"].split
    if split == "row":
        return _row_shard(node, x)
    if x.shard != WHOLE:
        raise NoRule("'x' is not whole", found=describe(x), needed="R", code="E303")
    if split == "replicate":
        return Sharding(outputs=[WHOLE])
    pieces = _pieces(node, world_size)
    return Sharding(outputs=[split_on(1, *pieces)], weights={slot: split_on(0, *pieces) for slot in node.weights})


def _row_shard(node: Node, x: TensorType) -> Sharding:
    heads = node.attrs.get("heads")
    if x.shard.letter != "S" or len(x.shard.splits) != 1 or not x.shard.split.is_partition:
        raise NoRule("a weight that is split by rows wants an input that is split", found=describe(x),
                     needed="S(1), each column on one rank", code="E303",
                     likely="tp: column where 'x' is made, or tp: replicate here")  # fmt: skip
    if heads and not x.shard.split.keeps_whole(x.shape[-1] // heads):
        raise NoRule(f"'x' is not split in whole heads, and this weight has {heads}", found=describe(x),
                     likely="say `heads` where 'x' is made", code="E303")  # fmt: skip
    return Sharding(
        outputs=[PARTIAL], weights={"weight": x.shard, **({"bias": PARTIAL} if "bias" in node.weights else {})}
    )


def _pieces(node: Node, world_size: int) -> list[Split]:
    """One split for each source of the weight (each part): by heads where the part says `heads`, else evenly.

    Of parts with different numbers of heads, the smallest is the number of kv heads, and the others are query heads:
    these stay with their kv head (grouped-query attention)."""
    sources = node.weights["weight"].sources
    said = node.attrs.get("heads")
    heads = said if isinstance(said, tuple) else (said,) * len(sources)
    kv_heads, most = (extreme((h for h in heads if h), default=0) for extreme in (min, max))
    pieces = []
    for count, source in zip(heads, sources, strict=True):
        size = source.rows_taken
        if not count:
            pieces.append(deal(size, world_size))
        elif size % count or count % kv_heads:
            raise NoRule("the heads of the parts do not form groups", found=f"{size} features in {count} heads",
                         needed=f"whole heads, {kv_heads} of them or a multiple", code="E303")  # fmt: skip
        else:
            # How many ranks hold a kv head depends on how many query heads share it.
            queries, keys = deal_heads(most if count == kv_heads else count, kv_heads, size // count, world_size)
            pieces.append(keys if count == kv_heads else queries)
    return pieces


def linear_lower(node: Node, low: Lowering) -> None:
    """Weights stay [n, k] as in the checkpoint: transposeB, ATB's default."""
    has_bias = "bias" in node.weights
    ins = [low.read(node.inputs["x"]), low.weight(node, "weight", matmul=True)]
    low.emit(node, "Linear", {"hasBias": has_bias}, [*ins, low.weight(node, "bias")] if has_bias else ins)


def split_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, a + b + c] -> [T, a], [T, b], [T, c]"""
    (x,) = types
    sizes = node.attrs["sizes"]
    if x.shape[-1] != sum(sizes):
        raise NoRule("the parts do not add up to the width", found=str(x), needed=f"[T, {sum(sizes)}]")
    return [TensorType(dtype=x.dtype, shape=(*x.shape[:-1], size)) for size in sizes]


def split_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """R -> R; S of several pieces -> S each, the parts as they were dealt"""
    (x,) = types
    if x.shard == WHOLE:
        return Sharding(outputs=[WHOLE] * len(node.outputs))
    if [split.size for split in x.shard.splits] != list(node.attrs["sizes"]):
        raise NoRule("the parts are not what was split over the ranks", found=describe(x), needed="R", code="E303")
    return Sharding(outputs=[split_on(1, split) for split in x.shard.splits])


def split_lower(node: Node, low: Lowering) -> None:
    sizes = [low.local(value)[-1] for value in node.values]
    if len(sizes) not in (2, 3):
        raise NoRule(f"ATB splits into 2 or 3 parts, not {len(sizes)}", likely="pack fewer parts", code="E402")
    param = {"splitDim": 1, "splitNum": len(sizes)}
    equal = len(set(sizes)) == 1
    low.emit(node, "Split", param if equal else {**param, "splitSizes": sizes}, [low.read(node.inputs["x"])])


OPS = (
    Op(
        name="linear",
        doc="Matrix product with one weight, or with several packed into one matmul (`parts`).",
        inputs=("x",),
        weights=(
            WeightSlot(name="weight", doc="[out, in] as in the checkpoint", shape=("out", "x.-1")),
            WeightSlot(name="bias", doc="[out]", shape=("out",), required=False),
        ),
        attrs=(
            Attr(name="out", kind="size", doc="output features; with `parts` each part says its own"),
            Attr(name="heads", kind="size", doc="the split axis is this many heads, which ranks share whole"),
            Attr(name="groups", kind="size", doc="the packed checkpoint tensor repeats its parts this many times"),
        ),
        splits=("replicate", "column", "row", "vocab"),
        parts=True,
        shape=linear_shape,
        shard=linear_shard,
        lower=linear_lower,
        source="ATB Linear (atb-operations.md 3.2)",
    ),
    Op(
        name="split",
        doc="Parts of a packed result on the last axis.",
        inputs=("x",),
        shape=split_shape,
        shard=split_shard,
        lower=split_lower,
        authored=False,
        source="ATB Split, 2 or 3 parts (atb-operations.md 3.14)",
    ),
)
