"""What one entry of the ATB table says, and the order in which libatb asks it.

An `AtbOp` describes one operation in C++ field names; the Python (torch_atb) names are derived. All rules are plain
functions over `Param` and `Desc`, with no torch: the compiler runs them on sample sizes and hostatb on real tensors.

    op = OPS["Linear"]
    param = op.param({"hasBias": False})                      # defaults filled in, unknown fields refused
    op.create(param, chip="Ascend910B")                       # stage create: raises AtbError
    outs = op.infer(param, [x, weight], chip="Ascend910B")    # stage infer:  output descs
    op.setup(param, [x, weight], outs, chip="Ascend910B")     # stage setup

Source of the order of checks: reference of ATB 8.5.0, sections 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHIPS = ("Ascend910B", "Ascend310P", "host")  # `host`: rules of 910B, and float32 wherever a 16-bit float is allowed

# Limits of the graph layer (atb-operations.md 1.2, data/atb-layers/segments.json).
MAX_DIM = 8
MAX_TENSOR_BYTES = 256 * 2**30
GRAPH_LIMITS = {"inputs": 256, "outputs": 256, "internals": 256, "nodes": 256}
MAX_NODES_AT_CREATE = 1024

DTYPE_BYTES = {
    "float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "uint8": 1, "bool": 1, "int16": 2, "uint16": 2,
    "int32": 4, "uint32": 4, "int64": 8, "uint64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip
FLOATS16 = ("float16", "bfloat16")

# Error codes of libatb (include/atb/types.h), and one for what it only logs.
ERROR_CODES = (
    "NO_ERROR", "ERROR_INVALID_PARAM", "ERROR_INVALID_GRAPH", "ERROR_INTERNAL_ERROR", "ERROR_RT_FAIL",
    "ERROR_INVALID_IN_TENSOR_NUM", "ERROR_INVALID_TENSOR_DTYPE", "ERROR_INVALID_TENSOR_FORMAT",
    "ERROR_INVALID_TENSOR_DIM", "ERROR_INVALID_TENSOR_SIZE", "ERROR_OPERATION_NULL_RUNNER",
    "ERROR_GRAPH_INFERSHAPE_FUNC_FAIL", "ERROR_CANN_ERROR", "ERROR_INVALID_TENSOR_INI_MATCH",
    "ERROR_INVALID_TENSOR_ADDR", "ERROR_INVALID_TENSOR_NUM", "ERROR_INVALID_TENSOR_DIM_NUM",
    "ERROR_INVALID_SINGLE_OPERATION_PARAM", "ERROR_GRAPH_NODE_RESHAPE_FUNC_FAIL", "ERROR_INVALID_GRAPH_NODE_CHUNK",
    "ERROR_INVALID_CONTEXT_ADDR", "ERROR_INVALID_STREAM", "ERROR_INVALID_WORKSPACE_SIZE",
    "ERROR_INVALID_WORKSPACE_ADDR", "ERROR_INVALID_OPERATION_ADDR", "ERROR_HCCL_FAIL", "ERROR_OUT_OF_DEVICE_MEMORY",
    "ERROR_OUT_OF_HOST_MEMORY", "ERROR_COMM_EMPTY", "NO_ERROR_BUT_LOGGED",
)  # fmt: skip
LOGGED = "NO_ERROR_BUT_LOGGED"  # the library logs the failed tiling and says NO_ERROR; the kernel cannot run
DIM, DIM_NUM, SIZE = "ERROR_INVALID_TENSOR_DIM", "ERROR_INVALID_TENSOR_DIM_NUM", "ERROR_INVALID_TENSOR_SIZE"


@dataclass(frozen=True, kw_only=True)
class Desc:
    """What ATB knows of a tensor: dtype ("float16"), format ("nd" or "nz"), shape; the shape () is an empty tensor."""

    dtype: str
    shape: tuple[int, ...]
    format: str = "nd"

    def __str__(self) -> str:
        return f"{self.dtype} {self.format} [{', '.join(map(str, self.shape))}]"

    @property
    def elements(self) -> int:
        count = 1
        for dim in self.shape:
            count *= dim
        return count if self.shape else 0

    def with_shape(self, shape: Sequence[int]) -> Desc:
        return Desc(dtype=self.dtype, shape=tuple(shape), format=self.format)


class AtbError(RuntimeError):
    """What libatb would refuse, with its code and stage ("create", "infer", "setup", "execute").

    A RuntimeError, because that is what torch_atb raises in its place."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        found: str = "",
        expected: str = "",
        stage: str = "",
        tensor: str = "",
    ) -> None:
        if code not in ERROR_CODES:
            raise KeyError(f"{code} is not an error code of libatb")
        super().__init__(message)
        self.code, self.message, self.found, self.expected = code, message, found, expected
        self.stage, self.tensor, self.operation, self.graph, self.place = stage, tensor, "", "", ""

    def at(self, **where: str) -> AtbError:
        """Fill in stage, tensor, operation, graph or place, unless a level below has said it; returns the error."""
        for name, value in where.items():
            if not getattr(self, name):
                setattr(self, name, value)
        return self

    def __str__(self) -> str:
        where = " ".join(part for part in (self.graph, self.operation) if part)
        text = f"{where + ': ' if where else ''}{self.code} at {self.stage or 'check'}: {self.message}"
        for label in ("tensor", "found", "expected", "place"):
            if value := getattr(self, label):
                text += f"\n  {label}: {value}"
        return text


