"""Cache room: no block twice, nothing lost, a refusal changes nothing. Needs torch (through Sequence)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.blocks import BlockManager, RowManager, blocks_for, slot
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.sequence import Sequence


def sequence(tokens: int) -> Sequence:
    return Sequence(prompt_ids=[0] * tokens, params=SamplingParams())


@given(st.lists(st.tuples(st.sampled_from(["new", "token", "end"]), st.integers(0, 30)), max_size=80))
def test_blocks_are_never_shared_and_never_lost(actions):
    manager, live = BlockManager(num_blocks=12, block_size=4), []
    for action, n in actions:
        if action == "new":
            seq = sequence(n + 1)
            if manager.allocate(seq):
                live.append(seq)
            else:
                assert seq.block_table == []
                assert blocks_for(n + 1, 4) > manager.free_blocks
        elif live:
            seq = live[n % len(live)]
            if action == "end":
                manager.free(seq)
                live.remove(seq)
            else:
                seq.append(1, 0.0)
                if not manager.grow(seq):
                    assert manager.free_blocks == 0
                    seq.token_ids.pop()
        held = [block for seq in live for block in seq.block_table]
        assert len(set(held)) == len(held)
        assert len(held) + manager.free_blocks == 12
        assert all(len(seq.block_table) == blocks_for(len(seq), 4) for seq in live)


def test_a_block_is_added_exactly_when_the_last_one_is_full():
    manager, seq = BlockManager(num_blocks=3, block_size=4), sequence(4)
    assert manager.allocate(seq)
    assert len(seq.block_table) == 1
    seq.append(7, 0.0)
    assert manager.grow(seq)
    assert len(seq.block_table) == 2


def test_slot_follows_the_block_table():
    assert [slot([5, 2], p, 4) for p in (0, 3, 4, 7)] == [20, 23, 8, 11]


def test_rows_refuse_a_sequence_beyond_their_number_or_length():
    manager, seqs = RowManager(rows=2, length=8), [sequence(3) for _ in range(3)]
    assert [manager.allocate(seq) for seq in seqs] == [True, True, False]
    manager.free(seqs[0])
    assert manager.allocate(seqs[2])
    assert not RowManager(rows=1, length=8).allocate(sequence(9))


@pytest.mark.parametrize(
    "make",
    [lambda: BlockManager(num_blocks=0), lambda: RowManager(rows=0, length=4), lambda: RowManager(rows=1, length=0)],
)
def test_an_empty_cache_is_refused(make):
    with pytest.raises(UserError, match="at least one"):
        make()
