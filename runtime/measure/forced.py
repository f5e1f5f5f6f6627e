"""Teacher-forced steps of a compiled model, and what its taps give: each rank's shares, joined to whole values.

Prompts are told in full; the model reads the first part of each in prefill and the other tokens one by one in decode,
whatever it would have said itself. So both graphs see the same tokens on every machine.

    for step, shares in forced(runner, scheduler, tokens, lengths):      # on every rank
        joined(entry, [mine[entry["name"]] for mine in gathered], manifest["splits"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmc.runtime.engine.runner import Runner
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.scheduler import Scheduler
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.executor import Executor

Row = tuple[int, int]  # prompt and position


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a batch: which token stands in which row."""

    phase: str
    tokens: tuple[Row, ...]
    last: tuple[Row, ...]  # of each sequence

    def rows(self, entry: Mapping[str, Any]) -> tuple[Row, ...]:
        """What the rows of a tapped value are: in prefill a value may have one row a sequence."""
        return self.last if entry["shape"][0] == "B" else self.tokens


def forced(
    runner: Runner, scheduler: Scheduler, tokens: Sequence[Sequence[int]], lengths: Sequence[int]
) -> Iterator[tuple[Step, dict[str, Tensor]]]:
    """Every step, with this rank's shares of the tapped values in host memory. `lengths`: tokens read in prefill."""
    requests = [
        Request(prompt_ids=list(t[:n]), params=SamplingParams(max_tokens=len(t)))
        for t, n in zip(tokens, lengths, strict=True)
    ]
    number = {request.id: i for i, request in enumerate(requests)}
    shares: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        shares[name] = tensor.detach().to("cpu", copy=True)

    executor = runner.executor
    assert isinstance(executor, Executor)
    executor.tap = keep
    try:
        for request in requests:
            scheduler.add(request)
        while scheduler.busy:
            batch = scheduler.schedule()
            runner.run(batch)
            yield _step(batch.phase, [(number[r.id], len(r)) for r in batch.sequences]), dict(shares)
            shares.clear()
            done = []
            for request in batch.sequences:
                told = tokens[number[request.id]]
                if len(request) < len(told):
                    request.append(told[len(request)], 0.0)
                else:
                    done.append(request)
            scheduler.finish(done)
    finally:
        scheduler.clear()
        executor.tap = None


def _step(phase: str, lengths: Sequence[tuple[int, int]]) -> Step:
    last = tuple((i, n - 1) for i, n in lengths)
    every = tuple((i, position) for i, n in lengths for position in range(n))
    return Step(phase=phase, tokens=every if phase == "prefill" else last, last=last)


def joined(entry: Mapping[str, Any], shares: Sequence[Tensor], splits: Mapping[str, Any]) -> list[Tensor]:
    """The whole value [rows, width] from the shares of all ranks, each of them [rows, ...] of the same rows.

    R: one for each different answer of the ranks. P: the sum, in float64. S(1): of each piece, what each rank holds of
    it; where several ranks hold the same elements (kv heads), one value for each holder, so that none is overlooked."""
    rows = shares[0].shape[0]
    flat = [share.reshape(rows, -1) for share in shares]
    if entry["shard"] == "P":
        return [torch.stack([share.double() for share in flat]).sum(0)]
    if entry["shard"] == "R":
        different: list[Tensor] = []
        for share in flat:
            if not any(torch.equal(share, other) for other in different):
                different.append(share)
        return different
    names = entry["splits"]
    holders = [_holders(splits[name]["ranks"]) for name in names]
    found = []
    for version in range(max(len(ranks) for held in holders for ranks in held.values())):
        pieces, start = [], 0
        for name, held in zip(names, holders, strict=True):
            piece = flat[0].new_zeros(rows, splits[name]["size"])
            for (first, count), ranks in held.items():
                rank = ranks[min(version, len(ranks) - 1)]
                piece[:, first : first + count] = flat[rank][:, start : start + count]
            pieces.append(piece)
            start += splits[name]["local"]
        found.append(torch.cat(pieces, 1))
    return found


def _holders(runs: Sequence[Sequence[int]]) -> dict[tuple[int, int], list[int]]:
    """Start and count on the whole axis -> the ranks that hold these elements."""
    held: dict[tuple[int, int], list[int]] = {}
    for rank, (first, count) in enumerate(runs):
        if count:
            held.setdefault((first, count), []).append(rank)
    return held
