"""Planning for speed: steps of a planned graph become faster ones that give the same numbers.

Each rewrite takes a step and gives a faster `run` for it, or None; it is asked once per set of input shapes. Kernels
of this package say what the chip computes; a rewrite may choose another way to the same result, to the rounding of the
order of sums (tests/hostatb/test_rewrites.py compares them).

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
from typing import TypeVar

import torch
from llmc.compiler.atb.core import FLOATS16
from llmc.compiler.atb.norm import NORM, PRENORM
from llmc.runtime.hostatb.operation import Single
from llmc.runtime.hostatb.step import Step
from torch import Tensor

Run = Callable[[Sequence[Tensor]], list[Tensor]]
T = TypeVar("T")

# From this many rows on, float32 units beat 16-bit ones on a CPU without AMX (table above).
FLOAT32_ROWS = 48


def rewrite(steps: Sequence[Step]) -> Sequence[Step]:
    """Every step that a rewrite knows runs faster; the others stay."""
    return [replace(step, run=_on_cpu(faster, step.run)) if (faster := find(step)) else step for step in steps]


def find(step: Step) -> Run | None:
    """The faster way to run the step, if there is one."""
    core = step.core
    if not isinstance(core, Single) or core.op.name not in REWRITES:
        return None
    return REWRITES[core.op.name](step)


def _on_cpu(faster: Run, kernel: Run) -> Run:
    """What is measured here is measured on CPUs; CUDA tensors take the plain kernel."""
    return lambda tensors: faster(tensors) if tensors[0].device.type == "cpu" else kernel(tensors)


def derived(tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
    """`make(tensor)`, kept on the tensor until its content changes: what is computed once a model, or once a step."""
    if tensor.is_inference():  # such tensors do not tell whether they changed
        return make(tensor)
    key = f"_atb_{name}"
    version, value = getattr(tensor, key, (None, None))
    if version != tensor._version:
        value = make(tensor)
        setattr(tensor, key, (tensor._version, value))
    return value  # type: ignore[return-value]


def fast_linear(step: Step) -> Run | None:
    """16-bit x [rows, k] times weight [n, k]: the weight in oneDNN's layout, or float32 units for many rows."""
    assert isinstance(step.core, Single)
    p = step.core.param
    plain = p.transposeB and not p.transposeA and not p.enAccum and p.matmulType == 0 and p.outDataType == -1
    x, weight = step.ins[:2]
    if not plain or x.dtype not in FLOATS16 or weight.format != "nd" or len(weight.shape) != 2 or step.views[1]:
        return None
    many = prod(x.shape[:-1]) >= FLOAT32_ROWS and not has_amx()
    if not many and not onednn_supports(x.dtype):
        return None
    product = in_float32 if many else with_packed_weight
    if not p.hasBias:
        return lambda tensors: [product(tensors[0], tensors[1])]
    return lambda tensors: [product(tensors[0], tensors[1]) + tensors[2]]


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n]: exact products, float32 sums, one rounding, as the chip's cube unit."""
    return torch.nn.functional.linear(x.float(), weight.float()).to(x.dtype)


def with_packed_weight(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n] on the weight's packed copy, which lives as long as the weight."""
    packed = derived(weight, "packed", torch.ops.mkldnn._reorder_linear_weight)
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def onednn_supports(dtype: str) -> bool:
    """oneDNN has a kernel for this 16-bit type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == "bfloat16" else ops._is_mkldnn_fp16_supported())


def fast_rms_norm(step: Step) -> Run | None:
    """NORM and PRENORM without quantisation or options: one fused kernel in float32."""
    assert isinstance(step.core, Single)
    p = step.core.param
    if p.layerType not in (NORM, PRENORM) or len(step.ins) != p.layerType + 1 or len(step.ins[-1].shape) != 1:
        return None
    options = p.normParam
    if options.rstd or options.precisionMode or options.modelType or options.quantType or p.preNormParam.quantType:
        return None
    epsilon = options.epsilon if p.layerType == NORM else p.preNormParam.epsilon
    shape = list(step.ins[-1].shape)

    def norm(total: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
        wide = derived(gamma, "float32", Tensor.float)
        return torch.ops.aten._fused_rms_norm(total, shape, wide, epsilon)[0].to(dtype)

    def run_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
        x, gamma = tensors
        return [norm(x.float(), gamma, x.dtype)]

    def run_prenorm(tensors: Sequence[Tensor]) -> list[Tensor]:
        x, residual, gamma = tensors
        total = torch.add(x.float(), residual)
        return [norm(total, gamma, x.dtype), total.to(x.dtype)]

    return run_norm if p.layerType == NORM else run_prenorm


def fast_rope(step: Step) -> Run | None:
    """Rotation of halves in float32: x * cos + (x rolled by half a head) * (sin with the first half negated)."""
    assert isinstance(step.core, Single)
    p = step.core.param
    q, _, cos = step.ins[:3]
    if (
        p.rotaryCoeff != 2
        or p.cosFormat != 0
        or q.dtype == "float16"
        or len(q.shape) != 2
        or cos.shape[0] != q.shape[0]
    ):
        return None
    tokens, size = cos.shape
    half = size // 2

    def negate_first_half(sin: Tensor) -> Tensor:
        return torch.cat((-sin[:, :half], sin[:, half:]), dim=-1).float().unsqueeze(1)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, k, cos, sin, _ = tensors
        wide_cos = derived(cos, "wide", lambda t: t.float().unsqueeze(1))
        turned_sin = derived(sin, "turned", negate_first_half)
        results = []
        for x in (q, k):
            heads = x.float().view(tokens, -1, size)
            turned = heads.roll(half, -1).mul_(turned_sin)
            results.append((heads * wide_cos).add_(turned).to(x.dtype).view(x.shape))
        return results

    return run


REWRITES: dict[str, Callable[[Step], Run | None]] = {
    "Linear": fast_linear,
    "RmsNorm": fast_rms_norm,
    "Rope": fast_rope,
}
