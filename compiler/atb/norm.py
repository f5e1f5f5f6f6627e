"""RmsNorm and LayerNorm (atb-operations.md 3.5, 3.6).

op = next(op for op in OPS if op.name == "RmsNorm")
op.infer(op.param({"layerType": 1}), [x, gamma], "Ascend910B")     # x [T, H], gamma [H] -> [T, H]
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.compiler.atb.core import (
    DIM,
    DIM_NUM,
    LOGGED,
    SIZE,
    AtbOp,
    Desc,
    Field,
    Param,
    Row,
    require,
    require_param,
    struct,
)

NORM, PRENORM, POSTNORM = 1, 2, 3  # layerType of both operations
UNQUANT, INT8 = 0, 2  # quantType
STATIC, SYMMETRIC, ASYMMETRIC = 0, 1, 2  # dynamicQuantType
HIGH_PERFORMANCE, GEMMA = 1, 1  # precisionMode, modelType

SMALLEST_EPSILON = 2e-38
DYNAMIC_QUANT_LONGEST = 12288  # last dim of the dynamically quantised forms
ALIGN_BYTES = 32  # of the last dim


def _both(inputs: int, *outputs: str) -> list[Row]:
    """fp16 and bf16 rows: `inputs` columns of that dtype, then `outputs`, where "=" stands for the dtype."""
    return [
        (dtype,) * inputs + tuple(dtype if word == "=" else word for word in outputs)
        for dtype in ("float16", "bfloat16")
    ]


def rms_quant(param: Param) -> int:
    """quantType of the struct that the layer type uses."""
    return {NORM: param.normParam, PRENORM: param.preNormParam, POSTNORM: param.postNormParam}[
        param.layerType
    ].quantType


def rms_has_bias(param: Param) -> bool:
    """Either struct's flag counts for both layer types (reference 3.5)."""
    return param.preNormParam.hasBias or param.postNormParam.hasBias


def rms_arity(param: Param) -> tuple[int, int]:
    quant, norm = rms_quant(param) == INT8, param.normParam
    if param.layerType == NORM:
        if not quant:
            return 2, 2 if norm.rstd else 1
        return (5, 1) if norm.dynamicQuantType == STATIC else (3, 2)
    if param.layerType == PRENORM:
        return (6 if quant else 4 if rms_has_bias(param) else 3), 2
    return (5, 2) if quant else (4 if rms_has_bias(param) else 3, 1)


def rms_check(param: Param, chip: str) -> None:
    norm, pre, post = param.normParam, param.preNormParam, param.postNormParam
    for name, value in (
        ("normParam.epsilon", norm.epsilon),
        ("normParam.layerNormEps", norm.layerNormEps),
        ("preNormParam.epsilon", pre.epsilon),
        ("postNormParam.epsilon", post.epsilon),
    ):
        require_param(abs(value) >= SMALLEST_EPSILON, f"{name} is too small", found=str(value),
                      expected=f"at least {SMALLEST_EPSILON}, in unused structs too")  # fmt: skip
    require_param(param.layerType in (NORM, PRENORM, POSTNORM), "layerType", found=str(param.layerType),
                  expected="1 (NORM), 2 (PRENORM) or 3 (POSTNORM)")  # fmt: skip
    if chip == "Ascend310P":
        require_param(post.quantType != INT8, f"{chip} has no int8 POSTNORM")
    require_param(rms_quant(param) in (UNQUANT, INT8), "quantType", found=str(rms_quant(param)), expected="0 or 2")
    asymmetric = param.layerType == NORM and norm.dynamicQuantType == ASYMMETRIC
    require_param(not asymmetric, "DYNAMIC_QUANT_ASYMMETRIC is not supported")


def rms_rows(param: Param, chip: str) -> Sequence[Row]:
    quant = rms_quant(param) == INT8
    if param.layerType == NORM:
        if not quant:
            floats = [("float32",) * 4] if param.normParam.rstd else []
            return [*_both(2, *(("=",) * (2 if param.normParam.rstd else 1))), *floats]
        if param.normParam.dynamicQuantType == STATIC:
            return _both(4, "int8", "int8")
        return [("float16", "float16", "float16", "int8", "float32")]
    if param.layerType == PRENORM:
        if quant:
            return [("float16",) * 5 + ("int8", "int8", "float16")]
        return _both(4 if param.preNormParam.hasBias else 3, "=", "=")
    if quant:
        return _both(4, "int8", "int8", "=")
    return _both(4 if param.postNormParam.hasBias else 3, "=")


