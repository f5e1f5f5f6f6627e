"""The memory plan of one rank, read off the lowered graphs: weights, cache, and activations by liveness.

memory_plan(weights, lowered)["weight_bytes"]
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from llmc.compiler.atb.core import DTYPE_BYTES
from llmc.compiler.ir import AtbGraph, Shape, Weight
from llmc.compiler.ops.attention import BLOCK_SIZE


def memory_plan(weights: Mapping[str, Weight], lowered: Mapping[str, AtbGraph]) -> dict[str, Any]:
    """Bytes: all weights (a tied one once); the cache of one position of one sequence; per phase the largest sum of
    intermediates that live at one time, for each token of the step (logits and workspaces of kernels not counted)."""
    unique = {(tuple((s.tensor, s.rows) for s in w.sources), w.type): w.type for w in weights.values()}
    return {
        "weight_bytes": sum(known_bytes(t.dtype, t.local) for t in unique.values()),
        "cache_bytes_per_token": cache_bytes_per_token(next(iter(lowered.values()))),
        "activation_bytes_per_token": {phase: peak_bytes_per_token(graph) for phase, graph in lowered.items()},
    }


def cache_bytes_per_token(graph: AtbGraph) -> int:
    """Paged caches have N blocks, contiguous ones a place for each position."""
    caches = [t for t in graph.tensors.values() if t.role == "cache"]
    block = BLOCK_SIZE if any(t.shape[0] == "N" for t in caches) else 1
    return sum(known_bytes(t.dtype, t.shape) for t in caches) // block


def peak_bytes_per_token(graph: AtbGraph) -> int:
    """A value lives from the node that makes it to the last that reads it; only those with a row a token count."""
    tokens = "T" if graph.phase == "prefill" else "B"
    last = {name: i for i, node in enumerate(graph.nodes) for name in (*node.outs, *node.ins)}
    live: dict[str, int] = {}
    peak = 0
    for i, node in enumerate(graph.nodes):
        for out in node.outs:
            t = graph.tensors[out]
            if t.role == "internal" and t.shape[0] == tokens and out not in graph.outputs:
                live[out] = known_bytes(t.dtype, t.shape)
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last[name] > i}
    return peak


def known_bytes(dtype: str, shape: Shape) -> int:
    """Bytes of the dimensions that are numbers."""
    return DTYPE_BYTES[dtype] * prod(dim for dim in shape if isinstance(dim, int))
