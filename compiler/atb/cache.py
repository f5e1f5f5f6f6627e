"""ReshapeAndCache (paged caches) and KvCache (contiguous caches): writing keys and values where attention reads them.

Sources: atb-operations.md 3.10 and 3.11, atb-layers/refusals.json, atb-cases/reshape_and_cache.csv and kv_cache.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from llmc.compiler.atb.core import (
    DTYPE_BYTES,
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

# compressType
NO_COMPRESS, KVHEAD, KVHEAD_ROPE = range(3)
# kvCacheCfg
K_CACHE_V_CACHE, K_CACHE_V_BYPASS, K_CACHE_V_CACHE_NZ = range(3)


def inputs(param: Param) -> tuple[str, ...]:
    """Names of ReshapeAndCache's input slots in order (reference 3.10)."""
    if param.kvCacheCfg == K_CACHE_V_BYPASS:
        return ("key", "keyCache", "slots")
    extra = {NO_COMPRESS: (), KVHEAD: ("wins", "seqLen"), KVHEAD_ROPE: ("wins", "seqLen", "offsetIndex")}
    return ("key", "value", "keyCache", "valueCache", "slots", *extra[param.compressType])


def caches(param: Param) -> Mapping[int, int]:
    """{output: input} of the caches, which are written in place."""
    names = inputs(param)
    return {out: names.index(name) for out, name in enumerate(n for n in ("keyCache", "valueCache") if n in names)}


def check(param: Param, chip: str) -> None:
    for name, value in (("compressType", param.compressType), ("kvCacheCfg", param.kvCacheCfg)):
        require_param(0 <= value <= 2, f"{name} is not a value of its enum", found=str(value), expected="0 to 2")
    require_param(param.compressType == NO_COMPRESS or param.kvCacheCfg == K_CACHE_V_CACHE,
                  "compressType needs kvCacheCfg K_CACHE_V_CACHE", found=str(param.kvCacheCfg))  # fmt: skip
    if chip == "Ascend310P":
        require_param(param.compressType == NO_COMPRESS, f"compressType is not supported on {chip}")
        require_param(param.kvCacheCfg != K_CACHE_V_BYPASS, f"K_CACHE_V_BYPASS is not supported on {chip}")


def rows(param: Param, chip: str) -> list[Row]:
    names = inputs(param)
    formats = (":nz",) if chip == "Ascend310P" or param.kvCacheCfg == K_CACHE_V_CACHE_NZ else ("",)
    kinds = [(dtype, dtype) for dtype in ("float16", "bfloat16", "int8")]
    if param.kvCacheCfg == K_CACHE_V_CACHE_NZ and chip != "Ascend310P":
        kinds = list(product(("float16", "bfloat16", "int8"), ("float16", "bfloat16")))
    found: list[Row] = []
    for (key, value), nz in product(kinds, formats):
        words = {"key": key, "value": value, "keyCache": key + nz, "valueCache": value + nz}
        outs = [words[name] for name in ("keyCache", "valueCache") if name in names]
        found.append((*(words.get(name, "int32") for name in names), *outs))
    return found


def shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    named = dict(zip(inputs(param), ins, strict=True))
    require_dim_nums(named, {"key": (3,), "value": (3,), "keyCache": (4,), "valueCache": (4,), "slots": (1,)})
    key, key_cache = named["key"].shape, named["keyCache"].shape
    if param.kvCacheCfg == K_CACHE_V_BYPASS:
        require_dim(key[0] == named["slots"].shape[0], "one slot a token", named["slots"], f"[{key[0]}]", "slots")
        require_dim(key[1:] == key_cache[2:], "heads and head size of key and keyCache differ",
                    named["keyCache"], f"[blocks, blockSize, {key[1]}, {key[2]}]", "keyCache")  # fmt: skip
        return [named["keyCache"]]
    value, value_cache = named["value"].shape, named["valueCache"].shape
    require_dim(key[:2] == value[:2], "tokens and heads of key and value differ", named["value"], named["key"])
    if chip == "Ascend310P" or param.kvCacheCfg == K_CACHE_V_CACHE_NZ:
        _check_nz(param, named)
    else:
        require_dim(
            key_cache[:2] == value_cache[:2], "blocks of the caches differ", named["valueCache"], named["keyCache"]
        )
        heads = key[1]
        if param.compressType != NO_COMPRESS:
            heads = 1
            require_dim(key[2] == value[2], "compressed heads need equal head sizes", named["value"], named["key"])
            require_dim(key[2] % 32 == 0, "compressed heads need a head size that is a multiple of 32", key[2])
        for name, size, cache in (("keyCache", key[2], key_cache), ("valueCache", value[2], value_cache)):
            require_dim(cache[2:] == (heads, size), "heads and head size of the cache", named[name],
                        f"[blocks, blockSize, {heads}, {size}]", name)  # fmt: skip
    return [named["keyCache"], named["valueCache"]]


