"""Logits of each step against those of another program, teacher-forced: the original stack's "simplified" check.

    llmc eval --model-path W --golden DIR                                 # Pass or Fail, and how far apart
    llmc eval --model-path W --golden-out DIR --input-file prompts.txt    # write such a directory
    llmc eval --model-path W --golden-out DIR --golden-from transformers --input-text "Once upon a time"

A directory of goldens holds a batch of B sequences: for each step n `logits_{n}.pth` [B, vocab] and `tokens_{n}.pth`
[B], the tokens that were chosen there, and `input_ids_{i}.pth` [tokens], the prompt of sequence i, unless flags give
the prompts. Or it holds numbered directories of that kind, a batch each. What runs here are the steps of a generation,
prefill and decode, in which each chosen token is the golden one.

KL(golden || ours) of each step's distributions, in float64, up to and with the step that chose an end token. It passes
where no step has more than --max-kl, and at most the share --max-error-rate has more than --step-kl. Files, thresholds
and columns: mindie-stack reference section 8.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.checkpoint_files import present
from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import check_target, csv_text, write_whole
from llmc.compiler.language.checkpoint import stored_dtype
from llmc.compiler.terminal import table
from llmc.runtime.engine.engine import Engine, check_prompt
from llmc.runtime.engine.sampling import Samples, SamplingParams, SamplingState
from llmc.runtime.engine.tokenizer import eos_ids
from llmc.runtime.flags import dtype_of, spellings
from llmc.runtime.foreign import quiet_transformers
from llmc.runtime.prompts import as_file, prompt_ids
from llmc.runtime.ranks import Team
from llmc.runtime.room import Limit, Room
from llmc.runtime.session import checkpoint_config, engine_in, limit_for, positions_of, room_for
from llmc.runtime.weights import progress_bar

COLUMNS = ("Model", "Dataset", "Batchsize", "Logits Num", "Greatest KLL", "Error Rate", "Result")
MOST_IDS = 1 << 24
FILES_HELD = 4  # of logits: sequences of a batch are at the same step, or nearly so
INPUTS = ("input_text", "input_ids", "input_file")
MAKERS = ("llmc", "transformers")


# ---- what lies in a directory


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A batch. `tokens`: step -> of each sequence; `counted`: of each sequence, its steps up to the end token."""

    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    counted: list[int]
    held: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)

    def logits(self, step: int, vocab: int) -> torch.Tensor:
        """[B, vocab]"""
        if step not in self.held:
            path, shape = self.folder / f"logits_{step}.pth", (len(self.prompts), vocab)
            found = read_tensor(path)
            if found.shape != shape or not found.is_floating_point():
                raise UserError(f"{path}: expected logits {list(shape)}; found {_described(found)}")
            if len(self.held) == FILES_HELD:
                del self.held[next(iter(self.held))]
            self.held[step] = found
        return self.held[step]


def read_tensor(path: Path) -> torch.Tensor:
    """A tensor that torch.save wrote; nothing else of the file is unpickled."""
    if not present(path):
        raise UserError(f"{path}: there is no such file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none makes torch raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read as a tensor: {why}") from None
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        raise UserError(f"{path}: expected a dense tensor; found a {type(found).__name__}")
    return found


def read_ids(path: Path, sequences: int | None = None) -> list[int]:
    found = read_tensor(path)
    whole = found.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if not whole or not 0 < found.numel() <= MOST_IDS or found.numel() != (sequences or found.numel()):
        what = f"{sequences} token ids" if sequences else "token ids"
        raise UserError(f"{path}: expected {what}; found {_described(found)}")
    ids: list[int] = found.flatten().tolist()
    if min(ids) < 0:
        raise UserError(f"{path} holds the token id {min(ids)}")
    return ids


def _described(found: torch.Tensor) -> str:
    return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"


