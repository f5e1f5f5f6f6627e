"""`llmc run`: prompts in, answers out, with what the original scripts print.

Flow: flags -> prompts -> artifact (compiled, or read) -> tokens -> caches sized for them -> weights -> engine -> lines.
Answers and facts go to stdout, everything else to stderr; with --json one object goes to stdout and nothing else.

With several ranks the first process goes as far as the artifact, so that what all ranks would refuse is said before any
of them starts; then it starts them (`launch.py`), and each goes the whole way with that artifact. Rank 0 talks.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import csv
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, parse_json
from llmc.compiler.language.build import load_model
from llmc.compiler.language.checkpoint import (
    check_artifact_config,
    check_config,
    choose_variant,
    ignoring,
    read_config,
    stored_dtype,
)
from llmc.compiler.language.config_keys import KEYS
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.target.device import device as device_profile
from llmc.compiler.target.device import device_names
from llmc.compiler.terminal import columns, fold, generated
from llmc.runtime import binding, npu
from llmc.runtime.engine.blocks import BLOCK_SIZE
from llmc.runtime.engine.engine import Engine, Output, check_prompt
from llmc.runtime.engine.runner import is_paged, make_caches, make_constants
from llmc.runtime.engine.sampling import Sampler, SamplingParams
from llmc.runtime.engine.tokenizer import Tokenizer, eos_ids, load_tokenizer
from llmc.runtime.executor import Executor
from llmc.runtime.flags import DEFAULT_QUESTION, attention_of, check_run_flags, dtype_of, sampling_of, words_of
from llmc.runtime.host_memory import free_memory
from llmc.runtime.hostatb.pages import settle
from llmc.runtime.machine import cpu_isa, cpu_model
from llmc.runtime.ranks import Team
from llmc.runtime.room import Limit, Room, host_limit, make_room, memory_limit, workspace_size
from llmc.runtime.weights import check_directory, load_weights, progress_bar

TORCH_DEVICE = re.compile(r"(?P<kind>cpu|cuda|npu)(?::(?P<index>[0-9]{1,3}))?")
T = TypeVar("T")
Message = dict[str, str]  # {"role": "user", "content": text}
Prompt = str | list[int] | list[Message]


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Everything that `llmc run` does, alone or as one rank of a team; the exit code."""
    with contextlib.ExitStack() as cleanup:
        with silence(team is not None and not team.says_what_is_asked):
            asked = prepare(args, team, cleanup)
        if team is None and asked.artifact.manifest["world_size"] > 1:
            return start_ranks(args, asked, cleanup)
        with silence(team is not None and not team.talks):
            return answer(args, asked, team)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags ask for, as far as it can be known without a device."""

    params: SamplingParams
    tokenizer: Tokenizer | None
    prompts: list[Prompt]  # as given: one that --batch-size repeats is here once
    ids: list[list[int]]
    artifact: artifacts.Artifact


def prepare(args: argparse.Namespace, team: Team | None, cleanup: contextlib.ExitStack) -> Asked:
    """Flags, prompts and the artifact, which lives as long as `cleanup`. UserError for what no rank could do."""
    check_run_flags(args)
    check_world_size(args, team)
    params = SamplingParams(**sampling_of(args))
    if args.use_refactor is not None:
        note("--use-refactor is ignored: there is one code path")
    check_directory(Path(args.model_path))
    config = ignoring(read_config(args.model_path), args.ignore_config or ())
    for key in set(args.ignore_config or ()) & set(KEYS):
        note(f"--ignore-config {key}: without it the answers are another model's ({KEYS[key].does})")
    tokenizer = load_tokenizer(args.model_path) if args.load_tokenizer else None
    prompts = read_prompts(args)
    ids = [encode(prompt, tokenizer, args) for prompt in prompts]
    artifact = _artifact(args, config, cleanup, team)
    sizes = artifact.manifest["sizes"]
    longest = positions_of(args, artifact.manifest)
    for index, prompt in enumerate(ids):
        check_prompt(index, prompt, vocab=sizes.get("vocab"), max_length=longest)
    requests = requests_of(ids, args.batch_size)
    room_for(args, artifact.manifest, requests, params, limit_for(args, artifact.manifest, requests, params, team))
    return Asked(params=params, tokenizer=tokenizer, prompts=prompts, ids=ids, artifact=artifact)


def answer(args: argparse.Namespace, asked: Asked, team: Team | None) -> int:
    """Load, generate, print; the exit code. Of several ranks, rank 0 prints."""
    prompts, ids = replicate(asked.prompts, args.batch_size), replicate(asked.ids, args.batch_size)
    params, talks = asked.params, team is None or team.talks
    use_cpu(args, team)
    start = time.perf_counter()
    engine = make_engine(args, asked.artifact, asked.tokenizer, ids, params, team)
    engine.warm_up()
    settle()
    loading = time.perf_counter() - start
    streamed = streams(args, ids, asked.tokenizer) and talks
    callback = (lambda i, text: print(generated(text, sys.stdout), end="", flush=True)) if streamed else None
    if callback:
        print(generated(f"Question[0]: {shown(prompts[0])}\nAnswer[0]: ", sys.stdout), end="", flush=True)
    bar = talks and not (args.quiet or args.json or streamed)
    try:
        with progress_bar("tokens", len(ids) * params.max_tokens, bar) as advance:
            outputs = engine.generate(ids, params, callback, lambda step: advance(step.tokens_out))
    except KeyboardInterrupt:
        if callback:
            print()  # what was streamed stays a line of its own
        raise
    if not talks:
        return 0
    if args.json:
        print(json.dumps(report(asked.artifact.manifest, prompts, outputs, engine, loading)))
    else:
        print_answers(prompts, outputs, engine, streamed=streamed)
    return 0


def use_cpu(args: argparse.Namespace, team: Team | None) -> None:
    """How many threads compute, and with --verbose what they run on and which kernels are chosen."""
    from llmc.runtime.hostatb.choices import CHOICES

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = team.place.local_world_size if team else 1
    if args.threads:
        torch.set_num_threads(args.threads)
        if args.threads * ranks > cores:
            note(
                f"--threads {args.threads}: with {ranks} rank{'s' * (ranks > 1)} on {cores} cores, threads wait for one"
            )
    if args.verbose:
        note(f"CPU {cpu_model()} ({' '.join(cpu_isa()) or 'no extension known'}), {threads_used()} on {cores} cores")
    CHOICES.tell = note if args.verbose else (lambda line: None)


def threads_used() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def check_world_size(args: argparse.Namespace, team: Team | None) -> None:
    """torchrun has decided how many ranks there are."""
    if team and args.tp not in (None, -1, team.place.world_size):
        raise UserError(
            f"--tp {args.tp}, but torchrun started {team.place.world_size} rank{'s' * (team.place.world_size > 1)}",
            hint="leave --tp out, or start as many ranks (--nproc-per-node, --nnodes)",
        )


def start_ranks(args: argparse.Namespace, asked: Asked, cleanup: contextlib.ExitStack) -> int:
    """The ranks get the artifact, and the prompts as a file: stdin and pipes can be read only once."""
    from llmc.runtime.launch import launch

    folder = Path(cleanup.enter_context(temporary_directory()))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in asked.prompts))
    given = {"input_file": str(folder / "prompts.jsonl"), "input_text": None, "input_ids": None}
    built = {"artifact": str(asked.artifact.path), "graph": None, "tp": asked.artifact.manifest["world_size"]}
    return launch(words_of(argparse.Namespace(**{**vars(args), **given, **built})), world_size=built["tp"])


_silent = contextvars.ContextVar("silent", default=False)


def note(text: str) -> None:
    if not _silent.get():
        print(fold(f"note: {text}", columns(sys.stderr)), file=sys.stderr)


@contextlib.contextmanager
def silence(wanted: bool) -> Iterator[None]:
    """No notes: another process says them."""
    token = _silent.set(wanted)
    try:
        yield
    finally:
        _silent.reset(token)


def streams(args: argparse.Namespace, ids: Sequence[Any], tokenizer: Tokenizer | None) -> bool:
    if args.stream and (len(ids) > 1 or tokenizer is None):
        note("--stream is for the text of one prompt; answers follow when all is done")
    return bool(args.stream and not args.json and len(ids) == 1 and tokenizer)


# ---- prompts


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Texts, or lists of token ids, in the order given."""
    if args.input_ids is not None:
        return [token_ids(text, "--input-ids") for text in args.input_ids]
    if args.input_file is not None:
        return read_input_file(Path(args.input_file))
    return list(args.input_text or [DEFAULT_QUESTION])


