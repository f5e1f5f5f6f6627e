"""Every world size gives the numbers of world size 1: a part of `equal_ranks.py`, which runs all of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import equal_ranks
import pytest
import torch
from equal_ranks import ATTENTION, FUSIONS, TOLERANCE, Case, Truth, cases, error, prepare
from tiny import LENGTHS, load_ranks, logits_of_ranks

from llmc.compiler.language.source import catalogue
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model

WORLDS = (2, 3, 4, 8)
# Query heads in whole groups and not, kv heads copied, ranks without a head, uneven ffn, vocabulary and hidden size.
UNEVEN = ("gqa-28-over-4", "gqa-10-over-2", "mqa", "few-heads", "odd", "biases", "tied", "everything")


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory):
    """The checkpoint of a case and the logits of world 1, made once."""
    made: dict[str, tuple[Case, Truth]] = {}

    def make(name: str) -> tuple[Case, Truth]:
        if name not in made:
            (case,) = (case for case in cases() if case.name == name)
            made[name] = case, prepare(case, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize(("world_size", "attention", "fusions"), [(2, "paged", "fused"), (8, "flash", "plain")])
def test_every_catalogue_model_shrunk_to_test_size_gives_the_numbers_of_world_1(
    name, world_size, attention, fusions, truth_of, tmp_path
):
    assert worst_error(truth_of(name), world_size, attention, fusions, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("world_size", WORLDS)
def test_sizes_that_do_not_divide_give_the_numbers_of_world_1(name, world_size, truth_of, tmp_path):
    for attention, fusions in zip(ATTENTION, FUSIONS, strict=True):
        assert worst_error(truth_of(name), world_size, attention, fusions, tmp_path) <= TOLERANCE


def worst_error(found: tuple[Case, Truth], world_size: int, attention: str, fusions: str, work: Path) -> float:
    case, truth = found
    options = {"attention": attention, "dtype": "float32", "fusions": FUSIONS[fusions], "world_size": world_size}
    ranks = load_ranks(truth.folder, work, case.text, **options)
    return error(logits_of_ranks(ranks, truth.tokens, LENGTHS), truth.logits[attention])


@pytest.mark.processes
def test_processes_started_by_torchrun_give_the_numbers_of_world_1():
    names = ["llama-33b", "mqa", "everything"]
    command = [sys.executable, equal_ranks.__file__, "--worlds", "3", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if any(name in line for name in names)]
    assert len(lines) == len(names) * len(ATTENTION) * len(FUSIONS)
    assert "FAILED" not in done.stdout


def test_the_comparison_notices_other_numbers_other_shapes_and_numbers_that_are_none():
    expected = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.0]])]
    assert error(expected, expected) == 0
    assert error([expected[0], torch.tensor([[0.5, 0.1]])], expected) == pytest.approx(0.05)
    assert error([expected[0], torch.tensor([[0.5, math.nan]])], expected) == math.inf
    assert error([expected[0], expected[1].repeat(2, 1)], expected) == math.inf
    assert error(expected[:1], expected) == math.inf


def test_the_cases_hold_what_makes_shards_uneven():
    """Sizes that a world size of the proof does not divide, heads fewer than ranks, and copies of kv heads."""
    configs = {case.name: case.config for case in cases()}
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    for world_size in WORLDS:
        assert all(any(config[size] % world_size for config in configs.values()) for size in sizes)
    assert any(config["hidden_size"] % 3 for config in configs.values())
    assert configs["llama-33b"]["num_attention_heads"] % 8 == 4
    assert any(config["num_attention_heads"] < 8 for config in configs.values())
    grouped = [c for c in configs.values() if c["num_key_value_heads"] < 8 < c["num_attention_heads"]]
    assert any(c["num_attention_heads"] // c["num_key_value_heads"] % 2 for c in grouped)


def test_the_fused_runs_hold_the_fused_collective_where_the_chip_has_it(tmp_path):
    """LinearParallel with lcoc, for ranks that are a power of two, in prefill."""
    (case,) = (case for case in cases() if case.name == "mha")
    path = tmp_path / "mha.yaml"
    path.write_text(case.text)
    for world_size in WORLDS:
        options = Options(device="host", dtype="float32", fusions=FUSIONS["fused"], world_size=world_size)
        operations = {node.op for node in compile_model(str(path), options).lowered["prefill"].nodes}
        assert ("LinearParallel" in operations) == (world_size != 3)
