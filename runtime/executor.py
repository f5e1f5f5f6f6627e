"""The executor: runs the generated code of an artifact, on torch_atb (NPU) or hostatb (CPU, CUDA).

    executor = Executor(artifact, atb, weights=weights, constants=constants, caches=caches)
    logits = executor.run("prefill", {"token_ids": ..., "position_ids": ..., ...})       # [B, vocab]

Tensors are bound by the names of the manifest. Nothing here knows a model: order and names come from the artifact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from llmc.compiler.artifact import Artifact
from llmc.compiler.atb.collective import domain_problem, lccl_port
from llmc.compiler.diagnostics import UserError
from llmc.runtime.stream import Mark

Tap = Callable[[str, torch.Tensor], None]  # name in the manifest, this rank's share as ATB shapes it


class Executor:
    """The operations of both phases of one artifact, and the tensors that every step reads.

    atb: `torch_atb` or `llmc.runtime.hostatb`. weights, constants, caches: name -> tensor, as in the manifest; of a
    tensor-parallel group they are this rank's. comm_domain: a number that all ranks of the group have, and no other
    group on the host; rank_table_file: of hccl, for a group over several hosts; host_compiler: makes what compiles a
    decode graph of hostatb (`hostatb.inductor.HostCompiler`), from {graph input: weight}."""

    def __init__(
        self,
        artifact: Artifact,
        atb: ModuleType,
        *,
        weights: Mapping[str, torch.Tensor],
        constants: Mapping[str, torch.Tensor],
        caches: Mapping[str, torch.Tensor],
        rank: int = 0,
        comm_domain: str = "0",
        rank_table_file: str = "",
        host_compiler: Callable[[Mapping[int, torch.Tensor]], Any] | None = None,
    ) -> None:
        self.manifest, self.path = artifact.manifest, artifact.path
        self.tensors: dict[str, torch.Tensor] = {**weights, **constants, **caches}
        if problems := list(mismatches(self.manifest, self.tensors)):
            more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
            lines = [f"{len(problems)} tensors are not what the artifact needs:", *problems[:20], *more]
            raise UserError("\n".join(lines), code="E503")
        if self.manifest["backend"] == "lccl" and (why := domain_problem(comm_domain, lccl_port(os.environ))):
            raise UserError(f"comm_domain {comm_domain!r} cannot be used: {why}")
        on_host = hasattr(atb, "use_chip")
        if on_host:  # hostatb obeys the rules of the chip that the artifact was compiled for
            atb.use_chip(self.manifest["chip"])
        self.queued = Mark("cpu" if on_host else "npu")
        self.inputs: Mapping[str, torch.Tensor] = {}
        self.atb = atb
        self.group: dict[str, Any] = {"rank": rank, "comm_domain": comm_domain, "rank_table_file": rank_table_file}
        self.tap: Tap | None = None  # is given each tapped value when the segment that makes it has been called
        ranks = (rank, self.manifest["world_size"], comm_domain, rank_table_file)
        self.phases: dict[str, list[tuple[Any, list[str], list[str], list[str]]]] = {}
        for phase, entry in self.manifest["phases"].items():
            segments = entry["segments"]
            with told(f"{artifact.path / entry['module']} cannot be built"):
                operations = load_module(artifact, entry["module"])["build"](atb, *ranks)
                if len(operations) != len(segments):
                    raise UserError(
                        f"it builds {len(operations)} operations; the manifest has {len(segments)} segments"
                    )
            if host_compiler and phase == "decode":
                for operation, part in zip(operations, segments, strict=True):
                    held = {i: weights[name] for i, name in enumerate(part["inputs"]) if name in weights}
                    operation.core.compiler = host_compiler(held)
            self.phases[phase] = [
                (operation, part["inputs"], part["outputs"], done)
                for operation, part, done in zip(operations, segments, last_reads(segments), strict=True)
            ]

    def with_artifact(self, artifact: Artifact) -> Executor:
        """The same tensors under other code of the same model: with other taps."""
        return Executor(artifact, self.atb, weights=self.tensors, constants={}, caches={}, **self.group)

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One step. `inputs`: the phase's inputs by name; a cache given here stands in for the one of that name (flash
        attention runs on some rows of its caches). Returns logits [B, vocab], which the device may still work on; in a
        prefill [T, vocab] where the artifact has those of every token.

        The rule of order: a step begins when everything that the step before it queued has run, on every rank, whether
        or not anybody read its logits. torch_npu's task queue makes a queued call later, and the call takes its tensors
        from its Operation then (atb-operations.md 2.1): `forward` on the same object before that would give one step
        the tensors of the next. Nothing else needs to wait, so copies to the device are queued like calls."""
        if phase not in self.phases:
            raise UserError(f"the artifact has no phase {phase!r}", hint=f"one of {', '.join(self.phases)}")
        missing = [name for name in self.manifest["phases"][phase]["inputs"] if name not in inputs]
        if missing:
            raise UserError(f"{phase} needs the inputs {', '.join(missing)}")
        tapped = {entry["name"] for entry in self.manifest["phases"][phase].get("taps", ())}
        self.queued.wait()
        self.inputs = inputs  # calls that are queued hold addresses, not tensors
        live: dict[str, torch.Tensor] = {**self.tensors, **inputs}
        try:
            with told(f"{self.path}: {phase} cannot run"):
                for operation, names, outputs, done in self.phases[phase]:
                    results = operation.forward([live[name] for name in names])
                    live.update(zip(outputs, results, strict=True))
                    for name in outputs:
                        if self.tap and name in tapped:
                            self.tap(name, live[name])
                    for name in done:
                        del live[name]
        finally:
            self.queued.set()
        return live["logits"].flatten(1)  # ranks' shares stand side by side: [B, W, vocab / W]


