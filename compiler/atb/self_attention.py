"""SelfAttention: prefill attention of both modes, and decode over contiguous ("flash") caches.

What enters and leaves depends on calcType: `inputs(param)` names the input slots in order, and arity, rows, checks and
the hostatb kernel all read that list.

    inputs(SELF_ATTENTION.param({"headNum": 4, "calcType": PA_ENCODER, "maskType": NORM_COMPRESS}))
    # -> ("query", "key", "value", "mask", "seqLen")

Sources: atb-operations.md 1.6 and 3.8, atb-layers/masks.json and refusals.json, atb-cases/self_attention.csv.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from llmc.compiler.atb.core import (
    ACL_BF16,
    ACL_DTYPE,
    ACL_FLOAT16,
    ACL_UNDEFINED,
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
    require_dim_nums,
    require_param,
)

# calcType
UNDEFINED, ENCODER, DECODER, PA_ENCODER, PREFIX_ENCODER = range(5)
# kernelType
DEFAULT, HIGH_PRECISION, EXP_M8V2 = range(3)
# maskType
(
    NO_MASK, NORM, ALIBI, NORM_COMPRESS, ALIBI_COMPRESS, ALIBI_COMPRESS_SQRT, ALIBI_COMPRESS_LEFT_ALIGN,
    SLIDING_WINDOW_NORM, SLIDING_WINDOW_COMPRESS, CAUSAL_MASK,
) = range(10)  # fmt: skip
ALIBI_COMPRESSED = (ALIBI_COMPRESS, ALIBI_COMPRESS_SQRT, ALIBI_COMPRESS_LEFT_ALIGN)
SLIDING_WINDOW = (SLIDING_WINDOW_NORM, SLIDING_WINDOW_COMPRESS)
# kvcacheCfg, scaleType, inputLayout, quantType
K_CACHE_V_CACHE, K_BYPASS_V_BYPASS = range(2)
TOR, LOGN = range(2)
BSND, BNSD = range(2)
UNQUANT, DEQUANT_FUSION, QKV_OFFLINE, QKV_ONLINE = range(4)

# Head size limits (910B by the kernel that takes the case; 310P).
MAX_HEAD, MAX_HEAD_EQUAL, MAX_HEAD_MIXED, MAX_HEAD_ALIBI = 576, 256, 1024, 128
PREFIX_BLOCK = 128  # PREFIX_ENCODER: the only block size, and what cached tokens are a multiple of


def is_910b(chip: str) -> bool:
    """`host` follows the rules of 910B."""
    return chip != "Ascend310P"


def kv_heads(param: Param) -> int:
    return param.kvHeadNum or param.headNum


def paged(param: Param) -> bool:
    """Prefill over concatenated tokens without a contiguous cache."""
    return param.calcType == PA_ENCODER


def prefix(param: Param) -> bool:
    return param.calcType == PREFIX_ENCODER


def has_slopes(param: Param) -> bool:
    return param.maskType in ALIBI_COMPRESSED


def quantised(param: Param) -> bool:
    return param.quantType in (QKV_OFFLINE, QKV_ONLINE)


def inputs(param: Param) -> tuple[str, ...]:
    """Names of the input slots in order (reference 3.8)."""
    decoder_window = param.calcType == DECODER and param.maskType == SLIDING_WINDOW_NORM
    mask = ("mask",) if param.maskType not in (NO_MASK, CAUSAL_MASK) and not decoder_window else ()
    slopes = ("slopes",) if has_slopes(param) else ()
    log_n = ("logN",) if param.scaleType == LOGN else ()
    if paged(param):
        value = () if param.mlaVHeadSize else ("value",)
        quant: tuple[str, ...] = ()
        if quantised(param):
            quant = ("qkDescale", "qkOffset", "vpvDescale", "vpvOffset")
            quant += ("pScale",) if param.quantType == QKV_OFFLINE else ()
        return ("query", "key", *value, *mask, "seqLen", *slopes, *quant, *log_n)
    if prefix(param):
        return ("query", "keyCache", "valueCache", "blockTables", *mask, "seqLen", "kvSeqLen", *slopes)
    new = () if param.kvcacheCfg == K_BYPASS_V_BYPASS else ("key", "value")
    status = ("batchRunStatus",) if param.batchRunStatusEnable else ()
    lengths = ("tokenOffset", "seqLen", "layerId")
    return ("query", *new, "cacheK", "cacheV", *mask, *lengths, *status, *slopes, *log_n)


def arity(param: Param) -> tuple[int, int]:
    return len(inputs(param)), 1


# The largest member of each enum in C++, which has some that torch_atb lacks.
LARGEST = {
    "calcType": 4, "kernelType": 2, "clampType": 1, "maskType": 9, "kvcacheCfg": 1, "scaleType": 1, "inputLayout": 1,
    "cacheType": 1, "quantType": 3,
}  # fmt: skip


def check(param: Param, chip: str) -> None:
    """Creation. Every failure is ERROR_INVALID_PARAM."""
    check_ranges(param, LARGEST)
    _check_quant(param)
    _check_layout(param, chip)
    _check_mla(param, chip)
    _check_window(param)
    _check_chip(param, chip)
    if prefix(param):
        _check_prefix(param, chip)
    if param.kernelType == EXP_M8V2:
        _check_exp_m8v2(param, chip)
    require_param(
        not (paged(param) and param.kvcacheCfg == K_BYPASS_V_BYPASS), "PA_ENCODER has no cache: kvcacheCfg must be 0"
    )
    require_param(
        paged(param) or prefix(param) or not has_slopes(param),
        "a compressed alibi mask needs calcType PA_ENCODER or PREFIX_ENCODER",
        found=f"maskType {param.maskType}, calcType {param.calcType}",
    )
    require_param(
        not (param.maskType == NO_MASK and param.isTriuMask == 1), "isTriuMask 1 needs a mask (maskType is UNDEFINED)"
    )
    require_param(param.maskType != CAUSAL_MASK or prefix(param), "MASK_TYPE_CAUSAL_MASK is for PREFIX_ENCODER only")


def check_ranges(param: Param, enums: Mapping[str, int]) -> None:
    """Head counts, and the enums: name of the field -> its largest member."""
    require_param(param.headNum > 0, "headNum must be greater than 0", found=str(param.headNum))
    require_param(param.kvHeadNum >= 0, "kvHeadNum must not be negative", found=str(param.kvHeadNum))
    require_param(
        param.headNum % kv_heads(param) == 0,
        "headNum must be a multiple of kvHeadNum",
        found=f"{param.headNum} and {param.kvHeadNum}",
    )
    for name, top in enums.items():
        value = getattr(param, name)
        require_param(0 <= value <= top, f"{name} is not a value of its enum", found=str(value), expected=f"0 to {top}")


def _check_quant(param: Param) -> None:
    require_param(param.quantType != DEQUANT_FUSION, "quantType cannot be TYPE_DEQUANT_FUSION here")
    if not quantised(param):
        return
    require_param(
        param.outDataType in (ACL_FLOAT16, ACL_BF16),
        "quantised q, k, v need outDataType ACL_FLOAT16 or ACL_BF16",
        found=str(param.outDataType),
    )
    require_param(paged(param), "quantised q, k, v need calcType PA_ENCODER", found=str(param.calcType))
    require_param(param.scaleType == TOR, "quantised q, k, v need SCALE_TYPE_TOR", found=str(param.scaleType))


def _check_layout(param: Param, chip: str) -> None:
    """inputLayout BNSD."""
    if param.inputLayout != BNSD:
        return
    require_param(param.scaleType == TOR, "TYPE_BNSD cannot be combined with SCALE_TYPE_LOGN")
    require_param(param.quantType == UNQUANT, "TYPE_BNSD cannot be combined with quantType")
    require_param(not prefix(param), "TYPE_BNSD cannot be combined with PREFIX_ENCODER")
    if not paged(param):
        require_param(param.kvcacheCfg == K_BYPASS_V_BYPASS, "TYPE_BNSD with caches needs K_BYPASS_V_BYPASS")
        require_param(param.maskType != NO_MASK, "TYPE_BNSD with caches needs a mask")
        return
    require_param(param.mlaVHeadSize == 0, "TYPE_BNSD cannot be combined with mlaVHeadSize")
    require_param(param.kernelType != HIGH_PRECISION, "PA_ENCODER with TYPE_BNSD has no high precision kernel")
    require_param(
        is_910b(chip) or param.kernelType == EXP_M8V2,
        "on 310P PA_ENCODER with TYPE_BNSD needs KERNELTYPE_EXP_M8V2",
    )
    require_param(
        param.kernelType == EXP_M8V2 or param.maskType == NO_MASK,
        "PA_ENCODER with TYPE_BNSD takes no mask",
        found=f"maskType {param.maskType}",
    )


def _check_mla(param: Param, chip: str) -> None:
    if not param.mlaVHeadSize:
        return
    require_param(paged(param), "mlaVHeadSize needs calcType PA_ENCODER", found=str(param.calcType))
    require_param(is_910b(chip), f"mlaVHeadSize is not supported on {chip}")
    require_param(
        param.maskType in (NO_MASK, NORM, *SLIDING_WINDOW),
        "mlaVHeadSize takes no mask, a norm mask or a window",
        found=f"maskType {param.maskType}",
    )
    require_param(param.scaleType == TOR, "mlaVHeadSize cannot be combined with SCALE_TYPE_LOGN")
    require_param(param.clampType == 0, "mlaVHeadSize cannot be combined with clamp")
    require_param(param.mlaVHeadSize <= MAX_HEAD, "mlaVHeadSize is too large", found=str(param.mlaVHeadSize),
                  expected=f"at most {MAX_HEAD}")  # fmt: skip


def _check_window(param: Param) -> None:
    """Sliding window: windowSize > 0 and maskType 7 or 8 come together."""
    window = param.maskType in SLIDING_WINDOW
    require_param(
        (param.windowSize > 0) == window,
        "windowSize > 0 and a sliding window mask need each other",
        found=f"windowSize {param.windowSize}, maskType {param.maskType}",
    )
    if not window:
        require_param(param.cacheType == 0, "CACHE_TYPE_SWA needs a sliding window mask")
        return
    require_param(
        not (param.maskType == SLIDING_WINDOW_COMPRESS and param.calcType == DECODER),
        "DECODER takes MASK_TYPE_SLIDING_WINDOW_NORM (and no mask tensor), not the compressed form",
    )
    plain = not param.batchRunStatusEnable and param.kernelType == DEFAULT and param.clampType == 0
    plain = plain and param.quantType == UNQUANT and param.scaleType == TOR and param.inputLayout == BSND
    require_param(
        plain,
        "a sliding window excludes dynamic batch, the high precision kernel, clamp, quantisation, logN and BNSD",
    )


def _check_chip(param: Param, chip: str) -> None:
    if is_910b(chip):
        return
    for there, what in (
        (param.maskType == ALIBI_COMPRESS_LEFT_ALIGN, "MASK_TYPE_ALIBI_COMPRESS_LEFT_ALIGN"),
        (param.clampType != 0, "clamp"),
        (quantised(param), "quantised q, k, v"),
        (param.batchRunStatusEnable, "batchRunStatusEnable"),
    ):
        require_param(not there, f"{what} is not supported on {chip}")


def _check_prefix(param: Param, chip: str) -> None:
    for holds, what in (
        (is_910b(chip), "Atlas 800I A2"),
        (param.quantType == UNQUANT and param.outDataType == ACL_UNDEFINED, "no quantisation and no outDataType"),
        (abs(param.qScale - 1.0) < 1e-6, "qScale 1"),
        (not param.batchRunStatusEnable, "no dynamic batch"),
        (param.isTriuMask == 1, "isTriuMask 1"),
        (param.kernelType == HIGH_PRECISION, "KERNELTYPE_HIGH_PRECISION"),
        (param.clampType == 0 and param.clampMin == 0 and param.clampMax == 0, "no clamp"),
        (
            param.maskType in (NORM_COMPRESS, ALIBI_COMPRESS, ALIBI_COMPRESS_SQRT, CAUSAL_MASK),
            "maskType NORM_COMPRESS, ALIBI_COMPRESS, ALIBI_COMPRESS_SQRT or CAUSAL_MASK",
        ),
        (param.kvcacheCfg == K_CACHE_V_CACHE, "kvcacheCfg K_CACHE_V_CACHE"),
        (param.scaleType == TOR, "SCALE_TYPE_TOR"),
        (param.cacheType == 0 and param.windowSize == 0, "no sliding window"),
        (param.mlaVHeadSize == 0, "mlaVHeadSize 0"),
    ):
        require_param(holds, f"PREFIX_ENCODER needs {what}")


def _check_exp_m8v2(param: Param, chip: str) -> None:
    for holds, what in (
        (not is_910b(chip), "310P"),
        (param.calcType == PA_ENCODER, "calcType PA_ENCODER"),
        (param.quantType == UNQUANT and param.outDataType == ACL_UNDEFINED, "no quantisation and no outDataType"),
        (param.qScale == 1, "qScale 1"),
        (not param.batchRunStatusEnable, "no dynamic batch"),
        (param.isTriuMask == 0, "isTriuMask 0"),
        (param.clampType == 0 and param.clampMin == 0 and param.clampMax == 0, "no clamp"),
        (param.maskType in (NO_MASK, NORM, NORM_COMPRESS), "maskType UNDEFINED, NORM or NORM_COMPRESS"),
        (param.scaleType == TOR, "SCALE_TYPE_TOR"),
        (param.mlaVHeadSize == 0, "mlaVHeadSize 0"),
        (param.cacheType == 0 and param.windowSize == 0, "no sliding window"),
    ):
        require_param(holds, f"KERNELTYPE_EXP_M8V2 needs {what}")


def rows(param: Param, chip: str) -> list[Row]:
    """Legal dtypes and formats. The library's sections do not depend on the chip, except BNSD prefill (910B: bf16)."""
    names = inputs(param)
    found: list[Row] = []
    for dtype, words in _row_words(param, chip):
        out = ACL_DTYPE[param.outDataType] if quantised(param) else dtype
        found.append((*(words[name] for name in names), out))
    return list(dict.fromkeys(found))


