"""A node of a planned graph, bound to the descs of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmc.compiler.atb.core import Desc
from llmc.runtime.hostatb.operation import Core


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A value made of some of a step's inputs and kept until one of them changes (`straight.derived`)."""

    name: str
    make: Callable[..., Any]
    inputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A step as lines of the straight function: `"{o0} = mul({i0}, {wide})"`.

    lines     `{i0}` inputs as the step sees them, `{o0}` outputs, and what the next two name
    names     functions and constants
    derived   values that are made once and looked up: packed weights, positions of a step
    shapes    {output index: shape} where the lines leave another shape than the desc's; whoever reads it looks through
    """

    lines: tuple[str, ...]
    names: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node bound to descs. `run` maps the viewed inputs to the outputs; the rest is where they come from and go.

    views     per input: the shape to look through, or None for the tensor as it is
    fills     {input index: output index}: the kernel writes this output through that input (table's `in_place`); the
              input handed in is the output's present tensor, or a new one where the output has none yet
    stores    per output: True if it overwrites a graph input, so that the caller's memory must change
    frees     slots that nothing reads later
    code      the same as text, where a rewrite knows it: then `run` is not called
    nodes     the graph's nodes that it computes, by number
    """

    core: Core
    label: str
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    ins: tuple[Desc, ...]
    outs: tuple[Desc, ...]
    inputs: tuple[int, ...]
    views: tuple[tuple[int, ...] | None, ...]
    outputs: tuple[int, ...]
    stores: tuple[bool, ...]
    fills: Mapping[int, int] = field(default_factory=dict)
    frees: tuple[int, ...] = ()
    code: Code | None = None
    nodes: tuple[int, ...] = ()
