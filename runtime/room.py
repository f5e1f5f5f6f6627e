"""How many cache blocks or rows a run has, and whether it fits: before anything is loaded.

    limit = memory_limit("32GiB", device("atlas-800i-a2"), os.environ)
    room = make_room(manifest, [len(p) for p in prompts], answer=64, max_batch=8, positions=4096, limit=limit)
    make_caches(manifest, room.sizes)

Without a limit the cache holds the whole batch at its longest; on the host the limit is the memory that is free. Bytes
are one rank's, those of `llmc plan`, which the manifest keeps (compiler/memory.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.compiler.diagnostics import UserError
from llmc.compiler.memory import PREFILL_TOKENS, last_true, needed
from llmc.compiler.reports.show import show_bytes
from llmc.compiler.target.device import Device, held_bytes, parse_size
from llmc.runtime.engine.blocks import BLOCK_SIZE, blocks_for

GIB = 1 << 30
# What a request holds in Python beside the cache, rounded up: objects, random state, text (measured: 1 KiB, 5 KiB where
# it is sampled), and lists of ids and times (measured: 83 bytes a token).
REQUEST_BYTES, TOKEN_BYTES = 8 << 10, 128
HOLES = 0.13  # of a workspace at most, that libatb's first fit leaves in it (compiler/memory.py)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Bytes that one rank may use, and who says so."""

    usable: int
    source: str  # "--memory 32GiB less 3.00 GiB reserved"
    host: bool = False  # nobody set it: it is what this host has

    @property
    def fill(self) -> int:
        """What a cache that is made smaller may fill: of a host's memory not the last eighth, since hostatb's kernels
        have scratch of their own."""
        return self.usable - self.usable // 8 if self.host else self.usable


@dataclass(frozen=True, kw_only=True)
class Room:
    """`sizes`: what N (blocks), B (rows) and S (positions of a row) are in the shapes of the caches."""

    sizes: Mapping[str, int]
    max_batch: int
    prefill_tokens: int  # most in one step
    workspace: int = 0  # bytes of values between nodes in the largest step; 0 where the artifact does not say
    note: str = ""  # where it is less than the whole batch would fill


def memory_limit(
    flag: str | None,
    target: Device,
    environment: Mapping[str, str],
    *,
    attention: str = "paged",
    backend: str = "",
) -> Limit | None:
    """--memory is what there is, of which the device's reserve is not ours (`llmc plan` shows its lines; `backend`: of
    the collectives of several ranks); MAX_MEMORY_GB, as in the original stack, is what a rank may use, in GiB. None:
    nobody says."""
    if flag is not None:
        reserve = max(target.reserve, sum(held_bytes(target, attention, backend, environment).values()))
        usable = parse_size(flag) - reserve
        less = f" less {show_bytes(reserve)} reserved" if reserve else ""
        if usable <= 0:
            raise UserError(f"--memory {flag}{less}: nothing is left")
        return Limit(usable=usable, source=f"--memory {flag}{less}")
    text = environment.get("MAX_MEMORY_GB", "").strip()
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 2**20:
        raise UserError(f"MAX_MEMORY_GB={text}: expected a whole number of GiB, at least 1")
    return Limit(usable=int(text) * GIB, source=f"MAX_MEMORY_GB={text}")


