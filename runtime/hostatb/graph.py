"""`GraphBuilder`: named nodes in execution order become one Operation, with libatb's graph rules.

    graph = hostatb.GraphBuilder("layer")
    graph.set_input_output(["x", "gamma", "w"], ["y"])
    graph.add_operation(hostatb.Operation(norm_param), ["x", "gamma"], ["n"])      # "n" becomes an internal
    graph.add_operation(hostatb.Operation(linear_param), ["n", "w"], ["y"])
    layer = graph.build()
    y, = layer.forward([x, gamma, w])

Naming a value that exists already in `out_names` writes it in place; for a graph input that is the caller's tensor.

Execution: for each tuple of input descs a list of `Step`s is planned once (reshape callbacks, checks, lifetimes), then
each call only runs the kernels. `rewrites.py` replaces steps by faster ones that give the same numbers.
Sources: atb-operations.md 1.2 to 1.4 and 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from llmc.compiler.atb.core import GRAPH_LIMITS, MAX_NODES_AT_CREATE, AtbError, Desc, check_tensors
from llmc.runtime.hostatb.operation import Core, Operation, Plan, Single, current_chip
from llmc.runtime.hostatb.rewrites import rewrite
from llmc.runtime.hostatb.step import Step
from llmc.runtime.hostatb.straight import straight_line
from llmc.runtime.hostatb.watch import clock_of, is_watched, tell

ReshapeFunc = Callable[[list[int]], Sequence[int]]
Compiler = Callable[..., Callable[[Sequence[Tensor]], list[Tensor]] | None]  # as `straight_line`, where it can


@dataclass(frozen=True, kw_only=True)
class View:
    """A name made by `reshape`: the source it looks at and the function from its shape to the view's."""

    source: str
    function: ReshapeFunc


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node: slots it reads (with the reshape functions to apply, innermost first) and slots it writes."""

    core: Core
    label: str
    in_names: tuple[str, ...]
    out_names: tuple[str, ...]
    inputs: tuple[int, ...]
    reshapes: tuple[tuple[ReshapeFunc, ...], ...]
    outputs: tuple[int, ...]


class GraphOperation:
    """A built graph. Slots are libatb's tensor ids: inputs, then outputs, then internals."""

    def __init__(self, name: str, names: Sequence[str], n_in: int, n_out: int, nodes: Sequence[Node]) -> None:
        self.name, self.names, self.nodes = name or "GraphOperation", tuple(names), tuple(nodes)
        self.input_num, self.output_num = n_in, n_out
        self.input_names = self.names[:n_in]
        self._labelled = {node.label: node for node in nodes}
        self.compiler: Compiler | None = None  # tried before lines; whoever wants it fills it in
        self.places: Mapping[str, str] = {}  # value name -> place in the user's source; whoever knows it fills it in
        self.chip = nodes[0].core.chip if nodes else current_chip()
        self.in_place: Mapping[int, int] = MappingProxyType({})
        self.host, self.device = _sides(self)
        self.empty = frozenset(
            slot for node in nodes for i, slot in enumerate(node.inputs) if slot < n_in and i in node.core.empty
        )
        self.writes = frozenset(
            slot
            for node in nodes
            for slot in (*node.outputs, *(node.inputs[i] for i in node.core.writes))
            if slot < n_in
        )

    def infer(self, ins: Sequence[Desc]) -> list[Desc]:
        """InferShape alone: the walk in node order."""
        descs = self._start(ins)
        for node in self.nodes:
            try:
                seen = [self._viewed(node, i, descs) for i in range(len(node.inputs))]
                outs = node.core.infer(seen)
            except AtbError as error:
                raise self._locate(error, node) from None
            descs.update(zip(node.outputs, outs, strict=True))
        return [descs[self.input_num + i] for i in range(self.output_num)]

    def plan(self, ins: Sequence[Desc]) -> Plan:
        """All checks and the list of steps for these input descs, the faster ones where `rewrites` knows one."""
        steps = tuple(self.steps(ins))
        first, last = self.input_num, self.input_num + self.output_num
        outs: dict[int, Desc] = {}
        for step in steps:
            outs.update(zip(step.outputs, step.outs, strict=True))
        ends: Any = {"inputs": self.input_num, "outputs": self.output_num, "located": self._refused}
        made: dict[bool, Sequence[Step]] = {}
        runs: dict[tuple[bool, bool], Callable[[Sequence[Tensor]], list[Tensor]]] = {}
        shows = next((i for i in sorted(self.device) if ins[i].elements), None)  # all tensors of the device lie on it

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            on_cpu = shows is None or tensors[shows].is_cpu
            way = on_cpu, is_watched()
            if way not in runs:
                if on_cpu not in made:  # what rewrites know is measured on CPUs; CUDA tensors take the plain kernels
                    made[on_cpu] = rewrite(steps) if on_cpu else steps
                compiled = self.compiler(steps, **ends) if self.compiler and on_cpu and not is_watched() else None
                clock, stopped = clock_of(on_cpu) if is_watched() else None, partial(tell, self.name, made[on_cpu])
                runs[way] = compiled or straight_line(made[on_cpu], **ends, clock=clock, stopped=stopped)
            return runs[way](tensors)

        return Plan(outs=tuple(outs[i] for i in range(first, last)), run=run)

    def _refused(self, step: Step, error: AtbError) -> AtbError:
        """A refusal while running, with its place; a step that a rewrite made has no node."""
        node = self._labelled.get(step.label)
        return (self._locate(error, node) if node else error).at(stage="execute", graph=self.name)

    def steps(self, ins: Sequence[Desc]) -> Sequence[Step]:
        """The nodes bound to descs, before rewriting. Raises AtbError for whatever InferShape or Setup would refuse."""
        if len(self.nodes) > GRAPH_LIMITS["nodes"]:
            raise AtbError(
                "ERROR_OUT_OF_HOST_MEMORY", "Setup takes at most 256 nodes in one graph level",
                found=f"{len(self.nodes)} nodes", expected="256; cut the graph, or nest graphs",
            ).at(stage="setup", graph=self.name)  # fmt: skip
        descs, steps = self._start(ins), []
        dead = self._dead_after()
        for k, node in enumerate(self.nodes):
            try:
                seen = tuple(self._viewed(node, i, descs) for i in range(len(node.inputs)))
                plan = _leaf_plan(node.core, seen)
                self._check_overwrites(node, plan.outs, descs)
            except AtbError as error:
                raise self._locate(error, node) from None
            fills = {index: out for out, index in node.core.in_place.items()}
            steps.append(
                Step(
                    core=node.core,
                    label=node.label,
                    run=plan.run,
                    ins=seen,
                    outs=plan.outs,
                    inputs=node.inputs,
                    views=tuple(
                        None if desc.shape == descs[slot].shape else desc.shape
                        for slot, desc in zip(node.inputs, seen, strict=True)
                    ),
                    outputs=node.outputs,
                    stores=tuple(
                        slot < self.input_num and out not in fills.values() for out, slot in enumerate(node.outputs)
                    ),
                    fills=fills,
                    frees=dead[k],
                    nodes=(k,),
                )
            )
            descs.update(zip(node.outputs, plan.outs, strict=True))
        return steps

    def _dead_after(self) -> Sequence[tuple[int, ...]]:
        """Per node the internals whose value nobody reads behind it: their names may come again for other values."""
        first, read, dead = self.input_num + self.output_num, set[int](), []
        for node in reversed(self.nodes):
            touched = dict.fromkeys((*node.inputs, *node.outputs))
            dead.append(tuple(slot for slot in touched if slot >= first and slot not in read))
            read.difference_update(slot for out, slot in enumerate(node.outputs) if out not in node.core.in_place)
            read.update(node.inputs)
            read.update(slot for out, slot in enumerate(node.outputs) if out in node.core.in_place)
        return dead[::-1]

    def _start(self, ins: Sequence[Desc]) -> dict[int, Desc]:
        try:
            check_tensors(ins, self.empty)
        except AtbError as error:
            error.tensor = self._named(error.tensor, self.input_names)
            raise error.at(stage="infer", graph=self.name) from None
        return dict(enumerate(ins))

    def _viewed(self, node: Node, index: int, descs: Mapping[int, Desc]) -> Desc:
        desc = descs[node.inputs[index]]
        for function in node.reshapes[index]:
            old = list(desc.shape)
            new = function(old[:])
            if not isinstance(new, (list, tuple)) or not all(isinstance(dim, int) for dim in new):
                raise AtbError("ERROR_GRAPH_NODE_RESHAPE_FUNC_FAIL", "a reshape function must return a list of int",
                               found=repr(new), tensor=f"input {index}", stage="infer")  # fmt: skip
            view = desc.with_shape(new)
            if view.elements != desc.elements:
                raise AtbError("ERROR_GRAPH_NODE_RESHAPE_FUNC_FAIL", "a reshape changes the number of elements",
                               found=f"{old} to {list(new)}", tensor=f"input {index}", stage="infer")  # fmt: skip
            desc = view
        return desc

    def _check_overwrites(self, node: Node, outs: Sequence[Desc], descs: Mapping[int, Desc]) -> None:
        """libatb writes over whatever memory is there and compares nothing (reference 1.3): differences are refused."""
        for index, (slot, new) in enumerate(zip(node.outputs, outs, strict=True)):
            old = descs.get(slot)
            if old and (old.dtype, old.format, old.elements) != (new.dtype, new.format, new.elements):
                raise AtbError(
                    "ERROR_INVALID_TENSOR_SIZE",
                    "an in-place write of another dtype, format or size; libatb would not notice it",
                    found=str(new), expected=str(old), tensor=f"output {index}", stage="setup",
                )  # fmt: skip

    def _locate(self, error: AtbError, node: Node) -> AtbError:
        """Name the graph, the node, the value and the place in an error that came from a node of this graph."""
        if error.graph:  # a nested graph has said it
            return error
        named = self._named(error.tensor, node.in_names, node.out_names)
        error.operation = node.label
        error.tensor = named
        value = named.partition(" ")[0]
        places = (self.places.get(name, "") for name in (value, *node.out_names))
        return error.at(graph=self.name, place=next((place for place in places if place), ""))

    @staticmethod
    def _named(tensor: str, in_names: Sequence[str], out_names: Sequence[str] = ()) -> str:
        match = re.fullmatch(r"(input|output|tensor) (\d+)", tensor)
        names = {"input": in_names, "output": out_names, "tensor": [*in_names, *out_names]}
        if match and int(match[2]) < len(names[match[1]]):
            return f"{names[match[1]][int(match[2])]} ({tensor})"
        return tensor


