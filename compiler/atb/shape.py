"""Gather, Split, Concat, Slice, Transpose, Transdata, Fill, Cumsum, Softmax and other data movement (3.1, 3.14).

In: parameters and input descs. Out: output descs, or the error that libatb gives at the same stage.

    split = next(op for op in OPS if op.name == "Split")
    split.infer(split.param({"splitDim": 1}), [Desc(dtype="float16", shape=(3, 8))], "Ascend910B")
    # [float16 nd [3, 4], float16 nd [3, 4]]

Sources: atb-operations.md 0, 3.1, 3.14; sources of ATB 8.5.0 under src/ops/ops_infer (order of checks, codes).
Most of these operations look at the output descs at Setup only in part, or not at all: `late` says what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from llmc.compiler.atb.core import DIM, DIM_NUM, MAX_DIM, SIZE, AtbOp, Desc, Field, Param, Row, require, require_param

INT64_MAX = 2**63 - 1

# Elements in the last dim of a FRACTAL_NZ block: 32 bytes (atb-operations.md 1.7).
NZ_LANES = {"float16": 16, "bfloat16": 16, "int8": 32, "float32": 16}


def same_dtype(*dtypes: str, tensors: int = 2) -> tuple[Row, ...]:
    """Rows in which all tensors have one dtype, e.g. input and output of a copy."""
    return tuple((dtype,) * tensors for dtype in dtypes)


def fixed(rows: Sequence[Row]) -> Callable[[Param, str], Sequence[Row]]:
    """A `rows` rule that depends on neither parameter nor chip."""
    return lambda param, chip: rows


def arity(inputs: int, outputs: int) -> Callable[[Param], tuple[int, int]]:
    return lambda param: (inputs, outputs)


def require_output(out: Desc, expected: Sequence[int], *, index: int = 0, rank_code: str = DIM) -> None:
    """Setup's check that an output has the inferred shape. `rank_code`: error when even the rank differs."""
    found, wanted = str(out), str(list(expected))
    require(len(out.shape) == len(expected), rank_code, "rank of the output", found=found, expected=wanted,
            tensor=f"output {index}")  # fmt: skip
    require(
        out.shape == tuple(expected), DIM, "shape of the output", found=found, expected=wanted, tensor=f"output {index}"
    )


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# Gather ---------------------------------------------------------------------------------------------------------------

GATHER_ROWS = tuple(
    (x, indices, x)
    for x in ("float16", "bfloat16", "int32", "float32", "uint32", "int64")
    for indices in ("int64", "int32", "uint32")
)


def gather_check(param: Param, chip: str) -> None:
    require_param(param.axis >= 0 and param.batchDims >= 0, "axis and batchDims must not be negative",
                  found=f"axis {param.axis}, batchDims {param.batchDims}")  # fmt: skip
    require_param(param.batchDims <= param.axis, "batchDims must not exceed axis",
                  found=f"axis {param.axis}, batchDims {param.batchDims}")  # fmt: skip


def gather_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    """x[:axis] ++ indices[batchDims:] ++ x[axis+1:]"""
    x, indices = ins[0].shape, ins[1].shape
    require_param(param.axis < len(x), "axis must be smaller than the rank of input 0",
                  found=f"axis {param.axis}", expected=f"below {len(x)}")  # fmt: skip
    require_param(param.batchDims <= len(indices), "batchDims must not exceed the rank of input 1",
                  found=f"batchDims {param.batchDims}", expected=f"at most {len(indices)}")  # fmt: skip
    rank = len(x) + len(indices) - 1 - param.batchDims
    require(rank <= MAX_DIM, DIM_NUM, "rank of the output", found=str(rank), expected=f"at most {MAX_DIM}")
    batch = slice(0, param.batchDims)
    require(x[batch] == indices[batch], DIM, "batch dims of inputs 0 and 1 differ",
            found=f"{ins[0]} and {ins[1]}", expected=f"the first {param.batchDims} dims equal")  # fmt: skip
    return [ins[0].with_shape((*x[: param.axis], *indices[param.batchDims :], *x[param.axis + 1 :]))]


def gather_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require_output(outs[0], gather_shape(param, ins, chip)[0].shape, rank_code=DIM_NUM)


