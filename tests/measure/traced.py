"""Traces in this process: a checkpoint compiled with taps, its ranks as threads, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tiny import Ours, bind, build

from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.measure.forced import forced
from llmc.runtime.measure.reference import Original
from llmc.runtime.measure.trace import compare_steps

Plant = Callable[[list[Ours]], None]


def trace(
    checkpoint: Path,
    text: str,
    tokens: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    reference: Path | None = None,
    plant: Plant = lambda ranks: None,
    work: Path | None = None,
    **options: Any,
) -> list[Mapping[str, Any]]:
    """The nodes of a trace. `plant` may spoil the ranks before they run."""
    found = build(work or checkpoint, text, taps=("*",), **options)
    ranks = [bind(found, checkpoint, rank=rank) for rank in range(options.get("world_size", 1))]
    plant(ranks)
    runs = run_ranks([partial(steps_of, ours, tokens, lengths) for ours in ranks]) if len(ranks) > 1 else [
        steps_of(ranks[0], tokens, lengths)
    ]  # fmt: skip
    together = ((some[0][0], [shares for _, shares in some]) for some in zip(*runs, strict=True))
    return compare_steps(found.manifest, together, Original(reference or checkpoint, found.manifest, tokens, lengths))


def steps_of(ours: Ours, tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> list:
    return list(forced(ours.runner, ours.scheduler, tokens, lengths))
