"""Rows of contiguous (flash) caches: those of a step, and moves from one to another.

A cache is [1, rows, positions, heads * head_dim], in nz [1, rows, columns / 16, positions, 16], and running sequences
fill its rows 0 to n - 1 (`blocks.RowManager`). A step gets its rows as a view of the same memory, so a sequence that
joins is prefilled where it stays; where one leaves, the last one takes its row, and nothing else is copied.

    rows = Rows(caches)
    rows.move(batch.moves)
    inputs |= rows.of(first=0, count=4)         # name -> [1, 4, ...]

A range of rows is contiguous, in nz too: rows are the outermost dimension that is not 1, and positions come in whole
blocks of 16, so that each row is whole blocks. torch_atb takes a view's own address and the format of its storage
(torch_atb/resource/utils.cpp ConvertToAtbTensor, torch_npu NPUFormat.cpp get_npu_format), so it writes the row itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llmc.runtime.engine.scheduler import Move
from llmc.runtime.formats import copy_rows, rows_of


class Rows:
    """`caches`: name -> cache, all of them with the same rows."""

    def __init__(self, caches: Mapping[str, torch.Tensor]) -> None:
        self.caches = caches
        self._running: dict[int, Mapping[str, torch.Tensor]] = {}  # by count, made once: decode steps come again

    def of(self, first: int, count: int) -> Mapping[str, torch.Tensor]:
        """The caches of a step that runs on these rows, by name."""
        if not first and count in self._running:
            return self._running[count]
        views = {name: rows_of(cache, first, count) for name, cache in self.caches.items()}
        if not first:
            self._running[count] = views
        return views

    def move(self, moves: Sequence[Move]) -> None:
        """Copy the beginning of a row over that of another one, one move after the other."""
        for move in moves:
            copy_rows(self.caches.values(), move.source, move.target, move.length)
