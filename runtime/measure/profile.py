"""`llmc bench --profile`: where the time of a step goes, beside what its bytes and FLOPs allow.

    seen = on_host(engine, compiled, case, prompts, runs=3)
    facts = [phase_facts(compiled, seen, phase, case, roof) for phase in ("prefill", "decode")]

On hosts hostatb looks at the clock behind each of its steps: what runs is what is timed, with all rewrites. Every
second step of the engine is watched, and the others say what watching costs. A step may be several operations that a
rewrite has joined; they have one time. On NPUs torch_npu's profiler gives kernels, which the order maps to operations.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import torch

from llmc.compiler.artifact import Artifact, make_manifest
from llmc.compiler.atb.kernels import KERNELS
from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import UserError, portable
from llmc.compiler.ir import LAYER, AtbGraph, AtbNode
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports.explain import operations_by_node
from llmc.compiler.reports.roofline import Cost, cost_of, seconds_by_bound
from llmc.compiler.target.device import Board, Link
from llmc.compiler.terminal import table
from llmc.runtime import npu
from llmc.runtime.engine.engine import Engine, Step
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.host_memory import free_memory
from llmc.runtime.hostatb.watch import Lap, watching

TRACED_STEPS = 8  # decode steps in a file of trace events: enough to look at, few enough to open
TOLD = ("operations", "nodes", "places", "bytes", "flops", "best_us")  # of an operation in such a file
PHASES = ("prefill", "decode")
SCALES = 0.3  # of what more threads could save; below it a kind does not scale
BUFFER_BYTES = 512 << 20  # no cache holds it


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Operations that have one time. `start` in ns of one clock."""

    names: tuple[str, ...]
    start: int
    ns: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A step of the engine. `ran`: ns from the first operation's beginning to the last one's end, with what lies
    between; 0 and no pieces where nobody watched."""

    phase: str
    tokens: int  # that go in
    sequences: int
    ns: int  # of all of it, sampling included
    ran: int = 0
    pieces: Sequence[Piece] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The steps of one case, and how their times were taken."""

    steps: Sequence[Seen]
    method: str
    clock_ns: float = 0.0  # of a look at the clock
    mapped: Mapping[str, int] = field(default_factory=dict)  # of an NPU's kernels: how many fit their operation


# ---- which operation is which


def graphs_of(args: argparse.Namespace, artifact: Artifact) -> Compiled:
    """The graphs behind the artifact's code, whose nodes have places, shapes and costs. UserError where they cannot be
    found again: an artifact keeps its code, not the YAML that it was made of."""
    said = artifact.manifest
    options = Options(
        device=said["device"],
        dtype=said["dtype"],
        attention=said["attention"],
        world_size=said["world_size"],
        backend=said["backend"] or None,
        logits=said["logits"],
        allow_unsupported=True,
        allow_extends=tuple(args.allow_extends or ()),
    )
    for graph in dict.fromkeys(filter(None, (args.graph, said["source"]["files"][0], said["model"]))):
        try:
            compiled = compile_model(graph, options)
        except UserError:
            continue
        if make_manifest(compiled)["phases"] == said["phases"]:
            return compiled
    raise UserError(
        f"--profile needs the graph of {said['model']}, and no YAML here gives the code of {artifact.path}",
        hint="run it from --graph FILE, without --artifact",
    )


def names_of(compiled: Compiled, artifact: Artifact) -> dict[str, list[str]]:
    """Name of a segment's ATB graph -> its operations, in order."""
    return {
        entry["name"]: [node.name for node in part.graph.nodes]
        for phase, parts in compiled.segments.items()
        for entry, part in zip(artifact.manifest["phases"][phase]["segments"], parts, strict=True)
    }


# ---- hosts


