"""Contiguous caches in blocks of 16 columns (nz): one tensor of exactly the running sequences' rows.

On an NPU a range of the rows of an nz tensor cannot be seen without a copy, and what is written into the copy is lost.
So a step gets tensors that hold its rows and nothing else, and they are made anew where the batch changes: new rows are
joined after their prefill; rows that ended are dropped, and moved ones moved, before the next step.

    rows = BlockedRows(caches)
    inputs |= rows.before(batch)
    ...                             # the step
    rows.after(batch)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.scheduler import Batch, Move
from llmc.runtime.formats import in_format, plain


class BlockedRows:
    """`caches`: name -> a tensor that says the shape [1, rows, columns / 16, positions, 16], dtype and device."""

    def __init__(self, caches: Mapping[str, torch.Tensor]) -> None:
        self.caches = caches
        self.count = 0  # rows that hold a sequence
        self.live: dict[str, torch.Tensor] = {}
        self.new: dict[str, torch.Tensor] = {}

    def before(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """The caches of the step, by name."""
        prefill = batch.phase == "prefill"
        self._keep(batch.first_row if prefill else len(batch.sequences), batch.moves)
        if not prefill:
            return self.live
        count = len(batch.sequences)
        try:
            self.new = {name: in_format(_zeros(like, count), "nz") for name, like in self.caches.items()}
        except RuntimeError:  # torch.OutOfMemoryError on devices, a plain RuntimeError on the host
            needed = sum(like[:, :1].numel() * like.element_size() for like in self.caches.values()) * count
            raise UserError(
                f"the cache of {count} more sequences needs {needed / 2**30:.1f} GiB, and there was no room for it",
                hint="fewer or shorter prompts, a smaller --batch-size or --max-output-length",
            ) from None
        return self.new

    def after(self, batch: Batch) -> None:
        """A prefill's rows stand after those that were there."""
        if batch.phase != "prefill":
            return
        if not self.count:
            self.live = dict(self.new)
        for name in self.new if self.count else ():
            self.live[name] = in_format(torch.cat([plain(self.live[name]), plain(self.new[name])], dim=1), "nz")
        self.count += len(batch.sequences)
        self.new = {}

    def _keep(self, count: int, moves: Sequence[Move]) -> None:
        """Move rows, then keep the first `count`."""
        if count == 0:
            self.live = {}
        elif moves or count != self.count:
            for name, tensor in self.live.items():  # one after the other: only one is there twice
                rows = plain(tensor)
                for move in moves:
                    rows[:, move.target, :, : move.length] = rows[:, move.source, :, : move.length]
                self.live[name] = in_format(rows[:, :count].clone(), "nz")
        self.count = count


def _zeros(like: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.zeros((1, rows, *like.shape[2:]), dtype=like.dtype, device=like.device)
