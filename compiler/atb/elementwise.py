"""Elewise, Activation and SwigluQuant (atb-operations.md 0, 3.12, 3.13, 3.16).

op.infer(op.param({"elewiseType": ADD}), [x, y], "Ascend910B")     # shapes broadcast as in numpy
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.compiler.atb.core import (
    ACL_BF16,
    ACL_DTYPE,
    ACL_FLOAT,
    ACL_FLOAT16,
    ACL_UNDEFINED,
    DIM,
    DIM_NUM,
    DTYPE_BYTES,
    LOGGED,
    AtbOp,
    Desc,
    Field,
    Param,
    Row,
    require,
    require_param,
    struct,
)
from llmc.compiler.atb.shape import broadcast

ELEWISE_TYPES = {
    "ELEWISE_UNDEFINED": 0, "ELEWISE_CAST": 1, "ELEWISE_MULS": 2, "ELEWISE_COS": 3, "ELEWISE_SIN": 4, "ELEWISE_NEG": 5,
    "ELEWISE_QUANT": 6, "ELEWISE_LOGICAL_NOT": 7, "ELEWISE_ADD": 8, "ELEWISE_MUL": 9, "ELEWISE_REALDIV": 10,
    "ELEWISE_LOGICAL_AND": 11, "ELEWISE_LOGICAL_OR": 12, "ELEWISE_LESS": 13, "ELEWISE_GREATER": 14, "ELEWISE_SUB": 15,
    "ELEWISE_EQUAL": 16, "ELEWISE_QUANT_PER_CHANNEL": 17, "ELEWISE_DEQUANT_PER_CHANNEL": 18,
    "ELEWISE_DYNAMIC_QUANT": 19, "ELEWISE_TANH": 20,
}  # fmt: skip
(CAST, MULS, COS, SIN, NEG, QUANT, LOGICAL_NOT, ADD, MUL, REALDIV, LOGICAL_AND, LOGICAL_OR, LESS, GREATER, SUB, EQUAL,
 QUANT_PER_CHANNEL, DEQUANT_PER_CHANNEL, DYNAMIC_QUANT, TANH) = range(1, 21)  # fmt: skip

UNARY = (CAST, MULS, COS, SIN, NEG, QUANT, LOGICAL_NOT, DYNAMIC_QUANT, TANH)
PER_CHANNEL = (QUANT_PER_CHANNEL, DEQUANT_PER_CHANNEL)
COMPARISONS = (LESS, GREATER, EQUAL)
CASTS = {"float32": ACL_FLOAT, "float16": ACL_FLOAT16, "bfloat16": ACL_BF16}  # dtype -> outTensorType of a CAST

_F16, _F32, _BF16 = "float16", "float32", "bfloat16"

# Every type's input and output dtypes, one row a line; None stands for a column of the row's own dtype.
_SAME_DTYPES = {  # all columns alike
    MULS: (_F16, _F32, _BF16), COS: (_F16, _F32, _BF16), SIN: (_F16, _F32, _BF16), NEG: (_F16, _BF16),
    TANH: (_F16, _BF16), LOGICAL_NOT: ("int8",), LOGICAL_AND: ("int8",), LOGICAL_OR: ("int8",),
    ADD: (_F16, _F32, _BF16, "int32", "int64"), SUB: (_F16, _BF16, "int64"), MUL: (_F16, _BF16),
    REALDIV: (_F16, _F32, _BF16),
}  # fmt: skip
_COMPARED = {LESS: (_F16, _F32, _BF16, "int64"), GREATER: (_F16, _F32, _BF16, "int64"), EQUAL: (_F16, _F32, _BF16)}
_OTHER: dict[int, list[Row]] = {
    CAST: [(_F16, _F32), (_F32, _F16), ("int32", "int64"), ("int64", "int32"), (_BF16, _F32), (_F32, _BF16)],
    QUANT: [(_F16, "int8")],
    QUANT_PER_CHANNEL: [(_F16, _F16, "int8", "int8"), (_BF16, _BF16, "int8", "int8")],
    DEQUANT_PER_CHANNEL: [("int8", _F16, "int8", _F16)],
    DYNAMIC_QUANT: [(_F16, "int8", _F32), (_BF16, "int8", _F32)],
}

# Longest last dimension of DYNAMIC_QUANT, by chip and dtype.
DYNAMIC_LONGEST = {("Ascend310P", _F16): 4096, ("Ascend910B", _F16): 26624, ("Ascend910B", _BF16): 7552}
QUANT_MULTIPLE = 32  # of QUANT's last dimension


def elewise_inputs(param: Param) -> int:
    return 1 if param.elewiseType in UNARY else 3 if param.elewiseType in PER_CHANNEL else 2


def elewise_check(param: Param, chip: str) -> None:
    kind = param.elewiseType
    require_param(CAST <= kind <= TANH, "elewiseType", found=str(kind), expected="1 to 20")
    only_910b = chip != "Ascend310P" or kind not in (QUANT, DEQUANT_PER_CHANNEL)
    require_param(only_910b, f"{chip} has neither QUANT nor DEQUANT_PER_CHANNEL", found=f"elewiseType {kind}")
    asymmetric = kind == DYNAMIC_QUANT and param.quantParam.asymmetric
    require_param(not asymmetric, "asymmetric DYNAMIC_QUANT is not supported")


def elewise_rows(param: Param, chip: str) -> Sequence[Row]:
    kind = param.elewiseType
    if kind in _SAME_DTYPES:
        return [(dtype,) * (elewise_inputs(param) + 1) for dtype in _SAME_DTYPES[kind]]
    if kind in _COMPARED:
        return [(dtype, dtype, "int8") for dtype in _COMPARED[kind]]
    return _OTHER[kind]


def elewise_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x, kind = ins[0], param.elewiseType
    if kind == CAST:
        return [Desc(dtype=cast_dtype(param.outTensorType, x.dtype), shape=x.shape, format=x.format)]
    if kind == QUANT:
        require(x.shape[-1] % QUANT_MULTIPLE == 0, DIM, "last dimension of x", found=str(x),
                expected=f"a multiple of {QUANT_MULTIPLE}", tensor="input 0")  # fmt: skip
    if kind in (QUANT, QUANT_PER_CHANNEL):
        return [Desc(dtype="int8", shape=x.shape, format=x.format)]
    if kind == DEQUANT_PER_CHANNEL:
        return [Desc(dtype=ins[1].dtype, shape=x.shape, format=x.format)]
    if kind == DYNAMIC_QUANT:
        require(len(x.shape) >= 2, DIM_NUM, "x has at least 2 dimensions", found=str(x), tensor="input 0")
        longest = DYNAMIC_LONGEST.get((chip, x.dtype), DYNAMIC_LONGEST["Ascend910B", _F16])
        require(x.shape[-1] <= longest, DIM, "last dimension of x", found=str(x), expected=f"at most {longest}",
                tensor="input 0")  # fmt: skip
        scale = Desc(dtype=_F32, shape=x.shape[:-1], format=x.format)
        return [Desc(dtype="int8", shape=x.shape, format=x.format), scale]
    if kind in UNARY:
        return [x]
    shape = broadcast(x.shape, ins[1].shape)
    require(shape is not None, DIM, "shapes do not broadcast", found=f"{x} and {ins[1]}", tensor="input 1")
    return [Desc(dtype="int8" if kind in COMPARISONS else x.dtype, shape=shape or (), format=x.format)]


def elewise_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    """What only the kernels refuse (elewise_operation.cpp of the kernels and their tiling)."""
    kind, x = param.elewiseType, ins[0]
    if kind == CAST and param.outTensorType == ACL_UNDEFINED:
        require(x.dtype in (_F16, _F32), "ERROR_RT_FAIL", "a CAST without outTensorType", found=x.dtype,
                expected="float16 or float32", tensor="input 0")  # fmt: skip
    if kind in PER_CHANNEL:
        _check_channels(x, ins[1], ins[2])
        count = ins[1].elements if ins[1].elements > 1 else x.elements
        require(chip != "Ascend310P" or count % QUANT_MULTIPLE == 0, LOGGED, f"values that are scaled on {chip}",
                found=str(count), expected=f"a multiple of {QUANT_MULTIPLE}", tensor="input 1")  # fmt: skip
    if kind == DYNAMIC_QUANT and chip == "Ascend310P":
        require(x.shape[-1] % QUANT_MULTIPLE == 0, LOGGED, f"last dimension of x on {chip}", found=str(x),
                expected=f"a multiple of {QUANT_MULTIPLE}", tensor="input 0")  # fmt: skip


def _check_channels(x: Desc, scale: Desc, offset: Desc) -> None:
    """One value, or the trailing dims of x; unlike in numpy a 1 does not broadcast."""
    require(offset.elements == 0 or offset.shape == scale.shape, "ERROR_RT_FAIL", "scale and offset differ in shape",
            found=str(offset), expected=f"empty or {list(scale.shape)}", tensor="input 2")  # fmt: skip
    tail = x.shape[max(0, len(x.shape) - len(scale.shape)) :]
    require(scale.elements == 1 or scale.shape == tail, "ERROR_RT_FAIL", "the scale is no tail of x",
            found=str(scale), expected=f"one value, or the last dims of {x}", tensor="input 1")  # fmt: skip


def cast_dtype(wanted: int, found: str) -> str:
    """dtype of a cast; where outTensorType is not said, float32 becomes float16 and everything else float32."""
    if wanted == ACL_UNDEFINED:
        return _F16 if found == _F32 else _F32
    dtype = ACL_DTYPE.get(wanted, str(wanted))
    allowed = (_F16, _F32, "int32", "int64", _BF16)
    require_param(dtype in allowed, "outTensorType", found=dtype, expected=", ".join(allowed))
    return dtype


ELEWISE = AtbOp(
    name="Elewise",
    fields=(
        Field(name="elewiseType", kind="ElewiseType", default=0),
        struct(
            "quantParam",
            Field(name="inputScale", kind="float", default=1.0),
            Field(name="asymmetric", kind="bool", default=False),
            Field(name="inputOffset", kind="int", default=0),
        ),
        struct("mulsParam", Field(name="varAttr", kind="float", default=0.0)),
        Field(name="outTensorType", kind="dtype", default=ACL_UNDEFINED),
    ),
    enums={"ElewiseType": ELEWISE_TYPES},
    arity=lambda param: (elewise_inputs(param), 2 if param.elewiseType == DYNAMIC_QUANT else 1),
    check=elewise_check,
    rows=elewise_rows,
    shape=elewise_shape,
    late=elewise_late,
    empty=lambda param: frozenset({2} if param.elewiseType in PER_CHANNEL else ()),
    source="atb-operations.md 0 and 3.13",
)

(RELU, GELU, FAST_GELU, SWISH, LOG, SWIGLU_FORWARD, SWIGLU_BACKWARD, SIGMOID, FASTER_GELU_FORWARD) = range(1, 10)

_ACTIVATION_DTYPES = {
    RELU: (_F32, _BF16), GELU: (_F32, _F16, _BF16), FAST_GELU: (_F16, _BF16), SWISH: (_F16, _BF16),
    LOG: (_F32, _F16, _BF16), SWIGLU_FORWARD: (_F32, _F16, _BF16), SWIGLU_BACKWARD: (_F32, _F16, _BF16),
    SIGMOID: (_F16, _BF16), FASTER_GELU_FORWARD: (_F32, _F16, _BF16),
}  # fmt: skip
SWIGLU_310P_MULTIPLE = 32


def activation_check(param: Param, chip: str) -> None:
    require_param(RELU <= param.activationType <= FASTER_GELU_FORWARD, "activationType",
                  found=str(param.activationType), expected="1 to 9")  # fmt: skip
    require_param(param.dim == -1, "dim", found=str(param.dim), expected="-1")


def activation_rows(param: Param, chip: str) -> Sequence[Row]:
    columns = 3 if param.activationType == SWIGLU_BACKWARD else 2
    return [(dtype,) * columns for dtype in _ACTIVATION_DTYPES[param.activationType]]


def activation_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x = ins[0]
    if param.activationType == SWIGLU_BACKWARD:
        expected = (*x.shape[:-1], 2 * x.shape[-1])
        require(ins[1].shape == expected, DIM, "x is not twice as wide as the gradient", found=str(ins[1]),
                expected=str(list(expected)), tensor="input 1")  # fmt: skip
        return [ins[1]]
    if param.activationType != SWIGLU_FORWARD:
        return [x]
    last = x.shape[-1]
    require(chip != "Ascend310P" or last % SWIGLU_310P_MULTIPLE == 0, DIM, f"last dimension of x on {chip}",
            found=str(last), expected=f"a multiple of {SWIGLU_310P_MULTIPLE}", tensor="input 0")  # fmt: skip
    return [x.with_shape((*x.shape[:-1], last // 2))]


def activation_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    odd = param.activationType == SWIGLU_FORWARD and ins[0].shape[-1] % 2
    require(not odd, DIM, "SWIGLU_FORWARD halves the last dimension", found=str(ins[0]), expected="an even size",
            tensor="input 0")  # fmt: skip


ACTIVATION = AtbOp(
    name="Activation",
    fields=(
        Field(name="activationType", kind="ActivationType", default=0),
        Field(name="scale", kind="float", default=1.0),
        Field(name="dim", kind="int", default=-1),
        Field(name="geluMode", kind="GeLUMode", default=0),
    ),
    enums={"GeLUMode": {"TANH_MODE": 0, "NONE_MODE": 1}},
    arity=lambda param: (2 if param.activationType == SWIGLU_BACKWARD else 1, 1),
    check=activation_check,
    rows=activation_rows,
    shape=activation_shape,
    late=activation_late,
    source="atb-operations.md 0 and 3.12",
)

# SwigluQuant keeps a row in the unified buffer: 192 KiB, 25 bytes an element (swiglu_quant cases around this size).
SWIGLU_QUANT_LIMIT = 192 * 1024 // 25


def swiglu_quant_check(param: Param, chip: str) -> None:
    require_param(chip != "Ascend310P", f"{chip} has no SwigluQuant")
    require_param(param.quantType == 0, "quantType", found=str(param.quantType), expected="0 (QUANT_TYPE_PER_TOKEN)")


def swiglu_quant_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x = ins[0]
    require(len(x.shape) == 2, DIM_NUM, "dimensions of x", found=str(x), expected="2", tensor="input 0")
    tokens, width = x.shape
    require(width % 2 == 0, DIM, "last dimension of x", found=str(width), expected="an even size", tensor="input 0")
    block = 32 // DTYPE_BYTES[x.dtype]
    padded = -(-(width // 2) // block) * block
    require(padded < SWIGLU_QUANT_LIMIT, DIM, "last dimension of x is too large", found=str(width),
            expected=f"at most {2 * ((SWIGLU_QUANT_LIMIT - 1) // block * block)}", tensor="input 0")  # fmt: skip
    return [Desc(dtype="int8", shape=(tokens, width // 2)), Desc(dtype=_F32, shape=(tokens,))]


SWIGLU_QUANT = AtbOp(
    name="SwigluQuant",
    fields=(Field(name="quantType", kind="QuantType", default=0),),
    enums={"QuantType": {"QUANT_TYPE_PER_TOKEN": 0}},
    arity=lambda param: (1, 2),
    check=swiglu_quant_check,
    rows=lambda param, chip: [(dtype, "int8", _F32) for dtype in (_F16, _BF16)],
    shape=swiglu_quant_shape,
    bound=False,
    chips=("Ascend910B", "host"),
    source="atb-operations.md 3.16",
)

OPS: tuple[AtbOp, ...] = (ELEWISE, ACTIVATION, SWIGLU_QUANT)
