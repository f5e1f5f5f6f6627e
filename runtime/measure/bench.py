"""`llmc bench`: how long steps take, for pairs of prompt and answer lengths and batches.

    llmc bench --model-path W --cases "[[256,256],[1024,128]]" --batch 1,4

Flow: flags -> artifact -> caches that hold the largest case -> one engine -> for each case and batch runs that are not
counted, then those that are -> medians. Prompts are random ids, and every answer goes to its full length, so a case
means the same work on every machine. A time is wall-clock around a whole step that ends with its tokens on the host.
Columns, and what they mean, are those of the original performance tests (mindie-stack reference section 8).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.checkpoint_files import present, read_object
from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, check_target, csv_text, parse_json, write_whole
from llmc.compiler.target.device import Board, Link
from llmc.compiler.terminal import columns, fold, table
from llmc.runtime.engine.engine import Engine, Step
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.tokenizer import eos_ids
from llmc.runtime.flags import BENCH_FLAGS, refuse, words_of
from llmc.runtime.formats import in_format
from llmc.runtime.hostatb.choices import CHOICES
from llmc.runtime.hostatb.pages import settle
from llmc.runtime.measure import profile as profiling
from llmc.runtime.ranks import Team
from llmc.runtime.room import Limit, Room
from llmc.runtime.session import (
    built,
    check_world_size,
    checkpoint_config,
    engine_in,
    limit_for,
    make_artifact,
    on_cpu,
    positions_of,
    room_for,
    threads_used,
    use_cpu,
    work,
)
from llmc.runtime.weights import load_weights, progress_bar

COLUMNS = (
    "Model",
    "Batchsize",
    "In_seq",
    "Out_seq",
    "Total time(s)",
    "Prefill all time(ms)",
    "Prefill average time(ms)",
    "Non-first token time(ms)",
    "Non-first token Throughput(Tokens/s)",
    "E2E Throughput(Tokens/s)",
    "Non-first token Throughput Average",
    "E2E Throughput Average",
)
PADDED = (15, 15, 15, 15, 15, 25, 25, 25, 36, 25, 45, 35)
MOST_BATCH = 256
STANDARD_DEVIATION = 0.02  # of made-up weights: activations neither vanish nor overflow
SHARED_NUMBERS = 1 << 20  # that made-up weights repeat: drawing each of billions would take minutes


@dataclass(frozen=True, order=True)
class Case:
    """`batch` sequences of `prompt` tokens that are given and `answer` tokens that are generated."""

    prompt: int
    answer: int
    batch: int

    def __str__(self) -> str:
        return f"[{self.prompt},{self.answer}] batch {self.batch}"

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.answer, ignore_eos=True)

    @property
    def requests(self) -> Counter[int]:
        return Counter({self.prompt: self.batch})


@dataclass(frozen=True, kw_only=True)
class Search:
    """The largest batch of [prompt, answer] from `least` to `most`."""

    prompt: int
    answer: int
    least: int
    most: int

    def case(self, batch: int) -> Case:
        return Case(self.prompt, self.answer, batch)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags ask for: cases, or searches and how large a batch of each fits the memory."""

    artifact: artifacts.Artifact
    compiled: Compiled | None  # what a profile needs to know of the operations
    ids: list[int]  # that prompts are made of
    cases: list[Case]
    searches: list[Search]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a case: seconds of the whole, of each step, and of each sequence to its first token."""

    total: float
    prefill: list[float]
    decode: list[float]
    first_token: list[float]


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Everything that `llmc bench` does, alone or as one rank of a team; the exit code."""
    return work(args, team, prepare=prepare, words=rank_words, answer=answer)


def rank_words(args: argparse.Namespace, asked: Asked, folder: Path) -> list[str]:
    return ["bench", *words_of(argparse.Namespace(**{**vars(args), **built(asked.artifact)}), BENCH_FLAGS)]


# ---- what is asked


