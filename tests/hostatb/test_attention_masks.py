"""Every mask form that was tried on the real library (masks.json of both collections) is accepted or refused as there.

First collection: the sizes of the recorded layers are replaced by small ones, five heads of 16, with the recorded
lengths and masks. Second collection (several new tokens a sequence over a cache): the recorded sizes, as descs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.compiler.atb import OPS, paged_attention, self_attention
from llmc.compiler.atb.core import AtbError, AtbOp, Desc, at_stage
from llmc.runtime.hostatb.numeric import set_format
from llmc.runtime.hostatb.operation import Operation, Single

LAYERS = Path(os.environ.get("LLMC_ATB_LAYERS", Path(__file__).parents[3] / "shared" / "data" / "atb-layers"))
LAYERS2 = Path(os.environ.get("LLMC_ATB_LAYERS2", Path(__file__).parents[3] / "shared" / "data" / "atb-layers-2"))
MASKS, MASKS2 = LAYERS / "masks.json", LAYERS2 / "masks.json"
CHIPS = {"910B": "Ascend910B", "310P": "Ascend310P"}
HEADS, SIZE, ROWS, BLOCK = 5, 16, 2112, 128
CONTEXTS, PROMPTS = [5, 130, 257], [5, 13, 19]
TYPES = {
    "SelfAttention": ["UNDEFINED", "NORM", "ALIBI", "NORM_COMPRESS", "ALIBI_COMPRESS", "ALIBI_COMPRESS_SQRT",
                      "ALIBI_COMPRESS_LEFT_ALIGN", "SLIDING_WINDOW_NORM", "SLIDING_WINDOW_COMPRESS"],
    "PagedAttention": ["UNDEFINED", "NORM", "ALIBI", "SPEC"],
}  # fmt: skip


def _rows() -> list[dict[str, Any]]:
    if not MASKS.exists():
        return []
    recorded = json.loads(MASKS.read_text(encoding="utf-8"))
    return [row for key, rows in recorded.items() if key != "about" for row in rows]


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _mask(row: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    spec = row["mask"]
    return [] if spec is None else [set_format(torch.zeros(spec["shape"], dtype=dtype), spec["format"])]


def _call(row: Mapping[str, Any], chip: str) -> tuple[str, dict[str, Any], list[Tensor]]:
    dtype = getattr(torch, row["dtype"])
    nz = chip == "Ascend310P"
    prompts = row.get("sequences", PROMPTS)
    lengths = CONTEXTS if row["phase"] == "decode" else prompts
    new = [1] * len(lengths) if row["phase"] == "decode" else lengths
    batch, hidden = len(lengths), HEADS * SIZE
    op = "PagedAttention" if (row["attention"], row["phase"]) == ("paged", "decode") else "SelfAttention"
    param: dict[str, Any] = {"headNum": HEADS, "kvHeadNum": HEADS, "maskType": TYPES[op].index(row["mask_type"])}
    if row["mask_type"].startswith("SLIDING"):
        param["windowSize"] = 4096
    param |= {
        name: row[key] for key, name in (("is_triu_mask", "isTriuMask"), ("kernel_type", "kernelType")) if key in row
    }
    mask = _mask(row, dtype)
    query = torch.zeros(sum(new), HEADS, SIZE, dtype=dtype)
    if op == "PagedAttention":
        shape = (9, hidden // 16, BLOCK, 16) if nz else (9, BLOCK, HEADS, SIZE)
        caches = [set_format(torch.zeros(shape, dtype=dtype), "nz" if nz else "nd") for _ in range(2)]
        tables = torch.arange(9, dtype=torch.int32).view(3, 3)
        return op, param, [query, *caches, tables, _ints(lengths), *mask]
    if row["attention"] == "paged":
        slopes = [torch.zeros(HEADS, dtype=torch.float16 if nz else torch.float32)]
        slopes = slopes if row["mask_type"].startswith("ALIBI_COMPRESS") else []
        return op, param | {"calcType": 3}, [query, query, query, *mask, _ints(lengths), *slopes]
    flash_shape = (1, batch, hidden // 16, ROWS, 16) if nz else (1, batch, ROWS, hidden)
    caches = [set_format(torch.zeros(flash_shape, dtype=dtype), "nz" if nz else "nd") for _ in range(2)]
    param["calcType"] = 2 if row["phase"] == "decode" else 1
    flat = query.flatten(1)
    return op, param, [flat, flat.clone(), flat.clone(), *caches, *mask, _ints(lengths), _ints(new), _ints([0])]


# Forms over a cache: PagedAttention calcType SPEC, SelfAttention calcType PREFIX_ENCODER.
FORM_DIMS = {"llama2-7b": (32, 32, 128), "smollm2-135m": (9, 3, 64)}
FORM_TYPES = {
    "PagedAttention": ["UNDEFINED", "NORM", "ALIBI", "SPEC", "MASK_FREE", "NORM_COMPRESS"],
    "SelfAttention": [*TYPES["SelfAttention"], "CAUSAL_MASK"],
}  # fmt: skip


def _lengths(recorded: list[int] | str) -> list[int]:
    """[5, 130] or "64 x 40"."""
    if isinstance(recorded, list):
        return recorded
    count, length = (int(word) for word in recorded.split(" x "))
    return [length] * count


def _form(row: Mapping[str, Any], chip: str) -> tuple[AtbOp, dict[str, Any], list[Desc]]:
    """The operation, its parameters and the descs of its inputs."""
    op = OPS[row["op"].partition(" ")[0]]
    dims, dtype = row["dims"], row["dtype"]
    heads, kv_heads, size = FORM_DIMS[dims] if isinstance(dims, str) else (dims[k] for k in DIM_NAMES)
    values: dict[str, Any] = {"headNum": heads, "kvHeadNum": kv_heads, "qkScale": size**-0.5}
    values["maskType"] = FORM_TYPES[op.name].index(row["mask_type"])
    if op.name == "SelfAttention":
        values |= {"calcType": 4, "isTriuMask": 1, "kernelType": 1}
    else:
        values["calcType"] = 1
    values |= row.get("param", {})
    contexts, tokens, block = _lengths(row["context"]), sum(_lengths(row["new_tokens"])), row["block_size"]
    batch, table = len(contexts), -(-max(contexts) // block)
    cached = "int8" if row.get("int8_cache") else dtype
    if cached == "int8" and op.name == "PagedAttention":
        values["quantType"] = 1
    cache = Desc(dtype=cached, shape=(batch * table, block, kv_heads, size))
    if row.get("caches_3d"):
        cache = cache.with_shape((batch * table, block, kv_heads * size))
    if chip == "Ascend310P":
        cache = Desc(dtype=cached, format="nz", shape=(batch * table, kv_heads * size // 16, block, 16))
    integers = Desc(dtype=row.get("lengths_dtype", "int32"), shape=(batch,))
    mask = (
        [] if row["mask"] is None else [Desc(**{"dtype": dtype, **row["mask"], "shape": tuple(row["mask"]["shape"])})]
    )
    query = Desc(dtype=dtype, shape=(tokens, heads, size))
    tables = Desc(dtype=integers.dtype, shape=(batch, table))
    if op.name == "SelfAttention":
        slopes = [Desc(dtype="float32", shape=(heads,))] if row["mask_type"].startswith("ALIBI_COMPRESS") else []
        return op, values, [query, cache, cache, tables, *mask, integers, integers, *slopes]
    spec = [integers] if values["calcType"] == 1 else []
    return op, values, [query, cache, cache, tables, integers, *mask, *spec]


DIM_NAMES = ("heads", "kv_heads", "head_dim")


def _form_verdict(row: Mapping[str, Any]) -> str:
    chip = CHIPS[row["chip"]]
    op, values, ins = _form(row, chip)
    contexts, q_lens = _lengths(row["context"]), _lengths(row["new_tokens"])
    try:
        param = op.param(values)
        op.create(param, chip)
        outs = op.infer(param, ins, chip)
        op.setup(param, ins, outs, chip)
        if op.name == "PagedAttention":
            names = paged_attention.inputs(param)
            q_lens = q_lens if "qSeqLen" in names else [1] * len(contexts)
            with at_stage("setup", op.name):
                paged_attention.check_lengths(param, dict(zip(names, ins, strict=True)), contexts, q_lens, chip)
        else:
            with at_stage("setup", op.name):
                self_attention.check_prefix_lengths(q_lens, contexts, chip)
    except AtbError as error:
        return f"{error.stage} {error.code}"
    return "accepted"


@pytest.mark.skipif(not MASKS2.exists(), reason=f"no {MASKS2}; set LLMC_ATB_LAYERS2")
@pytest.mark.parametrize("chip", ["910B", "310P"])
@pytest.mark.parametrize("op", ["PagedAttention", "SelfAttention"])
def test_forms_over_a_cache_are_accepted_and_refused_as_by_the_library(chip: str, op: str) -> None:
    recorded = json.loads(MASKS2.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in recorded if row["chip"] == chip and row["op"].startswith(op)]
    assert rows
    wrong = []
    for row in rows:
        expected = "accepted" if row["accepted"] else f"{row['stage']} {row['code']}"
        if (ours := _form_verdict(row)) != expected:
            wrong.append(f"ours {ours}, the library {expected}: {row}")
    assert not wrong, f"{len(wrong)} of {len(rows)}:\n" + "\n".join(wrong[:20])


def _verdict(row: Mapping[str, Any]) -> str:
    chip = CHIPS[row["chip"]]
    op, param, tensors = _call(row, chip)
    try:
        Operation.of(Single(OPS[op], OPS[op].param(param), chip)).forward(tensors)
    except AtbError as error:
        return f"{error.stage} {error.code}"
    return "accepted"


@pytest.mark.skipif(not MASKS.exists(), reason=f"no {MASKS}; set LLMC_ATB_LAYERS")
@pytest.mark.parametrize("chip", ["910B", "310P"])
@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_masks_are_accepted_and_refused_as_by_the_library(chip: str, attention: str) -> None:
    rows = [row for row in _rows() if (row["chip"], row["attention"]) == (chip, attention)]
    assert rows
    wrong = []
    for row in rows:
        expected = "accepted" if row["accepted"] else f"{row['stage']} {row['code']}"
        if (ours := _verdict(row)) != expected:
            wrong.append(f"ours {ours}, the library {expected}: { {k: v for k, v in row.items() if k != 'log'} }")
    assert not wrong, "\n".join(wrong)


def test_310p_prefill_refuses_merged_heads_at_setup() -> None:
    """atb-layers/refusals.json: 310p-paged-prefill-fp16-smollm2-135m-attention-2d."""
    flat = torch.zeros(4, HEADS * SIZE).half()
    param = OPS["SelfAttention"].param({"headNum": HEADS, "kvHeadNum": HEADS, "calcType": 3})
    operation = Operation.of(Single(OPS["SelfAttention"], param, "Ascend310P"))
    with pytest.raises(AtbError) as caught:
        operation.forward([flat, flat, flat, _ints([4])])
    assert (caught.value.stage, caught.value.code) == ("setup", "ERROR_INVALID_PARAM")


@pytest.mark.parametrize(
    ("width", "verdict"), [(16, ("setup", "ERROR_RT_FAIL")), (32, ("infer", "ERROR_INVALID_TENSOR_DIM"))]
)
def test_310p_has_no_int8_cache(width: int, verdict: tuple[str, str]) -> None:
    """atb-layers/refusals.json: 310p-paged-prefill-fp16-llama2-7b-kv-int8 and -kv-int8-last-dim-32."""
    new = torch.zeros(4, 2, 32, dtype=torch.int8)
    caches = [set_format(torch.zeros(2, 64 // width, 16, width, dtype=torch.int8), "nz") for _ in range(2)]
    op = OPS["ReshapeAndCache"]
    with pytest.raises(AtbError) as caught:
        Operation.of(Single(op, op.param(), "Ascend310P")).forward([new, new, *caches, _ints([0, 1, 2, 3])])
    assert (caught.value.stage, caught.value.code) == verdict
