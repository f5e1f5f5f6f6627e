"""Gating, the expert sort of mixture-of-experts layers (atb-operations.md 3.16).

In: parameters and input descs. Out: output descs, or the error that libatb gives at the same stage.

    gating.infer(gating.param({"topkExpertNum": 2, "cumSumNum": 8}), [int32 [128], int32 [128]], "Ascend910B")
    # tokenIndex int32 [128], cumSum int32 [8], originalIndex int32 [128]

cumSumNum goes up to 1024: so says gating_operation.cpp, and the vendor's cases run 1024 and refuse 1025 (the 200 of
atb-operations.md is an older limit).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.compiler.atb.core import DIM, SIZE, AtbOp, Desc, Field, Param, Row, require, require_param
from llmc.compiler.atb.shape import require_output

MAX_EXPERTS = 1024


def gating_rows(param: Param, chip: str) -> tuple[Row, ...]:
    sums = "int64" if param.cumSumInt64 else "int32"
    row = ("int32", "int32", "int32", sums, "int32")
    return ((*row, "int32"),) if param.deviceExpert else (row,)


def gating_check(param: Param, chip: str) -> None:
    experts, k, local = param.cumSumNum, param.topkExpertNum, list(param.deviceExpert)
    require_param(0 <= experts <= MAX_EXPERTS, "cumSumNum", found=str(experts), expected=f"0 to {MAX_EXPERTS}")
    if experts == 0:
        require_param(k == 1, "topkExpertNum", found=str(k), expected="1 when cumSumNum is 0")
    else:
        require_param(0 < k <= experts, "topkExpertNum", found=str(k), expected=f"1 to cumSumNum, {experts}")
    if not local:
        return
    require_param(chip != "Ascend310P", "deviceExpert (expert parallelism) is for Ascend910B only", found=chip)
    require_param(experts > 0, "deviceExpert needs cumSumNum above 0")
    require_param(
        all(0 <= e < experts for e in local), "deviceExpert", found=str(local), expected=f"experts 0 to {experts - 1}"
    )
    require_param(len(set(local)) == len(local), "deviceExpert names an expert twice", found=str(local))


def gating_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    topk, indices = ins
    require(len(topk.shape) == 1, SIZE, "rank of input 0", found=str(topk), expected="1")
    require(topk.shape[0] % param.topkExpertNum == 0, DIM, "length of input 0", found=str(topk),
            expected=f"a multiple of topkExpertNum, {param.topkExpertNum}")  # fmt: skip
    require(len(indices.shape) == 1, SIZE, "rank of input 1", found=str(indices), expected="1")
    require(indices.shape == topk.shape, DIM, "length of input 1", found=str(indices), expected=str(topk))
    sums = len(param.deviceExpert) or param.cumSumNum or 1
    outs = [topk, Desc(dtype="int64" if param.cumSumInt64 else "int32", shape=(sums,)), topk]
    return [*outs, topk.with_shape((1,))] if param.deviceExpert else outs


def gating_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    for index, (out, expected) in enumerate(zip(outs, gating_shape(param, ins, chip), strict=True)):
        require_output(out, expected.shape, index=index, rank_code=SIZE)


GATING = AtbOp(
    name="Gating",
    fields=(
        Field(name="topkExpertNum", kind="int", default=1),
        Field(name="cumSumNum", kind="int", default=0),
        Field(name="cumSumInt64", kind="bool", default=False),
        Field(name="deviceExpert", kind="ints", default=()),
    ),
    arity=lambda param: (2, 4 if param.deviceExpert else 3),
    rows=gating_rows,
    shape=gating_shape,
    check=gating_check,
    late=gating_late,
    source="atb-operations.md 3.16; gating_operation.cpp",
)

OPS: tuple[AtbOp, ...] = (GATING,)
