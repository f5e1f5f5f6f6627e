"""The executor: runs the generated code of an artifact, on torch_atb (NPU) or hostatb (CPU, CUDA).

    executor = Executor(artifact, atb, weights=weights, constants=constants, caches=caches)
    logits = executor.run("prefill", {"token_ids": ..., "position_ids": ..., ...})       # [B, vocab]

Tensors are bound by the names of the manifest. Nothing here knows a model: order and names come from the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from llmc.compiler.artifact import Artifact
from llmc.compiler.diagnostics import UserError


class Executor:
    """The operations of both phases of one artifact, and the tensors that every step reads.

    atb: `torch_atb` or `llmc.runtime.hostatb`. weights, constants, caches: name -> tensor, as in the manifest."""

    def __init__(
        self,
        artifact: Artifact,
        atb: ModuleType,
        *,
        weights: Mapping[str, torch.Tensor],
        constants: Mapping[str, torch.Tensor],
        caches: Mapping[str, torch.Tensor],
    ) -> None:
        self.manifest = artifact.manifest
        self.tensors: dict[str, torch.Tensor] = {**weights, **constants, **caches}
        missing = [
            name
            for kind in ("weights", "constants", "caches")
            for name in self.manifest[kind]
            if name not in self.tensors
        ]
        if missing:
            raise UserError(
                f"{len(missing)} tensors of the artifact are not given: {', '.join(missing[:5])}", code="E503"
            )
        if hasattr(atb, "use_chip"):  # hostatb obeys the rules of the chip that the artifact was compiled for
            atb.use_chip(self.manifest["chip"])
        self.phases: dict[str, list[tuple[Any, list[str], list[str]]]] = {}
        for phase, entry in self.manifest["phases"].items():
            operations = load_module(artifact, entry["module"])["build"](atb)
            segments = entry["segments"]
            self.phases[phase] = [
                (operation, part["inputs"], part["outputs"])
                for operation, part in zip(operations, segments, strict=True)
            ]

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One step. `inputs`: the phase's inputs by name; a cache given here stands in for the one of that name (flash
        attention runs on some rows of its caches). Returns logits [B, vocab]."""
        live: dict[str, torch.Tensor] = {**self.tensors, **inputs}
        for operation, names, outputs in self.phases[phase]:
            results = operation.forward([live[name] for name in names])
            live.update(zip(outputs, results, strict=True))
        return live["logits"]


def load_module(artifact: Artifact, name: str) -> dict[str, Any]:
    """The names that a generated module defines. `artifact.read` has compared its hash with the manifest."""
    path = artifact.path / name
    namespace: dict[str, Any] = {"__name__": f"llmc_generated_{path.stem}", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return namespace
