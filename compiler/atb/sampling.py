"""Sort, Multinomial, TopkToppSampling (atb-operations.md 3.15).

In: parameters and input descs. Out: output descs, or the error that libatb gives at the same stage.

    sort.infer(sort.param({"num": [8]}), [Desc(dtype="float16", shape=(5, 64))], "Ascend910B")
    # [float16 nd [5, 8], int32 nd [5, 8]]

Sources: atb-operations.md 0 and 3.15; sources of ATB 8.5.0 under src/ops/ops_infer (order of checks, codes).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.compiler.atb.core import DIM, DIM_NUM, AtbOp, Desc, Field, Param, Row, require, require_param
from llmc.compiler.atb.shape import arity, fixed, require_output

# Sort -----------------------------------------------------------------------------------------------------------------

SORT_SMALL_K, SORT_MAX_DIM_310P = 16, 580_000_000  # sort_operation.cpp: limit of the other dims when k < 16


def sort_rows(param: Param, chip: str) -> tuple[Row, ...]:
    dtypes = ("float16", "bfloat16") if chip == "Ascend310P" else ("float16", "bfloat16", "float32")
    return tuple((dtype, dtype, "int32") for dtype in dtypes)


def sort_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    """The k = num[0] largest of the last axis, and their indices."""
    shape, num = ins[0].shape, list(param.num)
    require_param(len(num) == 1, "length of num", found=str(len(num)), expected="1")
    require_param(0 < num[0] <= shape[-1], "num", found=str(num[0]), expected=f"1 to {shape[-1]}, last dim of {ins[0]}")
    if chip == "Ascend310P" and num[0] < SORT_SMALL_K:
        require(max(shape[:-1], default=0) <= SORT_MAX_DIM_310P, DIM, "a dim before the last is too large",
                found=str(ins[0]), expected=f"at most {SORT_MAX_DIM_310P}")  # fmt: skip
    out = (*shape[:-1], num[0])
    return [ins[0].with_shape(out), Desc(dtype="int32", shape=out, format=ins[0].format)]


SORT = AtbOp(
    name="Sort",
    fields=(Field(name="num", kind="ints", default=()),),
    arity=arity(1, 2),
    rows=sort_rows,
    shape=sort_shape,
    bound=False,
    source="atb-operations.md 3.15; sort_operation.cpp",
)

# Multinomial ----------------------------------------------------------------------------------------------------------

MAX_SAMPLES = 64


def multinomial_check(param: Param, chip: str) -> None:
    require_param(chip != "Ascend310P", "Multinomial runs on Ascend910B only", found=chip)
    require_param(
        param.numSamples <= MAX_SAMPLES, "numSamples", found=str(param.numSamples), expected=f"at most {MAX_SAMPLES}"
    )


def multinomial_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    require(len(ins[0].shape) == 2, DIM, "rank of the probabilities", found=str(ins[0]), expected="2: [B, V]")
    return [Desc(dtype="int32", shape=(ins[0].shape[0], param.numSamples), format=ins[0].format)]


def multinomial_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    shape = multinomial_shape(param, ins, chip)[0].shape
    require_param(param.numSamples <= ins[0].shape[1], "more samples than probabilities", found=str(param.numSamples),
                  expected=f"at most {ins[0].shape[1]}, last dim of {ins[0]}")  # fmt: skip
    require_output(outs[0], shape)


MULTINOMIAL = AtbOp(
    name="Multinomial",
    fields=(Field(name="numSamples", kind="uint", default=1), Field(name="randSeed", kind="uint", default=0)),
    arity=arity(1, 1),
    rows=fixed((("float16", "int32"),)),
    shape=multinomial_shape,
    check=multinomial_check,
    late=multinomial_late,
    chips=("Ascend910B", "host"),
    source="atb-operations.md 3.15; multinomial_operation.cpp",
)

# TopkToppSampling -----------------------------------------------------------------------------------------------------

SINGLE, MULTINOMIAL_BATCH, EXPONENTIAL, MULTINOMIAL_LOGPROBS, EXPONENTIAL_LOGPROBS = range(5)
LOGPROBS_TYPES = (MULTINOMIAL_LOGPROBS, EXPONENTIAL_LOGPROBS)
MAX_SAMPLING_BATCH = 512
MAX_LOGPROBS = 16384

# Inputs of each type; "like" means the dtype of probs.
SAMPLING_INPUTS = {
    SINGLE: ("like", "like"),  # probs [B, V], topp [B, 1]
    MULTINOMIAL_BATCH: ("like", "int32", "like"),  # probs, topk [B, 1], topp
    EXPONENTIAL: ("like", "int32", "like", "like"),  # probs, topk, topp, exp [B, V]
    MULTINOMIAL_LOGPROBS: ("like", "int32", "like", "float32"),  # probs, topk, topp, rand [B, 1]
    EXPONENTIAL_LOGPROBS: ("like", "int32", "like", "like"),
}


def sampling_rows(param: Param, chip: str) -> tuple[Row, ...]:
    kind = param.topkToppSamplingType
    outputs = ("int32", "like", "float32") if kind in LOGPROBS_TYPES else ("int32", "like")
    words = (*SAMPLING_INPUTS[kind], *outputs)
    return tuple(tuple(dtype if w == "like" else w for w in words) for dtype in ("float16", "bfloat16"))


def sampling_check(param: Param, chip: str) -> None:
    require_param(param.topkToppSamplingType in SAMPLING_INPUTS, "topkToppSamplingType",
                  found=str(param.topkToppSamplingType), expected="0 to 4")  # fmt: skip


def sampling_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    kind = param.topkToppSamplingType
    for index, desc in enumerate(ins):
        require(len(desc.shape) == 2, DIM_NUM, "rank", found=str(desc), expected="2", tensor=f"input {index}")
    batch, vocabulary = ins[0].shape
    if kind == SINGLE:
        require_param(param.topk <= vocabulary, "topk", found=str(param.topk), expected=f"at most {vocabulary}")
        require(ins[1].shape[1] == 1, DIM, "last dim of topp", found=str(ins[1]), expected="1")
    if kind == MULTINOMIAL_BATCH:
        require_param(len(param.randSeeds) == batch, "number of randSeeds", found=str(len(param.randSeeds)),
                      expected=f"{batch}, one a row of {ins[0]}")  # fmt: skip
    if kind == MULTINOMIAL_LOGPROBS:
        require(ins[3].shape == (batch, 1), DIM, "random numbers", found=str(ins[3]), expected=f"[{batch}, 1]")
    if kind in LOGPROBS_TYPES:
        require_param(0 <= param.logProbsSize <= min(vocabulary, MAX_LOGPROBS), "logProbsSize",
                      found=str(param.logProbsSize), expected=f"0 to {min(vocabulary, MAX_LOGPROBS)}")  # fmt: skip
    if kind in (EXPONENTIAL, EXPONENTIAL_LOGPROBS):
        require(ins[3].shape == ins[0].shape, DIM, "input 3 must have the shape of the probabilities",
                found=str(ins[3]), expected=str(ins[0]))  # fmt: skip
    if kind != SINGLE:
        require(ins[1].shape == ins[2].shape == (batch, 1), DIM, "topk and topp",
                found=f"{ins[1]} and {ins[2]}", expected=f"[{batch}, 1]")  # fmt: skip
    require(batch <= MAX_SAMPLING_BATCH, DIM, "batch", found=str(batch), expected=f"at most {MAX_SAMPLING_BATCH}")
    outs = [Desc(dtype="int32", shape=(batch, 1)), ins[0].with_shape((batch, 1))]
    if kind in LOGPROBS_TYPES:
        outs.append(Desc(dtype="float32", shape=(batch, param.logProbsSize)))
    return outs


def sampling_late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    """The outputs must agree with each other; that their batch is the input's is not looked at."""
    logprobs = param.topkToppSamplingType in LOGPROBS_TYPES
    skipped = 2 if logprobs and param.logProbsSize == 0 else None
    for index, desc in enumerate(outs):
        require(len(desc.shape) == 2 or index == skipped, DIM_NUM, "rank", found=str(desc), expected="2",
                tensor=f"output {index}")  # fmt: skip
    require(outs[0].shape == outs[1].shape == (outs[0].shape[0], 1), DIM, "outputs 0 and 1",
            found=f"{outs[0]} and {outs[1]}", expected=f"[{ins[0].shape[0]}, 1]")  # fmt: skip
    require(not logprobs or not param.logProbsSize or outs[2].shape[1] == param.logProbsSize, DIM, "logprobs",
            found=str(outs[-1]), expected=f"last dim {param.logProbsSize}")  # fmt: skip
    sampling_shape(param, ins, chip)