GATHER = AtbOp(
    name="Gather",
    fields=(Field(name="axis", kind="int", default=0), Field(name="batchDims", kind="int", default=0)),
    arity=arity(2, 1),
    rows=fixed(GATHER_ROWS),
    shape=gather_shape,
    check=gather_check,
    late=gather_late,
    source="atb-operations.md 3.1; gather_operation.cpp",
)

# Split ----------------------------------------------------------------------------------------------------------------

SPLIT_ROWS = {
    2: same_dtype("float16", "int64", "bfloat16", tensors=3),
    3: same_dtype("float16", "bfloat16", tensors=4),
}


def split_check(param: Param, chip: str) -> None:
    require_param(param.splitNum in (2, 3), "splitNum", found=str(param.splitNum), expected="2 or 3")


def split_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    shape, sizes = ins[0].shape, list(param.splitSizes)
    dim = param.splitDim + len(shape) if param.splitDim < 0 else param.splitDim
    require_param(0 <= dim < len(shape), "splitDim", found=str(param.splitDim), expected=f"a dim of {ins[0]}")
    if sizes:
        require_param(
            param.splitDim >= 0, "splitDim must not be negative when splitSizes are given", found=str(param.splitDim)
        )
        require_param(len(sizes) == param.splitNum, "number of splitSizes",
                      found=str(len(sizes)), expected=f"splitNum, {param.splitNum}")  # fmt: skip
        require_param(min(sizes) >= 1, "splitSizes must be positive", found=str(sizes))
        require_param(sum(sizes) == shape[dim], "sum of splitSizes",
                      found=f"{sizes}: {sum(sizes)}", expected=f"{shape[dim]}, dim {dim} of {ins[0]}")  # fmt: skip
    else:
        require(shape[dim] % param.splitNum == 0, DIM, "the split dim does not divide",
                found=f"dim {dim} of {ins[0]}", expected=f"a multiple of {param.splitNum}")  # fmt: skip
        sizes = [shape[dim] // param.splitNum] * param.splitNum
    return [ins[0].with_shape((*shape[:dim], size, *shape[dim + 1 :])) for size in sizes]


SPLIT = AtbOp(
    name="Split",
    fields=(
        Field(name="splitDim", kind="int", default=0),
        Field(name="splitNum", kind="int", default=2),
        Field(name="splitSizes", kind="ints", default=()),
    ),
    arity=lambda param: (1, 2 if param.splitNum == 2 else 3),
    rows=lambda param, chip: SPLIT_ROWS[2 if param.splitNum == 2 else 3],
    shape=split_shape,
    check=split_check,
    source="atb-operations.md 3.14; split_operation.cpp",
)

# Concat ---------------------------------------------------------------------------------------------------------------


def concat_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    a, b = ins[0].shape, ins[1].shape
    dim = param.concatDim + len(a) if param.concatDim < 0 else param.concatDim
    require_param(0 <= dim < min(len(a), len(b)), "concatDim", found=str(param.concatDim),
                  expected=f"a dim of {ins[0]} and {ins[1]}")  # fmt: skip
    require((a[:dim], a[dim + 1 :]) == (b[:dim], b[dim + 1 :]), DIM, "inputs differ outside the concatenated dim",
            found=f"{ins[0]} and {ins[1]}", expected=f"equal except in dim {dim}")  # fmt: skip
    return [ins[0].with_shape((*a[:dim], a[dim] + b[dim], *a[dim + 1 :]))]


CONCAT = AtbOp(
    name="Concat",
    fields=(Field(name="concatDim", kind="int", default=0),),
    arity=arity(2, 1),
    rows=fixed(same_dtype("float16", "bfloat16", tensors=3)),
    shape=concat_shape,
    source="atb-operations.md 3.14; concat_operation.cpp",
)

# Slice ----------------------------------------------------------------------------------------------------------------


def slice_bounds(param: Param, shape: Sequence[int]) -> list[tuple[int, int]]:
    """(start, length) of each dim: a negative offset counts from the end, size -1 reaches to the end."""
    bounds = []
    for offset, size, dim in zip(param.offsets, param.size, shape, strict=True):
        start = offset + dim if offset < 0 else offset
        bounds.append((start, dim - start if size == -1 else size))
    return bounds


def slice_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    shape = ins[0].shape
    require_param(len(param.offsets) == len(param.size) == len(shape), "lengths of offsets and size",
                  found=f"{len(param.offsets)} and {len(param.size)}", expected=f"the rank of {ins[0]}")  # fmt: skip
    bounds = slice_bounds(param, shape)
    for dim, (offset, size, (start, length)) in enumerate(zip(param.offsets, param.size, bounds, strict=True)):
        legal = offset >= -shape[dim] and size >= -1 and start + length <= min(shape[dim], INT64_MAX)
        require_param(legal, f"slice of dim {dim} leaves the input", found=f"offset {offset}, size {size}",
                      expected=f"inside {ins[0]}")  # fmt: skip
    return [ins[0].with_shape([length for _, length in bounds])]


def slice_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require_output(outs[0], slice_shape(param, ins, chip)[0].shape)


SLICE = AtbOp(
    name="Slice",
    fields=(Field(name="offsets", kind="ints", default=()), Field(name="size", kind="ints", default=())),
    arity=arity(1, 1),
    rows=fixed(same_dtype("float16", "float32", "int8", "bool", "int32", "uint32", "bfloat16")),
    shape=slice_shape,
    late=slice_late,
    source="atb-operations.md 3.14; slice_operation.cpp",
)

# Transpose ------------------------------------------------------------------------------------------------------------


def transpose_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    rank = len(ins[0].shape)
    require_param(sorted(param.perm) == list(range(rank)), "perm", found=str(list(param.perm)),
                  expected=f"a permutation of 0..{rank - 1} for {ins[0]}")  # fmt: skip
    return [ins[0].with_shape([ins[0].shape[dim] for dim in param.perm])]


TRANSPOSE = AtbOp(
    name="Transpose",
    fields=(Field(name="perm", kind="ints", default=()),),
    arity=arity(1, 1),
    rows=fixed(same_dtype("float16", "int64", "bfloat16", "int8", "int32")),
    shape=transpose_shape,
    source="atb-operations.md 3.14; transpose_operation.cpp",
)

# Transdata ------------------------------------------------------------------------------------------------------------

NZ_TO_ND, ND_TO_NZ = 1, 2
TRANSDATA_ROWS = {
    ND_TO_NZ: tuple((dtype, f"{dtype}:nz") for dtype in ("float16", "int8", "bfloat16")),
    NZ_TO_ND: tuple((f"{dtype}:nz", dtype) for dtype in ("float16", "bfloat16")),
}


def nz_shape(desc: Desc) -> tuple[int, ...]:
    """[m, n] or [b, m, n] ND -> [b, ceil(n / n0), ceil16(m), n0]"""
    *batch, m, n = desc.shape
    lanes = NZ_LANES[desc.dtype]
    return (batch[0] if batch else 1, round_up(n, lanes) // lanes, round_up(m, 16), lanes)


def transdata_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    x, shape, crops = ins[0], ins[0].shape, list(param.outCrops)
    require_param(param.transdataType in (NZ_TO_ND, ND_TO_NZ), "transdataType", found=str(param.transdataType),
                  expected="FRACTAL_NZ_TO_ND (1) or ND_TO_FRACTAL_NZ (2)")  # fmt: skip
    if param.transdataType == ND_TO_NZ:
        require(len(shape) in (2, 3), DIM, "rank of the ND input", found=str(x), expected="2 or 3")
        return [Desc(dtype=x.dtype, shape=nz_shape(x), format="nz")]
    require(len(shape) == 4, DIM, "rank of the NZ input", found=str(x), expected="4")
    require_param(len(crops) == 2, "number of outCrops", found=str(len(crops)), expected="2")
    for crop, padded in zip(crops, (shape[2], shape[1] * shape[3]), strict=True):
        full = round_up(padded, 16)
        require_param(full - 16 < crop <= full and crop > 0, "outCrops must end inside the last block of 16",
                      found=str(crops), expected=f"{full - 15}..{full} where {crop} stands")  # fmt: skip
    return [Desc(dtype=x.dtype, shape=(shape[0], *crops))]


def transdata_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    rank = 4 if param.transdataType == ND_TO_NZ else 3
    require(len(outs[0].shape) == rank, DIM, "rank of the output", found=str(outs[0]), expected=str(rank))


TRANSDATA = AtbOp(
    name="Transdata",
    fields=(
        Field(name="transdataType", kind="TransdataType", default=0),
        Field(name="outCrops", kind="ints", default=(0, 0)),
    ),
    arity=arity(1, 1),
    rows=lambda param, chip: TRANSDATA_ROWS[ND_TO_NZ if param.transdataType == ND_TO_NZ else NZ_TO_ND],
    shape=transdata_shape,
    late=transdata_late,
    enums={"TransdataType": {"UNDEFINED": 0, "FRACTAL_NZ_TO_ND": NZ_TO_ND, "ND_TO_FRACTAL_NZ": ND_TO_NZ}},
    bound=False,
    source="atb-operations.md 1.7, 3.14; transdata_operation.cpp",
)

# Fill -----------------------------------------------------------------------------------------------------------------

FILL_MASK_ROWS = tuple((x, mask, x) for x in ("float16", "int32", "bfloat16") for mask in ("bool", "int8"))


def fill_check(param: Param, chip: str) -> None:
    require_param(len(param.value) == 1, "number of values", found=str(len(param.value)), expected="1")
    require_param(param.withMask or 1 <= len(param.outDim) <= MAX_DIM, "length of outDim",
                  found=str(len(param.outDim)), expected=f"1 to {MAX_DIM} without a mask")  # fmt: skip


def fill_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    if not param.withMask:
        return [Desc(dtype="float16", shape=tuple(param.outDim))]
    x, mask = ins[0].shape, ins[1].shape
    tail = x[len(x) - len(mask) :] if len(mask) <= len(x) else ()
    fits = len(tail) == len(mask) and all(m in (1, dim) for m, dim in zip(mask, tail, strict=True))
    require(fits, DIM, "the mask does not broadcast to the input", found=f"{ins[1]} on {ins[0]}")
    return [ins[0]]


def fill_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require_output(outs[0], fill_shape(param, ins, chip)[0].shape)


FILL = AtbOp(
    name="Fill",
    fields=(
        Field(name="withMask", kind="bool", default=True),
        Field(name="value", kind="floats", default=()),
        Field(name="outDim", kind="ints", default=()),
    ),
    arity=lambda param: (2 if param.withMask else 0, 1),
    rows=lambda param, chip: FILL_MASK_ROWS if param.withMask else (("float16",),),
    shape=fill_shape,
    check=fill_check,
    late=fill_late,
    source="atb-operations.md 3.14; fill_operation.cpp",
)

# Cumsum, Softmax ------------------------------------------------------------------------------------------------------


def cumsum_check(param: Param, chip: str) -> None:
    require_param(len(param.axes) == 1, "number of axes", found=str(len(param.axes)), expected="1")
    require_param(not param.reverse and not param.exclusive, "exclusive and reverse are not supported",
                  found=f"exclusive {param.exclusive}, reverse {param.reverse}")  # fmt: skip


def cumsum_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    require_param(0 <= param.axes[0] < len(ins[0].shape), "axis", found=str(param.axes[0]),
                  expected=f"a dim of {ins[0]}, counted from the front")  # fmt: skip
    return [ins[0]]


CUMSUM = AtbOp(
    name="Cumsum",
    fields=(
        Field(name="axes", kind="ints", default=()),
        Field(name="exclusive", kind="bool", default=False),
        Field(name="reverse", kind="bool", default=False),
    ),
    arity=arity(1, 1),
    rows=fixed(same_dtype("float16", "bfloat16")),
    shape=cumsum_shape,
    check=cumsum_check,
    source="atb-operations.md 3.14; cumsum_operation.cpp",
)


def softmax_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    axes, rank = list(param.axes), len(ins[0].shape)
    consecutive = all(b == a + 1 and b != 0 for a, b in pairwise(axes))
    require_param(
        bool(axes) and consecutive, "axes must be consecutive and ascending; -1 stands alone", found=str(axes)
    )
    require_param(all(-1 <= axis < rank for axis in axes), "axes", found=str(axes), expected=f"-1 to {rank - 1}")
    return [ins[0]]


SOFTMAX = AtbOp(
    name="Softmax",
    fields=(Field(name="axes", kind="ints", default=()),),
    arity=arity(1, 1),
    rows=fixed(same_dtype("float16", "float32", "bfloat16")),
    shape=softmax_shape,
    source="atb-operations.md 3.14; softmax_operation.cpp",
)

# AsStrided, Repeat, Where, SetValue, Reduce ---------------------------------------------------------------------------


def as_strided_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    size, stride, offset = list(param.size), list(param.stride), list(param.offset)
    require_param(len(size) <= MAX_DIM and len(size) == len(stride) and len(offset) == 1 and offset[0] >= 0,
                  "size and stride need equal lengths of at most 8, and one offset that is not negative",
                  found=f"size {size}, stride {stride}, offset {offset}")  # fmt: skip
    require_param(all(s > 0 for s in size) and all(s >= 0 for s in stride),
                  "sizes must be positive, strides not negative", found=f"size {size}, stride {stride}")  # fmt: skip
    last = offset[0] + sum((s - 1) * t for s, t in zip(size, stride, strict=True))
    require_param(last < ins[0].elements, "the view leaves the input", found=f"element {last}",
                  expected=f"below {ins[0].elements}, the elements of {ins[0]}")  # fmt: skip
    return [Desc(dtype=ins[0].dtype, shape=tuple(size))]


def as_strided_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require_output(outs[0], param.size, rank_code=SIZE)


AS_STRIDED = AtbOp(
    name="AsStrided",
    fields=tuple(Field(name=name, kind="ints", default=()) for name in ("size", "stride", "offset")),
    arity=arity(1, 1),
    rows=fixed(same_dtype("float16", "int64")),
    shape=as_strided_shape,
    late=as_strided_late,
    source="atb-operations.md 3.14; as_strided_operation.cpp",
)


MAX_INT64 = 2**63 - 1


def repeat_check(param: Param, chip: str) -> None:
    require_param(len(param.multiples) <= MAX_DIM and all(m > 0 for m in param.multiples),
                  "multiples must be at most 8 positive numbers", found=str(list(param.multiples)))  # fmt: skip


def repeat_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    shape, multiples = ins[0].shape, list(param.multiples)
    require(len(shape) <= len(multiples), DIM, "the input has more dims than multiples",
            found=f"{ins[0]}, multiples {multiples}")  # fmt: skip
    # The library pairs the leading multiples with the dims here, though it repeats aligned to the right.
    repeated = sum(m > 1 and dim > 1 for m, dim in zip(multiples, shape, strict=False))
    require(repeated + len(multiples) <= MAX_DIM, DIM, "too many repeated dims",
            found=f"{len(multiples)} dims, {repeated} repeated", expected=f"together at most {MAX_DIM}")  # fmt: skip
    padded = (1,) * (len(multiples) - len(shape)) + shape
    repeats = [m * dim for m, dim in zip(multiples, padded, strict=True)]
    require_param(max(repeats) <= MAX_INT64, "a repeated dim overflows", found=f"{ins[0]}, multiples {multiples}",
                  expected="at most 2^63 - 1")  # fmt: skip
    return [ins[0].with_shape(repeats)]


def repeat_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require(len(outs[0].shape) == len(param.multiples), DIM, "rank of the output", found=str(outs[0]),
            expected=str(len(param.multiples)))  # fmt: skip


REPEAT = AtbOp(
    name="Repeat",
    fields=(Field(name="multiples", kind="ints", default=()),),
    arity=arity(1, 1),
    rows=fixed(same_dtype("float16", "bfloat16")),
    shape=repeat_shape,
    check=repeat_check,
    late=repeat_late,
    bound=False,
    source="atb-operations.md 3.14; repeat_operation.cpp",
)


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """numpy's rule; None when the shapes do not fit."""
    rank = max(len(a), len(b))
    pairs = list(zip((1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b), strict=True))
    if any(x != y and 1 not in (x, y) for x, y in pairs):
        return None
    return tuple(y if x == 1 else x for x, y in pairs)


def where_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    condition, x, y = (desc.shape for desc in ins)
    require(broadcast(condition, x) == x and broadcast(condition, y) == y, DIM,
            "the condition does not broadcast to inputs 1 and 2", found=", ".join(map(str, ins)))  # fmt: skip
    shape = broadcast(x, y)
    require(shape is not None, DIM, "inputs 1 and 2 do not broadcast", found=f"{ins[1]} and {ins[2]}")
    return [ins[1].with_shape(shape or ())]


def where_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    require_output(outs[0], where_shape(param, ins, chip)[0].shape, rank_code=DIM_NUM)


WHERE = AtbOp(
    name="Where",
    fields=(),
    arity=arity(3, 1),
    rows=fixed((("int8", "float16", "float16", "float16"),)),
    shape=where_shape,
    late=where_late,
    bound=False,
    source="atb-operations.md 3.14; where_operation.cpp",
)


def set_value_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    """No output: the kernel writes input 0."""
    dst, src = ins[0].shape, ins[1].shape
    require(len(dst) == len(src), DIM_NUM, "inputs differ in rank", found=f"{ins[0]} and {ins[1]}")
    starts, ends, strides = list(param.starts), list(param.ends), list(param.strides)
    require_param(len(starts) == len(ends) == len(strides) == len(dst), "lengths of starts, ends and strides",
                  found=f"{len(starts)}, {len(ends)}, {len(strides)}", expected=f"the rank of {ins[0]}")  # fmt: skip
    require(all(s <= d for s, d in zip(src, dst, strict=True)), DIM, "input 1 is larger than input 0",
            found=f"{ins[0]} and {ins[1]}")  # fmt: skip
    require_param(all(stride == 1 for stride in strides), "strides must be 1", found=str(strides))
    inside = all(
        0 <= start < end <= d and end - start == s for start, end, s, d in zip(starts, ends, src, dst, strict=True)
    )
    require_param(inside, "starts and ends do not cover input 1 inside input 0",
                  found=f"starts {starts}, ends {ends}", expected=f"{ins[1]} inside {ins[0]}")  # fmt: skip
    differing = sum(s != d for s, d in zip(src[1:], dst[1:], strict=True))
    require(differing == 1, DIM, "exactly one dim after the first must differ between the inputs",
            found=f"{ins[0]} and {ins[1]}")  # fmt: skip
    return []


SET_VALUE = AtbOp(
    name="SetValue",
    fields=tuple(Field(name=name, kind="ints", default=()) for name in ("starts", "ends", "strides")),
    arity=arity(2, 0),
    rows=fixed(same_dtype("float16", "float32", "int32", "int64", "bfloat16")),
    shape=set_value_shape,
    writes=lambda param: frozenset({0}),
    bound=False,
    source="atb-operations.md 1.3, 3.14; set_value_operation.cpp",
)

REDUCE_MAX, REDUCE_MIN, REDUCE_SUM = 1, 2, 3


def reduce_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    axes, rank = list(param.axis), len(ins[0].shape)
    require_param(param.reduceType in (REDUCE_MAX, REDUCE_MIN, REDUCE_SUM), "reduceType", found=str(param.reduceType))
    require_param(1 <= len(axes) <= rank and all(0 <= axis < rank for axis in axes), "axis", found=str(axes),
                  expected=f"one or more of 0..{rank - 1}")  # fmt: skip
    return [ins[0].with_shape([size for dim, size in enumerate(ins[0].shape) if dim not in axes])]


REDUCE = AtbOp(
    name="Reduce",
    fields=(
        Field(name="reduceType", kind="ReduceType", default=0),
        Field(name="axis", kind="ints", default=()),
    ),
    arity=arity(1, 1),
    rows=lambda param, chip: (
        same_dtype("float16", "bfloat16") if param.reduceType == REDUCE_SUM else same_dtype("int32", "bfloat16")
    ),
    shape=reduce_shape,
    enums={"ReduceType": {"REDUCE_UNDEFINED": 0, "REDUCE_MAX": 1, "REDUCE_MIN": 2, "REDUCE_SUM": 3}},
    bound=False,
    source="atb-operations.md 3.14; reduce_operation.cpp",
)

OPS: tuple[AtbOp, ...] = (
    GATHER, SPLIT, CONCAT, SLICE, TRANSPOSE, TRANSDATA, FILL, CUMSUM, SOFTMAX,
    AS_STRIDED, REPEAT, WHERE, SET_VALUE, REDUCE,
)  # fmt: skip