def read_goldens(path: Path, prompts: Sequence[list[int]] | None, ends: frozenset[int]) -> list[Golden]:
    """The batches, with prompts from the files, or those given, one after the other."""
    if not path.is_dir():
        raise UserError(f"--golden {path}: there is no such directory")
    numbered = sorted(
        (one for one in path.iterdir() if one.name.isdecimal() and one.is_dir()), key=lambda p: int(p.name)
    )
    rest = None if prompts is None else list(prompts)
    found = [read_golden(folder, rest, ends) for folder in numbered or [path]]
    if rest:
        raise UserError(f"--golden {path}: {len(rest)} prompts are left over", hint="one for each sequence, in order")
    return found


def read_golden(folder: Path, rest: list[list[int]] | None, ends: frozenset[int]) -> Golden:
    """`rest`: prompts, of which this batch takes its own."""
    tokens: list[list[int]] = []
    for step in count():
        there = [present(folder / f"{kind}_{step}.pth") for kind in ("tokens", "logits")]
        if there == [False, False]:
            break
        tokens.append(read_ids(folder / f"tokens_{step}.pth", len(tokens[0]) if tokens else None))
    if not tokens:
        raise UserError(
            f"{folder}: there is no logits_0.pth with a tokens_0.pth", hint="--golden-out DIR writes such files"
        )
    sequences = len(tokens[0])
    if rest is None:
        prompts = [read_ids(folder / f"input_ids_{i}.pth") for i in range(sequences)]
    elif len(rest) < sequences:
        raise UserError(f"{folder} has {sequences} sequences, and {len(rest)} prompts are left for them")
    else:
        prompts = [rest.pop(0) for _ in range(sequences)]
    end = [next((n for n, step in enumerate(tokens) if step[i] in ends), len(tokens) - 1) for i in range(sequences)]
    return Golden(folder=folder, prompts=prompts, tokens=tokens, counted=[n + 1 for n in end])


# ---- the check


def divergence(golden: torch.Tensor, ours: torch.Tensor) -> float:
    """KL(golden || ours) of logits [vocab], in nats."""
    p, q = (logits.double().log_softmax(dim=-1) for logits in (golden, ours.to(golden.device)))
    possible = p != -math.inf  # 0 log 0 is 0
    return (p.exp() * (p - q))[possible].sum().item()


class Forced:
    """Chooses the golden tokens, and compares the logits that it is given, `compare(sequence, step, logits)`."""

    def __init__(
        self, golden: Golden, params: Sequence[SamplingParams], compare: Callable[[int, int, torch.Tensor], None]
    ) -> None:
        self.golden, self.compare = golden, compare
        self.number = {id(one): i for i, one in enumerate(params)}

    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        chosen = []
        for row, state in zip(logits, states, strict=True):
            i, step = self.number[id(state.params)], len(state.token_ids) - state.prompt_len
            self.compare(i, step, row)
            chosen.append(self.golden.tokens[step][i])
        return chosen


