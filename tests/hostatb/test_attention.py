"""Attention on the host, from outside: every form of the same attention gives what dense float64 attention gives.

The oracle is PyTorch's `scaled_dot_product_attention` in float64 on the plain, unbatched tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import AtbError, Desc
from llmc.runtime.hostatb.graph import GraphBuilder
from llmc.runtime.hostatb.numeric import set_format
from llmc.runtime.hostatb.operation import Operation, Single

HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 32, 16
SCALE = SIZE**-0.5
LENGTHS = [5, 40, 17]
# Largest error, in units of the largest output: rounding of the result, and of P in the 16-bit decode.
ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PA_ENCODER, PREFIX_ENCODER, ENCODER, DECODER = 3, 4, 1, 2
NORM, NORM_COMPRESS, SLIDING_WINDOW_NORM, SLIDING_WINDOW_COMPRESS = 1, 3, 7, 8


def run(op: str, values: Mapping[str, Any], tensors: Sequence[Tensor], chip: str = "host") -> list[Tensor]:
    return Operation.of(Single(OPS[op], OPS[op].param(values), chip)).forward(tensors)


def dense(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, scale: float = SCALE) -> Tensor:
    """[Lq, N, D] x [Lk, Nk, D] in float64; query head h reads kv head h // (N / Nk); `hidden` [Lq, Lk] is masked."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    seen = None if hidden is None else ~hidden
    wide = [x.double().transpose(0, 1) for x in (q, k, v)]
    out = scaled_dot_product_attention(wide[0], wide[1], wide[2], attn_mask=seen, scale=scale)
    return out.transpose(0, 1)


def later(q_len: int, kv_len: int, window: int = 0) -> Tensor:
    """What a causal query must not see; with a window also what lies too far back."""
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
    return (distance < 0) | (distance >= window) if window else distance < 0


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= ERROR[actual.dtype], f"error {error:.2e}"


