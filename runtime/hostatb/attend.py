"""The arithmetic of attention, shared by SelfAttention and PagedAttention.

    attend(q, k, v, scale=0.125)                 # q [Lq, N, D], k [Lk, Nk, D], v [Lk, Nk, Dv] -> [Lq, N, Dv]
    attend(q, k, v, scale=0.125, causal=True)    # query i sees keys up to Lk - Lq + i
    decode(q, k_rows, v_rows, tables, block, lengths, scale=0.125)  # one query a sequence, caches in blocks of rows

Scores, softmax and sums are float32 and the result is rounded once. Query head h reads kv head h / (N / Nk).

PyTorch's fused kernel does the common cases. One query token (decode) keeps 16-bit keys and values: widening them takes
twice the time. The fused kernel then rounds P to 16 bit before the second product, as the chips do. What has more than
one query token is widened and does not round P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmc.runtime.hostatb.numeric import round_to


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    chip: str,
    causal: bool = False,
    bias: Tensor | None = None,
    log_n: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """`bias` [Lq, Lk] or [N, Lq, Lk] float32 is added to the scores; `log_n` (a number or one a query) multiplies them
    before `clamp`, and `clamp` comes before the bias."""
    (q_len, heads, size), (kv_len, kv_heads, v_size) = q.shape, v.shape
    if clamp is not None:
        return _explicit(q, k, v, scale=scale, chip=chip, causal=causal, bias=bias, log_n=log_n, clamp=clamp)
    if q_len == 1 and bias is None and log_n is None and size == v_size and q.dtype == k.dtype:
        # The queries of one kv head become the rows of one small matmul.
        grouped = q.view(1, kv_heads, heads // kv_heads, size)
        out = scaled_dot_product_attention(grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
        return out.reshape(1, heads, size)
    wide_q = q.float() if log_n is None else q.float() * log_n.float().reshape(-1, 1, 1)
    wide = [x.transpose(0, 1)[None] for x in (wide_q, k.float(), v.float())]
    if causal and bias is None and q_len <= kv_len:
        out = _causal(wide[0], wide[1], wide[2], scale)
    else:
        if causal:
            bias = _plus(bias, causal_bias(q_len, kv_len, q.device))
        mask = None if bias is None else bias.expand(1, heads, q_len, kv_len)
        out = scaled_dot_product_attention(
            wide[0], wide[1], wide[2], attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
        )
    return round_to(out[0].transpose(0, 1), q.dtype, chip)


# The fused kernel computes up to 512 keys past the diagonal and hides them. Pieces of 64 queries over just the keys
# that they see save a quarter of the time at 512 tokens, and nothing beyond 1024 (float32, 9 heads of 64, one thread).
PIECE, LONGEST_IN_PIECES = 64, 1024


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[1, N, Lq, D] x [1, Nk, Lk, D], Lq <= Lk; query i sees keys up to Lk - Lq + i."""
    q_len, kv_len, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if q_len == kv_len and not PIECE < q_len <= LONGEST_IN_PIECES:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    # Row r of the last `size` columns hides what is right of r; a piece of c rows takes the last c rows.
    size = min(PIECE, kv_len)
    bias = torch.zeros(size, kv_len, device=q.device)
    bias[:, kv_len - size :] = torch.full((size, size), float("-inf"), device=q.device).triu_(1)
    parts = []
    for start in range(0, q_len, size):
        rows = q[:, :, start : start + size]
        end = kv_len - q_len + start + rows.shape[2]
        mask = bias[size - rows.shape[2] :, kv_len - end :]
        parts.append(
            scaled_dot_product_attention(
                rows, k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale, enable_gqa=gqa
            )
        )
    return torch.cat(parts, dim=2)


