"""Perplexity of a text: what the model gives each token, having read those before it in the same window.

    job = prepare(args, artifact_of, tokenizer)
    facts = job.run(engine, advance)              # {"perplexity": 17.2, "tokens": 9216, "nll": ..., ...}

As in transformers' page "Perplexity of fixed-length models": a window of `window` tokens begins every `stride` tokens,
and of each window those tokens count that no window before it has counted. Nothing stands before a window's first
token, so that one never counts: where windows do not overlap it is lost, where they do it was counted before. (The page
weighs each overlapping window by one token less than it counts; here every counted token weighs the same.) A document
begins windows of its own, and what the tokenizer puts in front of a text stands in front of each document.

perplexity = exp(nll / tokens), with nll in nats, a float64 sum of float32 log-probabilities.
bits per byte = nll / tokens / ln 2 * text tokens / bytes of UTF-8 (Gao et al. 2020, arXiv 2101.00027, section 3.1): of
two tokenizers, too, the better model has less.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, parse_json, read_text
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.logprobs import token_logprobs
from llmc.runtime.engine.tokenizer import Tokenizer, load_tokenizer
from llmc.runtime.flags import spellings
from llmc.runtime.ranks import Team
from llmc.runtime.room import Limit, Room
from llmc.runtime.session import engine_in, limit_for, positions_of, room_for

TEXT_BYTES = 1 << 30
WINDOW = 2048  # unless the model has fewer positions


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens that are read together, of which the last `counted` count."""

    ids: list[int]
    counted: int


def windows(tokens: list[int], size: int, stride: int) -> Iterator[Window]:
    """Those of one document that count anything."""
    done = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + size, len(tokens))
        if counted := end - max(done, begin + 1):
            yield Window(ids=tokens[begin:end], counted=counted)
        done = end
        if end == len(tokens):
            return


def read_documents(path: Path) -> list[str]:
    """.jsonl: a text, or an object with one as `text`, a line; any other file is one text. Empty ones are left out."""
    try:
        text = read_text(path, TEXT_BYTES).removeprefix("\ufeff")
    except FileNotFoundError:
        raise UserError(f"--text {path}: there is no such file") from None
    except Unreadable as error:
        raise UserError(f"--text {path}: {error}") from None
    if path.suffix.lower() != ".jsonl":
        found = [text]
    else:  # only line feeds end a line: JSON texts may hold U+2028
        lines = enumerate(text.split("\n"), start=1)
        found = [_document(line, f"{path}:{number}") for number, line in lines if line.strip()]
    return [one for one in found if one]