class Watched:
    """An executor of which some steps are watched."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.now = executor, False
        self.laps: list[Lap] = []
        self.ran = 0

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not self.now:
            self.laps, self.ran = [], 0
            logits: torch.Tensor = self.executor.run(phase, inputs)
            return logits
        with watching() as laps:
            start = perf_counter_ns()
            logits = self.executor.run(phase, inputs)
            self.ran = perf_counter_ns() - start
        self.laps = laps
        return logits


def on_host(
    engine: Engine,
    names: Mapping[str, Sequence[str]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    runs: int,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Profile:
    """`runs` pairs of runs behind one pair that is not counted; of each pair every step is watched once."""
    watch = Watched(engine.runner.executor)
    steps: list[Seen] = []
    counted = False

    def seen(step: Step) -> None:
        if counted:
            steps.append(
                Seen(
                    phase=step.phase,
                    tokens=step.tokens_in,
                    sequences=step.tokens_out,
                    ns=round(step.seconds * 1e9),
                    ran=watch.ran,
                    pieces=tuple(piece for lap in watch.laps for piece in pieces_of(lap, names)),
                )
            )
        watch.now = not watch.now
        on_step(step)

    engine.runner.executor = watch
    try:
        for number in range(2 * (runs + 1)):
            watch.now, counted = bool(number % 2), number >= 2
            engine.generate(prompts, params, on_step=seen)
    finally:
        engine.runner.executor = watch.executor
    return Profile(steps=steps, method="the clock behind each step of hostatb", clock_ns=look_ns())


def pieces_of(lap: Lap, names: Mapping[str, Sequence[str]]) -> Iterator[Piece]:
    operations = names.get(lap.graph)
    if operations is None:  # a graph inside a graph: its steps are in the time of the outer one's
        return
    for step, start, end in zip(lap.steps, lap.times, lap.times[1:], strict=False):
        yield Piece(names=tuple(operations[node] for node in step.nodes), start=start, ns=end - start)


def look_ns(count: int = 20_000) -> float:
    """What a look at the clock costs, the list included."""
    times: list[int] = []
    start = perf_counter_ns()
    for _ in range(count):
        times.append(perf_counter_ns())
    return (perf_counter_ns() - start) / count


def host_roof(dtype: str) -> Board:
    """This machine's, with the threads it has: bytes/s of a sum over memory that no cache holds, FLOP/s of a product of
    1024 x 1024, the faster of the dtype and float32. About a second."""
    free = free_memory()
    size = BUFFER_BYTES if free is None or free > 4 * BUFFER_BYTES else BUFFER_BYTES // 8
    numbers = torch.ones(size // 4)
    side, speeds = 1024, []
    for one in {getattr(torch, dtype), torch.float32}:
        a = torch.ones(side, side, dtype=one)
        speeds.append(2 * side**3 / _fastest(lambda a=a: a @ a))  # type: ignore[misc]
    return Board(memory=0, flops=max(speeds), bandwidth=size / _fastest(numbers.sum))


def _fastest(run: Callable[[], object], tries: int = 5) -> float:
    taken = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


# ---- NPUs


def on_npu(
    engine: Engine,
    compiled: Compiled,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Profile:
    """One run behind one that is not counted, inside torch_npu's profiler, which says when each kernel ran."""
    engine.generate(prompts, params, on_step=on_step)
    steps: list[Step] = []
    with tempfile.TemporaryDirectory(prefix="llmc-profile-") as folder:
        with npu.profiled(Path(folder), params.max_tokens + len(prompts)) as ends:

            def seen(step: Step) -> None:
                steps.append(step)
                ends()
                on_step(step)

            engine.generate(prompts, params, on_step=seen)
        kernels = read_kernels(Path(folder))
    return npu_profile(compiled, steps, kernels)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of kernel_details.csv. `step`: as the profiler counts them; None where it does not say."""

    step: int | None
    name: str
    start: int
    ns: int


def read_kernels(folder: Path) -> list[Kernel]:
    """In the order in which they ran (hiascend.com, Ascend PyTorch Profiler: kernel_details.csv)."""
    files = sorted(folder.glob("**/ASCEND_PROFILER_OUTPUT/kernel_details.csv"))
    if not files:
        raise UserError(
            "torch_npu's profiler wrote no kernel_details.csv", hint="the CANN toolkit's profiling tools are needed"
        )
    found = []
    with files[0].open(newline="", encoding="utf-8-sig") as text:
        for row in csv.DictReader(text):
            try:
                start, took = (round(float(row[key].strip()) * 1e3) for key in ("Start Time(us)", "Duration(us)"))
                step = (row.get("Step Id") or "").strip()
                found.append(Kernel(step=int(step) if step else None, name=row["Name"].strip(), start=start, ns=took))
            except (KeyError, ValueError, AttributeError):
                raise UserError(
                    f"kernel_details.csv of torch_npu's profiler has a row that is not understood: {str(row)[:200]}"
                ) from None
    return sorted(found, key=lambda kernel: kernel.start)


def npu_profile(compiled: Compiled, steps: Sequence[Step], kernels: Sequence[Kernel]) -> Profile:
    """Kernels go to operations by order: step by step where the profiler counts steps, else one after the other."""
    numbers = sorted({kernel.step for kernel in kernels if kernel.step is not None})
    wanted = [[(i, node) for node in compiled.lowered[step.phase].nodes] for i, step in enumerate(steps)]
    if len(numbers) == len(steps):
        groups = [
            ([k for k in kernels if k.step == number], nodes) for number, nodes in zip(numbers, wanted, strict=True)
        ]
    else:
        groups = [(list(kernels), [pair for nodes in wanted for pair in nodes])]
    pieces: dict[int, list[Piece]] = {}
    fits = Counter[str]()
    for some, nodes in groups:
        for kernel, owner in zip(some, aligned([k.name for k in some], [node.op for _, node in nodes]), strict=True):
            fits["kernels"] += 1
            if owner is None:
                continue
            fits["fit"] += 1
            i, node = nodes[owner]
            pieces.setdefault(i, []).append(Piece(names=(node.name,), start=kernel.start, ns=kernel.ns))
    fits["operations"] = sum(map(len, wanted))
    fits["with_kernels"] = sum(len({piece.names for piece in found}) for found in pieces.values())
    return Profile(
        steps=[
            Seen(
                phase=step.phase,
                tokens=step.tokens_in,
                sequences=step.tokens_out,
                ns=round(step.seconds * 1e9),
                ran=_span(pieces.get(i, [])),
                pieces=tuple(_joined(pieces.get(i, []))),
            )
            for i, step in enumerate(steps)
        ],
        method="torch_npu's profiler; kernels are given to operations by their order and kind",
        mapped=dict(fits),
    )


def _span(pieces: Sequence[Piece]) -> int:
    return max(p.start + p.ns for p in pieces) - min(p.start for p in pieces) if pieces else 0


def _joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Kernels of one operation as one piece, whose time is theirs together."""
    for names, group in groupby(pieces, key=lambda piece: piece.names):
        found = list(group)
        yield Piece(names=names, start=found[0].start, ns=sum(piece.ns for piece in found))