def require(condition: bool, code: str, message: str, **more: str) -> None:
    """Raise AtbError(code, message) unless the condition holds; `more`: found=, expected=, tensor=."""
    if not condition:
        raise AtbError(code, message, **more)


def require_param(condition: bool, message: str, **more: str) -> None:
    require(condition, "ERROR_INVALID_PARAM", message, **more)


def require_dim(condition: bool, message: str, found: object, expected: object = "", tensor: str = "") -> None:
    require(condition, DIM, message, found=str(found), expected=str(expected), tensor=tensor)


def require_dim_nums(named: Mapping[str, Desc], legal: Mapping[str, tuple[int, ...]]) -> None:
    """Each named tensor that is there has a legal number of dimensions, in the order of `legal`."""
    for name, counts in legal.items():
        if name in named:
            require(len(named[name].shape) in counts, DIM_NUM, "number of dimensions", found=str(named[name]),
                    expected=" or ".join(map(str, counts)), tensor=name)  # fmt: skip


class Param:
    """Parameter values of one operation: C++ field names as attributes, enums as ints, nested structs as Param."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Param) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return f"Param({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"

    def __getattr__(self, name: str) -> Any:  # for type checkers; real fields live in __dict__
        raise AttributeError(f"this operation has no parameter {name!r}")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a param struct. `kind`: "int", "uint", "float", "bool", "str", "ints" (list of integers), "floats",
    "dtype" (AclDataType as int), "pointer", the name of an enum, or "struct" (`fields` says what is inside). An enum
    is one of `ENUMS` (torch_atb's top level, or "OtherParam.Enum"), or one of the operation's own `enums`.
    `python` is torch_atb's name where it is not the snake_case of `name`; `python_default` where the binding's default
    differs from C++; `bound=False`: the field exists in C++ only."""

    name: str
    kind: str
    default: Any = None
    fields: tuple[Field, ...] = ()
    struct: str = ""  # torch_atb's class of a nested struct, e.g. "NormParam"
    python: str = ""
    python_default: Any = None
    bound: bool = True

    @property
    def python_name(self) -> str:
        return self.python or snake_case(self.name)


def struct(name: str, *fields: Field, python: str = "") -> Field:
    """A nested struct. torch_atb's class is called like the field: normParam is a RmsNormParam.NormParam."""
    return Field(name=name, kind="struct", struct=name[0].upper() + name[1:], fields=fields, python=python)


