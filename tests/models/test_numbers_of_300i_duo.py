"""Atlas 300I DUO on the host: blocked (NZ) caches, mask and weights under the chip's rules give the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Ours, bind, save_checkpoint, variant
from torch import Tensor

from llmc.compiler import artifact
from llmc.compiler.cli import main
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.demo import demo_weights
from llmc.runtime.engine.runner import make_caches
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.scheduler import Batch
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.hostatb.numeric import format_of

DUO, A2 = "atlas-300i-duo", "atlas-800i-a2"
# Prompts below, at and over the borders of a cache block and of the mask's triangle (128), and answers that cross them.
LENGTHS = [5, 127, 130, 200, 1]
STEPS = [2, 6, 12, 9, 4]
PROMPT = "The capital of France is"
ROUNDINGS = 4 * 2.0**-11  # float16 rounds the product, both terms of the rotation and their sum


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A checkpoint, tokens for it, and what transformers computes of them in float32."""

    folder: Path
    tokens: list[list[int]]
    logits: list[Tensor]
    keys: list[Tensor]  # of layer 0, a sequence: [kv heads, tokens, head_dim]
    values: list[Tensor]


@pytest.fixture(autouse=True)
def chip_as_before() -> Iterator[None]:
    """An executor says for the whole process which chip hostatb stands for."""
    before = hostatb.current_chip()
    yield
    hostatb.use_chip(before)


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory):
    made: dict[str, Truth] = {}

    def make(name: str) -> Truth:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = truth(folder, name)
        return made[name]

    return make


@torch.no_grad()
def truth(folder: Path, name: str) -> Truth:
    model = save_checkpoint(folder, name)
    generator = torch.Generator().manual_seed(5)
    sizes = [n + m for n, m in zip(LENGTHS, STEPS, strict=True)]
    tokens = [torch.randint(0, model.config.vocab_size, (size,), generator=generator).tolist() for size in sizes]
    outputs = [model(torch.tensor([t]), use_cache=True) for t in tokens]
    layer = [out.past_key_values.layers[0] for out in outputs]
    return Truth(
        folder=folder,
        tokens=tokens,
        logits=[out.logits[0, n - 1 :] for out, n in zip(outputs, LENGTHS, strict=True)],
        keys=[cached.keys[0] for cached in layer],
        values=[cached.values[0] for cached in layer],
    )


def bound(found: Truth, work: Path, device: str, world_size: int, **options: Any) -> list[Ours]:
    """The ranks of the checkpoint's model compiled for a device, in float16."""
    graph, path = work / "variant.yaml", work / device
    graph.write_text(variant(found.folder))
    asked = Options(device=device, dtype="float16", world_size=world_size, allow_unsupported=True, **options)
    artifact.write(compile_model(str(graph), asked), path)
    return [bind(artifact.read(path), found.folder, rank=rank) for rank in range(world_size)]


