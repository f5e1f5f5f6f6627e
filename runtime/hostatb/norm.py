"""Kernels of RmsNorm and LayerNorm (atb-operations.md 3.5, 3.6); the contract is in `numeric.py`.

Everything is computed in fp32 and rounded once; HIGH_PERFORMANCE and int8 PRENORM work in 16 bit, as said there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import Desc, Param
from llmc.compiler.atb.norm import GEMMA, HIGH_PERFORMANCE, INT8, NORM, POSTNORM, PRENORM, STATIC, rms_has_bias
from llmc.runtime.hostatb.numeric import Kernel, refuse, round_to


def rms_norm(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    if param.layerType == NORM:
        return _rms_norm(param.normParam, tensors, chip)
    return (_rms_prenorm if param.layerType == PRENORM else _rms_postnorm)(param, tensors, chip)


def _scaled(x: Tensor, gamma: Tensor, epsilon: float, dims: int = 1) -> tuple[Tensor, Tensor]:
    """(x / rms * gamma, 1 / rms) in fp32 over the last `dims` dimensions."""
    inverse = torch.rsqrt(x.square().mean(tuple(range(-dims, 0)), keepdim=True) + epsilon)
    return x * inverse * gamma.float(), inverse


def _rms_norm(norm: Param, tensors: Sequence[Tensor], chip: str) -> list[Tensor]:
    x, gamma = tensors[:2]
    wide = x.float()
    if norm.quantType == INT8:
        y = _scaled(wide, gamma.reshape(-1), norm.epsilon)[0] + _row(tensors[2], x).float()
        return quantise_rows(y) if norm.dynamicQuantType != STATIC else [_static_int8(y, tensors[3], tensors[4], chip)]
    if norm.rstd:
        y, inverse = _scaled(wide, gamma, norm.epsilon, gamma.dim())
        return [round_to(y, x.dtype, chip), inverse]
    if norm.precisionMode == HIGH_PERFORMANCE:  # x / rms is rounded, then multiplied in x's dtype
        unit = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon) * wide
        return [round_to(round_to(unit, x.dtype, chip) * gamma.reshape(-1), x.dtype, chip)]
    weight = gamma.reshape(-1).float()
    y = _scaled(wide, weight + 1 if norm.modelType == GEMMA else weight, norm.epsilon)[0]
    return [round_to(y, x.dtype, chip)]


def _row(tensor: Tensor, x: Tensor) -> Tensor:
    """gamma or beta as one row of x; the library does not look at all of them."""
    if tensor.numel() != x.shape[-1]:
        raise refuse("gamma or beta", list(tensor.shape), f"[{x.shape[-1]}]")
    return tensor.reshape(-1)


def _rms_prenorm(param: Param, tensors: Sequence[Tensor], chip: str) -> list[Tensor]:
    pre = param.preNormParam
    if pre.quantType == INT8:  # the normalised value, beta, scale and offset are applied in x's 16-bit dtype
        x, residual, gamma, beta, scale, offset = tensors
        total = x.float() + residual.float()
        y = round_to(_scaled(total, gamma.reshape(-1), pre.epsilon)[0], x.dtype, chip) + beta.reshape(-1)
        quantised = y / scale + offset.to(x.dtype)
        return [to_int8(quantised), round_to(total, x.dtype, chip)]
    total, gamma = _sum(param, tensors)
    dtype = tensors[0].dtype
    return [
        round_to(_scaled(total, gamma.reshape(-1), pre.epsilon)[0], dtype, chip),
        round_to(total, dtype, chip),
    ]


def _rms_postnorm(param: Param, tensors: Sequence[Tensor], chip: str) -> list[Tensor]:
    post, dtype = param.postNormParam, tensors[0].dtype
    if post.quantType == INT8:
        x, residual, gamma, scale, offset = tensors
        y = _scaled(x.float() + residual.float(), gamma.reshape(-1), post.epsilon)[0]
        return [_static_int8(y, scale, offset, chip), round_to(y, dtype, chip)]
    total, gamma = _sum(param, tensors)
    return [round_to(_scaled(total, gamma.reshape(-1), post.epsilon)[0], dtype, chip)]


def _sum(param: Param, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(x (+ bias) + residual in fp32, gamma)."""
    x, *middle, residual, gamma = tensors
    total = x.float()
    if rms_has_bias(param):
        total = total + middle[0].reshape(-1).float()
    return total + residual.float(), gamma


def _static_int8(y: Tensor, scale: Tensor, offset: Tensor, chip: str) -> Tensor:
    return to_int8(round_to(y / scale.float() + offset.float(), torch.float16, chip))


def to_int8(y: Tensor) -> Tensor:
    """Clamp and round half to even; ASDOPS_QUANT_MIN_NEG_127=1 lifts the low bound (atb-operations.md 5)."""
    low = -127 if os.environ.get("ASDOPS_QUANT_MIN_NEG_127") == "1" else -128
    return y.clamp(low, 127).round().to(torch.int8)


def quantise_rows(y: Tensor) -> list[Tensor]:
    """int8 with one scale a row: [q, max|y| / 127]."""
    largest = y.abs().amax(-1, keepdim=True)
    q = (y * (127 / largest)).nan_to_num(0).round().to(torch.int8)
    return [q, (largest / 127).squeeze(-1)]


def layer_norm(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    x, norm = tensors[0], param.normParam
    if param.layerType == NORM:
        gamma, beta = tensors[1:3]
        if norm.quantType != INT8:
            if not x.shape[-gamma.dim() :] == gamma.shape == beta.shape:
                raise refuse("gamma and beta", f"{list(gamma.shape)}, {list(beta.shape)}", f"a tail of {list(x.shape)}")
            return [round_to(_layer(x.float(), gamma, beta, norm.epsilon, gamma.dim()), x.dtype, chip)]
        y = _layer(x.float(), _row(gamma, x), _row(beta, x), norm.epsilon)
        return quantise_rows(y) if norm.dynamicQuantType != STATIC else [_static_int8(y, tensors[3], tensors[4], chip)]
    used = param.postNormParam if param.layerType == POSTNORM else param.preNormParam
    residual, gamma, beta = tensors[1:4]
    total = x.float() + used.zoomScaleValue * residual.float()
    y = _layer(total, _row(gamma, x), _row(beta, x), used.epsilon)
    rounded = round_to(y, x.dtype, chip)
    if param.layerType == PRENORM:
        return [rounded, round_to(total, x.dtype, chip)]
    return [rounded, _static_int8(y, tensors[4], tensors[5], chip)] if used.quantType == INT8 else [rounded]


def _layer(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, dims: int = 1) -> Tensor:
    """Biased variance, epsilon inside the root, over the last `dims` dimensions."""
    return torch.nn.functional.layer_norm(x, x.shape[-dims:], gamma.float(), beta.float(), epsilon)


KERNELS: dict[str, Kernel] = {"RmsNorm": rms_norm, "LayerNorm": layer_norm}
