"""AllReduce, AllGather, ReduceScatter, Broadcast, LinearParallel (atb-operations.md 3.3, 3.17, 4).

In: parameters and input descs. Out: output descs, or the error that libatb gives at the same stage.

    gather.infer(gather.param({"rankSize": 2}), [Desc(dtype="float16", shape=(3, 512))], "Ascend910B")
    # [float16 nd [2, 3, 512]]: a leading dim is added

The library counts the devices at creation; here the machine has `DEVICE_COUNT`, as in the checks of data/atb-layers.
Sources: atb-operations.md 0, 3.3, 3.17, 4; sources of ATB 8.5.0 under src/ops/ops_infer and src/kernels/lcal (order of
checks, codes); data/atb-layers/refusals.json (what Setup says without a communicator).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmc.compiler.atb.core import (
    ACL_DTYPE,
    ACL_FLOAT16,
    ACL_UNDEFINED,
    DIM,
    DIM_NUM,
    MAX_DIM,
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
from llmc.compiler.atb.shape import arity, require_output, same_dtype

DEVICE_COUNT = 8
MAX_DOMAIN_TEXT = 128
MAX_DOMAIN_ID = 65535
MIN_DOMAIN_MBYTES = 200
DOMAIN_TEXT = re.compile(r"([0-9]+)(?::([0-9]+))?", re.ASCII)
# Rank 0 of lccl (and lcoc) listens on 127.0.0.1 at this port plus commDomain, cut to 16 bits; LCAL_COMM_ID=ip:port
# gives another one (LcalSockExchange::GetIpAndPort of ATB 8.5.0, src/kernels/lcal/src/tools/socket).
LCCL_PORT = 10067
PORTS = (1024, 65535)  # that a process may listen on without being root (Linux, ip_unprivileged_port_start)
DTYPE = "ERROR_INVALID_TENSOR_DTYPE"
INI = "ERROR_INVALID_TENSOR_INI_MATCH"

# Communication fields in the order of torch_atb's keyword arguments (bindings.cpp); `kind` of CommMode is an enum.
RANKS = tuple(Field(name=name, kind="int", default=0) for name in ("rank", "rankSize", "rankRoot"))
COMM = Field(name="hcclComm", kind="pointer")
MODE = Field(name="commMode", kind="CommMode", default=0)
TABLE = Field(name="rankTableFile", kind="str", default="")
DOMAIN = Field(name="commDomain", kind="str", default="")


def backend(default: str) -> Field:
    return Field(name="backend", kind="str", default=default)


# Communication parameters ---------------------------------------------------------------------------------------------


def check_backend(param: Param, known: Sequence[str]) -> None:
    require_param(param.backend in known, "backend", found=repr(param.backend), expected=" or ".join(known))


def check_communicator(param: Param) -> None:
    """A rank table file or an existing communicator replaces the checks of rank and size."""
    require_param(param.commMode in (0, 1), "commMode", found=str(param.commMode),
                  expected="COMM_MULTI_PROCESS (0) or COMM_MULTI_THREAD (1)")  # fmt: skip
    require_param(len(param.commDomain) <= MAX_DOMAIN_TEXT, "length of commDomain", found=str(len(param.commDomain)),
                  expected=f"at most {MAX_DOMAIN_TEXT}")  # fmt: skip
    if param.rankTableFile:
        require_param(os.path.exists(param.rankTableFile), "rankTableFile does not exist", found=param.rankTableFile)
        return
    if param.hcclComm is not None:
        return
    require_param(0 < param.rankSize <= DEVICE_COUNT, "rankSize", found=str(param.rankSize),
                  expected=f"1 to {DEVICE_COUNT}, the number of devices")  # fmt: skip
    for name in ("rank", "rankRoot"):
        value = getattr(param, name)
        require_param(0 <= value < param.rankSize, name, found=str(value), expected=f"0 to {param.rankSize - 1}")


def check_reduction(kind: str, param: Param) -> None:
    require_param(
        kind in ("sum", "prod", "max", "min"), "kind of reduction", found=repr(kind), expected="sum, prod, max or min"
    )
    require_param(not (param.backend == "lccl" and kind == "prod"), "lccl has no prod")


def domain_fits(param: Param) -> bool:
    """lccl and lcoc between processes take no text: "", a number up to 65535, or "id:megabytes" (at least 200)."""
    if param.backend not in ("lccl", "lcoc") or param.commMode != 0 or not param.commDomain:
        return True
    match = DOMAIN_TEXT.fullmatch(param.commDomain)
    if not match:
        return False
    return int(match[1]) <= MAX_DOMAIN_ID and (match[2] is None or int(match[2]) >= MIN_DOMAIN_MBYTES)


def lccl_port(environment: Mapping[str, str]) -> int:
    """The port to which lccl adds commDomain. A text that it cannot read it ignores."""
    match = re.match(r"[^:]*:\s*\+?0*([0-9]{1,5})(?![0-9])", environment.get("LCAL_COMM_ID", ""))
    return int(match[1]) if match and int(match[1]) <= PORTS[1] else LCCL_PORT


def lccl_domain(own: int, base: int) -> int:
    """A commDomain for the run that owns the port `own`: base + commDomain is a port to listen on, and not `own`. Runs
    get different ones if their ports lie less than 65536 - max(1024, base) apart: 55469, for the usual base."""
    first = max(0, PORTS[0] - base)
    count = PORTS[1] + 1 - base - first
    domain = own % count
    if base + first + domain == own:
        domain = (domain + 1) % count
    return first + domain


def domain_problem(domain: str, base: int) -> str:
    """Why lccl cannot run with this commDomain; "" if it can. libatb accepts more (`domain_fits`), and then gets
    another port or none."""
    match = DOMAIN_TEXT.fullmatch(domain or "0")
    if not match or (match[2] is not None and int(match[2]) < MIN_DOMAIN_MBYTES):
        return f"it must be a number, or number:megabytes with at least {MIN_DOMAIN_MBYTES}"
    low, high = (max(0, port - base) for port in PORTS)
    if low <= int(match[1]) <= high:
        return ""
    return (
        f"lccl listens on port {base} + domain, which must be {PORTS[0]} to {PORTS[1]}: a number from {low} to {high}"
    )


def check_reduced_dtype(param: Param, kind: str, x: Desc, chip: str) -> None:
    """What the two backends cannot reduce, although the table of dtypes lists it (atb-operations.md 4)."""
    lacking: tuple[str, ...] = ()
    if param.backend == "lccl":
        lacking = ("int64",)
    elif chip == "Ascend310P":
        lacking = ("int64", "bfloat16") if kind == "sum" else ("int64", "bfloat16", "int16")
    elif kind == "prod":
        lacking = ("int16", "bfloat16")
    require(x.dtype not in lacking, DTYPE, f"{param.backend} {kind} on {chip} has no {x.dtype}", found=str(x),
            tensor="input 0")  # fmt: skip


COLLECTIVE_ROWS = same_dtype("float16", "float32", "int8", "int16", "int32", "int64", "bfloat16")

# AllReduce ------------------------------------------------------------------------------------------------------------

PER_TENSOR, PER_CHANNEL = 1, 2
MAX_CHANNELS = 1 << 22


def all_reduce_check(param: Param, chip: str) -> None:
    check_backend(param, ("hccl", "lccl"))
    if param.quantType:
        require_param(param.quantType in (PER_TENSOR, PER_CHANNEL), "quantType", found=str(param.quantType),
                      expected="0, 1 (per tensor) or 2 (per channel)")  # fmt: skip
        require_param(param.backend == "lccl" and param.allReduceType == "sum" and param.outDataType == ACL_FLOAT16,
                      "a quantised AllReduce is an lccl sum with outDataType ACL_FLOAT16",
                      found=f"{param.backend}, {param.allReduceType}, {param.outDataType}")  # fmt: skip
    require_param(not (param.backend == "lccl" and chip == "Ascend310P"), "Ascend310P has hccl only", found="lccl")
    check_communicator(param)
    check_reduction(param.allReduceType, param)


def all_reduce_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x = ins[0]
    check_reduced_dtype(param, param.allReduceType, x, chip)
    if not param.quantType:
        return [x]
    scale, offset, n = ins[1].shape, ins[2].shape, x.shape[-1]
    require(n % 16 == 0, DIM, "last dim of input 0", found=str(x), expected="a multiple of 16")
    require(offset == (1,), DIM, "offset", found=str(ins[2]), expected="[1]", tensor="input 2")
    require(len(scale) <= 2, DIM_NUM, "rank of the scale", found=str(ins[1]), expected="1 or 2", tensor="input 1")
    if param.quantType == PER_TENSOR:
        require(scale == (1,), DIM, "scale", found=str(ins[1]), expected="[1]", tensor="input 1")
    else:
        require(n <= MAX_CHANNELS, DIM, "channels", found=str(n), expected=f"at most {MAX_CHANNELS}")
        require(
            scale in ((n,), (1, n)), DIM, "scale", found=str(ins[1]), expected=f"[{n}] or [1, {n}]", tensor="input 1"
        )
    return [Desc(dtype=ACL_DTYPE[param.outDataType], shape=x.shape, format=x.format)]


def all_reduce_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require_output(outs[0], ins[0].shape)


ALL_REDUCE = AtbOp(
    name="AllReduce",
    fields=(
        *RANKS,
        Field(name="allReduceType", kind="str", default="sum"),
        backend("hccl"),
        COMM,
        MODE,
        TABLE,
        DOMAIN,
        Field(name="quantType", kind="ReshapeAndCacheParam.QuantType", default=0),  # the binding registers it there
        Field(name="outDataType", kind="dtype", default=ACL_UNDEFINED),
    ),
    arity=lambda param: (3 if param.quantType else 1, 1),
    rows=lambda param, chip: (("int8", "float16", "float16", "float16"),) if param.quantType else COLLECTIVE_ROWS,
    shape=all_reduce_shape,
    check=all_reduce_check,
    late=all_reduce_late,
    source="atb-operations.md 3.17, 4; all_reduce_operation.cpp",
)

# AllGather ------------------------------------------------------------------------------------------------------------


def all_gather_check(param: Param, chip: str) -> None:
    check_backend(param, ("hccl", "lccl"))
    require_param(not (param.backend == "lccl" and chip == "Ascend310P"), "Ascend310P has hccl only", found="lccl")
    check_communicator(param)


def all_gather_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    require(len(ins[0].shape) < MAX_DIM, DIM, "rank of input 0", found=str(ins[0]), expected=f"below {MAX_DIM}")
    return [ins[0].with_shape((param.rankSize, *ins[0].shape))]


def all_gather_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    found = outs[0].shape
    require(len(found) == len(ins[0].shape) + 1 and found[0] == param.rankSize, DIM, "output", found=str(outs[0]),
            expected=f"[{param.rankSize}, ...], one dim more than {ins[0]}")  # fmt: skip


ALL_GATHER = AtbOp(
    name="AllGather",
    fields=(*RANKS, backend("hccl"), COMM, MODE, TABLE, DOMAIN),
    arity=arity(1, 1),
    rows=lambda param, chip: COLLECTIVE_ROWS,
    shape=all_gather_shape,
    check=all_gather_check,
    late=all_gather_late,
    source="atb-operations.md 3.17, 4; all_gather_operation.cpp",
)

# ReduceScatter --------------------------------------------------------------------------------------------------------


def reduce_scatter_check(param: Param, chip: str) -> None:
    check_backend(param, ("hccl", "lccl"))
    require_param(chip != "Ascend310P", "Ascend310P has no ReduceScatter", found=chip)
    check_reduction(param.reduceType, param)
    check_communicator(param)


def reduce_scatter_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    first, *rest = ins[0].shape
    require(first % param.rankSize == 0, DIM, "first dim of input 0", found=str(ins[0]),
            expected=f"a multiple of rankSize, {param.rankSize}")  # fmt: skip
    check_reduced_dtype(param, param.reduceType, ins[0], chip)
    return [ins[0].with_shape((first // param.rankSize, *rest))]


def reduce_scatter_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    x, out = ins[0].shape, outs[0].shape
    require(len(x) == len(out) and x[0] == param.rankSize * out[0], DIM, "output", found=str(outs[0]),
            expected=f"[{x[0] // param.rankSize}, ...] for {ins[0]}")  # fmt: skip


REDUCE_SCATTER = AtbOp(
    name="ReduceScatter",
    fields=(
        *RANKS,
        Field(name="reduceType", kind="str", default="sum"),
        COMM,
        MODE,
        backend("lccl"),
        TABLE,
        DOMAIN,
    ),
    arity=arity(1, 1),
    rows=lambda param, chip: [row for row in COLLECTIVE_ROWS if row[0] != "int64"],
    shape=reduce_scatter_shape,
    check=reduce_scatter_check,
    late=reduce_scatter_late,
    chips=("Ascend910B", "host"),
    source="atb-operations.md 3.17, 4; reduce_scatter_operation.cpp",
)

# Broadcast ------------------------------------------------------------------------------------------------------------


def broadcast_check(param: Param, chip: str) -> None:
    require_param(chip != "Ascend310P", "Ascend310P has no Broadcast", found=chip)
    check_backend(param, ("hccl", "lccl"))
    check_communicator(param)


BROADCAST = AtbOp(
    name="Broadcast",
    fields=(*RANKS, COMM, MODE, backend("hccl"), TABLE, DOMAIN),
    arity=arity(1, 0),  # ranks other than rankRoot are written in place
    rows=lambda param, chip: [row[:1] for row in COLLECTIVE_ROWS],
    shape=lambda param, ins, chip: [],
    check=broadcast_check,
    writes=lambda param: frozenset({0}),
    chips=("Ascend910B", "host"),
    source="atb-operations.md 3.17, 4; broadcast_operation.cpp",
)

# LinearParallel -------------------------------------------------------------------------------------------------------

LINEAR_ALL_REDUCE, LINEAR_REDUCE_SCATTER, ALL_GATHER_LINEAR, PURE_LINEAR, ALL_GATHER_LINEAR_REDUCE_SCATTER = range(5)
MOE_TYPES = (5, 6)  # ALLTOALLVC_ALL_GATHER_GMM, GMM_REDUCE_SCATTER_ALLTOALLVC; not in torch_atb's enum
UNQUANT, LINEAR_PER_TENSOR, LINEAR_PER_CHANNEL, LINEAR_PER_GROUP, LINEAR_PER_TOKEN = range(-1, 4)
MAX_MOE_ROWS, MAX_MOE_K = 204800, 24000
LCOC_LIMITS = {"m": 10_000_000, "n": 100_000, "k": 100_000}  # lcoc_args.h


def fused(param: Param) -> bool:
    """lcoc and mc2 are one kernel; hccl and lccl a Linear and an AllReduce, whatever `type` says."""
    return param.backend in ("lcoc", "mc2")


def is_quant(param: Param) -> bool:
    return (
        fused(param)
        and param.type != ALL_GATHER_LINEAR_REDUCE_SCATTER
        and LINEAR_PER_TENSOR <= param.quantType <= LINEAR_PER_TOKEN
    )


def linear_parallel_check(param: Param, chip: str) -> None:
    check_communicator(param)
    check_backend(param, ("hccl", "lccl", "lcoc", "mc2"))
    if param.backend == "mc2":
        require_param(not param.hasResidual, "mc2 takes no residual")
        require_param(param.commMode == 1, "mc2 needs commMode COMM_MULTI_THREAD", found=str(param.commMode))
        require_param(param.quantType == UNQUANT, "mc2 is not quantised", found=str(param.quantType))
        require_param(param.type == LINEAR_REDUCE_SCATTER, "type of mc2", found=str(param.type),
                      expected="LINEAR_REDUCE_SCATTER (1)")  # fmt: skip
    if param.backend != "lcoc":
        return
    size = param.rankSize
    require_param(size > 0 and size & (size - 1) == 0, "rankSize of lcoc", found=str(size), expected="a power of two")
    require_param(0 <= param.type <= max(MOE_TYPES), "type", found=str(param.type), expected="0 to 6")
    require_param(param.type == ALL_GATHER_LINEAR or not param.keepIntermediate,
                  "keepIntermediate is for ALL_GATHER_LINEAR (2) only", found=f"type {param.type}")  # fmt: skip
    require_param(param.quantType != LINEAR_PER_TOKEN or param.type in (LINEAR_ALL_REDUCE, *MOE_TYPES),
                  "per-token quantisation is for types 0, 5 and 6 only", found=f"type {param.type}")  # fmt: skip
    if param.type in MOE_TYPES:
        moe = param.moeInfo
        require_param(moe.epSize * moe.tpSize == size, "epSize x tpSize", found=f"{moe.epSize} x {moe.tpSize}",
                      expected=f"rankSize, {size}")  # fmt: skip
        require_param(
            1 <= moe.localExpertNums <= 16, "localExpertNums", found=str(moe.localExpertNums), expected="1 to 16"
        )
        require_param(param.quantType in (UNQUANT, LINEAR_PER_CHANNEL, LINEAR_PER_TOKEN), "quantType of types 5 and 6",
                      found=str(param.quantType), expected="-1, 1 or 3")  # fmt: skip


def linear_parallel_inputs(param: Param) -> list[str]:
    """Names of the inputs in order."""
    names, moe = ["x", "weight"], param.type in MOE_TYPES
    if is_quant(param):
        names += ["scale"] if moe else ["bias", "scale"]
    if param.hasResidual:
        names.append("residual")
    if is_quant(param) and param.quantType == LINEAR_PER_TOKEN:
        names.append("perTokenScale")
    return [*names, "globalTokensPerExpertMatrix", "maxOutputSize"] if moe else names


# (x, weight, dtype of the output) of a float product, and (x, weight, bias, scale, output) of a quantised one.
FLOAT_ROWS = (("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float16:nz"))
FUSED_ROWS = (*FLOAT_ROWS, ("bfloat16", "bfloat16:nz"))
INT8_ROWS = tuple(
    ("int8", weight, "int32", scale, out)
    for weight in ("int8", "int8:nz")
    for scale, out in (("int64", "float16"), ("int64", "bfloat16"), ("float32", "bfloat16"))
)
QUANT_ROWS = (
    ("float16", "int8", "float16", "float16", "float16"),
    ("bfloat16", "int8", "bfloat16", "bfloat16", "bfloat16"),
    *INT8_ROWS,
)


def linear_parallel_rows(param: Param, chip: str) -> list[Row] | None:
    moe, quant = param.type in MOE_TYPES, is_quant(param)
    if fused(param) and param.hasResidual and not quant and not moe:
        return None  # the sections are misspelt ("LinearParallelCoverOperation..."), so nothing is checked
    if fused(param) and param.keepIntermediate and quant:
        return None  # no such section
    rows: Sequence[Row] = FUSED_ROWS if fused(param) else FLOAT_ROWS
    if quant:
        rows = QUANT_ROWS
    if moe:
        rows = INT8_ROWS if quant else FLOAT_ROWS[:2] if fused(param) else ()
    elif param.keepIntermediate:
        rows = FLOAT_ROWS[:2]
    return [_row(param, row, linear_parallel_inputs(param)) for row in rows]


def _row(param: Param, row: Row, inputs: Sequence[str]) -> Row:
    out = row[-1] if is_quant(param) else row[0]
    word = {
        "x": row[0], "weight": row[1], "residual": out, "perTokenScale": "float32",
        "globalTokensPerExpertMatrix": "int32", "maxOutputSize": "int32",
    }  # fmt: skip
    if is_quant(param):
        word |= {"bias": row[2], "scale": row[3]}
    outputs = (out, row[0]) if param.keepIntermediate else (out,)
    return (*(word[name] for name in inputs), *outputs)


def weight_dims(weight: Desc, transposed: bool) -> tuple[int, int]:
    """(k, n). Transposed weights are [n, k]; 4-D NZ weights [b, k/k0, n16, k0], otherwise [b, n/n0, k16, n0]."""
    shape = weight.shape
    if len(shape) < 2:
        return (0, 0)
    rows, columns = (shape[2], shape[1] * shape[3]) if len(shape) == 4 else shape[-2:]
    return (columns, rows) if transposed else (rows, columns)


def check_product(param: Param, x: Desc, ins: Sequence[Desc]) -> None:
    """Ranks, batch, k, NZ blocks, bias and scale. Every failure is ERROR_INVALID_TENSOR_DIM."""
    weight, names = ins[1], linear_parallel_inputs(param)
    require(len(x.shape) in (2, 3), DIM, "rank of x", found=str(x), expected="2 or 3", tensor="input 0")
    ranks = (2, 4) if weight.format == "nz" else (2, 3)
    require(len(weight.shape) in ranks, DIM, "rank of the weight", found=str(weight), tensor="input 1",
            expected=f"{ranks[0]} or {ranks[1]}")  # fmt: skip
    require(len(weight.shape) == 2 or weight.shape[0] == 1, DIM, "batch of the weight", found=str(weight),
            expected="1", tensor="input 1")  # fmt: skip
    k, n = weight_dims(weight, param.transWeight)
    require(x.shape[-1] == k, DIM, "k of x and weight differ", found=f"{x} and {weight}", expected=f"last dim of x {k}")
    if len(weight.shape) == 4:
        lanes = 32 if is_quant(param) else 16
        require(weight.shape[2] % 16 == 0 and weight.shape[3] == lanes, DIM, "blocks of the NZ weight",
                found=str(weight), expected=f"[1, blocks, a multiple of 16, {lanes}]", tensor="input 1")  # fmt: skip
    groups = -(-k // param.quantGroupSize) if param.quantGroupSize else 1
    for name in ("bias", "scale"):
        if name in names and not (name == "bias" and ins[names.index(name)].elements == 0):
            last = 1 if param.quantType == LINEAR_PER_TENSOR else n
            _check_vector(ins[names.index(name)], last, groups, name)


def _check_vector(desc: Desc, last: int, first: int, name: str) -> None:
    fits = desc.shape in ((last,), (first, last))
    require(fits, DIM, name, found=str(desc), expected=f"[{last}] or [{first}, {last}]", tensor=name)


def check_residual(param: Param, ins: Sequence[Desc]) -> None:
    """A row [n] or [1, n]. The library looks at the last input, which with per-token scales is not the residual."""
    if not param.hasResidual:
        return
    index = len(ins) - 1
    if param.type in MOE_TYPES and fused(param):
        index = len(ins) - (4 if is_quant(param) else 3)
    _check_vector(ins[index], weight_dims(ins[1], param.transWeight)[1], 1, "residual")


def _check_scale_dtype(param: Param, ins: Sequence[Desc], index: int) -> None:
    """float32 scales give no float16. The library reads the input even where it does not exist, and then throws."""
    if not LINEAR_PER_TENSOR <= param.quantType <= LINEAR_PER_TOKEN:
        return
    require(index < len(ins), "ERROR_OUT_OF_HOST_MEMORY", "quantType is set, but this form has no scale",
            found=f"quantType {param.quantType}, {len(ins)} inputs", expected="quantType -1")  # fmt: skip
    require(not (ins[index].dtype == "float32" and param.outDataType == ACL_FLOAT16), INI,
            "float32 scales do not give float16", found=str(ins[index]), expected="int64", tensor="scale")  # fmt: skip


def linear_parallel_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    kind = param.type if fused(param) else LINEAR_ALL_REDUCE
    x = ins[0]
    if kind in MOE_TYPES:
        _check_moe(param, ins)
    elif kind == ALL_GATHER_LINEAR:
        _check_scale_dtype(param, ins, 3)
        check_product(param, x, ins)
    elif kind == ALL_GATHER_LINEAR_REDUCE_SCATTER:
        _check_two_dim(param, ins)
    else:
        check_product(param, x, ins)
        _check_scale_dtype(param, ins, 3)
        if param.backend == "mc2":
            require(len(x.shape) == len(ins[1].shape) == 2, DIM_NUM, "mc2 takes 2-D tensors", found=f"{x} and {ins[1]}")
            require(256 <= x.shape[-1] < 65535, DIM, "k of mc2", found=str(x), expected="256 to 65534")
    check_residual(param, ins)
    outs = [_product(param, ins, kind)]
    if param.keepIntermediate:
        outs.append(x.with_shape((x.shape[0] * param.rankSize, *x.shape[1:])))
    return outs


def _check_moe(param: Param, ins: Sequence[Desc]) -> None:
    _check_scale_dtype(param, ins, 2)
    matrix, rows, moe = ins[-2].shape, ins[-1].shape[0], param.moeInfo
    require(len(matrix) > 1 and matrix[-2:] == (moe.epSize, moe.epSize * moe.localExpertNums), DIM,
            "globalTokensPerExpertMatrix", found=str(ins[-2]),
            expected=f"[{moe.epSize}, {moe.epSize * moe.localExpertNums}]")  # fmt: skip
    require(rows <= MAX_MOE_ROWS, SIZE, "maxOutputSize", found=str(rows), expected=f"at most {MAX_MOE_ROWS}")
    require(ins[0].shape[-1] <= MAX_MOE_K, SIZE, "k", found=str(ins[0]), expected=f"at most {MAX_MOE_K}")


def _check_two_dim(param: Param, ins: Sequence[Desc]) -> None:
    grid = param.twoDimTPInfo
    require_param(grid.agDim * grid.rsDim == param.rankSize and grid.rsDim > 0, "agDim x rsDim",
                  found=f"{grid.agDim} x {grid.rsDim}", expected=f"rankSize, {param.rankSize}")  # fmt: skip
    check_product(param, ins[0], ins)
    m = ins[0].shape[-2]
    require(m * grid.agDim % grid.rsDim == 0, DIM, "rows of x times agDim", found=f"{m} x {grid.agDim}",
            expected=f"a multiple of rsDim, {grid.rsDim}")  # fmt: skip


def _product(param: Param, ins: Sequence[Desc], kind: int) -> Desc:
    """x [m, k] or [b, m, k] -> [.., m, n], with the first dim changed as `kind` says."""
    x, n = ins[0], weight_dims(ins[1], param.transWeight)[1]
    dtype = x.dtype if param.outDataType == ACL_UNDEFINED else ACL_DTYPE.get(param.outDataType, "undefined")
    shape = [*x.shape[:-1], n]
    if kind == LINEAR_REDUCE_SCATTER:
        cut = 1 if shape[0] == 1 else 0
        require(shape[cut] % param.rankSize == 0, DIM, f"dim {cut} of the product", found=str(shape),
                expected=f"a multiple of rankSize, {param.rankSize}")  # fmt: skip
        shape[cut] //= param.rankSize
    elif kind == ALL_GATHER_LINEAR:
        shape[0] *= param.rankSize
    elif kind == ALL_GATHER_LINEAR_REDUCE_SCATTER:
        shape[0] = shape[0] * param.twoDimTPInfo.agDim // max(1, param.twoDimTPInfo.rsDim)
    elif kind in MOE_TYPES:
        shape[0] = ins[-1].shape[0]
    return Desc(dtype=dtype, shape=tuple(shape), format=x.format)


def linear_parallel_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    """Setup asks by `type` alone: hccl and lccl fail here with another type than LINEAR_ALL_REDUCE or PURE_LINEAR."""
    x = ins[0]
    if param.type in (LINEAR_ALL_REDUCE, PURE_LINEAR):
        require_param(
            not (x.dtype == "int8" and param.quantType == LINEAR_PER_GROUP), "an int8 product has no per-group scales"
        )
    if param.type in MOE_TYPES:
        require(
            len(x.shape) == len(outs[0].shape) == 2, DIM, "x and the output must be 2-D", found=f"{x} and {outs[0]}"
        )
    else:
        expected = _product(param, ins, param.type)
        if param.type in (LINEAR_REDUCE_SCATTER, ALL_GATHER_LINEAR) and param.outDataType != ACL_UNDEFINED:
            require(
                outs[0].dtype == expected.dtype, INI, "dtype of the output", found=str(outs[0]), expected=expected.dtype
            )
        require_output(outs[0], expected.shape)
    require(
        not (param.backend == "lccl" and chip == "Ascend310P"),
        "ERROR_INVALID_SINGLE_OPERATION_PARAM",  # of our choice: the library has no check, and its communicator fails
        "lccl does not know this chip",
        found=chip,
        expected="backend hccl",
    )
    if param.backend == "lcoc":
        _check_lcoc_setup(param, ins, chip)


def _check_lcoc_setup(param: Param, ins: Sequence[Desc], chip: str) -> None:
    require(domain_fits(param), "ERROR_COMM_EMPTY", "commDomain of lcoc", found=repr(param.commDomain),
            expected="empty, a number up to 65535, or id:megabytes")  # fmt: skip
    refused = "ERROR_INVALID_SINGLE_OPERATION_PARAM"
    require(
        chip != "Ascend310P", refused, "the fused kernel does not know this chip", found=chip, expected="backend hccl"
    )
    k, n = weight_dims(ins[1], param.transWeight)
    sizes = {"m": ins[0].elements // ins[0].shape[-1], "n": n, "k": k}
    for name, size in sizes.items():
        require(size <= LCOC_LIMITS[name], refused, f"{name} of lcoc", found=str(size),
                expected=f"at most {LCOC_LIMITS[name]}")  # fmt: skip


def _linear_parallel_empty(param: Param) -> frozenset[int]:
    names = linear_parallel_inputs(param)
    return frozenset({names.index("bias")}) if "bias" in names else frozenset()


LINEAR_PARALLEL = AtbOp(
    name="LinearParallel",
    fields=(
        Field(name="transWeight", kind="bool", default=True),
        *RANKS,
        Field(name="hasResidual", kind="bool", default=False),
        backend("hccl"),
        COMM,
        MODE,
        TABLE,
        Field(name="type", kind="ParallelType", default=LINEAR_ALL_REDUCE),
        Field(name="keepIntermediate", kind="bool", default=False),
        Field(name="quantType", kind="QuantType", default=UNQUANT),
        Field(name="quantGroupSize", kind="int", default=0),
        Field(name="outDataType", kind="dtype", default=ACL_UNDEFINED),
        DOMAIN,
        struct(
            "twoDimTPInfo",
            Field(name="agDim", kind="uint", default=0),
            Field(name="rsDim", kind="uint", default=0),
            Field(name="innerDimIsAg", kind="uint", default=1),
            python="two_dim_TP_info",
        ),
        struct(
            "moeInfo",
            *(
                Field(name=name, kind="int", default=1, python=name, python_default=0)
                for name in ("localExpertNums", "epSize", "tpSize")
            ),
        ),
    ),
    arity=lambda param: (len(linear_parallel_inputs(param)), 2 if param.keepIntermediate else 1),
    rows=linear_parallel_rows,
    shape=linear_parallel_shape,
    check=linear_parallel_check,
    late=linear_parallel_late,
    empty=_linear_parallel_empty,
    enums={
        "ParallelType": {
            "UNDEFINED": -1,
            "LINEAR_ALL_REDUCE": LINEAR_ALL_REDUCE,
            "LINEAR_REDUCE_SCATTER": LINEAR_REDUCE_SCATTER,
            "ALL_GATHER_LINEAR": ALL_GATHER_LINEAR,
            "PURE_LINEAR": PURE_LINEAR,
            "ALL_GATHER_LINEAR_REDUCE_SCATTER": ALL_GATHER_LINEAR_REDUCE_SCATTER,
            "MAX": 7,
        },
        "QuantType": {
            "QUANT_TYPE_UNDEFINED": UNQUANT,
            "QUANT_TYPE_UNQUANT": UNQUANT,
            "QUANT_TYPE_PER_TENSOR": LINEAR_PER_TENSOR,
            "QUANT_TYPE_PER_CHANNEL": LINEAR_PER_CHANNEL,
            "QUANT_TYPE_PER_GROUP": LINEAR_PER_GROUP,
            "QUANT_TYPE_PER_TOKEN": LINEAR_PER_TOKEN,
            "QUANT_TYPE_MAX": 4,
        },
    },
    source="atb-operations.md 3.3, 4; linear_parallel_operation.cpp, lcoc.cpp; data/atb-layers/refusals.json",
)


def fused_param(communicator: Mapping[str, Any]) -> dict[str, Any]:
    """LinearParallel of x [T, k] @ weight [n, k] as in the checkpoint, summed over the ranks."""
    return {**communicator, "transWeight": True, "type": LINEAR_ALL_REDUCE}


OPS: tuple[AtbOp, ...] = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, LINEAR_PARALLEL)
