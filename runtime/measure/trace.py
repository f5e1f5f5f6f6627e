"""`llmc trace`: is a compiled model still the same model, and if not, which node is the first that errs?

    llmc trace --model-path W --input-ids 5,6,7,8 [--tp 4 --dtype bfloat16 --attention flash]      with transformers
    llmc trace --model-path W --dump DIR;  llmc trace --model-path W --against DIR                 with another run

Flow: flags -> an artifact with taps (passes/tap.py) -> an engine, on every rank -> teacher-forced steps (forced.py),
whose values rank 0 joins -> compared as they come (compare.py) with transformers (reference.py) or a recording
(dump.py).

Where not everything fits the memory, or with --at-once N, the first pass looks at what layers hand on to each other,
and the second one into the N layers from where the error begins.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from llmc.compiler import artifact as artifacts
from llmc.compiler.diagnostics import UserError
from llmc.compiler.ir import LAYER
from llmc.compiler.passes.tap import HANDED_ON
from llmc.compiler.terminal import columns, fold, table
from llmc.runtime.engine.engine import Engine, check_prompt
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.executor import Executor
from llmc.runtime.flags import TRACE_FLAGS, refuse, words_of
from llmc.runtime.host_memory import free_memory
from llmc.runtime.measure.compare import Comparison, Side, first_that_errs
from llmc.runtime.measure.dump import Recorded, Recording, is_dump, read_dump
from llmc.runtime.measure.forced import Step, forced, joined
from llmc.runtime.measure.reference import Original
from llmc.runtime.prompts import as_file, prompt_ids
from llmc.runtime.ranks import Team
from llmc.runtime.session import (
    check_world_size,
    checkpoint_config,
    make_artifact,
    make_engine,
    note,
    positions_of,
    temporary_directory,
    use_cpu,
    work,
)
from llmc.runtime.weights import progress_bar

EVERYTHING = "*"
DECODED = 2  # tokens at the end of each prompt that are read one by one
BYTES_A_NUMBER = 16  # of a tapped value: truth, transformers' own, ours, and one in work
SHARE = 2  # of the free memory, what values may take: a half
# What the other side of a comparison is may not follow from the flags for this side.
OF_THIS_SIDE = (
    "graph",
    "device",
    "dtype",
    "attention",
    "is_flash_causal_lm",
    "is_flash_model",
    "tp",
    "backend",
    "fuse",
)

Node = Mapping[str, Any]


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Everything that `llmc trace` does, alone or as one rank of a team; the exit code: 1 where a value errs."""
    refuse("trace", args, _problems(args))
    if args.against is None or is_dump(Path(args.against)) or team is not None:
        return work(args, team, prepare=prepare, words=rank_words, answer=answer)
    with temporary_directory() as folder:  # another artifact, maybe of another world size: its run is recorded first
        recorded = Path(folder) / Path(args.against).resolve().name
        other = argparse.Namespace(**{**vars(args), **dict.fromkeys(OF_THIS_SIDE), "is_bf16": False})
        other.artifact, other.against, other.dump, other.json, other.quiet = (
            args.against,
            None,
            str(recorded),
            False,
            True,
        )
        other.reference = None
        if code := run(other):
            return code
        mine = copy.copy(args)
        mine.against = str(recorded)
        return work(mine, None, prepare=prepare, words=rank_words, answer=answer)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`ids`: prompts as token ids; `lengths`: how many of each are read in prefill, the others one by one."""

    artifact: artifacts.Artifact
    ids: list[list[int]]
    lengths: list[int]
    at_once: int  # layers looked into at once; 0: all
    recorded: Recorded | None = None  # the dump that is compared with


# ---- what is asked


def prepare(args: argparse.Namespace, team: Team | None, cleanup: contextlib.ExitStack) -> Asked:
    """Flags, prompts, artifact. UserError for what no rank could do."""
    check_world_size(args, team)
    config = checkpoint_config(args)
    recorded = read_dump(Path(args.against)) if args.against else None
    ids, lengths = _prompts(args, recorded)
    at_once = args.at_once or 0
    artifact = traced(args, config, cleanup, team, (HANDED_ON,) if at_once > 0 else (EVERYTHING,))
    if args.artifact is None and args.at_once is None and not args.dump:
        at_once = _that_fit(artifact, ids)
        if at_once:
            note(f"the values of all layers do not fit the memory: {at_once} at a time (--at-once)")
            artifact = traced(args, config, cleanup, team, (HANDED_ON,))
    for index, prompt in enumerate(ids):
        longest = positions_of(args, artifact.manifest) + 1  # nothing is generated behind it
        check_prompt(index, prompt, vocab=artifact.manifest["sizes"].get("vocab"), max_length=longest)
    return Asked(artifact=artifact, ids=ids, lengths=lengths, at_once=at_once, recorded=recorded)


def _problems(args: argparse.Namespace) -> list[str]:
    given = [name for name in ("input_text", "input_ids", "input_file") if getattr(args, name) is not None]
    problems = []
    if len(given) > 1:
        problems.append(f"{' and '.join(f'--{name}'.replace('_', '-') for name in given)} cannot be used together")
    if args.decode_steps is not None and args.decode_steps < 0:
        problems.append(f"--decode-steps {args.decode_steps}: expected 0 or more")
    if args.reference and args.against:
        problems.append("--reference and --against: one of them is compared with")
    if args.artifact is not None and (args.at_once or args.fuse):
        problems.append("--at-once and --fuse are choices of a compilation, and --artifact is compiled already")
    if args.dump and args.at_once:
        problems.append("--dump writes every value; --at-once looks into some layers")
    if args.dump and args.against:
        problems.append("--dump and --against: write a dump, then compare with it")
    return problems


def _prompts(args: argparse.Namespace, recorded: Recorded | None) -> tuple[list[list[int]], list[int]]:
    """From the flags; of a dump that is compared with, its own."""
    asked = any(getattr(args, name) is not None for name in ("input_text", "input_ids", "input_file"))
    if recorded and not asked:
        return recorded.prompts, recorded.lengths
    ids = prompt_ids(args)
    steps = DECODED if args.decode_steps is None else args.decode_steps
    lengths = [max(1, len(prompt) - steps) for prompt in ids]
    if recorded and (ids, lengths) != (recorded.prompts, recorded.lengths):
        raise UserError(
            f"{args.against} is of other prompts, or of another --decode-steps",
            hint="leave the prompts out: the dump knows them",
        )
    return ids, lengths


def traced(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    cleanup: contextlib.ExitStack,
    team: Team | None,
    taps: Sequence[str],
) -> artifacts.Artifact:
    """The artifact with these taps; one that is given has those that it was compiled with."""
    fusions = None if args.fuse is None else tuple(word for word in args.fuse.split(",") if word and word != "none")
    artifact = make_artifact(args, config, cleanup, team, taps=tuple(taps), fusions=fusions)
    if not any("taps" in phase for phase in artifact.manifest["phases"].values()):
        raise UserError(
            f"artifact {artifact.path}: no value of its inside can be seen", hint="llmc compile GRAPH --taps '*'"
        )
    return artifact


def _that_fit(artifact: artifacts.Artifact, ids: Sequence[Sequence[int]]) -> int:
    """How many layers' values fit the memory beside the models; 0: all of them."""
    free = free_memory()
    layers: dict[str, int] = {}
    for tap in artifact.manifest["phases"]["prefill"].get("taps", ()):
        match = LAYER.match(tap["name"])
        label = f"{match[1]}.{match[2]}" if match else ""
        rows = len(ids) if tap["shape"][0] == "B" else sum(map(len, ids))
        layers[label] = layers.get(label, 0) + rows * tap["shape"][1] * BYTES_A_NUMBER
    # transformers in float32, twice in passing while it is rounded, stands beside the values
    held = 3 * artifact.manifest["memory"]["weight_bytes"] * artifact.manifest["world_size"]
    if free is None or sum(layers.values()) <= max(0, free - held) // SHARE:
        return 0
    most = max((size for label, size in layers.items() if label), default=0)
    return max(1, max(0, free - held) // SHARE // most) if most else 0


def rank_words(args: argparse.Namespace, asked: Asked, folder: Path) -> list[str]:
    """The command line of one rank: it compiles for itself, because a second pass has other taps."""
    manifest = asked.artifact.manifest
    chosen = {"tp": manifest["world_size"], "at_once": asked.at_once if args.artifact is None else None}
    if args.artifact is None and manifest["backend"]:
        chosen["backend"] = manifest["backend"]
    values = {**vars(args), **as_file([list(ids) for ids in asked.ids], folder), **chosen}
    if asked.at_once == 0 and args.dump:
        values["at_once"] = None
    return ["trace", *words_of(argparse.Namespace(**values), TRACE_FLAGS)]


# ---- the trace


def answer(args: argparse.Namespace, asked: Asked, team: Team | None) -> int:
    """Run, compare, print; the exit code. Of several ranks, rank 0 compares and prints."""
    use_cpu(args, team)
    talks = team is None or team.talks
    parts = [prompt[:length] for prompt, length in zip(asked.ids, asked.lengths, strict=True)]
    steps = max(len(prompt) - length for prompt, length in zip(asked.ids, asked.lengths, strict=True))
    engine = make_engine(args, asked.artifact, None, parts, SamplingParams(max_tokens=max(1, steps)), team)
    if args.dump:
        return record(args, asked, engine, team)
    nodes = compared(args, asked, asked.artifact, engine, team)
    passes = 1
    if asked.at_once:
        inside = _taps_inside(nodes, asked.at_once) if talks else ()
        inside = team.tell(inside) if team else inside
        if inside:
            with contextlib.ExitStack() as cleanup:
                artifact = traced(args, checkpoint_config(args), cleanup, team, inside)
                assert isinstance(engine.runner.executor, Executor)
                engine.runner.executor = engine.runner.executor.with_artifact(artifact)
                found = compared(args, asked, artifact, engine, team)
            nodes, passes = merged(nodes, found), 2
    if not talks:
        return 0
    report = summary(args, asked, nodes, passes)
    if args.json:
        print(json.dumps(finite(report)))
    else:
        print(fold("\n".join(show(report, args.map)), columns(sys.stdout)))
    return 0 if report["ok"] else 1


def compared(
    args: argparse.Namespace, asked: Asked, artifact: artifacts.Artifact, engine: Engine, team: Team | None
) -> list[Node]:
    """What rank 0 found of every tapped value; the others find nothing."""
    side = other_side(args, asked, artifact.manifest) if team is None or team.talks else None
    steps = forced(engine.runner, engine.scheduler, asked.ids, asked.lengths)
    everyone = ((step, team.gather(shares) if team else [shares]) for step, shares in steps)
    if side is None:
        for _ in everyone:
            pass
        return []
    return compare_steps(artifact.manifest, ((step, shares or []) for step, shares in everyone), side)


def compare_steps(
    manifest: Mapping[str, Any], steps: Iterable[tuple[Step, Sequence[Mapping[str, Tensor]]]], side: Side
) -> list[Node]:
    """Every tapped value of the phases that ran, prefill before decode, each in the order of its graph. `steps`: with
    the shares of all ranks."""
    found: dict[tuple[str, str], Comparison] = {}
    taps = {phase: facts["taps"] for phase, facts in manifest["phases"].items()}
    layers = max((int(m[2]) + 1 for tap in taps["prefill"] if (m := LAYER.match(tap["name"]))), default=0)
    for step, everyone in steps:
        for entry in taps[step.phase]:
            comparison = found.setdefault((step.phase, entry["name"]), Comparison(step.phase, entry, side, layers))
            if side.counterpart(step.phase, entry) is not None:
                whole = joined(entry, [shares[entry["name"]] for shares in everyone], manifest["splits"])
                comparison.add(whole, step.rows(entry))
    in_order = [(phase, entry["name"]) for phase in ("prefill", "decode") for entry in taps[phase]]
    return [found[key].result() if found[key].rows else found[key].nothing() for key in in_order if key in found]


def other_side(args: argparse.Namespace, asked: Asked, manifest: Mapping[str, Any]) -> Side:
    """transformers; or a recording, and transformers as the measure of how far two runs may be apart."""
    recorded, path = asked.recorded, Path(args.reference or args.model_path)
    try:
        with progress_bar("transformers", 2 * len(asked.ids), not (args.quiet or args.json)) as advance:
            other = recorded.said["run"]["dtype"] if recorded else ""
            original = Original(path, manifest, asked.ids, asked.lengths, advance, other_dtype=other)
    except UserError as error:
        if recorded is None:
            raise
        note(f"{error.message}; without it the budgets are coarse")
        return recorded
    if recorded:
        recorded.scale = original
    return recorded or original


def record(args: argparse.Namespace, asked: Asked, engine: Engine, team: Team | None) -> int:
    """Write what the taps give to a directory. Where ranks answer differently, the first one's is kept, and said."""
    manifest, recording, differ = asked.artifact.manifest, Recording(), set[str]()
    for step, shares in forced(engine.runner, engine.scheduler, asked.ids, asked.lengths):
        everyone = team.gather(shares) if team else [shares]
        for entry in manifest["phases"][step.phase]["taps"] if everyone else ():
            whole = joined(entry, [mine[entry["name"]] for mine in everyone or ()], manifest["splits"])
            recording.add(step.phase, entry, step.rows(entry), whole[0])
            if len(whole) > 1 and any(not whole[0].equal(other) for other in whole[1:]):
                differ.add(entry["name"])
    if team is not None and not team.talks:
        return 0
    if differ:
        note(f"ranks hold different numbers of the same value, and those of the first are kept: {', '.join(differ)}")
    size = recording.write(Path(args.dump), manifest, asked.ids, asked.lengths)
    count = len({name for _, name in recording.found})
    if args.json:
        print(json.dumps({"ok": True, "path": args.dump, "values": count, "bytes": size}))
    elif not args.quiet:
        line = f"{args.dump}: {count} values of {described(manifest)}, {size / 2**20:.1f} MiB"
        print(fold(line, columns(sys.stdout)))
    return 0


def _taps_inside(nodes: Sequence[Node], at_once: int) -> tuple[str, ...]:
    """Patterns for the layers from where the error begins; none where it does not, or begins outside layers."""
    first = first_that_errs(nodes)
    match = LAYER.match(first["name"]) if first else None
    if match is None:
        return ()
    there = {label_of(node) for node in nodes}
    labels = (f"{match[1]}.{i}" for i in range(int(match[2]), int(match[2]) + at_once))
    return tuple(f"{label}.*" for label in labels if label in there)


def label_of(node: Node) -> str:
    """`layers.3`; "" outside layers."""
    match = LAYER.match(node["name"])
    return f"{match[1]}.{match[2]}" if match else ""


def merged(nodes: Sequence[Node], inside: Sequence[Node]) -> list[Node]:
    """What layers hand on, with the layers that were looked into in the place of what these hand on."""
    labels = {label_of(node) for node in inside} - {""}
    result: list[Node] = []
    for phase in dict.fromkeys(node["phase"] for node in nodes):
        mine = [node for node in nodes if node["phase"] == phase]
        at = next((i for i, node in enumerate(mine) if label_of(node) in labels), len(mine))
        looked = [node for node in inside if node["phase"] == phase and label_of(node) in labels]
        result += [*mine[:at], *looked, *(node for node in mine[at:] if label_of(node) not in labels)]
    return result


# ---- what is printed


def summary(args: argparse.Namespace, asked: Asked, nodes: Sequence[Node], passes: int) -> dict[str, Any]:
    """The --json object."""
    manifest = asked.artifact.manifest
    with_side = [node for node in nodes if node["counterpart"] is not None]
    if not with_side:
        raise UserError("no value has a counterpart on the other side", hint="see the names of its weights")
    first = first_that_errs(with_side)
    return {
        "ok": first is None,
        **{key: manifest[key] for key in ("model", "device", "dtype", "attention", "world_size")},
        "with": compared_with(args, asked.recorded),
        "prompts": [
            {"prefill": length, "decode": len(ids) - length}
            for ids, length in zip(asked.ids, asked.lengths, strict=True)
        ],
        "passes": passes,
        "first": first,
        "nodes": with_side,
        "not_compared": list(dict.fromkeys(node["name"] for node in nodes if node["counterpart"] is None)),
    }


def finite(value: Any) -> Any:
    """JSON has no word for infinity: null."""
    match value:
        case dict():
            return {key: finite(one) for key, one in value.items()}
        case list():
            return [finite(one) for one in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


def compared_with(args: argparse.Namespace, recorded: Recorded | None) -> str:
    if recorded:
        return f"{described(recorded.said['run'])} of {recorded.folder.name}"
    return f"transformers {version('transformers')} on {args.reference or args.model_path}"


HEADS = ("value", "place", "cosine", "max\nerror", "relative\nerror", "ULP", "budget", "")


def show(report: Mapping[str, Any], with_map: bool) -> list[str]:
    """The map if it is asked for, a table for each phase, what was not compared, and a closing line."""
    nodes = report["nodes"]
    lines = []
    if with_map:
        lines += [*dict.fromkeys(f"{node['name']}  is  {node['counterpart']}" for node in nodes), ""]
    for phase in dict.fromkeys(node["phase"] for node in nodes):
        rows = [row_of(node) for node in nodes if node["phase"] == phase]
        lines += [f"{phase}:", *table(HEADS, rows, left=2), ""]
    if report["not_compared"]:
        lines.append(f"not compared, because they have no counterpart: {', '.join(report['not_compared'])}")
    return [*lines, closing(report)]


def row_of(node: Node) -> tuple[str, ...]:
    numbers = (f"{node['cosine']:.6f}", f"{node['max_abs']:.1e}", f"{node['relative']:.1e}")
    ulp = "" if node["ulp"] is None else f"{node['ulp']:.0f}"
    verdict = "" if node["ok"] else f"errs {node['why']}"
    return node["name"], os.path.basename(node["place"]), *numbers, ulp, f"{node['budget']:.1e}", verdict


def closing(report: Mapping[str, Any]) -> str:
    what, first = described(report), report["first"]
    if first is None:
        count = len({node["name"] for node in report["nodes"]})
        return f"{what}: all {count} values are inside their budgets; compared with {report['with']}"
    where = first["worst"]
    first_column, end = where["columns"]
    at = f"prompt {where['prompt']}, token {where['position']}, columns {first_column} to {end - 1}"
    return (
        f"{what}: the first that errs is {first['node']} ({first['op']}) at {first['place']}, in {first['phase']}, "
        f"{first['why']}: {first['name']} is off by {first['relative']:.1e}, budget {first['budget']:.1e}; "
        f"worst at {at}"
    )


def described(facts: Mapping[str, Any]) -> str:
    what = ", ".join(str(facts[key]) for key in ("device", "dtype", "attention"))
    return f"{facts['model']} ({what}, world size {facts['world_size']})"
