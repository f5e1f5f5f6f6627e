"""How many blocks or rows a run gets from the memory it may use, and what is refused."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.artifact import make_manifest
from llmc.compiler.diagnostics import UserError
from llmc.compiler.memory import needed
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.target.device import device
from llmc.runtime.room import Limit, Room, host_limit, make_room, memory_limit

GIB = 2**30
PROMPTS = [1000, 700, 300, 1000]


@cache
def manifest(attention: str = "paged", size: int = 2) -> dict[str, Any]:
    """LLaMA-2 13B: 12.27 GiB of weights on each of two ranks, 400 KiB of cache a token."""
    return make_manifest(compile_model("llama2-13b", Options(attention=attention, world_size=size)))


def room(limit: float | None, attention: str = "paged", **options: Any) -> Room:
    """For prompts of 1000, 700, 300, 1000 tokens and answers of 100."""
    said = None if limit is None else Limit(usable=int(limit * GIB), source="--memory")
    options = {"answer": 100, "max_batch": 4, "positions": 4096, **options}
    return make_room(manifest(attention), PROMPTS, limit=said, **options)


def total(found: Room, tokens: int, attention: str = "paged") -> int:
    blocks = found.sizes["N"] if attention == "paged" else None
    memory = manifest(attention)["memory"]
    return needed(
        memory, tokens=tokens, batch=found.sizes["B"], context=1100, positions=4096, blocks=blocks
    )["total"]  # fmt: skip


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_without_a_limit_the_cache_holds_the_batch_at_its_longest(attention):
    """Blocks of 128 tokens for 1100, 800, 400 and 1100."""
    found = room(None, attention)
    assert found.sizes == {"N": 9 + 7 + 4 + 9, "B": 4, "S": 1100}
    assert (found.max_batch, found.prefill_tokens, found.note) == (4, 4096, "")
    assert room(None, attention, max_batch=2).sizes == {"N": 9 + 9, "B": 2, "S": 1100}
    assert room(None, attention, positions=1024).sizes == {"N": 8 + 7 + 4 + 8, "B": 4, "S": 1024}


@pytest.mark.parametrize("size", [1, 2])
def test_logits_of_every_token_need_room_for_every_token(size):
    """float16 logits of 32000 tokens; over two ranks once in shares and once side by side."""
    last, every = (
        make_manifest(compile_model("llama2-13b", Options(world_size=size, logits=logits)))
        for logits in ("last", "all")
    )
    assert (last["logits"], every["logits"]) == ("last", "all")

    def grows(manifest: dict[str, Any], part: str) -> int:
        """Bytes of a prefill of 4096 tokens above those of one of 64, where neither workspace is the least one."""
        few, many = (
            needed(manifest["memory"], tokens=n, batch=1, context=4096, positions=4096)[part] for n in (64, 4096)
        )
        return many - few

    vocab = 32000 * 2
    assert every["memory"]["activation_bytes_per_token"]["prefill"] >= vocab * size
    assert grows(every, "step_tensors") - grows(last, "step_tensors") > 0.8 * vocab * (4096 - 64)
    found = make_room(every, PROMPTS, answer=100, max_batch=4, positions=4096)
    assert found.workspace >= 3000 * vocab * (size > 1)
    limit = Limit(
        usable=needed(last["memory"], tokens=3000, batch=4, context=1100, positions=4096, blocks=29)["total"],
        source="--memory",
    )
    assert make_room(last, PROMPTS, answer=100, max_batch=4, positions=4096, limit=limit).note == ""
    assert "blocks of cache" in make_room(every, PROMPTS, answer=100, max_batch=4, positions=4096, limit=limit).note


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_enough_memory_changes_nothing(attention):
    assert room(29, attention) == room(None, attention)
    assert room(29, attention, prefill_tokens=1500) == room(None, attention, prefill_tokens=1500)


def test_less_memory_gives_as_many_blocks_as_fit():
    """Sequences take turns, and are read again with what they have answered: 1100 + 1100 + 800 + 400 tokens."""
    found = room(13.8)
    assert 9 <= found.sizes["N"] < 29
    assert found.sizes["B"] == 4
    assert "blocks of cache" in found.note
    assert total(found, 3400) <= 13.8 * GIB
    assert (
        total(Room(sizes={**found.sizes, "N": found.sizes["N"] + 1}, max_batch=4, prefill_tokens=1), 3400) > 13.8 * GIB
    )


def test_less_memory_gives_as_many_rows_as_fit():
    found = room(13.8, "flash")
    rows = found.sizes["B"]
    assert 1 <= rows < 4
    assert found.max_batch == rows
    assert f"{rows} sequences at a time" in found.note
    assert total(found, sum([1000, 1000, 700][:rows]), "flash") <= 13.8 * GIB


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_what_does_not_hold_one_sequence_is_refused_with_both_sizes_and_ways_out(attention):
    with pytest.raises(UserError) as refused:
        room(12.5, attention)
    said = str(refused.value)
    for words in ("each of 2 ranks needs at least 1", "may use 12.50 GiB (--memory)", "weights 12.27 GiB", "cache ",
                  "a larger --tp", "shorter prompts", "--max-prefill-tokens", "llmc plan"):  # fmt: skip
        assert words in said


def test_weights_that_alone_do_not_fit_leave_only_more_ranks():
    with pytest.raises(UserError, match="a larger --tp: the weights alone") as refused:
        make_room(manifest(size=1), [10], answer=10, max_batch=1, positions=4096, limit=Limit(usable=GIB, source="x"))
    assert "the run needs at least 24" in str(refused.value)
    assert "shorter" not in str(refused.value)


def test_blocks_that_are_asked_for_are_given_or_refused():
    assert room(None, blocks=12).sizes["N"] == 12
    assert room(29, blocks=12).sizes["N"] == 12
    most = room(13.8).sizes["N"]
    assert room(13.8, blocks=most).sizes["N"] == most
    with pytest.raises(UserError, match=f"--num-blocks {most}, a larger --tp"):
        room(13.8, blocks=most + 1)
    assert room(29, "flash", blocks=12).note == "", "rows are not blocks"


def test_a_smaller_prefill_leaves_more_for_the_cache():
    assert room(13.6, prefill_tokens=1000).sizes["N"] > room(13.6).sizes["N"]


@pytest.mark.parametrize(
    ("flag", "environment", "usable"),
    [
        ("32GiB", {}, 29 * GIB),
        ("32GiB", {"MAX_MEMORY_GB": "7"}, 29 * GIB),
        (None, {"MAX_MEMORY_GB": "29"}, 29 * GIB),
        (None, {"MAX_MEMORY_GB": ""}, None),
        (None, {}, None),
    ],
)
def test_the_flag_is_the_board_and_the_variable_is_what_a_rank_may_use(flag, environment, usable):
    limit = memory_limit(flag, device("atlas-800i-a2"), environment)
    assert (limit and limit.usable) == usable


def test_buffers_of_collectives_that_outgrow_the_reserve_are_reserved():
    """HCCL_BUFFSIZE 2000: 2 * 2000 MiB, beside 284 MiB that each rank's libraries hold."""
    target, large = device("atlas-800i-a2"), {"HCCL_BUFFSIZE": "2000"}
    limit = memory_limit("32GiB", target, large, backend="hccl")
    assert limit == Limit(usable=(32768 - 4284) * 2**20, source="--memory 32GiB less 4.18 GiB reserved")
    for environment, backend in ((large, "lccl"), (large, ""), ({}, "hccl")):
        limit = memory_limit("32GiB", target, environment, backend=backend)
        assert limit == Limit(usable=29 * GIB, source="--memory 32GiB less 3.00 GiB reserved")


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize("limit", [None, 29, 13.8])
def test_the_workspace_of_the_largest_step_is_known(limit, attention):
    """That of the plan, for the tokens that one prefill step reads: all prompts, or those that run at a time."""
    found = room(limit, attention)
    tokens = sum(sorted(PROMPTS, reverse=True)[: found.max_batch] if attention == "flash" else PROMPTS)
    if limit == 13.8 and attention == "paged":
        tokens = 3400  # read again with what they have answered
    memory = manifest(attention)["memory"]
    expected = needed(memory, tokens=tokens, batch=found.max_batch, context=1100, positions=4096)["workspace"]
    assert found.workspace == expected > memory["workspace_at_least"] > 0
    less = room(limit, attention, prefill_tokens=1000).workspace
    assert less < found.workspace