def rms_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x, norm, quant = ins[0], param.normParam, rms_quant(param) == INT8
    require(not (norm.rstd and x.dtype != "float32"), "ERROR_INVALID_TENSOR_DTYPE", "rstd needs a float32 x",
            found=x.dtype, tensor="input 0")  # fmt: skip
    fast = norm.precisionMode == HIGH_PERFORMANCE
    require(not (fast and x.dtype != "float16") or chip == "host", "ERROR_INVALID_TENSOR_DTYPE",
            "HIGH_PERFORMANCE_MODE needs a float16 x", found=x.dtype, tensor="input 0")  # fmt: skip
    if param.layerType == NORM and norm.rstd:
        gamma = ins[1]
        require(x.shape[-len(gamma.shape) :] == gamma.shape, DIM, "gamma is not the tail of x", found=str(gamma),
                expected=f"tail of {list(x.shape)}", tensor="input 1")  # fmt: skip
    else:
        _rms_in_shapes(param, ins, quant)
    _rms_last_dims(param, ins)
    _rms_combination(param, chip)
    result = [x if not quant else Desc(dtype="int8", shape=x.shape, format=x.format)]
    if param.layerType == NORM and quant and norm.dynamicQuantType != STATIC:
        result.append(Desc(dtype="float32", shape=x.shape[:-1], format=x.format))
    elif param.layerType == NORM and norm.rstd:
        kept = len(x.shape) - len(ins[1].shape)
        result.append(Desc(dtype="float32", shape=x.shape[:kept] + (1,) * len(ins[1].shape), format=x.format))
    elif param.layerType == PRENORM or (param.layerType == POSTNORM and quant):
        result.append(x)
    return result


def _rms_in_shapes(param: Param, ins: Sequence[Desc], quant: bool) -> None:
    x = ins[0]
    if param.layerType == NORM:
        gamma = 1
    else:
        residual = 2 if rms_has_bias(param) and not quant else 1
        gamma = residual + 1
        require(ins[residual] == x, DIM, "residual and x differ", found=str(ins[residual]), expected=str(x),
                tensor=f"input {residual}")  # fmt: skip
    rows = [gamma] if quant or gamma < 3 else [1, gamma]
    for index in rows:
        row = ins[index]
        require(row.shape[-1] == x.shape[-1] and all(dim == 1 for dim in row.shape[:-1]), DIM,
                "gamma or bias is not one row of x", found=str(row), expected=f"[{x.shape[-1]}]",
                tensor=f"input {index}")  # fmt: skip
    if not quant:
        return
    if param.layerType == POSTNORM:
        require(len(ins[gamma].shape) <= 2, DIM, "gamma has 1 or 2 dimensions", found=str(ins[gamma]),
                tensor=f"input {gamma}")  # fmt: skip
    elif param.layerType == PRENORM or param.normParam.dynamicQuantType == STATIC:
        require(ins[gamma + 1] == ins[gamma], DIM, "beta and gamma differ", found=str(ins[gamma + 1]),
                expected=str(ins[gamma]), tensor=f"input {gamma + 1}")  # fmt: skip
    if param.layerType != NORM or param.normParam.dynamicQuantType == STATIC:
        for index in (len(ins) - 2, len(ins) - 1):
            require(ins[index].shape == (1,), DIM, "scale and offset have one element", found=str(ins[index]),
                    expected="[1]", tensor=f"input {index}")  # fmt: skip


def _rms_last_dims(param: Param, ins: Sequence[Desc]) -> None:
    """As the library has it: quantType of any of the three structs counts (reference 3.5)."""
    quants = [p.quantType == INT8 for p in (param.normParam, param.preNormParam, param.postNormParam)]
    code = DIM if quants[2] else SIZE
    last, size = ins[0].shape[-1], 4 if ins[0].dtype == "float32" else 2
    multiple = ALIGN_BYTES if quants[2] else ALIGN_BYTES // size
    require(last % multiple == 0, code, "last dimension of x", found=str(last), expected=f"a multiple of {multiple}",
            tensor="input 0")  # fmt: skip
    if quants[0] and param.normParam.dynamicQuantType == SYMMETRIC:
        require(last <= DYNAMIC_QUANT_LONGEST, code, "last dimension of x", found=str(last),
                expected=f"at most {DYNAMIC_QUANT_LONGEST}", tensor="input 0")  # fmt: skip
    for index in range(1, len(ins) - (2 if any(quants) else 0)):
        require(ins[index].shape[-1] == last, code, "last dimensions differ", found=str(ins[index]),
                expected=str(last), tensor=f"input {index}")  # fmt: skip


def _rms_combination(param: Param, chip: str) -> None:
    """Combinations that the library refuses at InferShape only."""
    norm = param.normParam
    quant, fast = norm.quantType != UNQUANT, norm.precisionMode == HIGH_PERFORMANCE
    if norm.modelType != 0:
        require_param(not quant and not fast and not norm.rstd, "GEMMA_MODEL excludes quant, HIGH_PERFORMANCE and rstd")
    if fast:
        require_param(not quant and not norm.rstd, "HIGH_PERFORMANCE_MODE excludes quant and rstd")
    for part in (param.preNormParam, param.postNormParam):
        require_param(not (part.hasBias and part.quantType != UNQUANT), "hasBias and quantType exclude each other")
    if norm.rstd:
        require_param(not quant, "rstd excludes quant")
        require_param(chip != "Ascend310P", f"{chip} has no rstd")