def _row_words(param: Param, chip: str) -> Iterable[tuple[str, dict[str, str]]]:
    """(dtype of q, word of every slot that this kind of call may have)."""
    if paged(param):
        dtypes: tuple[str, ...] = ("float16", "bfloat16")
        if param.inputLayout == BNSD:
            dtypes = ("bfloat16",) if is_910b(chip) else ("float16",)
        for dtype, mask_format, slopes, log_n in product(
            dtypes, ("", ":nz"), ("float32", "float16"), ("float32", "float16")
        ):
            # With an NZ mask or fp16 slopes the table has fp16 rows, and fp16 slopes there.
            if has_slopes(param) and (dtype, slopes) == ("bfloat16", "float16"):
                continue
            if has_slopes(param) and mask_format and slopes == "float32":
                continue
            qkv = "int8" if quantised(param) else dtype
            mask = ACL_DTYPE[param.outDataType] if quantised(param) else dtype
            yield dtype, {
                "query": qkv, "key": qkv, "value": qkv, "mask": mask + mask_format, "seqLen": "int32",
                "slopes": slopes, "qkDescale": "float32", "qkOffset": "int32", "vpvDescale": "float32",
                "vpvOffset": "int32", "pScale": "float32", "logN": log_n,
            }  # fmt: skip
        return
    for dtype, integer in product(("float16", "bfloat16"), ("int32", "uint32")):
        integers = dict.fromkeys(("tokenOffset", "seqLen", "layerId", "batchRunStatus"), integer)
        integers |= {"kvSeqLen": integer, "blockTables": integer}
        floats = dict.fromkeys(("query", "key", "value", "cacheK", "cacheV", "keyCache", "valueCache"), dtype)
        if prefix(param):
            yield dtype, {**floats, **integers, "mask": dtype, "slopes": "float32"}
            continue
        for (cache, mask), log_n in product((("", ""), (":nz", ""), (":nz", ":nz")), ("float32", "float16")):
            caches = {"cacheK": dtype + cache, "cacheV": dtype + cache}
            yield dtype, {**floats, **integers, **caches, "mask": dtype + mask, "logN": log_n}


def shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    """InferShape: the library's order of checks, then the output's desc."""
    named = dict(zip(inputs(param), ins, strict=True))
    _check_cache_format(named, chip)
    _check_log_n(param, named, chip)
    _check_scales(param, named)
    if param.inputLayout == BNSD:
        _check_bnsd_prefill(param, named) if paged(param) else _check_bnsd_flash(param, named, chip)
    else:
        _check_head_size(param, ins, chip)
        _check_window_mask(param, named, chip)
        if paged(param):
            _check_paged(param, named, chip)
        elif prefix(param):
            _check_prefix_shapes(param, named)
        else:
            _check_flash(param, named, chip)
    return [_out(param, ins, chip)]


def _out(param: Param, ins: Sequence[Desc], chip: str) -> Desc:
    query = ins[0]
    dtype = ACL_DTYPE[param.outDataType] if quantised(param) else query.dtype
    if param.inputLayout == BNSD or prefix(param):
        dims = query.shape
    elif not is_910b(chip):
        b_s_nd = (*query.shape[:2], query.shape[2] * query.shape[3]) if len(query.shape) == 4 else ()
        dims = b_s_nd or query.shape
    else:
        v_head = _v_head_size(param, ins)
        if len(query.shape) == 4:  # [B, S, N, D] -> [B, S, N * Dv]
            heads = param.headNum if param.kvcacheCfg == K_BYPASS_V_BYPASS else query.shape[2]
            dims = (*query.shape[:2], heads * v_head)
        elif len(query.shape) == 2:
            dims = (query.shape[0], param.headNum * v_head)
        else:
            dims = (*query.shape[:2], v_head)
    return Desc(dtype=dtype, shape=dims, format=query.format)


