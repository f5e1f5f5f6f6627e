"""What an operator family says about its operators: slots, attributes, and the rules.

Rules are pure. `shape` takes the node and the types of its inputs and returns the types of its outputs; `shard` says
how its outputs and weights lie over the ranks; `lower` emits the ATB nodes. A rule that cannot decide raises `NoRule`
with what was found and what was needed; the pass that called it adds the place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.compiler.ir import Node, TensorType, show_shape
from llmc.compiler.sharding import WHOLE, Shard

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering


class NoRule(Exception):
    """A rule has no answer for these inputs."""

    def __init__(
        self, message: str, *, found: str = "", needed: str = "", likely: str = "", code: str = "E301"
    ) -> None:
        super().__init__(message)
        self.message, self.code = message, code
        self.details = {"found": found, "needed": needed, "likely": likely}  # as Diagnostic has them


@dataclass(frozen=True, kw_only=True)
class Attr:
    """An attribute that authors write. `kind`: "size" (an expression over sizes, a whole number from 1), "number" (one
    that may be fractional), "bool", "text", or "choice" (then `choices`). `default` None where it is not required means
    absent."""

    name: str
    kind: str
    doc: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightSlot:
    """A weight that authors name as in the checkpoint. `shape` holds attribute names and `slot.axis` of inputs."""

    name: str
    doc: str
    shape: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What a sharding rule says: of each output, and of the weights that not every rank has whole (slot -> shard)."""

    outputs: Sequence[Shard]
    weights: Mapping[str, Shard] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator of the language."""

    name: str
    doc: str
    inputs: tuple[str, ...]
    shape: Callable[[Node, Sequence[TensorType]], Sequence[TensorType]]
    shard: Callable[[Node, Sequence[TensorType], int], Sharding]  # node, types of its inputs, world size
    lower: Callable[[Node, Lowering], None]
    weights: tuple[WeightSlot, ...] = ()  # slot names are also the keys authors write
    attrs: tuple[Attr, ...] = ()
    splits: tuple[str, ...] = ("replicate",)  # legal values of `tp:`; the first is the default
    parts: bool = False  # may say `parts:`, several packed outputs
    outputs: tuple[str, ...] = ("",)
    gathers: bool = True  # inputs that are split may be made whole; False: that would be all the work on every rank
    authored: bool = True  # False: made by passes only, authors cannot write it
    source: str = ""


def same_dtype(types: Sequence[TensorType], names: Sequence[str]) -> str:
    """The common dtype of the inputs, or NoRule."""
    dtypes = [t.dtype for t in types]
    if len(set(dtypes)) > 1:
        found = ", ".join(f"{n} {d}" for n, d in zip(names, dtypes, strict=True))
        raise NoRule("the inputs have different dtypes", found=found, needed="one dtype", code="E302")
    return dtypes[0]


# ---- sharding rules that several operators share


def same_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """R -> R, S -> S, P -> P: rows are moved or summed, so the sum over the ranks may come later"""
    first = types[0].shard
    if any(t.shard != first for t in types):
        raise unlike(types)
    return Sharding(outputs=[first])


def element_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """R -> R, S -> S: each element by itself; not P, because f(a) + f(b) is not f(a + b)"""
    if types[0].shard.letter == "P":
        raise NoRule("partial sums are read as values", found="P", needed="R or S", code="E303")
    return same_shard(node, types, world_size)


def whole_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """R -> R: every rank needs all of its inputs"""
    if any(t.shard != WHOLE for t in types):
        raise NoRule(
            "an input is not whole",
            found=", ".join(str(t.shard) for t in types),
            needed="R on every input",
            code="E303",
        )
    return Sharding(outputs=[WHOLE] * len(node.outputs))


def unlike(types: Sequence[TensorType]) -> NoRule:
    return NoRule(
        "the inputs lie differently over the ranks",
        found=" and ".join(describe(t) for t in types),
        needed="inputs that are split alike",
        code="E303",
    )


def describe(t: TensorType) -> str:
    """`S(1) [T, 5120] with 640 a rank`, for messages."""
    shares = " + ".join(str(split.local) for split in t.shard.splits)
    return f"{t.shard} {show_shape(t.shape)}" + (f" with {shares} a rank" if shares else "")
