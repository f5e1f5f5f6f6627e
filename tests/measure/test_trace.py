"""Faults that are planted are found at their node and place; models that are right stay inside their budgets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, LENGTHS, save_checkpoint, save_model, sequences, variant
from traced import trace

from llmc.runtime.measure.compare import first_that_errs

FAMILY = Path(__file__).parents[2] / "graphs/families/llama.yaml"
DTYPES = ("float32", "bfloat16")
LONG = 120  # tokens of a prompt: rope needs positions for a small difference to show


def long_prompts(vocab: int = 96) -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(11)
    tokens = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in (LONG, 40)]
    return tokens, [len(t) - 3 for t in tokens]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two layers, 4 heads over 2 kv heads of 16."""
    (tmp_path / "own").mkdir()
    save_checkpoint(tmp_path / "own", "gqa")
    return tmp_path / "own"


@pytest.fixture
def other(checkpoint: Path) -> Path:
    """A copy that may be changed: what transformers reads."""
    path = checkpoint.parent / "other"
    shutil.copytree(checkpoint, path)
    return path


def change_tensors(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def change_config(folder: Path, old: str, new: str) -> None:
    file = folder / "config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def line_of(place: str) -> str:
    """The line of the family's file that a place names, from its column."""
    name, line, column = place.rsplit(":", 2)
    assert name == "graphs/families/llama.yaml"
    return FAMILY.read_text().splitlines()[int(line) - 1][int(column) - 1 :]


def assert_first(nodes, node: str, key: str, phase: str = "prefill") -> None:
    """The first that errs is this node, at the line of this key, and what stands before it does not err."""
    first = first_that_errs(nodes)
    assert first is not None
    assert (first["node"], first["phase"]) == (node, phase)
    assert line_of(first["place"]).startswith(f"{key}:")


def options(dtype: str, world_size: int) -> dict[str, Any]:
    return {"dtype": dtype, "attention": "paged", "world_size": world_size}


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
class TestPlantedFaults:
    def test_a_swapped_weight(self, dtype, world_size, checkpoint, other):
        def swap(tensors):
            gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

        change_tensors(other, swap)
        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, reference=other, **options(dtype, world_size))
        assert_first(nodes, "layers.1.mlp.gate_up", "gate_up")

    def test_rope_theta_off_by_one_percent(self, dtype, world_size, checkpoint, other):
        change_config(other, '"rope_theta": 10000.0', '"rope_theta": 10100.0')
        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, reference=other, **options(dtype, world_size))
        assert_first(nodes, "layers.0.attn.rope", "rope")

    def test_a_missing_norm_epsilon(self, dtype, world_size, checkpoint, other):
        def make_small(tensors):
            tensors["model.embed_tokens.weight"] *= 0.01  # mean squares near the epsilon of 1e-5

        for folder in (checkpoint, other):
            change_tensors(folder, make_small)
        change_config(checkpoint, '"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-12')
        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, reference=other, **options(dtype, world_size))
        assert_first(nodes, "layers.0.input_norm", "input_norm")

    def test_a_wrong_kv_head_on_one_rank(self, dtype, world_size, checkpoint):
        def plant(ranks):
            """On one rank the keys are made by the head of another rank; alone, the two heads are exchanged."""
            weights = [ours.runner.executor.tensors["layers.1.attn.qkv.weight"] for ours in ranks]
            queries = 16 * 4 // world_size
            if world_size == 1:
                keys = weights[0][queries : queries + 32]
                keys.copy_(keys.roll(16, 0))
            else:
                weights[1][queries : queries + 16] = weights[2][queries : queries + 16]

        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, plant=plant, **options(dtype, world_size))
        assert_first(nodes, "layers.1.attn.qkv", "qkv")
        first = first_that_errs(nodes)
        assert first is not None
        start, end = first["worst"]["columns"]
        assert start < 96, "q has 64 columns, k 32"
        assert end > 64

    def test_a_mask_off_by_one(self, dtype, world_size, checkpoint):
        def plant(ranks):
            for ours in ranks:
                mask = ours.runner.executor.tensors["mask"]
                mask.copy_(mask.triu(diagonal=2))  # a token sees the one behind it

        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, plant=plant, **options(dtype, world_size))
        assert_first(nodes, "layers.0.attn.core", "core")

    def test_one_position_of_one_table_is_not_averaged_away(self, dtype, world_size, checkpoint):
        def plant(ranks):
            for ours in ranks:
                ours.runner.executor.tensors["cos_table"][LONG - 10] *= 0.8

        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, plant=plant, **options(dtype, world_size))
        assert_first(nodes, "layers.0.attn.rope", "rope")
        first = first_that_errs(nodes)
        assert first is not None
        assert (first["worst"]["prompt"], first["worst"]["position"]) == (0, LONG - 10)

    def test_a_cache_that_lost_a_position_shows_in_decode(self, dtype, world_size, checkpoint):
        def plant(ranks):
            """Between prefill and decode the first positions of every cache are zeroed."""
            for ours in ranks:
                executor, run = ours.runner.executor, ours.runner.executor.run

                def spoiled(phase, inputs, executor=executor, run=run):
                    if phase == "decode":
                        for name in executor.manifest["caches"]:
                            executor.tensors[name][:, :4] = 0
                    return run(phase, inputs)

                executor.run = spoiled

        tokens, lengths = long_prompts()
        nodes = trace(checkpoint, variant(checkpoint), tokens, lengths, plant=plant, **options(dtype, world_size))
        assert_first(nodes, "layers.0.attn.core", "core", phase="decode")


def assert_honest(nodes) -> None:
    """Every value was compared and is inside its budget."""
    assert [node["name"] for node in nodes if node["counterpart"] is None] == []
    assert [(n["phase"], n["name"], n["relative"], n["budget"], n["worst"]) for n in nodes if not n["ok"]] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_honest_models_stay_inside_their_budgets(name, dtype, tmp_path):
    model = save_checkpoint(tmp_path, name, seed=1)
    tokens = sequences(model.config.vocab_size)
    for attention, fusions in (("paged", ("swiglu", "add_norm")), ("flash", ())):
        nodes = trace(tmp_path, variant(tmp_path), tokens, LENGTHS, dtype=dtype, attention=attention, fusions=fusions)
        assert_honest(nodes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", ["gqa", "biases", "odd-vocab"])
def test_honest_ranks_stay_inside_the_budgets_of_one(name, world_size, dtype, tmp_path):
    model = save_checkpoint(tmp_path, name)
    tokens = sequences(model.config.vocab_size)
    nodes = trace(tmp_path, variant(tmp_path), tokens, LENGTHS, dtype=dtype, attention="paged", world_size=world_size)
    assert_honest(nodes)


def test_a_table_split_over_ranks_is_joined(tmp_path):
    model = save_model(tmp_path, {})
    text = variant(tmp_path) + "\ngraph: {embed: {tp: hidden}}\n"
    tokens = sequences(model.config.vocab_size)
    assert_honest(trace(tmp_path, text, tokens, LENGTHS, dtype="float32", attention="flash", world_size=4))