def snake_case(name: str) -> str:
    """'kvHeadNum' -> 'kv_head_num', 'transposeA' -> 'transpose_a', 'commDomain' -> 'comm_domain'."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


# Enum name -> {member: value}. Names are torch_atb's; "Param.Enum" marks an enum nested in a param class.
ENUMS: dict[str, dict[str, int]] = {
    "AclDataType": {
        "ACL_DT_UNDEFINED": -1, "ACL_FLOAT": 0, "ACL_FLOAT16": 1, "ACL_INT8": 2, "ACL_INT32": 3, "ACL_UINT8": 4,
        "ACL_INT16": 6, "ACL_UINT16": 7, "ACL_UINT32": 8, "ACL_INT64": 9, "ACL_UINT64": 10, "ACL_DOUBLE": 11,
        "ACL_BOOL": 12, "ACL_STRING": 13, "ACL_COMPLEX64": 16, "ACL_COMPLEX128": 17, "ACL_BF16": 27,
        "ACL_INT4": 29, "ACL_UINT1": 30, "ACL_COMPLEX32": 33,
    },
    "AclFormat": {
        "ACL_FORMAT_UNDEFINED": -1, "ACL_FORMAT_NCHW": 0, "ACL_FORMAT_NHWC": 1, "ACL_FORMAT_ND": 2,
        "ACL_FORMAT_NC1HWC0": 3, "ACL_FORMAT_FRACTAL_Z": 4, "ACL_FORMAT_NC1HWC0_C04": 12, "ACL_FORMAT_HWCN": 16,
        "ACL_FORMAT_NDHWC": 27, "ACL_FORMAT_FRACTAL_NZ": 29, "ACL_FORMAT_NCDHW": 30, "ACL_FORMAT_NDC1HWC0": 32,
        "ACL_FRACTAL_Z_3D": 33,
    },
    "QuantType": {  # of the norms
        "QUANT_UNQUANT": 0, "QUANT_INT4": 1, "QUANT_INT8": 2, "QUANT_INT16": 3, "QUANT_FLOAT8": 4, "QUANT_FLOAT16": 5,
    },
    "DynamicQuantType": {
        "DYNAMIC_QUANT_UNDEFINED": 0, "DYNAMIC_QUANT_SYMMETRIC": 1, "DYNAMIC_QUANT_ASYMMETRIC": 2,
    },
    "InputLayout": {"TYPE_BSND": 0, "TYPE_BNSD": 1},
    "ActivationType": {
        "ACTIVATION_UNDEFINED": 0, "ACTIVATION_RELU": 1, "ACTIVATION_GELU": 2, "ACTIVATION_FAST_GELU": 3,
        "ACTIVATION_SWISH": 4, "ACTIVATION_LOG": 5, "ACTIVATION_SWIGLU_FORWARD": 6, "ACTIVATION_SWIGLU_BACKWARD": 7,
        "ACTIVATION_SIGMOID": 8, "ACTIVATION_FASTER_GELU_FORWARD": 9, "ACTIVATION_MAX": 10,
    },
    "CommMode": {"COMM_UNDEFINED": -1, "COMM_MULTI_PROCESS": 0, "COMM_MULTI_THREAD": 1},
    "ReshapeAndCacheParam.QuantType": {  # AllReduce's, registered there by the binding (reference 2.2)
        "QUANT_TYPE_UNQUANT": 0, "QUANT_TYPE_UNDEFINED": 0, "QUANT_TYPE_PER_TENSOR": 1, "QUANT_TYPE_PER_CHANNEL": 2,
        "QUANT_TYPE_MAX": 3,
    },
}  # fmt: skip

ACL_DTYPE = {
    -1: "undefined", 0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16",
    8: "uint32", 9: "int64", 10: "uint64", 11: "float64", 12: "bool", 27: "bfloat16",
}  # fmt: skip
ACL_UNDEFINED, ACL_FLOAT, ACL_FLOAT16, ACL_BF16 = -1, 0, 1, 27  # the numbers that rules name

Row = tuple[str, ...]  # one legal combination, a word a tensor: "float16", or "int8:nz" for another format than nd


@dataclass(frozen=True, kw_only=True)
class AtbOp:
    """One operation of ATB. The rule functions take (param, chip) and raise AtbError; see the module's docstring.

    arity    -> (number of inputs, number of outputs)
    rows     -> legal (dtype[:format]) combinations, inputs then outputs, for this chip and parameter choice.
                None: the table of the library has no section for it and nothing is checked.
    shape    -> output descs from input descs; raises for shapes that InferShape refuses
    check    parameter rules at creation
    late     rules that only Setup applies (optional)
    host     indices of inputs whose host copy the library reads (must be CPU tensors with torch_atb)
    empty    indices of inputs that may be empty tensors
    in_place {output index: input index}: the kernel writes only part of that output, so the output must be the input
             tensor itself (caches of ReshapeAndCache)
    writes   indices of inputs that the operation writes without naming them as outputs (flash caches, KvCache)
    """

    name: str  # "Linear"
    fields: tuple[Field, ...]
    arity: Callable[[Param], tuple[int, int]]
    rows: Callable[[Param, str], Sequence[Row] | None]
    shape: Callable[[Param, Sequence[Desc], str], Sequence[Desc]]
    check: Callable[[Param, str], None] = lambda param, chip: None
    late: Callable[[Param, Sequence[Desc], Sequence[Desc], str], None] = lambda param, ins, outs, chip: None
    host: Callable[[Param, str], frozenset[int]] = lambda param, chip: frozenset()
    empty: Callable[[Param], frozenset[int]] = lambda param: frozenset()
    in_place: Callable[[Param], Mapping[int, int]] = lambda param: {}
    writes: Callable[[Param], frozenset[int]] = lambda param: frozenset()
    enums: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # nested in the param class, own names
    chips: tuple[str, ...] = CHIPS  # chips on which the operation exists at all
    bound: bool = True  # torch_atb has a Param class for it
    source: str = ""  # where the facts come from

    @property
    def param_class(self) -> str:
        """torch_atb's class, e.g. "LinearParam"."""
        return f"{self.name}Param"

    @property
    def cpp_name(self) -> str:
        """The library's operation name, e.g. "LinearOperation"."""
        return f"{self.name}Operation"

    def param(self, values: Mapping[str, Any] | None = None) -> Param:
        """Fill in the C++ defaults. Unknown fields, and values that a field cannot hold, raise AtbError
        (ERROR_INVALID_PARAM)."""
        with at_stage("create", self.name):
            return _fill(self.fields, values or {}, self.name)

    def create(self, param: Param, chip: str) -> None:
        """Stage create."""
        with at_stage("create", self.name):
            check_reserved(param)
            self.check(param, chip)

    def infer(self, param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
        """Stage infer shape: input count, tensor limits, dtype/format rows of the inputs, shape rule."""
        with at_stage("infer", self.name):
            check_count(self.arity(param)[0], ins)
            check_tensors(ins, self.empty(param))
            check_rows(self.rows(param, chip), ins, sum(self.arity(param)), self.empty(param), chip)
            return list(self.shape(param, ins, chip))

    def setup(self, param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
        """Stage setup: rows of inputs and outputs together, late rules, output shapes as inferred."""
        with at_stage("setup", self.name):
            n_in, n_out = self.arity(param)
            check_count(n_in, ins)
            require(len(outs) == n_out, "ERROR_INVALID_IN_TENSOR_NUM", "number of outputs",
                    found=str(len(outs)), expected=str(n_out))  # fmt: skip
            check_tensors(outs, self.empty(param), n_in, "output")
            check_rows(self.rows(param, chip), [*ins, *outs], n_in + n_out, self.empty(param), chip)
            self.late(param, ins, outs, chip)
            for index, (out, inferred) in enumerate(zip(outs, self.shape(param, ins, chip), strict=True)):
                require(out.shape == inferred.shape, "ERROR_INVALID_TENSOR_DIM", "an output is not as inferred",
                        found=str(out), expected=str(inferred), tensor=f"output {index}")  # fmt: skip


class at_stage:
    """Puts the stage and the operation's name on an AtbError that passes through."""

    def __init__(self, stage: str, operation: str) -> None:
        self.stage, self.operation = stage, operation

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, AtbError):
            error.at(stage=self.stage, operation=self.operation)


def check_reserved(param: Param) -> None:
    """The reserved bytes `rsv` of a struct, nested ones too, must be zero (reference 1.1)."""
    for name, value in vars(param).items():
        if isinstance(value, Param):
            check_reserved(value)
        elif name == "rsv":
            require_param(not any(value), "the reserved bytes `rsv` must be zero", found=str(value))


def _fill(fields: Sequence[Field], values: Mapping[str, Any], owner: str) -> Param:
    known = {f.name for f in fields} | {"rsv"}
    unknown = sorted(set(values) - known)
    require_param(
        not unknown,
        f"{owner} has no parameter {', '.join(unknown)}",
        expected=", ".join(sorted(known)),
    )
    filled: dict[str, Any] = {"rsv": values.get("rsv", ())}
    for f in fields:
        if f.kind == "struct":
            filled[f.name] = _fill(f.fields, values.get(f.name, {}), f"{owner}.{f.name}")
        else:
            default = list(f.default) if isinstance(f.default, (list, tuple)) else f.default
            filled[f.name] = values.get(f.name, default)
            if f.name in values:
                _check_kind(f, filled[f.name], owner)
    return Param(filled)


# What a field's C++ type holds; every kind that is not here is an integer of 64 bits.
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (int, float), "floats": (int, float), "str": (str,), "pointer": (object,),
}  # fmt: skip
_RANGES = {"uint": (0, 2**32 - 1), "bool": (0, 1)}
_INT64 = (-(2**63), 2**63 - 1)