def _check_epsilon(value: float) -> None:
    """Creation takes negative ones too."""
    require(value > 0, LOGGED, "epsilon", found=str(value), expected="above 0")


def rms_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    used = {NORM: param.normParam, PRENORM: param.preNormParam, POSTNORM: param.postNormParam}[param.layerType]
    static = rms_quant(param) == INT8 and (param.layerType != NORM or used.dynamicQuantType == STATIC)
    if not static and not (param.layerType == NORM and used.rstd):  # the other kernels do not look
        _check_epsilon(used.epsilon)
    for index, out in enumerate(outs[:1] if param.layerType == NORM else outs):
        require(len(out.shape) == len(ins[0].shape), SIZE, "output and x differ in rank", found=str(out),
                expected=str(ins[0]), tensor=f"output {index}")  # fmt: skip


QUANT = Field(name="quantType", kind="QuantType", default=UNQUANT)
EPSILON = Field(name="epsilon", kind="float", default=1e-5)
DYNAMIC_QUANT = Field(name="dynamicQuantType", kind="DynamicQuantType", default=0)
HAS_BIAS = Field(name="hasBias", kind="bool", default=False)

RMS_NORM = AtbOp(
    name="RmsNorm",
    fields=(
        Field(name="layerType", kind="RmsNormType", default=0),
        struct(
            "normParam",
            QUANT,
            EPSILON,
            Field(name="layerNormEps", kind="float", default=1e-5),
            Field(name="rstd", kind="bool", default=False),
            Field(name="precisionMode", kind="PrecisionMode", default=0),
            Field(name="modelType", kind="ModelType", default=0),
            DYNAMIC_QUANT,
        ),
        struct("preNormParam", QUANT, EPSILON, HAS_BIAS),
        struct("postNormParam", QUANT, EPSILON, HAS_BIAS),
    ),
    enums={
        "RmsNormType": {
            "RMS_NORM_UNDEFINED": 0, "RMS_NORM_NORM": 1, "RMS_NORM_PRENORM": 2, "RMS_NORM_POSTNORM": 3,
        },
        "PrecisionMode": {"HIGH_PRECISION_MODE": 0, "HIGH_PERFORMANCE_MODE": 1},
        "ModelType": {"LLAMA_MODEL": 0, "GEMMA_MODEL": 1},
    },
    arity=rms_arity,
    check=rms_check,
    rows=rms_rows,
    shape=rms_shape,
    late=rms_late,
    source="atb-operations.md 3.5",
)  # fmt: skip


def layer_check(param: Param, chip: str) -> None:
    require_param(param.layerType in (NORM, PRENORM, POSTNORM), "layerType", found=str(param.layerType),
                  expected="1 (NORM), 2 (PRENORM) or 3 (POSTNORM)")  # fmt: skip
    used = {NORM: param.normParam, PRENORM: param.preNormParam, POSTNORM: param.postNormParam}[param.layerType]
    allowed = (UNQUANT,) if param.layerType == PRENORM else (UNQUANT, INT8)
    require_param(used.quantType in allowed, "quantType", found=str(used.quantType), expected=str(allowed))
    require_param(abs(used.epsilon) >= SMALLEST_EPSILON, "epsilon is too small", found=str(used.epsilon),
                  expected=f"at least {SMALLEST_EPSILON}")  # fmt: skip
    if param.layerType == NORM:
        require_param(used.dynamicQuantType != ASYMMETRIC, "DYNAMIC_QUANT_ASYMMETRIC is not supported")
    else:
        require_param(used.opMode == 0, "opMode", found=str(used.opMode), expected="0")


def layer_arity(param: Param) -> tuple[int, int]:
    norm = param.normParam
    if param.layerType == NORM:
        if norm.quantType != INT8:
            return 3, 1
        return (5, 1) if norm.dynamicQuantType == STATIC else (3, 2)
    if param.layerType == PRENORM:
        return 4, 2
    return (6, 2) if param.postNormParam.quantType == INT8 else (4, 1)


def layer_rows(param: Param, chip: str) -> Sequence[Row]:
    norm = param.normParam
    if param.layerType == NORM:
        if norm.quantType != INT8:
            return [*_both(3, "="), ("float32",) * 4]
        if norm.dynamicQuantType == STATIC:
            return _both(4, "int8", "int8")
        return [("float16", "float16", "float16", "int8", "float32")]
    if param.layerType == PRENORM:
        return _both(4, "=", "=")
    if param.postNormParam.quantType == INT8:
        return [("float16",) * 5 + ("int8", "float16", "int8")]
    return [("float16",) * 5]


