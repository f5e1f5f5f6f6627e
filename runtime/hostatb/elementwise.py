"""Kernels of Elewise, Activation and SwigluQuant (atb-operations.md 3.12, 3.13); the contract is in `numeric.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from llmc.compiler.atb import elementwise as table
from llmc.compiler.atb.core import Desc, Param
from llmc.runtime.hostatb.norm import quantise_rows, to_int8
from llmc.runtime.hostatb.numeric import DTYPE_NAME, FLOAT16_MAX, TORCH_DTYPE, Kernel, round_to

_BINARY: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    table.ADD: torch.add,
    table.SUB: torch.sub,
    table.MUL: torch.mul,
    table.REALDIV: torch.div,
}
_COMPARE: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    table.LESS: torch.lt,
    table.GREATER: torch.gt,
    table.EQUAL: torch.eq,
    table.LOGICAL_AND: torch.logical_and,
    table.LOGICAL_OR: torch.logical_or,
}
_UNARY: dict[int, Callable[[Tensor], Tensor]] = {
    table.COS: torch.cos,
    table.SIN: torch.sin,
    table.NEG: torch.neg,
    table.TANH: torch.tanh,
}


def elewise(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """One rounding an operation: torch computes 16-bit operands in fp32 and rounds the result."""
    kind, x = param.elewiseType, tensors[0]
    if kind in _BINARY:
        return [round_to(_BINARY[kind](x, tensors[1]), x.dtype, chip)]
    if kind in _COMPARE:
        return [_COMPARE[kind](x, tensors[1]).to(torch.int8)]
    if kind in _UNARY:
        return [round_to(_UNARY[kind](x), x.dtype, chip)]
    if kind == table.LOGICAL_NOT:
        return [(x == 0).to(torch.int8)]
    if kind == table.MULS:
        return [round_to(x * param.mulsParam.varAttr, x.dtype, chip)]
    if kind == table.CAST:
        return [_cast(x, param.outTensorType, chip)]
    if kind == table.QUANT:
        return [_quant(x, param.quantParam)]
    if kind == table.QUANT_PER_CHANNEL:
        return [_quant_per_channel(x, tensors[1], tensors[2], chip)]
    if kind == table.DEQUANT_PER_CHANNEL:
        return [_dequant_per_channel(x, tensors[1], tensors[2])]
    return quantise_rows(x.float())


def _cast(x: Tensor, wanted: int, chip: str) -> Tensor:
    dtype = TORCH_DTYPE[table.cast_dtype(wanted, DTYPE_NAME[x.dtype])]
    return round_to(x, dtype, chip).clone() if dtype == x.dtype else round_to(x, dtype, chip)


def _quant(x: Tensor, quant: Param) -> Tensor:
    """Multiplies by inputScale, unlike every other quantising operation; in x's 16-bit dtype."""
    scale = torch.tensor(quant.inputScale, dtype=x.dtype, device=x.device)
    offset = torch.tensor(float(quant.inputOffset), dtype=x.dtype, device=x.device)
    return to_int8(x * scale + offset)


def _quant_per_channel(x: Tensor, scale: Tensor, offset: Tensor, chip: str) -> Tensor:
    """x / scale + offset: the quotient of bf16 is taken in fp32; both continue in fp16."""
    work = torch.float32 if x.dtype == torch.float32 else torch.float16
    wide = x.float() / scale.float() if x.dtype == torch.bfloat16 else x / scale
    quotient = round_to(wide, work, chip)
    return to_int8(quotient + offset.to(work) if offset.numel() else quotient)


def _dequant_per_channel(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    shifted = x.to(scale.dtype) - offset.to(scale.dtype) if offset.numel() else x.to(scale.dtype)
    return (shifted.float() * scale.float()).clamp(-FLOAT16_MAX, FLOAT16_MAX).to(scale.dtype)


def activation(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Computed in fp32, one rounding."""
    kind, dtype = param.activationType, tensors[0].dtype
    if kind == table.SWIGLU_BACKWARD:
        return [round_to(_swiglu_backward(tensors[0].float(), tensors[1].float()), dtype, chip)]
    x = tensors[0].float()
    if kind == table.GELU:
        y = functional.gelu(x, approximate="none" if param.geluMode == 1 else "tanh")
    elif kind == table.SWISH:
        y = functional.silu(x) if param.scale == 1 else x * torch.sigmoid(param.scale * x)
    else:
        y = _ACTIVATIONS[kind](x)
    return [round_to(y, dtype, chip)]


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient [.., h] of the output and x [.., 2h] -> gradient of x."""
    gate, up = x.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    inner = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((gradient * inner * up, gradient * gate * sigmoid), dim=-1)


def _fast_gelu(x: Tensor) -> Tensor:
    return x * torch.exp(0.851 * (x - x.abs())) / (1 + torch.exp(-1.702 * x.abs()))


_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    table.RELU: torch.relu,
    table.FAST_GELU: _fast_gelu,
    table.FASTER_GELU_FORWARD: lambda x: x * torch.sigmoid(1.702 * x),
    table.LOG: torch.log,
    table.SIGMOID: torch.sigmoid,
    table.SWIGLU_FORWARD: _swiglu,
}


def swiglu_quant(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    return quantise_rows(_swiglu(tensors[0].float()))


KERNELS: dict[str, Kernel] = {"Elewise": elewise, "Activation": activation, "SwigluQuant": swiglu_quant}