def _leaf_plan(core: Core, ins: Sequence[Desc]) -> Plan:
    """As `core.plan`, but a single operation gets its kernel bare: the graph itself decides where outputs lie."""
    if not isinstance(core, Single):
        return core.plan(ins)
    outs = core.check(ins)
    kernel, param, descs, chip = core.kernel, core.param, tuple(ins), core.chip
    return Plan(outs=outs, run=lambda tensors: kernel(param, tensors, descs, chip))


def _sides(graph: GraphOperation) -> tuple[frozenset[int], frozenset[int]]:
    """Which graph inputs are read on the host and which on the device; torch_atb gives each tensor one side only."""
    host: dict[int, Node] = {}
    device: dict[int, Node] = {}
    for node in graph.nodes:
        for index, slot in enumerate(node.inputs):
            if index in node.core.host:
                if slot >= graph.input_num:
                    raise AtbError(
                        "ERROR_INVALID_TENSOR_ADDR", "tensor.hostData is null: this value is computed on the device",
                        tensor=graph.names[slot], expected="a graph input that is a CPU tensor",
                    ).at(stage="create", operation=node.label, graph=graph.name)  # fmt: skip
                host.setdefault(slot, node)
            elif index in node.core.device:
                device.setdefault(slot, node)
    for slot in sorted(host.keys() & device.keys()):
        raise AtbError(
            "ERROR_INVALID_TENSOR_ADDR",
            "one input is read on the host and on the device, but torch_atb gives a tensor only one side",
            tensor=graph.names[slot], found=f"host: {host[slot].label}; device: {device[slot].label}",
            expected="two inputs, a CPU tensor for the first and an NPU tensor for the second",
        ).at(stage="create", graph=graph.name)  # fmt: skip
    return frozenset(host), frozenset(slot for slot in device if slot < graph.input_num)