def requests_for(steps: Sequence[int]) -> list[SamplingParams]:
    """One a sequence; each is an object of its own, by which a sampler knows the sequence."""
    return [SamplingParams(max_tokens=n, ignore_eos=True) for n in steps]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a check and a recording have in common: sequences with prompts and steps, and an engine for them."""

    artifact: artifacts.Artifact
    prompts: list[list[int]]  # of all batches
    given: bool  # whether flags gave them
    steps: int
    batch: int  # sequences at a time

    def flags(self, folder: Path) -> dict[str, Any]:
        return as_file(self.prompts, folder) if self.given else {}

    def limit(self, args: argparse.Namespace, team: Team | None) -> Limit | None:
        return limit_for(args, self.artifact.manifest, Counter(map(len, self.prompts)), self.steps, team)

    def room(self, args: argparse.Namespace, limit: Limit | None) -> Room:
        requests = Counter(map(len, self.prompts))
        return room_for(args, self.artifact.manifest, requests, self.steps, limit, batch=self.batch)

    def engine(self, args: argparse.Namespace, team: Team | None) -> Engine:
        return engine_in(args, self.artifact, None, partial(self.room, args), self.limit(args, team), team)

    def fits(self, args: argparse.Namespace, team: Team | None) -> None:
        """UserError where a sequence has more tokens than the model, or one that it does not know."""
        manifest = self.artifact.manifest
        positions = positions_of(args, manifest)
        for index, prompt in enumerate(self.prompts):
            check_prompt(index, prompt, vocab=manifest["sizes"].get("vocab"), max_length=positions + 1 - self.steps)
        self.room(args, self.limit(args, team))


@dataclass(frozen=True, kw_only=True)
class Check(Generation):
    """Steps of golden batches, and what is accepted."""

    goldens: list[Golden]
    dataset: str
    max_kl: float
    step_kl: float
    max_error_rate: float
    source: str
    csv: str | None

    unit = "tokens"

    @property
    def total(self) -> int:
        return sum(sum(golden.counted) for golden in self.goldens)

    def run(self, engine: Engine, advance: Callable[[int], None], *, talks: bool = True) -> dict[str, Any]:
        found: list[tuple[float, dict[str, Any]]] = []

        def compare(golden: Golden, i: int, step: int, ours: torch.Tensor) -> None:
            if not talks:
                return
            theirs = golden.logits(step, len(ours))[i]
            kl = divergence(theirs, ours)
            place = {"folder": str(golden.folder), "sequence": i, "step": step}
            if math.isnan(kl):
                whose = "golden logits" if theirs.isnan().any() else "logits"
                raise UserError(f"{golden.folder}: the {whose} of sequence {i} at step {step} hold NaN")
            found.append((kl, place))

        for golden in self.goldens:
            params = requests_for(golden.counted)
            engine.sampler = Forced(golden, params, partial(compare, golden))
            engine.generate(golden.prompts, params, on_step=lambda step: advance(step.tokens_out))
        if not talks:
            return {}
        worst, place = max(found, key=lambda one: one[0])
        errors = sum(kl > self.step_kl for kl, _ in found)
        rate = errors / len(found)
        passed = worst <= self.max_kl and rate <= self.max_error_rate
        values = (self.artifact.manifest["model"], self.dataset, self.batch, len(found), worst, rate,
                  "Pass" if passed else "Fail")  # fmt: skip
        if self.csv:
            write_whole(Path(self.csv), csv_text([COLUMNS, map(_cell, values)]), "--csv")
        return {
            "golden": self.source,
            "dataset": self.dataset,
            "batch_size": self.batch,
            "logits": len(found),
            "greatest_kl": worst if math.isfinite(worst) else None,
            "worst": place,
            "errors": errors,
            "error_rate": rate,
            "max_kl": self.max_kl,
            "step_kl": self.step_kl,
            "max_error_rate": self.max_error_rate,
            "columns": list(COLUMNS),
            "rows": [[value if value != math.inf else None for value in values]],
            "files": [self.csv] if self.csv else [],
            "passed": passed,
        }

    def lines(self, facts: Mapping[str, Any]) -> Iterator[str]:
        yield from table(COLUMNS, [[_cell(value) for value in row] for row in facts["rows"]], left=2)
        at = facts["worst"]
        yield f"furthest apart: step {at['step']} of sequence {at['sequence']} in {at['folder']}"
        written = "".join(f"; written: {name}" for name in facts["files"])
        yield (
            f"{facts['rows'][0][-1]}: {facts['errors']} of {facts['logits']} steps have a KL above "
            f"{facts['step_kl']:g} ({facts['max_error_rate']:.2%} may), and none may have more than "
            f"{facts['max_kl']:g}{written}"
        )


def _cell(value: Any) -> str:
    if value is None:
        return "inf"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def problems(args: argparse.Namespace) -> Iterator[str]:
    for name in ("max_kl", "step_kl", "max_error_rate"):
        if not getattr(args, name) >= 0:
            yield f"{spellings(name)[0]} {getattr(args, name):g}: expected 0 or more"
    yield from input_problems(args)


def input_problems(args: argparse.Namespace) -> Iterator[str]:
    given = [name for name in INPUTS if getattr(args, name) is not None]
    if len(given) > 1:
        yield f"{' and '.join(spellings(name)[0] for name in given)} cannot be used together"
    for name in ("window", "stride"):
        if getattr(args, name) is not None:
            yield f"{spellings(name)[0]} is for --text"


def given_prompts(args: argparse.Namespace) -> list[list[int]] | None:
    """As token ids; None where no flag gives any."""
    if all(getattr(args, name) is None for name in INPUTS):
        return None
    return prompt_ids(args)


def prepare(args: argparse.Namespace, make: Callable[[], artifacts.Artifact], team: Team | None) -> Check:
    """Read the goldens' tokens and prompts. UserError for what no rank could do."""
    path = Path(args.golden)
    if args.csv:
        check_target(Path(args.csv), "--csv")
    prompts = given_prompts(args)
    goldens = read_goldens(path, prompts, eos_ids(Path(args.model_path)))
    artifact = make()
    vocab = artifact.manifest["sizes"].get("vocab")
    for golden in goldens:
        most = max(max(step) for step in golden.tokens)
        if vocab and most >= vocab:
            raise UserError(f"{golden.folder} has the token id {most}; the model knows 0 to {vocab - 1}")
        if vocab:
            golden.logits(0, vocab)
    named = path.resolve()
    named = named.parent if named.name.removeprefix("batch").isdecimal() else named
    check = Check(
        artifact=artifact,
        prompts=[prompt for golden in goldens for prompt in golden.prompts],
        given=prompts is not None,
        steps=max(max(golden.counted) for golden in goldens),
        batch=args.batch_size or max(len(golden.prompts) for golden in goldens),
        goldens=goldens,
        dataset=args.dataset or named.name,
        max_kl=args.max_kl,
        step_kl=args.step_kl,
        max_error_rate=args.max_error_rate,
        source=args.golden,
        csv=args.csv,
    )
    check.fits(args, team)
    return check


