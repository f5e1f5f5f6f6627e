"""Kernels of the shape family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.shape`.

Each is one to three aten calls, because Gather, Split, Transpose and Concat run in every step:

    q, k, v = split(param, [qkv], [desc], "Ascend910B")     # [T, 4608] -> [T, 3072], [T, 768], [T, 768]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import AtbError, Desc, Param
from llmc.compiler.atb.shape import ND_TO_NZ, REDUCE_MAX, REDUCE_MIN, slice_bounds
from llmc.runtime.hostatb.numeric import Kernel, nd_to_nz, nz_to_nd, refuse


def gather(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """The library does not check indices; reading outside input 0 is refused here."""
    x, indices = tensors
    try:
        return [_gather(x, indices, param.axis, param.batchDims)]
    except (IndexError, RuntimeError) as error:
        low, high, end = int(indices.long().min()), int(indices.long().max()), x.shape[param.axis]
        if low >= 0 and high < end:
            raise
        raise AtbError(
            "ERROR_INVALID_PARAM", "an index lies outside input 0; the library would read other memory",
            found=f"{low} to {high}", expected=f"0 to {end - 1}", tensor="input 1", stage="execute",
        ) from error  # fmt: skip


def _gather(x: Tensor, indices: Tensor, axis: int, batch_dims: int) -> Tensor:
    """x[:axis] ++ indices[batch_dims:] ++ x[axis+1:]"""
    if indices.dtype == torch.uint32:  # torch cannot index with it
        indices = indices.long()
    if x.dtype == torch.uint32:  # nor gather it
        return _gather(x.view(torch.int32), indices, axis, batch_dims).view(torch.uint32)
    if axis == 0 and x.dim() == 2:
        return torch.embedding(x, indices)
    if not batch_dims:
        rows = x.index_select(axis, indices.reshape(-1))
        return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    # The dims between batch dims and axis are taken whole: x [B, M, A, R], indices [B, I] -> [B, M, I, R].
    batch, middle, rest = x.shape[:batch_dims], x.shape[batch_dims:axis], x.shape[axis + 1 :]
    taken = indices.shape[batch_dims:]
    index = indices.reshape(batch.numel(), 1, taken.numel(), 1).long()
    index = index.expand(-1, middle.numel(), -1, rest.numel())
    flat = x.reshape(batch.numel(), middle.numel(), x.shape[axis], rest.numel())
    return flat.gather(2, index).reshape(*batch, *middle, *taken, *rest)


def split(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x, dim = tensors[0], param.splitDim
    sizes = list(param.splitSizes) or [x.shape[dim] // param.splitNum] * param.splitNum
    return list(torch.split_with_sizes_copy(x, sizes, dim))  # type: ignore[call-overload,func-returns-value]


def concat(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    return [torch.cat(list(tensors), param.concatDim)]


def slice_(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    view = tensors[0]
    for dim, (start, length) in enumerate(slice_bounds(param, view.shape)):
        if length != view.shape[dim]:
            view = view.narrow(dim, start, length)
    return [view.clone(memory_format=torch.contiguous_format)]


def transpose(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    return [tensors[0].permute(tuple(param.perm)).clone(memory_format=torch.contiguous_format)]


def transdata(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    if param.transdataType == ND_TO_NZ:
        return [nd_to_nz(tensors[0])]
    x, (rows, columns) = tensors[0], param.outCrops
    if rows > x.shape[2] or columns > x.shape[1] * x.shape[3]:  # the library rounds both up to 16 before it compares
        raise refuse("outCrops reach beyond the blocks", [rows, columns], f"at most {x.shape[2]}, {x[0, :, 0].numel()}")
    return [nz_to_nd(x, rows, columns)]


def fill(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    wide = torch.tensor(param.value[0], dtype=torch.float32)  # the parameter is a C++ float
    if not param.withMask:
        return [torch.full(tuple(param.outDim), wide.half().item(), dtype=torch.float16)]
    x, mask = tensors
    return [torch.where(mask.bool(), wide.to(x), x)]


def cumsum(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Sums in fp32, rounded once."""
    x = tensors[0]
    return [x.cumsum(param.axes[0], dtype=torch.float32).to(x.dtype)]


def softmax(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Over all `axes` together, in fp32."""
    x, first, last = tensors[0], param.axes[0], param.axes[-1]
    if first == last:
        return [x.softmax(first, dtype=torch.float32).to(x.dtype)]
    return [x.flatten(first, last).softmax(first, dtype=torch.float32).to(x.dtype).reshape(x.shape)]


def as_strided(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    view = tensors[0].contiguous().as_strided(tuple(param.size), tuple(param.stride), param.offset[0])
    return [view.clone(memory_format=torch.contiguous_format)]


def repeat(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    return [tensors[0].repeat(tuple(param.multiples))]


def where(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    return [torch.where(tensors[0].bool(), tensors[1], tensors[2])]


def set_value(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """No output: dst[starts:ends] = src."""
    dst, src = tensors
    dst[tuple(slice(start, end) for start, end in zip(param.starts, param.ends, strict=True))] = src
    return []


def reduce_(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x, axes = tensors[0], tuple(sorted(set(param.axis)))
    if param.reduceType == REDUCE_MAX:
        return [x.amax(axes)]
    if param.reduceType == REDUCE_MIN:
        return [x.amin(axes)]
    return [x.sum(axes, dtype=torch.float32).to(x.dtype)]


KERNELS: dict[str, Kernel] = {
    "Gather": gather, "Split": split, "Concat": concat, "Slice": slice_, "Transpose": transpose, "Transdata": transdata,
    "Fill": fill, "Cumsum": cumsum, "Softmax": softmax, "AsStrided": as_strided, "Repeat": repeat, "Where": where,
    "SetValue": set_value, "Reduce": reduce_,
}  # fmt: skip
