"""attention: causal (grouped-query) attention with a KV cache, paged or contiguous ("flash").

Lowering by phase and cache (atb-operations.md 6.1 to 6.3):

    paged  prefill   ReshapeAndCache, SelfAttention PA_ENCODER        decode   ReshapeAndCache, PagedAttention
    flash  prefill   SelfAttention ENCODER (writes its cache)         decode   SelfAttention DECODER
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.compiler.atb.self_attention import DECODER, ENCODER, NORM_COMPRESS, PA_ENCODER
from llmc.compiler.ir import Node, Shape, TensorType
from llmc.compiler.ops.core import Attr, NoRule, Op, Sharding, describe, same_dtype
from llmc.compiler.sharding import WHOLE, deal_heads, split_on

if TYPE_CHECKING:
    from llmc.compiler.ops.lowering import Lowering, Ref

BLOCK_SIZE = 128  # positions in a cache block


def attention_shape(node: Node, types: Sequence[TensorType]) -> list[TensorType]:
    """q [T, H*D], k and v [T, Hk*D] -> [T, H*D]"""
    heads, kv_heads, d = (node.attrs[a] for a in ("heads", "kv_heads", "head_dim"))
    same_dtype(types, ("q", "k", "v"))
    if heads % kv_heads:
        raise NoRule(f"heads {heads} is not a multiple of kv_heads {kv_heads}", needed="whole groups of query heads")
    for name, t, n in zip(("q", "k", "v"), types, (heads, kv_heads, kv_heads), strict=True):
        if t.shape[-1] != n * d:
            raise NoRule(f"the width of '{name}' is not {n} heads of {d}", found=str(t), needed=f"[T, {n * d}]")
    return [types[0]]


def attention_shard(node: Node, types: Sequence[TensorType], world_size: int) -> Sharding:
    """q, k, v R -> R; S in whole heads, each query head with its kv head -> S like q"""
    heads, kv_heads, d = (node.attrs[a] for a in ("heads", "kv_heads", "head_dim"))
    queries, keys = deal_heads(heads, kv_heads, d, world_size)
    wanted = [split_on(1, queries), split_on(1, keys), split_on(1, keys)]
    if all(t.shard == WHOLE for t in types):
        return Sharding(outputs=[WHOLE])
    if [t.shard for t in types] != wanted:
        raise NoRule(
            "query heads are not on the ranks of their kv heads",
            found=", ".join(f"{name} {describe(t)}" for name, t in zip("qkv", types, strict=True)),
            needed=f"whole heads: q S(1) with {queries.local} a rank, k and v S(1) with {keys.local} a rank",
            likely="make q, k and v in one linear with `parts`, each with its `heads`",
            code="E303",
        )
    return Sharding(outputs=[wanted[0]])


def attention_lower(node: Node, low: Lowering) -> None:
    d = node.attrs["head_dim"]
    heads, kv_heads = (low.local(node.inputs[slot])[-1] // d for slot in "qk")
    common = {"headNum": heads, "kvHeadNum": kv_heads, "qkScale": node.attrs["scale"] or d**-0.5}
    q, k, v = (low.read(node.inputs[slot]) for slot in "qkv")
    if low.attention == "flash":
        flash_lower(node, low, common, (q, k, v), kv_heads * d)
        return
    k_cache, v_cache = paged_caches(node, low, kv_heads, d)
    k_heads, v_heads = (low.view(t, (low.tokens, kv_heads, d)) for t in (k, v))
    slots = low.input("slots", "int32", (low.tokens,))
    low.emit(node, "ReshapeAndCache", {}, [k_heads, v_heads, k_cache, v_cache, slots],
             outs=[k_cache, v_cache], suffix="cache")  # fmt: skip
    q_heads = low.view(q, (low.tokens, heads, d))
    if low.phase == "prefill":
        qkv = [q, k, v] if low.device.merged_heads else [q_heads, k_heads, v_heads]
        shape = None if low.device.merged_heads else (low.tokens, heads, d)
        param = {**common, "calcType": PA_ENCODER, "maskType": NORM_COMPRESS, "isTriuMask": 1}
        low.emit(
            node, "SelfAttention", param, [*qkv, low.causal_mask(), low.input("seq_len", "int32", ("B",))], shape=shape
        )
        return
    tables = low.input("block_tables", "int32", ("B", "M"))
    ins = [q_heads, k_cache, v_cache, tables, low.input("context_lens", "int32", ("B",))]
    low.emit(node, "PagedAttention", common, ins, shape=("B", heads, d))


def paged_caches(node: Node, low: Lowering, kv_heads: int, head_dim: int) -> list[Ref]:
    """[blocks, 128, kv heads, head_dim], as NZ [blocks, kv heads * head_dim / 16, 128, 16] (3.9)."""
    nd: Shape = ("N", BLOCK_SIZE, kv_heads, head_dim)
    nz: Shape = ("N", kv_heads * head_dim // 16, BLOCK_SIZE, 16)
    shape, heads_axis = (nz, 1) if low.device.formats["cache"] == "nz" else (nd, 2)
    return [low.cache(node, slot, shape, axis=heads_axis) for slot in "kv"]


def flash_lower(node: Node, low: Lowering, common: dict, qkv: Sequence[Ref], width: int) -> None:
    """The operation appends k and v to its caches itself; layer_id 0, because each layer has its own caches.

    A cache is [1, B, S, width], as NZ [1, B, width / 16, S, 16] (3.8)."""
    nd: Shape = (1, "B", "S", width)
    nz: Shape = (1, "B", width // 16, "S", 16)
    shape, heads_axis = (nz, 2) if low.device.formats["cache"] == "nz" else (nd, 3)
    caches = [low.cache(node, slot, shape, axis=heads_axis) for slot in "kv"]
    offset, lengths = low.input("token_offset", "int32", ("B",)), low.input("seq_len", "int32", ("B",))
    layer = low.input("layer_id", "int32", (1,))
    if low.phase == "prefill":
        param = {**common, "calcType": ENCODER, "maskType": NORM_COMPRESS, "isTriuMask": 1}
        ins = [*qkv, *caches, low.causal_mask(), offset, lengths, layer]
    else:
        param = {**common, "calcType": DECODER}
        ins = [*qkv, *caches, offset, lengths, layer]
    low.emit(node, "SelfAttention", param, ins)


OPS = (
    Op(
        name="attention",
        doc="Causal attention over the KV cache; fewer kv_heads than heads is grouped-query attention.",
        inputs=("q", "k", "v"),
        attrs=(
            Attr(name="heads", kind="size", doc="query heads", required=True),
            Attr(name="kv_heads", kind="size", doc="key and value heads", required=True),
            Attr(name="head_dim", kind="size", doc="size of a head", required=True),
            Attr(name="scale", kind="number", doc="factor of QK^T; default 1 / sqrt(head_dim)"),
        ),
        shape=attention_shape,
        shard=attention_shard,
        gathers=False,
        lower=attention_lower,
        source="ATB SelfAttention, PagedAttention, ReshapeAndCache (atb-operations.md 3.8 to 3.10)",
    ),
)