def read_input_file(path: Path) -> list[Prompt]:
    """.csv, .npy: a row of token ids a prompt. .jsonl: a prompt or a conversation a line. Else: a question a line."""
    prompts: list[Prompt] = []
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            return _numpy_prompts(path)
        # Only line feeds end a line: JSON texts may hold U+2028. A byte order mark is what Windows editors leave.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError, EOFError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--input-file {path} cannot be read: {why}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match kind:
            case ".csv":
                row = next(csv.reader([line]))
                prompts.append(token_ids(",".join(cell for cell in row if cell.strip()), f"{path}:{number}"))
            case ".jsonl":
                prompts.append(_json_prompt(line, f"{path}:{number}"))
            case _:
                prompts.append(line)
    if not prompts:
        raise UserError(f"--input-file {path} holds no prompt")
    return prompts


def _numpy_prompts(path: Path) -> list[Prompt]:
    import numpy

    array = numpy.load(path, allow_pickle=False)
    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, numpy.ndarray) else "several arrays"
        raise UserError(f"--input-file {path} must hold one or two axes of whole numbers; found {found}")
    if array.size == 0:
        raise UserError(f"--input-file {path} holds no token ids: its shape is {list(array.shape)}")
    return [row.tolist() for row in array.reshape(-1, array.shape[-1])]


