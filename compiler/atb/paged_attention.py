"""PagedAttention: decode (and speculative steps) over a paged cache.

`inputs(param)` names the input slots in order; arity, rows, checks and the hostatb kernel all read that list.

    inputs(PAGED_ATTENTION.param({"headNum": 4}))
    # -> ("query", "keyCache", "valueCache", "blockTables", "contextLens")

Sources: atb-operations.md 1.6 and 3.9, atb-layers/masks.json and refusals.json, atb-cases/paged_attention.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from llmc.compiler.atb.core import (
    ACL_BF16,
    ACL_DTYPE,
    ACL_FLOAT16,
    ACL_UNDEFINED,
    DIM,
    LOGGED,
    AtbOp,
    Desc,
    Field,
    Param,
    Row,
    require,
    require_dim,
    require_dim_nums,
    require_param,
)
from llmc.compiler.atb.self_attention import (
    BNSD,
    BSND,
    DEQUANT_FUSION,
    LOGN,
    QKV_OFFLINE,
    QKV_ONLINE,
    QUANT_TYPES,
    SCALE_TYPES,
    TOR,
    UNQUANT,
    check_ranges,
    is_910b,
    kv_heads,
)

# maskType
NO_MASK, NORM, ALIBI, SPEC_MASK, MASK_FREE, NORM_COMPRESS = range(6)
# calcType, compressType
NOT_SPEC, SPEC = range(2)
NO_COMPRESS, KVHEAD, KVHEAD_ROPE = range(3)

MAX_HEAD, MAX_HEAD_PLAIN_BLOCK, MAX_BLOCK_AREA, MAX_MLA_BATCH = 576, 256, 128 * 128, 8192
MAX_INT64_DESCALE_HEAD = 128
MAX_SPEC_BATCH, MAX_SPEC_HEADS, MAX_SPEC_BLOCK = 2000, 256, 128  # of several new tokens a sequence
LONG_COMPRESS = 2048  # side of 310P's compressed mask


def qkv_quantised(param: Param) -> bool:
    return param.quantType in (QKV_OFFLINE, QKV_ONLINE)


def inputs(param: Param) -> tuple[str, ...]:
    """Names of the input slots in order (reference 3.9)."""
    value = () if param.mlaVHeadSize else ("valueCache",)
    names = ["query", "keyCache", *value, "blockTables", "contextLens"]
    if param.maskType != NO_MASK:
        names.append("mask")
    if param.batchRunStatusEnable:
        names.append("batchRunStatus")
    if param.quantType == DEQUANT_FUSION:
        names += ["kDescale", "kOffset", "vDescale", "vOffset"] if param.hasQuantOffset else ["kDescale", "vDescale"]
    elif qkv_quantised(param):
        names += ["kDescale", "vDescale"]
    if param.calcType == SPEC:
        names.append("qSeqLen")
    if param.compressType == KVHEAD_ROPE:
        names.append("razorOffset")
    if param.quantType == QKV_OFFLINE:
        names.append("pScale")
    if param.scaleType == LOGN:
        names.append("logN")
    return tuple(names)


def arity(param: Param) -> tuple[int, int]:
    return len(inputs(param)), 1


# The largest member of each enum in C++, which has some that torch_atb lacks.
LARGEST = {"maskType": 5, "quantType": 3, "compressType": 2, "calcType": 1, "scaleType": 1, "inputLayout": 1}


def check(param: Param, chip: str) -> None:
    """Creation. Every failure is ERROR_INVALID_PARAM."""
    check_ranges(param, LARGEST)
    _check_chip(param, chip)
    _check_spec(param, chip)
    if param.compressType == KVHEAD_ROPE:
        require_param(param.maskType == NO_MASK, "COMPRESS_TYPE_KVHEAD_ROPE takes no mask")
        require_param(not param.batchRunStatusEnable, "COMPRESS_TYPE_KVHEAD_ROPE excludes dynamic batch")
    if qkv_quantised(param):
        typed = param.outDataType in (ACL_FLOAT16, ACL_BF16)
        require_param(typed, "quantised q, k, v need outDataType float16 or bfloat16", found=str(param.outDataType))
        require_param(not param.hasQuantOffset, "quantised q, k, v have no offsets: hasQuantOffset must be false")
        require_param(param.compressType == NO_COMPRESS, "quantised q, k, v exclude compressType")
    if param.scaleType == LOGN:
        plain = param.quantType == UNQUANT and param.compressType == NO_COMPRESS
        require_param(plain, "SCALE_TYPE_LOGN excludes quantisation and compressType")
    if param.inputLayout == BNSD:
        plain = param.quantType == UNQUANT and param.compressType == NO_COMPRESS and param.scaleType == TOR
        require_param(plain, "TYPE_BNSD excludes quantisation, compressType and SCALE_TYPE_LOGN")
    if param.mlaVHeadSize:
        _check_mla(param)


def _check_chip(param: Param, chip: str) -> None:
    if is_910b(chip):
        require_param(param.maskType != NORM_COMPRESS, f"MASK_TYPE_NORM_COMPRESS is not supported on {chip}")
        return
    for there, what in (
        (param.batchRunStatusEnable, "batchRunStatusEnable"),
        (param.compressType != NO_COMPRESS, "compressType"),
        (param.mlaVHeadSize > 0, "mlaVHeadSize"),
        (param.quantType != UNQUANT, "quantisation"),
    ):
        require_param(not there, f"{what} is not supported on {chip}")


def _check_spec(param: Param, chip: str) -> None:
    if param.calcType != SPEC:
        return
    for holds, what in (
        (not param.batchRunStatusEnable, "no dynamic batch"),
        (param.compressType == NO_COMPRESS, "no compressType"),
        (param.quantType == UNQUANT, "no quantisation"),
        (param.scaleType == TOR, "SCALE_TYPE_TOR"),
        (param.inputLayout == BSND, "TYPE_BSND"),
    ):
        require_param(holds, f"CALC_TYPE_SPEC needs {what}")
    if not is_910b(chip):
        legal: tuple[int, ...] = (NO_MASK, SPEC_MASK, MASK_FREE, NORM_COMPRESS)
    elif param.mlaVHeadSize:
        legal = (NO_MASK, SPEC_MASK, MASK_FREE)
    else:
        legal = (NORM, SPEC_MASK)
    require_param(param.maskType in legal, "CALC_TYPE_SPEC: maskType", found=str(param.maskType),
                  expected=", ".join(map(str, legal)))  # fmt: skip
    require(param.maskType != NO_MASK or param.mlaVHeadSize > 0, LOGGED, "CALC_TYPE_SPEC without a mask has no dtypes",
            found="maskType UNDEFINED", expected="MASK_TYPE_SPEC, MASK_FREE or NORM_COMPRESS")  # fmt: skip


def _check_mla(param: Param) -> None:
    for holds, what in (
        (param.maskType != ALIBI, "no alibi mask"),
        (param.compressType == NO_COMPRESS, "no compressType"),
        (param.quantType != DEQUANT_FUSION, "no TYPE_DEQUANT_FUSION"),
        (param.scaleType == TOR, "SCALE_TYPE_TOR"),
        (param.inputLayout == BSND, "TYPE_BSND"),
        (param.kvHeadNum == 1, "kvHeadNum 1"),
        (param.mlaVHeadSize <= MAX_HEAD, f"mlaVHeadSize of at most {MAX_HEAD}"),
    ):
        require_param(holds, f"mlaVHeadSize needs {what}")


def rows(param: Param, chip: str) -> list[Row]:
    """Legal dtypes and formats. NZ caches come with NZ masks and fp16 logN, ND caches with ND masks and fp32 logN."""
    names = inputs(param)
    found: list[Row] = []
    for dtype, cache_format, scale in product(("float16", "bfloat16"), ("", ":nz"), ("float32", "int64")):
        out = ACL_DTYPE[param.outDataType] if qkv_quantised(param) else dtype
        cache = dtype if param.quantType == UNQUANT else "int8"
        descale = scale if param.quantType == DEQUANT_FUSION else "float32"
        words = {
            "query": "int8" if qkv_quantised(param) else dtype, "keyCache": cache + cache_format,
            "valueCache": cache + cache_format, "blockTables": "int32", "contextLens": "int32",
            "mask": out + cache_format, "batchRunStatus": "int32", "kDescale": descale, "kOffset": "int32",
            "vDescale": descale, "vOffset": "int32", "qSeqLen": "int32", "razorOffset": "float32",
            "pScale": "float32", "logN": "float16" if cache_format else "float32",
        }  # fmt: skip
        spec = param.calcType == SPEC and not param.mlaVHeadSize
        if spec and cache_format and dtype == "bfloat16":
            continue
        found.append((*(words[name] for name in names), out))
        if spec:  # and an ND mask with NZ caches
            found.append((*((words | {"mask": out})[name] for name in names), out))
    return list(dict.fromkeys(found))


def shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    named = dict(zip(inputs(param), ins, strict=True))
    counts = {"valueCache": 4, "query": 3, "keyCache": 4, "blockTables": 2, "contextLens": 1}
    require_dim_nums(named, {name: (count,) for name, count in counts.items()})
    query, key, value = named["query"], named["keyCache"], named.get("valueCache")
    if param.batchRunStatusEnable:
        for name in ("blockTables", "contextLens"):
            require(query.shape[0] <= named[name].shape[0], DIM, "more tokens than sequences",
                    found=str(named[name]), expected=f"at least {query.shape[0]} rows", tensor=name)  # fmt: skip
    if not is_910b(chip):
        _check_nz_caches(param, query, key, named["valueCache"])
    elif param.inputLayout == BNSD:
        _check_bnsd_caches(query, key, named["valueCache"])
    else:
        _check_nd_caches(param, query, key, value, named["contextLens"])
    _check_mask_free(param, named, chip)
    dtype = ACL_DTYPE[param.outDataType] if qkv_quantised(param) else query.dtype
    v_size = param.mlaVHeadSize or (value.shape[3] if value else 0)
    dims = (*query.shape[:2], v_size) if is_910b(chip) else query.shape
    return [Desc(dtype=dtype, shape=dims, format=query.format)]


def _check_nd_caches(param: Param, query: Desc, key: Desc, value: Desc | None, lengths: Desc) -> None:
    """910B: [blocks, blockSize, Nk, D] and [blocks, blockSize, Nk, Dv]."""
    if value is not None:
        require_dim(key.shape[:3] == value.shape[:3], "the caches differ before the head size", value, key)
    block, size = key.shape[1], key.shape[3]
    require_dim(size == query.shape[2], "head sizes of query and keyCache differ", key, query, "keyCache")
    plain = param.calcType == SPEC or qkv_quantised(param)
    if param.quantType == DEQUANT_FUSION or param.scaleType == LOGN or param.compressType or (
        plain and not param.mlaVHeadSize
    ):  # fmt: skip
        require_dim(
            value is not None and size == value.shape[3], "head sizes of key and value must be equal here", value, key
        )
        _check_block_area(size, block)
        return
    v_size = param.mlaVHeadSize or (value.shape[3] if value else 0)
    require_dim(param.mlaVHeadSize <= size, "mlaVHeadSize is larger than the key's head size", size)
    require_dim(max(size, v_size) <= MAX_HEAD, "head size", max(size, v_size), f"at most {MAX_HEAD}")
    if param.mlaVHeadSize:
        require_dim(lengths.shape[0] <= MAX_MLA_BATCH, "batch size", lengths, f"at most {MAX_MLA_BATCH}")
        mtp = param.headNum in (16, 32) and (size, v_size) == (576, 512) and param.calcType != SPEC
        if block == 256 and mtp:
            return
    require_dim(max(size, v_size) <= MAX_HEAD_PLAIN_BLOCK or block <= 128,
                "block size with a head size above 256", block, "at most 128")  # fmt: skip


def _check_block_area(size: int, block: int) -> None:
    require_dim(size <= MAX_HEAD_PLAIN_BLOCK, "head size", size, f"at most {MAX_HEAD_PLAIN_BLOCK}")
    require_dim(size * block <= MAX_BLOCK_AREA, "head size times block size", size * block, f"at most {MAX_BLOCK_AREA}")


def _check_bnsd_caches(query: Desc, key: Desc, value: Desc) -> None:
    """910B: [blocks, Nk, blockSize, D]."""
    size = query.shape[2]
    require_dim(size == key.shape[3] == value.shape[3], "head sizes differ", f"{query}, {key}, {value}")
    require_dim(key.shape[0] == value.shape[0], "numbers of blocks differ", value, key)
    require_dim(key.shape[2] == value.shape[2], "block sizes differ", value, key)


def _check_nz_caches(param: Param, query: Desc, key: Desc, value: Desc) -> None:
    """310P: [blocks, Nk * D / 16, blockSize, 16]."""
    require_dim(key.shape[:3] == value.shape[:3], "the caches differ", value, key)
    require_dim(key.shape[3] == value.shape[3] == 16, "the last dimension of an NZ cache is 16", f"{key}, {value}")
    size = key.shape[1] * 16 // kv_heads(param)
    require_dim(size % 16 == 0, "the head size must be a multiple of 16", size)
    _check_block_area(size, key.shape[2])
    require_dim(size == query.shape[2], "head sizes of query and keyCache differ", key, query, "keyCache")


def _check_mask_free(param: Param, named: dict[str, Desc], chip: str) -> None:
    if param.maskType == MASK_FREE:
        require_dim(not is_910b(chip), f"MASK_TYPE_MASK_FREE is not supported on {chip}", "")
        mask, block = named["mask"], named["keyCache"].shape[2]
        require_dim(mask.shape == (1, 8, 128, 16), "shape of the mask", mask, "[1, 8, 128, 16]", "mask")
        require_param(block == 128, "MASK_TYPE_MASK_FREE needs blocks of 128", found=str(block))
    elif param.maskType == NORM_COMPRESS:
        mask, size = named["mask"], LONG_COMPRESS
        nd = ((size, size), (1, size, size), (1, 1, size, size))
        fits = mask.shape in (((1, size // 16, size, 16),) if mask.format == "nz" else nd)
        require_dim(fits, "shape of the compressed mask", mask, f"nd [{size}, {size}]", "mask")


def late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    """Setup: the output, razorOffset, logN, and on 910B the mask shapes that only the kernel refuses."""
    named = dict(zip(inputs(param), ins, strict=True))
    expected = shape(param, ins, chip)[0]
    require_dim(outs[0].shape[1:] == expected.shape[1:], "output", outs[0], expected)
    if "razorOffset" in named:
        require_dim(named["razorOffset"].shape == named["keyCache"].shape[:2], "razorOffset is [blocks, blockSize]",
                    named["razorOffset"], list(named["keyCache"].shape[:2]), "razorOffset")  # fmt: skip
    if "logN" in named:
        batch = named["contextLens"].shape
        require_dim(named["logN"].shape == batch, "logN is [B]", named["logN"], list(batch), "logN")
        status = named.get("batchRunStatus")
        require_dim(status is None or status.shape[0] == batch[0], "batchRunStatus is [B]", status, list(batch))
    if is_910b(chip):
        _check_kernel(param, named)
    elif "mask" in named:
        _check_mask_310p(param, named["mask"], named["contextLens"].shape[0])
    if chip != "host":
        _check_tiling(param, named, chip)


RT_FAIL = "ERROR_RT_FAIL"  # what Setup returns when the kernel refuses


def _require_kernel(condition: bool, message: str, found: object, expected: object, tensor: str) -> None:
    require(condition, RT_FAIL, message, found=str(found), expected=str(expected), tensor=tensor)


def _check_kernel(param: Param, named: dict[str, Desc]) -> None:
    """910B: what the kernel refuses (paged_attention_operation.cpp of the kernels). B counts contextLens."""
    query, key, heads = named["query"].shape, named["keyCache"].shape, kv_heads(param)
    _require_kernel(query[1] == param.headNum, "query heads", named["query"], f"headNum {param.headNum}", "query")
    own = key[1] if param.inputLayout == BNSD else key[2]
    value = named.get("valueCache")
    _require_kernel(value is None or value.shape[:3] == key[:3], "the caches differ before the head size", value,
                    named["keyCache"], "valueCache")  # fmt: skip
    if param.compressType == NO_COMPRESS:
        _require_kernel(own == heads, "heads of the cache are not kvHeadNum", named["keyCache"], heads, "keyCache")
    else:
        lengths = named["contextLens"]
        _require_kernel(own == 1, "heads of a compressed cache", named["keyCache"], 1, "keyCache")
        _require_kernel(lengths.shape[0] == query[0] * heads, "a length a token and kv head", lengths,
                        f"[{query[0] * heads}]", "contextLens")  # fmt: skip
    if param.quantType == DEQUANT_FUSION:
        _check_dequant(param, named, heads)
    elif qkv_quantised(param):
        for name in ("kDescale", "vDescale", "pScale"):
            _require_kernel(name not in named or named[name].shape == (param.headNum,), "a scale has one value a head",
                            named.get(name), f"[{param.headNum}]", name)  # fmt: skip
    if "mask" in named and not param.mlaVHeadSize:
        leading = mask_leading(param, named["mask"], named["contextLens"].shape[0])
        _require_kernel(
            leading is not None, "this mask shape is not supported", named["mask"],
            "[>= longest q, >= longest context] after: nothing; norm [B]; alibi [headNum]; [B, headNum]", "mask",
        )  # fmt: skip


def _check_mask_310p(param: Param, mask: Desc, batch: int) -> None:
    """An ND mask goes through Transdata first. The last three sizes are not compared with the lengths."""
    if param.maskType == NORM_COMPRESS:
        _require_kernel(mask.format == "nd", "the compressed mask must be nd", mask, "nd [2048, 2048]", "mask")
        return
    if mask.format == "nd":
        _require_kernel(len(mask.shape) > 2, "an nd mask needs 3 dimensions", mask, "[1, T, ctx]", "mask")
        return
    fits = len(mask.shape) == 4 and mask.shape[3] == 16
    fits = fits and mask.shape[0] in (1, param.headNum, batch, batch * param.headNum)
    _require_kernel(fits, "not an NZ decoder mask", mask, f"[1 or {batch}, ctx / 16, 16, 16]", "mask")


def _check_tiling(param: Param, named: dict[str, Desc], chip: str) -> None:
    """Sizes that the kernels' tiling refuses."""
    key = named["keyCache"].shape
    block = key[1] if is_910b(chip) and param.inputLayout == BSND else key[2]
    require(block % 16 == 0, LOGGED, "block size", found=str(block), expected="a multiple of 16", tensor="keyCache")
    if not is_910b(chip) or param.mlaVHeadSize or key[3] != named["valueCache"].shape[3]:
        return
    size = key[3]
    if size == MAX_HEAD_PLAIN_BLOCK and block >= 128:
        require(block % 128 == 0, LOGGED, f"block size with head size {size}", found=str(block),
                expected="a multiple of 128", tensor="keyCache")  # fmt: skip
    elif size <= MAX_HEAD_PLAIN_BLOCK:
        require(size * block <= MAX_BLOCK_AREA, LOGGED, "head size times block size", found=f"{size} x {block}",
                expected=f"at most {MAX_BLOCK_AREA}", tensor="keyCache")  # fmt: skip


