"""What compiling gives: reports, the artifact and the memory plan read it; `pipeline.py` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmc.compiler.ir import AtbGraph, Graph
from llmc.compiler.language.build import Model
from llmc.compiler.options import Options
from llmc.compiler.passes.segment import Segment
from llmc.compiler.target.device import Device


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Per phase the flat ATB graph and its segments (with --until, whatever existed by then)."""

    model: Model
    options: Options
    device: Device
    dtype: str
    graph: Graph
    phases: Mapping[str, Any]  # phase -> result of the last pass that ran
    tapped: Mapping[str, Graph] = field(default_factory=dict)  # with `taps`: the model graph as it was lowered
    lowered: Mapping[str, AtbGraph] = field(default_factory=dict)
    segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)  # what one rank holds: `memory_plan`
