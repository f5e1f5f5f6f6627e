"""Memory formats: nd, as torch lays tensors out, and nz, FRACTAL_NZ in blocks of 16 columns (atb-operations.md 1.7).

The shape of an nz tensor in the manifest is what ATB sees: the logical [n, k] of a weight, the blocked one of a cache.
"""

from __future__ import annotations

import torch

from llmc.runtime.hostatb.numeric import format_of, set_format


def in_format(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor as `layout`. On an NPU its memory is laid out anew; elsewhere it is marked, which hostatb reads."""
    if layout == "nd":
        return tensor
    if tensor.device.type == "npu":
        from llmc.runtime import npu

        return npu.to_nz(tensor)
    return set_format(tensor, layout)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as nd, to be read and written by torch: on an NPU a copy, elsewhere the same memory."""
    if tensor.device.type == "npu":
        from llmc.runtime import npu

        return npu.to_nd(tensor)
    return tensor.view(tensor.shape) if format_of(tensor) == "nz" else tensor
