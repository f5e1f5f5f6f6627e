"""When each step of a planned graph ended, for whoever asks: the same kernels, with a look at the clock behind each.

with watching() as laps:
    operation.forward(tensors)
laps[0].graph, laps[0].steps[0].nodes, laps[0].times       # times[i] to times[i + 1]: step i, in ns
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter_ns

import torch

from llmc.runtime.hostatb.step import Step


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One call of a graph. `times`: ns of the clock at the start and behind each of `steps`, which is what the rewrites
    made of the graph's nodes."""

    graph: str
    steps: Sequence[Step]
    times: Sequence[int]


_LAPS: ContextVar[list[Lap] | None] = ContextVar("laps", default=None)


@contextmanager
def watching() -> Iterator[list[Lap]]:
    """The calls of graphs in this thread, in order, as they end."""
    laps: list[Lap] = []
    token = _LAPS.set(laps)
    try:
        yield laps
    finally:
        _LAPS.reset(token)


def is_watched() -> bool:
    return _LAPS.get() is not None


def tell(graph: str, steps: Sequence[Step], times: list[int]) -> None:
    laps = _LAPS.get()
    if laps is not None:
        laps.append(Lap(graph=graph, steps=steps, times=times))


def clock_of(on_cpu: bool) -> Callable[[], int]:
    """CUDA works behind the calls: there the clock waits for it."""
    return perf_counter_ns if on_cpu else _behind_cuda


def _behind_cuda() -> int:
    torch.cuda.synchronize()
    return perf_counter_ns()
