"""A graph that is watched: the same numbers, and a time behind each step, whose nodes are told."""

from __future__ import annotations

import pytest
import torch

from llmc.runtime import hostatb
from llmc.runtime.hostatb import rewrites
from llmc.runtime.hostatb.watch import watching

TYPES = hostatb.RmsNormParam.RmsNormType


def block():
    """Product, residual and norm, product: five inputs and two outputs."""
    builder = hostatb.GraphBuilder("block")
    builder.set_input_output(["x", "w", "residual", "gamma", "v"], ["sum", "y"])
    linear = hostatb.LinearParam(has_bias=False)
    builder.add_operation(hostatb.Operation(linear, chip="host"), ["x", "w"], ["a"])
    norm = hostatb.RmsNormParam(
        layer_type=TYPES.RMS_NORM_PRENORM, pre_norm_param=hostatb.RmsNormParam.PreNormParam(epsilon=1e-6)
    )
    builder.add_operation(hostatb.Operation(norm, chip="host"), ["a", "residual", "gamma"], ["n", "sum"])
    builder.add_operation(hostatb.Operation(linear, chip="host"), ["n", "v"], ["y"])
    return builder.build()


def inputs(dtype):
    torch.manual_seed(0)
    shapes = (3, 64), (64, 64), (3, 64), (64,), (96, 64)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_watched_call_gives_the_same_numbers_and_a_time_for_every_node(dtype):
    graph, tensors = block(), inputs(dtype)
    plain = graph.forward(tensors)
    with watching() as laps:
        watched = graph.forward(tensors)
    graph.forward(tensors)
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)
    (lap,) = laps
    assert lap.graph == "block"
    assert [node for step in lap.steps for node in step.nodes] == [0, 1, 2]
    assert len(lap.times) == len(lap.steps) + 1
    assert list(lap.times) == sorted(lap.times)


def test_steps_that_a_rewrite_joins_are_told_as_one(monkeypatch):
    monkeypatch.setattr(rewrites, "way_of", lambda step: "packed")
    with watching() as laps:
        block().forward(inputs(torch.bfloat16))
    assert [step.nodes for step in laps[0].steps] == [(0, 1), (2,)]


def test_each_segment_that_runs_is_a_lap():
    first, second, tensors = block(), block(), inputs(torch.float32)
    with watching() as laps:
        total, _ = first.forward(tensors)
        second.forward([tensors[0], tensors[1], total, *tensors[3:]])
    assert [lap.graph for lap in laps] == ["block", "block"]
    assert laps[0].times[-1] <= laps[1].times[0]