def check_lengths(param: Param, named: Mapping[str, Desc], contexts: Sequence[int], q_lens: Sequence[int],
                  chip: str) -> None:  # fmt: skip
    """What Setup refuses when it knows the lengths; `q_lens` holds ones where the operation has no qSeqLen."""
    longest_q, longest = max(q_lens, default=0), max(contexts, default=0)
    if is_910b(chip) and "mask" in named and not param.mlaVHeadSize:
        _require_kernel(min(*contexts, *q_lens, 0) >= 0 and longest > 0 and longest_q > 0, "lengths", contexts,
                        "above 0", "contextLens")  # fmt: skip
        _require_kernel(longest >= longest_q, "the longest query is longer than the longest context", longest_q,
                        f"at most {longest}", "qSeqLen")  # fmt: skip
        rows, columns = named["mask"].shape[-2:]
        _require_kernel(rows >= longest_q and columns >= longest, "this mask shape is not supported", named["mask"],
                        f"at least {longest_q} x {longest}", "mask")  # fmt: skip
    if param.maskType == MASK_FREE and not is_910b(chip):
        for context, q_len in zip(contexts, q_lens, strict=True):
            require_param(context >= q_len and (context - q_len) % 128 == 0, "MASK_TYPE_MASK_FREE: cached tokens",
                          found=str(context - q_len), expected="a multiple of 128", tensor="contextLens")  # fmt: skip
    if chip == "host":
        return
    require(is_910b(chip) or min(q_lens, default=1) > 0, LOGGED, "qSeqLen", found=str(list(q_lens)), expected="above 0",
            tensor="qSeqLen")  # fmt: skip
    several = longest_q > 1 if is_910b(chip) else sum(q_lens) != len(q_lens)
    if several or param.maskType in (SPEC_MASK, MASK_FREE):
        _check_several(param, named, len(contexts), chip)


