"""`llmc run --host-compile` gives the answers of the step without it, and says what it does. Needs a C++ compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmc.compiler.cli import main
from llmc.runtime import hostatb
from llmc.runtime.hostatb import inductor

IDS = ["1,5,9,2", "3,3,3,3,3,3,3", "7"]  # answers of equal length, from prompts that are not


def answers(checkpoint: Path, capsys, *words: str) -> tuple[list[list[int]], str]:
    """The tokens, and what was said on stderr."""
    run = ["run", "--model-path", str(checkpoint), "--graph", str(checkpoint / "mine.yaml"), "--ignore-eos", "--json"]
    assert main([*run, *words]) == 0
    said = capsys.readouterr()
    return [o["token_ids"] for o in json.loads(said.out)["outputs"]], said.err


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_answers_are_the_same_with_and_without(checkpoint, capsys, attention):
    words = ["--dtype", "float32", "--attention", attention, "--max-output-length", "9", "--input-ids", *IDS]
    plain, _ = answers(checkpoint, capsys, *words)
    compiled, said = answers(checkpoint, capsys, *words, "--host-compile")
    assert compiled == plain
    assert "parts compiled in" in said


def test_a_refused_compilation_is_told_and_the_answers_come_without(checkpoint, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such header: omp.h")

    monkeypatch.setattr(torch, "compile", refuse)
    words = ["--dtype", "float32", "--max-output-length", "5", "--input-ids", *IDS]
    plain, _ = answers(checkpoint, capsys, *words)
    same, said = answers(checkpoint, capsys, *words, "--host-compile")
    assert same == plain
    assert "runs without it" in " ".join(said.split())
    assert "omp.h" in said


def test_without_a_compiler_one_message_says_what_to_install(checkpoint):
    """In a process of its own: inductor looks for a compiler once."""
    words = ["-m", "llmc.run", "--model-path", str(checkpoint), "--graph", str(checkpoint / "mine.yaml")]
    words += ["--input-ids", "1,2", "--host-compile", "--json"]
    found = {name: value for name, value in os.environ.items() if name not in ("CXX", "PATH")}
    done = subprocess.run(
        [sys.executable, *words], env=found | {"PATH": "/nonexistent"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert "C++ compiler" in problem["message"]
    assert "apt install g++" in str(problem)


def graph(dtype: torch.dtype, rows: int):
    """Norm, product, silu and gate, product, residual and norm: what lies between two calls of attention."""
    torch.manual_seed(3)
    types = hostatb.RmsNormParam.RmsNormType
    first = hostatb.RmsNormParam(layer_type=types.RMS_NORM_NORM)
    second = hostatb.RmsNormParam(layer_type=types.RMS_NORM_PRENORM)
    swiglu = hostatb.ActivationParam(activation_type=hostatb.ActivationType.ACTIVATION_SWIGLU_FORWARD)
    linear = hostatb.LinearParam
    builder = hostatb.GraphBuilder("mlp")
    builder.set_input_output(["ids", "table", "gamma", "gate_up", "down"], ["y", "sum"])
    builder.add_operation(hostatb.Operation(hostatb.GatherParam(axis=0)), ["table", "ids"], ["x"])
    builder.add_operation(hostatb.Operation(first), ["x", "gamma"], ["n"])
    builder.add_operation(hostatb.Operation(linear(has_bias=False)), ["n", "gate_up"], ["g"])
    builder.add_operation(hostatb.Operation(swiglu), ["g"], ["a"])
    builder.add_operation(hostatb.Operation(linear(has_bias=False)), ["a", "down"], ["d"])
    builder.add_operation(hostatb.Operation(second), ["d", "x", "gamma"], ["y", "sum"])
    tensors = [torch.randn(32, 64), torch.rand(64) + 0.5, torch.randn(192, 64) / 8, torch.randn(64, 96) / 8]
    ids = torch.arange(rows, dtype=torch.int32)
    return builder.build(), [ids, *(t.to(dtype) for t in tensors)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_compiled_graph_is_within_rounding_of_the_exact_one(dtype):
    """Of float32: no worse than the lines, plus one unit in the last place for sums in another order."""
    operation, tensors = graph(dtype, rows=3)
    exact = operation.forward([tensors[0], *(t.float() for t in tensors[1:])])
    lines = operation.forward(tensors)
    told: list[str] = []
    operation, tensors = graph(dtype, rows=3)
    operation.core.compiler = inductor.HostCompiler(dict(enumerate(tensors[1:], start=1)), told.append)
    for _ in range(2):  # the first call compiles
        compiled = operation.forward(tensors)
        for ours, line, truth in zip(compiled, lines, exact, strict=True):
            allowed = (line.float() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
            assert (ours.float() - truth).abs().max() <= allowed
            assert ours.dtype == dtype
    assert len(told) == 1


def test_new_ids_and_other_shapes_are_seen_after_compiling():
    operation, tensors = graph(torch.float32, rows=3)
    told: list[str] = []
    operation.core.compiler = inductor.HostCompiler(dict(enumerate(tensors[1:], start=1)), told.append)
    operation.forward(tensors)
    plain, _ = graph(torch.float32, rows=3)
    for ids in ([7, 8, 9], [1, 1, 1], [4, 5], [6]):
        given = [torch.tensor(ids, dtype=torch.int32), *tensors[1:]]
        for ours, lines in zip(operation.forward(given), plain.forward(given), strict=True):
            torch.testing.assert_close(ours, lines)
    assert len(told) == 1  # two and one rows ran as lines