def aligned(kernels: Sequence[str], operations: Sequence[str]) -> list[int | None]:
    """Of each kernel the operation it belongs to: both lists in their order, every operation with one kernel or more.
    None for one that fits neither the operation that has come nor one of the next few (sampling, copies)."""
    given: list[int | None] = []
    at = -1
    for name in kernels:
        ahead = range(at + 1, min(at + 4, len(operations)))
        following = next((i for i in ahead if _fits(name, operations[i])), None)
        if following == at + 1 or (following is not None and not (at >= 0 and _fits(name, operations[at]))):
            at = following
        given.append(at if at >= 0 and _fits(name, operations[at]) else None)
    return given


def _fits(kernel: str, operation: str) -> bool:
    return operation in KERNELS and bool(KERNELS[operation].search(kernel))


# ---- facts


def phase_facts(
    compiled: Compiled,
    profile: Profile,
    phase: str,
    lengths: tuple[int, int],
    roof: tuple[Board | None, Link | None],
) -> dict[str, Any] | None:
    """One phase as plain data; None where no step of it was watched. `lengths`: prompt and answer of a sequence. Bytes
    and FLOPs are the operations' own (compiler/reports/roofline.py), of a decode step at half of the answer. A joined
    step has those of all its operations, although values between them stay in registers or caches."""
    mine = [step for step in profile.steps if step.phase == phase]
    if not any(step.pieces for step in mine):
        return None
    most = max(step.tokens for step in mine)  # a last prefill step may have fewer prompts
    mine = [step for step in mine if step.tokens == most]
    watched, others = [step for step in mine if step.pieces], [step for step in mine if not step.pieces]
    batch, (prompt, answer) = watched[0].sequences, lengths
    length = prompt if phase == "prefill" else prompt + answer // 2
    graph = compiled.lowered[phase]
    nodes = {node.name: node for node in graph.nodes}
    owners = operators_of(compiled, phase)
    times: dict[tuple[str, ...], list[int]] = {}
    for step in watched:
        for piece in step.pieces:
            times.setdefault(piece.names, []).append(piece.ns)
    operations = [
        operation_facts(graph, [nodes[name] for name in names], taken, owners, (batch, length), compiled, roof)
        for names, taken in times.items()
    ]
    done = [sum(piece.ns for piece in step.pieces) for step in watched]
    looks = len(watched[0].pieces) if profile.clock_ns else 0
    usual = sorted(step.ns for step in (others or watched))
    step_ns = median(usual)
    return {
        "phase": phase,
        "prompt": prompt,
        "answer": answer,
        "batch": batch,
        "tokens": most,
        "method": profile.method,
        **({"mapped": dict(profile.mapped)} if profile.mapped else {}),
        "steps": len(watched),
        "step_ms": step_ns / 1e6,
        "fastest_step_ms": usual[0] / 1e6,
        "watched_step_ms": median(step.ns for step in watched) / 1e6,
        "clock": {"looks": looks, "ns": profile.clock_ns, "share": looks * profile.clock_ns / step_ns},
        "operations_ms": median(done) / 1e6,
        "between_ms": median(step.ran - sum_ns for step, sum_ns in zip(watched, done, strict=True)) / 1e6,
        "around_ms": median(step.ns - step.ran for step in watched) / 1e6,
        "kinds": kinds_of(operations, median(done) / 1e6),
        "operations": operations,
    }