@contextmanager
def told(what: str) -> Iterator[None]:
    """Generated code is somebody's code: whatever it raises is a message that says where."""
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{what}: {why}", hint="compile it again with this llmc", code="E501") from error


def last_reads(segments: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each segment, what segments made and none behind it reads."""
    made = {name for part in segments for name in part["outputs"]}
    last = {name: i for i, part in enumerate(segments) for name in part["inputs"] if name in made}
    return [[name for name, at in last.items() if at == i] for i in range(len(segments))]


def mismatches(manifest: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[str]:
    """A line for every tensor that is missing or not as the manifest says. A symbol (N blocks, P positions, ...) is
    what the first tensor that has it says."""
    symbols: dict[str, int] = {}
    for kind in ("weights", "constants", "caches"):
        for name, entry in manifest[kind].items():
            given = tensors.get(name)
            if not isinstance(given, torch.Tensor):
                yield f"  {name}: {'missing' if given is None else f'a {type(given).__name__}, not a tensor'}"
                continue
            shape, dtype = list(given.shape), str(given.dtype).removeprefix("torch.")
            wanted = list(entry["shape"])
            if len(wanted) == len(shape) and entry["format"] == "nd":  # nz has a layout of its own
                pairs = zip(wanted, shape, strict=True)
                wanted = [symbols.setdefault(w, s) if isinstance(w, str) else w for w, s in pairs]
            if dtype != entry["dtype"] or (shape != wanted and entry["format"] == "nd"):
                yield f"  {name}: found {dtype} {shape}, needed {entry['dtype']} [{', '.join(map(str, wanted))}]"


def load_module(artifact: Artifact, name: str) -> dict[str, Any]:
    """The names that a generated module defines: the text that `artifact.read` compared with its hash."""
    path = artifact.path / name
    namespace: dict[str, Any] = {"__name__": f"llmc_generated_{path.stem}", "__file__": str(path)}
    exec(compile(artifact.code[name], str(path), "exec"), namespace)
    return namespace