def layer_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x, norm, post = ins[0], param.normParam, param.postNormParam
    plain = param.layerType == NORM and norm.quantType == UNQUANT
    if plain:
        _layer_axis(x, ins[1], norm.beginNormAxis)
    if param.layerType == NORM and norm.quantType == INT8 and norm.dynamicQuantType == SYMMETRIC:
        require(len(x.shape) >= 2, DIM, "x has at least 2 dimensions", found=str(x), tensor="input 0")
    if param.layerType != NORM:
        require(len(ins[1].shape) == len(x.shape), DIM_NUM, "residual and x differ in rank",
                found=str(ins[1]), expected=str(x), tensor="input 1")  # fmt: skip
        require(ins[1] == x, DIM, "residual and x differ", found=str(ins[1]), expected=str(x), tensor="input 1")
    last = x.shape[-1]
    require(plain or last % 16 == 0, SIZE, "last dimension of x", found=str(last), expected="a multiple of 16",
            tensor="input 0")  # fmt: skip
    static = (norm.quantType == INT8 and norm.dynamicQuantType == STATIC) or post.quantType == INT8
    for index in range(1, len(ins) - (2 if static else 0)):
        require(ins[index].shape[-1] == last, SIZE, "last dimensions differ", found=str(ins[index]),
                expected=str(last), tensor=f"input {index}")  # fmt: skip
    if param.layerType == NORM and norm.dynamicQuantType == SYMMETRIC:
        require(last <= DYNAMIC_QUANT_LONGEST, SIZE, "last dimension of x", found=str(last),
                expected=f"at most {DYNAMIC_QUANT_LONGEST}", tensor="input 0")  # fmt: skip
    if len(ins) in (5, 6):
        for index in (len(ins) - 2, len(ins) - 1):
            require(ins[index].shape == (1,), SIZE, "scale and offset have one element", found=str(ins[index]),
                    expected="[1]", tensor=f"input {index}")  # fmt: skip
    quantised = Desc(dtype="int8", shape=x.shape, format=x.format)
    if param.layerType == NORM and norm.quantType == INT8:
        scale = Desc(dtype="float32", shape=x.shape[:-1], format=x.format)
        return [quantised] if norm.dynamicQuantType == STATIC else [quantised, scale]
    if param.layerType == PRENORM:
        return [x, x]
    return [x, quantised] if param.layerType == POSTNORM and post.quantType == INT8 else [x]


def _layer_axis(x: Desc, gamma: Desc, axis: int) -> None:
    require(len(gamma.shape) <= len(x.shape), DIM, "gamma has more dimensions than x", found=str(gamma),
            expected=str(x), tensor="input 1")  # fmt: skip
    rest = len(x.shape) - axis if axis >= 0 else -axis
    require_param(rest == len(gamma.shape), "beginNormAxis does not leave gamma's dimensions", found=str(axis),
                  expected=f"{len(x.shape) - len(gamma.shape)} for gamma {list(gamma.shape)}",
                  tensor="input 1")  # fmt: skip


def layer_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    used = {NORM: param.normParam, PRENORM: param.preNormParam, POSTNORM: param.postNormParam}[param.layerType]
    if param.layerType != NORM or used.quantType == INT8:  # the plain kernel does not look
        _check_epsilon(used.epsilon)


OP_MODE = Field(name="opMode", kind="uint", default=0)
ZOOM_SCALE = Field(name="zoomScaleValue", kind="float", default=1.0)

LAYER_NORM = AtbOp(
    name="LayerNorm",
    fields=(
        Field(name="layerType", kind="LayerNormType", default=0),
        struct(
            "normParam",
            QUANT,
            EPSILON,
            Field(name="beginNormAxis", kind="int", default=0),
            Field(name="beginParamsAxis", kind="int", default=0),
            DYNAMIC_QUANT,
        ),
        struct("preNormParam", QUANT, EPSILON, OP_MODE, ZOOM_SCALE),
        struct("postNormParam", QUANT, EPSILON, OP_MODE, ZOOM_SCALE),
    ),
    enums={
        "LayerNormType": {
            "LAYER_NORM_UNDEFINED": 0, "LAYER_NORM_NORM": 1, "LAYER_NORM_PRENORM": 2, "LAYER_NORM_POSTNORM": 3,
            "LAYER_NORM_MAX": 4,
        },
    },
    arity=layer_arity,
    check=layer_check,
    rows=layer_rows,
    shape=layer_shape,
    late=layer_late,
    source="atb-operations.md 3.6",
)  # fmt: skip

OPS: tuple[AtbOp, ...] = (RMS_NORM, LAYER_NORM)
