"""Kernels of the mixture-of-experts family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.moe`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import Desc, Param
from llmc.runtime.hostatb.numeric import Kernel, refuse


def gating(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Sorts the chosen experts [T * k] stably: which token comes to which place, and where each expert's part ends.

    tokenIndex = originalIndex / k; cumSum counts inclusively. With `deviceExpert` the places of these experts are moved
    to the front in ascending order of expert, the rest is zero, and a fourth output says how many there are.
    """
    experts, indices = tensors
    low, high = int(experts.min()), int(experts.max())
    if param.cumSumNum and (low < 0 or high >= param.cumSumNum):
        raise refuse("expert numbers", f"{low} to {high}", f"0 to {param.cumSumNum - 1}")
    sums_dtype = torch.int64 if param.cumSumInt64 else torch.int32
    order = experts.argsort(stable=True)
    original = indices[order]
    if not param.cumSumNum:
        nothing = torch.zeros(1, dtype=sums_dtype, device=experts.device)
        return [torch.zeros_like(original), nothing, original]
    token = original.div(param.topkExpertNum, rounding_mode="floor")
    counts = torch.bincount(experts.long(), minlength=param.cumSumNum)
    if not param.deviceExpert:
        return [token, counts.cumsum(0).to(sums_dtype), original]
    local = torch.tensor(sorted(param.deviceExpert), device=experts.device)
    here = torch.isin(experts[order], local)
    valid = counts[local].sum().to(torch.int32).reshape(1)
    return [_to_front(token, here), counts[local].cumsum(0).to(sums_dtype), _to_front(original, here), valid]


def _to_front(values: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(values)
    front = values[chosen]
    out[: len(front)] = front
    return out


KERNELS: dict[str, Kernel] = {"Gating": gating}
