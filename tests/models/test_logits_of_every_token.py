"""`--logits all`: the prefill's logits of every token against transformers, and log-probabilities of both kinds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, build, save_checkpoint, sequences, variant
from torch import Tensor

from llmc.compiler import artifact
from llmc.compiler.diagnostics import UserError
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.engine.engine import Engine, Output
from llmc.runtime.engine.logprobs import logprobs, token_logprobs
from llmc.runtime.engine.runner import make_caches, make_constants
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.executor import Executor
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.weights import load_weights

ATTENTION = ("paged", "flash")


@pytest.fixture(autouse=True)
def chip_as_before() -> Iterator[None]:
    """An executor says for the whole process which chip hostatb stands for."""
    before = hostatb.current_chip()
    yield
    hostatb.use_chip(before)


def engine(found: artifact.Artifact, checkpoint: Path, rank: int = 0, blocks: int = 32, **more: Any) -> Engine:
    manifest = found.manifest
    caches = make_caches(manifest, {"N": blocks} if manifest["attention"] == "paged" else {"B": 8, "S": 256})
    weights = load_weights(manifest["weights"], checkpoint, splits=manifest["splits"], rank=rank, progress=False)
    executor = Executor(
        found, hostatb, weights=weights, constants=make_constants(manifest, 256), caches=caches, rank=rank
    )
    return Engine(manifest, executor, None, caches=caches, max_batch=8, max_length=256, **more)


def engines(checkpoint: Path, work: Path, world_size: int = 1, **options: Any) -> list[Engine]:
    found = build(work, variant(checkpoint), logits="all", world_size=world_size, **options)
    return [engine(found, checkpoint, rank) for rank in range(world_size)]


def scored(one: Engine, tokens: list[list[int]]) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def keep(index: int, logits: Tensor) -> None:
        assert index == len(found), "in the order given"
        found[index] = logits.clone()

    one.score(tokens, keep)
    return list(found.values())


def alike(ranks: list[list[Tensor]]) -> list[Tensor]:
    """What rank 0 found, after a look that every rank found the same bits."""
    first, *others = ranks
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return first


@torch.no_grad()
def truth(model: Any, tokens: list[list[int]]) -> list[Tensor]:
    """Logits of every position by transformers, each sequence alone."""
    return [model(torch.tensor([t])).logits[0].float() for t in tokens]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_of_every_prompt_token_equal_transformers(name, attention, world_size, tmp_path):
    model = save_checkpoint(tmp_path, name)
    tokens = sequences(model.config.vocab_size)
    ranks = engines(tmp_path, tmp_path, world_size, attention=attention, dtype="float32")
    ours = alike(run_ranks([partial(scored, one, tokens) for one in ranks]))
    for a, b in zip(ours, truth(model, tokens), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("device", ["atlas-800i-a2", "atlas-300i-duo"])
def test_under_the_rules_of_both_chips_logits_of_every_token_hold_those_of_the_last(
    device, attention, world_size, tmp_path
):
    model = save_checkpoint(tmp_path, "gqa")
    tokens = [*sequences(96), [3]]
    graph = tmp_path / "variant.yaml"
    graph.write_text(variant(tmp_path))
    found: dict[str, list[Tensor]] = {}
    for logits in ("last", "all"):
        asked = Options(
            device=device, dtype="float16", attention=attention, world_size=world_size, logits=logits,
            allow_unsupported=True,
        )  # fmt: skip
        path = tmp_path / logits
        artifact.write(compile_model(str(graph), asked), path)
        ranks = [engine(artifact.read(path), tmp_path, rank) for rank in range(world_size)]
        if logits == "all":
            found[logits] = alike(run_ranks([partial(scored, one, tokens) for one in ranks]))
            outputs = run_ranks([partial(one.generate, tokens, greedy(4)) for one in ranks])
        else:
            alone = run_ranks([partial(one.generate, tokens, greedy(4)) for one in ranks])
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in alone[0]]
    assert [int(rows[-1].argmax()) for rows in found["all"]] == [o.token_ids[0] for o in alone[0]]
    ours, exact = torch.cat(found["all"]).float(), torch.cat(truth(model, tokens))
    assert ((ours - exact).square().mean() / exact.square().mean()).sqrt() < 0.01


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **more)


@torch.no_grad()
def expected_logprobs(model: Any, tokens: list[int]) -> Tensor:
    """float32 [tokens, vocab]; row i for token i, none for the first."""
    scores = model(torch.tensor([tokens])).logits[0].float().log_softmax(dim=-1)
    return torch.cat([torch.full_like(scores[:1], torch.nan), scores[:-1]])


def check(output: Output, prompt: list[int], chosen: SamplingParams, model: Any) -> None:
    """Every entry of an answer and of its prompt against transformers."""
    tokens = [*prompt, *output.token_ids]
    assert output.logprobs is not None
    assert output.prompt_logprobs is not None
    assert (len(output.logprobs), len(output.prompt_logprobs)) == (output.generated_tokens, len(prompt))
    assert output.prompt_logprobs[0] is None
    places = zip(tokens, [*output.prompt_logprobs, *output.logprobs], expected_logprobs(model, tokens), strict=True)
    for i, (token, entry, row) in enumerate(places):
        if entry is None:
            assert i == 0
            continue
        top = (chosen.prompt_logprobs if i < len(prompt) else chosen.logprobs) or 0
        assert next(iter(entry)) == token
        assert set(entry) == {token, *row.topk(top).indices.tolist()}
        for one, said in entry.items():
            assert said.logprob == pytest.approx(row[one].item(), abs=2e-4)
            assert said.rank == 1 + int((row > row[one]).sum())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("attention", ATTENTION)
def test_log_probabilities_of_prompt_and_answer_equal_transformers(attention, world_size, tmp_path):
    model = save_checkpoint(tmp_path, "gqa")
    prompts = [[5, 9, 3, 7, 11], [2], [40] * 20]
    ranks = engines(tmp_path, tmp_path, world_size, attention=attention, dtype="float32")
    params = [  # raw logits: neither penalties nor temperature show
        greedy(6, logprobs=3, prompt_logprobs=2, temperature=0.7, repetition_penalty=1.3),
        greedy(3, logprobs=0, prompt_logprobs=0),
        SamplingParams(max_tokens=4, temperature=2.0, top_k=0, seed=4, ignore_eos=True, logprobs=5, prompt_logprobs=1),
    ]
    for outputs in run_ranks([partial(one.generate, prompts, params) for one in ranks]):
        for output, prompt, chosen in zip(outputs, prompts, params, strict=True):
            check(output, prompt, chosen, model)


def test_each_prompt_token_comes_once_over_several_prefills_and_when_a_sequence_is_read_again(tmp_path):
    model = save_checkpoint(tmp_path, "gqa")
    found = build(tmp_path, variant(tmp_path), logits="all", attention="paged", dtype="float32")
    one = engine(found, tmp_path, blocks=3, max_prefill_tokens=150)
    prompts = [[(7 * i) % 96 for i in range(n)] for n in (120, 100, 90)]
    params = greedy(30, logprobs=1, prompt_logprobs=1)
    outputs = one.generate(prompts, params)
    assert one.scheduler.preemptions > 0
    assert [step.phase for step in one.steps].count("prefill") > 3
    for output, prompt in zip(outputs, prompts, strict=True):
        check(output, prompt, params, model)


def test_nothing_that_is_not_asked_for_is_computed(tmp_path):
    save_checkpoint(tmp_path, "gqa")
    (one,) = engines(tmp_path, tmp_path, attention="paged", dtype="float32")
    outputs = one.generate([[1, 2], [3]], [greedy(2), greedy(2, logprobs=0)])
    assert [(o.logprobs is None, o.prompt_logprobs is None) for o in outputs] == [(True, True), (False, True)]
    assert [[len(entry) for entry in o.logprobs or []] for o in outputs] == [[], [1, 1]]


@pytest.mark.parametrize("attention", ATTENTION)
def test_scoring_takes_as_many_tokens_as_a_sequence_has_and_gives_every_block_back(attention, tmp_path):
    model = save_checkpoint(tmp_path, "gqa")
    (one,) = engines(tmp_path, tmp_path, attention=attention, dtype="float32")
    tokens = [[(11 * i) % 96 for i in range(n)] for n in (256, 30, 1)]
    for a, b in zip(scored(one, tokens), truth(model, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())
    with pytest.raises(UserError, match="prompt 1 has 257 tokens, but a sequence can have 256 in all"):
        one.score([[1], [1] * 257], lambda i, logits: pytest.fail("nothing runs"))
    assert not one.scheduler.busy
    before = one.generate([[5, 6]], greedy(5))[0].token_ids
    scored(one, tokens)
    assert one.generate([[5, 6]], greedy(5))[0].token_ids == before


def test_lists_are_read_together_as_many_as_fit_one_prefill(tmp_path):
    save_checkpoint(tmp_path, "gqa")
    found = build(tmp_path, variant(tmp_path), logits="all", attention="paged", dtype="float32")
    one = engine(found, tmp_path, max_prefill_tokens=100)
    scored(one, [[1] * 40, [2] * 40, [3] * 40, [4] * 10])
    assert [(step.phase, step.tokens_in, step.tokens_out) for step in one.steps] == [
        ("prefill", 80, 0),
        ("prefill", 50, 0),
    ]


def test_an_artifact_of_last_tokens_says_that_it_has_no_others(tmp_path):
    save_checkpoint(tmp_path, "gqa")
    one = engine(build(tmp_path, variant(tmp_path), attention="paged", dtype="float32"), tmp_path)
    with pytest.raises(UserError, match="prompt 0: the artifact has the logits of each prompt's last token only"):
        one.generate([[1, 2]], greedy(1, prompt_logprobs=0))
    with pytest.raises(UserError, match="compile it with --logits all"):
        one.score([[1, 2]], lambda i, logits: None)
    assert one.generate([[1, 2]], greedy(1, logprobs=0))[0].logprobs


def test_tokens_of_equal_logits_share_a_rank_and_slices_change_nothing(monkeypatch):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 2.0, 3.0]])
    values, ranks = token_logprobs(logits, [2, 3, 1])
    assert ranks.tolist() == [1, 1, 4]
    torch.testing.assert_close(values, logits.log_softmax(dim=-1)[range(3), [2, 3, 1]])
    first, _, third = logprobs(logits, [0, 3, 1], top=2)
    assert {token: said.rank for token, said in first.items()} == {0: 3, 1: 1, 2: 1}
    assert {token: said.rank for token, said in third.items()} == {1: 4, 0: 1, 3: 2}
    whole = logprobs(logits, [0, 3, 1], top=9)
    monkeypatch.setattr("llmc.runtime.engine.logprobs.NUMBERS_AT_ONCE", 4)
    assert logprobs(logits, [0, 3, 1], top=9) == whole
    assert torch.equal(token_logprobs(logits, [2, 3, 1])[0], values)
    with pytest.raises(UserError, match="row 1 hold NaN"):
        token_logprobs(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), [0, 0])
    assert [len(t) for t in token_logprobs(logits[:0], [])] == [0, 0]
