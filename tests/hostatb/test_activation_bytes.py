"""The bytes of a step that the memory plan says, against the tensors that hostatb holds while it runs one.

After every kernel of a planned graph, the memory behind the values that the graph holds is added up (values that look
at one storage count once), and around every segment the memory behind what the executor keeps. Kernels' own scratch is
not looked at: the plan does not count it either.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmc.compiler import artifact
from llmc.compiler.atb.core import GRAPH_LIMITS
from llmc.compiler.compiled import Compiled
from llmc.compiler.memory import evaluate, form_of, largest, step_forms, workspace
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.runner import make_caches, make_constants
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.executor import Executor
from llmc.runtime.hostatb import graph as graphs
from llmc.runtime.hostatb.operation import Operation
from llmc.runtime.hostatb.step import Step

MODEL = """
extends: families/llama
name: small
sizes: {hidden: 64, ffn: 80, layers: 4, heads: 4, kv_heads: 2, vocab: 50, max_positions: 64}
"""
PROMPTS = [[1] * 9, [2] * 13, [3] * 4]
SYMBOLS = {"T": 26, "B": 3, "M": 1}
Segment = tuple[str, int]  # phase, number


class Meter:
    """Largest bytes seen in each segment: of values within its graph, and of what the executor keeps around it."""

    def __init__(self) -> None:
        self.within: dict[Segment, int] = defaultdict(int)
        self.around: dict[Segment, int] = defaultdict(int)
        self.segments: dict[int, Segment] = {}
        self.now: Segment | None = None

    def watch(self, executor: Executor, patch: pytest.MonkeyPatch) -> None:
        for phase, parts in executor.phases.items():
            self.segments |= {id(operation): (phase, i) for i, (operation, *_) in enumerate(parts)}
        forward, plain_line = Operation.forward, graphs.straight_line
        fixed = storages(executor.tensors.values())

        def watched_forward(operation: Operation, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            self.now = self.segments[id(operation)]
            outputs = forward(operation, tensors)
            kept = storages([*sys._getframe(1).f_locals["live"].values(), *outputs])
            held = sum(size for where, size in kept.items() if where not in fixed)
            self.around[self.now] = max(self.around[self.now], held)
            return outputs

        def watched_line(steps: Sequence[Step], *, inputs: int, outputs: int, **more: Any) -> Any:
            watched = [replace(step, code=None, run=self.after(step, inputs + outputs)) for step in steps]
            return plain_line(watched, inputs=inputs, outputs=outputs, **more)

        patch.setattr(Operation, "forward", watched_forward)
        patch.setattr(graphs, "straight_line", watched_line)

    def after(self, step: Step, first: int) -> Any:
        """The kernel, and then a look at the slots from `first` on: the graph's internals."""

        def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            made = step.run(tensors)
            slots = {name: t for name, t in sys._getframe(1).f_locals.items() if name[1:].isdigit() and name[0] == "s"}
            held = [t for name, t in slots.items() if int(name[1:]) >= first]
            new = [t for slot, t in zip(step.outputs, made, strict=True) if slot >= first]
            assert self.now is not None
            self.within[self.now] = max(self.within[self.now], sum(storages([*held, *new]).values()))
            return made

        return run


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Where the memory behind them lies -> bytes."""
    found = [t.untyped_storage() for t in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def measure(
    options: Options, tmp_path: Any, patch: pytest.MonkeyPatch, *, rewrites: bool = False
) -> tuple[Compiled, Meter]:
    """One prefill and one decode step of three sequences."""
    (tmp_path / "small.yaml").write_text(MODEL)
    compiled = compile_model(str(tmp_path / "small.yaml"), options)
    artifact.write(compiled, tmp_path / "out")
    built = artifact.read(tmp_path / "out")
    torch.manual_seed(0)
    weights = {
        n: torch.randn(w["shape"], dtype=getattr(torch, w["dtype"])) / 8 for n, w in built.manifest["weights"].items()
    }
    caches = make_caches(built.manifest, {"N": 3, "B": 3, "S": 64})
    executor = Executor(built, hostatb, weights=weights, constants=make_constants(built.manifest, 64), caches=caches)
    meter = Meter()
    meter.watch(executor, patch)
    if not rewrites:
        patch.setattr(graphs, "rewrite", lambda steps: steps)
    engine = Engine(built.manifest, executor, None, caches=caches, max_batch=3, max_prefill_tokens=64)
    engine.generate(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True))
    return compiled, meter


def planned_workspace(compiled: Compiled, segment: Segment) -> int:
    phase, number = segment
    part = compiled.segments[phase][number]
    return max(evaluate(form, SYMBOLS) for form in workspace(part.short, part.places))


def replaced_at_most(compiled: Compiled, segment: Segment) -> int:
    """Bytes that one node makes."""
    phase, number = segment
    graph = compiled.segments[phase][number].graph
    sizes = [
        sum(evaluate(form_of(graph.tensors[n].dtype, graph.tensors[n].shape), SYMBOLS) for n in node.outs)
        for node in graph.nodes
        if node.op != "ReshapeAndCache"
    ]
    return max(sizes)


LOOSE = {"device": "host", "dtype": "float32"}


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize("fusions", [None, ()], ids=["fused", "plain"])
@pytest.mark.parametrize("layers", [1, 0])
def test_where_no_name_is_used_twice_the_plan_is_what_is_held(attention, fusions, layers, tmp_path, monkeypatch):
    """A layer a segment, and all four in one: each value has a name of its own, which libatb and hostatb free after its
    last use."""
    options = Options(**LOOSE, attention=attention, fusions=fusions, layers_per_segment=layers)
    compiled, meter = measure(options, tmp_path, monkeypatch)
    assert len(meter.within) == (8 if layers else 2), "four layers in two phases"
    assert dict(meter.within) == {segment: planned_workspace(compiled, segment) for segment in meter.within}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rewrites", [False, True], ids=["kernels", "rewritten"])
def test_where_values_share_names_at_most_one_value_more_is_held_than_planned(dtype, rewrites, tmp_path, monkeypatch):
    """libatb writes a value over another one of its name; hostatb makes the new one, then drops the old, or drops it
    earlier where nothing reads it again. A rewrite may do with less: the parts of a split product stay views of it."""
    monkeypatch.setitem(GRAPH_LIMITS, "internals", 40)  # fewer names than the four layers have values
    compiled, meter = measure(Options(device="host", dtype=dtype), tmp_path, monkeypatch, rewrites=rewrites)
    assert set(meter.within) == {("prefill", 0), ("decode", 0)}
    for segment, held in meter.within.items():
        part = compiled.segments[segment[0]][segment[1]]
        assert len(set(part.places.values())) < len(part.places), "names are shared"
        planned = planned_workspace(compiled, segment)
        assert held <= planned + replaced_at_most(compiled, segment)


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_what_segments_hand_over_is_what_the_executor_keeps(attention, layers, tmp_path, monkeypatch):
    """Inputs of the step that lie on the host are not counted by the plan; here all memory is the host's."""
    options = Options(**LOOSE, attention=attention, layers_per_segment=layers)
    compiled, meter = measure(options, tmp_path, monkeypatch)
    for phase, parts in compiled.segments.items():
        low = compiled.lowered[phase]
        hosts = [low.tensors[n] for n in low.inputs if low.tensors[n].role == "input" and low.tensors[n].host]
        beside = sum(evaluate(form_of(t.dtype, t.shape), SYMBOLS) for t in hosts)
        kept = [size for (name, _), size in meter.around.items() if name == phase]
        assert max(kept) == max(evaluate(form, SYMBOLS) for form in step_forms(parts)["tensors"]) + beside


def test_the_largest_forms_are_those_of_the_nodes(tmp_path, monkeypatch):
    compiled, _ = measure(Options(**LOOSE, layers_per_segment=2), tmp_path, monkeypatch)
    for parts in compiled.segments.values():
        every = [form for part in parts for form in workspace(part.short, part.places)]
        for tokens, batch in ((1, 1), (26, 3), (5, 5)):
            symbols = {"T": tokens, "B": batch, "M": 1}
            assert max(evaluate(f, symbols) for f in largest(every)) == max(evaluate(f, symbols) for f in every)
