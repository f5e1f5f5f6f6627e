"""Rows of contiguous nz caches: after any steps a sequence finds what it wrote, in the row that the scheduler says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.blocks import RowManager
from llmc.runtime.engine.rows import BlockedRows
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.scheduler import Scheduler
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.hostatb.numeric import format_of

POSITIONS = 32


@given(
    prompts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=8),
    rows=st.integers(1, 4),
    budget=st.integers(9, 20),
)
def test_every_sequence_keeps_what_it_wrote(prompts, rows, budget):
    """A sequence writes its number at each of its positions. `prompts`: tokens, and steps until it ends."""
    shape = torch.zeros(1, dtype=torch.float32).expand(1, rows, 2, POSITIONS, 16)
    blocked = BlockedRows({"k": shape, "v": shape})
    scheduler = Scheduler(RowManager(rows=rows, length=POSITIONS), max_batch=rows, max_prefill_tokens=budget)
    ends = {}
    for length, steps in prompts:
        request = Request(prompt_ids=[1] * length, params=SamplingParams(max_tokens=steps))
        ends[request.id] = length + steps
        scheduler.add(request)
    while scheduler.busy:
        batch = scheduler.schedule()
        caches = blocked.before(batch)
        assert {format_of(cache) for cache in caches.values()} == {"nz"}
        for cache in caches.values():
            assert cache.shape == (1, len(batch.sequences), 2, POSITIONS, 16)
            for row, sequence in enumerate(batch.sequences):
                known = 0 if batch.phase == "prefill" else len(sequence) - 1
                assert (cache[0, row, :, :known] == sequence.id + 1).all()
                cache[0, row, :, known : len(sequence)] = sequence.id + 1
        blocked.after(batch)
        for sequence in batch.sequences:
            sequence.append(1, 0.0)
        scheduler.finish([sequence for sequence in batch.sequences if len(sequence) >= ends[sequence.id]])


def test_a_cache_that_has_no_room_is_one_message():
    shape = torch.zeros(1, dtype=torch.float16).expand(1, 2, 2**20, 2**20, 16)
    scheduler = Scheduler(RowManager(rows=2, length=64), max_batch=2, max_prefill_tokens=64)
    scheduler.add(Request(prompt_ids=[1], params=SamplingParams(max_tokens=1)))
    with pytest.raises(UserError, match=r"needs 32768\.0 GiB.*\n.*--batch-size"):
        BlockedRows({"k": shape}).before(scheduler.schedule())
