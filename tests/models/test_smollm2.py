"""A real model: greedy text of SmolLM2-135M-Instruct, ours and transformers', on the same weights in float32."""

from __future__ import annotations

import pytest
import torch
from llmc.compiler import artifact
from llmc.compiler.checkpoint import choose_variant, read_config
from llmc.compiler.pipeline import Options, compile_model
from llmc.runtime import hostatb
from llmc.runtime.demo import demo_weights
from llmc.runtime.engine import Engine
from llmc.runtime.executor import Executor
from llmc.runtime.runner import make_caches, make_constants
from llmc.runtime.sampling import SamplingParams
from llmc.runtime.tokenizer import load_tokenizer
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
def engine_for(checkpoint, tmp_path_factory):
    made: dict[str, Engine] = {}
    weights: dict[str, torch.Tensor] = {}

    def make(attention: str) -> Engine:
        if attention not in made:
            compiled = compile_model(
                choose_variant(read_config(checkpoint)), Options(device="host", dtype="float32", attention=attention)
            )
            path = tmp_path_factory.mktemp(attention) / "out"
            artifact.write(compiled, path)
            found = artifact.read(path)
            weights.update(weights or load_weights(found.manifest["weights"], checkpoint, progress=False))
            caches = make_caches(found.manifest, {"N": 16} if attention == "paged" else {"B": 5, "S": 128})
            executor = Executor(
                found, hostatb, weights=weights, constants=make_constants(found.manifest, 256), caches=caches
            )
            made[attention] = Engine(
                found.manifest, executor, load_tokenizer(checkpoint), caches=caches, max_batch=5, max_length=128
            )
        return made[attention]

    return make


def answers(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_greedy_text_of_a_batch_is_that_of_transformers(attention, engine_for, expected):
    outputs = engine_for(attention).generate(PROMPTS, SamplingParams(max_tokens=TOKENS, top_k=1))
    assert answers(outputs) == expected
    assert sum(len(ids) for ids in expected) > 3 * TOKENS  # the comparison is over real answers, not early ends


def test_greedy_text_of_one_prompt_alone_is_that_of_the_batch(engine_for, expected):
    engine = engine_for("paged")
    alone = [engine.generate([p], SamplingParams(max_tokens=TOKENS, top_k=1))[0] for p in PROMPTS]
    assert answers(alone) == expected
