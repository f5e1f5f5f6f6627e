"""Sampling on the host: the C library's random numbers, and the choices made with them."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from torch import Tensor

from llmc.compiler.atb import OPS
from llmc.runtime.hostatb.numeric import desc_of
from llmc.runtime.hostatb.operation import KERNELS
from llmc.runtime.hostatb.sampling import GlibcRand

# srand(1); rand() five times, as every glibc prints it
FIRST_OF_SEED_1 = [1804289383, 846930886, 1681692777, 1714636915, 1957747793]


def test_rand_of_seed_1_is_the_well_known_sequence() -> None:
    generator = GlibcRand(1)
    assert [generator.rand() for _ in range(5)] == FIRST_OF_SEED_1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="compares with this machine's glibc")
@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
def test_rand_is_that_of_the_c_library(seed: int) -> None:
    libc = ctypes.CDLL(None)
    libc.srand(ctypes.c_uint(seed))
    generator = GlibcRand(seed)
    assert [generator.rand() for _ in range(100)] == [libc.rand() for _ in range(100)]


def sample(values: dict[str, object], *tensors: Tensor) -> list[Tensor]:
    op = OPS["TopkToppSampling"]
    param, descs = op.param(values), [desc_of(t) for t in tensors]
    assert len(op.infer(param, descs, "host")) == op.arity(param)[1]
    return KERNELS["TopkToppSampling"](param, tensors, descs, "host")


def test_sampling_with_k_1_is_the_greedy_choice() -> None:
    probs = torch.rand(16, 100).softmax(-1).half()
    index, prob = sample({"topk": 1}, probs, torch.ones(16, 1).half())
    assert torch.equal(prob, probs.max(-1, keepdim=True)[0])
    assert torch.equal(probs.gather(1, index.long()), prob)


def test_sampling_stays_inside_the_nucleus_in_proportion() -> None:
    probs = torch.tensor([[0.4, 0.05, 0.3, 0.05, 0.2]]).expand(512, 5).contiguous().half()
    index, _ = sample({"topk": 5, "randSeed": 3}, probs, torch.full((512, 1), 0.75).half())
    assert set(index.flatten().tolist()) == {0, 2}  # 0.4 + 0.3 stay below topp, 0.2 would not
    assert abs((index == 0).float().mean().item() - 4 / 7) < 0.05


def test_the_exponential_form_takes_the_largest_quotient() -> None:
    probs, noise = torch.rand(8, 50).softmax(-1), torch.empty(8, 50).exponential_()
    order = probs.sort(-1, descending=True)[1]
    keep_all = torch.full((8, 1), 49, dtype=torch.int32), torch.full((8, 1), 2.0)
    index, _ = sample({"topkToppSamplingType": 2}, probs, *keep_all, noise)
    best = (probs.gather(1, order) / noise).argmax(-1, keepdim=True)  # the noise belongs to the sorted places
    assert torch.equal(index.long(), order.gather(1, best))