def run(ranks: list[Ours], found: Truth) -> list[Tensor]:
    """Logits of rank 0, after a look that every rank has the same."""
    first, *others = run_ranks([partial(ours.logits, found.tokens, LENGTHS) for ours in ranks])
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return first


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Root mean square of the difference, relative to what is expected."""
    a, b = torch.cat(got).float(), torch.cat(expected).float()
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize("name", ["gqa", "mqa", "biases"])
def test_numbers_are_as_near_to_float32_as_those_of_the_other_chip(name, attention, world_size, truth_of, tmp_path):
    found = truth_of(name)
    duo, a2 = (run(bound(found, tmp_path, d, world_size, attention=attention), found) for d in (DUO, A2))
    assert error(a2, found.logits) < 0.01
    assert error(duo, found.logits) < 1.1 * error(a2, found.logits)


def fill(ours: Ours, found: Truth) -> Sequence[Request]:
    """Prefill all sequences whole in one batch; they stay in the caches."""
    for tokens in found.tokens:
        ours.scheduler.add(Request(prompt_ids=list(tokens), params=SamplingParams(max_tokens=1)))
    batch = ours.scheduler.schedule()
    ours.runner.run(batch)
    return batch.sequences


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_keys_and_values_lie_in_blocks_of_16_columns(attention, world_size, truth_of, tmp_path):
    """Column c of a position lies in block c // 16 at c % 16 (atb-operations.md 1.7); a rank has the columns of its kv
    heads. The keys and values are those of transformers; nothing else is written."""
    found = truth_of("wide-heads")
    ranks = bound(found, tmp_path, DUO, world_size, attention=attention)
    placed = run_ranks([partial(fill, ours, found) for ours in ranks])
    for rank, (ours, sequences) in enumerate(zip(ranks, placed, strict=True)):
        for kind, expected in (("k", found.keys), ("v", found.values)):
            cache = next(
                t for n, t in ours.runner.caches.items() if n.startswith("layers.0.") and n.endswith(f"{kind}_cache")
            )
            assert format_of(cache) == "nz"
            written = torch.zeros_like(cache)
            for row, (sequence, heads) in enumerate(zip(sequences, expected, strict=True)):
                columns = heads.chunk(world_size)[rank].transpose(0, 1).flatten(1)  # [tokens, the rank's columns]
                for position, wanted in enumerate(columns):
                    if attention == "paged":  # [blocks, columns / 16, 128, 16]
                        at = (sequence.block_table[position // 128], slice(None), position % 128)
                    else:  # [1, sequences, columns / 16, positions, 16]
                        at = (0, row, slice(None), position)
                    difference = cache[at].flatten().float() - wanted
                    assert difference.abs().max() <= ROUNDINGS * heads.abs().max(), (row, position)
                    written[at] = cache[at]
            assert torch.equal(cache, written)


def test_a_sequence_that_moves_to_another_row_takes_its_blocks_with_it(truth_of, tmp_path):
    """Contiguous caches: when a sequence ends, the last one takes its row."""
    found = truth_of("gqa")
    (ours,) = bound(found, tmp_path, DUO, 1, attention="flash")
    schedule, moves = ours.scheduler.schedule, []

    def watched() -> Batch:
        batch = schedule()
        moves.extend(batch.moves)
        return batch

    ours.scheduler.schedule = watched  # type: ignore[method-assign]
    got = ours.logits(found.tokens, LENGTHS)
    # They end after 2, 6, 12, 9 and 4 tokens; the last row takes the place of the one that ended.
    assert [(m.source, m.target, m.length > 128) for m in moves] == [
        (4, 0, False), (3, 0, True), (2, 1, True), (1, 0, True),
    ]  # fmt: skip
    assert error(got, found.logits) < 0.01


def test_contiguous_caches_have_whole_blocks_of_positions(truth_of, tmp_path):
    found = truth_of("gqa")
    (ours,) = bound(found, tmp_path, DUO, 1, attention="flash")
    manifest = ours.runner.manifest
    for positions, rounded in ((16, 16), (200, 208), (1, 16)):
        caches = make_caches(manifest, {"B": 3, "S": positions})
        assert {tuple(cache.shape) for cache in caches.values()} == {(1, 3, 2, rounded, 16)}


@pytest.fixture(scope="module")
def answer() -> tuple[Path, list[int]]:
    """A real model's checkpoint, and its greedy continuation of PROMPT by transformers in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = demo_weights()
    ids = AutoTokenizer.from_pretrained(checkpoint)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    out = model.generate(**ids, do_sample=False, max_new_tokens=4)
    return checkpoint, out[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_llmc_run_on_the_host_answers_with_a_real_model_as_transformers_does(attention, answer, capsys):
    checkpoint, expected = answer
    command = ["run", "--model-path", str(checkpoint), "--device", DUO, "--dtype", "float16", "--attention", attention,
               "--input-text", PROMPT, "--max-output-length", "4", "--json"]  # fmt: skip
    assert main(command) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert output["token_ids"] == expected
    assert output["text"].startswith(" Paris")