def sequences(
    dtype: torch.dtype, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> list[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(length, heads, SIZE, generator=random).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[misc]
        for length in lengths
    ]


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def triangle(dtype: torch.dtype, size: int = 128) -> Tensor:
    """The causal mask as the operation wants it: 0 / 1 in bfloat16, added otherwise."""
    above = torch.ones(size, size).triu(1)
    return above.to(dtype) if dtype == torch.bfloat16 else (above * -10000).to(dtype)


def paged_caches(data: Sequence[tuple[Tensor, Tensor, Tensor]], seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """keyCache, valueCache, blockTables with blocks in random order; rows that hold no token are NaN."""
    counts = [-(-len(k) // BLOCK) for _, k, _ in data]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    shape = (sum(counts) + 2, BLOCK, KV_HEADS, SIZE)
    caches = [torch.full(shape, float("nan"), dtype=data[0][1].dtype) for _ in range(2)]
    tables, slots = torch.full((len(data), max(counts)), -1, dtype=torch.int32), []
    for row, (_, k, _) in enumerate(data):
        used = [order.pop() for _ in range(counts[row])]
        tables[row, : counts[row]] = ints(used)
        slots += [used[p // BLOCK] * BLOCK + p % BLOCK for p in range(len(k))]
    write_paged(data, ints(slots), *caches)
    return caches[0], caches[1], tables


def write_paged(
    data: Sequence[tuple[Tensor, Tensor, Tensor]], slots: Tensor, *caches: Tensor, chip: str = "host"
) -> None:
    """ReshapeAndCache in a graph of one node, so that the caches given are the ones written."""
    names = ["k", "v", "kc", "vc", "slots"]
    node = Operation.of(Single(OPS["ReshapeAndCache"], OPS["ReshapeAndCache"].param(), chip))
    graph = GraphBuilder("write").set_input_output(names, [])
    k, v = (torch.cat([one[i] for one in data]) for i in (1, 2))
    graph.add_operation(node, names, ["kc", "vc"]).build().forward([k, v, *caches, slots])


def last(data: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """[B, N, D]: the last query of each sequence."""
    return torch.stack([q[-1] for q, _, _ in data])


def paged_decode(data: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    k_cache, v_cache, tables = paged_caches(data)
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE}
    return run("PagedAttention", values, [last(data), k_cache, v_cache, tables, ints([len(k) for _, k, _ in data])])[0]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("lengths", [[40], LENGTHS, [32] * 8, [1, 1, 33]], ids=str)
def test_paged_decode_is_dense_attention_over_the_same_tokens(dtype: torch.dtype, lengths: list[int]) -> None:
    data = sequences(dtype, lengths)
    got = paged_decode(data)
    for row, (q, k, v) in zip(got, data, strict=True):
        close(row[None], dense(q[-1:], k, v))


def prefill(data: Sequence[tuple[Tensor, Tensor, Tensor]], flat: bool = False, **more: Any) -> Tensor:
    tensors = [torch.cat([one[i] for one in data]) for i in range(3)]
    if flat:
        tensors = [x.flatten(1) for x in tensors]
    lengths = ints([len(k) for _, k, _ in data])
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "calcType": PA_ENCODER, **more}
    mask = [more.pop("mask")] if "mask" in more else []
    values.pop("mask", None)
    return run("SelfAttention", values, [*tensors, *mask, lengths])[0]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["3-D", "2-D"])
def test_compressed_mask_makes_prefill_causal_at_every_length(dtype: torch.dtype, flat: bool) -> None:
    data = sequences(dtype, [5, 300, 129])  # beyond the mask's 128
    got = prefill(data, flat, maskType=NORM_COMPRESS, isTriuMask=1, mask=triangle(dtype))
    parts = got.view(-1, HEADS, SIZE).split([len(q) for q, _, _ in data])
    for part, (q, k, v) in zip(parts, data, strict=True):
        close(part, dense(q, k, v, later(len(q), len(k))))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_whole_mask_equals_compressed_mask(dtype: torch.dtype) -> None:
    data = sequences(dtype)
    whole = prefill(data, maskType=NORM, mask=triangle(dtype, 64))
    compressed = prefill(data, maskType=NORM_COMPRESS, isTriuMask=1, mask=triangle(dtype))
    torch.testing.assert_close(whole, compressed, rtol=0, atol=ERROR[dtype])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_a_compressed_mask_that_is_no_triangle_is_obeyed(dtype: torch.dtype) -> None:
    data = sequences(dtype, [150])
    tile = triangle(dtype)
    tile[:, 3] = tile[0, 1]  # key 3 of a tile is hidden from the tile's queries ...
    tile[3, 3] = 0  # ... but query 3
    hidden = later(150, 150)
    hidden[:128, 3] = True
    hidden[128:, 131] = True
    hidden[[3, 131], [3, 131]] = False
    q, k, v = data[0]
    close(prefill(data, maskType=NORM_COMPRESS, isTriuMask=1, mask=tile), dense(q, k, v, hidden))


def test_no_mask_hides_nothing() -> None:
    data = sequences(torch.float32)
    parts = prefill(data).split(LENGTHS)
    for part, (q, k, v) in zip(parts, data, strict=True):
        close(part, dense(q, k, v))


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_sliding_window_of_prefill(window: int) -> None:
    data = sequences(torch.float32)
    whole = (later(64, 64, window).float() * -10000).half().float()
    masks = {SLIDING_WINDOW_NORM: whole, SLIDING_WINDOW_COMPRESS: torch.zeros(512, 512)}
    for mask_type, mask in masks.items():
        parts = prefill(data, maskType=mask_type, windowSize=window, mask=mask).split(LENGTHS)
        for part, (q, k, v) in zip(parts, data, strict=True):
            close(part, dense(q, k, v, later(len(q), len(k), window)))


def test_keys_may_outnumber_queries() -> None:
    """seqLen [2, B]: the queries are the last positions."""
    data = sequences(torch.float32, [40, 17])
    queries = [q[-9:] for q, _, _ in data]
    tensors = [torch.cat(queries), *(torch.cat([one[i] for one in data]) for i in (1, 2))]
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "calcType": PA_ENCODER}
    values |= {"maskType": NORM_COMPRESS, "isTriuMask": 1}
    got = run("SelfAttention", values, [*tensors, triangle(torch.float32), ints([[9, 9], [40, 17]])])[0]
    for part, q, (_, k, v) in zip(got.split(9), queries, data, strict=True):
        close(part, dense(q, k, v, later(9, len(k))))


@pytest.mark.parametrize("mask_type", [NORM_COMPRESS, 9], ids=["NORM_COMPRESS", "CAUSAL_MASK"])
def test_prefix_prefill_reads_old_keys_from_the_paged_cache(mask_type: int) -> None:
    data = sequences(torch.float32)
    news = [3, 12, 17]
    k_cache, v_cache, tables = paged_caches(data)
    queries = [q[-new:] for (q, _, _), new in zip(data, news, strict=True)]
    mask = [triangle(torch.float32)] if mask_type == NORM_COMPRESS else []
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "calcType": PREFIX_ENCODER, "kernelType": 1,
              "maskType": mask_type, "isTriuMask": 1}  # fmt: skip
    got = run(
        "SelfAttention", values, [torch.cat(queries), k_cache, v_cache, tables, *mask, ints(news), ints(LENGTHS)]
    )[0]
    for part, q, (_, k, v) in zip(got.split(news), queries, data, strict=True):
        close(part, dense(q, k, v, later(len(q), len(k))))


class Flash:
    """Contiguous caches [1, B, maxS, Nk * D] (310P: NZ), filled by the operation itself."""

    def __init__(self, batch: int, dtype: torch.dtype, chip: str = "host", rows: int = 64) -> None:
        hidden = KV_HEADS * SIZE
        shape = (1, batch, rows, hidden) if chip != "Ascend310P" else (1, batch, hidden // 16, rows, 16)
        self.chip, self.format = chip, "nz" if chip == "Ascend310P" else "nd"
        self.caches = [set_format(torch.full(shape, float("nan"), dtype=dtype), self.format) for _ in range(2)]

    def step(
        self, parts: Sequence[tuple[Tensor, Tensor, Tensor]], ends: Sequence[int], calc: int, *mask: Tensor, **more: Any
    ) -> Tensor:
        q, k, v = (torch.cat([one[i] for one in parts]).flatten(1) for i in range(3))
        values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "calcType": calc, **more}
        lengths = ints([len(one[0]) for one in parts])
        tensors = [q, k, v, *self.caches, *mask, ints(list(ends)), lengths, ints([0])]
        return run("SelfAttention", values, tensors, self.chip)[0].view(-1, HEADS, SIZE)


def cut(
    data: Sequence[tuple[Tensor, Tensor, Tensor]], first: Sequence[int], end: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (q[a:b], k[a:b], v[a:b]) for (q, k, v), a, b in zip(data, first, end, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_flash_prefill_and_decode_are_full_causal_attention(dtype: torch.dtype) -> None:
    data, flash = sequences(dtype), Flash(len(LENGTHS), dtype)
    starts = [0] * len(LENGTHS)
    prompt = [n - 3 for n in LENGTHS]
    got = [
        flash.step(cut(data, starts, prompt), prompt, ENCODER, triangle(dtype), maskType=NORM_COMPRESS, isTriuMask=1)
    ]
    expected = [dense(q, k, v, later(len(q), len(k))) for q, k, v in data]
    close(got[0], torch.cat([e[:p] for e, p in zip(expected, prompt, strict=True)]))
    for more in range(3):
        first = [p + more for p in prompt]
        end = [n + 1 for n in first]
        step = flash.step(cut(data, first, end), end, DECODER)
        close(step, torch.stack([e[p] for e, p in zip(expected, first, strict=True)]))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_flash_decode_equals_paged_decode(dtype: torch.dtype) -> None:
    data, flash = sequences(dtype), Flash(len(LENGTHS), dtype)
    before = [n - 1 for n in LENGTHS]
    flash.step(cut(data, [0] * 3, before), before, ENCODER)
    flash_out = flash.step(cut(data, before, LENGTHS), LENGTHS, DECODER)
    torch.testing.assert_close(flash_out, paged_decode(data), rtol=0, atol=0)


@pytest.mark.parametrize("window", [1, 6, 1000])
def test_flash_decode_with_a_window_sees_the_last_keys(window: int) -> None:
    data, flash = sequences(torch.float32), Flash(len(LENGTHS), torch.float32)
    before = [n - 1 for n in LENGTHS]
    flash.step(cut(data, [0] * 3, before), before, ENCODER)
    got = flash.step(cut(data, before, LENGTHS), LENGTHS, DECODER, maskType=SLIDING_WINDOW_NORM, windowSize=window)
    for row, (q, k, v) in zip(got, data, strict=True):
        close(row[None], dense(q[-1:], k[-window:], v[-window:]))


def test_a_window_cache_is_a_ring_of_the_last_keys() -> None:
    """cacheType SWA with as many rows as the window: the oldest key is overwritten."""
    window, length = 8, 21
    data, flash = sequences(torch.float32, [length]), Flash(1, torch.float32, rows=window)
    for position in range(length):
        end = position + 1
        got = flash.step(cut(data, [position], [end]), [end], DECODER, maskType=SLIDING_WINDOW_NORM, windowSize=window,
                         cacheType=1)  # fmt: skip
    q, k, v = data[0]
    close(got, dense(q[-1:], k[-window:], v[-window:]))


def test_310p_caches_give_what_910b_caches_give() -> None:
    data = sequences(torch.float16)
    before = [n - 1 for n in LENGTHS]
    outs = []
    for chip in ("Ascend910B", "Ascend310P"):
        flash = Flash(len(LENGTHS), torch.float16, chip)
        outs.append([flash.step(cut(data, [0] * 3, before), before, ENCODER),
                     flash.step(cut(data, before, LENGTHS), LENGTHS, DECODER)])  # fmt: skip
    for nd, nz in zip(*outs, strict=True):
        torch.testing.assert_close(nd, nz, rtol=0, atol=1e-3)


def test_310p_paged_cache_gives_what_the_910b_cache_gives() -> None:
    data = sequences(torch.float16)
    k_cache, v_cache, tables = paged_caches(data)
    blocks = k_cache.shape[0]
    slots = torch.cat([tables[row, : -(-n // BLOCK)].repeat_interleave(BLOCK)[:n] * BLOCK + torch.arange(n) % BLOCK
                       for row, n in enumerate(LENGTHS)]).int()  # fmt: skip
    nz = [set_format(torch.zeros(blocks, KV_HEADS * SIZE // 16, BLOCK, 16).half(), "nz") for _ in range(2)]
    write_paged(data, slots, *nz, chip="Ascend310P")
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE}
    lengths = ints(LENGTHS)
    on_310p = run("PagedAttention", values, [last(data), *nz, tables, lengths], "Ascend310P")[0]
    on_910b = run("PagedAttention", values, [last(data), k_cache, v_cache, tables, lengths], "Ascend910B")[0]
    torch.testing.assert_close(on_310p, on_910b, rtol=0, atol=1e-3)


def test_speculative_tokens_are_the_last_positions() -> None:
    data = sequences(torch.float16)
    counts = [2, 3, 1]
    k_cache, v_cache, tables = paged_caches(data)
    queries = [q[-n:] for (q, _, _), n in zip(data, counts, strict=True)]
    mask = torch.full((sum(counts), max(LENGTHS)), -10000.0).half()
    rows = mask.split(counts)
    for row, n, length in zip(rows, counts, LENGTHS, strict=True):
        row[:, :length] = later(n, length).half() * -10000
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "calcType": 1, "maskType": 3}
    tensors = [torch.cat(queries), k_cache, v_cache, tables, ints(LENGTHS), mask, ints(counts)]
    got = run("PagedAttention", values, tensors, "Ascend910B")[0]
    for part, q, (_, k, v) in zip(got.split(counts), queries, data, strict=True):
        close(part, dense(q, k, v, later(len(q), len(k))))


def test_int8_cache_with_scales_is_attention_over_the_dequantised_cache() -> None:
    random = torch.Generator().manual_seed(3)
    length, channels = 20, KV_HEADS * SIZE
    q = torch.randn(1, HEADS, SIZE, generator=random)
    caches = [torch.randint(-127, 128, (2, BLOCK, KV_HEADS, SIZE), generator=random).to(torch.int8) for _ in range(2)]
    scales = [torch.rand(channels, generator=random) / 50 + 0.01 for _ in range(2)]
    offsets = [torch.randint(-9, 9, (channels,), generator=random).int() for _ in range(2)]
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "quantType": 1, "hasQuantOffset": True}
    tensors = [q, *caches, ints([[0, 1]]), ints([length]), scales[0], offsets[0], scales[1], offsets[1]]
    got = run("PagedAttention", values, tensors)[0]
    k, v = (
        ((cache.double().flatten(0, 1)[:length].flatten(1) + offset) * scale.double()).view(length, KV_HEADS, SIZE)
        for cache, scale, offset in zip(caches, scales, offsets, strict=True)
    )
    close(got, dense(q, k, v))


def test_a_sequence_reads_only_its_own_rows() -> None:
    """Changing everything that belongs to other sequences changes nothing here."""
    data, other = sequences(torch.float32), sequences(torch.float32, seed=9)
    mixed = [data[0], other[1], other[2]]
    assert torch.equal(paged_decode(data)[0], paged_decode(mixed)[0])
    assert torch.equal(prefill(data)[: LENGTHS[0]], prefill(mixed)[: LENGTHS[0]])


def _decode_inputs() -> list[Tensor]:
    data = sequences(torch.float32)
    return [last(data), *paged_caches(data), ints(LENGTHS)]


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (4, ints([5, 0, 17]), "context length of sequence 1"),
        (4, ints([5, 49, 17]), "context length of sequence 1"),
        (3, ints([[99, 0, 0]] * 3), "block ids of sequence 0"),
        (3, ints([[-1, 0, 0]] * 3), "block ids of sequence 0"),
    ],
)
def test_lengths_and_blocks_outside_the_cache_are_refused(index: int, value: Tensor, said: str) -> None:
    tensors = _decode_inputs()
    tensors[index] = value
    with pytest.raises(AtbError, match=said):
        run("PagedAttention", {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE}, tensors)


def test_prefill_lengths_that_do_not_sum_up_are_refused() -> None:
    q, k, v = sequences(torch.float32, [8])[0]
    values = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE, "calcType": PA_ENCODER}
    with pytest.raises(AtbError, match="seqLen does not sum up"):
        run("SelfAttention", values, [q, k, v, ints([5])])


@pytest.mark.parametrize("slot", [64, 1000])
def test_slots_beyond_the_cache_are_refused_and_negative_ones_skipped(slot: int) -> None:
    k = torch.ones(3, KV_HEADS, SIZE)
    caches = [torch.zeros(4, BLOCK, KV_HEADS, SIZE) for _ in range(2)]
    write_paged([(k, k, k)], ints([5, -1, 63]), *caches)
    for cache in caches:
        assert cache.flatten(0, 1).abs().sum(dim=(1, 2)).nonzero().flatten().tolist() == [5, 63]
    with pytest.raises(AtbError, match="slot beyond the cache"):
        write_paged([(k, k, k)], ints([0, 1, slot]), *caches)


PLAIN = {"headNum": HEADS, "kvHeadNum": KV_HEADS, "qkScale": SCALE}


@pytest.mark.parametrize("extra", [0, 1, 24], ids="mask {} wider".format)
@pytest.mark.parametrize("form", ["a sequence", "a position", "a sequence and head", "alibi", "alibi a sequence"])
def test_a_paged_decode_mask_may_be_larger_than_the_contexts(form: str, extra: int) -> None:
    """The mask hides the first four keys; what lies beyond queries and contexts is never read."""
    data = sequences(torch.float16)
    width = max(LENGTHS) + extra
    hidden = torch.zeros(1 + extra, width).index_fill(1, torch.arange(4), -10000.0).half()
    hidden[1:] = float("nan")
    hidden[:, max(LENGTHS) :] = float("nan")
    mask = {
        "a sequence": hidden.expand(len(LENGTHS), -1, -1),
        "a sequence and head": hidden.expand(len(LENGTHS), HEADS, -1, -1),
        "a position": torch.zeros(width, width).index_fill(1, torch.arange(4), -10000.0).half(),
        "alibi": hidden.expand(HEADS, -1, -1),
        "alibi a sequence": hidden.expand(len(LENGTHS), HEADS, -1, -1),
    }[form].contiguous()
    tensors = [last(data), *paged_caches(data), ints(LENGTHS), mask]
    got = run("PagedAttention", PLAIN | {"maskType": 2 if "alibi" in form else 1}, tensors, "Ascend910B")[0]
    for row, (q, k, v) in zip(got, data, strict=True):
        close(row[None], dense(q[-1:], k[4:], v[4:]))


@pytest.mark.parametrize("shape", [(3, 1, 39), (2, 1, 40), (1, 1, 40), (40,)], ids=str)
def test_a_norm_mask_of_another_shape_is_refused_as_the_kernel_does(shape: tuple[int, ...]) -> None:
    data = sequences(torch.float16)
    tensors = [last(data), *paged_caches(data), ints(LENGTHS), torch.zeros(shape).half()]
    with pytest.raises(AtbError, match="at setup") as caught:
        run("PagedAttention", PLAIN | {"maskType": 1}, tensors, "Ascend910B")
    assert caught.value.code == "ERROR_RT_FAIL"


def test_an_alibi_mask_goes_with_compressed_heads() -> None:
    """compressType KVHEAD: each sequence and kv head has its own length and its own block table row of single-head
    blocks; the mask [B, N, 1, ctx] is added to the scores."""
    random = torch.Generator().manual_seed(3)
    lengths, block = [33, 7, 20, 48], BLOCK  # sequences x kv heads
    q = torch.randn(2, HEADS, SIZE, generator=random).half()
    caches = [torch.randn(12, block, 1, SIZE, generator=random).half() for _ in range(2)]
    tables = ints([[0, 1, 2], [3, -1, -1], [4, 5, -1], [6, 7, 8]])
    mask = torch.randn(2, HEADS, 1, max(lengths), generator=random).half()
    values = PLAIN | {"maskType": 2, "compressType": 1}
    got = run("PagedAttention", values, [q, *caches, tables, ints(lengths), mask], "Ascend910B")[0]
    groups = HEADS // KV_HEADS
    for index, length in enumerate(lengths):
        batch, kv_head = divmod(index, KV_HEADS)
        k, v = (cache[tables[index].clamp(min=0)].flatten(0, 1)[:length, 0].double() for cache in caches)
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            scores = SCALE * (k @ q[batch, head].double()) + mask[batch, head, 0, :length]
            close(got[batch, head], scores.softmax(0) @ v)


@pytest.mark.parametrize(
    ("values", "heads", "cache_heads"),
    [({"kvHeadNum": 2}, 6, 3), ({"kvHeadNum": 1}, 6, 2), ({}, 6, 2), ({"kvHeadNum": 2}, 5, 2)],
    ids=str,
)
def test_head_counts_that_contradict_the_tensors_are_refused(
    values: dict[str, Any], heads: int, cache_heads: int
) -> None:
    cache = torch.zeros(3, BLOCK, cache_heads, SIZE).half()
    tensors = [torch.zeros(1, heads, SIZE).half(), cache, cache, ints([[0]]), ints([5])]
    with pytest.raises(AtbError, match="ERROR_RT_FAIL at setup"):
        run("PagedAttention", {"headNum": HEADS, "qkScale": SCALE, **values}, tensors, "Ascend910B")


@pytest.mark.parametrize("name", ["kDescale", "vDescale"])
@pytest.mark.parametrize("size", [1, SIZE, KV_HEADS * SIZE + 1, HEADS * SIZE])
def test_cache_scales_of_another_size_are_refused(name: str, size: int) -> None:
    op = OPS["PagedAttention"]
    param = op.param(PLAIN | {"quantType": 1})
    cache = Desc(dtype="int8", shape=(3, BLOCK, KV_HEADS, SIZE))
    sizes = {"kDescale": KV_HEADS * SIZE, "vDescale": KV_HEADS * SIZE} | {name: size}
    scales = [Desc(dtype="float32", shape=(size,)) for size in sizes.values()]
    descs = [Desc(dtype="float16", shape=(1, HEADS, SIZE)), cache, cache, Desc(dtype="int32", shape=(1, 1)),
             Desc(dtype="int32", shape=(1,)), *scales]  # fmt: skip
    outs = op.infer(param, descs, "Ascend910B")
    with pytest.raises(AtbError, match="ERROR_RT_FAIL at setup") as caught:
        op.setup(param, descs, outs, "Ascend910B")
    assert caught.value.found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_high_precision_decode_mask_hides_and_gives_no_nan(dtype: torch.dtype) -> None:
    """The kernel's large factor is for bfloat16's 0 / 1 masks: a float16 mask of -10000 would become -inf everywhere,
    and 0 x inf NaN."""
    data, flash = sequences(dtype), Flash(len(LENGTHS), dtype, "Ascend910B")
    before = [n - 1 for n in LENGTHS]
    flash.step(cut(data, [0] * 3, before), before, ENCODER)
    mask = torch.zeros(len(LENGTHS), 1, 64, dtype=dtype)
    mask[..., :4] = 1 if dtype == torch.bfloat16 else -10000
    got = flash.step(cut(data, before, LENGTHS), LENGTHS, DECODER, mask, maskType=NORM, kernelType=1)
    for row, (q, k, v) in zip(got, data, strict=True):
        close(row[None], dense(q[-1:], k[4:], v[4:]))
