"""A real model: greedy text of SmolLM2-135M-Instruct, ours and transformers', on the same weights in float32."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llmc.compiler import artifact
from llmc.compiler.language.checkpoint import choose_variant, read_config
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.demo import demo_weights
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.runner import make_caches, make_constants
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.tokenizer import load_tokenizer
from llmc.runtime.executor import Executor
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.weights import load_weights

PROMPTS = [
    "What's deep learning?",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The capital of France is",
    "Explain in one sentence why the sky is blue, then list three other things that are blue and say where they live.",
]
TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint():
    return demo_weights()


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    """Greedy continuation by transformers, each prompt alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS)
        found.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return found


@pytest.fixture(scope="module")
def engines_for(checkpoint, tmp_path_factory):
    """The engine of each rank."""
    made: dict[tuple[str, int], list[Engine]] = {}

    def make(attention: str, world_size: int = 1) -> list[Engine]:
        if (attention, world_size) not in made:
            options = Options(device="host", dtype="float32", attention=attention, world_size=world_size)
            path = tmp_path_factory.mktemp(attention) / "out"
            artifact.write(compile_model(choose_variant(read_config(checkpoint)), options), path)
            found = artifact.read(path)
            made[attention, world_size] = [engine(found, rank) for rank in range(world_size)]
        return made[attention, world_size]

    weights: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # of a rank of a world size

    def engine(found: artifact.Artifact, rank: int) -> Engine:
        manifest = found.manifest
        key = manifest["world_size"], rank
        if key not in weights:
            weights[key] = load_weights(
                manifest["weights"], checkpoint, splits=manifest["splits"], rank=rank, progress=False
            )
        caches = make_caches(manifest, {"N": 16} if manifest["attention"] == "paged" else {"B": 5, "S": 128})
        executor = Executor(
            found,
            hostatb,
            weights=weights[key],
            constants=make_constants(manifest, 256),
            caches=caches,
            rank=rank,
        )
        return Engine(manifest, executor, load_tokenizer(checkpoint), caches=caches, max_batch=5, max_length=128)

    return make


def answers(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_greedy_text_of_a_batch_is_that_of_transformers(attention, engines_for, expected):
    (engine,) = engines_for(attention)
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, top_k=1))
    assert answers(outputs) == expected
    assert sum(len(ids) for ids in expected) > 3 * TOKENS  # the comparison is over real answers, not early ends


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_three_ranks_give_the_greedy_text_of_one(attention, engines_for, expected):
    """9 query and 3 kv heads: one kv head a rank."""
    params = SamplingParams(max_tokens=TOKENS, top_k=1)
    ranks = run_ranks([partial(engine.generate, PROMPTS, params) for engine in engines_for(attention, 3)])
    assert [answers(outputs) for outputs in ranks] == [expected] * 3


def test_greedy_text_of_one_prompt_alone_is_that_of_the_batch(engines_for, expected):
    (engine,) = engines_for("paged")
    alone = [engine.generate([p], SamplingParams(max_tokens=TOKENS, top_k=1))[0] for p in PROMPTS]
    assert answers(alone) == expected
