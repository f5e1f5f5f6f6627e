"""Kernel of Rope (atb-operations.md 3.7); the contract is in `numeric.py`.

Heads are blocks of C = cos.shape[1] channels. Inside each group of 2s channels, s = C / rotaryCoeff (1 when rotaryCoeff
is C), out = x * cos + rot(x) * sin with rot = (-second half, first half). float16 rounds both products and the sum;
bfloat16, float32, and float16 with float32 tables compute in fp32 and round once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import AtbError, Desc, Param
from llmc.runtime.hostatb.numeric import Kernel, round_to


def rope(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    q, k, cos, sin, lengths = tensors
    tokens = q.shape[0] if q.dim() == 2 else q.shape[0] * q.shape[1]
    cos, sin = _rows_of_tokens(param, cos, sin, lengths, tokens)
    stride = 1 if param.rotaryCoeff == cos.shape[1] else cos.shape[1] // param.rotaryCoeff
    return [_rotated(x, cos, sin, stride, chip) for x in (q, k)]


def _rows_of_tokens(param: Param, cos: Tensor, sin: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """cosFormat 0: row t belongs to token t. cosFormat 1: a sequence of length n uses rows 0 to n - 1."""
    if param.cosFormat == 0:
        needed, rows = tokens, None
    else:
        counts = [int(n) for n in lengths.to(torch.int64).tolist()]
        if sum(counts) != tokens:
            raise AtbError("ERROR_INVALID_PARAM", "seqLen does not sum to the token count", found=str(counts),
                           expected=str(tokens), tensor="input 4", stage="execute")  # fmt: skip
        needed, rows = max(counts), torch.cat([torch.arange(n, device=cos.device) for n in counts])
    if cos.shape[0] < needed:
        raise AtbError("ERROR_INVALID_TENSOR_SIZE", "cos and sin have too few rows; the library would read beyond",
                       found=f"{cos.shape[0]} rows", expected=f"at least {needed}", tensor="input 2",
                       stage="execute")  # fmt: skip
    return (cos[:tokens], sin[:tokens]) if rows is None else (cos[rows], sin[rows])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, stride: int, chip: str) -> Tensor:
    size = cos.shape[1]
    heads = x.reshape(cos.shape[0], -1, size)
    exact = x.dtype == torch.float16 and cos.dtype == torch.float16
    dtype = torch.float16 if exact else torch.float32
    heads, cos, sin = heads.to(dtype), cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    halves = heads.unflatten(-1, (size // (2 * stride), 2, stride))
    turned = torch.stack((-halves[..., 1, :], halves[..., 0, :]), dim=-2).reshape(heads.shape)
    result = round_to(round_to(heads * cos, dtype, chip) + round_to(turned * sin, dtype, chip), x.dtype, chip)
    return result.reshape(x.shape)


KERNELS: dict[str, Kernel] = {"Rope": rope}
