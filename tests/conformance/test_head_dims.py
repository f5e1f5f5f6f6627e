"""Head sizes that the vendor's library takes and refuses, one operation at a time: the table says the same.

Oracle: head-dims.json of the second collection of layer graphs (create, InferShape and Setup by the library): 8 query
heads on 2 kv heads, every head size at every block size.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from vendor_cases import LAYERS2

from llmc.compiler.atb import OPS, AtbError
from llmc.compiler.atb.core import Desc

PATH = LAYERS2 / "head-dims.json"
ROWS: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["rows"] if PATH.exists() else []
CHIPS = {"910B": "Ascend910B", "310P": "Ascend310P"}
HEADS, KV_HEADS, TOKENS, CONTEXT, BLOCKS = 8, 2, 16, 256, 16
PA_ENCODER, PREFIX_ENCODER, ENCODER, DECODER = 3, 4, 1, 2


def _id(row: dict[str, Any]) -> str:
    form = row.get("form") or row.get("rotaryCoeff") or row.get("block_size", "")
    return f"{row['chip']} {row['dtype']} {row['op']} {form}"


def _nz(rows: int, columns: int, leading: int = 1) -> tuple[int, int, int, int]:
    return (leading, -(-columns // 16), -(-rows // 16) * 16, 16)


def _paged(row: dict[str, Any], size: int) -> tuple[dict[str, Any], list[Desc]]:
    """TOKENS decode rows; SPEC: as many sequences of one new token, with a mask row each."""
    old, block, x = row["chip"] == "310P", row["block_size"], row["dtype"]
    cache = (BLOCKS, KV_HEADS * size // 16, block, 16) if old else (BLOCKS, block, KV_HEADS, size)
    quantised = row["op"].endswith("int8 cache")
    dtype, layout = "int8" if quantised else x, "nz" if old else "nd"
    caches = [Desc(dtype=dtype, format=layout, shape=cache)] * 2
    lengths = Desc(dtype="int32", shape=(TOKENS,))
    ins = [Desc(dtype=x, shape=(TOKENS, HEADS, size)), *caches, Desc(dtype="int32", shape=(TOKENS, 16)), lengths]
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": 1.0}
    if row["op"].endswith("SPEC"):
        mask = _nz(TOKENS, CONTEXT) if old else (TOKENS, CONTEXT)
        return values | {"calcType": 1, "maskType": 3}, [*ins, Desc(dtype=x, format=layout, shape=mask), lengths]
    if quantised:
        scale = Desc(dtype="float32", shape=(KV_HEADS * size,))
        return values | {"quantType": 1}, [*ins, scale, scale]
    return values, ins


def _reshape_and_cache(row: dict[str, Any], size: int) -> tuple[dict[str, Any], list[Desc]]:
    new = Desc(dtype=row["dtype"], shape=(TOKENS, KV_HEADS, size))
    caches = _paged(row | {"op": "PagedAttention"}, size)[1][1:3]
    return {}, [new, new, *caches, Desc(dtype="int32", shape=(TOKENS,))]


def _rope(row: dict[str, Any], size: int) -> tuple[dict[str, Any], list[Desc]]:
    coeff = size if row["rotaryCoeff"] == "head_dim" else int(row["rotaryCoeff"])
    shapes = [(TOKENS, HEADS * size), (TOKENS, KV_HEADS * size), (TOKENS, size), (TOKENS, size)]
    ins = [Desc(dtype=row["dtype"], shape=shape) for shape in shapes]
    return {"rotaryCoeff": coeff}, [*ins, Desc(dtype="int32", shape=(1,))]


def _self_attention(row: dict[str, Any], size: int) -> tuple[dict[str, Any], list[Desc]]:
    old, x, kind = row["chip"] == "310P", row["dtype"], row["op"].partition(" ")[2]
    layout, one = "nz" if old else "nd", Desc(dtype="int32", shape=(1,))
    values: dict[str, Any] = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": 1.0}
    q, k = (Desc(dtype=x, shape=(TOKENS, heads, size)) for heads in (HEADS, KV_HEADS))
    if kind == "PA_ENCODER":
        mask = [Desc(dtype=x, format=layout, shape=_nz(128, 128) if old else (128, 128))]
        masked = row["form"] != "no mask"
        values |= {"calcType": PA_ENCODER, **({"maskType": 3, "isTriuMask": 1} if masked else {})}
        return values, [q, k, k, *(mask if masked else []), one]
    if kind == "PREFIX_ENCODER":
        cache = Desc(dtype=x, shape=(BLOCKS, 128, KV_HEADS, size))
        values |= {"calcType": PREFIX_ENCODER, "kernelType": 1, "isTriuMask": 1, "maskType": 3}
        ins = [q, cache, cache, Desc(dtype="int32", shape=(1, 16)), Desc(dtype=x, shape=(128, 128)), one, one]
        return values, ins
    tokens = TOKENS if kind == "flash encoder" else 1
    q, k = (Desc(dtype=x, shape=(tokens, heads * size)) for heads in (HEADS, KV_HEADS))
    shape = (1, 1, KV_HEADS * size // 16, CONTEXT, 16) if old else (1, 1, CONTEXT, KV_HEADS * size)
    cache = Desc(dtype=x, format=layout, shape=shape)
    return values | {"calcType": ENCODER if tokens > 1 else DECODER}, [q, k, k, cache, cache, one, one, one]


def _verdict(row: dict[str, Any], size: int) -> str:
    """ "", or stage and code."""
    name = row["op"].partition(" ")[0]
    makers = {"Rope": _rope, "ReshapeAndCache": _reshape_and_cache, "SelfAttention": _self_attention}
    values, ins = makers.get(name, _paged)(row, size)
    op, chip = OPS[name], CHIPS[row["chip"]]
    try:
        param = op.param(values)
        op.create(param, chip)
        op.setup(param, ins, op.infer(param, ins, chip), chip)
    except AtbError as error:
        return f"{error.stage} {error.code}"
    return ""


@pytest.mark.skipif(not ROWS, reason=f"no {PATH}; set LLMC_ATB_LAYERS2")
@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_head_sizes_are_taken_and_refused_as_by_the_library(row: dict[str, Any]) -> None:
    theirs = dict.fromkeys(row["accepted"], "")
    for refused in row["refused"]:
        theirs |= dict.fromkeys(refused["head_dims"], " ".join(refused["why"].split()[:2]))
    assert theirs
    assert {size: _verdict(row, size) for size in theirs} == theirs
