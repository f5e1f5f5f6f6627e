"""Scheduling: everything finishes, budgets hold, rows stay compact, moves keep the rows' content. Needs torch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.blocks import BlockManager, RowManager
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.scheduler import Scheduler
from llmc.runtime.engine.sequence import Sequence


def sequence(prompt: int, answer: int = 4) -> Sequence:
    return Sequence(prompt_ids=[0] * prompt, params=SamplingParams(max_tokens=answer))


def run_all(scheduler: Scheduler, waves: list[list[Sequence]], max_steps: int = 2000) -> list:
    """Drive the scheduler as the engine does, a wave a step. Returns the batches, with lengths as they ran."""
    batches, waves = [], list(waves)
    while scheduler.busy or waves:
        for seq in waves.pop(0) if waves else []:
            scheduler.add(seq)
        if not scheduler.busy:
            continue
        batch = scheduler.schedule()
        batches.append((batch, [len(s) for s in batch.sequences]))
        assert len(batches) < max_steps, "the scheduler makes no progress"
        for seq in batch.sequences:
            seq.append(1, 0.0)
        done = [s for s in batch.sequences if s.output_len == s.params.max_tokens]
        scheduler.finish(done)
    return batches


REQUESTS = st.lists(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=3), min_size=1, max_size=5)


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 5), st.integers(20, 50), st.integers(10, 30))
def test_paged_every_sequence_finishes_within_all_budgets(requests, max_batch, budget, num_blocks):
    waves = [[sequence(p, a) for p, a in wave] for wave in requests]
    manager = BlockManager(num_blocks=num_blocks, block_size=4)  # at least 40 tokens: the longest request just fits
    scheduler = Scheduler(manager, max_batch=max_batch, max_prefill_tokens=budget)
    batches = run_all(scheduler, waves)
    for seq in (s for wave in waves for s in wave):
        assert seq.output_len == seq.params.max_tokens
    for batch, lengths in batches:
        assert 0 < len(lengths) <= max_batch
        assert batch.phase == "decode" or sum(lengths) <= budget or len(lengths) == 1
    assert manager.free_blocks == num_blocks


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 5))
def test_contiguous_rows_hold_the_right_sequence_at_every_step(requests, rows):
    """Play the moves on a model of the cache: row -> (sequence, tokens written)."""
    waves = [[sequence(p, a) for p, a in wave] for wave in requests]
    scheduler = Scheduler(RowManager(rows=rows, length=40), max_batch=rows, max_prefill_tokens=100)
    cache: dict[int, tuple[int, int]] = {}
    for batch, lengths in run_all(scheduler, waves):
        for move in batch.moves:
            owner, written = cache[move.source]
            assert move.length == written
            cache[move.target] = (owner, written)
        for i, (seq, length) in enumerate(zip(batch.sequences, lengths, strict=True)):
            row = batch.first_row + i
            assert row < rows
            if batch.phase == "decode":
                assert cache[row] == (seq.id, length - 1)
            cache[row] = (seq.id, length)
    assert all(s.output_len == s.params.max_tokens for wave in waves for s in wave)


def test_decode_runs_all_sequences_together_after_prefill():
    scheduler = Scheduler(BlockManager(num_blocks=8), max_batch=4, max_prefill_tokens=100)
    batches = run_all(scheduler, [[sequence(5, 3), sequence(7, 3)]])
    assert [(b.phase, lengths) for b, lengths in batches] == [
        ("prefill", [5, 7]),
        ("decode", [6, 8]),
        ("decode", [7, 9]),
    ]


def test_a_newcomer_is_prefilled_between_decode_steps():
    scheduler = Scheduler(BlockManager(num_blocks=8), max_batch=4, max_prefill_tokens=100)
    phases = [b.phase for b, _ in run_all(scheduler, [[sequence(5, 4)], [], [sequence(3, 2)]])]
    assert phases == ["prefill", "decode", "prefill", "decode", "decode"]


def test_the_prefill_budget_splits_a_large_arrival():
    scheduler = Scheduler(BlockManager(num_blocks=8), max_batch=4, max_prefill_tokens=10)
    batches = run_all(scheduler, [[sequence(6, 1), sequence(4, 1), sequence(5, 1)]])
    assert [lengths for _, lengths in batches] == [[6, 4], [5]]


def test_when_blocks_run_out_the_newest_starts_over_with_all_its_tokens():
    scheduler = Scheduler(BlockManager(num_blocks=4, block_size=4), max_batch=2, max_prefill_tokens=16)
    old, new = sequence(7, 6), sequence(7, 6)
    batches = run_all(scheduler, [[old, new]])
    assert scheduler.preemptions == 1
    again = [(b, lengths) for b, lengths in batches if b.phase == "prefill"]
    assert again[1][0].sequences == (new,)
    assert again[1][1] == [9]  # 7 of the prompt and 2 generated
    assert old.output_len == new.output_len == 6


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (0, ["empty"]),
        (16, ["16 tokens", "16 in all"]),
        (12, ["12 tokens", "(10)", "--max-prefill-tokens 12"]),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_with_numbers(prompt, words):
    scheduler = Scheduler(BlockManager(num_blocks=4, block_size=4), max_batch=2, max_prefill_tokens=10)
    with pytest.raises(UserError) as error:
        scheduler.add(sequence(prompt))
    assert all(word in str(error.value) for word in words)
    assert not scheduler.busy