class GraphBuilder:
    """torch_atb.GraphBuilder. All methods but `build` return the builder."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inputs: list[str] = []
        self._outputs: list[str] = []
        self._views: dict[str, View] = {}
        self._nodes: list[tuple[Core, list[str], list[str]]] = []
        self._built = False

    def set_input_output(self, in_names: Sequence[str], out_names: Sequence[str]) -> GraphBuilder:
        self._inputs, self._outputs = _name_list("in_names", in_names), _name_list("out_names", out_names)
        names = [*self._inputs, *self._outputs]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise self._error("a name is declared twice among inputs and outputs", tensor=", ".join(twice))
        return self

    def reshape(self, src_name: str, function: ReshapeFunc, new_name: str) -> GraphBuilder:
        """`new_name` becomes a view of `src_name` with the shape that `function(old shape)` gives."""
        if not callable(function):
            raise TypeError(f"reshape: the function must be callable, found {type(function).__name__}")
        if new_name in self._views or new_name in self._inputs or new_name in self._outputs or new_name == src_name:
            raise self._error("a view needs a name of its own", tensor=new_name)
        self._views[new_name] = View(source=src_name, function=function)
        return self

    def add_operation(self, operation: Operation, in_names: Sequence[str], out_names: Sequence[str]) -> GraphBuilder:
        """Append a node; the operation is moved into the graph and its wrapper is empty afterwards."""
        if not isinstance(operation, Operation):
            raise TypeError(f"add_operation needs an Operation, found {type(operation).__name__}")
        self._nodes.append((operation.take(), _name_list("in_names", in_names), _name_list("out_names", out_names)))
        return self

    def build(self) -> Operation:
        """Check the graph (reference 1.2) and give the operation that runs it."""
        if self._built:
            raise self._error("this builder was built already; make a new GraphBuilder")
        if not re.fullmatch(r"[A-Za-z0-9_]{0,128}", self._name):
            raise self._error("a graph's name has letters, digits and _, at most 128", found=repr(self._name))
        slots = self._slots()
        self._check_limits(slots)
        valued = set(range(len(self._inputs)))
        nodes = []
        for number, (core, ins, outs) in enumerate(self._nodes):
            node = self._node(number, core, ins, outs, slots)
            for index, slot in enumerate(node.inputs):
                if slot not in valued:
                    raise self._error("a node reads a value that no node before it produces", tensor=ins[index],
                                      operation=node.label)  # fmt: skip
            valued.update(node.outputs)
            nodes.append(node)
        if missing := [name for name, slot in slots.items() if slot not in valued]:
            raise self._error("no node produces this value", tensor=", ".join(missing))
        if len(chips := {node.core.chip for node in nodes}) > 1:
            raise self._error("the operations of a graph belong to one chip", found=", ".join(sorted(chips)))
        self._built = True
        return Operation.of(GraphOperation(self._name, list(slots), len(self._inputs), len(self._outputs), nodes))

    def _slots(self) -> dict[str, int]:
        """Name -> tensor id. Unknown names become internals at first use, as input too."""
        slots = {name: index for index, name in enumerate([*self._inputs, *self._outputs])}
        for _, ins, outs in self._nodes:
            for name in (*ins, *outs):
                slots.setdefault(self._source(name), len(slots))
        return slots

    def _source(self, name: str) -> str:
        """The tensor behind a name. Look-up order: inputs, outputs, views, internals."""
        seen = set()
        while name in self._views and name not in self._inputs and name not in self._outputs:
            if name in seen:
                raise self._error("views that look at each other", tensor=name)
            seen.add(name)
            name = self._views[name].source
        return name

    def _functions(self, name: str) -> tuple[ReshapeFunc, ...]:
        functions = []
        while name in self._views and name not in self._inputs and name not in self._outputs:
            functions.append(self._views[name].function)
            name = self._views[name].source
        return tuple(reversed(functions))

    def _node(self, number: int, core: Core, ins: list[str], outs: list[str], slots: Mapping[str, int]) -> Node:
        label = f"{core.name} (node {number}: {', '.join(ins)} -> {', '.join(outs)})"
        for kind, names, expected in (("inputs", ins, core.input_num), ("outputs", outs, core.output_num)):
            if len(names) != expected:
                raise self._error(f"a node has the wrong number of {kind}", operation=label,
                                  found=str(len(names)), expected=str(expected))  # fmt: skip
        outputs = tuple(slots[self._source(name)] for name in outs)
        if len(set(outputs)) < len(outputs):
            raise self._error("a node names one value for two of its outputs", operation=label)
        return Node(
            core=core,
            label=label,
            in_names=tuple(ins),
            out_names=tuple(outs),
            inputs=tuple(slots[self._source(name)] for name in ins),
            reshapes=tuple(self._functions(name) for name in ins),
            outputs=outputs,
        )

    def _check_limits(self, slots: Mapping[str, int]) -> None:
        internals = len(slots) - len(self._inputs) - len(self._outputs)
        counts = {"inputs": len(self._inputs), "outputs": len(self._outputs), "internals": internals}
        for kind, count in counts.items():
            if count > GRAPH_LIMITS[kind]:
                raise self._error(f"too many {kind} in one graph", found=str(count), expected=str(GRAPH_LIMITS[kind]))
        if len(self._nodes) > MAX_NODES_AT_CREATE:
            raise self._error("too many nodes in one graph", found=str(len(self._nodes)),
                              expected=str(MAX_NODES_AT_CREATE))  # fmt: skip

    def _error(self, message: str, *, operation: str = "", **more: str) -> AtbError:
        return AtbError("ERROR_INVALID_GRAPH", message, stage="create", **more).at(
            graph=self._name or "GraphOperation", operation=operation
        )


def _name_list(what: str, names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be a list of str, found {names!r}")
    return list(names)
