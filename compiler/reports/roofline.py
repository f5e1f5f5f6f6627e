"""What a step costs one rank: FLOPs, memory traffic, traffic between ranks, and the best time that they allow.

    facts = step_facts(compiled, "decode", batch=8, length=2048, board=board, link=link)
    facts["seconds"], facts["bound_seconds"]["memory"]

A roofline: no operation is faster than the slowest of its three demands, and operations follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llmc.compiler.atb.core import DTYPE_BYTES
from llmc.compiler.compiled import Compiled
from llmc.compiler.ir import LAYER, AtbGraph, AtbNode, evaluate
from llmc.compiler.memory import cached_bytes
from llmc.compiler.ops.attention import BLOCK_SIZE
from llmc.compiler.target.device import Board, Link

COLLECTIVES = ("AllReduce", "AllGather", "LinearParallel")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one operation on one rank: FLOPs of products, bytes of memory read and written, bytes sent to other ranks."""

    flops: int = 0
    memory: int = 0
    wire: int = 0


def step_facts(
    compiled: Compiled, phase: str, batch: int, length: int, board: Board | None, link: Link | None
) -> dict[str, Any]:
    """One step of `batch` sequences of `length` tokens: read (prefill), or in the cache (decode)."""
    graph, size = compiled.lowered[phase], compiled.options.world_size or 1
    costs = [(node, cost_of(graph, node, size, batch, length)) for node in graph.nodes]
    layers = {match.group(1, 2) for node in graph.nodes if (match := LAYER.match(node.name))}
    in_layers = sum(cost.wire for node, cost in costs if LAYER.match(node.name))
    bounds = seconds_by_bound([cost for _, cost in costs], board, link, size) if board else None
    return {
        "flops": sum(cost.flops for _, cost in costs),
        "memory_bytes": sum(cost.memory for _, cost in costs),
        "wire_bytes": sum(cost.wire for _, cost in costs),
        "wire_bytes_per_layer": in_layers / max(1, len(layers)),
        **{
            f"{word}_bytes": sum(cost.wire for node, cost in costs if node.op in ops)
            for word, ops in (("all_reduce", ("AllReduce", "LinearParallel")), ("all_gather", ("AllGather",)))
        },
        "seconds": sum(bounds.values()) if bounds else None,
        "bound_seconds": bounds,
    }


def seconds_by_bound(costs: Sequence[Cost], board: Board, link: Link | None, world_size: int) -> dict[str, float]:
    """Each operation takes as long as the slowest of its three demands; the sums by which it is."""
    found = {"compute": 0.0, "memory": 0.0, "wire": 0.0}
    links = (link.bandwidth * (world_size - 1 if link.each_peer else 1)) if link else 0.0
    for cost in costs:
        times = {"compute": cost.flops / board.flops, "memory": cost.memory / board.bandwidth, "wire": 0.0}
        if cost.wire and links:
            times["wire"] = cost.wire / links
        slowest = max(times, key=lambda kind: times[kind])
        found[slowest] += times[slowest]
    return found


def cost_of(graph: AtbGraph, node: AtbNode, world_size: int, batch: int, length: int) -> Cost:
    """Of one operation, by the shapes that its kernel sees."""
    symbols = {"T": batch * length, "B": batch, "M": -(-length // BLOCK_SIZE)}

    def shape(index: int) -> tuple[int, ...]:
        return evaluate(node.views.get(index, graph.tensors[node.ins[index]].shape), symbols)

    def size(name: str) -> int:
        t = graph.tensors[name]
        return DTYPE_BYTES[t.dtype] * prod(evaluate(t.shape, symbols))

    made = sum(size(name) for name in node.outs if graph.tensors[name].role != "cache")
    read = {n: size(n) for n in node.ins if graph.tensors[n].role in ("internal", "weight", "input")}
    caches = [graph.tensors[name] for name in node.ins if graph.tensors[name].role == "cache"]
    flops = memory = 0
    match node.op:
        case "Linear" | "LinearParallel":
            *rows, width = shape(0)
            flops = 2 * prod(rows) * width * shape(1)[0]
        case "Gather":  # the rows that are asked for, not the table
            read = {node.ins[1]: size(node.ins[1])}
            memory = made
        case "ReshapeAndCache":  # what is read is written
            memory = sum(read[name] for name in node.ins[:2])
        case "SelfAttention" | "PagedAttention":
            width = prod(shape(0)[1:])  # query heads times their size
            decoding = graph.phase == "decode"
            pairs = batch * length if decoding else batch * length * (length + 1) // 2
            flops = 4 * width * pairs  # of each pair of positions a product for its score, and one for its value
            token = sum(cached_bytes(t.dtype, t.shape) for t in caches)
            appended = token * (batch if decoding else batch * length) if node.op == "SelfAttention" else 0
            memory = appended + (token * batch * length if decoding else 0)
    return Cost(flops=flops, memory=memory + made + sum(read.values()), wire=wire_bytes(node, size, world_size))


def wire_bytes(node: AtbNode, size: Callable[[str], int], world_size: int) -> int:
    """What one rank sends. A sum: 2 (W - 1) / W of the tensor, as in a ring: each rank reduces its part and sends it
    to all. A gather: the share, to each of the others."""
    if node.op not in COLLECTIVES:
        return 0
    if node.op == "AllGather":
        return (world_size - 1) * size(node.ins[0])
    return 2 * (world_size - 1) * size(node.outs[0]) // world_size
