"""One request on its way: tokens, where its cache lies, and when its tokens came.

seq = Sequence(prompt_ids=[1, 15043], params=SamplingParams(max_tokens=8))
seq.append(token, now);  len(seq);  seq.output_ids
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch

from llmc.runtime.engine.logprobs import Logprob
from llmc.runtime.engine.sampling import SamplingParams, make_generator

_ids = count()


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A prompt and what was generated so far. The last token is not in the cache yet: the next step puts it there."""

    prompt_ids: list[int]
    params: SamplingParams
    arrived: float = 0.0
    id: int = field(default_factory=lambda: next(_ids))
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    generator: torch.Generator | None = field(init=False)
    token_times: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # of the answer's tokens, where params ask
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])  # nothing is before one
    finish_reason: str = ""  # "eos", "stop", "length", or "" while running

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.generator = make_generator(self.params)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def output_len(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def append(self, token: int, now: float) -> None:
        self.token_ids.append(token)
        self.token_times.append(now)