def _v_head_size(param: Param, ins: Sequence[Desc]) -> int:
    if param.mlaVHeadSize:
        return param.mlaVHeadSize
    value = ins[2].shape  # the value, or cacheV in bypass
    merged = param.kvcacheCfg == K_BYPASS_V_BYPASS or len(value) == 2
    return value[-1] // kv_heads(param) if merged else value[-1]


def _check_cache_format(named: dict[str, Desc], chip: str) -> None:
    wanted = "nd" if is_910b(chip) else "nz"
    for name in ("cacheK", "cacheV", "keyCache", "valueCache"):
        if name in named:
            require(named[name].format == wanted, "ERROR_INVALID_TENSOR_DTYPE", f"format of the cache on {chip}",
                    found=str(named[name]), expected=wanted, tensor=name)  # fmt: skip


def _check_log_n(param: Param, named: dict[str, Desc], chip: str) -> None:
    if param.scaleType != LOGN:
        return
    log_n = named["logN"]
    require(len(log_n.shape) == 1, DIM, "logN must be 1-D", found=str(log_n), tensor="logN")
    require_param(param.calcType in (PA_ENCODER, DECODER), "SCALE_TYPE_LOGN needs calcType PA_ENCODER or DECODER",
                  found=str(param.calcType))  # fmt: skip
    require_param(
        not (is_910b(chip) and paged(param) and param.kernelType != HIGH_PRECISION),
        "PA_ENCODER with SCALE_TYPE_LOGN needs KERNELTYPE_HIGH_PRECISION on 910B",
    )
    wanted = "float32" if is_910b(chip) else "float16"
    require(log_n.dtype == wanted, "ERROR_INVALID_TENSOR_DTYPE", f"dtype of logN on {chip}",
            found=str(log_n), expected=wanted, tensor="logN")  # fmt: skip


def _check_scales(param: Param, named: dict[str, Desc]) -> None:
    if not quantised(param):
        return
    for name in ("qkDescale", "vpvDescale", "pScale"):
        if name in named:
            require(named[name].shape == (param.headNum,), DIM, "a scale has one value a head",
                    found=str(named[name]), expected=f"[{param.headNum}]", tensor=name)  # fmt: skip