def _check_kind(f: Field, value: Any, owner: str) -> None:
    types, (low, high) = _TYPES.get(f.kind, (int,)), _RANGES.get(f.kind, _INT64)
    items = value if f.kind in ("ints", "floats") else [value]
    fits = isinstance(items, (list, tuple)) and all(isinstance(item, types) for item in items)
    if fits and types == (int,):
        fits = all(low <= item <= high for item in items)
    require_param(fits, f"{owner}.{f.name} cannot hold this value", found=repr(value), expected=f.kind)


def check_count(expected: int, ins: Sequence[Desc]) -> None:
    require(len(ins) == expected, "ERROR_INVALID_IN_TENSOR_NUM", "number of inputs",
            found=str(len(ins)), expected=str(expected))  # fmt: skip


def check_tensors(descs: Sequence[Desc], empty: frozenset[int], first: int = 0, kind: str = "input") -> None:
    """1 to 8 dims, non-zero and at most 256 GiB, unless the slot may be empty (reference section 0, tensor_check.cpp).

    `empty` counts inputs, then outputs; `first`: the number in it of descs[0]."""
    for index, desc in enumerate(descs):
        if first + index in empty and desc.elements == 0:
            continue
        name = f"{kind} {index}"
        require(1 <= len(desc.shape) <= MAX_DIM, "ERROR_INVALID_TENSOR_DIM", "number of dimensions",
                found=str(len(desc.shape)), expected=f"1 to {MAX_DIM}", tensor=name)  # fmt: skip
        size = desc.elements * DTYPE_BYTES.get(desc.dtype, 1) if min(desc.shape) > 0 else 0
        require(0 < size <= MAX_TENSOR_BYTES, "ERROR_INVALID_TENSOR_SIZE", "size of the tensor",
                found=f"{desc}: {size} bytes", expected="1 byte to 256 GiB", tensor=name)  # fmt: skip


