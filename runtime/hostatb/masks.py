"""Masks of the attention operations as additive float32 biases for one sequence.

What a mask tensor holds depends on dtype, kernel and chip (atb-operations.md 3.8): float16 and every mask of 310P is
added as it is; bfloat16 and the float16 high precision kernel multiply 0 / 1 masks by a large negative number first;
alibi masks are always added. Compressed masks are tiles from which the bias of any position follows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmc.compiler.atb.core import AtbError, Desc, Param
from llmc.compiler.atb.self_attention import (
    ALIBI,
    ALIBI_COMPRESS_LEFT_ALIGN,
    ALIBI_COMPRESS_SQRT,
    DECODER,
    HIGH_PRECISION,
    NORM_COMPRESS,
    has_slopes,
    is_910b,
    prefix,
)
from llmc.runtime.hostatb.attend import causal_bias

LARGEST = -3e38
TILE = 128


def mask_factor(mask: Tensor, param: Param, chip: str) -> float:
    """What the SelfAttention kernels multiply a mask by before it is added. DECODER and dynamic batch have a kernel of
    their own, whatever kernelType says, and it multiplies bfloat16 masks only."""
    per_head = param.maskType == ALIBI or has_slopes(param)
    if not is_910b(chip) or per_head or mask.dtype == torch.float32:
        return 1.0
    if mask.dtype == torch.bfloat16:
        return LARGEST
    if prefix(param):
        return -10000.0
    precise = param.kernelType == HIGH_PRECISION and param.calcType != DECODER and not param.batchRunStatusEnable
    return LARGEST if precise else 1.0


def is_tile(desc: Desc, param: Param) -> bool:
    """A [128, 128] mask that stands for a triangle of any size."""
    if param.maskType != NORM_COMPRESS:
        return False
    nz = desc.shape in ((1, 8, TILE, 16), (1, 128, 2048, 16)) and desc.format == "nz"
    return nz or (desc.shape == (TILE, TILE) and param.isTriuMask == 1)


def is_triangle(tile: Tensor, factor: float) -> bool:
    """The tile hides exactly what lies above its diagonal, so it can be replaced by the word "causal"."""
    hides = tile <= -1e4 if factor == 1.0 else tile != 0
    return torch.equal(hides, _above_diagonal(tile.shape[0], tile.device))


@lru_cache(maxsize=8)
def _above_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def tiled_bias(tile: Tensor, q_len: int, kv_len: int) -> Tensor:
    """[Lq, Lk] bias from a tile of biases: nothing below the diagonal tiles, everything hidden above them. Query i
    stands at position Lk - Lq + i."""
    size = tile.shape[0]
    rows = torch.arange(kv_len - q_len, kv_len, device=tile.device)
    columns = torch.arange(kv_len, device=tile.device)
    bias = tile[(rows % size)[:, None], columns % size]
    tiles = (rows // size)[:, None] - columns // size
    return bias.masked_fill(tiles > 0, 0.0).masked_fill(tiles < 0, float("-inf"))


def window_bias(q_len: int, kv_len: int, window: int, device: torch.device) -> Tensor:
    """Causal, and at most `window` keys back. Windows larger than the sequence hide nothing more."""
    return causal_bias(q_len, kv_len, device, min(window, kv_len))


def alibi_compress_bias(mask: Tensor, slopes: Tensor, param: Param, q_len: int, kv_len: int) -> Tensor:
    """[N, Lq, Lk] from the [256, 256] mask of distances i - j (or of [N, S, 128] ready biases) and a slope a head.

    Above the diagonal the mask holds a large number, which a negative slope makes hide. Its lower left tile continues
    for larger distances: the entry at distance d is entry d % 128 + 128, plus the rest.
    """
    first = 0 if param.maskType == ALIBI_COMPRESS_LEFT_ALIGN else kv_len - q_len
    rows = torch.arange(first, first + q_len, device=mask.device)[:, None]
    columns = torch.arange(kv_len, device=mask.device)
    if mask.dim() == 3:  # bias of row i - 128 * (j // 128), column j % 128
        relative = rows - columns // TILE * TILE
        ready = mask.float()[:, relative.clamp(0, mask.shape[1] - 1), columns % TILE]
        return ready.masked_fill(relative < 0, float("-inf"))
    tiles = rows // TILE - columns // TILE
    inside = mask.float()[rows % TILE + TILE * tiles.clamp(0, 1), columns % TILE]
    distance = inside + TILE * (tiles - 1).clamp(min=0)
    distance = torch.where(tiles < 0, mask.float().amax(), distance)
    if param.maskType == ALIBI_COMPRESS_SQRT:
        distance = distance.sqrt()
    bias = slopes.float().reshape(-1, 1, 1) * distance
    # With isTriuMask the kernel skips what lies above the diagonal; a small slope times the mask would not hide it.
    return bias.masked_fill(columns > rows, float("-inf")) if param.isTriuMask else bias


def require_cover(rows: int, columns: int, q_len: int, kv_len: int, what: str) -> None:
    """A mask must have a row a query and a column a key (ERROR_RT_FAIL of the kernels at Setup)."""
    if rows < q_len or columns < kv_len:
        raise AtbError("ERROR_RT_FAIL", "this mask shape is not supported", found=what, stage="setup", tensor="mask",
                       expected=f"at least {q_len} x {kv_len}")  # fmt: skip
