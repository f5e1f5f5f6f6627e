"""From logits to tokens: penalties, temperature, top-k, top-p, the draw.

Enters logits [B, V] and, per row, the parameters, the tokens so far and a random generator; leaves B token ids.
A row's token depends on that row alone: the same logits give the same token in every batch and place. For more rows,
or over other ranks, a graph may round its logits otherwise; `draw` says what that can change.

    params = SamplingParams(max_tokens=64, temperature=0.7, top_k=50, top_p=0.9, seed=1)
    tokens = Sampler().sample(logits, sequences)        # a Sequence is a SamplingState

Order: repetition -> frequency -> presence -> temperature -> top-k -> top-p -> draw, as in the server replaced here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.logprobs import holds_nan

GREEDY_TOP_K = 1
HOLDS_NAN = -1  # no token


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. The defaults are the original scripts': top_k 1, that is, greedy.

    top_k: 1 greedy, 0 or -1 off. top_p: 0 and 1 off. temperature: 0 greedy. seed None: a fresh one for each request.
    logprobs, prompt_logprobs: of each token of the answer, of the prompt, its log-probability and rank and those of the
    so many likeliest (0: its own alone; None: nothing), from raw logits, as in vLLM. The prompt's need an artifact with
    the logits of every token.
    """

    max_tokens: int = 20
    temperature: float = 1.0
    top_k: int = GREEDY_TOP_K
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        problems = [
            f"{name} must be {want}; found {getattr(self, name)!r}"
            for name, want, ok in RANGES
            if not self._in(name, ok)
        ]
        if (
            not isinstance(self.stop, (list, tuple))
            or len(self.stop) > 1024
            or any(not isinstance(s, str) or not 0 < len(s) <= 1024 for s in self.stop)
        ):
            problems.append("stop must be at most 1024 strings of 1 to 1024 characters")
        if problems:
            raise UserError("sampling parameters: " + "; ".join(problems))

    def _in(self, name: str, ok: Any) -> bool:
        value = getattr(self, name)
        if name in MAY_BE_ABSENT and value is None:
            return True
        kind = (int,) if name in ("max_tokens", "top_k", *MAY_BE_ABSENT) else (int, float)
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and ok(value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == GREEDY_TOP_K

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


MAY_BE_ABSENT = ("seed", "logprobs", "prompt_logprobs")
# Union of what the old server accepts (MindIE endpoint, infer_param.cpp) and the scripts' neutral defaults (top_p 0).
RANGES: tuple[tuple[str, str, Any], ...] = (
    ("max_tokens", "1 to 2147483647", lambda v: 1 <= v < 2**31),
    ("temperature", "at least 0", lambda v: v >= 0),
    ("top_k", "-1 or 0 (off), or a positive count", lambda v: v >= -1),
    ("top_p", "within 0 (off) and 1", lambda v: 0 <= v <= 1),
    ("repetition_penalty", "above 0", lambda v: v > 0),
    ("presence_penalty", "within -2 and 2", lambda v: -2 <= v <= 2),
    ("frequency_penalty", "within -2 and 2", lambda v: -2 <= v <= 2),
    ("seed", "0 to 9223372036854775807, or absent", lambda v: 0 <= v < 2**63),
    ("logprobs", "0 or more, or absent", lambda v: v >= 0),
    ("prompt_logprobs", "0 or more, or absent", lambda v: v >= 0),
)


class SamplingState(Protocol):
    """What the sampler needs to know about a row; `Sequence` is one."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def generator(self) -> torch.Generator | None: ...


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """One generator for the life of a request, so that its state advances from token to token. Greedy needs none."""
    if params.greedy:
        return None
    generator = torch.Generator(device="cpu")
    generator.seed() if params.seed is None else generator.manual_seed(params.seed)
    return generator


class Samples(Protocol):
    """Logits [B, V] -> B token ids."""

    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]: ...


class Sampler:
    """Chooses one token a row. Greedy rows without penalties are the plain argmax, on the logits' device where all are.
    The device is read once a step: each read waits until it has done all that was asked of it."""

    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        scored = [i for i, state in enumerate(states) if not state.params.greedy or state.params.penalised]
        if scored:
            logits = logits.cpu()
        best, tokens = logits.max(dim=-1)  # NaN for a row that holds one
        chosen: list[int] = tokens.masked_fill(best.isnan(), HOLDS_NAN).tolist()
        if HOLDS_NAN in chosen:
            raise holds_nan(chosen.index(HOLDS_NAN))
        for i in scored:
            chosen[i] = self._sample_row(logits[i].float(), states[i])
        return chosen

    def _sample_row(self, logits: torch.Tensor, state: SamplingState) -> int:
        params = state.params
        if params.penalised:
            logits = penalise(logits, params, state.token_ids, state.prompt_len)
        if params.greedy:
            return int(logits.argmax())
        assert state.generator is not None
        return draw(keep(logits, params), state.generator)


def penalise(logits: torch.Tensor, params: SamplingParams, token_ids: Sequence[int], prompt_len: int) -> torch.Tensor:
    """[V] -> [V]. Repetition looks at prompt and output; frequency and presence at the output alone."""
    logits, vocab = logits.clone(), logits.shape[-1]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(token_ids, dtype=torch.int64).unique()
        seen = seen[seen < vocab]  # a prompt may hold ids that the head does not score
        scores, p = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(scores < 0, scores * p, scores / p)
    if params.frequency_penalty or params.presence_penalty:
        made, counts = torch.tensor(token_ids[prompt_len:], dtype=torch.int64).unique(return_counts=True)
        logits[made] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def keep(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, top-k, top-p: [V] -> float64 probabilities [V] that sum to 1; tokens that are out have 0.

    Equals share one fate, since neither the order of token ids nor that of a sort says which is better: of tokens as
    likely as the last one that top-k or top-p keeps, all stay. So does transformers with top-k (TopKLogitsWarper); its
    top-p (TopPLogitsWarper) cuts equals where its sort has put them. Logits of 16 bits have many equals."""
    best = logits.max()
    # From the best one down, so that no temperature overflows; an infinite logit is far above all finite ones.
    scores = torch.where(logits == best, 0.0, (logits.double() - best) / params.temperature)
    if 0 < params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -math.inf)
    probabilities = scores.softmax(dim=-1)
    if 0 < params.top_p < 1:
        falling = probabilities.sort(descending=True).values
        head = int((falling.cumsum(dim=-1) < params.top_p).sum())  # the token behind it is the one to reach top_p
        probabilities = probabilities.where(probabilities >= falling[min(head, len(falling) - 1)], 0.0)
    return probabilities / probabilities.sum()


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """A token id by its probability [V]: every id runs a race, with an exponential time of rate p, and the first wins.

    The V random numbers of a draw belong to token ids, whatever else is kept and whatever the batch. So a probability
    that moves in its last bit lets few draws go elsewhere: for distributions that differ by d (total variation: what
    one has to take from some tokens and give to others) at most 2 d / (1 + d), and no rule that sees one of the two
    does better (Daliri, Musco and Suresh 2024, arXiv 2408.07978). A cumulative sum over V tokens would move at every
    token, and in falling order neighbours that change places would move it by as much as they are likely."""
    uniform = torch.rand(len(probabilities), generator=generator, dtype=torch.float64)
    times = -torch.log1p(-uniform)
    return int((probabilities / times.clamp_min(torch.finfo(torch.float64).tiny)).argmax())