def check_rows(
    rows: Sequence[Row] | None, descs: Sequence[Desc], tensors: int, empty: frozenset[int], chip: str
) -> None:
    """The (dtype, format) tuple must equal one row in its first len(descs) columns; empty tensors are skipped. A row of
    another length than the operation's number of tensors never fits: some parameters add an input that no row has.

    A row that has bf16 is then refused on 310P with ERROR_INVALID_TENSOR_DTYPE (reference section 0)."""
    if rows is not None:
        _check_match([row for row in rows if len(row) == tensors], descs, empty, chip)
    for index, desc in enumerate(descs):
        require(not (chip == "Ascend310P" and desc.dtype == "bfloat16"), "ERROR_INVALID_TENSOR_DTYPE",
                f"{chip} has no bfloat16", found=str(desc), tensor=f"tensor {index}")  # fmt: skip


def _check_match(rows: Sequence[Row], descs: Sequence[Desc], empty: frozenset[int], chip: str) -> None:
    words = [
        None if (i in empty and d.elements == 0) else (d.dtype if d.format == "nd" else f"{d.dtype}:{d.format}")
        for i, d in enumerate(descs)
    ]
    candidates = [*rows, *(as_float32(row) for row in rows)] if chip == "host" else rows
    if any(all(w is None or w == c for w, c in zip(words, row, strict=False)) for row in candidates):
        return
    raise AtbError(
        "ERROR_INVALID_TENSOR_INI_MATCH",
        "no row of the dtype/format table fits these tensors",
        found=", ".join("(empty)" if w is None else w for w in words),
        expected=" | ".join(", ".join(row[: len(words)]) for row in dict.fromkeys(rows)),
    )


def as_float32(row: Row) -> Row:
    """The row of chip `host` that a 16-bit float row gives: every 16-bit float becomes float32."""
    return tuple(re.sub("bfloat16|float16", "float32", word) for word in row)