def _check_head_size(param: Param, ins: Sequence[Desc], chip: str) -> None:
    """Head sizes are read off inputs 1 and 2: key and value, or the caches in bypass and PREFIX_ENCODER."""
    heads, key, value = kv_heads(param), ins[1], ins[2]
    bypass = param.kvcacheCfg == K_BYPASS_V_BYPASS
    if not is_910b(chip):
        require(key == value, DIM, "key and value descs must be equal on 310P",
                found=str(value), expected=str(key), tensor="value")  # fmt: skip
        nz_cache = bypass and len(key.shape) > 2  # [layers, B, hidden / 16, maxS, 16]
        hidden = key.shape[2] * 16 if nz_cache else key.shape[-1]
        merged = bypass or len(key.shape) == 2
        _require_multiple(hidden if merged else heads, heads, "hidden size of key and value")
        size = hidden // heads if merged else hidden
        limit = MAX_HEAD_ALIBI if has_slopes(param) else MAX_HEAD_EQUAL
        _require_head_size(size, limit)
        require(size % 16 == 0, DIM, "the head size must be a multiple of 16 on 310P", found=str(size))
        return
    merged = bypass or len(key.shape) == 2 or (prefix(param) and len(key.shape) == 3)
    k_size = key.shape[-1]
    v_size = param.mlaVHeadSize or value.shape[-1]
    if merged:
        _require_multiple(k_size, heads, "hidden size of key")
        k_size //= heads
        if not param.mlaVHeadSize:
            _require_multiple(v_size, heads, "hidden size of value")
            v_size //= heads
    require(param.mlaVHeadSize <= k_size, DIM, "mlaVHeadSize is larger than the key's head size",
            found=f"{param.mlaVHeadSize} and {k_size}")  # fmt: skip
    mixed = not param.mlaVHeadSize and k_size != v_size
    limit = MAX_HEAD_MIXED if mixed else MAX_HEAD
    quant = quantised(param) and not param.mlaVHeadSize
    if (param.windowSize and not mixed) or param.scaleType != TOR or quant:
        limit = MAX_HEAD_EQUAL
        require(k_size == v_size, DIM, "head sizes of key and value must be equal here", found=f"{k_size} and {v_size}")
    if has_slopes(param):
        limit = MAX_HEAD_ALIBI
    _require_head_size(max(k_size, v_size), limit)


def _require_multiple(hidden: int, heads: int, what: str) -> None:
    require(hidden % heads == 0, DIM, f"{what} must be a multiple of kvHeadNum", found=f"{hidden} and {heads}")


def _require_head_size(size: int, limit: int) -> None:
    require(size <= limit, DIM, "head size of key or value", found=str(size), expected=f"at most {limit}")


def _check_window_mask(param: Param, named: dict[str, Desc], chip: str) -> None:
    if not param.windowSize or "mask" not in named:
        return
    mask = named["mask"]
    dims, compressed = (2, (512, 512)) if is_910b(chip) else (4, (1, 32, 512, 16))
    require(
        len(mask.shape) == dims, DIM, f"a sliding window mask has {dims} dimensions", found=str(mask), tensor="mask"
    )
    if param.maskType == SLIDING_WINDOW_COMPRESS:
        require(mask.shape == compressed, DIM, "shape of the compressed window mask",
                found=str(mask), expected=str(list(compressed)), tensor="mask")  # fmt: skip


def _check_paged(param: Param, named: dict[str, Desc], chip: str) -> None:
    query, key, lengths = named["query"], named["key"], named["seqLen"]
    legal = (2, 3, 4) if param.mlaVHeadSize else (2, 3)
    for name in ("query", "key", "value"):
        if name in named:
            same = param.mlaVHeadSize or len(named[name].shape) == len(query.shape)
            require(bool(len(named[name].shape) in legal and same), SIZE,
                    "number of dimensions of query, key and value", found=str(named[name]),
                    expected="[T, N, D] or [T, N * D], alike for all", tensor=name)  # fmt: skip
    slopes = named.get("slopes")
    require(slopes is None or len(slopes.shape) == 1, SIZE, "slopes must be 1-D", found=str(slopes), tensor="slopes")
    require(len(lengths.shape) in (1, 2), DIM_NUM, "seqLen is [B] or [2, B]", found=str(lengths), tensor="seqLen")
    if "value" in named:
        require(key.shape[:-1] == named["value"].shape[:-1], DIM,
                "key and value differ before their last dimension", found=str(named["value"]), expected=str(key),
                tensor="value")  # fmt: skip
    if "mask" in named:
        _check_prefill_mask(param, named["mask"], lengths, chip)
    require(slopes is None or slopes.shape[0] == param.headNum, DIM, "slopes: one a head",
            found=str(slopes), expected=f"[{param.headNum}]", tensor="slopes")  # fmt: skip
    require(len(lengths.shape) == 1 or lengths.shape[0] == 2, DIM, "seqLen is [B] or [2, B]",
            found=str(lengths), tensor="seqLen")  # fmt: skip


def _check_prefill_mask(param: Param, mask: Desc, lengths: Desc, chip: str) -> None:
    """PA_ENCODER and PREFIX_ENCODER. Shapes that only the kernel refuses are in `late`."""
    if param.kernelType == EXP_M8V2:
        if param.maskType == NORM_COMPRESS:
            _check_norm_compress(mask, chip)
        elif len(mask.shape) == 3:
            require(mask.shape[0] == lengths.shape[-1], SIZE, "batch of the mask",
                    found=str(mask), expected=f"[{lengths.shape[-1]}, S, S]", tensor="mask")  # fmt: skip
    elif has_slopes(param):
        _check_alibi_compress(param, mask, chip)
    elif param.maskType == NORM_COMPRESS:
        _check_norm_compress(mask, chip)
    elif is_910b(chip):
        require(len(mask.shape) in (2, 3, 4), SIZE, "a mask has 2, 3 or 4 dimensions", found=str(mask), tensor="mask")


