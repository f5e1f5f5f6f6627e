"""Calls that the library creates and infers but whose kernels refuse at Setup, next to the nearest ones that pass.

Oracle: the checks of the kernels and their tilings (atb-operations.md; ERROR_RT_FAIL, or an error that is only logged).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.compiler.atb import OPS, AtbError
from llmc.compiler.atb.core import Desc
from llmc.runtime.hostatb.operation import Operation, Single

A2, DUO = "Ascend910B", "Ascend310P"
RT_FAIL, LOGGED, PARAM = "ERROR_RT_FAIL", "NO_ERROR_BUT_LOGGED", "ERROR_INVALID_PARAM"
INI_MATCH = "ERROR_INVALID_TENSOR_INI_MATCH"
CAST, QUANT_PER_CHANNEL, DYNAMIC_QUANT = 1, 17, 19
NORM, PRENORM, POSTNORM = 1, 2, 3


def desc(words: str) -> Desc:
    """ "float16 2 32"."""
    dtype, *shape = words.split()
    return Desc(dtype=dtype, shape=tuple(map(int, shape)))


def refusal(op: str, values: dict[str, Any], ins: list[str], chip: str) -> tuple[str, str] | None:
    entry, descs = OPS[op], [desc(words) for words in ins]
    try:
        param = entry.param(values)
        entry.create(param, chip)
        entry.setup(param, descs, entry.infer(param, descs, chip), chip)
    except AtbError as error:
        return error.stage, error.code
    return None


def scaled(scale: str, offset: str, x: str = "float16 4 64") -> list[str]:
    return [x, f"float16 {scale}", f"int8 {offset}"]


CHECKS = [
    *(
        (op_chip, "Linear", {"transposeA": a, "transposeB": b, "hasBias": False}, ins, expected)
        for op_chip, a, b, ins, expected in (
            (A2, False, True, ["float32 4 16", "float32 8 16"], None),
            (A2, False, False, ["float32 4 16", "float32 16 8"], ("setup", PARAM)),
            (A2, True, True, ["float32 16 4", "float32 8 16"], ("setup", PARAM)),
            (A2, False, True, ["float32 2 4 16", "float32 8 16"], ("setup", RT_FAIL)),
            ("host", False, False, ["float32 4 16", "float32 16 8"], None),  # the host's own float32
        )
    ),
    *(
        (chip, "Elewise", {"elewiseType": QUANT_PER_CHANNEL}, ins, expected)
        for chip, ins, expected in (
            (A2, scaled("64", "64"), None),
            (A2, scaled("1", "1"), None),
            (A2, scaled("64", "0"), None),  # no offset
            (A2, scaled("4 64", "4 64"), None),
            (A2, scaled("64", "1"), ("setup", RT_FAIL)),
            (A2, scaled("32", "32"), ("setup", RT_FAIL)),
            (A2, scaled("4 1", "4 1"), ("setup", RT_FAIL)),
            (A2, scaled("48", "48", "float16 4 48"), None),
            (DUO, scaled("48", "48", "float16 4 48"), ("setup", LOGGED)),
            (DUO, scaled("1", "1", "float16 3 7"), ("setup", LOGGED)),
            (DUO, scaled("64", "64"), None),
        )
    ),
    (A2, "Elewise", {"elewiseType": DYNAMIC_QUANT}, ["float16 4 48"], None),
    (DUO, "Elewise", {"elewiseType": DYNAMIC_QUANT}, ["float16 4 48"], ("setup", LOGGED)),
    (DUO, "Elewise", {"elewiseType": DYNAMIC_QUANT}, ["float16 4 64"], None),
    (A2, "Elewise", {"elewiseType": CAST}, ["float16 4"], None),
    (A2, "Elewise", {"elewiseType": CAST}, ["bfloat16 4"], ("setup", RT_FAIL)),
    (A2, "Elewise", {"elewiseType": CAST, "outTensorType": 0}, ["bfloat16 4"], None),
    *(
        (chip, "RmsNorm", {"layerType": NORM, "normParam": {"epsilon": epsilon}}, ["float16 4 32", "float16 32"],
         expected)
        for chip in (A2, DUO)
        for epsilon, expected in ((1e-5, None), (-1e-5, ("setup", LOGGED)))
    ),
    (DUO, "RmsNorm", {"layerType": PRENORM, "preNormParam": {"epsilon": -1.0}},
     ["float16 4 32", "float16 4 32", "float16 32"], ("setup", LOGGED)),
    # Either struct's hasBias adds an input to both layer types, but only their own adds it to the dtypes allowed.
    *(
        (A2, "RmsNorm", {"layerType": layer, struct: {"hasBias": True}},
         ["float16 4 32", *bias, "float16 4 32", "float16 32"], expected)
        for layer, struct, bias, expected in (
            (PRENORM, "preNormParam", ["float16 32"], None),
            (POSTNORM, "postNormParam", ["float16 32"], None),
            (PRENORM, "preNormParam", [], ("infer", "ERROR_INVALID_IN_TENSOR_NUM")),
            (PRENORM, "postNormParam", [], ("infer", "ERROR_INVALID_IN_TENSOR_NUM")),
            (PRENORM, "postNormParam", ["float16 32"], ("infer", INI_MATCH)),
            (POSTNORM, "preNormParam", ["float16 32"], ("infer", INI_MATCH)),
        )
    ),
    (A2, "Repeat", {"multiples": [2**62, 4]}, ["float16 2 2"], ("infer", PARAM)),
    (A2, "Repeat", {"multiples": [2, 4]}, ["float16 2 2"], None),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "op", "values", "ins", "expected"), CHECKS, ids=str)
def test_setup_refuses_what_the_kernels_refuse(
    chip: str, op: str, values: dict[str, Any], ins: list[str], expected: tuple[str, str] | None
) -> None:
    assert refusal(op, values, ins, chip) == expected


@pytest.mark.parametrize("multiples", [[2**20, 2**20], [2**40, 1], [2**62, 1]], ids=str)
def test_an_output_larger_than_the_memory_is_refused_and_not_computed(multiples: list[int]) -> None:
    """Unlike on the device, where 2 TiB may be someone's, on the host the attempt would end the process."""
    repeat = Operation.of(Single(OPS["Repeat"], OPS["Repeat"].param({"multiples": multiples}), A2))
    with pytest.raises(AtbError) as caught:
        repeat.forward([torch.ones(2, 2, dtype=torch.float16)])
    assert caught.value.code in ("ERROR_OUT_OF_DEVICE_MEMORY", PARAM, "ERROR_INVALID_TENSOR_SIZE")


@pytest.mark.parametrize(
    ("op", "values"),
    [
        ("Linear", {"hasBias": 3}),
        ("Split", {"splitSizes": 4}),
        ("RmsNorm", {"layerType": 1, "normParam": {"epsilon": "small"}}),
        ("Repeat", {"multiples": [1.5]}),
        ("Gather", {"axis": 2**70}),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_an_atb_error_at_creation(op: str, values: dict[str, Any]) -> None:
    with pytest.raises(AtbError) as caught:
        OPS[op].create(OPS[op].param(values), A2)
    assert caught.value.stage == "create"