def _json_prompt(line: str, place: str) -> Prompt:
    """A string, token ids, a conversation, or an object with one of them as messages, prompt, text, ..."""
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise UserError(f"{place}: {error}") from None
    if isinstance(value, dict):
        value = next(
            (value[key] for key in ("messages", "prompt", "text", "question", "content") if key in value), None
        )
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and (all(type(v) is int for v in value) or all(map(_is_message, value))):
        return value
    raise UserError(
        f'{place} must be a text, token ids, {{"prompt": text}}, or a conversation '
        f'[{{"role": "user", "content": text}}, ...]; found {line[:60]}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def token_ids(text: str, place: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{place} must be token ids with commas between them; found {text[:60]!r}") from None


def replicate(prompts: Sequence[T], batch_size: int | None) -> list[T]:
    """One prompt is repeated; several are their own batch (the original scripts' rule)."""
    if len(prompts) == 1:
        return list(prompts) * (batch_size or 1)
    return list(prompts)


def requests_of(ids: Sequence[Sequence[int]], batch_size: int | None) -> Counter[int]:
    """Tokens of a prompt -> how many of `replicate`'s prompts have so many; nothing is repeated for it."""
    return Counter({len(ids[0]): batch_size or 1}) if len(ids) == 1 else Counter(map(len, ids))


def encode(prompt: Prompt, tokenizer: Tokenizer | None, args: argparse.Namespace) -> list[int]:
    """Token ids. A conversation always goes through the chat template, a text where the flags ask for it."""
    ids = [token for token in prompt if isinstance(token, int)]
    if isinstance(prompt, str) or not ids:
        if tokenizer is None:
            raise UserError("text needs a tokenizer", hint="--input-ids, or leave out --load-tokenizer False")
        if isinstance(prompt, str) and not (args.is_chat_model or args.chat_template or args.system):
            ids = tokenizer.encode(prompt)
        else:
            text = tokenizer.chat(conversation(prompt, args.system), template=_template(args))
            ids = tokenizer.encode(text, special=False)
    if args.max_input_length and len(ids) > args.max_input_length:
        note(f"a prompt of {len(ids)} tokens is cut to its first {args.max_input_length} (--max-input-length)")
    return ids[: args.max_input_length]


def conversation(prompt: Any, system: str | None) -> list[Message]:
    """The messages for the chat template; a system message of the prompt's own stays."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _template(args: argparse.Namespace) -> str | None:
    """A file's content, or the text itself."""
    text = args.chat_template
    if text and "{" not in text:
        try:
            return Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--chat-template {text} cannot be read: {why}") from None
    return text


# ---- artifact and engine


def _artifact(
    args: argparse.Namespace, config: Mapping[str, Any], cleanup: contextlib.ExitStack, team: Team | None
) -> artifacts.Artifact:
    """The artifact given, or one compiled now for the checkpoint into a directory that ends with the run."""
    world_size = team.place.world_size if team else None if args.tp == -1 else args.tp
    config_path = str(Path(args.model_path) / "config.json")
    if args.artifact is not None:
        artifact = _as_asked(args, artifacts.read(Path(args.artifact)), world_size)
        check_artifact_config(artifact.manifest, config, config_path)
        return artifact
    graph = choose_variant(config, config_path) if args.graph is None else args.graph
    allow_extends = tuple(args.allow_extends or ())
    check_config(load_model(graph, allow_extends), config, config_path)
    device = args.device or default_device(args.torch_device)
    ask = on_npu(device) and world_size != 1 and len(device_profile(device).backends) > 1
    options = Options(
        device=device,
        dtype=dtype_of(args) or stored_dtype(config),
        attention=attention_of(args),
        world_size=world_size,
        backend=args.backend or (npu.backend(one_host=team is None or team.place.one_host) if ask else None),
        allow_unsupported=args.allow_unsupported,
        allow_extends=allow_extends,
    )
    target = Path(cleanup.enter_context(temporary_directory())) / "artifact"
    artifacts.write(compile_model(graph, options, every_layer=False), target)
    return artifacts.read(target)


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="llmc-")
    except OSError as error:
        raise UserError(
            f"no temporary directory for the generated code: {error.strerror or error}",
            hint="set TMPDIR to a place that can be written, or run what `llmc compile` wrote (--artifact)",
        ) from None


