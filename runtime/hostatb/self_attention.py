"""SelfAttention: prefill over concatenated tokens, over a paged cache, and both phases over contiguous caches.

Facts in `llmc.compiler.atb.self_attention`, arithmetic in `attend.py`, masks in `masks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import Desc, Param, at_stage
from llmc.compiler.atb.self_attention import (
    ALIBI,
    BNSD,
    CAUSAL_MASK,
    DECODER,
    K_BYPASS_V_BYPASS,
    SLIDING_WINDOW_COMPRESS,
    check_prefix_lengths,
    has_slopes,
    inputs,
    is_910b,
    kv_heads,
    paged,
    prefix,
    quantised,
)
from llmc.runtime.hostatb.attend import attend, attend_int8, decode
from llmc.runtime.hostatb.masks import (
    alibi_compress_bias,
    is_tile,
    is_triangle,
    mask_factor,
    require_cover,
    tiled_bias,
    window_bias,
)
from llmc.runtime.hostatb.numeric import ACL_TORCH, nz_to_nd, refuse, round_to

CACHE_TYPE_SWA = 1


def self_attention(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    names = inputs(param)
    named = dict(zip(names, tensors, strict=True))
    seen = dict(zip(names, descs, strict=True))
    mask = Masks(param, named, seen, chip)
    if paged(param):
        return [_paged(param, named, mask, chip)]
    if prefix(param):
        return [_prefix(param, named, mask, chip)]
    return [_flash(param, named, mask, chip)]


class Masks:
    """The mask input of one call: gives each sequence `causal` and `bias` for `attend`."""

    def __init__(self, param: Param, named: Mapping[str, Tensor], seen: Mapping[str, Desc], chip: str) -> None:
        self.param, self.chip = param, chip
        self.slopes = named.get("slopes")
        mask = named.get("mask")
        self.mask = mask if mask is not None and mask.numel() else None
        self.tile = False
        if self.mask is None:
            return
        self.factor = mask_factor(self.mask, param, chip)
        self.tile = is_tile(seen["mask"], param)
        self.shape = str(seen["mask"])
        self.long = seen["mask"].shape == (1, 128, 2048, 16)
        self.flash = not (paged(param) or prefix(param))
        if seen["mask"].format == "nz":
            self.mask = nz_to_nd(self.mask)
        if self.tile:
            self.mask = self.mask.reshape(self.mask.shape[-2:])[:128, :128]
            self.triangle = is_triangle(self.mask, self.factor)

    def of(self, batch: int, q_len: int, kv_len: int, device: torch.device) -> tuple[bool, Tensor | None]:
        param, mask = self.param, self.mask
        if param.maskType == CAUSAL_MASK:
            return True, None
        if param.maskType == SLIDING_WINDOW_COMPRESS:
            return False, window_bias(q_len, kv_len, param.windowSize, device)
        if mask is None:
            return False, None
        if has_slopes(param):
            assert self.slopes is not None
            plain = mask[0] if mask.dim() == 3 and mask.shape[0] == 1 else mask
            return False, alibi_compress_bias(plain, self.slopes, param, q_len, kv_len)
        if self.tile:
            if self.flash and self.long:
                require_cover(2048, 2048, q_len, kv_len, self.shape)
            return (True, None) if self.triangle else (False, tiled_bias(mask.float() * self.factor, q_len, kv_len))
        chosen = self._of_sequence(mask, batch)
        require_cover(chosen.shape[-2], chosen.shape[-1], q_len, kv_len, self.shape)
        return False, chosen[..., :q_len, :kv_len].float() * self.factor

    def _of_sequence(self, mask: Tensor, batch: int) -> Tensor:
        """[S, S] or, with a head dimension, [N, S, S]."""
        if mask.dim() == 4:
            mask = mask[batch] if mask.shape[0] > 1 else mask[0]
            return mask[0] if mask.shape[0] == 1 else mask
        if mask.dim() == 2:
            return mask
        if self.param.maskType != ALIBI:
            return mask[batch] if mask.shape[0] > 1 else mask[0]
        heads = self.param.headNum  # [N, S, S], or [B * N, S, S] from an NZ mask
        return mask if mask.shape[0] == heads else mask[batch * heads : (batch + 1) * heads]


def _paged(param: Param, named: Mapping[str, Tensor], masks: Masks, chip: str) -> Tensor:
    """query, key, value of all sequences one after another."""
    query, key = named["query"], named["key"]
    lengths = named["seqLen"].tolist()
    q_lens, kv_lens = lengths if named["seqLen"].dim() == 2 else (lengths, lengths)
    if param.inputLayout == BNSD:
        return _paged_bnsd(param, named, q_lens, kv_lens, masks, chip)
    tokens, kv_tokens = query.numel() // _row(query, param.headNum), key.numel() // _row(key, kv_heads(param))
    for name, given, total in (("query", q_lens, tokens), ("key", kv_lens, kv_tokens)):
        if min(given, default=0) <= 0:
            raise refuse("every length in seqLen must be positive", given)
        if sum(given) != total:
            raise refuse(f"seqLen does not sum up to the tokens of {name}", given, f"{total} in all")
    q = query.view(tokens, param.headNum, -1)
    k = key.view(kv_tokens, kv_heads(param), -1)
    _require_one_size(q.shape[-1], k.shape[-1])
    v = k[..., : param.mlaVHeadSize] if param.mlaVHeadSize else named["value"].view(kv_tokens, kv_heads(param), -1)
    log_n = named.get("logN")
    if log_n is not None and len(log_n) < max(q_lens):
        raise refuse("logN has one value a token", list(log_n.shape), f"at least {max(q_lens)}")
    steps = (1 / named["pScale"], named["pScale"]) if "pScale" in named else None
    dtype = ACL_TORCH[param.outDataType] if quantised(param) else query.dtype
    out = query.new_empty(tokens, param.headNum, v.shape[-1], dtype=dtype)
    q_start = kv_start = 0
    for batch, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        q_end, kv_end = q_start + q_len, kv_start + kv_len
        causal, bias = masks.of(batch, q_len, kv_len, query.device)
        rows, keys, values = q[q_start:q_end], k[kv_start:kv_end], v[kv_start:kv_end]
        if quantised(param):
            out[q_start:q_end] = attend_int8(
                rows, keys, values, scale=param.qkScale, qk_descale=named["qkDescale"], v_descale=named["vpvDescale"],
                p_steps=steps, bias=bias, dtype=dtype,
            )  # fmt: skip
        else:
            out[q_start:q_end] = attend(
                rows, keys, values, scale=param.qkScale, chip=chip, causal=causal, bias=bias,
                log_n=None if log_n is None else log_n[:q_len],
            )  # fmt: skip
        q_start, kv_start = q_end, kv_end
    if query.dim() == 2:
        return out.flatten(1)
    return out if query.dim() == 3 else out.view(*query.shape[:2], -1)


def _require_one_size(q_size: int, k_size: int) -> None:
    """The library compares head sizes on some paths only; elsewhere the kernel reads across heads."""
    if q_size != k_size:
        raise refuse("head sizes of query and key differ", f"{q_size} and {k_size}", "equal")


def _row(tensor: Tensor, heads: int) -> int:
    """Elements of one token: [T, N * D], [T, N, D] or [B, S, N, D]."""
    row = tensor.shape[-1] if tensor.dim() == 2 else tensor.shape[-1] * tensor.shape[-2]
    if row % heads:
        raise refuse("hidden size", row, f"a multiple of {heads} heads")
    if tensor.dim() > 2 and tensor.shape[-2] != heads:
        raise refuse("number of heads", list(tensor.shape), f"{heads} heads")
    return row


def _paged_bnsd(
    param: Param, named: Mapping[str, Tensor], q_lens: list[int], kv_lens: list[int], masks: Masks, chip: str
) -> Tensor:
    query, key, value = named["query"], named["key"], named["value"]
    out = torch.zeros_like(query)
    for batch, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        causal, bias = masks.of(batch, q_len, kv_len, query.device)
        got = attend(
            query[batch, :, :q_len].transpose(0, 1), key[batch, :, :kv_len].transpose(0, 1),
            value[batch, :, :kv_len].transpose(0, 1), scale=param.qkScale, chip=chip, causal=causal, bias=bias,
        )  # fmt: skip
        out[batch, :, :q_len] = got.transpose(0, 1)
    return out


def _prefix(param: Param, named: Mapping[str, Tensor], masks: Masks, chip: str) -> Tensor:
    """Keys and values of each sequence, old and new, lie in the paged cache."""
    query = named["query"]
    q_lens, kv_lens = named["seqLen"].tolist(), named["kvSeqLen"].tolist()
    with at_stage("setup", "SelfAttention"):
        check_prefix_lengths(q_lens, kv_lens, chip)
    q = query.view(query.shape[0], param.headNum, -1)
    k_cache, v_cache = (
        named[name].flatten(2).unflatten(2, (kv_heads(param), -1)) for name in ("keyCache", "valueCache")
    )
    if sum(q_lens) != q.shape[0]:
        raise refuse("seqLen does not sum up to the tokens of query", q_lens, f"{q.shape[0]} in all")
    out, start = torch.empty_like(q), 0
    for batch, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        blocks = named["blockTables"][batch, : -(-kv_len // k_cache.shape[1])].long()
        k, v = (cache[blocks].flatten(0, 1)[:kv_len] for cache in (k_cache, v_cache))
        causal, bias = masks.of(batch, q_len, kv_len, query.device)
        rows = q[start : start + q_len]
        out[start : start + q_len] = attend(rows, k, v, scale=param.qkScale, chip=chip, causal=causal, bias=bias)
        start += q_len
    return out.view_as(query)


def _flash(param: Param, named: Mapping[str, Tensor], masks: Masks, chip: str) -> Tensor:
    """Contiguous caches. The new keys and values are appended first, unless the caller has done so (bypass)."""
    query = named["query"]
    totals, new_lens = named["tokenOffset"].tolist(), named["seqLen"].tolist()
    k_cache, v_cache = (_cache_layer(named[name], named["layerId"], param, chip) for name in ("cacheK", "cacheV"))
    running = list(range(len(totals)))
    if "batchRunStatus" in named:
        running = [batch for batch, on in enumerate(named["batchRunStatus"].tolist()) if on]
    ring = param.cacheType == CACHE_TYPE_SWA and param.calcType == DECODER
    for batch in running:
        fits = 0 < new_lens[batch] <= totals[batch] and (ring or totals[batch] <= k_cache.shape[1])
        if not fits:
            raise refuse("lengths do not fit the cache", f"seqLen {new_lens}, tokenOffset {totals}",
                         f"0 < seqLen <= tokenOffset <= {k_cache.shape[1]}")  # fmt: skip
    if param.kvcacheCfg != K_BYPASS_V_BYPASS:
        for new, cache in (("key", k_cache), ("value", v_cache)):
            _append(named[new], cache, running, totals, new_lens)
    q = _flash_queries(param, query, running, new_lens, chip)
    # A ring of `windowSize` rows holds the last keys in any order; otherwise row p holds position p.
    ends = [min(totals[b], param.windowSize) if ring else totals[b] for b in range(len(totals))]
    heads = kv_heads(param)
    _require_one_size(q.shape[-1], k_cache.shape[2] * k_cache.shape[3] // heads)
    v_size = v_cache.shape[2] * v_cache.shape[3] // heads
    if _is_plain_decode(param, masks, running, new_lens, k_cache, v_cache, chip):
        k_rows, v_rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        tables = [[batch] for batch in range(len(totals))]
        got = decode(q, k_rows, v_rows, tables, k_cache.shape[1], ends, scale=param.qkScale)
        return got.view(*query.shape[:-2], -1) if query.dim() == 4 else got.flatten(1)
    clamp = (param.clampMin, param.clampMax) if param.clampType else None
    log_n = named.get("logN")
    bnsd = param.inputLayout == BNSD
    out = torch.zeros_like(query) if bnsd else query.new_zeros(q.shape[0], param.headNum, v_size)
    start = 0
    for batch in running:
        q_len, end = new_lens[batch], ends[batch]
        first = max(0, end - param.windowSize) if param.calcType == DECODER and param.windowSize else 0
        k, v = (cache[batch, first:end].reshape(end - first, heads, -1) for cache in (k_cache, v_cache))
        rows = q[batch, :, :q_len].transpose(0, 1) if bnsd else q[start : start + q_len]
        causal, bias = masks.of(batch, q_len, end - first, query.device)
        got = attend(
            rows, k, v, scale=param.qkScale, chip=chip, causal=causal, bias=bias, clamp=clamp,
            log_n=None if log_n is None else log_n[batch],
        )  # fmt: skip
        if bnsd:
            out[batch, :, :q_len] = got.transpose(0, 1)
        else:
            out[start : start + q_len] = got
            start += q_len
    if bnsd:
        return out
    return out.flatten(1) if query.dim() == 2 else out.view(*query.shape[:2], -1)


def _flash_queries(param: Param, query: Tensor, running: list[int], new_lens: list[int], chip: str) -> Tensor:
    """[T, N, D], or [B, N, S, D] as given; qScale is an Elewise MULS of its own, so it rounds to 16 bit."""
    if param.qScale != 1.0:
        query = round_to(query.float() * param.qScale, query.dtype, chip)
    if param.inputLayout == BNSD:
        return query
    tokens = query.numel() // _row(query, param.headNum)
    if sum(new_lens[batch] for batch in running) > tokens:
        raise refuse("seqLen sums up to more than the tokens of query", new_lens, f"{tokens} in all")
    return query.view(tokens, param.headNum, -1)


def _is_plain_decode(
    param: Param, masks: Masks, running: list[int], new_lens: list[int], k: Tensor, v: Tensor, chip: str
) -> bool:
    """One new token in every sequence and nothing beyond softmax(q k) v over all of the keys."""
    plain = param.inputLayout != BNSD and param.clampType == 0 and param.scaleType == 0
    unmasked = masks.mask is None or (masks.tile and masks.triangle)
    all_keys = not param.windowSize or param.cacheType == CACHE_TYPE_SWA
    same = is_910b(chip) and k.shape == v.shape
    return plain and unmasked and all_keys and same and len(running) == k.shape[0] and set(new_lens) == {1}


def _cache_layer(cache: Tensor, layer_id: Tensor, param: Param, chip: str) -> Tensor:
    """A view [B, maxS, x, y] of one layer, x * y = Nk * D in order: [Nk, D], or for NZ [Nk * D / 16, 16]."""
    if param.batchRunStatusEnable and param.inputLayout != BNSD:
        return cache.unflatten(2, (kv_heads(param), -1))  # [B, maxS, hidden]: one layer
    layer = int(layer_id.tolist()[0])
    if not 0 <= layer < cache.shape[0]:
        raise refuse("layerId", layer, f"below {cache.shape[0]}")
    one = cache[layer]
    if is_910b(chip):
        if param.inputLayout == BNSD:  # [B, Nk, maxS, D]
            return one.transpose(1, 2)
        if one.shape[2] % kv_heads(param):
            raise refuse("hidden size of the cache", one.shape[2], f"a multiple of {kv_heads(param)} heads")
        return one.unflatten(2, (kv_heads(param), -1))
    if param.inputLayout == BNSD:  # [B * Nk, D / 16, maxS, 16]
        one = one.unflatten(0, (-1, kv_heads(param))).flatten(1, 2)
    return one.transpose(1, 2)


def _append(new: Tensor, cache: Tensor, running: Sequence[int], totals: Sequence[int], new_lens: Sequence[int]) -> None:
    """Position p goes to row p, in a ring to row p % maxS."""
    rows = new.reshape(-1, *cache.shape[2:])
    if sum(new_lens[batch] for batch in running) > rows.shape[0]:
        raise refuse("seqLen sums up to more than the tokens of key and value", list(new_lens), rows.shape[0])
    if len(running) > 1 and all(new_lens[batch] == 1 for batch in running):  # one write instead of one a sequence
        places = torch.tensor([[batch, (totals[batch] - 1) % cache.shape[1]] for batch in running], device=cache.device)
        cache[places[:, 0], places[:, 1]] = rows[: len(running)]
        return
    start = 0
    for batch in running:
        count, end = new_lens[batch], totals[batch]
        end = (end - 1) % cache.shape[1] + 1
        cache[batch, end - count : end] = rows[start : start + count]
        start += count
