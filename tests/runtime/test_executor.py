"""The executor and the engine as a library, given tensors, inputs and prompts that do not fit. Needs torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmc.compiler import artifact
from llmc.compiler.diagnostics import UserError
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.runner import make_caches, make_constants
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.executor import Executor

MODEL = """
extends: families/llama
name: small
sizes: {hidden: 64, ffn: 48, layers: 2, heads: 4, kv_heads: 2, vocab: 50, max_positions: 64}
"""
QKV, K_CACHE = "layers.0.attn.qkv.weight", "layers.1.attn.core.k_cache"


@pytest.fixture(scope="module", params=["paged", "flash"])
def built(request, tmp_path_factory) -> artifact.Artifact:
    path = tmp_path_factory.mktemp("small")
    (path / "small.yaml").write_text(MODEL)
    options = Options(device="host", dtype="float32", attention=request.param)
    artifact.write(compile_model(str(path / "small.yaml"), options), path / "out")
    return artifact.read(path / "out")


@pytest.fixture
def tensors(built) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    weights = {name: torch.randn(w["shape"]) / 8 for name, w in built.manifest["weights"].items()}
    caches = make_caches(built.manifest, {"N": 4, "B": 2, "S": 64})
    return {"weights": weights, "constants": make_constants(built.manifest, 64), "caches": caches}


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("weights", QKV, None, f"{QKV}: missing"),
        ("weights", QKV, [1], f"{QKV}: a list, not a tensor"),
        ("weights", QKV, torch.zeros(3, 3), f"{QKV}: found float32 [3, 3], needed float32 [128, 64]"),
        ("weights", QKV, torch.zeros(128, 64).half(), f"{QKV}: found float16 [128, 64], needed float32 [128, 64]"),
        ("constants", "sin_table", torch.zeros(8, 8), "sin_table: found float32 [8, 8], needed float32 [64, 16]"),
        ("caches", K_CACHE, torch.zeros(1), f"{K_CACHE}: found float32 [1]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_anything_runs(built, tensors, kind, name, value, words):
    tensors[kind][name] = value
    with pytest.raises(UserError) as error:
        Executor(built, hostatb, **tensors)
    assert words in str(error.value)
    assert str(error.value).startswith("1 tensors are not what the artifact needs")


def test_caches_must_agree_on_their_symbols(built, tensors):
    cache = tensors["caches"][K_CACHE]
    tensors["caches"][K_CACHE] = torch.zeros([n + (n in (4, 64)) for n in cache.shape])
    with pytest.raises(UserError, match=K_CACHE):
        Executor(built, hostatb, **tensors)


def test_a_wrong_phase_and_missing_inputs_are_named(built, tensors):
    executor = Executor(built, hostatb, **tensors)
    with pytest.raises(UserError, match="no phase 'warmup'"):
        executor.run("warmup", {})
    with pytest.raises(UserError, match=r"prefill needs the inputs .*token_ids"):
        executor.run("prefill", {})


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("hello", "must be a list"),
        ([[1.5]], "must be a text or token ids"),
        ([None], "must be a text or token ids"),
        ([[]], "the prompt is empty"),
        ([[50]], "token id 50; the model knows 0 to 49"),
        ([[-1]], "token id -1"),
        (["hello"], "there is no tokenizer"),
    ],
)
def test_prompts_that_are_none_are_refused_and_the_engine_goes_on(built, tensors, prompts, words):
    engine = Engine(built.manifest, Executor(built, hostatb, **tensors), None, caches=tensors["caches"])
    with pytest.raises(UserError, match=words):
        engine.generate(prompts, SamplingParams(max_tokens=2))
    first = engine.generate([[1, 2]], SamplingParams(max_tokens=3))
    again = engine.generate([torch.tensor([1, 2])], SamplingParams(max_tokens=3))
    assert first[0].token_ids == again[0].token_ids


def test_an_input_of_both_phases_is_described_by_its_general_shape(built):
    assert built.manifest["inputs"]["token_ids"]["shape"] == ["T"]
    assert built.manifest["inputs"]["position_ids"]["shape"] == ["T"]


@pytest.mark.parametrize("domain", ["55469", "65535", "65536", "-1", "tp_0_1", "5:10"])
def test_a_communicator_that_lccl_would_listen_for_on_no_port_is_refused(built, tensors, domain):
    """10067 + domain, cut to 16 bits, would be port 0, a port of root's, or another one than was meant."""
    two = dataclasses.replace(built, manifest={**built.manifest, "world_size": 2, "backend": "lccl"})
    with pytest.raises(UserError, match=f"comm_domain '{domain}' cannot be used"):
        Executor(two, hostatb, **tensors, comm_domain=domain)
    for good in ("", "0", "55468", "7:200"):
        Executor(two, hostatb, **tensors, comm_domain=good)
