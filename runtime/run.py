"""`llmc run`: prompts in, answers out, with what the original scripts print.

Answers and facts go to stdout, everything else to stderr; with --json one object goes to stdout and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.terminal import columns, fold, generated
from llmc.runtime.engine.engine import Engine, Output, check_prompt
from llmc.runtime.engine.logprobs import Logprob
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.tokenizer import Tokenizer, load_tokenizer
from llmc.runtime.flags import RUN_FLAGS, check_run_flags, sampling_of, words_of
from llmc.runtime.hostatb.pages import settle
from llmc.runtime.prompts import Prompt, as_file, encode, read_prompts, replicate, requests_of, shown
from llmc.runtime.ranks import Team
from llmc.runtime.session import (
    built,
    check_world_size,
    checkpoint_config,
    limit_for,
    make_artifact,
    make_engine,
    note,
    on_cpu,
    positions_of,
    room_for,
    threads_used,
    use_cpu,
    work,
)
from llmc.runtime.weights import progress_bar


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Everything that `llmc run` does, alone or as one rank of a team; the exit code."""
    return work(args, team, prepare=prepare, words=rank_words, answer=answer)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags ask for, as far as it can be known without a device."""

    params: SamplingParams
    tokenizer: Tokenizer | None
    prompts: list[Prompt]  # as given: one that --batch-size repeats is here once
    ids: list[list[int]]
    artifact: artifacts.Artifact


def prepare(args: argparse.Namespace, team: Team | None, cleanup: contextlib.ExitStack) -> Asked:
    """Flags, prompts and the artifact, which lives as long as `cleanup`. UserError for what no rank could do."""
    check_run_flags(args)
    check_world_size(args, team)
    params = SamplingParams(**sampling_of(args))
    if args.use_refactor is not None:
        note("--use-refactor is ignored: there is one code path")
    config = checkpoint_config(args)
    tokenizer = load_tokenizer(args.model_path) if args.load_tokenizer else None
    prompts = read_prompts(args)
    ids = [encode(prompt, tokenizer, args) for prompt in prompts]
    artifact = make_artifact(args, config, cleanup, team)
    sizes = artifact.manifest["sizes"]
    longest = positions_of(args, artifact.manifest)
    for index, prompt in enumerate(ids):
        check_prompt(index, prompt, vocab=sizes.get("vocab"), max_length=longest)
    requests = requests_of(ids, args.batch_size)
    limit = limit_for(args, artifact.manifest, requests, params.max_tokens, team)
    room_for(args, artifact.manifest, requests, params.max_tokens, limit)
    return Asked(params=params, tokenizer=tokenizer, prompts=prompts, ids=ids, artifact=artifact)


def answer(args: argparse.Namespace, asked: Asked, team: Team | None) -> int:
    """Load, generate, print; the exit code. Of several ranks, rank 0 prints."""
    prompts, ids = replicate(asked.prompts, args.batch_size), replicate(asked.ids, args.batch_size)
    params, talks = asked.params, team is None or team.talks
    use_cpu(args, team)
    start = time.perf_counter()
    engine = make_engine(args, asked.artifact, asked.tokenizer, ids, params, team)
    engine.warm_up(len(ids) if args.host_compile else 1)
    settle()
    loading = time.perf_counter() - start
    streamed = streams(args, ids, asked.tokenizer) and talks
    callback = (lambda i, text: print(generated(text, sys.stdout), end="", flush=True)) if streamed else None
    if callback:
        print(generated(f"Question[0]: {shown(prompts[0])}\nAnswer[0]: ", sys.stdout), end="", flush=True)
    bar = talks and not (args.quiet or args.json or streamed)
    try:
        with progress_bar("tokens", len(ids) * params.max_tokens, bar) as advance:
            outputs = engine.generate(ids, params, callback, lambda step: advance(step.tokens_out))
    except KeyboardInterrupt:
        if callback:
            print()  # what was streamed stays a line of its own
        raise
    if not talks:
        return 0
    if args.json:
        print(json.dumps(report(asked.artifact.manifest, prompts, outputs, engine, loading)))
    else:
        print_answers(prompts, outputs, engine, streamed=streamed)
    return 0


def rank_words(args: argparse.Namespace, asked: Asked, folder: Path) -> list[str]:
    """The command line of one rank."""
    values = {**vars(args), **as_file(asked.prompts, folder), **built(asked.artifact)}
    return ["run", *words_of(argparse.Namespace(**values), RUN_FLAGS)]


def streams(args: argparse.Namespace, ids: Sequence[Any], tokenizer: Tokenizer | None) -> bool:
    if args.stream and (len(ids) > 1 or tokenizer is None):
        note("--stream is for the text of one prompt; answers follow when all is done")
    return bool(args.stream and not args.json and len(ids) == 1 and tokenizer)


# ---- what is printed


def timing(outputs: Sequence[Output], engine: Engine) -> dict[str, float]:
    """Prefill: all prefill steps. Per token: the mean decode step, of the whole batch. Rates: tokens / time. A sequence
    that lost its cache to others is read again, and counts again."""
    prefill = sum(s.seconds for s in engine.steps if s.phase == "prefill")
    read = sum(s.tokens_in for s in engine.steps if s.phase == "prefill")
    decode = [s for s in engine.steps if s.phase == "decode"]
    decode_s, decoded = sum(s.seconds for s in decode), sum(s.tokens_out for s in decode)
    generated = sum(o.generated_tokens for o in outputs)
    return {
        "prefill_ms": prefill * 1e3,
        "prefill_tokens_per_s": read / prefill if prefill else 0.0,
        "decode_ms_per_token": decode_s / len(decode) * 1e3 if decode else 0.0,
        "decode_tokens_per_s": decoded / decode_s if decode_s else 0.0,
        "tokens_per_s": generated / (prefill + decode_s) if generated else 0.0,
        "total_ms": (prefill + decode_s) * 1e3,
    }


def print_answers(prompts: Sequence[Prompt], outputs: Sequence[Output], engine: Engine, *, streamed: bool) -> None:
    for output in outputs:
        i = output.index
        if streamed:
            print()
        else:
            answer = output.text if engine.tokenizer else ",".join(map(str, output.token_ids))
            print(generated(f"Question[{i}]: {shown(prompts[i])}\nAnswer[{i}]: {answer}", sys.stdout))
        print(f"Generate[{i}] token num: {output.generated_tokens}")
        print(f"Input[{i}] token num: {output.prompt_tokens}, finished by {output.finish_reason}")
    t = timing(outputs, engine)
    decode = f"decode {t['decode_ms_per_token']:.2f} ms per token ({t['decode_tokens_per_s']:.1f} tokens/s)"
    closing = (
        f"prefill {t['prefill_ms']:.1f} ms ({t['prefill_tokens_per_s']:.1f} tokens/s), "
        f"{decode if t['decode_tokens_per_s'] else 'no decode step'}, "
        f"all {t['total_ms']:.1f} ms ({t['tokens_per_s']:.1f} tokens/s)"
        f"{f', {threads_used()}' if on_cpu(engine) else ''}"
    )
    print(fold(closing, columns(sys.stdout)))


def shown_logprobs(entry: Mapping[int, Logprob] | None) -> list[dict[str, Any]] | None:
    """The token itself first; null for a prompt's first token, and for the logarithm of 0, which JSON cannot say."""
    if entry is None:
        return None
    return [
        {"token_id": token, "logprob": one.logprob if one.logprob > -math.inf else None, "rank": one.rank}
        for token, one in entry.items()
    ]


def report(
    manifest: Mapping[str, Any], prompts: Sequence[Prompt], outputs: Sequence[Output], engine: Engine, loading: float
) -> dict[str, Any]:
    """The --json object."""
    return {
        "ok": True,
        **{key: manifest[key] for key in ("model", "device", "dtype", "attention", "world_size")},
        "threads": torch.get_num_threads() if on_cpu(engine) else None,
        "outputs": [
            {
                "index": o.index,
                "prompt": prompts[o.index],
                "text": o.text,
                "token_ids": o.token_ids,
                "logprobs": o.logprobs and [shown_logprobs(entry) for entry in o.logprobs],
                "prompt_logprobs": o.prompt_logprobs and [shown_logprobs(entry) for entry in o.prompt_logprobs],
                "prompt_tokens": o.prompt_tokens,
                "generated_tokens": o.generated_tokens,
                "finish_reason": o.finish_reason,
                "first_token_ms": o.first_token_s * 1e3,
                "token_ms": [s * 1e3 for s in o.token_s],
            }
            for o in outputs
        ],
        "timing": {"load_ms": loading * 1e3, **timing(outputs, engine)},
    }
