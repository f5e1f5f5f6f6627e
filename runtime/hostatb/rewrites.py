"""Planning for speed: steps of a planned graph become faster ones that give the same numbers.

Each rewrite is a function steps -> steps in REWRITES; it runs once per set of input shapes. The kernels in this package
say what the chip computes; a rewrite may choose another way to the same result, to the rounding of the sum order.

Measured on one core of a Xeon with avx512_bf16 and no AMX (µs for the four matmuls of a SmolLM2 layer):

    rows    F.linear bf16    oneDNN, weights packed once    float32, weights converted in the call
       1              547                            303                                      1365
       8             1142                            803                                      2383
     128            11339                          10901                                      8136
     512            43526                          42951                                     25991
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from llmc.compiler.atb.core import FLOATS16
from llmc.runtime.hostatb.operation import Single
from llmc.runtime.hostatb.step import Step
from torch import Tensor

Run = Callable[[Sequence[Tensor]], list[Tensor]]

# From this many rows on, float32 units beat 16-bit ones on a CPU without AMX (table above).
FLOAT32_ROWS = 48


def prepack_linears(steps: Sequence[Step]) -> Sequence[Step]:
    """Linear(x, weight)  ->  the same with the weight in oneDNN's layout, or in float32 units for many rows"""
    return [replace(step, run=_linear(step)) if _is_float_linear(step) else step for step in steps]


def _is_float_linear(step: Step) -> bool:
    """A 16-bit float matmul of a weight [n, k] that the caller gives."""
    core = step.core
    if not isinstance(core, Single) or core.op.name != "Linear" or step.views[1] is not None:
        return False
    p = core.param
    plain = p.transposeB and not p.transposeA and not p.enAccum and p.matmulType == 0 and p.outDataType == -1
    x, weight = step.ins[:2]
    return plain and x.dtype in FLOATS16 and weight.format == "nd" and len(weight.shape) == 2


def _linear(step: Step) -> Run:
    kernel, has_bias = step.run, step.core.param.hasBias  # type: ignore[attr-defined]
    x = step.ins[0]
    many = prod(x.shape[:-1]) >= FLOAT32_ROWS and not has_amx()
    if not many and not onednn_supports(x.dtype):
        return kernel
    product = in_float32 if many else with_packed_weight

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        if tensors[0].device.type != "cpu":
            return kernel(tensors)
        result = product(tensors[0], tensors[1])
        return [result + tensors[2] if has_bias else result]

    return run


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n]: exact products, float32 sums, one rounding, as the chip's cube unit."""
    return torch.nn.functional.linear(x.float(), weight.float()).to(x.dtype)


def with_packed_weight(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n] on the weight's packed copy, which lives as long as the weight."""
    version, packed = getattr(weight, "_atb_packed", (None, None))
    if version != weight._version:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        weight._atb_packed = (weight._version, packed)  # type: ignore[attr-defined]
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def onednn_supports(dtype: str) -> bool:
    """oneDNN has a kernel for this 16-bit type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == "bfloat16" else ops._is_mkldnn_fp16_supported())


REWRITES: tuple[Callable[[Sequence[Step]], Sequence[Step]], ...] = (prepack_linears,)
