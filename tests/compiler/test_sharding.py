"""How axes lie over ranks: properties over all sizes, and facts of the vendor's stack (mindie-stack.md 4)."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmc.compiler.sharding import PARTIAL, WHOLE, Shard, Split, deal, deal_heads, named, split_on

WORLDS = st.integers(1, 8)
SIZES = st.integers(1, 300)
HEAD_DIM = 16


def elements(split: Split) -> list[list[int]]:
    """What each rank holds, element by element."""
    return [list(range(start, start + count)) for start, count in split.runs]


def joined(shares: list[list]) -> list:
    return [item for share in shares for item in share]


@st.composite
def attentions(draw) -> tuple[int, int, int]:
    """heads, kv heads and world size"""
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return kv_heads * group, kv_heads, draw(WORLDS)


@given(size=SIZES, world_size=WORLDS, unit=st.sampled_from([1, 2, 16]))
def test_a_dealt_axis_is_a_partition_in_order_with_padding_only_at_the_end(size, world_size, unit):
    split = deal(size * unit, world_size, unit)
    assert joined(elements(split)) == list(range(size * unit))
    assert split.is_partition
    assert split.in_order
    assert split.keeps_whole(unit)
    assert split.local * world_size >= size * unit
    assert all(count <= split.local for _, count in split.runs)


@given(size=SIZES, world_size=WORLDS)
def test_a_share_is_no_larger_than_the_fullest_rank_needs(size, world_size):
    split = deal(size, world_size)
    assert max(count for _, count in split.runs) == split.local == -(-size // world_size)


@given(size=SIZES, world_size=WORLDS)
def test_shares_put_one_after_the_other_are_the_axis_and_then_zeros(size, world_size):
    """What all-gather gives, and what is cut from it."""
    split = deal(size, world_size)
    padded = [[*held, *([None] * (split.local - len(held)))] for held in elements(split)]
    assert joined(padded) == [*range(size), *([None] * (split.local * world_size - size))]


@given(attentions())
@example((10, 2, 8))  # 5 query heads over 4 ranks, 2 each: nothing is left for the fourth
def test_query_heads_are_a_partition_of_whole_heads(attention):
    heads, kv_heads, world_size = attention
    queries, _ = deal_heads(heads, kv_heads, HEAD_DIM, world_size)
    assert sorted(joined(elements(queries))) == list(range(heads * HEAD_DIM))
    assert queries.is_partition
    assert queries.keeps_whole(HEAD_DIM)
    assert all(0 <= count <= queries.local for _, count in queries.runs)


@given(attentions())
def test_every_kv_head_is_held_whole_and_twice_only_where_ranks_outnumber_kv_heads(attention):
    heads, kv_heads, world_size = attention
    _, keys = deal_heads(heads, kv_heads, HEAD_DIM, world_size)
    held = joined(elements(keys))
    assert set(held) == set(range(kv_heads * HEAD_DIM))
    assert keys.keeps_whole(HEAD_DIM)
    assert all(0 <= count <= keys.local for _, count in keys.runs)
    if world_size < 2 * kv_heads:
        assert len(held) == kv_heads * HEAD_DIM
        assert keys.is_partition
    copies = {n: held.count(n) for n in held}
    assert max(copies.values()) <= max(1, world_size // kv_heads)


@given(attentions())
def test_a_query_head_attends_on_its_rank_to_the_kv_head_that_it_attends_to_in_the_whole_model(attention):
    """SelfAttention takes query head n of a rank to its kv head n // (query heads / kv heads of the rank)."""
    heads, kv_heads, world_size = attention
    queries, keys = deal_heads(heads, kv_heads, 1, world_size)
    assert queries.local % keys.local == 0
    per_kv = queries.local // keys.local
    for own_queries, own_keys in zip(elements(queries), elements(keys), strict=True):
        for place, head in enumerate(own_queries):
            assert own_keys[place // per_kv] == head // (heads // kv_heads)


@given(attentions())
def test_one_rank_holds_every_head(attention):
    heads, kv_heads, _ = attention
    queries, keys = deal_heads(heads, kv_heads, HEAD_DIM, 1)
    assert (queries, keys) == (deal(heads * HEAD_DIM, 1), deal(kv_heads * HEAD_DIM, 1))


@given(st.integers(1, 16), WORLDS)
def test_attention_with_as_many_kv_heads_as_heads_is_dealt_in_blocks_of_heads(heads, world_size):
    queries, keys = deal_heads(heads, heads, HEAD_DIM, world_size)
    assert queries == keys == deal(heads * HEAD_DIM, world_size, HEAD_DIM)


# What the vendor's stack does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world_size", "query_counts", "kv_counts"),
    [
        pytest.param(32, 32, 8, [4] * 8, [4] * 8, id="llama2-7b"),
        pytest.param(52, 52, 8, [7] * 7 + [3], [7] * 7 + [3], id="llama-33b at 8: the last rank has 3 of 7"),
        pytest.param(52, 52, 4, [13] * 4, [13] * 4, id="llama-33b at 4"),
        pytest.param(64, 8, 8, [8] * 8, [1] * 8, id="llama2-70b"),
        pytest.param(28, 4, 4, [7] * 4, [1] * 4, id="qwen2-7b at 4"),
        pytest.param(28, 4, 8, [4, 3] * 4, [1] * 8, id="qwen2-7b at 8: three or four real heads"),
        pytest.param(9, 3, 3, [3] * 3, [1] * 3, id="smollm2"),
        pytest.param(16, 1, 4, [4] * 4, [1] * 4, id="multi-query: the kv head on every rank"),
    ],
)
def test_heads_on_each_rank_are_the_vendors(heads, kv_heads, world_size, query_counts, kv_counts):
    queries, keys = deal_heads(heads, kv_heads, 128, world_size)
    assert [count // 128 for _, count in queries.runs] == query_counts
    assert [count // 128 for _, count in keys.runs] == kv_counts
    assert (queries.local, keys.local) == (max(query_counts) * 128, max(kv_counts) * 128)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_rank_r_uses_kv_head_r_over_copies_where_ranks_outnumber_kv_heads(kv_heads, copies, share):
    """mindie-stack.md 4.1: rank r uses head r // (world / kv)."""
    world_size = kv_heads * copies
    queries, keys = deal_heads(kv_heads * copies * share, kv_heads, 1, world_size)
    assert keys.runs == tuple((rank // copies, 1) for rank in range(world_size))
    assert queries == deal(kv_heads * copies * share, world_size)


@pytest.mark.parametrize(
    ("size", "world_size", "local", "last"),
    [(11008, 8, 1376, 1376), (32000, 8, 4000, 4000), (49152, 3, 16384, 16384), (32001, 8, 4001, 3994)],
)
def test_ffn_and_vocabulary_shares(size, world_size, local, last):
    split = deal(size, world_size)
    assert (split.local, split.runs[-1][1]) == (local, last)


def test_ranks_past_the_end_of_the_axis_hold_nothing():
    """The vendor's simple rule fails where ceil(u / w) * (w - 1) > u: some rank would start past the end."""
    split = deal(9, 8)
    assert split.runs == ((0, 2), (2, 2), (4, 2), (6, 2), (8, 1), (9, 0), (9, 0), (9, 0))
    assert split.is_partition
    assert split.in_order


# Partition, order, shape ----------------------------------------------------------------------------------------------


def test_a_copied_element_is_not_a_partition():
    copied = Split(2, 1, ((0, 1), (0, 1), (1, 1), (1, 1)))
    assert not copied.is_partition
    assert not copied.in_order


def test_a_lost_element_is_not_a_partition():
    assert not Split(4, 2, ((0, 2), (2, 1))).is_partition
    assert not Split(4, 2, ((1, 1), (2, 2))).is_partition


def test_padding_in_the_middle_is_a_partition_but_not_in_order():
    queries, _ = deal_heads(28, 4, 1, 8)
    assert queries.is_partition
    assert not queries.in_order


@given(attentions())
def test_in_order_says_whether_shares_and_padding_restore_the_axis(attention):
    queries, _ = deal_heads(attention[0], attention[1], 1, attention[2])
    padded = [[*held, *([None] * (queries.local - len(held)))] for held in elements(queries)]
    restored = joined(padded)[: queries.size]
    assert queries.in_order == (restored == list(range(queries.size)))


def test_a_run_that_cuts_a_head_does_not_keep_it_whole():
    assert not deal(64, 3).keeps_whole(16)
    assert deal(64, 3, 16).keeps_whole(16)


def test_letters_as_people_read_them():
    assert [str(s) for s in (WHOLE, PARTIAL, split_on(0, deal(8, 2)), split_on(1, deal(8, 2)))] == [
        "R", "P", "S(0)", "S(1)",
    ]  # fmt: skip


@given(SIZES, SIZES, WORLDS)
def test_local_shape_is_the_sum_of_the_shares_of_all_pieces_on_the_split_axis(a, b, world_size):
    first, second = deal(a, world_size), deal(b, world_size)
    shard = split_on(1, first, second)
    assert shard.local(("T", a + b)) == ("T", first.local + second.local)
    assert WHOLE.local(("T", a)) == PARTIAL.local(("T", a)) == ("T", a)


def test_the_split_of_a_packed_value_is_asked_piece_by_piece():
    with pytest.raises(ValueError, match="unpack"):
        _ = split_on(1, deal(8, 2), deal(4, 2)).split
    assert split_on(1, deal(8, 2)).split == deal(8, 2)


@given(st.lists(st.tuples(SIZES, st.integers(2, 8)), min_size=1, max_size=12))
def test_distinct_splits_have_distinct_names_that_say_size_and_share(pairs):
    splits = [deal(size, world_size) for size, world_size in pairs]
    names = named(splits)
    assert set(names) == set(splits)
    assert len(set(names.values())) == len(names)
    assert all(name.split("#")[0] == f"{split.size}:{split.local}" for split, name in names.items())


def test_splits_of_equal_sizes_and_other_runs_have_names_of_their_own():
    queries, _ = deal_heads(10, 2, 1, 4)  # 3 and 2 of each group
    plain = deal(10, 4)
    assert (queries.size, queries.local) == (plain.size, plain.local)
    assert list(named([plain, queries]).values()) == ["10:3", "10:3#2"]


def test_a_shard_is_data_that_can_be_compared_and_hashed():
    assert len({Shard("R"), WHOLE, split_on(0, deal(8, 2)), split_on(0, deal(8, 2))}) == 2