def prepare(args: argparse.Namespace, team: Team | None, cleanup: contextlib.ExitStack) -> Asked:
    """Flags, artifact, and whether the cases fit. UserError for what no rank could do."""
    problems, cases, searches = [], list[Case](), list[Search]()
    try:
        cases, searches = read_cases(args)
    except UserError as error:
        problems.append(error.message)
    try:
        read_threads(args)
    except UserError as error:
        problems.append(error.message)
    if wants_profile(args) and args.max_batch_under is not None:
        problems.append("--profile and --max-batch-under cannot be used together: profile the batch that it finds")
    if args.host_compile and wants_profile(args):
        problems.append("--profile times operations, and --host-compile makes one of many; leave one of them out")
    if args.host_compile and (searches or len({case.batch for case in cases}) > 1):
        problems.append("--host-compile compiles the step of one batch; measure each batch by itself")
    if args.warm_up < 0:
        problems.append(f"--warm-up {args.warm_up}: expected 0 or more runs")
    refuse("bench", args, problems)
    for target in targets(args):
        check_target(*target)
    check_world_size(args, team)
    config = checkpoint_config(args)
    artifact = make_artifact(args, config, cleanup, team)
    asked = Asked(
        artifact=artifact,
        compiled=profiling.graphs_of(args, artifact) if wants_profile(args) else None,
        ids=ordinary_ids(Path(args.model_path), artifact.manifest["sizes"]["vocab"]),
        cases=sorted(cases, key=lambda case: case.batch),
        searches=searches,
    )
    longest = positions_of(args, artifact.manifest)
    asked_for: list[Case | Search] = [*cases, *searches]
    for one in asked_for:
        if one.prompt + one.answer > longest:
            raise UserError(
                f"--cases [{one.prompt},{one.answer}]: {one.prompt + one.answer} tokens; a sequence can have {longest}",
                hint="a shorter prompt or answer"
                + (", or a larger --max-position-embeddings" if args.max_position_embeddings else ""),
            )
    for case in cases:
        fitting(args, artifact.manifest, case, limit_of(args, asked, [case], team))
    return asked


def targets(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """Files that will be written, each with its flag."""
    if args.csv:
        yield Path(args.csv), "--csv"
        if args.max_batch_under is not None:
            yield rounds_file(Path(args.csv)), "--csv"
    if args.formatted:
        yield Path(args.formatted), "--formatted"
    if args.chrome:
        yield Path(args.chrome), "--chrome"


def rounds_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_rounds{path.suffix}")


def read_cases(args: argparse.Namespace) -> tuple[list[Case], list[Search]]:
    """--cases with --batch, or with --max-batch-under and --batch-range."""
    pairs = parsed(args.cases, "--cases", "pairs of prompt and answer tokens: [[256,256],[1024,128]]")
    pairs = [pairs] if is_pair(pairs) else pairs
    if not (isinstance(pairs, list) and pairs and all(map(is_pair, pairs))):
        raise UserError(f"--cases {args.cases}: expected pairs of prompt and answer tokens: [[256,256],[1024,128]]")
    if args.max_batch_under is None:
        if args.batch_range is not None:
            raise UserError("--batch-range is where --max-batch-under searches")
        each = for_each(args.batch, "--batch", pairs, "1,4 for every case, or a list for each: [[1,4],[8]]")
        found = [Case(p[0], p[1], batch) for p, batches in zip(pairs, each, strict=True) for batch in batches]
        return list(dict.fromkeys(found)), []
    if not args.max_batch_under > 0:
        raise UserError(f"--max-batch-under {args.max_batch_under:g}: expected milliseconds above 0")
    if args.batch != "1":
        raise UserError("--batch and --max-batch-under cannot be used together: --batch-range says where to search")
    expected = "[1,64], or a pair for each case: [[1,64],[8,32]]"
    ranges = for_each(args.batch_range or f"[1,{MOST_BATCH}]", "--batch-range", pairs, expected)
    if any(len(ends) != 2 or ends[0] > ends[1] for ends in ranges):
        raise UserError(f"--batch-range {args.batch_range}: expected {expected}, the smaller number first")
    ends = zip(pairs, ranges, strict=True)
    return [], [Search(prompt=p[0], answer=p[1], least=least, most=most) for p, (least, most) in ends]


def wants_profile(args: argparse.Namespace) -> bool:
    return bool(args.profile or args.profile_threads or args.chrome)


def read_threads(args: argparse.Namespace) -> list[int]:
    """--profile-threads: 1,2; none where it is not given."""
    if args.profile_threads is None:
        return []
    counts = parsed(f"[{args.profile_threads.strip('[]')}]", "--profile-threads", "numbers of threads: 1,2")
    if not is_numbers(counts) or len(set(counts)) < len(counts):
        raise UserError(f"--profile-threads {args.profile_threads}: expected numbers of threads: 1,2")
    return list(counts)


def for_each(text: str, flag: str, pairs: Sequence[Any], expected: str) -> list[list[int]]:
    """A list of numbers for each case: one for all of them, or as many lists."""
    value = parsed(text if text.lstrip().startswith("[") else f"[{text}]", flag, expected)
    lists = [value] * len(pairs) if is_numbers(value) else value
    if not (isinstance(lists, list) and lists and all(map(is_numbers, lists))):
        raise UserError(f"{flag} {text}: expected {expected}")
    if len(lists) != len(pairs):
        raise UserError(f"{flag} {text}: {len(lists)} lists for {len(pairs)} cases")
    return lists


def parsed(text: str, flag: str, expected: str) -> Any:
    try:
        return parse_json(text)
    except (Unreadable, ValueError):
        raise UserError(f"{flag} {text}: expected {expected}") from None


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and n > 0 for n in value)


