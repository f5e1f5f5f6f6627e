"""What an operator family says about its operators: slots, attributes, and the rules.

Rules are pure. `shape` takes the node and the types of its inputs and returns the types of its outputs; `lower` emits
the ATB nodes. A rule that cannot decide raises `NoRule` with what was found and what was needed; the pass that called
it adds the place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.compiler.ir import Node, TensorType

if TYPE_CHECKING:
    from llmc.compiler.passes.lower import Lowering


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
class Op:
    """One operator of the language."""

    name: str
    doc: str
    inputs: tuple[str, ...]
    shape: Callable[[Node, Sequence[TensorType]], Sequence[TensorType]]
    lower: Callable[[Node, Lowering], None]
    weights: tuple[WeightSlot, ...] = ()  # slot names are also the keys authors write
    attrs: tuple[Attr, ...] = ()
    splits: tuple[str, ...] = ("replicate",)  # legal values of `tp:`; the first is the default
    parts: bool = False  # may say `parts:`, several packed outputs
    outputs: tuple[str, ...] = ("",)
    authored: bool = True  # False: made by passes only, authors cannot write it
    source: str = ""


def same_dtype(types: Sequence[TensorType], names: Sequence[str]) -> str:
    """The common dtype of the inputs, or NoRule."""
    dtypes = [t.dtype for t in types]
    if len(set(dtypes)) > 1:
        found = ", ".join(f"{n} {d}" for n, d in zip(names, dtypes, strict=True))
        raise NoRule("the inputs have different dtypes", found=found, needed="one dtype", code="E302")
    return dtypes[0]