def _as_asked(args: argparse.Namespace, artifact: artifacts.Artifact, world_size: int | None) -> artifacts.Artifact:
    """An artifact is what it was compiled to be; flags that ask for something else are a mistake."""
    silent = (args.attention, args.is_flash_causal_lm, args.is_flash_model) == (None, None, None)
    asked = {
        "device": args.device,
        "dtype": dtype_of(args),
        "attention": None if silent else attention_of(args),
        "world_size": world_size,
        "backend": args.backend,
    }
    words = {"world_size": "world size"}
    problems = [
        f"it was compiled for {words.get(key, key)} {artifact.manifest[key]}, and {value} is asked for"
        for key, value in asked.items()
        if value not in (None, artifact.manifest[key]) and artifact.manifest[key] != ""  # one rank has no backend
    ]
    if problems:
        raise UserError(f"artifact {artifact.path}: {'; '.join(problems)}", hint="leave the flag out, or compile again")
    return artifact


def on_npu(device: str) -> bool:
    """Whether what is compiled for this device will run on an NPU of this machine."""
    return device != "host" and npu.available()


def default_device(torch_device: str | None) -> str:
    """This host's NPU where torch_npu and torch_atb are installed and no other place is asked for, else the host."""
    elsewhere = torch_device is not None and not torch_device.startswith("npu")
    if elsewhere or not npu.available():
        return "host"
    chip = npu.installed_chip()
    return next((name for name in device_names() if device_profile(name).chip == chip), "atlas-800i-a2")


def open_device(
    manifest: Mapping[str, Any], wanted: str | None, team: Team | None
) -> tuple[ModuleType, torch.device, dict[str, Any]]:
    """torch_atb where an NPU is asked for or there, else hostatb under the rules of the artifact's chip; where tensors
    live; and what the collectives of this rank are built with."""
    ranks: dict[str, Any] = {"rank": team.place.rank, "comm_domain": team.place.comm_domain} if team else {}
    place = TORCH_DEVICE.fullmatch(wanted or "")
    if wanted is not None and not place:
        raise UserError(f"--torch-device {wanted}: expected cpu, cuda, cuda:N, npu or npu:N")
    npu_wanted = place["kind"] == "npu" if place else on_npu(manifest["device"])
    if npu_wanted and manifest["device"] == "host":
        raise UserError(f"--torch-device {wanted}: this code is for host", hint="--device atlas-800i-a2")
    index = int(place["index"]) if place and place["index"] else None
    if npu_wanted:
        target = device_profile(manifest["device"])
        profile = target.environment
        atb = npu.load({**profile.get("common", {}), **profile.get(manifest["attention"], {})})
        if team and team.place.local_world_size > 1 and index is not None:
            raise UserError(
                f"--torch-device {wanted}: each of {team.place.local_world_size} ranks needs an NPU of its own",
                hint="--torch-device npu; ASCEND_RT_VISIBLE_DEVICES chooses which",
            )
        own = (team.place.local_rank if team else 0) if index is None else index
        npu.set_device(own, nz="nz" in target.formats.values())
        bound = binding.bind(range(team.place.local_world_size) if team else [own], own)
        if bound and bound.why:
            note(str(bound))
        npu.check_chip(manifest["chip"])
        if team and not team.alone:
            ranks["rank_table_file"] = npu.check_backend(manifest["backend"], one_host=team.place.one_host)
        return atb, npu.device(), ranks
    from llmc.runtime import hostatb

    if manifest["device"] != "host":
        note(f"no NPU here: the code for {manifest['device']} runs on hostatb, which computes what the chip computes")
    if wanted == "cuda" and team:
        wanted = f"cuda:{team.place.local_rank % max(1, torch.cuda.device_count())}"
    try:
        return hostatb, torch.empty(0, device=wanted or "cpu").device, ranks
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--torch-device {wanted}: {str(error).splitlines()[0]}") from None