def is_pair(value: Any) -> bool:
    return is_numbers(value) and len(value) == 2


def ordinary_ids(model_path: Path, vocab: int) -> list[int]:
    """Ids of the vocabulary that no configuration of the checkpoint calls special."""
    special: set[Any] = set(eos_ids(model_path))
    for name in ("config.json", "generation_config.json"):
        said = read_object(model_path / name) if present(model_path / name) else {}
        special |= {said.get(f"{kind}_token_id") for kind in ("bos", "pad", "unk")}
    if present(model_path / "tokenizer.json"):
        added = read_object(model_path / "tokenizer.json").get("added_tokens") or []
        special |= {token.get("id") for token in added if isinstance(token, dict) and token.get("special")}
    return [i for i in range(vocab) if i not in special] or list(range(vocab))


# ---- room


def limit_of(args: argparse.Namespace, asked: Asked, cases: Sequence[Case], team: Team | None) -> Limit | None:
    """What a rank may use, beside the requests of whichever case has most."""
    limits = [limit_for(args, asked.artifact.manifest, case.requests, case.answer, team) for case in cases]
    return min((limit for limit in limits if limit), key=lambda limit: limit.usable, default=None)


def fitting(args: argparse.Namespace, manifest: Mapping[str, Any], case: Case, limit: Limit | None) -> Room:
    """Room for the whole batch at its longest; UserError where there is not so much."""
    try:
        room = room_for(args, manifest, case.requests, case.answer, limit, batch=case.batch)
    except UserError as error:
        raise UserError(f"{case}: {error.message}", hint=error.hint) from None
    if room.note:
        raise UserError(f"{case} does not fit at once: {room.note}", hint="a smaller --batch, or shorter cases")
    return room


def widest(rooms: Sequence[Room]) -> Room:
    """One that holds each of them."""
    first = rooms[0]
    return replace(
        first,
        sizes={symbol: max(room.sizes[symbol] for room in rooms) for symbol in first.sizes},
        max_batch=max(room.max_batch for room in rooms),
        prefill_tokens=max(room.prefill_tokens for room in rooms),
        workspace=max(room.workspace for room in rooms),
    )


