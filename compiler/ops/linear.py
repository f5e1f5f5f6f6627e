"""linear: y = x W^T (+ b), one matmul for one weight or for several packed ones.  split: the packed result's parts.

Authors write one `linear` with `parts`; the build step makes a packed `linear` and a `split` of it, so that fusion and
lowering see one matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, WeightSlot

if TYPE_CHECKING:
    from llmc.compiler.passes.lower import Lowering


def linear_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, k], weight [n, k] -> [T, n]"""
    (x,) = types
    weight = node.weights["weight"].type
    if x.dtype != weight.dtype:
        raise NoRule(f"'x' is {x.dtype}, the weight {weight.dtype}", needed="one dtype", code="E302")
    if len(x.shape) != 2 or x.shape[-1] != weight.shape[-1]:
        raise NoRule("the input's width is not the weight's", found=str(x), needed=f"[T, {weight.shape[-1]}]")
    return [TensorType(dtype=x.dtype, shape=(x.shape[0], weight.shape[0]))]


def linear_lower(node: Node, low: Lowering) -> None:
    """Weights stay [n, k] as in the checkpoint: transposeB, ATB's default."""
    has_bias = "bias" in node.weights
    ins = [low.read(node.inputs["x"]), low.weight(node, "weight")]
    low.emit(node, "Linear", {"hasBias": has_bias}, [*ins, low.weight(node, "bias")] if has_bias else ins)


def split_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, a + b + c] -> [T, a], [T, b], [T, c]"""
    (x,) = types
    sizes = node.attrs["sizes"]
    if x.shape[-1] != sum(sizes):
        raise NoRule("the parts do not add up to the width", found=str(x), needed=f"[T, {sum(sizes)}]")
    return [TensorType(dtype=x.dtype, shape=(*x.shape[:-1], size)) for size in sizes]


def split_lower(node: Node, low: Lowering) -> None:
    sizes = list(node.attrs["sizes"])
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
        lower=linear_lower,
        source="ATB Linear (atb-operations.md 3.2)",
    ),
    Op(
        name="split",
        doc="Parts of a packed result on the last axis.",
        inputs=("x",),
        shape=split_shape,
        lower=split_lower,
        authored=False,
        source="ATB Split, 2 or 3 parts (atb-operations.md 3.14)",
    ),
)