def _document(line: str, place: str) -> str:
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise UserError(f"--text {place}: {error}") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f'--text {place}: expected a text or {{"text": text}}; found {line[:60]}')
    return text


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What is read, and how it is cut."""

    artifact: artifacts.Artifact
    tokenizer: Tokenizer
    windows: list[Window]
    window: int
    stride: int
    text: Mapping[str, Any]  # facts of the text

    unit = "tokens"

    def flags(self, folder: Path) -> dict[str, Any]:
        return {}

    @property
    def requests(self) -> Counter[int]:
        return Counter(len(window.ids) for window in self.windows)

    @property
    def total(self) -> int:
        return sum(len(window.ids) for window in self.windows)

    def room(self, args: argparse.Namespace, limit: Limit | None) -> Room:
        """Caches for one prefill: nothing is read again."""
        batch = args.batch_size or 1
        read = max(self.requests) * batch
        return room_for(args, self.artifact.manifest, self.requests, 0, limit, batch=batch, prefill_tokens=read)

    def limit(self, args: argparse.Namespace, team: Team | None) -> Limit | None:
        return limit_for(args, self.artifact.manifest, self.requests, 1, team)

    def engine(self, args: argparse.Namespace, team: Team | None) -> Engine:
        return engine_in(args, self.artifact, self.tokenizer, partial(self.room, args), self.limit(args, team), team)

    def run(self, engine: Engine, advance: Callable[[int], None], *, talks: bool = True) -> dict[str, Any]:
        """Facts of the text under the model. A rank that does not talk reads the same, and adds nothing up."""
        nll, tokens, start = 0.0, 0, time.perf_counter()

        def count(index: int, logits: torch.Tensor) -> None:
            nonlocal nll, tokens
            if talks:
                window = self.windows[index]
                values, _ = token_logprobs(logits[-1 - window.counted : -1], window.ids[-window.counted :])
                nll, tokens = nll - values.double().sum().item(), tokens + window.counted

        engine.score([window.ids for window in self.windows], count, lambda step: advance(step.tokens_in))
        seconds = time.perf_counter() - start
        each = nll / max(1, tokens)
        return {
            **self.text,
            "window": self.window,
            "stride": self.stride,
            "windows": len(self.windows),
            "tokens": tokens,
            "nll": nll,
            "nll_per_token": each,
            "perplexity": math.exp(each) if each < 700 else None,  # beyond float64
            "bits_per_byte": each / math.log(2) * self.text["text_tokens"] / self.text["bytes"],
            "seconds": seconds,
            "tokens_per_s": self.total / seconds,
        }

    def lines(self, facts: Mapping[str, Any]) -> Iterator[str]:
        documents = f" in {facts['documents']} documents" if facts["documents"] > 1 else ""
        yield (
            f"{facts['text']}: {facts['bytes']} bytes, {facts['text_tokens']} tokens{documents}; windows of "
            f"{facts['window']} tokens, one every {facts['stride']}: {facts['tokens']} tokens count"
        )
        yield f"nll             {facts['nll_per_token']:.6f} a token, {facts['nll']:.3f} in all"
        yield f"bits per byte   {facts['bits_per_byte']:.6f}"
        perplexity = "more than 1e304" if facts["perplexity"] is None else f"{facts['perplexity']:.6g}"
        yield f"perplexity {perplexity} ({facts['seconds']:.1f} s, {facts['tokens_per_s']:.1f} tokens/s read)"


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags."""
    if args.logits == "last":
        yield "--logits last: perplexity needs those of every token"
    for name in ("input_text", "input_ids", "input_file"):
        if getattr(args, name) is not None:
            yield f"{spellings(name)[0]} is a prompt of --golden or --golden-out; --text is read as it is"
    if args.csv:
        yield "--csv: a perplexity is no table; --json has the numbers"
    if args.window is not None and args.window < 2:
        yield f"--window {args.window}: expected at least 2 tokens, since the first one never counts"
    if args.stride is not None and args.window is not None and args.stride > args.window:
        yield f"--stride {args.stride}: windows of {args.window} tokens would leave tokens between them out"


def prepare(args: argparse.Namespace, make: Callable[[], artifacts.Artifact], team: Team | None) -> Perplexity:
    """Read the text and cut it. UserError for what no rank could do."""
    documents = read_documents(Path(args.text))
    args.logits = "all"
    artifact = make()
    positions = positions_of(args, artifact.manifest)
    size = args.window or min(positions, WINDOW)
    if size > positions:
        raise UserError(f"--window {size}: a sequence can have {positions} tokens")
    stride = args.stride or size
    if stride > size:
        raise UserError(f"--stride {stride}: windows of {size} tokens would leave tokens between them out")
    tokenizer = load_tokenizer(args.model_path)
    added = len(tokenizer.encode(""))
    ids = [tokenizer.encode(document) for document in documents]
    found = [window for tokens in ids for window in windows(tokens, size, stride)]
    if not found:
        raise UserError(f"--text {args.text}: it has no token with another one before it, so there is nothing to count")
    check_ids(ids, artifact.manifest)
    job = Perplexity(
        artifact=artifact,
        tokenizer=tokenizer,
        windows=found,
        window=size,
        stride=stride,
        text={
            "text": args.text,
            "documents": len(documents),
            "bytes": sum(len(document.encode()) for document in documents),
            "text_tokens": sum(map(len, ids)) - added * len(ids),
        },
    )
    job.room(args, job.limit(args, team))
    return job


def check_ids(ids: Sequence[Sequence[int]], manifest: Mapping[str, Any]) -> None:
    vocab = manifest["sizes"].get("vocab")
    most = max(max(one, default=0) for one in ids)
    if vocab and most >= vocab:
        raise UserError(f"the tokenizer gives token id {most}; the model knows 0 to {vocab - 1}")