def made_up(
    manifest_weights: Mapping[str, Mapping[str, Any]],
    model_path: Path | str,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    progress: bool = True,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """As `load_weights`, but no file is read: normal numbers, the same ones again and again. Weights that are made of
    the same tensors (tied embeddings) are one tensor."""
    numbers = torch.randn(SHARED_NUMBERS, generator=torch.Generator().manual_seed(rank)) * STANDARD_DEVIATION
    made: dict[str, torch.Tensor] = {}
    result: dict[str, torch.Tensor] = {}
    with progress_bar("weights", len(manifest_weights), progress) as advance:
        for name, weight in manifest_weights.items():
            key = json.dumps([weight["sources"], weight["shape"], weight["transpose"]])
            if key not in made:
                tensor = torch.empty(weight["shape"], dtype=getattr(torch, weight["dtype"]))
                for part in tensor.view(-1).split(SHARED_NUMBERS):
                    part.copy_(numbers[: part.numel()])
                made[key] = in_format(tensor.to(device), weight["format"])
            result[name] = made[key]
            advance(1)
    return result


# ---- measuring


def answer(args: argparse.Namespace, asked: Asked, team: Team | None) -> int:
    """Load, measure, print; the exit code. Of several ranks, rank 0 prints."""
    use_cpu(args, team)
    talks, start = team is None or team.talks, time.perf_counter()
    engine, bound = open_engine(args, asked, team)
    prompts_of = partial(random_prompts, asked.ids, args.seed)
    rounds: list[dict[str, Any]] = []
    measured: dict[Case, list[Run]] = {}
    profiles: list[tuple[dict[str, Any], profiling.Profile]] = []
    with progress_bar("steps", steps_of(args, asked), talks and not (args.quiet or args.json)) as advance:

        def on_step(step: Step) -> None:
            advance(1)

        def timed(case: Case) -> list[Run]:
            return measure(engine, case, prompts_of(case), args.repeats, args.warm_up, on_step)

        if asked.searches:
            for one, most in zip(asked.searches, bound, strict=True):
                found, tried = largest_batch(args, one, most, timed, team)
                rounds += tried
                measured |= found
        else:
            measured = {case: timed(case) for case in asked.cases}
        if asked.compiled:
            profiles = list(profile_cases(args, asked, asked.compiled, engine, on_step))
    if not talks:
        return 0
    manifest = asked.artifact.manifest
    rows = with_averages([row_of(manifest["model"], case, runs) for case, runs in measured.items()])
    written = list(write_files(args, rows, rounds))
    if args.chrome:
        text = json.dumps(profiling.trace_events(profiles, manifest["model"]))
        write_whole(Path(args.chrome), text, "--chrome")
        written.append(args.chrome)
    facts = {
        **{key: manifest[key] for key in ("model", "device", "dtype", "attention", "world_size")},
        "threads": torch.get_num_threads() if on_cpu(engine) else None,
        "weights": "random" if args.random_weights else "checkpoint",
        "repeats": args.repeats,
        "warm_up": args.warm_up,
        "seed": args.seed,
        "columns": list(COLUMNS),
        "rows": [list(row.values()) for row in rows],
        "cases": [details(case, runs) for case, runs in measured.items()],
        **({"max_batch_under_ms": args.max_batch_under, "rounds": rounds} if asked.searches else {}),
        **({"profiles": [found for found, _ in profiles]} if profiles else {}),
        "files": written,
    }
    if args.json:
        print(json.dumps({"ok": True, **facts}))
    else:
        lines = [*shown(facts, asked.searches), *shown_profiles(facts, args.top)]
        lines.append(closing(facts, time.perf_counter() - start))
        print(fold("\n".join(lines), columns(sys.stdout)))
    return 0


def steps_of(args: argparse.Namespace, asked: Asked) -> int:
    """About how many steps there will be: of searches the most."""
    each = args.warm_up + args.repeats
    tries = sum(one.answer * (one.most - one.least + 1).bit_length() for one in asked.searches)
    watched = 2 * (args.repeats + 1) * max(1, len(read_threads(args))) if asked.compiled else 0
    return tries * each + sum(case.answer for case in asked.cases) * (each + watched)


def open_engine(args: argparse.Namespace, asked: Asked, team: Team | None) -> tuple[Engine, list[int]]:
    """An engine for all cases, warm; and of each search the largest batch that fits (0: not even the smallest)."""
    manifest = asked.artifact.manifest
    batches: list[int] = []

    def room_in(bound: Limit | None) -> Room:
        batches[:] = [largest_that_fits(args, manifest, one, bound) for one in asked.searches]
        cases = asked.cases or [s.case(n) for s, n in zip(asked.searches, batches, strict=True) if n]
        if not cases:
            fitting(args, manifest, asked.searches[0].case(asked.searches[0].least), bound)  # says why not
        return widest([fitting(args, manifest, case, bound) for case in cases])

    ends = asked.cases or [one.case(one.least) for one in asked.searches]
    bound = limit_of(args, asked, ends, team)
    make = made_up if args.random_weights else load_weights
    engine = engine_in(args, asked.artifact, None, room_in, bound, team, weights=make)
    engine.warm_up(asked.cases[0].batch if args.host_compile else 1)
    settle()
    return engine, batches


def largest_that_fits(args: argparse.Namespace, manifest: Mapping[str, Any], one: Search, bound: Limit | None) -> int:
    low, high = one.least - 1, one.most
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fitting(args, manifest, one.case(middle), bound)
            low = middle
        except UserError:
            high = middle - 1
    return low if low >= one.least else 0


def largest_batch(
    args: argparse.Namespace, one: Search, most: int, timed: Callable[[Case], list[Run]], team: Team | None
) -> tuple[dict[Case, list[Run]], list[dict[str, Any]]]:
    """Binary search as the original tests do it: the largest batch found to be fast enough with its runs, and every
    round. All ranks go the same way: a batch is fast enough when it is on each."""
    found: dict[Case, list[Run]] = {}
    rounds = []
    low, high = one.least, one.most
    while low <= high:
        case = one.case((low + high) // 2)
        told: dict[str, Any] = {"prompt": case.prompt, "answer": case.answer, "batch": case.batch}
        if case.batch > most:
            told |= {"non_first_token_ms": None, "within": False, "why": "it does not fit the memory"}
            within = False
        else:
            runs = timed(case)
            token = non_first_token(runs)
            within = token is None or token * 1e3 <= args.max_batch_under
            if team:
                within = bool(team.least(int(within)))
            told |= {"non_first_token_ms": token and token * 1e3, "within": within, "why": "" if within else "too slow"}
            told["row"] = list(row_of("", case, runs).values())[1:10]
            if within:
                found = {case: runs}
        rounds.append(told)
        low, high = (case.batch + 1, high) if within else (low, case.batch - 1)
    return found, rounds


def random_prompts(ids: Sequence[int], seed: int, case: Case) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    places = torch.randint(len(ids), (case.batch, case.prompt), generator=drawn)
    return [[ids[place] for place in row] for row in places.tolist()]


def measure(
    engine: Engine,
    case: Case,
    prompts: Sequence[Sequence[int]],
    repeats: int,
    warm_up: int,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Run]:
    """The counted runs. A step's shape that comes for the first time is planned then, so runs before them go the whole
    way."""
    runs = []
    for number in range(warm_up + repeats):
        start = time.perf_counter()
        outputs = engine.generate(prompts, case.params, on_step=on_step)
        total = time.perf_counter() - start
        if number >= warm_up:
            runs.append(
                Run(
                    total=total,
                    prefill=[step.seconds for step in engine.steps if step.phase == "prefill"],
                    decode=[step.seconds for step in engine.steps if step.phase == "decode"],
                    first_token=[output.first_token_s for output in outputs],
                )
            )
    return runs


# ---- profiles


def profile_cases(
    args: argparse.Namespace, asked: Asked, compiled: Compiled, engine: Engine, on_step: Callable[[Step], None]
) -> Iterator[tuple[dict[str, Any], profiling.Profile]]:
    """Each case with each number of threads: its phases as plain data, and the steps that they were made of."""
    kind = next(iter(engine.runner.caches.values())).device.type
    names = profiling.names_of(compiled, asked.artifact)
    usual = torch.get_num_threads()
    for threads in read_threads(args) or [usual]:
        if kind == "cpu" and threads != torch.get_num_threads():
            use_threads(engine, threads)
        roof = roof_of(compiled, kind)
        for case in asked.cases:
            prompts = random_prompts(asked.ids, args.seed, case)
            if kind == "npu":
                profile = profiling.on_npu(engine, compiled, prompts, case.params, on_step)
            else:
                profile = profiling.on_host(engine, names, prompts, case.params, args.repeats, on_step)
            lengths = (case.prompt, case.answer)
            phases = [profiling.phase_facts(compiled, profile, phase, lengths, roof) for phase in profiling.PHASES]
            count = threads if kind == "cpu" else None
            yield (
                {
                    "prompt": case.prompt,
                    "answer": case.answer,
                    "batch": case.batch,
                    "threads": count,
                    "roof": roof[0] and {"flops_per_s": roof[0].flops, "bytes_per_s": roof[0].bandwidth},
                    "phases": [{**found, "threads": count} for found in phases if found],
                },
                profile,
            )
    if kind == "cpu" and torch.get_num_threads() != usual:
        use_threads(engine, usual)


def use_threads(engine: Engine, count: int) -> None:
    """Kernels are chosen as a process with so many threads would choose them."""
    torch.set_num_threads(count)
    CHOICES.spent_s = 0.0
    executor: Any = engine.runner.executor
    for operations in executor.phases.values():
        for operation, *_ in operations:
            operation.forget_plans()


def roof_of(compiled: Compiled, kind: str) -> tuple[Board | None, Link | None]:
    """What the hardware could at best: an NPU's by its file, a host's measured now."""
    if kind == "cpu":
        return profiling.host_roof(compiled.dtype), None
    target = compiled.device
    return (target.boards[0] if target.boards and kind == "npu" else None), target.link


def shown_profiles(facts: Mapping[str, Any], top: int) -> Iterator[str]:
    found = facts.get("profiles", [])
    for one in found:
        for phase in one["phases"]:
            yield from profiling.show_profile(phase, top)
        if one["roof"]:
            yield (
                f"best: operations one after the other at {one['roof']['bytes_per_s'] / 1e9:.1f} GB/s of memory and "
                f"{one['roof']['flops_per_s'] / 1e9:.1f} GFLOP/s"
                + (", measured here; what lies in caches can be faster" if one["threads"] else "")
            )
    for case in dict.fromkeys((one["prompt"], one["answer"], one["batch"]) for one in found):
        mine = [one for one in found if (one["prompt"], one["answer"], one["batch"]) == case]
        for phases in zip(*(one["phases"] for one in mine), strict=False):
            if len(phases) > 1:
                yield from profiling.show_scaling(phases)


# ---- results


def non_first_token(runs: Sequence[Run]) -> float | None:
    """Median seconds of a decode step, of all runs; None where answers are one token."""
    steps = [seconds for run in runs for seconds in run.decode]
    return median(steps) if steps else None


def row_of(model: str, case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """The columns of section 8, from medians over the runs: throughput of tokens after the first is batch / time of
    one, that of the whole batch * answer / total time."""
    total = median(run.total for run in runs)
    prefill = median(sum(run.prefill) for run in runs)
    token = non_first_token(runs)
    values = (
        model,
        case.batch,
        case.prompt,
        case.answer,
        total,
        prefill * 1e3,
        prefill * 1e3 / case.batch,
        token and token * 1e3,
        token and case.batch / token,
        case.batch * case.answer / total,
        None,
        None,
    )
    return dict(zip(COLUMNS, values, strict=True))


def with_averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As in the original tests, the last row of each batch has the means over that batch's cases."""
    last = {row["Batchsize"]: row for row in rows}
    for batch, row in last.items():
        mine = [one for one in rows if one["Batchsize"] == batch]
        rates = [rate for one in mine if (rate := one["Non-first token Throughput(Tokens/s)"])]
        row["Non-first token Throughput Average"] = mean(rates) if rates else None
        row["E2E Throughput Average"] = mean(one["E2E Throughput(Tokens/s)"] for one in mine)
    return rows


def details(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """Spread, and every time that was taken, in ms."""
    times = {
        "total_ms": [run.total for run in runs],
        "prefill_all_ms": [sum(run.prefill) for run in runs],
        "first_token_ms": [seconds for run in runs for seconds in run.first_token],
        "non_first_token_ms": [seconds for run in runs for seconds in run.decode],
    }
    return {
        "prompt": case.prompt,
        "answer": case.answer,
        "batch": case.batch,
        "spread": {name: spread(seconds) for name, seconds in times.items() if seconds},
        "runs": [
            {
                "total_ms": run.total * 1e3,
                "prefill_ms": [seconds * 1e3 for seconds in run.prefill],
                "first_token_ms": [seconds * 1e3 for seconds in run.first_token],
                "decode_ms": [seconds * 1e3 for seconds in run.decode],
            }
            for run in runs
        ],
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of times in seconds, in ms."""
    ordered = sorted(value * 1e3 for value in seconds)
    at = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: quantile(ordered, share) for name, share in at.items()}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two values that lie around it."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def write_files(
    args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """--csv and --formatted; their names."""
    lines = [list(COLUMNS), *([_cell(value) for value in row.values()] for row in rows)]
    if args.csv:
        write_whole(Path(args.csv), csv_text(lines), "--csv")
        yield args.csv
        if args.max_batch_under is not None:
            tried = [[*map(_cell, one.get("row", [one["batch"], one["prompt"], one["answer"], *[None] * 6])),
                      "yes" if one["within"] else "no", one["why"]] for one in rounds]  # fmt: skip
            target = rounds_file(Path(args.csv))
            write_whole(target, csv_text([[*COLUMNS[1:10], "Within", "Why"], *tried]), "--csv")
            yield str(target)
    if args.formatted:
        text = "".join("|".join(f"{c:<{w}}" for c, w in zip(line, PADDED, strict=True)) + "\n" for line in lines)
        write_whole(Path(args.formatted), text, "--formatted")
        yield args.formatted


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


# ---- as text


def shown(facts: Mapping[str, Any], searches: Sequence[Search]) -> Iterator[str]:
    """Tables for a terminal. The model is said once, and the averages stand below."""
    made = "made-up weights" if facts["weights"] == "random" else "the checkpoint's weights"
    threads = f", {threads_used()}" if facts["threads"] else ""
    yield (
        f"{facts['model']} on {facts['device']}, {facts['dtype']}, {facts['attention']} attention, "
        f"world size {facts['world_size']}{threads}, {made}"
    )
    runs, before = facts["repeats"], facts["warm_up"]
    yield (
        f"medians of {_count(runs, 'run')}, behind {_count(before, 'run')} that {'is' if before == 1 else 'are'} not "
        f"counted; prompts are random ids (seed {facts['seed']}), and answers go to their full length"
    )
    if searches:
        yield from ("", *shown_rounds(facts["rounds"]))
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in facts["rows"]]
    if rows:
        heads = [
            "batch\nsize", "in\nseq", "out\nseq", "total\ntime\ns", "prefill\nall\nms", "prefill\naverage\nms",
            "non-first\ntoken\nms", "non-first\ntoken\ntokens/s", "E2E\ntokens/s",
        ]  # fmt: skip
        yield ""
        yield from table(heads, [[number(row[name]) for name in COLUMNS[1:10]] for row in rows])
        yield ""
        yield from table(
            ["spread, ms", "in\nseq", "out\nseq", "first token\nmedian", "\np10", "\np90", "non-first\nmedian", "\np10",
             "\np90"],
            [_spread_row(case) for case in facts["cases"]],
        )  # fmt: skip
    for row in rows:
        if row["E2E Throughput Average"] is not None and len(rows) > 1:
            token = row["Non-first token Throughput Average"]
            yield (
                f"batch {row['Batchsize']}, mean of its cases: "
                + (f"{number(token)} tokens/s after the first, " if token else "")
                + f"{number(row['E2E Throughput Average'])} tokens/s in all"
            )
    for one in searches:
        best = [row["Batchsize"] for row in rows if (row["In_seq"], row["Out_seq"]) == (one.prompt, one.answer)]
        limit = f"at most {facts['max_batch_under_ms']:g} ms for a token after the first"
        yield f"[{one.prompt},{one.answer}]: " + (
            f"the largest batch with {limit} is {max(best)} (searched from {one.least} to {one.most})"
            if best
            else f"no batch from {one.least} to {one.most} has {limit}"
        )


def shown_rounds(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from table(
        ["in\nseq", "out\nseq", "batch\nsize", "non-first\ntoken ms", "within"],
        [
            [str(one["prompt"]), str(one["answer"]), str(one["batch"]), number(one["non_first_token_ms"]),
             "yes" if one["within"] else f"no: {one['why']}"]
            for one in rounds
        ],
    )  # fmt: skip


def _spread_row(case: Mapping[str, Any]) -> list[str]:
    found = case["spread"]
    cells = [f"batch {case['batch']}", str(case["prompt"]), str(case["answer"])]
    for name in ("first_token_ms", "non_first_token_ms"):
        cells += [number(found.get(name, {}).get(key)) for key in ("median", "p10", "p90")]
    return cells


def number(value: float | None) -> str:
    """`1.234`, `12.34`, `123.4`, `12345`"""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1 if value < 10000 else 0}f}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def closing(facts: Mapping[str, Any], seconds: float) -> str:
    """`2 measurements in 12.3 s; written: out.csv`"""
    done = len(facts.get("rounds", facts["cases"]))
    written = f"; written: {', '.join(facts['files'])}" if facts["files"] else ""
    return f"{facts['model']}: {_count(done, 'measurement')} in {seconds:.1f} s{written}"