def _check_several(param: Param, named: Mapping[str, Desc], batch: int, chip: str) -> None:
    """Tiling of several new tokens a sequence."""
    query, key = named["query"].shape, named["keyCache"].shape
    for what, found, most in (
        ("sequences", batch, MAX_SPEC_BATCH),
        ("heads", param.headNum, MAX_SPEC_HEADS),
        ("block size", key[1] if is_910b(chip) else key[2], MAX_SPEC_BLOCK),
        ("heads x head size", param.headNum * query[2], MAX_BLOCK_AREA),
    ):
        require(found <= most, LOGGED, f"several new tokens a sequence: {what}", found=str(found),
                expected=f"at most {most}")  # fmt: skip


def _check_dequant(param: Param, named: dict[str, Desc], heads: int) -> None:
    size, block = named["valueCache"].shape[3], named["valueCache"].shape[1]
    for name in ("kDescale", "vDescale", "kOffset", "vOffset"):
        if name in named:
            _require_kernel(named[name].shape[0] == heads * named["query"].shape[2], "one value a kv head and channel",
                            named[name], f"[{heads * named['query'].shape[2]}]", name)  # fmt: skip
    _require_kernel(named["kDescale"].shape == named["vDescale"].shape, "kDescale and vDescale differ",
                    named["vDescale"], named["kDescale"], "vDescale")  # fmt: skip
    narrow = named["kDescale"].dtype == "float32" or (size <= MAX_INT64_DESCALE_HEAD and block <= size)
    _require_kernel(narrow, "int64 scales: head size and block size", named["valueCache"],
                    f"head size up to {MAX_INT64_DESCALE_HEAD}, blocks no larger than it", "valueCache")  # fmt: skip


