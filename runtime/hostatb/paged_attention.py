"""PagedAttention: one query token a sequence (or a few, calcType SPEC) against a paged cache.

Facts in `llmc.compiler.atb.paged_attention`, arithmetic in `attend.py`. The plain case is `decode` there; every variant
(masks, int8 caches, compressed heads, NZ) gathers each sequence's keys and values and goes through `attend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.core import Desc, Param, at_stage
from llmc.compiler.atb.paged_attention import (
    ALIBI,
    MASK_FREE,
    NO_COMPRESS,
    NORM_COMPRESS,
    SPEC,
    SPEC_MASK,
    check_lengths,
    inputs,
    qkv_quantised,
)
from llmc.compiler.atb.self_attention import BNSD, DEQUANT_FUSION, is_910b, kv_heads
from llmc.runtime.hostatb.attend import attend, attend_int8, decode
from llmc.runtime.hostatb.masks import require_cover
from llmc.runtime.hostatb.numeric import ACL_TORCH, nz_to_nd, refuse, round_to, scale_values


def paged_attention(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    names = inputs(param)
    named = dict(zip(names, tensors, strict=True))
    query, lengths = named["query"], named["contextLens"].tolist()
    if query.shape[1] != param.headNum:
        raise refuse("number of query heads", list(query.shape), f"headNum {param.headNum}")
    seen = dict(zip(names, descs, strict=True))
    if param.compressType != NO_COMPRESS:
        with at_stage("setup", "PagedAttention"):
            check_lengths(param, seen, lengths, [1] * len(lengths), chip)
        return [_compressed(param, named, lengths, chip)]
    block, tables = checked_tables(param, named, lengths, chip)
    key, value = named["keyCache"], named.get("valueCache")
    if value is not None and _is_plain(param, key, value, query, lengths, chip):
        return [decode(query, key.flatten(0, 1), value.flatten(0, 1), tables, block, lengths, scale=param.qkScale)]
    return [_general(param, named, seen, lengths, tables, block, chip)]


def _is_plain(param: Param, key: Tensor, value: Tensor, query: Tensor, lengths: list[int], chip: str) -> bool:
    plain = len(inputs(param)) == 5 and param.qScale in (0, 1) and param.inputLayout != BNSD and is_910b(chip)
    return plain and key.shape == value.shape and len(lengths) == query.shape[0]


def checked_tables(
    param: Param, named: Mapping[str, Tensor], lengths: list[int], chip: str
) -> tuple[int, list[list[int]]]:
    """Rows a block and the block table's rows; refuses what would be read outside the cache."""
    key = named["keyCache"]
    blocks, block = key.shape[0], key.shape[2] if not is_910b(chip) or param.inputLayout == BNSD else key.shape[1]
    tables = named["blockTables"].tolist()
    if len(tables) < len(lengths):
        raise refuse("blockTables has fewer rows than there are sequences", len(tables), len(lengths))
    status = _running(named, lengths)
    for batch, length in enumerate(lengths):
        if not status[batch]:
            continue
        used = tables[batch][: -(-length // block)]
        if length <= 0 or length > len(tables[batch]) * block:
            raise refuse(f"context length of sequence {batch}", length, f"1 to {len(tables[batch]) * block}")
        if min(used) < 0 or max(used) >= blocks:
            raise refuse(f"block ids of sequence {batch}", used, f"0 to {blocks - 1}")
    return block, tables


def _running(named: Mapping[str, Tensor], lengths: list[int]) -> list[int]:
    """One flag a sequence."""
    if "batchRunStatus" not in named:
        return [1] * len(lengths)
    status: list[int] = named["batchRunStatus"].flatten().tolist()[: len(lengths)]
    if len(status) < len(lengths):
        raise refuse("batchRunStatus has fewer flags than there are sequences", len(status), len(lengths))
    return status


def _rows_nd(param: Param, cache: Tensor, chip: str) -> Tensor:
    """[blocks, blockSize, Nk, D] whatever the layout."""
    if not is_910b(chip):  # [blocks, Nk * D / 16, blockSize, 16]
        return cache.transpose(1, 2).flatten(2).unflatten(2, (kv_heads(param), -1))
    return cache.transpose(1, 2) if param.inputLayout == BNSD else cache


def _sequence(
    param: Param, named: Mapping[str, Tensor], table: list[int], block: int, length: int, chip: str
) -> tuple[Tensor, Tensor]:
    """k [length, Nk, D] and v [length, Nk, Dv] of one sequence, int8 caches widened."""
    ids = torch.tensor(table[: -(-length // block)], device=named["keyCache"].device)

    def rows(name: str) -> Tensor:
        return _rows_nd(param, named[name][ids], chip).flatten(0, 1)[:length]

    key = rows("keyCache")
    value = key[..., : param.mlaVHeadSize] if param.mlaVHeadSize else rows("valueCache")
    if param.quantType == DEQUANT_FUSION:
        key, value = _dequantised(named, "k", key), _dequantised(named, "v", value)
    return key, value


def _dequantised(named: Mapping[str, Tensor], which: str, x: Tensor) -> Tensor:
    """(i8 + offset) * descale per kv head and channel; an int64 descale carries float32 bits in its low half."""
    descale, offset = named[f"{which}Descale"], named.get(f"{which}Offset")
    shape = x.shape[1:]
    wide = x.float() if offset is None else x.float() + offset.view(shape)
    return wide * scale_values(descale).view(shape)


def _general(
    param: Param, named: Mapping[str, Tensor], seen: Mapping[str, Desc], lengths: list[int], tables: list[list[int]],
    block: int, chip: str,
) -> Tensor:  # fmt: skip
    query = named["query"]
    if param.qScale not in (0, 1):
        query = round_to(query.float() * param.qScale, query.dtype, chip)
    q_lens = named["qSeqLen"].flatten().tolist() if param.calcType == SPEC else [1] * len(lengths)
    if len(q_lens) != len(lengths):
        raise refuse("qSeqLen has one length a sequence", len(q_lens), len(lengths))
    with at_stage("setup", "PagedAttention"):
        check_lengths(param, seen, lengths, q_lens, chip)
    status = _running(named, lengths)
    running = [batch for batch, on in enumerate(status) if on]
    needed = sum(q_lens[batch] for batch in running)
    if needed > query.shape[0] or (param.calcType == SPEC and needed != query.shape[0]):
        raise refuse("tokens of the query", query.shape[0], f"{needed} by the lengths")
    mask = _mask(named, seen)
    steps = None
    if "pScale" in named:  # unlike in SelfAttention it multiplies P, and vDescale holds the way back
        steps = (named["pScale"], torch.ones_like(named["pScale"]))
    dtype = ACL_TORCH[param.outDataType] if qkv_quantised(param) else query.dtype
    v_size = param.mlaVHeadSize or _rows_nd(param, named["valueCache"], chip).shape[-1]
    out = query.new_zeros(query.shape[0], param.headNum, v_size, dtype=dtype)
    start = 0
    for batch in running:  # running sequences take the leading query rows
        q_len, kv_len = q_lens[batch], lengths[batch]
        k, v = _sequence(param, named, tables[batch], block, kv_len, chip)
        rows = query[start : start + q_len]
        bias = None if mask is None else _bias(param, mask, batch, start, q_len, kv_len, str(seen["mask"]))
        if qkv_quantised(param):
            got = attend_int8(
                rows, k, v, scale=param.qkScale, qk_descale=named["kDescale"], v_descale=named["vDescale"],
                p_steps=steps,
                tile=block, bias=bias, dtype=dtype,
            )  # fmt: skip
        else:
            log_n = named.get("logN")
            causal = param.maskType in (MASK_FREE, NORM_COMPRESS)
            got = attend(
                rows, k, v, scale=param.qkScale, chip=chip, causal=causal, bias=bias,
                log_n=None if log_n is None else log_n[batch],
            )  # fmt: skip
        out[start : start + q_len] = got
        start += q_len
    return out


def _mask(named: Mapping[str, Tensor], seen: Mapping[str, Desc]) -> Tensor | None:
    mask = named.get("mask")
    if mask is not None and mask.dim() < 2:
        raise refuse("dimensions of the mask", list(mask.shape), "2 to 4")
    return nz_to_nd(mask) if mask is not None and seen["mask"].format == "nz" else mask


def _bias(param: Param, mask: Tensor, batch: int, start: int, q_len: int, kv_len: int, what: str) -> Tensor | None:
    """[Lq, Lk] or [N, Lq, Lk]. Masks are added, except 0 / 1 masks of bfloat16 SPEC with MLA."""
    if param.maskType in (MASK_FREE, NORM_COMPRESS):
        return None
    heads = param.headNum
    if param.maskType == SPEC_MASK and mask.dim() < 4:  # [T, ctx]; NZ [1, T16, ctx16]
        chosen = (mask[0] if mask.dim() == 3 else mask)[start : start + q_len]
    elif mask.dim() == 4:  # [B, N, 1, ctx]
        chosen = mask[batch]
    elif param.maskType == ALIBI:  # [N, 1, ctx]; NZ [N or B * N, 16, ctx16]
        chosen = mask if mask.shape[0] == heads else mask[batch * heads : (batch + 1) * heads]
    elif mask.dim() == 2:  # [rows, ctx]: its first rows, or those of the query's positions where it is square
        first = kv_len - q_len if mask.shape[0] == mask.shape[1] else 0
        chosen = mask[first : first + q_len]
    else:  # [B, 1, ctx]; NZ [1 or B, 16, ctx16]
        chosen = mask[batch if mask.shape[0] > 1 else 0]
        chosen = chosen[:q_len] if chosen.shape[0] >= q_len else chosen.expand(q_len, -1)
    require_cover(chosen.shape[-2], chosen.shape[-1], q_len, kv_len, what)
    factor = -10000.0 if param.maskType == SPEC_MASK and param.mlaVHeadSize and mask.dtype == torch.bfloat16 else 1.0
    return chosen[..., :q_len, :kv_len].float() * factor


def _compressed(param: Param, named: Mapping[str, Tensor], lengths: list[int], chip: str) -> Tensor:
    """Head compression: every (sequence, kv head) has its own block table row, length and single-head cache; with
    KVHEAD_ROPE razorOffset is added to q k of its rows, before qkScale."""
    query, key, value = named["query"], named["keyCache"], named["valueCache"]
    heads, block = kv_heads(param), key.shape[1]
    groups = param.headNum // heads
    if len(lengths) != query.shape[0] * heads:
        raise refuse("contextLens has one length a sequence and kv head", len(lengths), query.shape[0] * heads)
    _, tables = checked_tables(param, named, lengths, chip)
    razor = named.get("razorOffset")
    out = torch.empty_like(query)
    for index, length in enumerate(lengths):
        batch, head = divmod(index, heads)
        ids = torch.tensor(tables[index][: -(-length // block)], device=key.device)
        k, v = (cache[ids].flatten(0, 1)[:length] for cache in (key, value))
        if param.quantType == DEQUANT_FUSION:
            channels = slice(head * k.shape[-1], (head + 1) * k.shape[-1])
            own = {name: x[channels] for name, x in named.items() if name.endswith(("Descale", "kOffset", "vOffset"))}
            k, v = _dequantised(own, "k", k), _dequantised(own, "v", v)
        rows = query[batch : batch + 1, head * groups : (head + 1) * groups]
        bias = None if razor is None else razor[ids].flatten()[:length][None].float() * param.qkScale
        if "mask" in named:
            mask = _bias(param, named["mask"], batch, batch, 1, length, str(tuple(named["mask"].shape)))
            if mask is not None:
                mask = mask[head * groups : (head + 1) * groups] if mask.dim() == 3 else mask
                bias = mask if bias is None else bias + mask
        got = attend(rows, k, v, scale=param.qkScale, chip=chip, bias=bias)
        out[batch, head * groups : (head + 1) * groups] = got[0]
    return out
