"""What one rank holds in memory, read off its graphs: weights, cache, constants, and what a step needs beside them.

    plan = memory_plan(compiled)            # numbers and forms, which the manifest keeps
    needed(plan, tokens=4096, batch=8, context=2048, positions=4096)["total"]         # bytes

A form is bytes by the symbols of the shapes: {"": 512, "T": 16384, "B*M": 4} is 512 + 16384 T + 4 B M.

Where the bytes of a step lie (atb-operations.md 1.5, 2.1; torch_atb and libatb were read, not run):

- a segment's outputs are tensors of their own, from the segment that makes them to the last that reads them; so are
  the inputs of the step, for as long as it runs;
- everything between the nodes of a segment lies in one workspace, which libatb plans by lifetimes: a name has its place
  from the first node that writes it to the last that uses it, and passes/names.py chooses names by that. The
  workspace stays allocated at the largest size that any segment of either phase asked for;
- on 310P matmul and attention kernels work on NZ copies of their inputs and outputs, in the workspace too.

Not counted: the scratch of 910B kernels, communication buffers, code, fragmentation, and the holes that libatb's first
fit leaves in a workspace (up to 13 % of it in the catalogue). `reserve` in graphs/hardware stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

from llmc.compiler.atb.core import DTYPE_BYTES
from llmc.compiler.compiled import Compiled
from llmc.compiler.ir import AtbGraph, AtbNode, AtbTensor, Shape, standing_for
from llmc.compiler.ops.attention import BLOCK_SIZE
from llmc.compiler.passes.segment import Segment

Form = Mapping[str, int]

WORKSPACE_AT_LEAST = 100 << 20  # torch_atb's buffer before it grows (2.1)
PREFILL_TOKENS = 4096  # of one prefill step of `llmc run`, or one sequence if it is longer
NZ_INSIDE = ("Linear", "SelfAttention", "PagedAttention")  # kernels that convert on 310P (1.7)
NZ_BLOCK = 16  # rows and columns of a block of 16-bit numbers


def memory_plan(compiled: Compiled) -> dict[str, Any]:
    """Numbers and forms of one rank, as plain data."""
    graph = compiled.graph
    tensors = {name: t for low in compiled.lowered.values() for name, t in low.tensors.items()}
    caches = [t for name, t in tensors.items() if t.role == "cache" for _ in standing_for(graph.repeats, name)]
    steps = {phase: step_forms(parts) for phase, parts in compiled.segments.items()}
    token = {"prefill": "T", "decode": "B"}
    return {
        "weight_bytes": weight_bytes(compiled, tensors),
        "cache": total(form_of(t.dtype, t.shape) for t in caches),
        "cache_bytes_per_token": sum(cached_bytes(t.dtype, t.shape) for t in caches),
        "constants": total(form_of(t.dtype, t.shape) for t in tensors.values() if t.role == "constant"),
        "steps": steps,
        "activation_bytes_per_token": {
            phase: sum(max(form.get(token[phase], 0) for form in forms) for forms in step.values())
            for phase, step in steps.items()
        },
        "workspace_at_least": 0 if compiled.device.chip == "host" else WORKSPACE_AT_LEAST,
    }


def needed(
    plan: Mapping[str, Any], *, tokens: int, batch: int, context: int, positions: int, blocks: int | None = None
) -> dict[str, int]:
    """Bytes of one rank that reads at most `tokens` in one prefill step and has `batch` sequences of up to `context`
    tokens, answers included. `positions`: rows of the rope tables; `blocks` of the paged cache: else enough for all."""
    width = -(-context // BLOCK_SIZE)
    symbols = {"T": tokens, "B": batch, "M": width, "P": positions, "S": context}
    symbols["N"] = batch * width if blocks is None else blocks
    steps = plan["steps"].values()
    found = {
        "weights": plan["weight_bytes"],
        "cache": evaluate(plan["cache"], symbols),
        "constants": evaluate(plan["constants"], symbols),
        "step_tensors": max(evaluate(form, symbols) for step in steps for form in step["tensors"]),
        "workspace": max(
            [plan["workspace_at_least"], *(evaluate(form, symbols) for step in steps for form in step["workspace"])]
        ),
    }
    return {**found, "total": sum(found.values())}


def last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number of low..high for which it holds, as it does for all smaller ones; 0 if for none."""
    if not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def weight_bytes(compiled: Compiled, tensors: Mapping[str, AtbTensor]) -> int:
    """All weights of a rank; tied ones once, where they are the same on the device too."""
    graph = compiled.graph
    unique = {
        (tuple((s.of_iteration(i), s.rows) for s in w.sources), w.type, tensors[name].format): tensors[name]
        for name, w in graph.weights.items()
        for _, i in standing_for(graph.repeats, name)
    }
    return sum(DTYPE_BYTES[t.dtype] * prod(_stored(t)) for t in unique.values())