def mask_leading(param: Param, mask: Desc, batch: int) -> tuple[int, ...] | None:
    """Dimensions before the last two of an ND mask on 910B, or None if that form does not exist. The last two need only
    cover the longest query and context. `batch` counts contextLens: kv heads too where they are compressed."""
    sequences = batch // kv_heads(param) if param.compressType else batch
    forms: list[tuple[int, ...]] = [(), (batch, param.headNum)]
    if param.maskType == NORM:
        forms += [(batch,), (sequences,)]
    elif param.maskType == ALIBI:
        forms += [(param.headNum,), (sequences, param.headNum)]
    leading = mask.shape[:-2]
    return leading if leading in forms and len(mask.shape) >= 2 else None


def host(param: Param, chip: str) -> frozenset[int]:
    """910B reads the lengths on the host; 310P reads contextLens on the device, except for its compressed mask."""
    names = inputs(param)
    read = {"qSeqLen"}
    if is_910b(chip):
        read |= {"contextLens", "batchRunStatus"}
    elif param.maskType == NORM_COMPRESS:
        read.add("contextLens")
    return frozenset(index for index, name in enumerate(names) if name in read)


# Members that torch_atb has; C++ adds MASK_TYPE_MASK_FREE = 4 and MASK_TYPE_NORM_COMPRESS = 5 (reference 2.2).
ENUMS = {
    "MaskType": {"UNDEFINED": 0, "MASK_TYPE_NORM": 1, "MASK_TYPE_ALIBI": 2, "MASK_TYPE_SPEC": 3},
    "QuantType": QUANT_TYPES,
    "CompressType": {
        "COMPRESS_TYPE_UNDEFINED": 0, "COMPRESS_TYPE_KVHEAD": 1, "COMPRESS_TYPE_KVHEAD_ROPE": 2, "COMPRESS_TYPE_MAX": 3,
    },
    "CalcType": {"CALC_TYPE_UNDEFINED": 0, "CALC_TYPE_SPEC": 1},
    "ScaleType": SCALE_TYPES,
}  # fmt: skip

PAGED_ATTENTION = AtbOp(
    name="PagedAttention",
    fields=(
        Field(name="headNum", kind="int", default=0),
        Field(name="qkScale", kind="float", default=1.0),
        Field(name="kvHeadNum", kind="int", default=0),
        Field(name="maskType", kind="MaskType", default=0),
        Field(name="batchRunStatusEnable", kind="bool", default=False),
        Field(name="quantType", kind="QuantType", default=0),
        Field(name="outDataType", kind="dtype", default=ACL_UNDEFINED),
        Field(name="hasQuantOffset", kind="bool", default=False),
        Field(name="compressType", kind="CompressType", default=0),
        Field(name="calcType", kind="CalcType", default=0),
        Field(name="scaleType", kind="ScaleType", default=0),
        Field(name="inputLayout", kind="InputLayout", default=0),
        Field(name="mlaVHeadSize", kind="uint", default=0, bound=False),
        Field(name="qScale", kind="float", default=0.0, bound=False),
    ),
    arity=arity,
    rows=rows,
    shape=shape,
    check=check,
    late=late,
    host=host,
    enums=ENUMS,
    source="atb-operations.md 3.9; atb-layers/masks.json; atb-cases/paged_attention.csv",
)
