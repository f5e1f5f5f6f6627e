"""ReshapeAndCache and KvCache: keys and values written into the caches. Pure copies.

Facts in `llmc.compiler.atb.cache`. The caches are inputs that are written in place; ReshapeAndCache also returns them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmc.compiler.atb.cache import KV_INPUTS, NO_COMPRESS, inputs
from llmc.compiler.atb.core import Desc, Param
from llmc.runtime.hostatb.numeric import Kernel, refuse

PAIRS = (("key", "keyCache"), ("value", "valueCache"))


def reshape_and_cache(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    names = inputs(param)
    named = dict(zip(names, tensors, strict=True))
    slots = named["slots"].long()
    written = [(named[new], named[name], names.index(name)) for new, name in PAIRS if name in named]
    if param.compressType != NO_COMPRESS:
        for new, cache, _ in written:
            _write_compressed(named, new, cache, slots)
        return [cache for _, cache, _ in written]
    nz = descs[written[0][2]].format == "nz"
    first = written[0][1]
    kept = _checked(slots, written[0][0].shape[0], first.shape[0] * first.shape[2 if nz else 1])
    for new, cache, _ in written:
        if kept is None:
            _write(new, cache, slots, nz)
        else:
            _write(new[kept], cache, slots[kept], nz)
    return [cache for _, cache, _ in written]


def _checked(slots: Tensor, tokens: int, total: int) -> Tensor | None:
    """Refuses a slot beyond the cache. Negative slots are skipped: then which tokens are kept, else None."""
    if slots.numel() != tokens:
        raise refuse("one slot a token", slots.numel(), tokens)
    low, high = slots.min().item(), slots.max().item()
    if high >= total:
        raise refuse("slot beyond the cache", high, f"below {total}")
    return slots >= 0 if low < 0 else None


def _write(new: Tensor, cache: Tensor, slots: Tensor, nz: bool) -> None:
    """Token t goes to slot = block * blockSize + offset."""
    if nz:  # [blocks, Nk * D / n0, blockSize, n0]
        block = cache.shape[2]
        cache[slots // block, :, slots % block] = new.reshape(new.shape[0], cache.shape[1], cache.shape[3])
        return
    cache.flatten(0, 1).index_copy_(0, slots, new)


def _write_compressed(named: dict[str, Tensor], new: Tensor, cache: Tensor, slots: Tensor) -> None:
    """new [T, Nk, D] into a single-head cache; pair i = sequence * Nk + head writes from slot i on.

    KVHEAD keeps the last `wins` tokens of the pair (all when 0). KVHEAD_ROPE replaces the `wins` tokens from
    `offsetIndex` on by their mean (-1: keeps all). The vendor's data show KVHEAD; for KVHEAD_ROPE they are zeros only,
    and the rule follows the parameters' description.
    """
    rows, heads = cache.view(-1, cache.shape[-1]), new.shape[1]
    lengths, wins = named["seqLen"].flatten().tolist(), named["wins"].flatten().tolist()
    offsets = named["offsetIndex"].flatten().tolist() if "offsetIndex" in named else None
    pairs = slots.numel()
    if (
        pairs % heads
        or len(lengths) < pairs // heads
        or min(len(wins), len(wins if offsets is None else offsets)) < pairs
    ):
        raise refuse("slots, wins and seqLen", f"{pairs}, {len(wins)} and {len(lengths)} values",
                     f"one a sequence and each of {heads} heads, and one a sequence")  # fmt: skip
    if min(lengths) < 0 or min(wins) < 0 or sum(lengths[: pairs // heads]) > new.shape[0]:
        raise refuse("seqLen and wins", f"{lengths}, {wins}", f"not negative, at most {new.shape[0]} tokens in all")
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    for pair, slot in enumerate(slots.tolist()):
        batch, head = divmod(pair, heads)
        tokens, win = new[starts[batch] : starts[batch] + lengths[batch], head], wins[pair]
        if offsets is None:
            tokens = tokens[-win:] if win else tokens
        elif (first := offsets[pair]) >= 0 and win:
            mean = tokens[first : first + win].float().mean(dim=0, keepdim=True).to(tokens.dtype)
            tokens = torch.cat([tokens[:first], mean, tokens[first + win :]])
        if not 0 <= slot <= rows.shape[0] - tokens.shape[0]:
            raise refuse(f"slot of pair {pair}", slot, f"0 to {rows.shape[0] - tokens.shape[0]}")
        rows[slot : slot + tokens.shape[0]] = tokens


def kv_cache(param: Param, tensors: Sequence[Tensor], descs: Sequence[Desc], chip: str) -> list[Tensor]:
    """Writes newKv into cache[layerId] at positions tokenOffset - seqLen to tokenOffset of each sequence."""
    new, layer_id, cache, ends, counts = (dict(zip(KV_INPUTS, tensors, strict=True))[name] for name in KV_INPUTS)
    layer = int(layer_id.tolist()[0])
    if not 0 <= layer < cache.shape[0]:
        raise refuse("layerId", layer, f"below {cache.shape[0]}")
    one = cache[layer]
    if chip == "Ascend310P":  # newKv [1, H / n0, T, n0], cache [B, H / n0, maxS, n0]
        one, rows = one.transpose(1, 2), new[0].transpose(0, 1)
    else:
        rows = new.reshape(-1, cache.shape[-1])
    start = 0
    for batch, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        if not 0 <= count <= end <= one.shape[1] or start + count > rows.shape[0]:
            raise refuse(f"lengths of sequence {batch}", f"seqLen {count}, tokenOffset {end}",
                         f"at most {rows.shape[0]} new tokens and {one.shape[1]} positions")  # fmt: skip
        one[batch, end - count : end] = rows[start : start + count]
        start += count
    return []


KERNELS: dict[str, Kernel] = {"ReshapeAndCache": reshape_and_cache, "KvCache": kv_cache}
