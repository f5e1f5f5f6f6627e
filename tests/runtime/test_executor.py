"""The executor and the engine as a library, given tensors, inputs and prompts that do not fit. Needs torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from device_queue import DeviceQueue, QueuedCopies
from torch.utils._python_dispatch import TorchDispatchMode

from llmc.compiler import artifact
from llmc.compiler.diagnostics import UserError
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.runner import Runner, make_caches, make_constants
from llmc.runtime.engine.sampling import Sampler, SamplingParams
from llmc.runtime.engine.scheduler import Batch
from llmc.runtime.engine.sequence import Sequence as Request
from llmc.runtime.executor import Executor
from llmc.runtime.stream import Upload

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


# The order of steps on a device that works later ----------------------------------------------------------------------


class OnRank0:
    """Reads the logits, and with them all that was queued."""

    def __init__(self, queue: DeviceQueue) -> None:
        self.queue, self.told = queue, []

    def sample(self, logits, states):
        self.queue.drain()
        self.told.append(Sampler().sample(logits, states))
        return self.told[-1]


class OnAnotherRank:
    """Takes rank 0's tokens, and reads nothing of its device."""

    def __init__(self, told) -> None:
        self.told = iter(told)

    def sample(self, logits, states):
        return next(self.told)


def generate(engine: Engine) -> list[list[int]]:
    """Joins, leaves and moves: three prompts on two rows."""
    params = [SamplingParams(max_tokens=n) for n in (2, 5, 4)]
    return [output.token_ids for output in engine.generate([[1, 2, 3], [4, 5], [6]], params)]


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_on_a_device_that_works_later_give_the_numbers_of_one_that_works_at_once(
    rank, built, tensors, monkeypatch
):
    """Inputs are uploaded without waiting, calls are made when the queue comes to them, and only rank 0 reads."""
    truth = {name: cache.clone() for name, cache in tensors["caches"].items()}
    plain = Executor(built, hostatb, **{**tensors, "caches": truth})
    expected = generate(Engine(built.manifest, plain, None, caches=truth, max_batch=2))

    queue = DeviceQueue(monkeypatch)
    told = []
    for turn in range(rank + 1):  # rank 0's tokens come first
        caches = {name: torch.zeros_like(cache) for name, cache in truth.items()}
        executor = Executor(built, queue.atb, **{**tensors, "caches": caches})
        sampler = OnAnotherRank(told) if turn else OnRank0(queue)
        engine = Engine(built.manifest, executor, None, caches=caches, max_batch=2, sampler=sampler)
        engine.runner.upload = Upload("cpu")
        with QueuedCopies(queue) as copies:
            assert generate(engine) == expected
        assert copies.count == len(engine.steps)
        told = getattr(sampler, "told", told)
    queue.drain()
    assert all(torch.equal(caches[name], cache) for name, cache in truth.items())


@pytest.mark.parametrize("kept", [True, False], ids=["waits", "does_not_wait"])
def test_a_step_waits_for_the_calls_of_the_one_before_it(kept, built, tensors, monkeypatch):
    """Two steps of one phase whose logits nobody reads in between, which is what a rank other than 0 does."""
    steps = two_steps(built, tensors)
    expected = [Executor(built, hostatb, **tensors).run("prefill", inputs) for inputs in steps]
    queue = DeviceQueue(monkeypatch)
    executor = Executor(built, queue.atb, **tensors)
    if not kept:
        executor.queued.wait = lambda: None
    found = [executor.run("prefill", inputs) for inputs in steps]
    queue.drain()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) == kept


def test_a_step_waits_for_what_a_failed_one_queued(built, tensors, monkeypatch):
    steps = two_steps(built, tensors)
    queue = DeviceQueue(monkeypatch)
    executor = Executor(built, queue.atb, **tensors)
    segments = executor.phases["prefill"]
    executor.phases["prefill"] = [*segments, (None, [], [], [])]
    with pytest.raises(UserError, match="prefill cannot run"):
        executor.run("prefill", steps[0])
    queued = len(queue.calls)
    assert (queued > 0, queue.done) == (True, 0)
    executor.phases["prefill"] = segments
    executor.run("prefill", steps[1])
    assert queue.done == queued


def two_steps(built, tensors) -> list[dict[str, torch.Tensor]]:
    runner, inputs = Runner(built.manifest, None, tensors["caches"]), []
    for tokens in ([1, 2], [3, 4]):
        request = Request(prompt_ids=tokens, params=SamplingParams(), block_table=[0])
        inputs.append(runner.inputs(Batch(phase="prefill", sequences=(request,))))
        if runner.rows:
            inputs[-1] |= runner.rows.of(0, 1)
    return inputs


def test_the_inputs_that_a_device_reads_are_there_and_the_others_are_not(built, tensors):
    """The meta device stands for one that is not the host."""
    runner = Runner(built.manifest, None, tensors["caches"], "meta")
    request = Request(prompt_ids=[1, 2], params=SamplingParams(), block_table=[0])
    for phase in ("prefill", "decode"):
        inputs = runner.inputs(Batch(phase=phase, sequences=(request,)))
        assert list(inputs) == built.manifest["phases"][phase]["inputs"]
        for name, tensor in inputs.items():
            fact = built.manifest["inputs"][name]
            assert tensor.device.type == ("cpu" if fact["host"] else "meta")
            assert tensor.dtype == getattr(torch, fact["dtype"])


def test_on_a_host_inputs_are_made_and_not_copied(built, tensors):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "copy" in func.name()
            return func(*args, **(kwargs or {}))

    runner = Runner(built.manifest, None, tensors["caches"])
    with Copies() as copies:
        request = Request(prompt_ids=[1], params=SamplingParams(), block_table=[0])
        runner.inputs(Batch(phase="decode", sequences=(request,)))
    assert copies.count == 0