def decode(
    q: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    tables: Sequence[Sequence[int]],
    block: int,
    lengths: Sequence[int],
    *,
    scale: float,
) -> Tensor:
    """q [B, N, D], one query a sequence; k_rows, v_rows [rows, Nk, D]: position p of sequence b lies in row
    tables[b][p // block] * block + p % block. -> [B, N, D]. Only rows below the lengths are read."""
    batch, heads, size = q.shape
    kv_heads = k_rows.shape[1]
    grouped = q.view(batch, kv_heads, heads // kv_heads, size)
    parts = []
    for b, length in enumerate(lengths):
        k = _sequence(k_rows, tables[b], block, length).transpose(0, 1)[None]
        v = _sequence(v_rows, tables[b], block, length).transpose(0, 1)[None]
        parts.append(scaled_dot_product_attention(grouped[b : b + 1], k, v, scale=scale))
    return (torch.cat(parts) if batch > 1 else parts[0]).reshape(batch, heads, size)


def _sequence(rows: Tensor, table: Sequence[int], block: int, length: int) -> Tensor:
    """[length, Nk, D]: a view when the sequence's blocks follow one another, else a copy."""
    used = table[: -(-length // block)]
    first = used[0]
    if used == list(range(first, first + len(used))):
        return rows[first * block : first * block + length]
    ids = torch.tensor(used, device=rows.device)
    return rows.unflatten(0, (-1, block)).index_select(0, ids).flatten(0, 1)[:length]


def causal_bias(q_len: int, kv_len: int, device: torch.device, window: int = 0) -> Tensor:
    """[Lq, Lk] float32: 0 for the keys that a query sees, -inf for later ones and those `window` or more before it."""
    hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    seen = hidden.tril(kv_len - q_len)
    if window:
        seen &= hidden.triu(kv_len - q_len - window + 1)
    return torch.zeros(q_len, kv_len, device=device).masked_fill_(~seen, float("-inf"))


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def scores(q: Tensor, k: Tensor) -> Tensor:
    """[N, Lq, Lk] float32 dot products of every query head with its kv head."""
    groups = q.shape[1] // k.shape[1]
    return torch.einsum("qhgd,khd->hgqk", q.float().unflatten(1, (-1, groups)), k.float()).flatten(0, 1)


def weighted(p: Tensor, v: Tensor) -> Tensor:
    """p [N, Lq, Lk] times v [Lk, Nk, Dv] -> [Lq, N, Dv] float32."""
    groups = p.shape[0] // v.shape[1]
    return torch.einsum("hgqk,khd->qhgd", p.unflatten(0, (-1, groups)), v.float()).flatten(1, 2)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    chip: str,
    causal: bool,
    bias: Tensor | None,
    log_n: Tensor | None,
    clamp: tuple[float, float],
) -> Tensor:
    s = scores(q, k) * scale
    if log_n is not None:
        s = s * log_n.float().reshape(-1, 1)
    s = s.clamp(*clamp)
    if causal:
        s = s + causal_bias(q.shape[0], k.shape[0], q.device)
    if bias is not None:
        s = s + bias
    return round_to(weighted(torch.softmax(s, dim=-1), v), q.dtype, chip)


def attend_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    qk_descale: Tensor,
    v_descale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    p_steps: tuple[Tensor, Tensor] | None = None,
    tile: int = 0,
) -> Tensor:
    """int8 q, k, v, scales per query head [N]. P becomes int8 too: by its row maximum, or by `p_steps` a head, the
    factor of P before rounding and that of the sums. With `tile` P is rounded `tile` keys at a time, each against the
    largest score so far, as the kernel does; that decides which integers come out.

    The integer sums stay below 2^24, so float32 holds them exactly."""
    s = scores(q, k) * (qk_descale.float() * scale).reshape(-1, 1, 1)
    if bias is not None:
        s = s + bias
    descale = v_descale.float().reshape(-1, 1, 1)
    if p_steps is None:
        p = torch.exp(s - s.amax(dim=-1, keepdim=True))
        step = p.amax(dim=-1, keepdim=True) / 127
        factor = descale * step / p.sum(dim=-1, keepdim=True)
        return (weighted(torch.round(p / step), v) * factor.transpose(0, 1)).to(dtype)
    before, after = (step.float().reshape(-1, 1, 1) for step in p_steps)
    top, total, out = torch.full_like(s[..., :1], float("-inf")), torch.zeros_like(s[..., :1]), torch.zeros(())
    for start in range(0, s.shape[-1], tile or s.shape[-1]):
        part = slice(start, start + (tile or s.shape[-1]))
        higher = torch.maximum(top, s[..., part].amax(dim=-1, keepdim=True))
        shrink, p = torch.exp(top - higher), torch.exp(s[..., part] - higher)
        p8 = torch.round((p * before).half().float()).clamp(-128, 127)
        out = out * shrink.transpose(0, 1) + weighted(p8, v[part])
        top, total = higher, total * shrink + p.sum(dim=-1, keepdim=True)
    return (out * (descale * after / total).transpose(0, 1)).to(dtype)
