"""Memory formats: nd, as torch lays tensors out, and nz, FRACTAL_NZ in blocks of 16 columns (atb-operations.md 1.7).

The shape of an nz tensor in the manifest is what ATB sees: the logical [n, k] of a weight, the blocked one of a cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmc.runtime.hostatb.numeric import format_of, set_format

NZ_DIMS = 5  # of a contiguous cache: [1, rows, columns / 16, positions, 16]; as nd [1, rows, positions, columns]


def in_format(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor as `layout`. On an NPU its memory is laid out anew; elsewhere it is marked, which hostatb reads."""
    if layout == "nd":
        return tensor
    if tensor.device.type == "npu":
        from llmc.runtime import npu

        return npu.to_nz(tensor)
    return set_format(tensor, layout)


def rows_of(cache: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Rows of a contiguous cache [1, rows, ...] as one of that many rows: the same memory, in the same format."""
    rows = cache[:, first : first + count]
    return rows if cache.device.type == "npu" else set_format(rows, format_of(cache))  # there the storage has it


def copy_rows(caches: Iterable[torch.Tensor], source: int, target: int, length: int) -> None:
    """In each contiguous cache the first `length` positions of a row over those of another one; on an NPU an nz row is
    copied whole."""
    pairs = [(rows_of(cache, source, 1), rows_of(cache, target, 1)) for cache in caches]
    if pairs[0][0].device.type == "npu" and pairs[0][0].dim() == NZ_DIMS:
        from llmc.runtime import npu

        npu.copy_memory(pairs)
        return
    for from_row, to_row in pairs:
        to_row[..., :length, :] = from_row[..., :length, :]
