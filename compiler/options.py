"""What a user may choose, and what the tables and the model's `support:` say of a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmc.compiler.diagnostics import UserError
from llmc.compiler.ir import Graph
from llmc.compiler.language.build import Model
from llmc.compiler.passes.phase import LOGITS
from llmc.compiler.passes.types import in_layers, is_named
from llmc.compiler.target import legality
from llmc.compiler.target.device import Device, device


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose; None means: what the model or the device says."""

    device: str = "atlas-800i-a2"
    dtype: str | None = None
    attention: str = "paged"
    logits: str = "last"  # of a prefill: of each sequence's last token, or of all
    world_size: int | None = None  # None: the smallest that the model's `support:` offers on the device, else 1
    backend: str | None = None  # of collectives
    fusions: tuple[str, ...] | None = None
    layers_per_segment: int = 0
    taps: tuple[str, ...] = ()  # patterns of node names whose values leave the graph too (passes/tap.py)
    allow_unsupported: bool = False  # compile also what `support:` does not offer
    allow_extends: tuple[str, ...] = ()  # folders outside the model's whose files may be extended

    @property
    def target(self) -> Device:
        return device(self.device)

    @property
    def ranks(self) -> int:
        return self.world_size or 1

    @property
    def fused_backend(self) -> str:
        """Of LinearParallel, where the device has one for this backend of collectives; else ""."""
        return self.target.backends.get(self.backend or "", "")

    def fusions_of(self, phase: str) -> tuple[str, ...]:
        """Those that the user chose, else the device's for this phase."""
        return self.fusions if self.fusions is not None else self.target.fusions[phase]


def check_options(model: Model, options: Options) -> Options:
    """The options with everything decided. UserError names what would be accepted: what no chip can do, and, unless
    unsupported choices are allowed, what the model's `support:` does not offer."""
    target = options.target
    offer = model.support.get(options.device, {})
    dtype = options.dtype or model.graph.dtype
    world_size = min(offer.get("tp", (1,))) if options.world_size is None else options.world_size
    backend = options.backend or next(iter(target.backends))
    choice: dict[str, Any] = {"dtype": dtype, "attention": options.attention, "world_size": world_size}
    if options.backend or world_size > 1:
        choice["backend"] = backend
    legality.check(target, {**choice, "fusion": options.fusions or ()})
    check_policy(model.graph, target, dtype)
    if options.logits not in LOGITS:
        raise UserError(f"logits {options.logits}: expected last (of each prompt's last token) or all (of every token)")
    if options.layers_per_segment < 0:
        raise UserError(f"layers-per-segment {options.layers_per_segment}: expected 0 (as many as fit) or more")
    decided = replace(options, world_size=world_size, backend=backend if world_size > 1 else "")
    if not options.allow_unsupported:
        check_support(model, decided, dtype)
    return decided


def check_policy(graph: Graph, target: Device, dtype: str) -> None:
    """The dtypes of `policy:`, each told at the first node that a rule gives it."""
    told: set[str] = set()
    for rule in graph.policy:
        own = rule["dtype"]
        named = (node for node in graph.nodes if is_named(rule, node.name) and in_layers(rule, node.name))
        if own != dtype and own not in told and (node := next(named, None)):
            told.add(own)
            legality.check(target, {"policy": own, "dtype": dtype}, node.place)


def check_support(model: Model, options: Options, dtype: str) -> None:
    """What `support:` says of this device. The host, and a model without `support:`, take everything."""
    if options.device == "host" or not model.support:
        return
    offer = model.support.get(options.device)
    way_out = f"--allow-unsupported, or extend `support:` in {model.files[0]}"
    if offer is None:
        raise UserError(
            f"{model.name} is not offered on {options.device}, but on {', '.join(model.support)}",
            hint=way_out,
            code="E401",
        )
    chosen = (("tp", "world size", options.world_size), ("dtypes", "dtype", dtype),
              ("attention", "attention", options.attention))  # fmt: skip
    problems = [
        f"{what} {value} (offered: {', '.join(map(str, offer[key]))})"
        for key, what, value in chosen
        if key in offer and value not in offer[key]
    ]
    if problems:
        raise UserError(
            f"{model.name} is not offered on {options.device} with {', '.join(problems)}", hint=way_out, code="E401"
        )
