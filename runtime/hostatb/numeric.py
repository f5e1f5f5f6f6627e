"""What the kernels share: the kernel contract, dtypes and formats of tensors, rounding as the chips round.

A kernel is a plain function, one per operation, listed in its family's `KERNELS` under the operation's name:

    def linear(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]: ...

    KERNELS: dict[str, Kernel] = {"Linear": linear}

- `param`: C++ field names, defaults filled in. `tensors`: the inputs, contiguous, on the CPU or on CUDA. `descs`: their
  descs as the operation sees them; read the format there (a view of an NZ tensor keeps the format in its desc only).
- Returns the outputs: new contiguous tensors that share no memory with an input, shapes and dtypes as inferred.
- Two exceptions. An output in the table's `in_place` (caches of ReshapeAndCache) is written into the input tensor, and
  that same tensor is returned; the caller hands in the tensor to be written. Inputs in the table's `writes` (flash
  caches) are written too and are not returned.
- Host-read inputs (lengths) are CPU tensors; their values are read at every call.
- All checks of descs have passed. A kernel refuses what only values can show (a slot beyond the cache) with AtbError.

NZ: the blocks of a 4-D or 5-D NZ tensor are stored as its shape spells; an NZ-flagged 2-D or 3-D matmul weight holds
the plain row-major matrix, because there the layout is the device's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import ACL_DTYPE, DIM, AtbError, Desc, Param
from llmc.compiler.atb.shape import NZ_LANES

Kernel = Callable[[Param, Sequence[Tensor], Sequence[Desc], str], "list[Tensor]"]

TORCH_DTYPE: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "int8", "uint8", "bool", "int16", "uint16", "int32", "uint32",
        "int64", "uint64", "complex64",
    )
}  # fmt: skip
DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}
ACL_TORCH = {number: TORCH_DTYPE[name] for number, name in ACL_DTYPE.items() if name in TORCH_DTYPE}
FLOAT16_MAX = 65504.0


def format_of(tensor: Tensor) -> str:
    """ "nd", or what `set_format` said."""
    return getattr(tensor, "_atb_format", "nd")


def set_format(tensor: Tensor, format: str) -> Tensor:
    """Mark a tensor as `format` ("nd" or "nz"), as torch_npu.npu_format_cast does; returns the tensor."""
    tensor._atb_format = format  # type: ignore[attr-defined]
    return tensor


def desc_of(tensor: Tensor) -> Desc:
    return Desc(
        dtype=DTYPE_NAME.get(tensor.dtype, "undefined"),
        shape=tuple(tensor.shape) if tensor.dim() else (1,),
        format=format_of(tensor),
    )


def refuse(message: str, found: object, expected: object = "") -> AtbError:
    """The error for values (lengths, slots) that the device would compute nonsense from, or write outside a cache with,
    without a word."""
    return AtbError(DIM, message, found=str(found), expected=str(expected), stage="execute")


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32; 64-bit integers carry the bits of one in their low half (reference 3.2)."""
    if scale.is_floating_point():
        return scale.float()
    return scale.view(torch.int32).unflatten(-1, (-1, 2))[..., 0].contiguous().view(torch.float32)


def round_to(x: Tensor, dtype: torch.dtype, chip: str) -> Tensor:
    """One rounding, half to even. 310P saturates float16 at 65504, 910B overflows to inf (reference 3.13)."""
    if dtype == torch.float16 and chip == "Ascend310P":
        x = x.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return x.to(dtype)


def nd_to_nz(x: Tensor) -> Tensor:
    """[m, n] or [b, m, n] -> [b, ceil(n/n0), ceil16(m), n0], padded with zeros (reference 1.7)."""
    x = x if x.dim() == 3 else x.unsqueeze(0)
    b, m, n = x.shape
    n0 = NZ_LANES[DTYPE_NAME[x.dtype]]
    blocks, rows = -(-n // n0), -(-m // 16) * 16
    padded = x.new_zeros(b, rows, blocks * n0)
    padded[:, :m, :n] = x
    return padded.reshape(b, rows, blocks, n0).transpose(1, 2).contiguous()


def nz_to_nd(x: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """[b, blocks, rows16, n0] -> [b, rows, columns], cropped to the sizes given."""
    b, blocks, rows16, n0 = x.shape
    plain = x.transpose(1, 2).reshape(b, rows16, blocks * n0)
    return plain[:, :rows, :columns].contiguous()
