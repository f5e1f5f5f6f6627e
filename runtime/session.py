"""From flags to a working engine: what every command that runs a checkpoint has in common.

Flow: flags -> artifact (compiled, or read) -> caches sized for the requests -> weights -> engine.

With several ranks the first process goes as far as the artifact, so that what all ranks would refuse is said before any
of them starts; then it starts them (`launch.py`), and each goes the whole way with that artifact. Rank 0 talks.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.diagnostics import UserError
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
from llmc.compiler.terminal import columns, fold
from llmc.runtime import binding, npu
from llmc.runtime.engine.blocks import BLOCK_SIZE
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.runner import is_paged, make_caches, make_constants
from llmc.runtime.engine.sampling import Sampler, SamplingParams
from llmc.runtime.engine.tokenizer import Tokenizer, eos_ids
from llmc.runtime.executor import Executor
from llmc.runtime.flags import attention_of, dtype_of, logits_of
from llmc.runtime.host_memory import free_memory
from llmc.runtime.machine import cores, cpu_isa, cpu_model
from llmc.runtime.ranks import Team
from llmc.runtime.room import Limit, Room, host_limit, make_room, memory_limit, workspace_size
from llmc.runtime.weights import check_directory, load_weights

TORCH_DEVICE = re.compile(r"(?P<kind>cpu|cuda|npu)(?::(?P<index>[0-9]{1,3}))?")


class Prepared(Protocol):
    """What a command knows before a device is touched."""

    @property
    def artifact(self) -> artifacts.Artifact: ...


P = TypeVar("P", bound=Prepared)


def work(
    args: argparse.Namespace,
    team: Team | None,
    *,
    prepare: Callable[[argparse.Namespace, Team | None, contextlib.ExitStack], P],
    words: Callable[[argparse.Namespace, P, Path], Sequence[str]],
    answer: Callable[[argparse.Namespace, P, Team | None], int],
) -> int:
    """A command, alone or as one rank of a team; the exit code. `prepare`: UserError for what no rank could do; what it
    makes lives until the end. `words`: the command line of a rank, which may read files that it writes to a folder.
    `answer`: load, compute, print."""
    with contextlib.ExitStack() as cleanup:
        with silence(team is not None and not team.says_what_is_asked):
            asked = prepare(args, team, cleanup)
        if team is None and asked.artifact.manifest["world_size"] > 1:
            from llmc.runtime.launch import launch

            folder = Path(cleanup.enter_context(temporary_directory()))
            return launch(words(args, asked, folder), world_size=asked.artifact.manifest["world_size"])
        with silence(team is not None and not team.talks):
            return answer(args, asked, team)


def built(artifact: artifacts.Artifact) -> dict[str, Any]:
    """The flags of a rank that say what its first process has compiled."""
    return {"artifact": str(artifact.path), "graph": None, "tp": artifact.manifest["world_size"]}


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


def use_cpu(args: argparse.Namespace, team: Team | None) -> None:
    """How many threads compute, and with --verbose what they run on and which kernels are chosen."""
    from llmc.runtime.hostatb.choices import CHOICES

    count, ranks = cores(), team.place.local_world_size if team else 1
    if args.threads:
        torch.set_num_threads(args.threads)
        if args.threads * ranks > count:
            note(
                f"--threads {args.threads}: with {ranks} rank{'s' * (ranks > 1)} on {count} cores, threads wait for one"
            )
    if args.verbose:
        note(f"CPU {cpu_model()} ({' '.join(cpu_isa()) or 'no extension known'}), {threads_used()} on {count} cores")
    CHOICES.tell = note if args.verbose else (lambda line: None)


def threads_used() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def on_cpu(engine: Engine) -> bool:
    return next(iter(engine.runner.caches.values())).device.type == "cpu"


def check_world_size(args: argparse.Namespace, team: Team | None) -> None:
    """torchrun has decided how many ranks there are."""
    if team and args.tp not in (None, -1, team.place.world_size):
        raise UserError(
            f"--tp {args.tp}, but torchrun started {team.place.world_size} rank{'s' * (team.place.world_size > 1)}",
            hint="leave --tp out, or start as many ranks (--nproc-per-node, --nnodes)",
        )


def checkpoint_config(args: argparse.Namespace) -> Mapping[str, Any]:
    """config.json of the checkpoint, less the keys that --ignore-config names."""
    check_directory(Path(args.model_path))
    for key in set(args.ignore_config or ()) & set(KEYS):
        note(f"--ignore-config {key}: without it the answers are another model's ({KEYS[key].does})")
    return ignoring(read_config(args.model_path), args.ignore_config or ())


def make_artifact(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    cleanup: contextlib.ExitStack,
    team: Team | None,
    **chosen: Any,
) -> artifacts.Artifact:
    """The artifact given, or one compiled now for the checkpoint into a directory that ends with the run. `chosen`:
    other options of the compilation."""
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
        logits=logits_of(args) or "last",
        world_size=world_size,
        backend=args.backend or (npu.backend(one_host=team is None or team.place.one_host) if ask else None),
        allow_unsupported=args.allow_unsupported,
        allow_extends=allow_extends,
        **chosen,
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
        "logits": logits_of(args),
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
    """Weights and caches in place for these prompts and their answers, and the ranks together."""
    manifest = artifact.manifest
    limit = manifest["sizes"]["max_positions"]
    if args.max_position_embeddings and args.max_position_embeddings > limit:
        note(f"--max-position-embeddings {args.max_position_embeddings}: the model has {limit}, which stays the limit")
    limit = positions_of(args, manifest)
    if max(map(len, prompts)) < limit < max(map(len, prompts)) + params.max_tokens:
        note(f"answers end where a sequence has {limit} tokens in all, prompt included")
    requests = Counter(map(len, prompts))
    bound = limit_for(args, manifest, requests, params.max_tokens, team)
    room_in = partial(room_for, args, manifest, requests, params.max_tokens)
    return engine_in(args, artifact, tokenizer, room_in, bound, team)


def engine_in(
    args: argparse.Namespace,
    artifact: artifacts.Artifact,
    tokenizer: Tokenizer | None,
    room_in: Callable[[Limit | None], Room],
    bound: Limit | None,
    team: Team | None = None,
    *,
    weights: Callable[..., dict[str, torch.Tensor]] | None = None,
) -> Engine:
    """An engine with the caches that `room_in` finds room for in what a rank may use. `weights` takes what
    `load_weights` takes, and stands in for it."""
    manifest, limit = artifact.manifest, positions_of(args, artifact.manifest)
    room = room_in(bound)
    atb, device, ranks = open_device(manifest, args.torch_device, team)
    if device.type == "npu" and room.workspace:
        npu.set_workspace(atb, workspace_size(room, device_profile(manifest["device"])))
    if team:
        team.meet()
        if bound and bound.host:  # each rank has measured for itself, and all must take the same steps
            room = room_in(replace(bound, usable=team.least(bound.usable)))
    if room.note:
        note(room.note)
    if not (bound and bound.host):
        note_memory(manifest["memory"]["weight_bytes"] * (team.place.local_world_size if team else 1), device)
    caches = make_caches(manifest, room.sizes, device)
    held = (weights or load_weights)(
        manifest["weights"],
        args.model_path,
        splits=manifest["splits"],
        unused=manifest["unused"],
        device=device,
        rank=team.place.rank if team else 0,
        progress=(team is None or team.talks) and not (args.quiet or args.json),
    )
    constants = make_constants(manifest, limit, device)
    executor = Executor(
        artifact,
        atb,
        weights=held,
        constants=constants,
        caches=caches,
        host_compiler=host_compiler(args, device),
        **ranks,
    )
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


def host_compiler(args: argparse.Namespace, device: torch.device) -> Callable[..., Any] | None:
    """What compiles the decode step, where --host-compile asks for it. UserError where there are no C++ kernels to
    make."""
    if not args.host_compile:
        return None
    if device.type != "cpu":
        raise UserError(
            f"--host-compile is for steps on a CPU, and this one runs on {device.type}", hint="leave it out"
        )
    from llmc.runtime.hostatb.inductor import HostCompiler, check_compiler

    check_compiler()
    note("--host-compile: the decode step is compiled before the first answer, which takes about half a minute")
    return lambda held: HostCompiler(held, note)


def limit_for(
    args: argparse.Namespace,
    manifest: Mapping[str, Any],
    requests: Counter[int],
    answer: int,
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
        answer=answer,
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
    answer: int,
    limit: Limit | None,
    *,
    batch: int | None = None,
    prefill_tokens: int | None = None,
) -> Room:
    """The cache and the batch: the whole batch at its longest, unless --num-blocks or the memory says less. UserError
    where what is asked for does not fit. `requests`: tokens of a prompt -> how many; `batch`: instead of --batch-size;
    `prefill_tokens`: where --max-prefill-tokens does not say."""
    return make_room(
        manifest,
        requests,
        answer=answer,
        max_batch=batch or args.batch_size or requests.total(),
        positions=positions_of(args, manifest),
        blocks=args.num_blocks,
        prefill_tokens=args.max_prefill_tokens if args.max_prefill_tokens > 0 else prefill_tokens,
        limit=limit,
    )


def note_memory(needed: int, device: torch.device) -> None:
    """Loading more than there is does not fail on Linux: the system kills the process, without a word."""
    free = free_memory()
    if device.type == "cpu" and free is not None and needed > free:
        note(f"the weights need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")
