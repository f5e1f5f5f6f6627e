"""What must hold after every pass, as tables of named checks. A failure is a bug of ours, or a rule of libatb.

Model graphs: names are unique, every edge has its maker before its reader, types cover every value once inferred.
ATB graphs: every operation is asked through the ATB table at two sets of sample sizes, so that symbols are proven and
not only numbers; one tensor is read on the host or on the device, never both; limits of libatb.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from llmc.compiler.atb import OPS as ATB
from llmc.compiler.atb.core import GRAPH_LIMITS, AtbError, Desc
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError
from llmc.compiler.ir import AtbGraph, AtbNode, Graph, Node, TensorType, evaluate, show_shape
from llmc.compiler.ops import OPS, NoRule
from llmc.compiler.ops.core import Sharding
from llmc.compiler.passes.segment import Segment
from llmc.compiler.sharding import PARTIAL, WHOLE, Shard

# Two unrelated sets of sizes. Lengths as in data/atb-layers: 37 tokens of 3 sequences, 16 blocks.
SAMPLES: Sequence[Mapping[str, int]] = (
    {"T": 37, "B": 3, "N": 16, "M": 3, "S": 512, "P": 2048},
    {"T": 211, "B": 5, "N": 23, "M": 7, "S": 1024, "P": 4096},
)


def verify(result: Graph | AtbGraph | Sequence[Segment], chip: str) -> None:
    """The checks for whatever kind of graph a pass gave."""
    if isinstance(result, Graph):
        verify_graph(result)
    elif isinstance(result, AtbGraph):
        verify_atb(result, chip)
    else:
        verify_segments(result, chip)


def verify_graph(graph: Graph) -> None:
    """Every check of GRAPH_CHECKS, or DiagnosticError."""
    _raise([d for check in GRAPH_CHECKS.values() for d in check(graph)])


def unique_names(graph: Graph) -> Iterator[Diagnostic]:
    counts = Counter(value for node in graph.nodes for value in node.values)
    for value, count in counts.items():
        if count > 1 or value in graph.inputs:
            yield Diagnostic(code="E900", message=f"value '{value}' has {count} makers")


def makers_before_readers(graph: Graph) -> Iterator[Diagnostic]:
    made = set(graph.inputs)
    for node in graph.nodes:
        for slot, value in node.inputs.items():
            if value not in made:
                yield Diagnostic(
                    code="E900", message=f"'{node.name}' reads '{value}' ({slot}) before it is made", place=node.place
                )
        made.update(node.values)
    for name, value in graph.outputs.items():
        if value not in made:
            yield Diagnostic(code="E900", message=f"output '{name}' reads '{value}', which nothing makes")


def types_are_complete(graph: Graph) -> Iterator[Diagnostic]:
    """Once types exist they cover every value."""
    if not graph.types:
        return
    for node in graph.nodes:
        for value in node.values:
            if value not in graph.types:
                yield Diagnostic(code="E900", message=f"'{value}' has no type", place=node.place)


def shards_follow_the_rules(graph: Graph) -> Iterator[Diagnostic]:
    """No P is read as R and nothing is summed twice: each operator's rule, asked again, accepts how its inputs lie and
    gives the recorded sharding of its outputs and weights. Outputs of the graph are whole, but for taps."""
    asked: set = set()
    for node in graph.nodes if graph.types else ():
        types = [graph.types.get(value) or graph.inputs[value] for value in node.inputs.values()]
        outputs = [graph.types[value].shard for value in node.values if value in graph.types]
        weights = node.weights.values()
        # 80 equal layers are one question. Shards are made once (sharding.split_on), so their identity tells them.
        question = (node.op, id(node.attrs), *(id(t.shard) for t in types), *map(id, outputs),
                    *((w.split, w.type.shape, id(w.type.shard)) for w in weights))  # fmt: skip
        if question not in asked:
            asked.add(question)
            yield from _follows_rule(graph, node, types, outputs)
    for name, value in graph.outputs.items():
        if value in graph.types and graph.types[value].shard != WHOLE and value not in graph.tapped:
            yield Diagnostic(code="E900", message=f"output '{name}' is not whole on every rank")


def _follows_rule(
    graph: Graph, node: Node, types: Sequence[TensorType], outputs: Sequence[Shard]
) -> Iterator[Diagnostic]:
    expected = Sharding(outputs=[WHOLE] * len(node.outputs))
    if graph.world_size > 1:
        try:
            expected = OPS[node.op].shard(node, types, graph.world_size)
        except NoRule as error:
            yield Diagnostic(code="E900", message=f"'{node.name}': {error.message}", place=node.place)
            return
    splits = [split for t in (*types, *(w.type for w in node.weights.values())) for split in t.shard.splits]
    if any(len(s.runs) != graph.world_size or any(count > s.local for _, count in s.runs) for s in splits):
        yield Diagnostic(code="E900", message=f"'{node.name}': a rank holds more than its share", place=node.place)
    lying = {slot: w.type.shard for slot, w in node.weights.items() if w.type.shard != WHOLE}
    if list(outputs) != list(expected.outputs) or lying != dict(expected.weights):
        yield Diagnostic(code="E900", message=f"'{node.name}' does not lie as its rule says", place=node.place)


GRAPH_CHECKS: Mapping[str, Callable[[Graph], Iterator[Diagnostic]]] = {
    "unique names": unique_names,
    "makers before readers": makers_before_readers,
    "types are complete": types_are_complete,
    "shards follow the rules": shards_follow_the_rules,
}


def verify_atb(graph: AtbGraph, chip: str) -> None:
    """The rules of libatb for one flat graph, before and after segmentation."""
    found = [*host_or_device(graph, chip), *sums_are_made_once(graph)]
    checked: set = set()
    for node in graph.nodes:
        found.extend(accepted(graph, node, chip, checked))
    _raise(found)


def accepted(graph: AtbGraph, node: AtbNode, chip: str, checked: set) -> Iterator[Diagnostic]:
    """Create, infer and set up the operation at sample sizes; the inferred shapes must be the declared ones.

    `checked` holds what was asked before: 80 equal layers are one question."""
    ins = [(graph.tensors[n], node.views.get(i, graph.tensors[n].shape)) for i, n in enumerate(node.ins)]
    outs = [graph.tensors[n] for n in node.outs]
    question = (
        node.op,
        repr(node.param),
        tuple((t.dtype, t.format, s) for t, s in ins),
        tuple((t.dtype, t.format, t.shape) for t in outs),
    )
    if question in checked:
        return
    checked.add(question)
    for (tensor, view), name in zip(ins, node.ins, strict=True):
        if any(prod(evaluate(view, sample)) != prod(evaluate(tensor.shape, sample)) for sample in SAMPLES):
            yield Diagnostic(
                code="E900",
                message=f"'{node.name}' views '{name}' {show_shape(tensor.shape)} as {show_shape(view)}",
                place=node.place,
            )
    op = ATB[node.op]
    try:
        param = op.param(node.param)
        op.create(param, chip)
        for sample in SAMPLES:
            descs = [Desc(dtype=t.dtype, format=t.format, shape=evaluate(s, sample)) for t, s in ins]
            declared = [Desc(dtype=t.dtype, format=t.format, shape=evaluate(t.shape, sample)) for t in outs]
            inferred = op.infer(param, descs, chip)
            if [_plain(d) for d in inferred] != [_plain(d) for d in declared]:
                yield Diagnostic(
                    code="E900",
                    message=f"'{node.name}' ({node.op}): the declared type is not the inferred one",
                    place=node.place,
                    found=", ".join(f"{t.dtype} {show_shape(t.shape)}" for t in outs),
                    needed=", ".join(map(str, inferred)),
                )
                return
            op.setup(param, descs, inferred, chip)
    except AtbError as error:
        yield Diagnostic(
            code="E402",
            message=f"'{node.name}' ({node.op} on {chip}): {error.code}: {error.message}",
            place=node.place,
            found=error.found,
            needed=error.expected,
        )


def _plain(desc: Desc) -> tuple:
    return desc.dtype, desc.format, tuple(desc.shape)


def host_or_device(graph: AtbGraph, chip: str) -> Iterator[Diagnostic]:
    """torch_atb gives a tensor host data or device data, never both (atb-operations.md 2.1)."""
    host: dict[str, AtbNode] = {}
    device: dict[str, AtbNode] = {}
    for node in graph.nodes:
        op = ATB[node.op]
        on_host = op.host(op.param(node.param), chip)
        for i, name in enumerate(node.ins):
            (host if i in on_host else device).setdefault(name, node)
    for name in host.keys() & device.keys():
        yield Diagnostic(
            code="E402",
            message=f"'{name}' is read on the host by '{host[name].name}' and on the device by '{device[name].name}'",
            place=host[name].place,
        )
    for name in host:
        if not graph.tensors[name].host:
            yield Diagnostic(code="E900", message=f"'{name}' is read on the host but not declared so")


def sums_are_made_once(graph: AtbGraph) -> Iterator[Diagnostic]:
    """The letters of the ATB graph: partial sums go to an AllReduce or stay partial sums; a product over a split axis
    is one; what is summed over the ranks was partial."""
    for node in graph.nodes:
        ins, outs = ([graph.tensors[name].shard for name in names] for names in (node.ins, node.outs))
        made, read = PARTIAL in outs, PARTIAL in ins
        if node.op == "Linear":
            expected = ins[1].letter == "S" and ins[1].axis == 1
            fine = made == expected and ins[0] != PARTIAL
        elif node.op == "AllReduce":
            fine = read and not made
        elif node.op == "LinearParallel":
            fine = (ins[1].letter, ins[1].axis) == ("S", 1) and not read and not made
        else:
            fine = read == made
        if not fine:
            letters = f"{', '.join(map(str, ins))} -> {', '.join(map(str, outs))}"
            yield Diagnostic(
                code="E900", message=f"'{node.name}' ({node.op}) sums over the ranks wrongly", place=node.place,
                found=letters,
            )  # fmt: skip


def verify_segments(segments: Sequence[Segment], chip: str) -> None:
    """Each segment keeps libatb's limits and is still accepted; everything a segment reads was made or is an input."""
    found = []
    made: set[str] = set()
    for part in segments:
        for kind, n in part.counts.items():
            if n > GRAPH_LIMITS[kind]:
                found.append(Diagnostic(code="E403", message=f"a segment has {n} {kind}, at most {GRAPH_LIMITS[kind]}"))
        for name in part.inputs:
            if name in part.ends and part.ends[name].role == "internal" and name not in made:
                found.append(Diagnostic(code="E900", message=f"a segment reads '{name}' before it is made"))
        made.update(part.outputs)
        found.extend(places_hold_one_value(part))
    _raise(found)


def places_hold_one_value(part: Segment) -> Iterator[Diagnostic]:
    """Values that share a name of the graph are of one size, and none is read after another was written there."""
    graph, places = part.short, part.places
    holds: dict[str, str] = {}
    for node in graph.nodes:
        for name in node.ins:
            if name in places and holds.get(places[name]) != name:
                yield Diagnostic(
                    code="E900", message=f"'{node.name}' reads '{name}', and '{places[name]}' holds another value",
                    place=node.place,
                )  # fmt: skip
        read = {places.get(name) for name in node.ins}
        for name in node.outs:
            if name not in places:
                continue
            before = holds.get(places[name], name)
            same = graph.tensors[before].form == graph.tensors[name].form
            if before != name and (places[name] in read or not same):
                yield Diagnostic(
                    code="E900", message=f"'{node.name}' writes '{name}' where '{before}' lies", place=node.place
                )
            holds[places[name]] = name


def _raise(found: Sequence[Diagnostic]) -> None:
    if found:
        raise DiagnosticError(found)