def _check_norm_compress(mask: Desc, chip: str) -> None:
    dims, expected = (4, (1, 8, 128, 16)) if mask.format == "nz" else (2, (128, 128))
    require(len(mask.shape) == dims, SIZE, f"the compressed mask has {dims} dimensions",
            found=str(mask), expected=str(list(expected)), tensor="mask")  # fmt: skip
    if mask.shape == (1, 128, 2048, 16):
        require_param(not is_910b(chip), "the long compressed mask [1, 128, 2048, 16] is for 310P only",
                      found=str(mask), expected="[128, 128]", tensor="mask")  # fmt: skip
        return
    require(mask.shape == expected, DIM, "shape of the compressed mask",
            found=str(mask), expected=str(list(expected)), tensor="mask")  # fmt: skip


def _check_alibi_compress(param: Param, mask: Desc, chip: str) -> None:
    if not is_910b(chip):
        require(len(mask.shape) == 4, SIZE, "the compressed alibi mask is NZ with 4 dimensions",
                found=str(mask), expected="[1, 16, 256, 16] or [N, 8, S, 16]", tensor="mask")  # fmt: skip
        require(mask.shape[3] == 16, DIM, "last dimension of the NZ alibi mask",
                found=str(mask), expected="16", tensor="mask")  # fmt: skip
        return
    require_param(
        not (mask.dtype == "float16" and param.kernelType == DEFAULT),
        "a float16 compressed alibi mask needs KERNELTYPE_HIGH_PRECISION",
    )
    dims = len(mask.shape)
    require(dims in (2, 3), SIZE, "the compressed alibi mask has 2 or 3 dimensions", found=str(mask), tensor="mask")
    require(
        mask.shape == (256, 256) or (
            dims == 3 and param.maskType != ALIBI_COMPRESS_LEFT_ALIGN
            and (mask.shape[0] == param.headNum or mask.shape[2] == 128)
        ),
        DIM, "shape of the compressed alibi mask",
        found=str(mask), expected=f"[256, 256] or [{param.headNum}, S, 128]", tensor="mask",
    )  # fmt: skip


def _check_prefix_shapes(param: Param, named: dict[str, Desc]) -> None:
    query, key = named["query"], named["keyCache"]
    dim_nums = {
        "query": (2, 3), "keyCache": (3, 4), "valueCache": (len(key.shape),), "blockTables": (2,), "seqLen": (1,),
        "kvSeqLen": (1,), "slopes": (1,),
    }  # fmt: skip
    require_dim_nums(named, dim_nums)
    if "mask" in named:
        _check_prefill_mask(param, named["mask"], named["seqLen"], "Ascend910B")
    k_size = key.shape[-1] // (kv_heads(param) if len(key.shape) == 3 else 1)
    q_size = query.shape[-1] // (param.headNum if len(query.shape) == 2 else 1)
    for size, what in ((k_size, "key"), (q_size, "query")):
        _require_head_size(size, 128)
        require(size % 16 == 0, DIM, f"head size of {what} must be a multiple of 16", found=str(size))
    require(key.shape[1] * k_size <= 128 * 128, DIM, "block size times head size",
            found=str(key.shape[1] * k_size), expected="at most 16384", tensor="keyCache")  # fmt: skip
    batches = {name: named[name].shape[0] for name in ("blockTables", "seqLen", "kvSeqLen")}
    require(len(set(batches.values())) == 1, DIM, "batch sizes differ", found=str(batches))


def _check_flash(param: Param, named: dict[str, Desc], chip: str) -> None:
    cache_dims = 5 if not is_910b(chip) else 3 if param.batchRunStatusEnable else 4
    require_dim_nums(named, dict.fromkeys(("query", "key", "value"), (2, 4)))
    require_dim_nums(named, {"cacheK": (cache_dims,), "cacheV": (cache_dims,)})
    if "mask" in named and is_910b(chip):
        require(len(named["mask"].shape) in (2, 3, 4), SIZE, "a mask has 2, 3 or 4 dimensions",
                found=str(named["mask"]), tensor="mask")  # fmt: skip
    require_dim_nums(named, dict.fromkeys(("tokenOffset", "seqLen", "layerId", "batchRunStatus"), (1,)))
    key, value = named["cacheK"].shape, named["cacheV"].shape
    for name, cache in (("key", key), ("value", value)):
        if name in named:
            dims = named[name].shape
            hidden = dims[2] * dims[3] if len(dims) == 4 else dims[1]
            cached = cache[-1] if is_910b(chip) else cache[2] * cache[4]
            require(hidden == cached, DIM, f"hidden size of {name} and its cache differ",
                    found=str(hidden), expected=str(cached), tensor=name)  # fmt: skip
            require(
                hidden % 16 == 0, DIM, f"hidden size of {name} must be a multiple of 16", found=str(hidden), tensor=name
            )
    equal = key[:-1] == value[:-1] if is_910b(chip) else key == value
    require(equal, DIM, "the caches differ", found=str(value), expected=str(key))
    _require_batch(named, key[0 if param.batchRunStatusEnable else 1])


