"""Planning for speed: steps of a planned graph become faster ones that give the same numbers.

Each rewrite takes a step and gives a faster `run` for it, or None; it is asked once per set of input shapes. Kernels
of this package say what the chip computes; a rewrite may choose another way to the same result, to the rounding of the
order of sums (tests/hostatb/test_rewrites.py compares them).

Measured on one core of a Xeon with avx512_bf16 and no AMX (µs for the four matmuls of a SmolLM2 layer):

    rows    F.linear bf16    oneDNN, weights packed once    float32, weights converted in the call
       1              547                            303                                      1365
       8             1142                            803                                      2383
     128            11339                          10901                                      8136
     512            43526                          42951                                     25991
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import scaled_dot_product_attention

from llmc.compiler.atb.core import FLOATS16, Param
from llmc.compiler.atb.elementwise import SWIGLU_FORWARD
from llmc.compiler.atb.norm import NORM, PRENORM
from llmc.compiler.atb.self_attention import DECODER
from llmc.runtime.hostatb.numeric import TORCH_DTYPE, free_memory
from llmc.runtime.hostatb.operation import Single
from llmc.runtime.hostatb.paged_attention import checked_tables
from llmc.runtime.hostatb.step import Step

Run = Callable[[Sequence[Tensor]], list[Tensor]]
T = TypeVar("T")

# From this many rows on, float32 units beat 16-bit ones on a CPU without AMX (table above).
FLOAT32_ROWS = 48
# Packed copies leave this much memory free: caches and activations come from it.
RESERVE_BYTES = 2 << 30
# Up to this many tokens one small matrix product turns a head faster than four passes over it.
MATRIX_TOKENS = 8


def rewrite(steps: Sequence[Step]) -> Sequence[Step]:
    """Every step that a rewrite knows runs faster; the others stay."""
    faster = [replace(step, run=_on_cpu(run, step.run)) if (run := find(step)) else step for step in steps]
    for at in range(len(steps) - 1):
        if is_split_then_rope(steps[at], steps[at + 1]):
            faster[at], faster[at + 1] = split_then_rope(steps[at], steps[at + 1])
    return faster


def find(step: Step) -> Run | None:
    """The faster way to run the step, if there is one."""
    core = step.core
    if not isinstance(core, Single) or core.op.name not in REWRITES:
        return None
    return REWRITES[core.op.name](step, core.param)


def _on_cpu(faster: Run, kernel: Run) -> Run:
    """What is measured here is measured on CPUs; CUDA tensors take the plain kernel."""
    return lambda tensors: faster(tensors) if tensors[0].is_cpu else kernel(tensors)


def derived(name: str, make: Callable[..., T], *tensors: Tensor) -> T:
    """`make(*tensors)`, kept on the first of them until one changes: what is computed once a model, or once a step."""
    first = tensors[0]
    if first.is_inference():  # such tensors do not tell whether they changed
        return make(*tensors)
    key = f"_atb_{name}"
    known, versions, value = getattr(first, key, ((), (), None))
    now = tuple(t._version for t in tensors)
    if versions != now or any(a is not b for a, b in zip(known, tensors[1:], strict=True)):
        value = make(*tensors)
        setattr(first, key, (tensors[1:], now, value))
    return value  # type: ignore[return-value]


def fast_linear(step: Step, p: Param) -> Run | None:
    """16-bit x [rows, k] times weight [n, k]: the weight in oneDNN's layout, or float32 units for many rows."""
    plain = p.transposeB and not p.transposeA and not p.enAccum and p.matmulType == 0 and p.outDataType == -1
    x, weight = step.ins[:2]
    if not plain or x.dtype not in FLOATS16 or weight.format != "nd" or len(weight.shape) != 2 or step.views[1]:
        return None
    many = prod(x.shape[:-1]) >= FLOAT32_ROWS and not has_amx()
    if not many and not onednn_supports(x.dtype):
        return None
    product = in_float32 if many else with_packed_weight
    if not p.hasBias:
        return lambda tensors: [product(tensors[0], tensors[1])]
    return lambda tensors: [product(tensors[0], tensors[1]) + tensors[2]]


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n]: exact products, float32 sums, one rounding, as the chip's cube unit."""
    return torch.nn.functional.linear(x.float(), weight.float()).to(x.dtype)


