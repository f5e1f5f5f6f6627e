"""Graphs as text: what `llmc show`, `llmc check` and `--until PASS --print` say; as plain data for --json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmc.compiler.artifact import default_name
from llmc.compiler.compiled import Compiled
from llmc.compiler.ir import LAYER, AtbGraph, AtbNode, Graph, Node, TensorType, show_shape
from llmc.compiler.passes.segment import Segment, why_it_ends


def show_result(result: Graph | AtbGraph | tuple[Segment, ...]) -> str:
    """Any graph of the pipeline, one line a node."""
    if isinstance(result, Graph):
        return "\n".join(_graph_lines(result))
    if isinstance(result, AtbGraph):
        return "\n".join(_atb_lines(result))
    return "\n".join(line for part in result for line in ("", _segment_line(part), *_atb_lines(part.graph)))


def _graph_lines(graph: Graph) -> Iterator[str]:
    for name, t in graph.inputs.items():
        yield f"{name:<32} input          {show_type(t)}"
    for node in graph.nodes:
        yield f"{node.name:<32} {node.op:<14} {_types(graph, node)}  ({_reads(graph, node)})  {node.place}"
    for name, value in graph.outputs.items():
        yield f"{name:<32} output         {value}{_letter(graph, value)}"


def _types(graph: Graph, node: Node) -> str:
    return ", ".join(show_type(graph.types[value]) if value in graph.types else "?" for value in node.values)


def show_type(t: TensorType) -> str:
    """`float16 [T, 5120] P`, `float16 [T, 13824] S(1), a rank [T, 1728]`"""
    return f"{t}, a rank {show_shape(t.local)}" if t.local != t.shape else str(t)


def _reads(graph: Graph, node: Node) -> str:
    """The edges into a node: values, then weights; over several ranks each with its sharding."""
    values = [f"{value}{_letter(graph, value)}" for value in node.inputs.values()]
    if graph.world_size == 1:
        return ", ".join(values)
    weights = [f"{slot} {show_shape(w.type.local)} {w.type.shard}" for slot, w in node.weights.items()]
    return ", ".join([*values, *weights])


def _letter(graph: Graph, value: str) -> str:
    return f" {graph.types[value].shard}" if graph.world_size > 1 and value in graph.types else ""


def _atb_lines(graph: AtbGraph) -> Iterator[str]:
    for name in graph.inputs:
        t = graph.tensors[name]
        yield f"{name:<32} {t.role:<14} {t}{' host' if t.host else ''}"
    for node in graph.nodes:
        yield _atb_line(graph, node)


def _atb_line(graph: AtbGraph, node: AtbNode) -> str:
    made = ", ".join(f"{out} {graph.tensors[out]}" for out in node.outs)
    ins = ", ".join(n + (f" as {show_shape(node.views[i])}" if i in node.views else "") for i, n in enumerate(node.ins))
    param = ", ".join(f"{k}={v}" for k, v in node.param.items())
    return f"{node.op:<16} {made}  <-  {ins}{'  {' + param + '}' if param else ''}  {node.place or ''}".rstrip()


def _segment_line(part: Segment) -> str:
    counts = ", ".join(f"{n} {kind}" for kind, n in part.counts.items())
    return (
        f"segment of {len(part.layers)} groups ({part.layers[0]} to {part.layers[-1]}): {counts}; {why_it_ends(part)}"
    )


def summary(compiled: Compiled) -> dict[str, Any]:
    """The closing facts of a compilation as plain data."""
    return {
        "model": compiled.model.name,
        "artifact": default_name(compiled),
        "device": compiled.options.device,
        "dtype": compiled.dtype,
        "attention": compiled.options.attention,
        "logits": compiled.options.logits,
        "world_size": compiled.options.world_size,
        "operators": compiled.graph.size,
        "operations": {
            phase: sum(part.counts["nodes"] for part in parts) for phase, parts in compiled.segments.items()
        },
        "segments": {
            phase: [{**part.counts, "groups": len(part.layers), "bound_by": list(part.bound_by)} for part in parts]
            for phase, parts in compiled.segments.items()
        },
        **{key: size for key, size in compiled.memory.items() if "bytes" in key},
    }


def summary_line(compiled: Compiled) -> str:
    facts = summary(compiled)
    phases = "; ".join(
        f"{phase} {facts['operations'][phase]} operations in {_count(len(parts), 'segment')}{_bound_by(parts)}"
        for phase, parts in facts["segments"].items()
    )
    cache = f"{facts['cache_bytes_per_token'] / 1024:.1f} KiB per token"
    return f"{phases}; weights {show_bytes(facts['weight_bytes'])}, cache {cache}"


def _bound_by(parts: Sequence[Mapping[str, Any]]) -> str:
    """Which limits cut the model into these segments: `` (bound by nodes)``; nothing where it is one segment."""
    limits = dict.fromkeys(limit for part in parts for limit in part["bound_by"] if limit != "end")
    return f" (bound by {' and '.join(limits)})" if limits else ""


def show_bytes(size: int) -> str:
    """`24.24 GiB`, `256.57 MiB`, `6.1 KiB`, `128 B`"""
    if size >= 2**20:
        return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size} B"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def head_line(compiled: Compiled) -> str:
    """`llama2-13b on atlas-800i-a2, float16, paged attention, world size 8, lccl`"""
    o = compiled.options
    ranks = f"world size {o.world_size}" + (f", {o.backend}" if o.backend else "")
    every = ", logits of every token" if o.logits == "all" else ""
    return f"{compiled.model.name} on {o.device}, {compiled.dtype}, {o.attention} attention, {ranks}{every}"


def show_model(compiled: Compiled) -> str:
    """Sizes, the operators of one layer with their types, the ATB operations of one layer of each phase, segments."""
    graph = compiled.graph
    lines = [head_line(compiled)]
    lines += ["", "sizes", *(f"  {name:<16} {value}" for name, value in graph.sizes.items())]
    lines += ["", "operators"]
    lines += [f"  {line}" for line in _graph_lines(graph) if _shown(line)]
    for phase, low in compiled.lowered.items():
        lines += ["", f"{phase}: ATB operations"]
        lines += [f"  {_atb_line(low, node)}" for node in low.nodes if _shown(node.name)]
        lines += [f"  {_segment_line(part)}" for part in compiled.segments[phase]]
    return "\n".join([*lines, "", summary_line(compiled)])


def _shown(text: str) -> bool:
    """Of a repeated block, the first iteration stands for all."""
    match = LAYER.match(text.split(" ")[0])
    return not match or match[2] == "0"


def show_ops(ops: Iterable[Any]) -> str:
    found = list(ops)
    width = max(len(op.name) for op in found)
    return "\n".join(f"{op.name:<{width}}  {op.doc}" for op in found)


def show_op(op: Any) -> str:
    """One operator: slots, weights, attributes, sharding, where the facts come from."""
    lines = [f"{op.name}: {op.doc}", f"  inputs   {', '.join(op.inputs)}"]
    lines += [f"  weight   {w.name}: {w.doc}{'' if w.required else ' (optional)'}" for w in op.weights]
    for a in op.attrs:
        lines.append(f"  {a.name:<8} {a.kind}: {a.doc}{' (required)' if a.required else ''}")
    lines += [f"  tp       {' | '.join(op.splits)}", f"  source   {op.source}"]
    return "\n".join(lines)
