"""Each fusion, alone and together, agrees with the plain operators within the rounding that it removes."""

from __future__ import annotations

import pytest
import torch
from llmc.compiler.passes.fuse import FUSIONS
from tiny import load, save_checkpoint
from torch import Tensor

LENGTHS = [9, 14]
CHOICES = [(name,) for name in FUSIONS] + [tuple(FUSIONS)]


def logits(folder, dtype: str, fusions: tuple[str, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(0, 96, (n + 6,), generator=generator).tolist() for n in LENGTHS]
    found = load(folder, folder, attention="paged", dtype=dtype, fusions=fusions).logits(tokens, LENGTHS)
    return torch.cat(found).float()


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fusions", CHOICES, ids="+".join)
def test_a_fusion_moves_16_bit_logits_by_no_more_than_their_rounding(fusions, dtype, tmp_path):
    plain_error = fused_error = moved = 0.0
    for seed in range(4):  # rounding is noise: sums over a few models compare, single ones need not
        folder = tmp_path / str(seed)
        folder.mkdir()
        save_checkpoint(folder, "gqa", seed)
        truth, plain = logits(folder, "float32", ()), logits(folder, dtype, ())
        fused = logits(folder, dtype, fusions)
        plain_error, fused_error = plain_error + rms(plain - truth), fused_error + rms(fused - truth)
        moved += rms(fused - plain)
    assert 0 < moved < 1.5 * plain_error  # two independent errors of one size differ by sqrt(2) of it
    assert fused_error < 1.1 * plain_error


@pytest.mark.parametrize("fusions", CHOICES, ids="+".join)
def test_in_float32_a_fusion_changes_nothing_but_the_last_bits(fusions, tmp_path):
    save_checkpoint(tmp_path, "mha")
    plain, fused = logits(tmp_path, "float32", ()), logits(tmp_path, "float32", fusions)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
