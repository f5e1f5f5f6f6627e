"""Kernels of Linear and LinearSparse (atb-operations.md 3.2, 3.4); the contract is in `numeric.py`.

Float: products are summed in fp32 and rounded once (torch's 16-bit matmuls do so on CPU and CUDA). A 16-bit bias is
added after that rounding and rounds again; an fp32 bias is added before it. Quantised: int32 sums, scaled in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from llmc.compiler.atb.core import ACL_UNDEFINED, AtbError, Desc, Param
from llmc.compiler.atb.linear import EIN_SUM, PER_TOKEN
from llmc.runtime.hostatb.numeric import ACL_TORCH, Kernel, nz_to_nd, round_to, scale_values


def linear(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x, weight = tensors[0], oriented_weight(tensors[1], param.transposeB)
    if param.matmulType == EIN_SUM:
        return [_matmul(x.transpose(0, 1), weight, chip).transpose(0, 1).contiguous()]
    x = x.transpose(-1, -2) if param.transposeA else x
    if weight.dim() == 3 and (x.dim() == 2 or weight.shape[0] == 1):
        weight = weight[0]
    if param.outDataType != ACL_UNDEFINED:
        return [_quantised(x, weight, param, tensors[2:], chip)]
    if param.enAccum:
        return [tensors[2] + _matmul(x.float(), weight.float(), chip)]
    if not param.hasBias:
        return [_matmul(x, weight, chip)]
    bias = tensors[2] if weight.dim() == 2 else tensors[2].unsqueeze(1)  # [n], [1, n], or per batch [b, 1, n]
    bias = bias.reshape(-1) if weight.dim() == 2 else bias
    if bias.dtype == x.dtype:
        return [round_to(_matmul(x, weight, chip) + bias, x.dtype, chip)]
    return [round_to(_matmul(x.float(), weight.float(), chip) + bias, x.dtype, chip)]


def oriented_weight(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as [n, k] or [b, n, k]; 4-D NZ blocks are unpacked."""
    if weight.dim() == 4:
        weight = nz_to_nd(weight)
    return weight if transposed else weight.transpose(-1, -2)


def _matmul(x: Tensor, weight: Tensor, chip: str) -> Tensor:
    """x [.., m, k], weight [n, k] or [b, n, k] -> [.., m, n] in x's dtype."""
    y = dense(x, weight) if weight.dim() == 2 else torch.matmul(x, weight.transpose(-1, -2))
    return round_to(y, y.dtype, chip)


def _quantised(x: Tensor, weight: Tensor, param: Param, rest: Sequence[Tensor], chip: str) -> Tensor:
    total = int_matmul(x, weight)
    if param.hasBias:
        total = total + _columns(rest[0], weight)
        rest = rest[1:]
    scaled = total.float() * _columns(scale_values(rest[0]), weight)
    if param.quantMode == PER_TOKEN:
        scaled = scaled * rest[1].unsqueeze(-1)
    return round_to(scaled, ACL_TORCH[param.outDataType], chip)


def _columns(vector: Tensor, weight: Tensor) -> Tensor:
    """[n], [1, n] or [b, n] so that it broadcasts over the rows of the product."""
    if weight.dim() == 2 or vector.dim() == 1:
        return vector.reshape(-1)
    return vector.unsqueeze(1)


def int_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 x [.., m, k], weight [n, k] or [b, n, k] -> int32, exact."""
    if x.is_cuda:  # torch._int_mm wants multiples of 8 there; fp64 holds every sum below 2**53 exactly
        return torch.matmul(x.double(), weight.double().transpose(-1, -2)).to(torch.int32)
    if weight.dim() == 2:
        flat = x.reshape(-1, x.shape[-1])
        return torch._int_mm(flat, weight.t()).unflatten(0, x.shape[:-1])
    return torch.stack([torch._int_mm(a, b.t()) for a, b in zip(x, weight, strict=True)])


def linear_sparse(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x, weight, bias, scale, _ = tensors
    if weight.dim() != 2:
        raise AtbError(
            "ERROR_INVALID_TENSOR_DIM", "hostatb cannot read compressed weights: the format is the vendor's own",
            found=f"weight {list(weight.shape)}", expected=f"the dense weight [{bias.shape[-1]}, {x.shape[-1]}]",
            tensor="input 1", stage="execute",
        )  # fmt: skip
    total = int_matmul(x, weight) + bias.reshape(-1)
    return [round_to(total.float() * scale_values(scale).reshape(-1), torch.float16, chip)]


KERNELS: dict[str, Kernel] = {"Linear": linear, "LinearSparse": linear_sparse}