def _stored(t: AtbTensor) -> list[int]:
    """The numbers that a weight has in memory: an NZ matrix has whole blocks."""
    dims = [dim for dim in t.shape if isinstance(dim, int)]
    return [_whole(dim) for dim in dims] if t.format == "nz" else dims


def _whole(dim: int) -> int:
    return -(-dim // NZ_BLOCK) * NZ_BLOCK


# ---- a step


def step_forms(segments: Sequence[Segment]) -> dict[str, list[Form]]:
    """Forms of which the largest counts: of the step's own tensors (inputs, what segments hand over, outputs), one for
    each segment that runs; and of the workspace, one for each node."""
    inputs: dict[str, Form] = {}
    for part in segments:
        for name, t in part.ends.items():
            if t.role == "input" and not t.host:
                inputs[name] = form_of(t.dtype, t.shape)
    last = {name: k for k, part in enumerate(segments) for name in (*part.outputs, *part.inputs)}
    tensors: list[Form] = []
    alive: dict[str, Form] = {}
    for k, part in enumerate(segments):
        alive |= {name: form_of(part.ends[name].dtype, part.ends[name].shape) for name in part.outputs}
        tensors.append(total([*inputs.values(), *alive.values()]))
        alive = {name: form for name, form in alive.items() if last[name] > k}
    places = (workspace(part.short, part.places) for part in segments)
    return {"tensors": largest(tensors), "workspace": largest(chain.from_iterable(places))}


def workspace(graph: AtbGraph, places: Mapping[str, str]) -> Iterator[Form]:
    """At each node, the bytes of the places in the graph's workspace. `places`: value -> the name that it shares."""
    internal = {name: places.get(name, name) for name in graph.internals}
    used = [[internal[name] for name in (*node.outs, *node.ins) if name in internal] for node in graph.nodes]
    last = {place: i for i, places in enumerate(used) for place in places}
    live: dict[str, Form] = {}
    for i, node in enumerate(graph.nodes):
        for name in node.outs:
            if name in internal:
                live[internal[name]] = form_of(graph.tensors[name].dtype, graph.tensors[name].shape)
        yield total([*live.values(), *nz_copies(graph, node)])
        for place in used[i]:
            if last[place] == i:
                live.pop(place, None)


def nz_copies(graph: AtbGraph, node: AtbNode) -> Iterator[Form]:
    """NZ copies that a kernel makes of its ND inputs and outputs; at most: it frees some before it makes others."""
    if node.op not in NZ_INSIDE or all(graph.tensors[name].format == "nd" for name in node.ins):
        return
    for name in dict.fromkeys((*node.ins, *node.outs)):
        t = graph.tensors[name]
        if t.format == "nd" and t.role == "internal" and t.dtype == "float16" and len(t.shape) > 1:
            rows, columns = t.shape[0], prod(dim for dim in t.shape[1:] if isinstance(dim, int))
            yield form_of(t.dtype, (rows, _whole(columns)))
            yield form_of(t.dtype, (NZ_BLOCK - 1, _whole(columns)))  # rows are filled up to whole blocks


# ---- forms


def form_of(dtype: str, shape: Shape) -> Form:
    """float16 [T, 5120]  ->  {"T": 10240}"""
    symbols = "*".join(sorted(dim for dim in shape if isinstance(dim, str)))
    return {symbols: known_bytes(dtype, shape)}


def known_bytes(dtype: str, shape: Shape) -> int:
    """Bytes of the dimensions that are numbers."""
    return DTYPE_BYTES[dtype] * prod(dim for dim in shape if isinstance(dim, int))


def cached_bytes(dtype: str, shape: Shape) -> int:
    """Of one position of one sequence in one cache: paged caches have N blocks of positions."""
    return known_bytes(dtype, shape) // (BLOCK_SIZE if shape[0] == "N" else 1)


def total(forms: Iterable[Form]) -> dict[str, int]:
    added: dict[str, int] = {}
    for form in forms:
        for symbols, size in form.items():
            added[symbols] = added.get(symbols, 0) + size
    return dict(sorted(added.items()))


def largest(forms: Iterable[Form]) -> list[Form]:
    """Without those that another one exceeds whatever the symbols are."""
    unique = list({tuple(form.items()): form for form in forms}.values())
    return [a for a in unique if not any(a is not b and exceeds(b, a) for b in unique)]


def exceeds(a: Form, b: Form) -> bool:
    return all(a.get(symbols, 0) >= size for symbols, size in b.items())


def evaluate(form: Form, symbols: Mapping[str, int]) -> int:
    return sum(size * prod(symbols[s] for s in key.split("*") if s) for key, size in form.items())
