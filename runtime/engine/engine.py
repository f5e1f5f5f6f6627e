"""The engine: prompts in, answers out, over any executor.

    engine = Engine(manifest, executor, tokenizer, caches=caches, max_batch=4)
    for output in engine.generate(["What's deep learning?"], SamplingParams(max_tokens=64)):
        print(output.text, output.finish_reason, output.first_token_s)

Times are wall-clock around whole steps that end with the tokens on the host. The first token's time counts from the
request's arrival, every later one from the token before it, so nothing is counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index as index_of
from typing import Any

import torch

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.blocks import BlockManager, CacheRoom, RowManager
from llmc.runtime.engine.logprobs import Logprob, logprobs
from llmc.runtime.engine.runner import Executes, Runner, block_size, cache_sizes, is_paged, last_rows, rows_of
from llmc.runtime.engine.sampling import Sampler, Samples, SamplingParams
from llmc.runtime.engine.scheduler import Scheduler
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.engine.tokenizer import TextStream, Tokenizer

StreamCallback = Callable[[int, str], None]  # index of the prompt, new text
LogitsCallback = Callable[[int, torch.Tensor], None]  # index of the sequence, its logits [tokens, vocab]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did, for throughput."""

    phase: str
    tokens_in: int
    tokens_out: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Output:
    """One answer. `token_s`: seconds from each token to the next, first token excluded. `logprobs` and
    `prompt_logprobs`, where the parameters ask: an entry a token, {token id: Logprob}, the token itself first; a
    prompt's first token, which nothing stands before, has None."""

    index: int
    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str  # eos, stop (string or token id), length
    first_token_s: float
    token_s: list[float]
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(kw_only=True)
class _Job:
    index: int
    request: Request
    stream: TextStream | None
    limit: int


def check_prompt(index: int, ids: Sequence[int], *, vocab: int | None, max_length: int, answered: bool = True) -> None:
    """Refuse ids that the embedding does not have, and a prompt that leaves no room for an answer where it gets one."""
    wrong = [t for t in ids if t < 0 or (vocab and t >= vocab)]
    if wrong:
        raise UserError(f"prompt {index} holds token id {wrong[0]}; the model knows 0 to {vocab - 1 if vocab else '?'}")
    if len(ids) + answered > max_length:
        raise UserError(
            f"prompt {index} has {len(ids)} tokens, but a sequence can have {max_length} in all"
            f"{', the answer included' if answered else ''}",
            hint="shorten it, or raise --max-position-embeddings or the cache",
        )