def test_on_the_host_nothing_is_reserved():
    assert memory_limit("2GB", device("host"), {}) == Limit(usable=2 * 10**9, source="--memory 2GB")


@pytest.mark.parametrize(
    ("flag", "environment", "words"),
    [
        ("3GiB", {}, "--memory 3GiB less 3.00 GiB reserved: nothing is left"),
        ("32", {}, "'32' is not a size"),
        (None, {"MAX_MEMORY_GB": "much"}, "MAX_MEMORY_GB=much: expected a whole number"),
        (None, {"MAX_MEMORY_GB": "0"}, "MAX_MEMORY_GB=0"),
        (None, {"MAX_MEMORY_GB": "-3"}, "MAX_MEMORY_GB=-3"),
    ],
)
def test_limits_that_mean_nothing_are_told(flag, environment, words):
    with pytest.raises(UserError, match=words):
        memory_limit(flag, device("atlas-800i-a2"), environment)


def test_the_page_on_sizing_shows_a_refusal_as_it_is_printed():
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text(encoding="utf-8")
    limit = memory_limit(None, device("atlas-800i-a2"), {"MAX_MEMORY_GB": "13"})
    with pytest.raises(UserError) as refused:
        make_room(manifest(), [2000] * 4, answer=300, max_batch=4, positions=4096, limit=limit)
    assert f"llmc: {refused.value}" in page


