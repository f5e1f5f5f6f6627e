"""rms_norm: y = gamma * x / sqrt(mean(x^2) + eps).  add_rms_norm: residual add and norm in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.atb.norm import NORM, PRENORM
from llmc.compiler.ir import Node, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, WeightSlot, same_dtype, whole_shard

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


def rms_norm_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, n], gamma [n] -> [T, n]"""
    (x,) = types
    gamma = node.weights["weight"].type
    if x.shape[-1:] != gamma.shape or x.dtype != gamma.dtype:
        raise NoRule("the weight does not fit the input", found=str(x), needed=f"{gamma.dtype} [T, {gamma.shape[0]}]")
    return [x]


def rms_norm_lower(node: Node, low: Lowering) -> None:
    param = {"layerType": NORM, "normParam": {"epsilon": node.attrs["eps"]}}
    low.emit(node, "RmsNorm", param, [low.read(node.inputs["x"]), low.weight(node, "weight")])


def add_rms_norm_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """[T, n] + [T, n] -> norm of the sum [T, n], the sum [T, n]"""
    same_dtype(types, ("a", "b"))
    return [*rms_norm_shape(node, types[:1]), types[0]]


def add_rms_norm_lower(node: Node, low: Lowering) -> None:
    """The sum is normalised before it is rounded; the second output is the rounded sum."""
    param = {"layerType": PRENORM, "preNormParam": {"epsilon": node.attrs["eps"]}}
    ins = [low.read(node.inputs["a"]), low.read(node.inputs["b"]), low.weight(node, "weight")]
    low.emit(node, "RmsNorm", param, ins)


EPS = Attr(name="eps", kind="number", doc="added to the mean square", required=True)
GAMMA = WeightSlot(name="weight", doc="gamma [n]", shape=("x.-1",))

OPS = (
    Op(
        name="rms_norm",
        doc="RMSNorm over the last axis.",
        inputs=("x",),
        weights=(GAMMA,),
        attrs=(EPS,),
        shape=rms_norm_shape,
        shard=whole_shard,
        lower=rms_norm_lower,
        source="ATB RmsNorm NORM (atb-operations.md 3.5); arXiv 1910.07467",
    ),
    Op(
        name="add_rms_norm",
        doc="x = a + b; RMSNorm(x) and x. Made by the add_norm fusion.",
        inputs=("a", "b"),
        weights=(GAMMA,),
        attrs=(EPS,),
        outputs=("y", "sum"),
        shape=add_rms_norm_shape,
        shard=whole_shard,
        lower=add_rms_norm_lower,
        authored=False,
        source="ATB RmsNorm PRENORM (atb-operations.md 3.5)",
    ),
)
