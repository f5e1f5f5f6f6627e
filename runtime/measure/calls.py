"""One rank asks the engine, and all of them answer: each has a part of the model, and must take the same steps.

Calls(engine, team).generate(prompts, params, on_step)         # rank 0
follow(engine, team)                                           # the others, until it calls `end`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from llmc.runtime.engine.engine import Engine, Output, Step
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.ranks import Team


class Calls:
    """An engine's calls, told to the other ranks; without a team the calls alone."""

    def __init__(self, engine: Engine, team: Team | None) -> None:
        self.engine, self.team = engine, team

    def score(self, lists: Sequence[Sequence[int]], on_logits: Callable[[int, torch.Tensor], None]) -> None:
        self._tell(score=lists)
        self.engine.score(lists, on_logits)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], on_step: Callable[[Step], None]
    ) -> list[Output]:
        self._tell(generate=prompts, params=[asdict(one) for one in params])
        return self.engine.generate(prompts, params, on_step=on_step)

    def end(self) -> None:
        self._tell(end=True)

    def _tell(self, **call: Any) -> None:
        if self.team:
            self.team.say(call)


def follow(engine: Engine, team: Team) -> None:
    """Take the steps that rank 0 takes, up to its end."""
    while not (call := team.hear()).get("end"):
        if "score" in call:
            engine.score(call["score"], lambda index, logits: None)
        else:
            engine.generate(call["generate"], [SamplingParams(**one) for one in call["params"]])