# ---- goldens of our own


class Writer:
    """Writes a batch of `sequences` step by step, in whatever order its rows come."""

    def __init__(self, folder: Path, prompts: Sequence[Sequence[int]]) -> None:
        self.folder, self.sequences = folder, len(prompts)
        self.rows: dict[int, dict[int, tuple[torch.Tensor, int]]] = {}
        for i, prompt in enumerate(prompts):
            torch.save(torch.tensor(prompt), folder / f"input_ids_{i}.pth")

    def add(self, i: int, step: int, logits: torch.Tensor, token: int) -> None:
        rows = self.rows.setdefault(step, {})
        rows[i] = logits.detach().to("cpu", copy=True), token
        if len(rows) == self.sequences:
            ordered = [rows[i] for i in range(self.sequences)]
            torch.save(torch.stack([logits for logits, _ in ordered]), self.folder / f"logits_{step}.pth")
            torch.save(torch.tensor([token for _, token in ordered]), self.folder / f"tokens_{step}.pth")
            del self.rows[step]


class Recorded:
    """Another sampler's choice, written down."""

    def __init__(self, inner: Samples, params: Sequence[SamplingParams], add: Callable[..., None]) -> None:
        self.inner, self.add = inner, add
        self.number = {id(one): i for i, one in enumerate(params)}

    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        chosen = self.inner.sample(logits, states)
        for row, state, token in zip(logits, states, chosen, strict=True):
            self.add(self.number[id(state.params)], len(state.token_ids) - state.prompt_len, row, token)
        return chosen


def check_folder(target: Path) -> None:
    """UserError where a directory of files cannot appear."""
    check_target(target / "logits_0.pth", "--golden-out")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--golden-out {target}: it is there already, and not empty")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A directory that takes its name when it is complete."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            os.replace(new, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}", hint="another --golden-out") from None


