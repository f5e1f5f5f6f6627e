"""Log-probabilities of tokens: log_softmax of raw logits, in float32.

Raw: as the graph gives them, before penalties, temperature, top-k and top-p. So they say what the model thinks of a
token, not how it was drawn.

    (one,) = logprobs(logits, [token], top=5)               # logits [1, V]
    one[token].logprob, one[token].rank                     # the token first, then the 5 likeliest
    values, ranks = token_logprobs(logits, tokens)          # [n, V] -> float32 [n], int64 [n]

Logits may be of any dtype and on any device. They are worked on in slices of rows, so nothing of the size of all
logits in float32 is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmc.compiler.diagnostics import UserError

NUMBERS_AT_ONCE = 1 << 24  # of a slice in float32: 64 MiB


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one place: the natural logarithm of its probability, and 1 + how many tokens are likelier."""

    logprob: float
    rank: int


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of logits [n, V] and the token of that row: logprob (float32 [n]) and rank (int64 [n]; 1 is the
    greedy choice, which tokens of equal logits share), on the host. UserError where a row holds NaN."""
    slices = [(own, ranks) for _, own, ranks in _slices(logits, tokens)]
    if not slices:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    own, ranks = zip(*slices, strict=True)
    return torch.cat(own), torch.cat(ranks)


def logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[dict[int, Logprob]]:
    """For each row of logits [n, V] the token of that row first, then the `top` likeliest tokens (that token may be one
    of them), by id. UserError where a row holds NaN."""
    found: list[dict[int, Logprob]] = []
    for scores, own, ranks in _slices(logits, tokens):
        best = scores.topk(min(top, scores.shape[-1]), dim=-1)
        rows = (own.tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist())
        for value, rank, ids, values in zip(*rows, strict=True):
            token = tokens[len(found)]
            found.append({token: Logprob(value, rank), **_ranked(ids, values, token)})
    return found


def _ranked(ids: Sequence[int], values: Sequence[float], but: int) -> dict[int, Logprob]:
    """Of falling values, without one token; equals share the rank of the first of them."""
    rank, ranked = 1, {}
    for place, (token, value) in enumerate(zip(ids, values, strict=True)):
        rank = place + 1 if place and value < values[place - 1] else rank
        if token != but:
            ranked[token] = Logprob(value, rank)
    return ranked


def _slices(logits: torch.Tensor, tokens: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of some rows at a time: log_softmax [r, V]; of their tokens log-probabilities and ranks, [r] on the host."""
    rows = max(1, NUMBERS_AT_ONCE // logits.shape[-1])
    for start in range(0, len(tokens), rows):
        scores = torch.log_softmax(logits[start : start + rows].float(), dim=-1)
        column = torch.tensor(tokens[start : start + rows], dtype=torch.int64, device=logits.device)[:, None]
        own = scores.gather(1, column)
        values, ranks = own[:, 0].cpu(), 1 + (scores > own).sum(dim=-1).cpu()
        if values.isnan().any():
            raise holds_nan(start + int(values.isnan().nonzero()[0]))
        yield scores, values, ranks


def holds_nan(row: int) -> UserError:
    return UserError(
        f"the logits of row {row} hold NaN",
        hint="float16 overflow: try --dtype bfloat16 or float32; else damaged weights",
    )
