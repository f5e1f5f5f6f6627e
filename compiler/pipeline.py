"""The compiler's table of contents: the passes in order, each with its reason.

    compiled = compile_model("graphs/llama2-13b.yaml", Options(device="atlas-800i-a2"))
    compiled.segments["prefill"][0].graph.nodes

`verify` runs after every pass. `--until PASS --print` of the command line stops after a pass and shows the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.ir import AtbGraph, Graph
from llmc.compiler.language.build import Model, load_model
from llmc.compiler.layers import NotPeriodic
from llmc.compiler.memory import memory_plan
from llmc.compiler.options import Options, check_options
from llmc.compiler.passes.fuse import fuse_add_norm, fuse_linear_all_reduce, fuse_swiglu
from llmc.compiler.passes.lower import lower
from llmc.compiler.passes.phase import PHASES, split_phase
from llmc.compiler.passes.segment import segment
from llmc.compiler.passes.shard import split_over_ranks
from llmc.compiler.passes.tap import check_taps, tap
from llmc.compiler.passes.types import apply_dtypes, infer_types, with_dtype
from llmc.compiler.verify import verify


@dataclass(frozen=True)
class Pass:
    """One step: `run(graph, options)` gives the next graph; `when(name, graph, options)`: whether it runs at all."""

    name: str
    run: Callable[[Any, Options], Any]
    reason: str
    when: Callable[[str, Graph, Options], bool] = lambda name, graph, options: True


def parallel(name: str, graph: Graph, options: Options) -> bool:
    return options.ranks != 1


def tapped(name: str, graph: Graph, options: Options) -> bool:
    return bool(options.taps)


def fused(name: str, graph: Graph, options: Options) -> bool:
    return name in options.fusions_of(graph.phase)


# fmt: off
MODEL_PASSES = (
    Pass("dtype",    lambda g, o: with_dtype(g, o.dtype or g.dtype), "weights in the dtype asked for"),
    Pass("policy",   lambda g, o: apply_dtypes(g),                   "casts around nodes with another dtype"),
    Pass("types",    lambda g, o: infer_types(g),                    "every edge gets shape and dtype"),
    Pass("shard",    lambda g, o: split_over_ranks(g, o.ranks),      "sharding of every edge; collectives", parallel),
)
PHASE_PASSES = (  # for prefill, then for decode
    Pass("swiglu",   lambda g, o: fuse_swiglu(g, o.target.chip),     "split, silu, mul in one operation", fused),
    Pass("add_norm", lambda g, o: fuse_add_norm(g),                  "residual add and norm in one operation", fused),
    Pass("linear_all_reduce", lambda g, o: fuse_linear_all_reduce(g, o.target.chip, o.fused_backend),
                                                                     "product and sum over ranks in one", fused),
    Pass("tap",      lambda g, o: tap(g, o.taps),                    "values of the inside that leave it", tapped),
    Pass("lower",    lambda g, o: lower(g, o.attention, o.backend or "", o.target), "operators become ATB operations"),
    Pass("segment",  lambda g, o: segment(g, o.layers_per_segment),  "graphs that fit libatb's limits"),
)
# fmt: on
PASS_NAMES = ("build", *(p.name for p in MODEL_PASSES), "phase", *(p.name for p in PHASE_PASSES))


def compile_model(path: str, options: Options, *, until: str = "", every_layer: bool = True) -> Compiled:
    """Read, build and run the passes (up to and including `until`). Raises UserError with all problems of a stage.

    Without `every_layer` equal layers are compiled once: enough for what is written and said in summary, at a fraction
    of the time; the graphs then hold the layers that differ (`Graph.repeats`)."""
    if until and until not in PASS_NAMES:
        raise UserError(f"unknown pass {until!r}", hint=f"one of {', '.join(PASS_NAMES)}")
    every_layer = every_layer or bool(options.taps)  # layers that are tapped differ from those that are not
    model = load_model(path, options.allow_extends, every_layer=every_layer)
    try:
        return _run(model, check_options(model, options), until)
    except DiagnosticError as error:
        raise DiagnosticError(error.diagnostics, model.sources) from None
    except NotPeriodic:
        return compile_model(path, options, until=until)


def _run(model: Model, options: Options, until: str) -> Compiled:
    target = options.target
    graph = model.graph
    verify(graph, target.chip)
    done = until == "build"
    for step in MODEL_PASSES:
        if done:
            break
        if step.when(step.name, graph, options):
            graph = step.run(graph, options)
            verify(graph, target.chip)
        done = step.name == until
    check_taps(graph, options.taps)
    phases: dict[str, Any] = {"model": graph} if done else {}
    taps: dict[str, Graph] = {}
    lowered: dict[str, AtbGraph] = {}
    for phase in () if done else PHASES:
        result: Any = split_phase(graph, phase, options.logits)
        verify(result, target.chip)
        for step in PHASE_PASSES if until != "phase" else ():
            if step.when(step.name, result, options):
                result = step.run(result, options)
                verify(result, target.chip)
            if step.name == "tap" and options.taps:
                taps[phase] = result
            if isinstance(result, AtbGraph):
                lowered[phase] = result
            if step.name == until:
                break
        phases[phase] = result
    compiled = Compiled(
        model=model,
        options=options,
        device=target,
        dtype=graph.dtype,
        graph=graph,
        phases=phases,
        tapped=taps,
        lowered=lowered,
        segments=phases if until in ("", "segment") else {},
    )
    return replace(compiled, memory=memory_plan(compiled)) if compiled.segments else compiled