@dataclass(frozen=True, kw_only=True)
class Recording(Generation):
    """Greedy answers whose logits are written."""

    target: Path

    unit = "tokens"

    @property
    def total(self) -> int:
        return self.steps * len(self.prompts)

    def run(self, engine: Engine, advance: Callable[[int], None], *, talks: bool = True) -> dict[str, Any]:
        params = requests_for([self.steps] * len(self.prompts))
        with contextlib.ExitStack() as stack:
            if talks:
                writer = Writer(stack.enter_context(new_folder(self.target)), self.prompts)
                engine.sampler = Recorded(engine.sampler, params, writer.add)
            engine.generate(self.prompts, params, on_step=lambda step: advance(step.tokens_out))
        return facts_of(self.target, self.prompts, self.steps)

    def lines(self, facts: Mapping[str, Any]) -> Iterator[str]:
        yield said_of(facts)


def facts_of(target: Path, prompts: Sequence[Any], steps: int, maker: str = "llmc") -> dict[str, Any]:
    return {"golden_out": str(target), "golden_from": maker, "sequences": len(prompts), "steps": steps}


def said_of(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['golden_out']}: logits and tokens of {facts['steps']} steps of {facts['sequences']} sequences, written"
    )


def record_problems(args: argparse.Namespace) -> Iterator[str]:
    if args.golden_from not in MAKERS:
        yield f"--golden-from {args.golden_from}: expected {' or '.join(MAKERS)}"
    yield from input_problems(args)


def prepare_recording(args: argparse.Namespace, make: Callable[[], artifacts.Artifact], team: Team | None) -> Recording:
    target = Path(args.golden_out)
    if team is None or team.talks:
        check_folder(target)
    prompts = given_prompts(args)
    if prompts is None:
        raise UserError("--golden-out needs prompts", hint="--input-text, --input-ids or --input-file")
    recording = Recording(
        artifact=make(), prompts=prompts, given=True, steps=args.max_output_length,
        batch=args.batch_size or len(prompts), target=target,
    )  # fmt: skip
    recording.fits(args, team)
    return recording


@torch.no_grad()
def record_transformers(args: argparse.Namespace, progress: bool) -> dict[str, Any]:
    """Greedy answers of transformers, each sequence alone, in the dtype asked for."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("--golden-from transformers: it is not installed", hint="pip install 'llmc[convert]'")
    from llmc.runtime.measure.reference import load

    target, config = Path(args.golden_out), checkpoint_config(args)
    check_folder(target)
    prompts = given_prompts(args)
    if prompts is None:
        raise UserError("--golden-out needs prompts", hint="--input-text, --input-ids or --input-file")
    model = load(Path(args.model_path), getattr(torch, dtype_of(args) or stored_dtype(config) or "float32"))
    for index, prompt in enumerate(prompts):
        longest = model.config.max_position_embeddings + 1 - args.max_output_length
        check_prompt(index, prompt, vocab=model.config.vocab_size, max_length=longest)
    total = len(prompts) * args.max_output_length
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder(target))
        advance = stack.enter_context(progress_bar("tokens", total, progress))
        stack.enter_context(quiet_transformers())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # past_key_values has another name in newer versions
        writer = Writer(folder, prompts)
        ids = [torch.tensor([prompt]) for prompt in prompts]
        caches: list[Any] = [None] * len(prompts)
        for step in range(args.max_output_length):
            for i in range(len(prompts)):
                made = model(ids[i], past_key_values=caches[i], use_cache=True)
                logits, caches[i] = made.logits[0, -1], made.past_key_values
                token = int(logits.argmax())
                writer.add(i, step, logits, token)
                ids[i] = torch.tensor([[token]])
                advance(1)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        **facts_of(target, prompts, args.max_output_length, "transformers"),
    }