def operators_of(compiled: Compiled, phase: str) -> dict[str, list[str]]:
    """ATB operation -> the operators of the model that it computes."""
    found: dict[str, list[str]] = {}
    for node, operations in operations_by_node(compiled, phase).items():
        for name in operations:
            found.setdefault(name, []).append(node)
    return found


def operation_facts(
    graph: AtbGraph,
    nodes: Sequence[AtbNode],
    taken: Sequence[int],
    owners: Mapping[str, Sequence[str]],
    sizes: tuple[int, int],
    compiled: Compiled,
    roof: tuple[Board | None, Link | None],
) -> dict[str, Any]:
    batch, length = sizes
    ranks = compiled.options.world_size or 1
    costs = [cost_of(graph, node, ranks, batch, length) for node in nodes]
    ordered = sorted(taken)
    places = [portable(str(node.place)) for node in nodes if node.place]
    return {
        "operations": [node.name for node in nodes],
        "kind": " + ".join(node.op for node in nodes),
        "nodes": list(dict.fromkeys(owner for node in nodes for owner in owners.get(node.name, ()))),
        "places": list(dict.fromkeys(places)),
        "us": {
            "min": ordered[0] / 1e3,
            "median": median(ordered) / 1e3,
            "p10": ordered[len(ordered) // 10] / 1e3,
            "p90": ordered[-1 - len(ordered) // 10] / 1e3,
        },
        "flops": sum(cost.flops for cost in costs),
        "bytes": sum(cost.memory for cost in costs),
        "wire_bytes": sum(cost.wire for cost in costs),
        "best_us": best_us(costs, roof, ranks),
    }


def best_us(costs: Sequence[Cost], roof: tuple[Board | None, Link | None], ranks: int) -> float | None:
    """The roofline of `llmc plan`, one operation after the other."""
    board, link = roof
    return None if board is None else sum(seconds_by_bound(costs, board, link, ranks).values()) * 1e6


def kinds_of(operations: Sequence[Mapping[str, Any]], total_ms: float) -> list[dict[str, Any]]:
    """By kind, the longest first. Times are sums of medians, and shares are of the operations' time."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in operations:
        found.setdefault(one["kind"], []).append(one)
    rows = [{"kind": kind, **sums(group, total_ms)} for kind, group in found.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def sums(group: Sequence[Mapping[str, Any]], total_ms: float) -> dict[str, Any]:
    ms = sum(one["us"]["median"] for one in group) / 1e3
    moved, flops = sum(one["bytes"] for one in group), sum(one["flops"] for one in group)
    best = None if group[0]["best_us"] is None else sum(one["best_us"] for one in group) / 1e3
    return {
        "count": len(group),
        "ms": ms,
        "fastest_ms": sum(one["us"]["min"] for one in group) / 1e3,
        "share": ms / total_ms if total_ms else 0.0,
        "bytes": moved,
        "flops": flops,
        "bytes_per_s": moved / ms * 1e3 if ms else 0.0,
        "flops_per_s": flops / ms * 1e3 if ms else 0.0,
        "best_ms": best,
    }


# ---- as text


def show_profile(facts: Mapping[str, Any], top: int) -> Iterator[str]:
    """A line on the step, its kinds, and the nodes that take longest, those of all layers together."""
    step, clock = facts["step_ms"], facts["clock"]
    threads = f", {facts['threads']} thread{'s' * (facts['threads'] > 1)}" if facts.get("threads") else ""
    yield ""
    yield (
        f"{facts['phase']}, batch {facts['batch']}, prompt {facts['prompt']}, answer {facts['answer']}{threads}: "
        f"a step takes {ms(step)} ms; operations {ms(facts['operations_ms'])} ms "
        f"({facts['operations_ms'] / facts['watched_step_ms']:.0%} of a watched one), between them "
        f"{ms(facts['between_ms'])} ms, inputs and sampling "
        f"{ms(facts['around_ms'])} ms (medians of {facts['steps']} steps)"
    )
    if clock["looks"]:
        yield (
            f"watched it takes {ms(facts['watched_step_ms'])} ms; {clock['looks']} looks at the clock of "
            f"{clock['ns']:.0f} ns are {clock['share']:.2%}"
        )
    if mapped := facts.get("mapped"):
        yield (
            f"{mapped['fit']} of {mapped['kernels']} kernels fit an operation, and {mapped['with_kernels']} of "
            f"{mapped['operations']} operations have kernels; the profiler names kernels, and only their order says "
            "which operation they belong to"
        )
    yield ""
    heads = ["kind of operation", "count", "ms", "%", "GB/s", "GFLOP/s", "best ms", "x best"]
    yield from table(heads, [[row["kind"], *_cells(row)] for row in facts["kinds"]], left=1)
    yield ""
    rows = folded_nodes(facts)
    shown, rest = rows[:top], rows[top:]
    cells = [[row["name"], *(_cells(row)[i] for i in (0, 1, 2, -1)), row["place"]] for row in shown]
    yield from table(["operation", "count", "ms", "%", "x best", "place"], cells, left=1)
    if rest:
        left = sum(row["ms"] for row in rest)
        yield f"the other {len(rest)}: {ms(left)} ms ({left / facts['operations_ms']:.1%})"


def _cells(row: Mapping[str, Any]) -> list[str]:
    best = row["best_ms"]
    return [
        str(row["count"]),
        ms(row["ms"]),
        f"{row['share'] * 100:.1f}",
        f"{row['bytes_per_s'] / 1e9:.1f}",
        f"{row['flops_per_s'] / 1e9:.1f}" if row["flops"] else "-",
        ms(best) if best is not None else "?",
        f"{row['ms'] / best:.{1 if row['ms'] < 100 * best else 0}f}" if best else "-",
    ]


def ms(value: float) -> str:
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def folded_nodes(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`layers.*.mlp.down + input_norm`, the longest first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in facts["operations"]:
        groups.setdefault(folded_name(one["operations"]), []).append(one)
    rows = [
        {
            "name": name,
            "place": "".join(re.sub(r"^.*/|:\d+$", "", place) for place in group[0]["places"][:1]),
            **sums(group, facts["operations_ms"]),
        }
        for name, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def folded_name(names: Sequence[str]) -> str:
    """The first with `*` for its layer, of the others what follows the layer."""
    said = []
    for i, name in enumerate(names):
        match = LAYER.match(name)
        said.append(name if not match else f"{match[1]}.*.{match[3]}" if i == 0 else match[3])
    return " + ".join(said)


def show_scaling(facts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The same phase with several numbers of threads: what each kind gains, and which kinds do not."""
    first, last = facts[0], facts[-1]
    counts = [one["threads"] for one in facts]
    kinds = scaling(facts)
    yield ""
    yield (
        f"{first['phase']}, batch {first['batch']}: from {counts[0]} to {counts[-1]} threads, each operation's fastest "
        "time (what else the machine does only adds)"
    )
    rows = [
        [row["kind"], *(ms(value) if value is not None else "-" for value in row["ms"]),
         f"{row['gain']:.2f}" if row["gain"] else "-", row["verdict"]]
        for row in kinds
    ]  # fmt: skip
    whole = first["fastest_step_ms"] / last["fastest_step_ms"]
    rows.append(["the whole step", *(ms(one["fastest_step_ms"]) for one in facts), f"{whole:.2f}", ""])
    yield from table(["kind of operation", *(f"ms with {n}" for n in counts), "faster", ""], rows, left=1)


def scaling(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind the ms with each number of threads, and how much faster the last is than the first. A kind that
    gains less than three tenths of what the threads could give does not scale. Kernels may differ from one number of
    threads to another, so a kind may be in one column only."""
    times = [{row["kind"]: row["fastest_ms"] for row in one["kinds"]} for one in facts]
    could = facts[-1]["threads"] / facts[0]["threads"] - 1
    rows = []
    for kind in dict.fromkeys(kind for column in times for kind in column):
        found = [column.get(kind) for column in times]
        gain = found[0] / found[-1] if found[0] and found[-1] else None
        slow = gain is not None and gain - 1 < SCALES * could
        rows.append({"kind": kind, "ms": found, "gain": gain, "verdict": "does not scale" if slow else ""})
    return rows


# ---- as trace events


def trace_events(profiles: Sequence[tuple[Mapping[str, Any], Profile]], title: str) -> dict[str, Any]:
    """What Perfetto and chrome://tracing open: a process for each profile, with the engine's steps and, in them, the
    operations. Complete events ("ph": "X"), times in microseconds (Trace Event Format, Google)."""
    events: list[dict[str, Any]] = []
    for pid, (facts, profile) in enumerate(profiles, start=1):
        name = f"{title}, batch {facts['batch']}, [{facts['prompt']},{facts['answer']}]"
        name += f", {facts['threads']} threads" if facts.get("threads") else ""
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}})
        details = {tuple(one["operations"]): one for phase in facts["phases"] for one in phase["operations"]}
        shown = [step for phase in PHASES for step in _watched(profile, phase)[:TRACED_STEPS]]
        begin = min((step.pieces[0].start for step in shown), default=0)
        for step in shown:
            start = (step.pieces[0].start - begin) / 1e3
            about = {"tokens": step.tokens, "sequences": step.sequences, "step_us": step.ns / 1e3}
            events.append(_event(step.phase, "step", start, step.ran / 1e3, pid, about))
            for piece in step.pieces:
                one = details.get(piece.names, {})
                about = {key: one[key] for key in TOLD if key in one}
                label = f"{one.get('kind', '')} {folded_name(piece.names)}".strip()
                start = (piece.start - begin) / 1e3
                events.append(_event(label, one.get("kind", ""), start, piece.ns / 1e3, pid, about))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _watched(profile: Profile, phase: str) -> list[Seen]:
    return [step for step in profile.steps if step.phase == phase and step.pieces]


def _event(name: str, kind: str, start: float, duration: float, pid: int, about: Mapping[str, Any]) -> dict[str, Any]:
    times = {"ts": start, "dur": duration}
    return {"name": name, "cat": kind, "ph": "X", **times, "pid": pid, "tid": 1, "args": dict(about)}
