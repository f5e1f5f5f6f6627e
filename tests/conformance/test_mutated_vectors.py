"""Whatever is wrong with a call, the answer is a result or an AtbError: no other exception, hang or full memory.

The vendor's test vectors are calls that reach every kernel. Each is changed in one to three places (a tensor's shape,
dtype, format or values, a parameter, a missing input) and run. ERROR_INTERNAL_ERROR would be a refusal that nobody
foresaw, so it fails too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_golden import CHIPS, FILES, stored_input
from torch import Tensor
from vendor_cases import GOLDEN, known_param

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import AtbError, AtbOp, Field
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.hostatb.numeric import format_of, set_format
from llmc.runtime.hostatb.operation import Operation, Single

CALLS = 2  # changed calls of each vector
LARGEST = 1 << 20  # elements of a tensor that a change makes
SIZES = (0, 1, 2, 3, 16, 17, 32, 64, 128)
NUMBERS = (-1, 0, 1, 2, 3, 5, 16, 100, 2**31, 2**40)
WORDS = ("sum", "max", "prod", "lccl", "hccl", "lcoc", "mc2", "")
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64, torch.bool, torch.uint32,
)  # fmt: skip
VALUES = (-1, 0, 1, 7, 100, 1000, -(2**31), 2**31 - 1)


def _changed_tensor(rng: random.Random, tensor: Tensor) -> Tensor:
    format = format_of(tensor)
    kind = rng.choice(("dtype", "cut", "size", "size", "rank", "merge", "format", "value", "value", "turn", "empty"))
    if kind == "dtype":
        tensor = tensor.to(rng.choice(DTYPES))
    elif kind == "format":
        format = "nz" if format == "nd" else "nd"
    elif kind == "rank":
        tensor = tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    elif kind == "empty":
        tensor = tensor.new_zeros(0)
    elif kind == "value" and tensor.dtype in (torch.int32, torch.uint32) and tensor.numel():
        tensor = tensor.clone()
        tensor.view(torch.int32).view(-1)[rng.randrange(tensor.numel())] = rng.choice(VALUES)
    elif kind == "merge" and tensor.dim() > 1:
        tensor = tensor.flatten(0, 1)
    elif kind == "turn" and tensor.dim() > 1:
        tensor = tensor.transpose(-1, -2).contiguous()
    elif kind == "cut" and tensor.numel():
        dim = rng.randrange(tensor.dim())
        tensor = tensor.narrow(dim, 0, rng.randrange(1, tensor.shape[dim] + 1)).contiguous()
    elif kind == "size" and tensor.dim():
        shape = list(tensor.shape)
        shape[rng.randrange(tensor.dim())] = rng.choice(SIZES)
        tensor = tensor.new_zeros(shape) if torch.Size(shape).numel() <= LARGEST else tensor
    return set_format(tensor.clone(), format)


def _all_values(op: AtbOp, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters with every default written out, so that each can be changed."""

    def filled(fields: tuple[Field, ...], values: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for f in fields:
            if f.kind == "struct":
                found[f.name] = filled(f.fields, values.get(f.name, {}))
            elif f.kind != "pointer":
                default = list(f.default) if isinstance(f.default, tuple) else f.default
                found[f.name] = values.get(f.name, default)
        return found

    return filled(op.fields, given)


def _changed_values(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    if not values:
        return values
    name = rng.choice(list(values))
    value = values[name]
    if isinstance(value, dict):
        changed: Any = _changed_values(rng, value)
    elif isinstance(value, bool):
        changed = not value
    elif isinstance(value, str):
        changed = rng.choice(WORDS)
    elif isinstance(value, list):
        changed = rng.choice(([], [*value, 1], value[:-1], [-1], [0], [100], [2**40], [rng.choice(SIZES)] * len(value)))
    else:
        changed = rng.choice(NUMBERS)
    return {**values, name: changed}


def refusal(call: Callable[[], object]) -> str | None:
    """What is wrong with how the call ends; None for a result or an AtbError that someone foresaw."""
    try:
        call()
    except AtbError as error:
        foreseen = error.stage and error.code != "ERROR_INTERNAL_ERROR"
        return None if foreseen else f"{error} from {error.__cause__!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _forward(op: AtbOp, values: dict[str, Any], chip: str, inputs: list[Tensor]) -> None:
    """All ranks as threads where the operation has several."""
    ranks = values.get("rankSize", 1)

    def run(rank: int) -> list[Tensor]:
        own = {**values, "rank": rank} if ranks > 1 else values
        copies = [set_format(x.clone(), format_of(x)) for x in inputs]
        return Operation.of(Single(op, op.param(own), chip)).forward(copies)

    if 1 < ranks <= 4:
        run_ranks([lambda rank=rank: run(rank) for rank in range(ranks)])
    else:
        run(0)


def _changed_calls(path: Path) -> Iterator[tuple[str, AtbOp, dict[str, Any], str, list[Tensor]]]:
    rng = random.Random(path.stem)
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        for line in path.read_text(encoding="utf-8").splitlines():
            case = json.loads(line)
            op = OPS.get(case["op"].removesuffix("Operation"))
            if op is None:
                continue
            given = _all_values(op, known_param(op.fields, case["param"]))
            stored = [
                stored_input(file, spec, spec.get("tensor") or spec["tensors_per_rank"][0]) for spec in case["inputs"]
            ]
            for _ in range(CALLS):
                values, inputs, chip = given, list(stored), CHIPS[rng.choice(case["soc"])]
                for _ in range(rng.choice((1, 1, 2, 3))):
                    what = rng.random()
                    if what < 0.6 and inputs:
                        spot = rng.randrange(len(inputs))
                        inputs[spot] = _changed_tensor(rng, inputs[spot])
                    elif what < 0.95:
                        values = _changed_values(rng, values)
                    else:
                        inputs = inputs[:-1]
                yield case["id"], op, values, chip, inputs


@pytest.mark.skipif(not FILES, reason=f"no test vectors in {GOLDEN}; set LLMC_ATB_GOLDEN")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_changed_call_gives_a_result_or_an_atb_error(path: Path) -> None:
    for name, op, values, chip, inputs in _changed_calls(path):
        shown = f"{name} on {chip}: {values}, {[(list(x.shape), x.dtype, format_of(x)) for x in inputs]}"
        assert (said := refusal(lambda: _forward(op, values, chip, inputs))) is None, f"{shown}\n{said}"  # noqa: B023