def make_engine(
    args: argparse.Namespace,
    artifact: artifacts.Artifact,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    team: Team | None = None,
) -> Engine:
    """Weights and caches in place, and the ranks together."""
    manifest = artifact.manifest
    limit = manifest["sizes"]["max_positions"]
    if args.max_position_embeddings and args.max_position_embeddings > limit:
        note(f"--max-position-embeddings {args.max_position_embeddings}: the model has {limit}, which stays the limit")
    limit = positions_of(args, manifest)
    if max(map(len, prompts)) < limit < max(map(len, prompts)) + params.max_tokens:
        note(f"answers end where a sequence has {limit} tokens in all, prompt included")
    requests = Counter(map(len, prompts))
    bound = limit_for(args, manifest, requests, params, team)
    room = room_for(args, manifest, requests, params, bound)
    atb, device, ranks = open_device(manifest, args.torch_device, team)
    if device.type == "npu" and room.workspace:
        npu.set_workspace(atb, workspace_size(room, device_profile(manifest["device"])))
    if team:
        team.meet()
        if bound and bound.host:  # each rank has measured for itself, and all must take the same steps
            room = room_for(args, manifest, requests, params, replace(bound, usable=team.least(bound.usable)))
    if room.note:
        note(room.note)
    if not (bound and bound.host):
        note_memory(manifest["memory"]["weight_bytes"] * (team.place.local_world_size if team else 1), device)
    caches = make_caches(manifest, room.sizes, device)
    weights = load_weights(
        manifest["weights"],
        args.model_path,
        splits=manifest["splits"],
        unused=manifest["unused"],
        device=device,
        rank=team.place.rank if team else 0,
        progress=(team is None or team.talks) and not (args.quiet or args.json),
    )
    constants = make_constants(manifest, limit, device)
    executor = Executor(artifact, atb, weights=weights, constants=constants, caches=caches, **ranks)
    if is_paged(manifest):
        limit = min(limit, room.sizes["N"] * BLOCK_SIZE)
    elif args.num_blocks:
        note("--num-blocks is for the paged cache; flash attention has a row a sequence")
    return Engine(
        {**manifest, "eos_token_ids": sorted(eos_ids(Path(args.model_path)))},
        executor,
        tokenizer,
        caches=caches,
        max_batch=room.max_batch,
        max_prefill_tokens=room.prefill_tokens,
        max_length=limit,
        device=device,
        sampler=team.sampler(Sampler()) if team else None,
    )


def limit_for(
    args: argparse.Namespace,
    manifest: Mapping[str, Any],
    requests: Counter[int],
    params: SamplingParams,
    team: Team | None,
) -> Limit | None:
    """What a rank may use: what the user or the device's profile says, else the free memory where tensors live on the
    host. UserError where the requests alone are more than that."""
    target = device_profile(manifest["device"])
    profile = target.environment.get("common", {}) if on_npu(target.name) else {}
    host = host_limit(
        free_memory(),
        team.place.local_world_size if team else manifest["world_size"],
        requests,
        answer=params.max_tokens,
        positions=positions_of(args, manifest),
    )
    said = memory_limit(
        args.memory,
        target,
        {**profile, **os.environ},
        attention=manifest["attention"],
        backend=manifest["backend"] if manifest["world_size"] > 1 else "",
    )
    place = TORCH_DEVICE.fullmatch(args.torch_device or "")
    elsewhere = place["kind"] != "cpu" if place else on_npu(target.name)
    return said if said or elsewhere else host


def positions_of(args: argparse.Namespace, manifest: Mapping[str, Any]) -> int:
    """The longest sequence of this run."""
    most = manifest["sizes"]["max_positions"]
    return min(most, args.max_position_embeddings or most)


