"""The parts of a trace by themselves: shares that are joined, columns of packed weights, budgets, recordings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llmc.compiler.sharding import deal, deal_heads
from llmc.runtime.measure.compare import Comparison, by_row, rounding, ulps
from llmc.runtime.measure.forced import joined
from llmc.runtime.measure.reference import coarser, columns


def entry(shard: str, width: int, splits: list[str], **more: Any) -> dict[str, Any]:
    known = {
        "name": "layers.3.x",
        "node": "layers.3.x",
        "op": "linear",
        "place": "",
        "dtype": "float32",
        "head_dim": None,
    }
    return {**known, "shape": ["T", width], "shard": shard, "splits": splits, "stands_for": None, **more}


def as_manifest(split) -> dict[str, Any]:
    return {"size": split.size, "local": split.local, "ranks": [list(run) for run in split.runs]}


def shares_of(whole: torch.Tensor, split) -> list[torch.Tensor]:
    """What each rank holds: its run of columns, then numbers that nobody may look at."""
    found = []
    for start, count in split.runs:
        share = torch.full((len(whole), split.local), 1e9)
        share[:, :count] = whole[:, start : start + count]
        found.append(share)
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_uneven_shares_are_put_side_by_side_without_their_padding(world_size):
    whole, split = torch.randn(5, 83), deal(83, world_size)
    (found,) = joined(entry("S(1)", 83, ["a"]), shares_of(whole, split), {"a": as_manifest(split)})
    assert torch.equal(found, whole)


def test_pieces_of_a_packed_weight_are_joined_each_by_itself():
    q, k = deal_heads(6, 2, 16, 2)
    whole_q, whole_k = torch.randn(5, 96), torch.randn(5, 32)
    shares = [torch.cat(pair, 1) for pair in zip(shares_of(whole_q, q), shares_of(whole_k, k), strict=True)]
    splits = {"q": as_manifest(q), "k": as_manifest(k)}
    (found,) = joined(entry("S(1)", 128, ["q", "k"]), shares, splits)
    assert torch.equal(found, torch.cat([whole_q, whole_k], 1))


def test_of_ranks_that_hold_the_same_head_each_is_looked_at():
    _, k = deal_heads(4, 2, 16, 4)  # ranks 0, 1 hold head 0; ranks 2, 3 head 1
    whole = torch.randn(5, 32)
    shares = shares_of(whole, k)
    shares[3] = shares[3] + 1
    first, second = joined(entry("S(1)", 32, ["k"]), shares, {"k": as_manifest(k)})
    assert torch.equal(first, whole)
    assert torch.equal(second[:, :16], whole[:, :16])
    assert torch.equal(second[:, 16:], whole[:, 16:] + 1)


def test_partial_sums_are_added_in_float64_and_equal_answers_are_one():
    shares = [torch.tensor([[2.0**24]]), torch.tensor([[1.0]]), torch.tensor([[-(2.0**24)]])]
    assert joined(entry("P", 1, []), shares, {})[0].tolist() == [[1.0]]
    assert len(joined(entry("R", 1, []), [shares[0], shares[0].clone()], {})) == 1
    assert len(joined(entry("R", 1, []), shares, {})) == 3


def test_columns_of_a_tensor_that_repeats_its_parts_are_gathered():
    value = torch.arange(12.0).repeat(2, 1)
    rows = {"groups": 2, "stride": 6, "offset": 4, "size": 1}
    assert columns(value, rows).tolist() == [[4.0, 10.0]] * 2
    assert columns(value, None) is value


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_rounding_has_the_error_that_is_said_of_it(dtype):
    exact = torch.randn(400, 256, dtype=torch.float64)
    rounded = exact.to(getattr(torch, dtype)).double()
    measured = math.sqrt(by_row(rounded - exact, exact) / len(exact))
    assert measured == pytest.approx(rounding(dtype), rel=0.1)


def test_units_in_the_last_place_are_counted_across_zero():
    a = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16)
    assert ulps(a, a) == 0
    one = torch.tensor([1.0078125] * 3, dtype=torch.bfloat16)
    assert ulps(torch.ones(3, dtype=torch.bfloat16), one) == 1
    tiny = torch.tensor([2.0**-133] * 3, dtype=torch.bfloat16)  # the smallest there is
    assert ulps(tiny, -tiny) == 2
    assert ulps(a.double(), a.double()) is None


def test_the_dtype_with_fewer_bits_decides():
    assert coarser("float16", "bfloat16") == "bfloat16"
    assert coarser("float32", "float16") == "float16"


class Known:
    """A side with a truth and a natural error of so much, everywhere."""

    def __init__(self, truth: torch.Tensor, noise: float) -> None:
        self.value = truth
        self.low = truth + noise * truth.norm(dim=1, keepdim=True) / truth.shape[1] ** 0.5
        self.noise = noise

    def counterpart(self, phase, entry):
        return "it"

    def truth(self, phase, entry, rows):
        return self.value

    def natural(self, phase, entry, rows):
        return self.low

    def nearest(self, phase, entry, rows):
        return self.low

    def usual(self, phase, entry):
        return self.noise

    def dtype(self, entry):
        return entry["dtype"]


@pytest.fixture
def truth():
    return torch.randn(100, 256, generator=torch.Generator().manual_seed(0))


def compared(truth, ours, noise=1e-3, **more):
    comparison = Comparison("prefill", entry("R", 256, [], **more), Known(truth, noise))
    comparison.add([ours], [(0, i) for i in range(len(truth))])
    return comparison.result()


def test_twice_the_natural_error_everywhere_leaves_the_budget_of_the_whole(truth):
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    assert compared(truth, truth * (1 + 1e-3 * noise))["ok"]
    found = compared(truth, truth * (1 + 2e-3 * noise))
    assert (found["ok"], found["why"]) == (False, "as a whole")


def test_an_error_of_one_head_of_one_token_is_found_there(truth):
    ours = truth.clone()
    ours[70, 64:80] *= 1.04  # of a hundred tokens with sixteen heads each
    found = compared(truth, ours, head_dim=16)
    assert found["relative"] < found["budget"]
    assert (found["ok"], found["why"]) == (False, "in one place")
    assert (found["worst"]["position"], found["worst"]["columns"]) == (70, [64, 80])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_outside_every_budget(truth, bad):
    ours = truth.clone()
    ours[3, 5] = bad
    found = compared(truth, ours)
    assert not found["ok"]


def test_a_token_with_a_huge_norm_does_not_hide_the_others(truth):
    large = truth.clone()
    large[0] *= 1e4
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    ours = large.clone()
    ours[1:] *= 1 + 3e-3 * noise[1:]
    assert not compared(large, ours)["ok"]


def test_where_transformers_overflows_nothing_is_asked_but_numbers(truth):
    assert compared(truth, truth * 1.5, noise=math.inf)["ok"]
    assert not compared(truth, truth * math.nan, noise=math.inf)["ok"]