class Engine:
    """Owns the scheduler and the runner of one artifact. `tokenizer` may be None for prompts of token ids.

    Every rank of a group has an engine: from the same prompts and the same tokens they take the same steps. `sampler`
    gives all ranks the same tokens (`ranks.Team.sampler`)."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        executor: Executes,
        tokenizer: Tokenizer | None,
        *,
        caches: Mapping[str, torch.Tensor],
        max_batch: int = 1,
        max_prefill_tokens: int = 4096,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        sampler: Samples | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.manifest, self.tokenizer, self.clock = manifest, tokenizer, clock
        self.runner = Runner(manifest, executor, caches, device)
        sizes = cache_sizes(manifest, caches)
        room: CacheRoom
        if is_paged(manifest):
            room = BlockManager(num_blocks=sizes["N"], block_size=block_size(manifest))
        else:
            room, max_batch = RowManager(rows=sizes["B"], length=sizes["S"]), min(max_batch, sizes["B"])
        self.scheduler = Scheduler(room, max_batch=max_batch, max_prefill_tokens=max_prefill_tokens)
        self.max_length = min(room.capacity, max_length or room.capacity)
        self.sampler = sampler or Sampler()
        self.steps: list[Step] = []
        self._jobs: dict[int, _Job] = {}

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stream_callback: StreamCallback | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> list[Output]:
        """All answers, in the order of the prompts. Refuses before anything runs when one prompt cannot."""
        if isinstance(prompts, str):
            raise UserError("the prompts must be a list; found one text", hint="[text]")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        self.steps = []
        try:
            for i, (prompt, chosen) in enumerate(zip(prompts, each, strict=True)):
                self._add(i, prompt, chosen)
            jobs = list(self._jobs.values())
            while self.scheduler.busy:
                self._step(stream_callback)
                on_step(self.steps[-1])
        finally:
            self.scheduler.clear()  # also after an error or an interrupt
            self._jobs = {}
        return [self._output(job) for job in jobs]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        on_logits: LogitsCallback,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        """Teacher-forced logits: `on_logits(i, logits)` for each list of token ids, in their order, with its logits
        [tokens, vocab]: row j is what the model says of token j + 1, having read tokens 0 to j.

            engine.score([[1, 15043, 3186]], lambda i, logits: found.append(token_logprobs(logits[:-1], ids[i][1:])))

        Logits have the dtype and the device of the graph's output, and are valid until the callback returns: the next
        step may write over them, so what is kept is a clone, or better what was computed of it. A list may have as many
        tokens as the cache of a sequence and one prefill hold (`max_length`, `max_prefill_tokens`); lists are read
        together, as many as fit one prefill. Nothing is sampled and nothing stays in the cache.

        Of several ranks each calls this with the same lists, and each is given the logits of the whole vocabulary.
        Refuses before anything runs when one list cannot, and where the artifact has logits of last tokens only."""
        self._need_every_token("the logits of every position")
        self.steps = []
        index: dict[int, int] = {}
        try:
            for i, prompt in enumerate(prompts):
                ids = self._encode(i, prompt)
                self._check(i, ids, answered=False)
                request = Request(prompt_ids=ids, params=SamplingParams(max_tokens=1))
                self.scheduler.add(request, answered=False)
                index[request.id] = i
            while self.scheduler.busy:
                start = self.clock()
                batch = self.scheduler.schedule()
                for request, rows in zip(batch.sequences, rows_of(self.runner.run(batch), batch), strict=True):
                    on_logits(index[request.id], rows)
                self.scheduler.finish(batch.sequences)
                read, seconds = sum(map(len, batch.sequences)), self.clock() - start
                self.steps.append(Step(phase="prefill", tokens_in=read, tokens_out=0, seconds=seconds))
                on_step(self.steps[-1])
        finally:
            self.scheduler.clear()

    def _need_every_token(self, what: str) -> None:
        if self.manifest.get("logits") != "all":
            raise UserError(
                f"{what}: the artifact has the logits of each prompt's last token only",
                hint="compile it with --logits all",
            )

    def warm_up(self, batch: int = 1) -> None:
        """One prefill and one decode step of so many sequences of a token nobody asked about: graphs are planned,
        weights packed and kernels tuned before the first answer, whose times then say what later ones will be."""
        if self.max_length > 2:
            self.generate([[0]] * batch, SamplingParams(max_tokens=2, ignore_eos=True))
            self.steps = []

    def _add(self, index: int, prompt: str | Sequence[int], params: SamplingParams) -> None:
        ids = self._encode(index, prompt)
        self._check(index, ids)
        if params.prompt_logprobs is not None:
            self._need_every_token(f"log-probabilities of prompt {index}")
        request = Request(prompt_ids=ids, params=params, arrived=self.clock())
        self.scheduler.add(request)
        stream = None
        if self.tokenizer:
            skip, include = params.skip_special_tokens, params.include_stop
            stream = TextStream(self.tokenizer, stop=params.stop, skip_special=skip, include_stop=include)
        limit = min(params.max_tokens, self.max_length - len(ids))
        self._jobs[request.id] = _Job(index=index, request=request, stream=stream, limit=limit)

    def _check(self, index: int, ids: Sequence[int], *, answered: bool = True) -> None:
        vocab = self.manifest.get("sizes", {}).get("vocab")
        check_prompt(index, ids, vocab=vocab, max_length=self.max_length, answered=answered)

    def _encode(self, index: int, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"prompt {index} is text, and there is no tokenizer", hint="give token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            try:
                ids = [index_of(token) for token in prompt]
            except TypeError:
                raise UserError(f"prompt {index} must be a text or token ids; found {str(prompt)[:60]}") from None
        return ids

    def _step(self, callback: StreamCallback | None) -> None:
        start = self.clock()
        batch = self.scheduler.schedule()
        tokens_in = sum(map(len, batch.sequences)) if batch.phase == "prefill" else len(batch.sequences)
        logits = self.runner.run(batch)
        if batch.phase == "prefill":
            self._read_prompts(batch.sequences, rows_of(logits, batch))
        last = last_rows(logits, batch)
        tokens = self.sampler.sample(last, batch.sequences)
        for i, (request, token) in enumerate(zip(batch.sequences, tokens, strict=True)):
            if request.params.logprobs is not None:
                request.logprobs += logprobs(last[i : i + 1], [token], request.params.logprobs)
        now = self.clock()
        self.steps.append(Step(phase=batch.phase, tokens_in=tokens_in, tokens_out=len(tokens), seconds=now - start))
        for request, token in zip(batch.sequences, tokens, strict=True):
            request.append(token, now)
            self._show(self._jobs[request.id], token, callback)
        self.scheduler.finish(r for r in batch.sequences if r.finish_reason)

    def _read_prompts(self, requests: Sequence[Request], rows: Sequence[torch.Tensor]) -> None:
        """Log-probabilities of prompt tokens, each once: a sequence that lost its cache is read again."""
        for request, own in zip(requests, rows, strict=True):
            known = len(request.prompt_logprobs)
            if request.params.prompt_logprobs is not None and known < request.prompt_len:
                tokens = request.prompt_ids[known:]  # row j is of token j + 1
                found = logprobs(own[known - 1 : request.prompt_len - 1], tokens, request.params.prompt_logprobs)
                request.prompt_logprobs += found

    def _show(self, job: _Job, token: int, callback: StreamCallback | None) -> None:
        request, params = job.request, job.request.params
        eos = self.tokenizer.eos_ids if self.tokenizer else frozenset(self.manifest.get("eos_token_ids", ()))
        text = ""
        if token in eos and not params.ignore_eos:
            request.finish_reason = "eos"
        elif token in params.stop_token_ids:
            request.finish_reason = "stop"
        elif job.stream:
            text = job.stream.push(token)
            request.finish_reason = "stop" if job.stream.stopped else ""
        if not request.finish_reason and request.output_len >= job.limit:
            request.finish_reason = "length"
        if request.finish_reason and job.stream:
            text += job.stream.finish()
        if text and callback:
            callback(job.index, text)

    def _output(self, job: _Job) -> Output:
        request = job.request
        times = request.token_times
        return Output(
            index=job.index,
            prompt_tokens=request.prompt_len,
            token_ids=request.output_ids,
            text=job.stream.text if job.stream else "",
            finish_reason=request.finish_reason,
            first_token_s=times[0] - request.arrived,
            token_s=[b - a for a, b in pairwise(times)],
            logprobs=None if request.params.logprobs is None else request.logprobs,
            prompt_logprobs=None if request.params.prompt_logprobs is None else request.prompt_logprobs,
        )