def _require_batch(named: dict[str, Desc], batch: int) -> None:
    for name in ("tokenOffset", "seqLen", "batchRunStatus"):
        if name in named:
            require(named[name].shape[0] == batch, DIM, "batch sizes differ",
                    found=str(named[name]), expected=f"[{batch}]", tensor=name)  # fmt: skip


def _check_bnsd_prefill(param: Param, named: dict[str, Desc]) -> None:
    query, key, value, lengths = (named[name] for name in ("query", "key", "value", "seqLen"))
    require_dim_nums(named, {"query": (4,), "key": (4,), "seqLen": (1, 2)})
    require(key == value, DIM, "key and value descs differ", found=str(value), expected=str(key))
    require(len(lengths.shape) == 1 or lengths.shape[0] == 2, DIM, "seqLen is [B] or [2, B]",
            found=str(lengths), tensor="seqLen")  # fmt: skip
    batch = lengths.shape[-1]
    expected_key = (batch, kv_heads(param), key.shape[2], query.shape[3])
    require(query.shape[:2] == (batch, param.headNum), DIM, "query is [B, N, S, D]",
            found=str(query), expected=f"[{batch}, {param.headNum}, S, D]", tensor="query")  # fmt: skip
    require(key.shape == expected_key, DIM, "key is [B, Nk, S, D]",
            found=str(key), expected=str(list(expected_key)), tensor="key")  # fmt: skip
    _require_head_size(query.shape[3], MAX_HEAD_EQUAL)


