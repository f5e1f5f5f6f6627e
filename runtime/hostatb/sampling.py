"""Kernels of the sampling family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.sampling`.

Random numbers are those of the C library on the vendor's hosts, made here in Python so that every host draws the same:

    GlibcRand(0).uniform()      # 0.8401877...: what srand(0); rand() / 0x7fffffff gives with glibc
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import Desc, Param
from llmc.compiler.atb.sampling import EXPONENTIAL, EXPONENTIAL_LOGPROBS, MULTINOMIAL_BATCH, SINGLE
from llmc.runtime.hostatb.numeric import Kernel, refuse

MASKED_LOGPROB = -9999.0
FIRST_PICK_BLOCK = 16384  # the kernel sums a row in blocks of this many probabilities


class GlibcRand:
    """glibc's rand(): an additive feedback generator x[i] = x[i-3] + x[i-31] over 32-bit words (TYPE_3 of random()).

    The first 31 words come from a multiplicative generator (16807 modulo 2^31 - 1); 310 outputs are thrown away, and
    the lowest bit of each word is dropped. Seed 0 counts as 1.
    """

    def __init__(self, seed: int) -> None:
        word = seed or 1
        word = word - (1 << 32) if word >= 1 << 31 else word  # srand's argument is kept as a signed word
        words = [word]
        for _ in range(30):
            high = int(word / 127773)  # C division rounds to zero
            word = 16807 * (word - high * 127773) - 2836 * high
            word += 2**31 - 1 if word < 0 else 0
            words.append(word)
        self._words = [*words[3:], *words[:3]]  # x[i-31] first: the feedback starts three words on
        for _ in range(310):
            self.rand()

    def rand(self) -> int:
        """0 to 2^31 - 1"""
        word = (self._words[0] + self._words[28]) & 0xFFFFFFFF
        self._words = [*self._words[1:], word]
        return word >> 1

    def uniform(self) -> float:
        return self.rand() / 0x7FFFFFFF


def _uniforms(seed: int) -> Iterator[float]:
    generator = GlibcRand(seed)
    while True:
        yield generator.uniform()


def sort(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """The k largest of the last axis in descending order; of equal values the earlier one comes first."""
    values, indices = tensors[0].sort(dim=-1, descending=True, stable=True)
    k = param.num[0]
    return [values[..., :k].contiguous(), indices[..., :k].to(torch.int32)]


def multinomial(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Sample z of every row is the first index whose running sum exceeds random number z; 0 when none does.

    The running sum is kept in fp16, rounded after every addition, as the kernel and its reference do.
    """
    probs = tensors[0]
    sums = torch.empty_like(probs)
    total = torch.zeros_like(probs[:, 0])
    for i in range(probs.shape[1]):
        total = total + probs[:, i]
        sums[:, i] = total
    numbers = _uniforms(param.randSeed)
    limits = torch.tensor([next(numbers) for _ in range(param.numSamples)], dtype=torch.float64, device=probs.device)
    exceeds = sums.double().unsqueeze(1) > limits[None, :, None]  # [B, samples, V]
    return [exceeds.int().argmax(-1).to(torch.int32)]


def topk_topp_sampling(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Keeps the k largest probabilities, of these the run whose sum stays below topp (at least one), and draws one."""
    kind, probs = param.topkToppSamplingType, tensors[0]
    if kind == SINGLE and not param.topk:
        raise refuse("topk", 0, "1 or more")
    if kind == SINGLE and tensors[1].shape[0] != probs.shape[0]:
        raise refuse("topp has one value a row", list(tensors[1].shape), f"[{probs.shape[0]}, 1]")
    if kind == SINGLE:
        kept, order = probs.topk(param.topk, dim=-1, sorted=True)
        cut, topp = torch.zeros_like(kept, dtype=torch.bool), tensors[1]
    else:
        if int(tensors[1].min()) < 0:
            raise refuse("topk", int(tensors[1].min()), "0 or more")
        kept, order = probs.sort(descending=True, stable=True)
        # topk is an index here: what is strictly below the value at that place goes.
        cut = kept < kept.gather(1, tensors[1].long().clamp(max=probs.shape[1] - 1))
        topp = tensors[2]
    sums = kept.masked_fill(cut, 0).cumsum(-1)  # in the dtype of probs
    if kind in (EXPONENTIAL, EXPONENTIAL_LOGPROBS):
        cut = cut | (sums > topp)
        pick = (kept.masked_fill(cut, 0) / tensors[3]).sort(descending=True, stable=True)[1][:, :1]
        cut[:, 0] = False
        last = (~cut).sum(-1, keepdim=True) - 1
    else:
        last = ((sums < topp).sum(-1, keepdim=True) - 1).clamp(min=0)
        pick = _multinomial_pick(param, sums.float(), topp.float(), last, tensors)
    outs = [order.gather(1, pick).to(torch.int32), kept.gather(1, pick)]
    return outs if kind <= EXPONENTIAL else [*outs, _logprobs(param.logProbsSize, kept, sums, last)]


def _multinomial_pick(param: Param, sums: Tensor, topp: Tensor, last: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """First place whose sum reaches random number x sum at `last`; the kernel looks for `last` block by block."""
    rows, size = sums.shape
    single = param.topkToppSamplingType == SINGLE
    if single:
        numbers = _uniforms(param.randSeed)
        drawn = torch.tensor([[next(numbers)] for _ in range(rows)], dtype=torch.float64, device=sums.device)
    elif param.topkToppSamplingType == MULTINOMIAL_BATCH:
        first = [[next(_uniforms(seed))] for seed in param.randSeeds]
        drawn = torch.tensor(first, dtype=torch.float64, device=sums.device)
    else:
        drawn = tensors[3]
    ends = torch.tensor(
        [min(start + FIRST_PICK_BLOCK, size) - 1 for start in range(0, size, FIRST_PICK_BLOCK)], device=sums.device
    )
    block = (sums[:, ends] < topp * drawn).sum(-1, keepdim=True).clamp(max=len(ends) - 1)
    total = sums.gather(1, torch.minimum(ends[block], last))
    limit = total * drawn
    below = sums <= limit.float() if single else sums < limit
    return below.sum(-1, keepdim=True).clamp(max=size - 1)


def _logprobs(size: int, kept: Tensor, sums: Tensor, last: Tensor) -> Tensor:
    """log(p / sum of what is kept) of the first `size` sorted probabilities."""
    logs = (kept[:, :size].float() / sums.float().gather(1, last)).log()
    return logs.masked_fill(torch.arange(size, device=logs.device) > last, MASKED_LOGPROB)


KERNELS: dict[str, Kernel] = {"Sort": sort, "Multinomial": multinomial, "TopkToppSampling": topk_topp_sampling}
