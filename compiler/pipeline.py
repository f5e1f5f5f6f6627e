"""The compiler's table of contents: the passes in order, each with its reason.

    compiled = compile_model("graphs/llama2-13b.yaml", Options(device="atlas-800i-a2"))
    compiled.segments["prefill"][0].graph.nodes

`verify` runs after every pass. `--until PASS --print` of the command line stops after a pass and shows the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmc.compiler.diagnostics import Diagnostic, DiagnosticError, UserError
from llmc.compiler.ir import AtbGraph, Graph
from llmc.compiler.language.build import Model, load_model
from llmc.compiler.memory import memory_plan
from llmc.compiler.passes.fuse import fuse_add_norm, fuse_linear_all_reduce, fuse_swiglu
from llmc.compiler.passes.lower import lower
from llmc.compiler.passes.phase import PHASES, split_phase
from llmc.compiler.passes.segment import Segment, segment
from llmc.compiler.passes.shard import possible_sizes, shard
from llmc.compiler.passes.types import apply_dtypes, in_layers, infer_types, is_named, with_dtype
from llmc.compiler.target import legality
from llmc.compiler.target.device import Device, device
from llmc.compiler.verify import verify_atb, verify_graph, verify_segments


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose; None means: what the model or the device says."""

    device: str = "atlas-800i-a2"
    dtype: str | None = None
    attention: str = "paged"
    world_size: int | None = None  # None: the smallest that the model's `support:` offers on the device, else 1
    backend: str | None = None  # of collectives
    fusions: tuple[str, ...] | None = None
    layers_per_segment: int = 0
    allow_unsupported: bool = False  # compile also what `support:` does not offer


def always(name: str, graph: Graph, options: Options) -> bool:
    return True


def parallel(name: str, graph: Graph, options: Options) -> bool:
    return options.world_size != 1


def fused(name: str, graph: Graph, options: Options) -> bool:
    """Fusions are chosen by the user, else by the device for this phase."""
    chosen = options.fusions if options.fusions is not None else device(options.device).fusions[graph.phase]
    return name in chosen


def split_over_ranks(graph: Graph, options: Options) -> Graph:
    """The pass, and on refusal also the world sizes at which it would not refuse."""
    world_size = options.world_size or 1
    try:
        return shard(graph, world_size)
    except DiagnosticError as error:
        sizes = ", ".join(map(str, possible_sizes(graph)))
        closing = Diagnostic(
            code="E303", message=f"{graph.name} cannot be split over {world_size} ranks", needed=f"world size {sizes}"
        )
        raise DiagnosticError([*error.diagnostics, closing]) from None


def lower_for(graph: Graph, options: Options) -> AtbGraph:
    return lower(graph, options.attention, options.backend or "", device(options.device))


def chip_of(options: Options) -> str:
    return device(options.device).chip


def fuse_collective(graph: Graph, options: Options) -> Graph:
    fused_backend = device(options.device).backends.get(options.backend or "", "")
    return fuse_linear_all_reduce(graph, chip_of(options), fused_backend)


@dataclass(frozen=True)
class Pass:
    """One step: `run(graph, options)` gives the next graph; `when(name, graph, options)`: whether it runs at all."""

    name: str
    run: Callable[[Any, Options], Any]
    reason: str
    when: Callable[[str, Graph, Options], bool] = always


