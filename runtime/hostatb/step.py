"""A node of a planned graph, bound to the descs of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llmc.compiler.atb.core import Desc
from llmc.runtime.hostatb.operation import Core


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node bound to descs. `run` maps the viewed inputs to the outputs; the rest is where they come from and go.

    views     per input: the shape to look through, or None for the tensor as it is
    fills     {input index: output index}: the kernel writes this output through that input (table's `in_place`); the
              input handed in is the output's present tensor, or a new one where the output has none yet
    stores    per output: True if it overwrites a graph input, so that the caller's memory must change
    frees     slots that nothing reads later
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