def host_limit(free: int | None, ranks: int, requests: Counter[int], *, answer: int, positions: int) -> Limit | None:
    """What one of the `ranks` on this host may use of its free memory, beside the requests themselves (tokens of a
    prompt -> how many): each rank keeps all of them. UserError where they alone are too many."""
    if free is None:
        return None
    tokens = sum(min(positions, prompt + answer) * count for prompt, count in requests.items())
    held = requests.total() * REQUEST_BYTES + tokens * TOKEN_BYTES
    source = f"{show_bytes(free)} of memory are free on this host" + (f", for {ranks} ranks" if ranks > 1 else "")
    if held > free // ranks:
        raise UserError(
            f"{requests.total()} prompts with their answers are {tokens} tokens, which take {show_bytes(held)}"
            f"{' on each rank' if ranks > 1 else ''} before anything is computed: {source}",
            hint="a smaller --batch-size, or fewer prompts and shorter answers in a run",
        )
    return Limit(usable=free // ranks - held, source=source, host=True)


def workspace_size(room: Room, target: Device) -> int:
    """Bytes that torch_atb's workspace needs for every step of the run: values between nodes, holes between these, and
    the kernels' scratch. The last two are in the device's reserve."""
    return int(room.workspace * (1 + HOLES)) + sum(line.size for line in target.held if line.workspace)


def make_room(
    manifest: Mapping[str, Any],
    prompts: Sequence[int] | Counter[int],
    *,
    answer: int,
    max_batch: int,
    positions: int,
    blocks: int | None = None,
    prefill_tokens: int | None = None,
    limit: Limit | None = None,
) -> Room:
    """`prompts`: their tokens, or tokens -> how many; `answer`: most tokens after each; `positions`: most in a
    sequence; `blocks`: a cache of that size. UserError where the memory does not hold even one sequence, or not the
    blocks that are asked for."""
    prompts = Counter(prompts)
    ends: Counter[int] = Counter()
    for prompt, count in prompts.items():
        ends[min(positions, prompt + answer)] += count
    batch, longest = min(max_batch, prompts.total()), max(ends)
    enough = sum_of_longest(ends, batch, block=BLOCK_SIZE)
    budget = prefill_tokens or max(PREFILL_TOKENS, longest)
    room = Room(sizes={"N": blocks or enough, "B": batch, "S": longest}, max_batch=batch, prefill_tokens=budget)
    memory = manifest["memory"]
    flash = manifest["attention"] == "flash"
    symbol, asked, least = ("B", batch, 1) if flash else ("N", blocks or enough, blocks_for(longest, BLOCK_SIZE))

    def bytes_at(count: int) -> Mapping[str, int]:
        """Of so many rows or blocks, of which a sequence has one or more. Sequences that lose their blocks to others
        are read again, answers included."""
        rows = min(batch, count)
        read = sum_of_longest(prompts if flash or count >= enough else ends, rows)
        tokens = min(read, max(budget, longest))
        cached = None if flash else count
        return needed(memory, tokens=tokens, batch=rows, context=longest, positions=positions, blocks=cached)

    if limit is None or bytes_at(asked)["total"] <= limit.usable:
        return replace(room, workspace=bytes_at(asked)["workspace"])
    most = last_true(lambda count: bytes_at(count)["total"] <= limit.fill, 1, asked - 1)
    if most < least and not blocks and bytes_at(least)["total"] <= limit.usable:
        most = least
    if most < least or (blocks and not flash):
        fewer = f"--num-blocks {most}, " if blocks and most >= least else ""
        raise refusal(bytes_at(asked if fewer else min(asked, least)), limit, manifest["world_size"], fewer)
    said = f"{most} sequences at a time" if flash else f"{most} blocks of cache, so that sequences take turns"
    return replace(
        room,
        sizes={**room.sizes, "B": min(batch, most), symbol: most},
        max_batch=min(batch, most),
        workspace=bytes_at(most)["workspace"],
        note=f"{limit.source}: {said}",
    )


def sum_of_longest(lengths: Counter[int], count: int, *, block: int = 1) -> int:
    """Of so many of the longest (length -> how many): their lengths together, or the blocks that each of them needs."""
    total = 0
    for length in sorted(lengths, reverse=True):
        some = min(count, lengths[length])
        total, count = total + some * blocks_for(length, block), count - some
    return total


def refusal(found: Mapping[str, int], limit: Limit, world_size: int, fewer: str) -> UserError:
    """What is needed, what there is, what each part needs, and what shrinks it."""
    step = sum(found[key] for key in ("constants", "step_tensors", "workspace"))
    parts = {"weights": found["weights"], "cache": found["cache"], "step": step}
    who = f"each of {world_size} ranks" if world_size > 1 else "the run"
    more = "a host with more memory" if limit.host else "a larger --tp"  # ranks on one host share what it has
    if found["weights"] > limit.usable:
        ways = f"{more}: the weights alone are too large"
    else:
        ways = f"{fewer}{more}, shorter prompts or answers, a smaller --batch-size or --max-prefill-tokens"
        if found["constants"] > limit.usable // 2:
            ways = f"a smaller --max-position-embeddings, {ways}"
    if limit.host:
        ways += "; --memory SIZE says that a rank may use more than is free"
    return UserError(
        f"{who} needs at least {show_bytes(found['total'])} and may use {show_bytes(limit.usable)} ({limit.source}): "
        + ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items()),
        hint=f"{ways}; llmc plan shows what fits",
    )