# fmt: off
MODEL_PASSES = (
    Pass("dtype",    lambda g, o: with_dtype(g, o.dtype or g.dtype), "weights in the dtype asked for"),
    Pass("policy",   lambda g, o: apply_dtypes(g),                   "casts around nodes with another dtype"),
    Pass("types",    lambda g, o: infer_types(g),                    "every edge gets shape and dtype"),
    Pass("shard",    split_over_ranks,                               "sharding of every edge; collectives", parallel),
)
PHASE_PASSES = (  # for prefill, then for decode
    Pass("swiglu",   lambda g, o: fuse_swiglu(g, chip_of(o)),        "split, silu, mul in one operation", fused),
    Pass("add_norm", lambda g, o: fuse_add_norm(g),                  "residual add and norm in one operation", fused),
    Pass("linear_all_reduce", fuse_collective,                       "product and sum over ranks in one", fused),
    Pass("lower",    lower_for,                                      "operators become ATB operations"),
    Pass("segment",  lambda g, o: segment(g, o.layers_per_segment),  "graphs that fit libatb's limits"),
)
# fmt: on
PASS_NAMES = ("build", *(p.name for p in MODEL_PASSES), "phase", *(p.name for p in PHASE_PASSES))


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compiling gives: per phase the flat ATB graph and its segments (with --until, whatever existed by then)."""

    model: Model
    options: Options
    device: Device
    dtype: str
    graph: Graph
    phases: Mapping[str, Any]  # phase -> result of the last pass that ran
    lowered: Mapping[str, AtbGraph] = field(default_factory=dict)
    segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)

    @cached_property
    def memory(self) -> dict[str, Any]:
        """What one rank holds: `memory_plan`."""
        return memory_plan(self)


def compile_model(path: str, options: Options, *, until: str = "") -> Compiled:
    """Read, build and run the passes (up to and including `until`). Raises UserError with all problems of a stage."""
    if until and until not in PASS_NAMES:
        raise UserError(f"unknown pass {until!r}", hint=f"one of {', '.join(PASS_NAMES)}")
    model = load_model(path)
    try:
        return _run(model, check_options(model, options), until)
    except DiagnosticError as error:
        raise DiagnosticError(error.diagnostics, model.sources) from None


def _run(model: Model, options: Options, until: str) -> Compiled:
    target = device(options.device)
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
    phases: dict[str, Any] = {"model": graph} if done else {}
    lowered: dict[str, AtbGraph] = {}
    for phase in () if done else PHASES:
        result: Any = split_phase(graph, phase)
        verify(result, target.chip)
        for step in PHASE_PASSES if until != "phase" else ():
            if step.when(step.name, result, options):
                result = step.run(result, options)
                verify(result, target.chip)
            if isinstance(result, AtbGraph):
                lowered[phase] = result
            if step.name == until:
                break
        phases[phase] = result
    return Compiled(
        model=model,
        options=options,
        device=target,
        dtype=graph.dtype,
        graph=graph,
        phases=phases,
        lowered=lowered,
        segments=phases if until in ("", "segment") else {},
    )


def verify(result: Any, chip: str) -> None:
    """The checks for whatever kind of graph a pass gave."""
    if isinstance(result, Graph):
        verify_graph(result)
    elif isinstance(result, AtbGraph):
        verify_atb(result, chip)
    else:
        verify_segments(result, chip)


def check_options(model: Model, options: Options) -> Options:
    """The options with everything decided. UserError names what would be accepted: what no chip can do, and, unless
    unsupported choices are allowed, what the model's `support:` does not offer."""
    target = device(options.device)
    offer = model.support.get(options.device, {})
    dtype = options.dtype or model.graph.dtype
    world_size = min(offer.get("tp", (1,))) if options.world_size is None else options.world_size
    backend = options.backend or next(iter(target.backends))
    choice: dict[str, Any] = {"dtype": dtype, "attention": options.attention, "world_size": world_size}
    if options.backend or world_size > 1:
        choice["backend"] = backend
    legality.check(target, {**choice, "fusion": options.fusions or ()})
    check_policy(model.graph, target, dtype)
    if options.layers_per_segment < 0:
        raise UserError(f"layers-per-segment {options.layers_per_segment}: expected 0 (as many as fit) or more")
    decided = replace(options, world_size=world_size, backend=backend if world_size > 1 else "")
    if not options.allow_unsupported:
        check_support(model, decided, dtype)
    return decided


def check_policy(graph: Graph, target: Device, dtype: str) -> None:
    """The dtypes of `policy:`, each told at the first node that a rule gives it."""
    told: set[str] = set()
    for rule in graph.policy:
        own = rule["dtype"]
        named = (node for node in graph.nodes if is_named(rule, node.name) and in_layers(rule, node.name))
        if own != dtype and own not in told and (node := next(named, None)):
            told.add(own)
            legality.check(target, {"policy": own, "dtype": dtype}, node.place)


def check_support(model: Model, options: Options, dtype: str) -> None:
    """What `support:` says of this device. The host, and a model without `support:`, take everything."""
    if options.device == "host" or not model.support:
        return
    offer = model.support.get(options.device)
    way_out = f"--allow-unsupported, or extend `support:` in {model.files[0]}"
    if offer is None:
        raise UserError(
            f"{model.name} is not offered on {options.device}, but on {', '.join(model.support)}",
            hint=way_out,
            code="E401",
        )
    chosen = (("tp", "world size", options.world_size), ("dtypes", "dtype", dtype),
              ("attention", "attention", options.attention))  # fmt: skip
    problems = [
        f"{what} {value} (offered: {', '.join(map(str, offer[key]))})"
        for key, what, value in chosen
        if key in offer and value not in offer[key]
    ]
    if problems:
        raise UserError(
            f"{model.name} is not offered on {options.device} with {', '.join(problems)}", hint=way_out, code="E401"
        )