def room_for(
    args: argparse.Namespace,
    manifest: Mapping[str, Any],
    requests: Counter[int],
    params: SamplingParams,
    limit: Limit | None,
) -> Room:
    """The cache and the batch: the whole batch at its longest, unless --num-blocks or the memory says less. UserError
    where what is asked for does not fit. `requests`: tokens of a prompt -> how many."""
    return make_room(
        manifest,
        requests,
        answer=params.max_tokens,
        max_batch=args.batch_size or requests.total(),
        positions=positions_of(args, manifest),
        blocks=args.num_blocks,
        prefill_tokens=args.max_prefill_tokens if args.max_prefill_tokens > 0 else None,
        limit=limit,
    )


def note_memory(needed: int, device: torch.device) -> None:
    """Loading more than there is does not fail on Linux: the system kills the process, without a word."""
    free = free_memory()
    if device.type == "cpu" and free is not None and needed > free:
        note(f"the weights need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")


# ---- what is printed


def timing(outputs: Sequence[Output], engine: Engine) -> dict[str, float]:
    """Prefill: all prefill steps. Per token: the mean decode step, of the whole batch. Rates: tokens / time. A sequence
    that lost its cache to others is read again, and counts again."""
    prefill = sum(s.seconds for s in engine.steps if s.phase == "prefill")
    read = sum(s.tokens_in for s in engine.steps if s.phase == "prefill")
    decode = [s for s in engine.steps if s.phase == "decode"]
    decode_s, decoded = sum(s.seconds for s in decode), sum(s.tokens_out for s in decode)
    generated = sum(o.generated_tokens for o in outputs)
    return {
        "prefill_ms": prefill * 1e3,
        "prefill_tokens_per_s": read / prefill if prefill else 0.0,
        "decode_ms_per_token": decode_s / len(decode) * 1e3 if decode else 0.0,
        "decode_tokens_per_s": decoded / decode_s if decode_s else 0.0,
        "tokens_per_s": generated / (prefill + decode_s) if generated else 0.0,
        "total_ms": (prefill + decode_s) * 1e3,
    }


def shown(prompt: Prompt) -> str:
    """Texts and token ids as they are typed; of a conversation the last message."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return last["content"] if isinstance(last, dict) else ",".join(map(str, prompt))


def print_answers(prompts: Sequence[Prompt], outputs: Sequence[Output], engine: Engine, *, streamed: bool) -> None:
    for output in outputs:
        i = output.index
        if streamed:
            print()
        else:
            answer = output.text if engine.tokenizer else ",".join(map(str, output.token_ids))
            print(generated(f"Question[{i}]: {shown(prompts[i])}\nAnswer[{i}]: {answer}", sys.stdout))
        print(f"Generate[{i}] token num: {output.generated_tokens}")
        print(f"Input[{i}] token num: {output.prompt_tokens}, finished by {output.finish_reason}")
    t = timing(outputs, engine)
    decode = f"decode {t['decode_ms_per_token']:.2f} ms per token ({t['decode_tokens_per_s']:.1f} tokens/s)"
    closing = (
        f"prefill {t['prefill_ms']:.1f} ms ({t['prefill_tokens_per_s']:.1f} tokens/s), "
        f"{decode if t['decode_tokens_per_s'] else 'no decode step'}, "
        f"all {t['total_ms']:.1f} ms ({t['tokens_per_s']:.1f} tokens/s)"
        f"{f', {threads_used()}' if on_cpu(engine) else ''}"
    )
    print(fold(closing, columns(sys.stdout)))


def on_cpu(engine: Engine) -> bool:
    return next(iter(engine.runner.caches.values())).device.type == "cpu"


def report(
    manifest: Mapping[str, Any], prompts: Sequence[Prompt], outputs: Sequence[Output], engine: Engine, loading: float
) -> dict[str, Any]:
    """The --json object."""
    return {
        "ok": True,
        **{key: manifest[key] for key in ("model", "device", "dtype", "attention", "world_size")},
        "threads": torch.get_num_threads() if on_cpu(engine) else None,
        "outputs": [
            {
                "index": o.index,
                "prompt": prompts[o.index],
                "text": o.text,
                "token_ids": o.token_ids,
                "prompt_tokens": o.prompt_tokens,
                "generated_tokens": o.generated_tokens,
                "finish_reason": o.finish_reason,
                "first_token_ms": o.first_token_s * 1e3,
                "token_ms": [s * 1e3 for s in o.token_s],
            }
            for o in outputs
        ],
        "timing": {"load_ms": loading * 1e3, **timing(outputs, engine)},
    }