FREE = Counter({1000: 2, 700: 1, 300: 1})


def host(free: float, requests: Counter[int] = FREE, ranks: int = 2) -> Limit:
    limit = host_limit(int(free * GIB), ranks, requests, answer=100, positions=4096)
    assert limit is not None
    return limit


def test_prompts_can_be_counted_instead_of_listed():
    for limit in (None, Limit(usable=int(13.8 * GIB), source="x")):
        options: dict[str, Any] = {"answer": 100, "max_batch": 3, "positions": 4096, "limit": limit}
        assert make_room(manifest(), FREE, **options) == make_room(manifest(), PROMPTS, **options)


def test_ranks_of_one_host_share_its_free_memory():
    limit = host(40)
    assert limit.source == "40.00 GiB of memory are free on this host, for 2 ranks"
    assert 19.99 * GIB < limit.usable < 20 * GIB
    assert host_limit(None, 2, FREE, answer=1, positions=8) is None


def test_a_cache_that_is_cut_leaves_a_part_of_the_host_for_kernels():
    options: dict[str, Any] = {"answer": 100, "max_batch": 4, "positions": 4096}
    whole = make_room(manifest(), FREE, **options, limit=host(29.0))
    assert whole.sizes["N"] == 29
    many = Counter({1000: 1000})
    cut = make_room(manifest(), many, **{**options, "max_batch": 1000}, limit=host(40.0, many))
    assert 50 < cut.sizes["N"] < 9000
    assert cut.sizes["N"] * 128 * 400 * 1024 < (20 * 7 / 8 - 12.27) * GIB
    assert cut.max_batch == cut.sizes["B"] == min(1000, cut.sizes["N"])
    # One sequence may have the last eighth too.
    assert make_room(manifest(), Counter({1000: 4}), **options, limit=host(27.5)).sizes["N"] >= 9


def test_what_a_host_does_not_hold_is_refused_with_ways_that_help_there():
    """More ranks on it would not."""
    with pytest.raises(UserError) as refused:
        make_room(manifest(), FREE, answer=100, max_batch=4, positions=4096, limit=host(8))
    said = str(refused.value)
    assert "may use 4.00 GiB (8.00 GiB of memory are free on this host, for 2 ranks)" in said
    assert "--memory SIZE" in said
    assert "larger --tp" not in said


@pytest.mark.parametrize("count", [10**9, 10**30])
def test_more_requests_than_a_host_can_list_are_refused_without_listing_them(count):
    with pytest.raises(UserError, match=rf"{count} prompts [\s\S]* a smaller --batch-size"):
        host(64, Counter({5: count}))
    assert host(64, Counter({5: 100_000})).usable > 29 * GIB


def test_rope_tables_that_are_too_long_name_their_flag():
    with pytest.raises(UserError, match="a smaller --max-position-embeddings"):
        make_room(manifest(), FREE, answer=100, max_batch=4, positions=10**9, limit=host(64))
