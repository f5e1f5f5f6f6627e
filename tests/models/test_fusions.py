"""Each fusion, alone and together, agrees with the plain operators within the rounding that it removes."""

from __future__ import annotations

import pytest
import torch
from tiny import load, load_ranks, logits_of_ranks, save_checkpoint, variant
from torch import Tensor

from llmc.compiler.passes.fuse import FUSIONS

LENGTHS = [9, 14]
OF_ONE_RANK = tuple(name for name in FUSIONS if name != "linear_all_reduce")
CHOICES = [*((name,) for name in OF_ONE_RANK), OF_ONE_RANK]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 96, (n + 6,), generator=generator).tolist() for n in LENGTHS]


def logits(folder, dtype: str, fusions: tuple[str, ...]) -> Tensor:
    found = load(folder, folder, attention="paged", dtype=dtype, fusions=fusions).logits(prompts(), LENGTHS)
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


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_linear_with_its_sum_over_ranks_in_one_operation_agrees_with_two(world_size, tmp_path):
    """LinearParallel rounds the product before it travels, as Linear and AllReduce do; the order of sums differs."""
    save_checkpoint(tmp_path, "gqa")

    def over_ranks(dtype: str, fusions: tuple[str, ...]) -> Tensor:
        options = {"attention": "paged", "dtype": dtype, "fusions": fusions}
        ranks = load_ranks(tmp_path, tmp_path, variant(tmp_path), world_size=world_size, **options)
        prefill = ranks[0].runner.manifest["phases"]["prefill"]["operations"]
        assert ("linear_all_reduce" in fusions) == any(o["op"] == "LinearParallel" for o in prefill)
        return torch.cat(logits_of_ranks(ranks, prompts(), LENGTHS)).float()

    truth = over_ranks("float32", OF_ONE_RANK)
    torch.testing.assert_close(over_ranks("float32", FUSIONS), truth, rtol=0, atol=1e-5 * truth.abs().max().item())
    for dtype in ("float16", "bfloat16"):
        plain, fused = over_ranks(dtype, OF_ONE_RANK), over_ranks(dtype, FUSIONS)
        assert rms(fused - plain) < rms(plain - truth)
        assert rms(fused - truth) < 1.1 * rms(plain - truth)
