"""The shape operations on the host against numpy, and the layout rule of NZ blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.compiler.atb import OPS, AtbError
from llmc.runtime.hostatb.numeric import desc_of
from llmc.runtime.hostatb.operation import KERNELS


def run(op: str, values: dict[str, Any], *tensors: Tensor, format: str = "nd") -> list[Tensor]:
    """Create, infer, execute by the C++ names; outputs have the inferred shapes and share nothing with the inputs."""
    entry, chip = OPS[op], "host"
    param = entry.param(values)
    entry.create(param, chip)
    descs = [replace(desc_of(t), format=format) for t in tensors]
    inferred = entry.infer(param, descs, chip)
    outs = KERNELS[op](param, tensors, descs, chip)
    assert [tuple(out.shape) for out in outs] == [desc.shape for desc in inferred]
    owners = {t.untyped_storage().data_ptr() for t in tensors}
    assert all(out.is_contiguous() and out.untyped_storage().data_ptr() not in owners for out in outs)
    return outs


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("shape", "axis"), [((7, 5), 0), ((7, 5), 1), ((2, 3, 4, 5), 2)])
def test_gather_takes_along_the_axis(shape: tuple[int, ...], axis: int, index_dtype: torch.dtype) -> None:
    x = torch.randn(shape)
    indices = torch.randint(shape[axis], (3, 2), dtype=index_dtype)
    (out,) = run("Gather", {"axis": axis}, x, indices)
    np.testing.assert_array_equal(out.numpy(), np.take(x.numpy(), indices.numpy(), axis))


def test_gather_with_batch_dims_takes_row_by_row() -> None:
    x, indices = torch.randn(2, 3, 4, 5), torch.randint(4, (2, 6))
    (out,) = run("Gather", {"axis": 2, "batchDims": 1}, x, indices)
    for batch in range(2):
        np.testing.assert_array_equal(out[batch].numpy(), np.take(x[batch].numpy(), indices[batch].numpy(), 1))


@pytest.mark.parametrize("bad", [-1, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_gather_outside_the_table_is_refused_with_both_bounds(axis: int, bad: int) -> None:
    with pytest.raises(AtbError, match=r"outside input 0[\s\S]*expected: 0 to 6"):
        run("Gather", {"axis": axis}, torch.randn(7, 7), torch.tensor([0, bad]))


@pytest.mark.parametrize(
    "values", [{"splitDim": -1, "splitNum": 3}, {"splitDim": 1, "splitNum": 3, "splitSizes": [6, 2, 1]}]
)
def test_split_cuts_where_numpy_cuts(values: dict[str, Any]) -> None:
    x = torch.randn(4, 9)
    cuts = np.cumsum(values.get("splitSizes", [3, 3, 3]))[:-1]
    for out, expected in zip(run("Split", values, x), np.split(x.numpy(), cuts, 1), strict=True):
        np.testing.assert_array_equal(out.numpy(), expected)


def test_slice_counts_negative_offsets_from_the_end() -> None:
    x = torch.randn(6, 5, 4)
    (out,) = run("Slice", {"offsets": [-4, 1, 0], "size": [2, -1, -1]}, x)
    np.testing.assert_array_equal(out.numpy(), x.numpy()[2:4, 1:, :])


def test_softmax_over_several_axes_sums_to_one_over_them_together() -> None:
    x = torch.randn(3, 4, 5)
    (out,) = run("Softmax", {"axes": [1, 2]}, x)
    e = np.exp(x.numpy().astype(np.float64))
    np.testing.assert_allclose(out.numpy(), e / e.sum((1, 2), keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_nz_blocks_lie_where_the_layout_rule_says_and_padding_is_zero(dtype: torch.dtype) -> None:
    x = torch.randint(1, 100, (2, 19, 37)).to(dtype)
    (nz,) = run("Transdata", {"transdataType": 2}, x)
    n0 = 32 if dtype == torch.int8 else 16
    b, r, c = torch.meshgrid(torch.arange(2), torch.arange(19), torch.arange(37), indexing="ij")
    assert torch.equal(nz[b, c // n0, r, c % n0], x)
    assert nz.count_nonzero() == x.numel()


def test_transdata_there_and_back_is_the_identity() -> None:
    x = torch.randn(2, 19, 37).half()
    (nz,) = run("Transdata", {"transdataType": 2}, x)
    (back,) = run("Transdata", {"transdataType": 1, "outCrops": [19, 37]}, nz, format="nz")
    assert torch.equal(back, x)


def test_cumsum_of_many_small_numbers_is_not_stopped_by_16_bit_rounding() -> None:
    (out,) = run("Cumsum", {"axes": [0]}, torch.full((4096,), 1.0).bfloat16())
    assert out[-1] == 4096  # summed in bfloat16 it would stay at 256


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_reduce_removes_the_axes(kind: int) -> None:
    x = torch.randint(-9, 9, (3, 4, 5)).bfloat16()
    expected = {1: np.max, 2: np.min, 3: np.sum}[kind](x.float().numpy(), (0, 2))
    (out,) = run("Reduce", {"reduceType": kind, "axis": [0, 2]}, x)
    np.testing.assert_array_equal(out.float().numpy(), expected)