def with_packed_weight(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n] on the weight's packed copy, which lives as long as the weight."""
    packed = derived("packed", _packed, weight)
    if packed is None:
        return torch.nn.functional.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _packed(weight: Tensor) -> Tensor | None:
    """The copy in oneDNN's layout; None where memory is short, since all copies together double the weights."""
    free = free_memory()
    if free is not None and free < RESERVE_BYTES + 2 * weight.nbytes:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def onednn_supports(dtype: str) -> bool:
    """oneDNN has a kernel for this 16-bit type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == "bfloat16" else ops._is_mkldnn_fp16_supported())


def fast_rms_norm(step: Step, p: Param) -> Run | None:
    """NORM and PRENORM without quantisation or options, in as few calls as torch allows."""
    if p.layerType not in (NORM, PRENORM) or len(step.ins) != p.layerType + 1 or len(step.ins[-1].shape) != 1:
        return None
    options = p.normParam
    if options.rstd or options.precisionMode or options.modelType or options.quantType or p.preNormParam.quantType:
        return None
    epsilon = options.epsilon if p.layerType == NORM else p.preNormParam.epsilon

    width = step.ins[-1].shape[0]
    one_row = step.ins[0].elements == width

    def norm(total: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
        wide = derived("float32", Tensor.float, gamma)
        if one_row:  # one number a row is cheaper in Python than in a tensor
            return (total * wide).mul_((vector_norm(total).item() ** 2 / width + epsilon) ** -0.5).to(dtype)
        scale = total.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        return (total * scale).mul_(wide).to(dtype)

    def run_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
        x, gamma = tensors
        return [norm(x.float(), gamma, x.dtype)]

    def run_prenorm(tensors: Sequence[Tensor]) -> list[Tensor]:
        x, residual, gamma = tensors
        total = torch.add(x.float(), residual)
        return [norm(total, gamma, x.dtype), total.to(x.dtype)]

    return run_norm if p.layerType == NORM else run_prenorm


def fast_swiglu(step: Step, p: Param) -> Run | None:
    """silu(gate) * up in float32; `up` is widened inside the product."""
    if p.activationType != SWIGLU_FORWARD:
        return None

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        gate, up = tensors[0].chunk(2, -1)
        return [torch.nn.functional.silu(gate.float()).mul_(up).to(up.dtype)]

    return run


def fast_rope(step: Step, p: Param) -> Run | None:
    """Rotation of halves in float32, q and k one after the other."""
    if not is_wide_rope(step, p):
        return None
    return lambda tensors: [rotate(x, *tensors[2:4]).view(x.shape) for x in tensors[:2]]


def is_wide_rope(step: Step, p: Param) -> bool:
    """float16 rounds both products, which the plain kernel does."""
    q, _, cos = step.ins[:3]
    one_row_a_token = p.cosFormat == 0 and cos.shape[0] == q.shape[0] and len(q.shape) == 2
    return p.rotaryCoeff == 2 and one_row_a_token and q.dtype != "float16"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads * size], tables [tokens, size] -> [tokens, heads, size]. What the tables give is made once for
    all layers: a rotation matrix a token when they are few, else the tables wide, sin with its first half negated."""
    size = cos.shape[1]
    heads = x.unflatten(-1, (-1, size)).float()
    if x.shape[0] <= MATRIX_TOKENS:
        return torch.bmm(heads, derived("rotation", _rotations, cos, sin)).to(x.dtype)
    turned = heads.roll(size // 2, -1).mul_(derived("turned", _first_half_negated, sin))
    return (heads * derived("wide", lambda t: t.float().unsqueeze(1), cos)).add_(turned).to(x.dtype)


def _first_half_negated(sin: Tensor) -> Tensor:
    first, second = sin.float().chunk(2, -1)
    return torch.cat((-first, second), -1).unsqueeze(1)


def _rotations(cos: Tensor, sin: Tensor) -> Tensor:
    """[tokens, size, size]: cos on the diagonal, sin where a channel meets its partner half a head away. A product with
    it sums two terms and zeros, so it is as exact as the two products alone."""
    size = cos.shape[1]
    partner = torch.eye(size).roll(size // 2, 0)
    return torch.diag_embed(cos.float()) + partner * _first_half_negated(sin)


def is_split_then_rope(split: Step, rope: Step) -> bool:
    """q, k, v split from one packed product, and the rotation reads the first two as they are."""
    a, b = split.core, rope.core
    if not (isinstance(a, Single) and isinstance(b, Single) and a.op.name == "Split" and b.op.name == "Rope"):
        return False
    adjacent = len(split.outputs) == 3 and rope.inputs[:2] == split.outputs[:2] and rope.views[:2] == (None, None)
    only_here = set(split.outputs[:2]) <= set(rope.frees)
    last_axis = a.param.splitDim % len(split.ins[0].shape) == len(split.ins[0].shape) - 1
    return adjacent and only_here and last_axis and not any(split.stores) and is_wide_rope(rope, b.param)


def split_then_rope(split: Step, rope: Step) -> tuple[Step, Step]:
    """q and k, which lie side by side in the packed product, turn together; the parts stay views of it."""
    widths = [out.shape[-1] for out in split.outs]
    both = widths[0] + widths[1]

    def run_split(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors[0].split(widths, -1))

    def run_rope(tensors: Sequence[Tensor]) -> list[Tensor]:
        q = tensors[0]
        packed = q.as_strided((q.shape[0], both), q.stride())
        return list(rotate(packed, *tensors[2:4]).view(q.shape[0], both).split(widths[:2], -1))

    return replace(split, run=_on_cpu(run_split, split.run)), replace(rope, run=_on_cpu(run_rope, rope.run))


def fast_reshape_and_cache(step: Step, p: Param) -> Run | None:
    """Keys and values into [blocks, blockSize, Nk, D] caches; slots are checked once a step, not once a layer."""
    if (
        len(step.ins) != 5
        or p.compressType
        or p.kvCacheCfg
        or step.ins[2].format != "nd"
        or len(step.ins[2].shape) != 4
    ):
        return None
    key, value, key_cache, value_cache = step.ins[:4]
    rows = key_cache.shape[0] * key_cache.shape[1]
    if key_cache.shape != value_cache.shape or key.shape != value.shape or step.ins[4].shape[0] != key.shape[0]:
        return None
    kernel = step.run

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        key, value, key_cache, value_cache, slots = tensors
        checked = derived(f"slots_below_{rows}", lambda t: _all_within(t, rows), slots)
        if checked is None:
            return kernel(tensors)
        for new, cache in ((key, key_cache), (value, value_cache)):
            cache.flatten(0, 1).index_copy_(0, checked, new)
        return [key_cache, value_cache]

    return run


def _all_within(slots: Tensor, rows: int) -> Tensor | None:
    """int64 slots when all lie in the cache; None where the kernel must skip or refuse some."""
    low, high = torch.aminmax(slots)
    return slots.long() if low >= 0 and high < rows else None


@dataclass(frozen=True, kw_only=True)
class CacheRows:
    """Where a step's keys lie in a cache: one run of rows, or an index [B * longest] with a mask of the padding."""

    start: int
    count: int
    index: Tensor | None
    bias: Tensor | None


def fast_paged_attention(step: Step, p: Param) -> Run | None:
    """Decode without masks or quantisation: all sequences in one call; which rows to read is worked out once a step."""
    q, key_cache, value_cache, _, lengths = step.ins[:5]
    plain = len(step.ins) == 5 and p.qScale in (0, 1) and not p.inputLayout and key_cache.format == "nd"
    if not plain or key_cache != value_cache or lengths.shape[0] != q.shape[0] or q.shape[1] != p.headNum:
        return None
    batch, heads, size = q.shape
    blocks, block, kv_heads, _ = key_cache.shape
    chip, dtype = step.core.chip, q.dtype

    def rows_of(cache: Tensor, lengths: Tensor, tables: Tensor) -> CacheRows:
        named = {"keyCache": cache, "blockTables": tables}
        counts = lengths.tolist()
        ids = checked_tables(p, named, counts, chip)[1]
        used = ids[0][: -(-counts[0] // block)]
        if batch == 1 and used == list(range(used[0], used[0] + len(used))):
            return CacheRows(start=used[0] * block, count=counts[0], index=None, bias=None)
        position = torch.arange(max(counts))
        index = torch.tensor(ids)[:, position // block] * block + position % block
        return CacheRows(start=0, count=len(position), index=_own(index, counts), bias=_padding(counts, dtype))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, key_cache, value_cache, tables, lengths = tensors
        rows = derived(f"rows_of_{blocks}x{block}_{dtype}", partial(rows_of, key_cache), lengths, tables)
        keys, values = (_read(cache, rows, batch) for cache in (key_cache, value_cache))
        grouped = q.view(batch, kv_heads, heads // kv_heads, size)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.bias, scale=p.qkScale)
        return [out.reshape(batch, heads, size)]

    return run


def _read(cache: Tensor, rows: CacheRows, batch: int) -> Tensor:
    """cache [blocks, block, Nk, D] -> [B, Nk, count, D]"""
    _, _, kv_heads, size = cache.shape
    row = kv_heads * size
    if rows.index is None:
        start = cache.storage_offset() + rows.start * row
        return cache.as_strided((1, kv_heads, rows.count, size), (0, size, row, 1), start)
    found = cache.flatten(0, 1).index_select(0, rows.index)
    return found.as_strided((batch, kv_heads, rows.count, size), (rows.count * row, size, row, 1))


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Contiguous caches: rows [B] (of B * S) where this step's keys go, the longest sequence; index and mask when some
    are shorter, as in CacheRows."""

    rows: Tensor
    longest: int
    index: Tensor | None
    bias: Tensor | None


def fast_flash_decode(step: Step, p: Param) -> Run | None:
    """One new token in every sequence of contiguous caches [1, B, S, Nk * D]: append, then all in one call."""
    options = (p.maskType, p.kvcacheCfg, p.clampType, p.scaleType, p.cacheType, p.inputLayout, p.quantType)
    if p.calcType != DECODER or any(options) or p.batchRunStatusEnable or p.windowSize or len(step.ins) != 8:
        return None
    q, key, value, k_cache, v_cache = step.ins[:5]
    heads, kv_heads = p.headNum, p.kvHeadNum or p.headNum
    batch, width = q.shape[0], k_cache.shape[-1]
    caches = k_cache == v_cache and k_cache.format == "nd" and k_cache.shape[:2] == (1, batch) and not width % kv_heads
    if not caches or len(q.shape) != 2 or p.qScale != 1 or key.shape != (batch, width) or value.shape != key.shape:
        return None
    room, size, dtype, kernel = k_cache.shape[2], width // kv_heads, q.dtype, step.run

    def ends_of(offsets: Tensor, lengths: Tensor, layer: Tensor) -> Ends | None:
        counts = offsets.tolist()
        if set(lengths.tolist()) != {1} or not 0 < min(counts) <= max(counts) <= room or layer.item() != 0:
            return None
        first, longest, bias = torch.arange(batch) * room, max(counts), _padding(counts, dtype)
        index = None if bias is None else _own(first[:, None] + torch.arange(longest), counts)
        return Ends(rows=first + torch.tensor(counts) - 1, longest=longest, index=index, bias=bias)

    def append_and_read(new: Tensor, cache: Tensor, ends: Ends) -> Tensor:
        """-> [B, Nk, longest, D]"""
        flat = cache.view(-1, width)
        flat.index_copy_(0, ends.rows, new)
        if ends.index is None:
            return cache.as_strided((batch, kv_heads, ends.longest, size), (room * width, size, width, 1))
        found = flat.index_select(0, ends.index)
        return found.as_strided((batch, kv_heads, ends.longest, size), (ends.longest * width, size, width, 1))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, key, value, k_cache, v_cache, *lengths = tensors
        ends = derived(f"ends_below_{room}_{dtype}", ends_of, *lengths)
        if ends is None:
            return kernel(tensors)
        keys, values = append_and_read(key, k_cache, ends), append_and_read(value, v_cache, ends)
        grouped = q.view(batch, kv_heads, heads // kv_heads, size)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=ends.bias, scale=p.qkScale)
        return [out.reshape(q.shape)]

    return run


def _beyond(counts: Sequence[int]) -> Tensor:
    """[B, longest]: the positions that a sequence does not have."""
    return torch.arange(max(counts)) >= torch.tensor(counts)[:, None]


def _own(index: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows [B, longest] -> [B * longest]. Padding may point at rows never written, which may hold NaN: it reads the
    sequence's first row instead."""
    return torch.where(_beyond(counts), index[:, :1], index).flatten()


def _padding(counts: Sequence[int], dtype: str) -> Tensor | None:
    """[B, 1, 1, longest]: -inf beyond the end of each sequence; None where all are equally long."""
    if min(counts) == max(counts):
        return None
    bias = torch.zeros(len(counts), 1, 1, max(counts), dtype=TORCH_DTYPE[dtype])
    return bias.masked_fill_(_beyond(counts)[:, None, None], float("-inf"))


REWRITES: dict[str, Callable[[Step, Param], Run | None]] = {
    "Linear": fast_linear,
    "RmsNorm": fast_rms_norm,
    "Rope": fast_rope,
    "Activation": fast_swiglu,
    "ReshapeAndCache": fast_reshape_and_cache,
    "PagedAttention": fast_paged_attention,
    "SelfAttention": fast_flash_decode,
}