def _check_nz(param: Param, named: Mapping[str, Desc]) -> None:
    """[blocks, Nk * D / n0, blockSize, n0]; n0 is 16, or on 910B 32 for an int8 key."""
    key, value = named["key"].shape, named["value"].shape
    key_cache, value_cache = named["keyCache"].shape, named["valueCache"].shape
    if param.kvCacheCfg == K_CACHE_V_CACHE:
        require_dim(key[2] == value[2], "head sizes of key and value must be equal on 310P", value, key)
        require_dim(key_cache[0] == value_cache[0], "numbers of blocks differ", named["valueCache"], named["keyCache"])
    require_dim(key_cache[2] == value_cache[2], "block sizes differ", named["valueCache"], named["keyCache"])
    require_dim(key_cache[2] % 16 == 0, "the block size must be a multiple of 16", key_cache[2])
    wide = named["key"].dtype == "int8" and param.kvCacheCfg == K_CACHE_V_CACHE_NZ
    for name, (_, heads, size), n0 in (("keyCache", key, 32 if wide else 16), ("valueCache", value, 16)):
        cache = named[name].shape
        require_dim(cache[3] == n0 and cache[1] * n0 == heads * size, "NZ layout of the cache", named[name],
                    f"[blocks, {heads * size} / {n0}, blockSize, {n0}]", name)  # fmt: skip


def late(param: Param, ins: Sequence[Desc], outs: Sequence[Desc], chip: str) -> None:
    for out, cache in caches(param).items():
        same = (outs[out].dtype, outs[out].shape) == (ins[cache].dtype, ins[cache].shape)
        require_dim(same, "an output is not its cache", outs[out], ins[cache], f"output {out}")
    # The kernel wants a last dimension of 32 for int8 where InferShape has demanded 16: no shape passes both.
    require(
        chip != "Ascend310P" or param.kvCacheCfg == K_CACHE_V_CACHE_NZ or ins[0].dtype != "int8", "ERROR_RT_FAIL",
        "int8 caches are impossible on 310P", found=str(ins[2]), expected="float16", tensor="keyCache",
    )  # fmt: skip
    for tensor in ins[:2] if outs[0].format == "nz" else ():  # whole NZ blocks of each head
        size = tensor.shape[2] * DTYPE_BYTES[tensor.dtype]
        require(
            size % 32 == 0, LOGGED, "head size in bytes", found=str(size), expected="a multiple of 32", tensor="key"
        )


RESHAPE_AND_CACHE = AtbOp(
    name="ReshapeAndCache",
    fields=(
        Field(name="compressType", kind="CompressType", default=0),
        Field(name="kvCacheCfg", kind="KvCacheCfg", default=0),
    ),
    arity=lambda param: (len(inputs(param)), len(caches(param))),
    rows=rows,
    shape=shape,
    check=check,
    late=late,
    in_place=caches,
    # Members that torch_atb has; C++ adds K_CACHE_V_CACHE_NZ = 2 (reference 2.2).
    enums={
        "CompressType": {"COMPRESS_TYPE_UNDEFINED": 0, "COMPRESS_TYPE_KVHEAD": 1, "COMPRESS_TYPE_KVHEAD_ROPE": 2},
        "KvCacheCfg": {"K_CACHE_V_CACHE": 0, "K_CACHE_V_BYPASS": 1},
    },
    source="atb-operations.md 3.10; atb-cases/reshape_and_cache.csv; atb-layers/refusals.json",
)

KV_INPUTS = ("newKv", "layerId", "cache", "tokenOffset", "seqLen")


def kv_rows(param: Param, chip: str) -> list[Row]:
    formats = [(":nz", ":nz"), ("", ":nz")] if chip == "Ascend310P" else [("", "")]
    return [
        (dtype + new, integer, dtype + cache, integer, integer)
        for dtype, integer, (new, cache) in product(("float16", "int8"), ("int32", "uint32"), formats)
    ]


def kv_shape(param: Param, ins: Sequence[Desc], chip: str) -> list[Desc]:
    """910B: newKv [T, H] or [B, S, N, D], cache [layers, B, maxS, H]. 310P: newKv [1, H / n0, T, n0] and cache
    [layers, B, H / n0, maxS, n0], both NZ, counted in blocks."""
    named = dict(zip(KV_INPUTS, ins, strict=True))
    ones = dict.fromkeys(("layerId", "tokenOffset", "seqLen"), (1,))
    new, cache = named["newKv"].shape, named["cache"].shape
    align = 32 if named["cache"].dtype == "int8" else 16
    if chip == "Ascend310P":
        counts = {"newKv": (4,), "cache": (5,), **ones}
        fits = all(len(named[name].shape) in counts[name] for name in KV_INPUTS)
        require_dim(fits, "number of dimensions", ", ".join(map(str, ins)), counts)
        new_hidden, hidden = new[1], cache[2]
    else:
        require_dim_nums(named, {"newKv": (2, 4), "cache": (4,), **ones})
        new_hidden, hidden = new[1] if len(new) == 2 else new[2] * new[3], cache[3]
    require_dim(hidden % align == 0, "hidden size of the cache", hidden, f"a multiple of {align}", "cache")
    require_dim(new_hidden == hidden, "hidden sizes of newKv and the cache differ", named["newKv"], hidden, "newKv")
    for name in ("tokenOffset", "seqLen"):
        require_dim(named[name].shape[0] == cache[1], "batch sizes differ", named[name], f"[{cache[1]}]", name)
    return []


KV_CACHE = AtbOp(
    name="KvCache",
    fields=(),
    arity=lambda param: (len(KV_INPUTS), 0),
    rows=kv_rows,
    shape=kv_shape,
    writes=lambda param: frozenset((KV_INPUTS.index("cache"),)),
    bound=False,
    source="atb-operations.md 3.11; atb-cases/kv_cache.csv",
)

OPS: tuple[AtbOp, ...] = (RESHAPE_AND_CACHE, KV_CACHE)
