"""How a tensor lies over the ranks of a tensor-parallel group: one rule for sizes that divide and sizes that do not.

    deal(13824, 8).local                   # 1728 columns a rank
    q, kv = deal_heads(52, 52, 128, 8)     # LLaMA-33B: 7 heads a rank; the last has 3, and 4 of zeros
    q, kv = deal_heads(28, 4, 128, 8)      # Qwen2-7B: 2 ranks share a kv head; 4 query heads, 3 and one of zeros, ...

Weights, caches, attention parameters, the manifest and the reports read a `Split`; nothing else divides by the world
size. Every rank has a share of the same shape, so one artifact serves all. Zeros are harmless where they stand: a head
of zeros attends to zeros, and its columns of the output projection are zeros. Sources: mindie-stack.md 4.1, 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

Run = tuple[int, int]  # start and count on the whole axis


@dataclass(frozen=True)
class Split:
    """One axis over the ranks: rank r holds the elements `runs[r]`, then zeros up to `local` elements."""

    size: int
    local: int
    runs: tuple[Run, ...]

    @property
    def is_partition(self) -> bool:
        """Every element is on exactly one rank: sums over the ranks count it once."""
        held = sorted(run for run in self.runs if run[1])
        ends = [start + count for start, count in held]
        return [start for start, _ in held] == [0, *ends[:-1]] and ends[-1:] == [self.size]

    @property
    def in_order(self) -> bool:
        """The shares one after the other are the axis, and zeros only behind it: an all-gather restores it."""
        return self.runs == _blocks(self.size, self.local, len(self.runs))

    def keeps_whole(self, unit: int) -> bool:
        """No run of `unit` elements (a head) is cut."""
        return all(n % unit == 0 for run in (*self.runs, (self.local, self.size)) for n in run)


@dataclass(frozen=True)
class Shard:
    """R: whole on every rank. S(axis): split on that axis, by `splits` of the pieces that are concatenated there.
    P: partial sums; the sum over the ranks is the value."""

    letter: str = "R"
    axis: int = 0
    splits: tuple[Split, ...] = ()

    def __str__(self) -> str:
        return f"S({self.axis})" if self.letter == "S" else self.letter

    @property
    def split(self) -> Split:
        """The split of a value that is one piece."""
        (only,) = self.splits
        return only

    def local(self, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Shape of one rank's share."""
        if self.letter != "S":
            return shape
        share = sum(split.local for split in self.splits)
        return (*shape[: self.axis], share, *shape[self.axis + 1 :])


WHOLE, PARTIAL = Shard("R"), Shard("P")


@cache
def split_on(axis: int, *splits: Split) -> Shard:
    return Shard("S", axis, splits)


@cache
def deal(size: int, world_size: int, unit: int = 1) -> Split:
    """Blocks of ceil(units / world size) whole units, rank by rank; the last ones are padded."""
    local = -(-size // (unit * world_size)) * unit
    return Split(size, local, _blocks(size, local, world_size))


def _blocks(size: int, local: int, count: int) -> tuple[Run, ...]:
    starts = (min(rank * local, size) for rank in range(count))
    return tuple((start, min(local, size - start)) for start in starts)


@cache
def deal_heads(heads: int, kv_heads: int, head_dim: int, world_size: int) -> tuple[Split, Split]:
    """Query heads and kv heads of grouped-query attention: query heads stay with their kv head.

    Where ranks outnumber kv heads, `copies` ranks hold each kv head and share its query heads. (kv head, share) pairs
    are dealt in blocks, so that a rank has whole groups of one size, as SelfAttention wants."""
    group = heads // kv_heads
    copies = min(max(1, world_size // kv_heads), group)
    share = -(-group // copies)  # query heads of a kv head on one rank
    block = -(-kv_heads * copies // world_size)  # kv heads on one rank; 1 where there are copies
    queries, keys = [], []
    for rank in range(world_size):
        first, part = divmod(rank * block, copies)
        held = max(0, min(block, kv_heads - first))
        start = min(first * group + part * share, (first + 1) * group, heads)
        end = min((first + 1) * group, start + share) if copies > 1 else start + held * group
        queries.append((start * head_dim, (end - start if held else 0) * head_dim))
        keys.append((min(first, kv_heads) * head_dim, held * head_dim))
    return (
        Split(heads * head_dim, block * share * head_dim, tuple(queries)),
        Split(kv_heads * head_dim, block * head_dim, tuple(keys)),
    )


def named(splits: Sequence[Split]) -> dict[Split, str]:
    """A readable name for each distinct split: "13824:1728", whole size and share."""
    names: dict[Split, str] = {}
    for split in splits:
        if split not in names:
            name = f"{split.size}:{split.local}"
            twins = sum(n.split("#")[0] == name for n in names.values())
            names[split] = f"{name}#{twins + 1}" if twins else name
    return names
