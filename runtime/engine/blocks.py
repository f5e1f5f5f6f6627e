"""Where the keys and values of each sequence lie: blocks of a paged cache, or rows of a contiguous one.

Both answer the scheduler's three questions: `allocate` room for all tokens of a sequence (before prefill), `grow` by
the token that the next decode step writes, `free`. A False answer changes nothing.

    blocks = BlockManager(num_blocks=64, block_size=128)
    blocks.allocate(seq)    # seq.block_table = [0, 1]
    slot(seq.block_table, position=130, block_size=128)    # 130
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, Protocol

from llmc.compiler.diagnostics import UserError
from llmc.compiler.ops.attention import BLOCK_SIZE
from llmc.runtime.engine.sequence import Sequence


class CacheRoom(Protocol):
    """What the scheduler needs of a cache. `compact`: sequence i of the running list must lie in row i."""

    compact: ClassVar[bool]

    @property
    def capacity(self) -> int:
        """Most tokens that one sequence alone can have."""
        ...

    def allocate(self, seq: Sequence) -> bool: ...
    def grow(self, seq: Sequence) -> bool: ...
    def free(self, seq: Sequence) -> None: ...


class BlockManager:
    """Paged: a pool of blocks, handed out as a sequence grows. First freed, last reused, so the order is repeatable."""

    compact: ClassVar[bool] = False

    def __init__(self, *, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        if num_blocks < 1 or block_size < 1:
            raise UserError(f"a paged cache needs at least one block; found {num_blocks} blocks of {block_size} tokens")
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))

    @property
    def capacity(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, seq: Sequence) -> bool:
        return self._extend(seq)

    def grow(self, seq: Sequence) -> bool:
        return self._extend(seq)

    def free(self, seq: Sequence) -> None:
        self._free.extend(seq.block_table)
        seq.block_table = []

    def _extend(self, seq: Sequence) -> bool:
        missing = blocks_for(len(seq), self.block_size) - len(seq.block_table)
        if missing > len(self._free):
            return False
        seq.block_table += [self._free.popleft() for _ in range(missing)]
        return True


class RowManager:
    """Contiguous (flash): cache [1, rows, length, heads * head_dim], one whole row a sequence.

    The attention op reads row b for sequence b of the call, so running sequences fill rows 0 to n - 1 in the order of
    the scheduler's list: a sequence's row is its place in that list, and only the count is kept here.
    """

    compact: ClassVar[bool] = True

    def __init__(self, *, rows: int, length: int) -> None:
        if rows < 1 or length < 1:
            raise UserError(f"a contiguous cache needs at least one row; found {rows} rows of {length} tokens")
        self.rows = rows
        self.length = length
        self._used = 0

    @property
    def capacity(self) -> int:
        return self.length

    def allocate(self, seq: Sequence) -> bool:
        if self._used == self.rows or len(seq) > self.length:
            return False
        self._used += 1
        return True

    def grow(self, seq: Sequence) -> bool:
        return len(seq) <= self.length

    def free(self, seq: Sequence) -> None:
        self._used -= 1


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def slot(block_table: list[int], position: int, block_size: int) -> int:
    """Index of a position in the cache seen as [blocks * block_size, heads, head_dim]."""
    return block_table[position // block_size] * block_size + position % block_size
