"""Rows of contiguous caches, nd and nz: after any steps a sequence finds what it wrote, in the row that the scheduler
says, and nothing is copied but the rows that move."""

from __future__ import annotations

import ctypes
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmc.runtime import npu
from llmc.runtime.engine.blocks import RowManager
from llmc.runtime.engine.rows import Rows
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.scheduler import Move, Scheduler
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.hostatb.numeric import format_of, set_format

POSITIONS = 32
SHAPES = {"nd": (POSITIONS, 32), "nz": (2, POSITIONS, 16)}  # of a row: the same 32 columns


def caches(layout: str, rows: int) -> dict[str, torch.Tensor]:
    return {name: set_format(torch.zeros(1, rows, *SHAPES[layout], dtype=torch.float16), layout) for name in "kv"}


class Written(TorchDispatchMode):
    """Counts bytes that operations write, in place or into new tensors."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if func._schema.is_mutable or t.untyped_storage().data_ptr() not in given:
                self.bytes += t.numel() * t.element_size()
        return out


@pytest.mark.parametrize("layout", SHAPES)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=8),
    rows=st.integers(1, 4),
    budget=st.integers(9, 20),
)
def test_every_sequence_keeps_what_it_wrote(layout, prompts, rows, budget):
    """A sequence writes its number at each of its positions. `prompts`: tokens, and steps until it ends."""
    kept = Rows(caches(layout, rows))
    scheduler = Scheduler(RowManager(rows=rows, length=POSITIONS), max_batch=rows, max_prefill_tokens=budget)
    ends = {}
    for number, (length, steps) in enumerate(prompts, start=1):
        request = Request(id=number, prompt_ids=[1] * length, params=SamplingParams(max_tokens=steps))
        ends[request.id] = length + steps
        scheduler.add(request)
    while scheduler.busy:
        batch = scheduler.schedule()
        kept.move(batch.moves)
        for cache in kept.of(batch.first_row, len(batch.sequences)).values():
            assert format_of(cache) == layout
            assert cache.shape == (1, len(batch.sequences), *SHAPES[layout])
            assert cache.is_contiguous(), "torch_atb would write to a copy and lose it"
            for row, sequence in enumerate(batch.sequences):
                known = 0 if batch.phase == "prefill" else len(sequence) - 1
                assert (cache[0, row, ..., :known, :] == sequence.id).all()
                cache[0, row, ..., known : len(sequence), :] = sequence.id
        for sequence in batch.sequences:
            sequence.append(1, 0.0)
        scheduler.finish([sequence for sequence in batch.sequences if len(sequence) >= ends[sequence.id]])


@pytest.mark.parametrize("layout", SHAPES)
def test_joining_copies_nothing_and_leaving_copies_the_positions_of_the_row_that_moves(layout):
    kept = Rows(caches(layout, 8))
    position = 2 * 32 * 2  # k and v, columns, bytes
    with Written() as written:
        kept.of(0, 5)  # five are prefilled
        kept.of(5, 1)  # one more
        kept.of(0, 6)  # and all of them go on
    assert written.bytes == 0
    with Written() as written:
        kept.move([Move(source=5, target=1, length=20)])
        kept.of(0, 5)
        kept.of(0, 4)  # the last one leaves: nothing takes its row
    assert written.bytes == 20 * position


class OnNpu(torch.Tensor):
    """A tensor of the host that says it is on an NPU."""

    device = types.SimpleNamespace(type="npu")  # type: ignore[assignment]


@pytest.mark.parametrize("status", [0, 107002])
def test_on_an_npu_the_bytes_of_an_nz_row_move_alone_and_after_what_was_queued(status, monkeypatch):
    """torch_npu's own copy would turn the whole cache to nd and back."""
    called = []

    def memcpy(target, most, source, size, kind):
        called.append((most.value, size.value, kind))
        ctypes.memmove(target, source, size.value)
        return status

    monkeypatch.setattr(npu, "synchronize", lambda: called.append("synchronize"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(aclrtMemcpy=memcpy))
    given = {name: torch.arange(3.0).half().view(1, 3, 1, 1, 1).expand(1, 3, *SHAPES["nz"]).clone() for name in "kv"}
    kept = Rows({name: cache.as_subclass(OnNpu) for name, cache in given.items()})
    row = 32 * POSITIONS * 2
    with Written() as written:
        if status:
            with pytest.raises(RuntimeError, match=f"aclrtMemcpy of {row} bytes.*107002"):
                kept.move([Move(source=2, target=0, length=7)])
            return
        kept.move([Move(source=2, target=0, length=7)])
    assert written.bytes == 0
    assert called == ["synchronize", (row, row, 3), (row, row, 3)]
    for cache in given.values():
        assert cache[0, :, 0, 0, 0].tolist() == [2, 1, 2]
        assert (cache[0, 0] == 2).all()
