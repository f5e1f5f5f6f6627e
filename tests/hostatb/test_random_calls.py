"""Random calls of every operation of the table end in a result or an AtbError, at whichever stage.

Names and dtypes are valid, values and shapes are not chosen to fit. Sizes are drawn from few numbers, so that many
calls pass the checks and run. ERROR_INTERNAL_ERROR would be a refusal that nobody foresaw, so it fails too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import CHIPS, DTYPE_BYTES, ENUMS, AtbError, AtbOp, Desc, Field
from llmc.runtime.hostatb.numeric import TORCH_DTYPE, set_format
from llmc.runtime.hostatb.operation import Operation, Single

CALLS = 150  # of each operation and chip
LARGEST = 1 << 20  # elements of the inputs and outputs of a call that is run
INTEGERS = (-(2**63), -1, 0, 0, 1, 1, 1, 2, 2, 3, 4, 8, 16, 64, 1000, 2**31, 2**40, 2**63 - 1)
FLOATS = (0.0, 1.0, 1.0, -1.0, 1e-5, 0.5, 1e38, -1e38, float("inf"), float("nan"))
WORDS = ("", "sum", "max", "prod", "hccl", "lccl", "lcoc", "mc2", "1", "70000", "a b")
SIZES = (1, 2, 3, 4, 8, 16, 16, 32, 32, 64, 128)
ODD_SIZES = (0, 7, 17, 1000, 2**20, 2**40)
COUNTS = (1, 2, 2, 3, 3, 4, 4, 5, 6, 0, 8, 9)


def _value(rng: random.Random, op: AtbOp, f: Field) -> Any:
    enum = op.enums.get(f.kind) or ENUMS.get(f.kind)
    if f.kind == "struct":
        return _values(rng, op, f.fields)
    if f.kind == "bool":
        return rng.random() < 0.5
    if f.kind == "float":
        return rng.choice(FLOATS)
    if f.kind == "str":
        return rng.choice(WORDS)
    if f.kind == "dtype":
        return rng.choice((-1, -1, 0, 1, 1, 2, 3, 9, 12, 27, 27, 99))
    if f.kind in ("ints", "floats"):
        return [
            rng.choice(INTEGERS if rng.random() < 0.1 else (0, 1, 2, 3, 4, 8))
            for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 9)))
        ]
    if enum:
        return rng.choice((*enum.values(), *range(10)))
    return rng.choice(INTEGERS)


def _values(rng: random.Random, op: AtbOp, fields: Sequence[Field]) -> dict[str, Any]:
    """Some fields, the others keep their defaults."""
    share = rng.choice((0.0, 0.2, 0.5))
    return {f.name: _value(rng, op, f) for f in fields if f.kind != "pointer" and rng.random() < share}


def _legal_values(rng: random.Random, op: AtbOp, chip: str) -> dict[str, Any]:
    """Values that creation takes, if twenty draws find any. A rank alone needs no communicator."""
    values: dict[str, Any] = {}
    for _ in range(20):
        values = _values(rng, op, op.fields)
        names = {f.name for f in op.fields}
        values |= {"rankSize": 1, "rank": 0, "rankRoot": 0} if "rankSize" in names and rng.random() < 0.8 else {}
        if "headNum" in names and rng.random() < 0.8:
            values |= {"headNum": rng.choice((2, 4)), "kvHeadNum": rng.choice((0, 1, 2))}
        try:
            op.create(op.param(values), chip)
        except AtbError:
            continue
        return values
    return values


def _descs(rng: random.Random, op: AtbOp, values: dict[str, Any], chip: str) -> list[Desc]:
    """Dtypes and formats of one row of the table, mostly; shapes from a few sizes that the tensors share."""
    try:
        param = op.param(values)
        op.create(param, chip)
        rows, count = op.rows(param, chip), op.arity(param)[0]
    except AtbError:
        return []
    row = rng.choice(list(rows)) if rows else ("float16",) * count
    sizes = [rng.choice(SIZES) for _ in range(2)]
    rank = rng.choice(COUNTS)
    shared = tuple(rng.choice(sizes) for _ in range(rank))
    descs = []
    for word in row[:count]:
        dtype, _, format = word.partition(":")
        own = tuple(rng.choice(sizes) for _ in range(rng.choice(COUNTS)))
        shape = list(shared if rng.random() < 0.6 else own)
        if shape and rng.random() < 0.05:
            shape[rng.randrange(len(shape))] = rng.choice(ODD_SIZES)
        if rng.random() < 0.03:
            dtype = rng.choice(list(DTYPE_BYTES))
        descs.append(Desc(dtype=dtype, format=format or "nd", shape=tuple(shape)))
    return descs[: -1 if rng.random() < 0.02 else None]


def _tensor(rng: random.Random, desc: Desc) -> torch.Tensor:
    dtype = TORCH_DTYPE[desc.dtype]
    if dtype.is_floating_point or dtype.is_complex:
        tensor = torch.rand(desc.shape).to(dtype)
    else:
        tensor = torch.randint(0, 2 if dtype == torch.bool else 5, desc.shape).to(dtype)
        if tensor.numel() and dtype == torch.int32 and rng.random() < 0.2:
            tensor.view(-1)[0] = rng.choice((-1, 100, 2**31 - 1, -(2**31)))
    return set_format(tensor, desc.format)


def _call(rng: random.Random, op: AtbOp, values: dict[str, Any], descs: list[Desc], chip: str) -> None:
    param = op.param(values)
    op.create(param, chip)
    outs = op.infer(param, descs, chip)
    op.setup(param, descs, outs, chip)
    if sum(desc.elements for desc in (*descs, *outs)) <= LARGEST:
        Operation.of(Single(op, param, chip)).forward([_tensor(rng, desc) for desc in descs])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPS)
def test_a_random_call_gives_a_result_or_an_atb_error(name: str, chip: str) -> None:
    rng = random.Random(f"{name} {chip}")
    op = OPS[name]
    for _ in range(CALLS):
        values = _legal_values(rng, op, chip)
        descs = _descs(rng, op, values, chip)
        shown = f"{values}, {'; '.join(map(str, descs))}"
        try:
            _call(rng, op, values, descs, chip)
        except AtbError as error:
            if not error.stage or error.code == "ERROR_INTERNAL_ERROR":
                pytest.fail(f"{shown}\n{error} from {error.__cause__!r}")
        except Exception as error:
            pytest.fail(f"{shown}\n{type(error).__name__}: {error}")
