"""Whatever is wrong with the tensors or parameters of a vendor case, the table refuses it with AtbError alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vendor_cases import CASES, CaseRow, known_param, read_table

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import CHIPS, AtbError, Desc

FILES = sorted(CASES.rglob("*.csv"))
DTYPES = ("float16", "bfloat16", "float32", "int8", "int32", "int64", "uint32", "bool", "undefined")
SIZES = (0, 1, 2, 7, 16, 17, 33, 4096, 2**20)


def _mutated_desc(rng: random.Random, desc: Desc) -> Desc:
    shape = desc.shape
    spot = rng.randrange(len(shape)) if shape else 0
    return rng.choice(
        (
            replace(desc, dtype=rng.choice(DTYPES)),
            replace(desc, format=rng.choice(("nd", "nz", "nhwc"))),
            desc.with_shape(shape[:-1]),
            desc.with_shape((*shape, rng.choice(SIZES))),
            desc.with_shape((1, *shape)),
            desc.with_shape(()),
            desc.with_shape((*shape[:spot], rng.choice(SIZES), *shape[spot + 1 :])),
        )
    )


def _mutated_param(rng: random.Random, param: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(param)
    if not changed:
        return changed
    name = rng.choice(list(changed))
    value = changed[name]
    if isinstance(value, dict):
        changed[name] = _mutated_param(rng, value)
    elif isinstance(value, bool):
        changed[name] = not value
    elif isinstance(value, (int, float)):
        changed[name] = rng.choice((-1, 0, 1, 2, 3, 5, 19, 100))
    elif isinstance(value, list):
        changed[name] = rng.choice(([], [*value, 1], value[:-1], [-1], [0], [100]))
    return changed


def _refusal(rng: random.Random, row: CaseRow, chip: str) -> AtbError | None:
    op, ins, outs = OPS[row.op], list(row.ins), list(row.outs or ())
    values = known_param(op.fields, row.param)
    for _ in range(rng.choice((1, 2))):
        if ins and rng.random() < 0.7:
            spot = rng.randrange(len(ins))
            ins[spot] = _mutated_desc(rng, ins[spot])
        elif outs and rng.random() < 0.4:
            spot = rng.randrange(len(outs))
            outs[spot] = _mutated_desc(rng, outs[spot])
        elif ins and rng.random() < 0.1:
            ins.pop()
        else:
            values = known_param(op.fields, _mutated_param(rng, values))
    try:
        param = op.param(values)
        op.create(param, chip)
        op.infer(param, ins, chip)
        op.setup(param, ins, outs, chip)
    except AtbError as error:
        return error
    return None


@pytest.mark.skipif(not FILES, reason=f"no case tables in {CASES}; set LLMC_ATB_CASES")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CASES).with_suffix("")))
def test_mutated_cases_are_refused_cleanly(path: Path) -> None:
    rng = random.Random(path.stem)
    rows = [row for row in read_table(path).rows if row.op in OPS]
    refusals = [error for row in rows for chip in CHIPS for _ in range(3) if (error := _refusal(rng, row, chip))]
    assert refusals or not rows
    assert all(error.code and error.stage and error.operation and error.message for error in refusals)
