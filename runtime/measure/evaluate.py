"""`llmc eval`: how good a checkpoint's answers are, by the generated code that runs.

    llmc eval --model-path W --text FILE              # perplexity of a text (perplexity.py)
    llmc eval --model-path W --tasks boolq --data DIR # tasks of lm-eval (tasks.py)
    llmc eval --model-path W --golden DIR             # logits of each step against another program's (golden.py)
    llmc eval --model-path W --golden-out DIR --input-text "Once upon a time"     # write such files

Flow: flags -> which kind of evaluation -> artifact -> what it reads -> engine -> facts -> lines. A kind is a `Job`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.diagnostics import UserError
from llmc.compiler.target.device import device as device_profile
from llmc.compiler.terminal import columns, fold
from llmc.runtime import npu
from llmc.runtime.engine.engine import Engine
from llmc.runtime.flags import EVAL_FLAGS, refuse, spellings, words_of
from llmc.runtime.measure import golden, perplexity, tasks
from llmc.runtime.ranks import Team
from llmc.runtime.session import (
    built,
    check_world_size,
    checkpoint_config,
    make_artifact,
    on_cpu,
    on_npu,
    threads_used,
    use_cpu,
    work,
)
from llmc.runtime.weights import progress_bar


class Job(Protocol):
    """One kind of evaluation, as far as it is known without a device. `total`: how many of its `unit` it works on."""

    @property
    def artifact(self) -> artifacts.Artifact: ...
    @property
    def unit(self) -> str: ...
    @property
    def total(self) -> int: ...
    def flags(self, folder: Path) -> dict[str, Any]:
        """Of a rank's command line, where they differ; files that they name are written to the folder."""
        ...

    def engine(self, args: argparse.Namespace, team: Team | None) -> Engine: ...
    def run(self, engine: Engine, advance: Callable[[int], None], *, talks: bool = True) -> dict[str, Any]:
        """On every rank; facts, of the rank that talks. "passed" False: the exit code is 1."""
        ...

    def lines(self, facts: Mapping[str, Any]) -> Iterator[str]: ...


Make = Callable[[], artifacts.Artifact]

# The flag that asks for a kind -> what is wrong with its flags; its job.
KINDS: Mapping[
    str,
    tuple[
        Callable[[argparse.Namespace], Iterator[str]],
        Callable[[argparse.Namespace, Make, Team | None], Job],
    ],
] = {
    "text": (perplexity.problems, perplexity.prepare),
    "golden": (golden.problems, golden.prepare),
    "golden_out": (golden.record_problems, golden.prepare_recording),
    "tasks": (tasks.problems, tasks.prepare),
}


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Everything that `llmc eval` does, alone or as one rank of a team; the exit code."""
    if args.golden_out is not None and args.golden_from == "transformers":
        return record_transformers(args, team)
    return work(args, team, prepare=prepare, words=rank_words, answer=answer)


def kind_of(args: argparse.Namespace) -> str:
    """The one kind of evaluation that the flags ask for; UserError where something is wrong with them."""
    asked = [kind for kind in KINDS if getattr(args, kind) is not None]
    problems = [problem for kind in asked for problem in KINDS[kind][0](args)]
    if len(asked) != 1:
        flags = [spellings(kind)[0] for kind in asked or KINDS]
        problems.append(
            f"{' and '.join(flags)} cannot be used together" if asked else f"one of {', '.join(flags)} is needed"
        )
    if args.golden_from != "llmc" and args.golden_out is None:
        problems.append(f"--golden-from {args.golden_from} is who writes --golden-out DIR")
    refuse("eval", args, problems)
    return asked[0]


def prepare(args: argparse.Namespace, team: Team | None, cleanup: contextlib.ExitStack) -> Job:
    """Flags, what is read, and the artifact. UserError for what no rank could do."""
    kind = kind_of(args)
    check_world_size(args, team)
    config = checkpoint_config(args)
    return KINDS[kind][1](args, partial(make_artifact, args, config, cleanup, team), team)


def record_transformers(args: argparse.Namespace, team: Team | None) -> int:
    """Goldens of another program: no artifact, no engine, no ranks."""
    kind_of(args)
    if team is not None and not team.alone:
        raise UserError("--golden-from transformers runs in one process", hint="leave torchrun out")
    facts = golden.record_transformers(args, progress=not (args.quiet or args.json))
    print(json.dumps({"ok": True, **facts}) if args.json else fold(golden.said_of(facts), columns(sys.stdout)))
    return 0


def rank_words(args: argparse.Namespace, job: Job, folder: Path) -> list[str]:
    return [
        "eval",
        *words_of(argparse.Namespace(**{**vars(args), **job.flags(folder), **built(job.artifact)}), EVAL_FLAGS),
    ]


def answer(args: argparse.Namespace, job: Job, team: Team | None) -> int:
    """Load, compute, print; the exit code. Of several ranks, rank 0 prints."""
    manifest, talks = job.artifact.manifest, team is None or team.talks
    use_cpu(args, team)
    if on_npu(manifest["device"]):  # before libraries read them
        npu.apply_environment(device_profile(manifest["device"]).environment.get("deterministic", {}))
    engine = job.engine(args, team)
    with progress_bar(job.unit, job.total, talks and not (args.quiet or args.json)) as advance:
        found = job.run(engine, advance, talks=talks)
    if not talks:
        return 0
    facts = {
        **{key: manifest[key] for key in ("model", "device", "dtype", "attention", "world_size")},
        "threads": torch.get_num_threads() if on_cpu(engine) else None,
        **found,
    }
    passed = facts.get("passed", True)
    if args.json:
        print(json.dumps({"ok": passed, **facts}))
    else:
        print(fold("\n".join([_head(facts), *job.lines(facts)]), columns(sys.stdout)))
    return 0 if passed else 1


def _head(facts: Mapping[str, Any]) -> str:
    threads = f", {threads_used()}" if facts["threads"] else ""
    return (
        f"{facts['model']} on {facts['device']}, {facts['dtype']}, {facts['attention']} attention, "
        f"world size {facts['world_size']}{threads}"
    )
