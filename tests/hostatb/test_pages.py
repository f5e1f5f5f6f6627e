"""Packed weights move to huge pages: with what they hold, within a time, and where the system has none of them."""

from __future__ import annotations

import sys

import pytest
import torch

from llmc.runtime.hostatb import pages, rewrites


@pytest.fixture(autouse=True)
def nothing_remembered():
    pages._remembered.clear()


def test_what_is_moved_keeps_its_values_and_its_place():
    weights = [torch.randn(1024, 1024) for _ in range(4)]
    copies = [weight.clone() for weight in weights]
    before = [weight.data_ptr() for weight in weights]
    for weight in weights:
        pages.remember(weight.data_ptr(), weight.nbytes)
    moved = pages.settle()
    assert [weight.data_ptr() for weight in weights] == before
    assert all(map(torch.equal, weights, copies))
    assert moved % pages.FRAME == 0 <= moved
    assert pages.settle() == 0, "once is enough"


def test_every_frame_of_a_range_is_remembered():
    pages.remember(3 * pages.FRAME - 1, 2)
    pages.remember(7 * pages.FRAME, 1)
    assert pages._remembered == {2 * pages.FRAME, 3 * pages.FRAME, 7 * pages.FRAME}


def test_moving_ends_when_its_time_is_up():
    weight = torch.randn(4096, 1024)
    pages.remember(weight.data_ptr(), weight.nbytes)
    times = iter([0.0, *[pages.BUDGET_S + 1] * 100])
    assert pages.settle(lambda: next(times)) == 0


def test_other_systems_have_nothing_to_move(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    pages.remember(0, 1)
    assert pages.settle() == 0


def test_memory_that_is_gone_is_no_error():
    pages.remember(1 << 46, 10 * pages.FRAME)
    assert pages.settle() == 0


def test_packed_weights_are_remembered():
    assert rewrites.packed(torch.randn(512, 512)) is not None
    assert pages._remembered