def sampling_arity(param: Param) -> tuple[int, int]:
    kind = param.topkToppSamplingType
    return len(SAMPLING_INPUTS.get(kind, ())), 3 if kind in LOGPROBS_TYPES else 2


def sampling_empty(param: Param) -> frozenset[int]:
    """The logprobs output, counted after the inputs, may be empty (`optional` in the library's table)."""
    n_in, n_out = sampling_arity(param)
    return frozenset({n_in + 2}) if n_out == 3 else frozenset()


TOPK_TOPP_SAMPLING = AtbOp(
    name="TopkToppSampling",
    fields=(
        Field(name="topkToppSamplingType", kind="TopkToppSamplingType", default=0),
        Field(name="randSeeds", kind="ints", default=()),
        Field(name="randSeed", kind="uint", default=0),
        Field(name="topk", kind="uint", default=100),
        Field(name="logProbsSize", kind="int", default=0),
    ),
    arity=sampling_arity,
    rows=sampling_rows,
    shape=sampling_shape,
    check=sampling_check,
    late=sampling_late,
    empty=sampling_empty,
    enums={
        "TopkToppSamplingType": {
            "SAMPLING_UNDEFINED": -1,
            "SINGLE_TOPK_SAMPLING": SINGLE,
            "BATCH_TOPK_MULTINOMIAL_SAMPLING": MULTINOMIAL_BATCH,
            "BATCH_TOPK_EXPONENTIAL_SAMPLING": EXPONENTIAL,
            "BATCH_TOPK_MULTINOMIAL_LOGPROBS_SAMPLING": MULTINOMIAL_LOGPROBS,
            "BATCH_TOPK_EXPONENTIAL_LOGPROBS_SAMPLING": EXPONENTIAL_LOGPROBS,
            "SAMPLING_MAX": 5,
        }
    },
    source="atb-operations.md 3.15; topk_topp_sampling_operation.cpp",
)

OPS: tuple[AtbOp, ...] = (SORT, MULTINOMIAL, TOPK_TOPP_SAMPLING)