def _check_bnsd_flash(param: Param, named: dict[str, Desc], chip: str) -> None:
    query, key = named["query"], named["cacheK"]
    require_dim_nums(named, {"query": (4,), "cacheK": (5,), "cacheV": (5,)})
    if "mask" in named and is_910b(chip):
        require_dim_nums(named, {"mask": (2, 3, 4)})
    require_dim_nums(named, dict.fromkeys(("tokenOffset", "seqLen", "layerId", "batchRunStatus"), (1,)))
    require(
        key == named["cacheV"], DIM, "the caches differ", found=str(named["cacheV"]), expected=str(key), tensor="cacheV"
    )
    batch, heads, _, size = query.shape
    layers, _, _, positions, _ = key.shape
    expected = (layers, batch, kv_heads(param), positions, size)
    if not is_910b(chip):
        expected = (layers, batch * kv_heads(param), size // 16, positions, 16)
    require(key.shape == expected, DIM, "cache and query do not fit",
            found=str(key), expected=str(list(expected)), tensor="cacheK")  # fmt: skip
    require(heads == param.headNum, DIM, "query is [B, N, S, D]",
            found=str(query), expected=f"N = {param.headNum}", tensor="query")  # fmt: skip
    _require_head_size(size, MAX_HEAD_EQUAL)
    _require_batch(named, batch)


def late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    """Setup: masks that only the kernels refuse (data/atb-layers/masks.json). The masks' lengths are checked where the
    host values are known, by the kernel."""
    named = dict(zip(inputs(param), ins, strict=True))
    mask = named.get("mask")
    if not is_910b(chip):
        _late_310p(param, named, mask)
        return
    if prefix(param) and chip != "host":
        require(named["keyCache"].shape[1] == PREFIX_BLOCK, LOGGED, "PREFIX_ENCODER: block size",
                found=str(named["keyCache"]), expected=str(PREFIX_BLOCK), tensor="keyCache")  # fmt: skip
    if mask is None or mask.elements == 0 or has_slopes(param) or param.windowSize or prefix(param):
        return
    batch = (named.get("tokenOffset") or named["seqLen"]).shape[-1]
    fits = {
        2: True,
        3: mask.shape[0] == (param.headNum if param.maskType == ALIBI else batch),
        4: mask.shape[:2] == (batch, param.headNum) or (param.maskType == NORM and mask.shape[:2] == (batch, 1)),
    }
    require(mask.format == "nd" and fits[len(mask.shape)], "ERROR_RT_FAIL", "this mask shape is not supported",
            found=str(mask), expected=f"nd [S, S], [{batch}, S, S]; alibi [N, S, S] or [{batch}, N, S, S]",
            tensor="mask")  # fmt: skip


def check_prefix_lengths(q_lens: Sequence[int], kv_lens: Sequence[int], chip: str) -> None:
    """PREFIX_ENCODER: what Setup refuses when it knows the lengths."""
    if chip == "host":
        return
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        fits = q_len >= 0 and kv_len >= 0 and (kv_len - q_len) % PREFIX_BLOCK == 0
        require(fits, LOGGED, "PREFIX_ENCODER: cached tokens", found=str(kv_len - q_len),
                expected=f"a multiple of {PREFIX_BLOCK}", tensor="kvSeqLen")  # fmt: skip


def _late_310p(param: Param, named: dict[str, Desc], mask: Desc | None) -> None:
    if paged(param):
        query = named["query"]
        require_param(
            len(query.shape) in (3, 4), "on 310P PA_ENCODER takes [T, N, D] (or BNSD)", found=str(query), tensor="query"
        )
        if mask is not None and param.kernelType != EXP_M8V2:
            flat = mask.format == "nd" and len(mask.shape) == 2
            require_param(not flat, "on 310P a mask is NZ or [1 or B, S, S]", found=str(mask), tensor="mask")
        # The library logs the failed tiling and still returns NO_ERROR; the kernel cannot run.
        require(not has_slopes(param) or param.isTriuMask == 1, LOGGED,
                "on 310P a compressed alibi mask needs isTriuMask 1")  # fmt: skip
    elif mask is not None and mask.format == "nd" and param.inputLayout == BSND:
        require(param.maskType == ALIBI, "ERROR_OUT_OF_HOST_MEMORY", "on 310P the mask must be NZ",
                found=str(mask), tensor="mask")  # fmt: skip
        require_param(
            len(mask.shape) == 4, "on 310P an ND alibi mask must be [B, N, S, S]", found=str(mask), tensor="mask"
        )


def host(param: Param, chip: str) -> frozenset[int]:
    names = inputs(param)
    if paged(param):
        read: tuple[str, ...] = ("seqLen",)
    elif prefix(param):
        read = ("seqLen", "kvSeqLen")
    else:
        read = ("tokenOffset", "seqLen", "batchRunStatus")
    return frozenset(names.index(name) for name in read if name in names)


def empty(param: Param) -> frozenset[int]:
    """The quantisation offsets are ignored and may be empty."""
    names = inputs(param)
    return frozenset(names.index(name) for name in ("qkOffset", "vpvOffset") if name in names)


def writes(param: Param) -> frozenset[int]:
    """With K_CACHE_V_CACHE the new keys and values are appended to the caches, which are not outputs."""
    names = inputs(param)
    if "cacheK" not in names or param.kvcacheCfg == K_BYPASS_V_BYPASS:
        return frozenset()
    return frozenset((names.index("cacheK"), names.index("cacheV")))


# Of both attention operations.
QUANT_TYPES = {
    "TYPE_QUANT_UNQUANT": 0, "TYPE_DEQUANT_FUSION": 1, "TYPE_QUANT_QKV_OFFLINE": 2, "TYPE_QUANT_QKV_ONLINE": 3,
}  # fmt: skip
SCALE_TYPES = {"SCALE_TYPE_TOR": 0, "SCALE_TYPE_LOGN": 1, "SCALE_TYPE_MAX": 2}

# Members that torch_atb has; C++ adds KERNELTYPE_EXP_M8V2 = 2 and MASK_TYPE_CAUSAL_MASK = 9 (reference 2.2).
ENUMS = {
    "CalcType": {"UNDEFINED": 0, "ENCODER": 1, "DECODER": 2, "PA_ENCODER": 3, "PREFIX_ENCODER": 4},
    "KernelType": {"KERNELTYPE_DEFAULT": 0, "KERNELTYPE_HIGH_PRECISION": 1},
    "ClampType": {"CLAMP_TYPE_UNDEFINED": 0, "CLAMP_TYPE_MIN_MAX": 1},
    "MaskType": {
        "MASK_TYPE_UNDEFINED": 0, "MASK_TYPE_NORM": 1, "MASK_TYPE_ALIBI": 2, "MASK_TYPE_NORM_COMPRESS": 3,
        "MASK_TYPE_ALIBI_COMPRESS": 4, "MASK_TYPE_ALIBI_COMPRESS_SQRT": 5, "MASK_TYPE_ALIBI_COMPRESS_LEFT_ALIGN": 6,
        "MASK_TYPE_SLIDING_WINDOW_NORM": 7, "MASK_TYPE_SLIDING_WINDOW_COMPRESS": 8,
    },
    "KvCacheCfg": {"K_CACHE_V_CACHE": 0, "K_BYPASS_V_BYPASS": 1},
    "QuantType": QUANT_TYPES,
    "ScaleType": SCALE_TYPES,
    "CacheType": {"CACHE_TYPE_NORM": 0, "CACHE_TYPE_SWA": 1},
}  # fmt: skip

SELF_ATTENTION = AtbOp(
    name="SelfAttention",
    fields=(
        Field(name="quantType", kind="QuantType", default=0),
        Field(name="outDataType", kind="dtype", default=ACL_UNDEFINED),
        Field(name="headNum", kind="int", default=0),
        Field(name="kvHeadNum", kind="int", default=0),
        Field(name="qScale", kind="float", default=1.0),
        Field(name="qkScale", kind="float", default=1.0),
        Field(name="batchRunStatusEnable", kind="bool", default=False),
        Field(name="isTriuMask", kind="uint", default=0),
        Field(name="calcType", kind="CalcType", default=0),
        Field(name="kernelType", kind="KernelType", default=0),
        Field(name="clampType", kind="ClampType", default=0),
        Field(name="clampMin", kind="float", default=0.0),
        Field(name="clampMax", kind="float", default=0.0),
        Field(name="maskType", kind="MaskType", default=0),
        Field(name="kvcacheCfg", kind="KvCacheCfg", default=0),
        Field(name="scaleType", kind="ScaleType", default=0),
        Field(name="inputLayout", kind="InputLayout", default=0),
        Field(name="mlaVHeadSize", kind="uint", default=0),
        Field(name="cacheType", kind="CacheType", default=0),
        Field(name="windowSize", kind="uint", default=0),
    ),
    arity=arity,
    rows=rows,
    shape=shape,
    check=check,
    late=late,
    host=host,
    empty=empty,
    writes=writes,
    enums=ENUMS,
    source="atb-operations.md 3.8; atb-layers/masks.json; atb-cases/self_attention.csv",
)
