"""Rope (atb-operations.md 3.7).

op.infer(op.param({"rotaryCoeff": 2}), [q, k, cos, sin, seqLen], "Ascend910B")    # q and k as they came
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.compiler.atb.core import DIM, SIZE, AtbOp, Desc, Field, Param, Row, require, require_param

HIDDEN_MULTIPLE = 16  # the kernel moves 32 bytes at a time
SMALLEST_HEAD, LARGEST_HEAD = 16, 4096  # C, the last dimension of cos and sin


def rope_rows(param: Param, chip: str) -> Sequence[Row]:
    kinds = [("float16", "float16"), ("float16", "float32"), ("bfloat16", "bfloat16")]  # q and k; cos and sin
    return [(x, x, table, table, lengths, x, x) for x, table in kinds for lengths in ("int32", "uint32")]


def merged(desc: Desc) -> tuple[int, int]:
    """[T, hidden] of a 2-D tensor, or of a 4-D [B, S, N, D] whose dims are merged two by two."""
    if len(desc.shape) == 4:
        b, s, n, d = desc.shape
        return b * s, n * d
    return desc.shape[0], desc.shape[1]


def rope_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    q, k, cos, sin, lengths = ins
    for index, (desc, ranks) in enumerate(((q, (2, 4)), (k, (2, 4)), (cos, (2,)), (sin, (2,)), (lengths, (1,)))):
        require(len(desc.shape) in ranks, DIM, "number of dimensions", found=str(desc),
                expected=" or ".join(map(str, ranks)), tensor=f"input {index}")  # fmt: skip
    (tokens, q_hidden), (k_tokens, k_hidden) = merged(q), merged(k)
    require(tokens == k_tokens, SIZE, "q and k have different token counts", found=str(k_tokens),
            expected=str(tokens), tensor="input 1")  # fmt: skip
    head = cos.shape[1]
    for index, table in ((2, cos), (3, sin)):
        require(SMALLEST_HEAD <= table.shape[1] <= LARGEST_HEAD, DIM, "head size of cos or sin", found=str(table),
                expected=f"{SMALLEST_HEAD} to {LARGEST_HEAD}", tensor=f"input {index}")  # fmt: skip
    require(cos.shape == sin.shape, SIZE, "cos and sin differ", found=str(sin), expected=str(cos), tensor="input 3")
    require(q_hidden % k_hidden == 0, SIZE, "hidden size of q is not a multiple of k's", found=str(q_hidden),
            expected=f"a multiple of {k_hidden}", tensor="input 0")  # fmt: skip
    require(k_hidden % head == 0, DIM, "hidden size of k is not a multiple of the head size", found=str(k_hidden),
            expected=f"a multiple of {head}", tensor="input 1")  # fmt: skip
    require_param(param.rotaryCoeff in (2, 4, head), "rotaryCoeff", found=str(param.rotaryCoeff),
                  expected=f"2, 4 or the head size {head}")  # fmt: skip
    require_param(head % param.rotaryCoeff == 0, "the head size is not a multiple of rotaryCoeff", found=str(head),
                  expected=f"a multiple of {param.rotaryCoeff}")  # fmt: skip
    require_param(param.cosFormat in (0, 1), "cosFormat", found=str(param.cosFormat), expected="0 or 1")
    return [q, k]


def rope_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    for index in (0, 1):
        hidden = merged(ins[index])[1]
        require(hidden % HIDDEN_MULTIPLE == 0, "ERROR_RT_FAIL", "hidden size of q or k", found=str(hidden),
                expected=f"a multiple of {HIDDEN_MULTIPLE}", tensor=f"input {index}")  # fmt: skip


ROPE = AtbOp(
    name="Rope",
    fields=(
        Field(name="rotaryCoeff", kind="int", default=4),
        Field(name="cosFormat", kind="int", default=0),
    ),
    arity=lambda param: (5, 2),
    rows=rope_rows,
    shape=rope_shape,
    late=rope_late,
    source="atb-operations.md 3.7",
)

OPS: tuple[AtbOp, ...] = (ROPE,)
