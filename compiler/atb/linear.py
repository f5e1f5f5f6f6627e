"""Linear and LinearSparse (atb-operations.md 3.2, 3.4).

    op = next(op for op in OPS if op.name == "Linear")
    op.infer(op.param({"hasBias": False}), [x, weight], "Ascend910B")     # x [T, k], weight [n, k] -> [T, n]

Letters in the rules: m rows of x, k reduced length, n columns of the result, b leading batch.
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
    AtbOp,
    Desc,
    Field,
    Param,
    Row,
    require,
    require_param,
)

EIN_SUM = 1  # matmulType
PER_TOKEN = 2  # quantMode

BLOCK_ROWS = 16  # NZ: dim 2 of a 4-D weight is a multiple of this, its last dim is 16 (float) or 32 (int8)


def linear_arity(param: Param) -> tuple[int, int]:
    if param.outDataType == ACL_UNDEFINED:
        return (3 if param.hasBias or param.enAccum else 2), 1
    return (4 if param.hasBias or param.quantMode == PER_TOKEN else 3), 1


def linear_check(param: Param, chip: str) -> None:
    require_param(param.matmulType in (0, EIN_SUM), "matmulType does not exist", found=str(param.matmulType))
    is_310p, quant = chip == "Ascend310P", param.outDataType != ACL_UNDEFINED
    if param.matmulType == EIN_SUM:
        for name in ("enAccum", "transposeA", "hasBias"):
            require_param(not getattr(param, name), f"MATMUL_EIN_SUM needs {name} = false")
        require_param(not quant, "MATMUL_EIN_SUM needs outDataType = ACL_DT_UNDEFINED")
        require_param(not is_310p, f"{chip} has no MATMUL_EIN_SUM")
        return
    allowed = (ACL_UNDEFINED, ACL_FLOAT16, ACL_BF16, *((ACL_FLOAT,) if chip == "host" else ()))
    require_param(param.outDataType in allowed, "outDataType",
                  found=ACL_DTYPE.get(param.outDataType, str(param.outDataType)),
                  expected="undefined, float16 or bfloat16")  # fmt: skip
    if not quant:
        require_param(param.quantMode == 0, "quantMode needs an outDataType", found=f"quantMode {param.quantMode}")
        require_param(not (param.enAccum and is_310p), f"{chip} has no enAccum")
        require_param(not (param.enAccum and param.hasBias), "enAccum and hasBias exclude each other")
        return
    require_param(not param.enAccum, "enAccum needs outDataType = ACL_DT_UNDEFINED")
    require_param(not (param.quantMode == PER_TOKEN and param.hasBias), "PER_TOKEN and hasBias exclude each other")
    if is_310p:
        require_param(param.outDataType == ACL_FLOAT16, f"{chip} has no bfloat16")
        require_param(not param.transposeA, f"a quantised Linear on {chip} needs transposeA = false")
        require_param(param.transposeB, f"a quantised Linear on {chip} needs transposeB = true")
        require_param(param.hasBias, f"a quantised Linear on {chip} needs hasBias = true")
        require_param(param.quantMode != PER_TOKEN, f"{chip} has no PER_TOKEN")


def _nd_nz(dtype: str, *rest: str) -> list[Row]:
    """Rows with an ND and with an NZ weight; `rest` follows x and weight."""
    return [(dtype, dtype, *rest), (dtype, f"{dtype}:nz", *rest)]


def linear_rows(param: Param, chip: str) -> Sequence[Row]:
    floats = ("float16",) if chip == "Ascend310P" else ("float16", "bfloat16")
    if param.matmulType == EIN_SUM or (param.outDataType == ACL_UNDEFINED and not param.hasBias and not param.enAccum):
        rows = [row for dtype in floats for row in _nd_nz(dtype, dtype)]
        return rows if param.matmulType == EIN_SUM or len(floats) == 1 else [*rows, ("float32",) * 3]
    if param.outDataType == ACL_UNDEFINED and param.enAccum:
        return [(dtype, dtype, "float32", "float32") for dtype in floats]
    if param.outDataType == ACL_UNDEFINED:
        rows = [row for dtype in floats for row in _nd_nz(dtype, dtype, dtype)]
        return rows if len(floats) == 1 else [*rows, *((dtype, dtype, "float32", dtype) for dtype in floats)]
    if param.quantMode == PER_TOKEN:
        return [("int8", "int8", "float32", "float32", ACL_DTYPE[param.outDataType])]
    bias = ("int32",) if param.hasBias else ()
    if param.outDataType != ACL_FLOAT16:
        return _nd_nz("int8", *bias, "float32", ACL_DTYPE[param.outDataType])
    return [row for scale in ("uint64", "int64") for row in _nd_nz("int8", *bias, scale, "float16")]


def weight_sizes(weight: Desc, transposed: bool) -> tuple[int, int, int]:
    """(b, k, n) of a weight: 2-D, 3-D, or 4-D NZ blocks [b, k/k0, n, k0] when transposed, else [b, n/n0, k, n0]."""
    if len(weight.shape) == 4:
        b, blocks, rows, width = weight.shape
        return (b, blocks * width, rows) if transposed else (b, rows, blocks * width)
    b = weight.shape[0] if len(weight.shape) == 3 else 1
    first, second = weight.shape[-2:]
    return (b, second, first) if transposed else (b, first, second)


def input_sizes(x: Desc, param: Param) -> tuple[int, int, int]:
    """(b, m, k) of the activation; EIN_SUM has x [m, b, k]."""
    if param.matmulType == EIN_SUM and len(x.shape) == 3:
        m, b, k = x.shape
        return b, m, k
    b = x.shape[0] if len(x.shape) == 3 else 1
    first, second = x.shape[-2:]
    return (b, second, first) if param.transposeA else (b, first, second)


def linear_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x, weight = ins[:2]
    quant = param.outDataType != ACL_UNDEFINED
    _check_ranks(x, weight, param)
    (xb, m, xk), (wb, wk, n) = input_sizes(x, param), weight_sizes(weight, param.transposeB)
    _check_batches(xb, wb, weight, param)
    require(
        xk == wk, DIM, "k of x and k of the weight differ", tensor="input 1", found=f"{xk} and {wk}", expected="equal"
    )
    if len(weight.shape) == 4:
        width = 32 if quant else 16
        require(weight.shape[2] % BLOCK_ROWS == 0 and weight.shape[3] == width, DIM,
                "blocks of an NZ weight", found=str(weight), expected=f"[b, blocks, multiple of 16, {width}]",
                tensor="input 1")  # fmt: skip
    rest = list(enumerate(ins))[2:]
    if not quant and param.enAccum:
        _check_accum(ins[2], x, xb, m, n)
        rest = []
    elif quant and param.quantMode == PER_TOKEN:
        _check_per_token(ins[2], ins[3], m, n)
        rest = []
    for index, vector in rest:
        _check_columns(f"input {index}", vector, wb, n)
    dtype = ACL_DTYPE[param.outDataType] if quant else "float32" if param.enAccum else x.dtype
    shape = (m, xb, n) if param.matmulType == EIN_SUM else (*x.shape[:-2], m, n)
    return [Desc(dtype=dtype, shape=shape, format=x.format)]


def _check_ranks(x: Desc, weight: Desc, param: Param) -> None:
    require(len(x.shape) in (2, 3), DIM_NUM, "dimensions of x", found=str(x), expected="2 or 3", tensor="input 0")
    if param.matmulType == EIN_SUM:
        allowed: tuple[int, ...] = (3,) if weight.format == "nd" else (4,)
    else:
        allowed = (2, 3) if weight.format == "nd" else (2, 3, 4)
    require(len(weight.shape) in allowed, DIM_NUM, "dimensions of the weight", found=str(weight),
            expected=" or ".join(map(str, allowed)), tensor="input 1")  # fmt: skip
    require(not (len(x.shape) == 2 and len(weight.shape) == 3), DIM_NUM, "a 3-D weight needs a 3-D x",
            found=str(x), tensor="input 0")  # fmt: skip
    per_token = param.quantMode == PER_TOKEN and len(x.shape) == 3 and len(weight.shape) == 2
    require(not per_token, DIM_NUM, "PER_TOKEN with a 3-D x needs a 3-D weight", found=str(weight), tensor="input 1")


def _check_batches(xb: int, wb: int, weight: Desc, param: Param) -> None:
    if xb == wb:
        return
    shared = wb == 1 and len(weight.shape) != 3 and not param.transposeA
    require(shared, DIM, "batch of x and batch of the weight differ", tensor="input 1",
            found=f"{xb} and {wb}", expected="equal (a 2-D weight may be shared unless transposeA)")  # fmt: skip


def _check_columns(name: str, vector: Desc, batch: int, n: int) -> None:
    """bias and deqScale: [n] or [b, n]."""
    require(
        len(vector.shape) in (1, 2), DIM_NUM, "bias or deqScale has 1 or 2 dimensions", found=str(vector), tensor=name
    )
    found = (1, *vector.shape)[-2:]
    require(found == (batch, n), DIM, "bias or deqScale does not fit the weight",
            found=str(vector), expected=f"[{n}]" if batch == 1 else f"[{batch}, {n}]", tensor=name)  # fmt: skip


def _check_accum(accum: Desc, x: Desc, batch: int, m: int, n: int) -> None:
    require(len(accum.shape) == len(x.shape), DIM_NUM, "accum and x differ in dimensions",
            found=str(accum), expected=str(len(x.shape)), tensor="input 2")  # fmt: skip
    require((1, *accum.shape)[-3:] == (batch, m, n), DIM, "accum has not the output's shape",
            found=str(accum), expected=f"[{batch}, {m}, {n}]", tensor="input 2")  # fmt: skip


def _check_per_token(scale: Desc, token_scale: Desc, m: int, n: int) -> None:
    for index, (desc, size) in enumerate(((scale, n), (token_scale, m)), start=2):
        require(len(desc.shape) == 1, DIM_NUM, "PER_TOKEN scales have one dimension",
                found=str(desc), tensor=f"input {index}")  # fmt: skip
        require(desc.shape == (size,), DIM, "length of a PER_TOKEN scale",
                found=str(desc), expected=f"[{size}]", tensor=f"input {index}")  # fmt: skip


def linear_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require(len(outs[0].shape) == len(ins[0].shape), DIM_NUM, "output and x differ in rank",
            found=str(outs[0]), expected=f"{len(ins[0].shape)} dimensions", tensor="output 0")  # fmt: skip
    if ins[0].dtype == "float32" and chip == "Ascend910B":  # a gate's kernel: [m, k] and [n, k] only
        plain = not param.transposeA and param.transposeB
        for index in (0, 1):
            require(len(ins[index].shape) == 2, "ERROR_RT_FAIL", "a float32 Linear has 2-D inputs",
                    found=str(ins[index]), expected="2 dimensions", tensor=f"input {index}")  # fmt: skip
        require_param(plain, "a float32 Linear needs transposeA = false and transposeB = true")


LINEAR = AtbOp(
    name="Linear",
    fields=(
        Field(name="transposeA", kind="bool", default=False),
        Field(name="transposeB", kind="bool", default=True),
        Field(name="hasBias", kind="bool", default=True),
        Field(name="outDataType", kind="dtype", default=ACL_UNDEFINED),
        Field(name="enAccum", kind="bool", default=False),
        Field(name="matmulType", kind="MatmulType", default=0),
        Field(name="quantMode", kind="QuantMode", default=0),
    ),
    enums={
        "MatmulType": {"MATMUL_UNDEFINED": 0, "MATMUL_EIN_SUM": 1},
        "QuantMode": {"QUANT_UNDEFINED": 0, "PER_CHANNEL": 1, "PER_TOKEN": 2},
    },
    arity=linear_arity,
    check=linear_check,
    rows=linear_rows,
    shape=linear_shape,
    late=linear_late,
    source="atb-operations.md 3.2",
)

SPARSE_TILE = 8  # tilingK and tilingN, the only value


def sparse_check(param: Param, chip: str) -> None:
    require_param(chip == "Ascend310P", f"{chip} has no LinearSparse", expected="Ascend310P")
    require_param(not param.transposeA and param.transposeB, "LinearSparse needs transposeA = false, transposeB = true")
    for name in ("tilingK", "tilingN"):
        require_param(getattr(param, name) == SPARSE_TILE, f"LinearSparse needs {name} = {SPARSE_TILE}",
                      found=str(getattr(param, name)))  # fmt: skip


def sparse_rows(param: Param, chip: str) -> Sequence[Row]:
    return [
        ("int8", weight, "int32", scale, "int8", "float16")
        for weight in ("int8", "int8:nz")
        for scale in ("uint64", "int64")
    ]


def sparse_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    """The weight is the vendor's compressed 1-D form. The dense [n, k] is taken too: it is what the compressor reads,
    and what the vendor's case tables and hostatb (which cannot decompress) work on."""
    x, weight, bias, scale, index = ins
    require(len(x.shape) in (2, 3), DIM, "dimensions of x", found=str(x), expected="2 or 3", tensor="input 0")
    k, n = x.shape[-1], bias.shape[-1]
    dense = weight.shape == (n, k)
    padded_k, padded_n = -(-k // 32), -(-n // 16)
    longest = padded_k * 32 * padded_n * 16
    require(dense or (len(weight.shape) == 1 and weight.shape[0] <= longest), DIM, "compressed weight",
            found=str(weight), expected=f"one dimension, at most {longest}", tensor="input 1")  # fmt: skip
    for number, vector in ((2, bias), (3, scale)):
        require((1, *vector.shape)[-2:] == (1, n) and len(vector.shape) <= 2, DIM, "bias or deqScale",
                found=str(vector), expected=f"[{n}] or [1, {n}]", tensor=f"input {number}")  # fmt: skip
    length = -(-padded_k // SPARSE_TILE) * -(-padded_n // SPARSE_TILE) * 8
    require(dense or index.shape == (length,), DIM, "compression index", found=str(index), expected=f"[{length}]",
            tensor="input 4")  # fmt: skip
    return [Desc(dtype="float16", shape=(*x.shape[:-1], n), format=x.format)]


LINEAR_SPARSE = AtbOp(
    name="LinearSparse",
    fields=(
        Field(name="transposeA", kind="bool", default=False),
        Field(name="transposeB", kind="bool", default=True),
        Field(name="tilingK", kind="uint", default=SPARSE_TILE),
        Field(name="tilingN", kind="uint", default=SPARSE_TILE),
    ),
    arity=lambda param: (5, 1),
    check=sparse_check,
    rows=sparse_rows,
    shape=sparse_shape,
    chips=("Ascend310P",),
    source="atb-operations.md 3.4",
)

OPS: tuple[AtbOp, ...] = (LINEAR, LINEAR_SPARSE)
