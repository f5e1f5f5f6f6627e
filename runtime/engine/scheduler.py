"""Which sequences run next, and in which phase: continuous batching with a prefill budget.

New sequences go first, as many as fit the batch, the budget and the cache; otherwise every running sequence decodes one
token. When the cache is full the newest sequence gives its room back and later starts over from all of its tokens.

    scheduler = Scheduler(BlockManager(num_blocks=64), max_batch=8, max_prefill_tokens=4096)
    scheduler.add(seq)
    while scheduler.busy:
        batch = scheduler.schedule()      # run it, append the tokens, then
        scheduler.finish(done)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.blocks import CacheRoom
from llmc.runtime.engine.sequence import Sequence

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Move:
    """Copy the first `length` positions of a cache row to another, before the step runs (contiguous caches)."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step. Sequence i lies in cache row `first_row + i` where caches are contiguous."""

    phase: Phase
    sequences: tuple[Sequence, ...]
    first_row: int = 0
    moves: tuple[Move, ...] = ()


class Scheduler:
    """Keeps the waiting queue and the running list; the list's order is the order of rows in decode."""

    def __init__(self, room: CacheRoom, *, max_batch: int, max_prefill_tokens: int) -> None:
        if max_batch < 1 or max_prefill_tokens < 1:
            raise UserError(
                f"max_batch and max_prefill_tokens must be positive; found {max_batch} and {max_prefill_tokens}"
            )
        self.room = room
        self.max_batch = max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._moves: list[Move] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence, *, answered: bool = True) -> None:
        """Queue a sequence; one that could never run is refused here. `answered`: tokens follow the prompt."""
        if seq.prompt_len == 0:
            raise UserError("the prompt is empty: no token to start from", hint="give a text, or a tokenizer with bos")
        if seq.prompt_len + answered > self.room.capacity:
            raise UserError(
                f"the prompt has {seq.prompt_len} tokens, but a sequence can have {self.room.capacity} in all"
                f"{', the answer included' if answered else ''}",
                hint="shorten it, or enlarge the cache",
            )
        if seq.prompt_len > self.max_prefill_tokens:
            raise UserError(
                f"the prompt has {seq.prompt_len} tokens, more than one prefill may hold ({self.max_prefill_tokens})",
                hint=f"--max-prefill-tokens {seq.prompt_len}",
            )
        self.waiting.append(seq)

    def schedule(self) -> Batch:
        """The next step; `busy` must hold."""
        new = self._admit()
        if not new:
            self._make_room()
        moves, self._moves = tuple(self._moves), []
        if new:
            first = len(self.running)
            self.running += new
            return Batch(phase="prefill", sequences=tuple(new), first_row=first, moves=moves)
        return Batch(phase="decode", sequences=tuple(self.running), moves=moves)

    def finish(self, done: Iterable[Sequence]) -> None:
        # From the last row down, so that the sequence that fills a hole is never itself done.
        row = {seq.id: i for i, seq in enumerate(self.running)}
        for hole in sorted((row[seq.id] for seq in done), reverse=True):
            self._remove(hole)

    def clear(self) -> None:
        """Drop everything, queued and running; nothing is worth a copy then."""
        self.waiting.clear()
        self.finish(list(self.running))
        self._moves = []

    def _admit(self) -> list[Sequence]:
        new: list[Sequence] = []
        tokens = 0
        while self.waiting and len(self.running) + len(new) < self.max_batch:
            seq = self.waiting[0]
            # A sequence that starts over may have outgrown the budget; alone it may pass, or it would wait forever.
            if new and tokens + len(seq) > self.max_prefill_tokens:
                break
            if not self.room.allocate(seq):
                break
            tokens += len(seq)
            new.append(self.waiting.popleft())
        return new

    def _make_room(self) -> None:
        """Each running sequence gets room for its last token, oldest first; the newest ones pay."""
        paid: set[int] = set()
        for seq in sorted(self.running, key=lambda s: s.id):
            while seq.id not in paid and not self.room.grow(seq):
                newest = max(self.running, key=lambda s: s.id)
                self._remove(self.running.index(newest))
                self.waiting.appendleft(newest)
                self.preemptions += 1
                paid.add(newest.id)

    def _remove(self, hole: int) -> None:
        """Take the sequence of this row out; the last one takes its place, so that rows stay 0 to n - 1."""
        seq, last = self.running[hole], self.running.pop()
        if last is not seq:
            self.running[hole] = last
            if self.room.compact:
                self._moves.append(Move(source=len(self.running), target=hole, length=len(last) - 1))
        self.room.free(seq)
