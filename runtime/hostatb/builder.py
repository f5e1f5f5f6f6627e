"""`Builder`: torch_atb's newer style, in which nodes name their own outputs.

    builder = hostatb.Builder("mlp")
    x, w = builder.add_input("x"), builder.add_input("w")
    node = builder.add_node([x, w], hostatb.LinearParam(has_bias=False))
    builder.mark_output(node.get_output(0))
    mlp = builder.build()

It cannot express in-place writes. Source: atb-operations.md 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmc.compiler.atb.core import AtbError
from llmc.runtime.hostatb.graph import GraphBuilder, ReshapeFunc
from llmc.runtime.hostatb.operation import Operation

# Bound as parameter classes, but add_node has no overload for them: wrap them in an Operation first.
WITHOUT_OVERLOAD = ("PagedAttentionParam", "FaUpdateParam")


@dataclass
class Node:
    """What `add_node` gives. As in torch_atb it is a copy: the graph does not see changes to it."""

    inTensorIds: list[str]  # torch_atb's spelling
    outTensorIds: list[str]  # torch_atb's spelling
    operation: str
    stream_id: int = 0

    def get_output(self, index: int) -> str:
        return self.outTensorIds[index]

    def set_stream_id(self, stream_id: int) -> None:
        self.stream_id = stream_id

    def get_stream_id(self) -> int:
        return self.stream_id


class Builder:
    """torch_atb.Builder. Streams are accepted and ignored: PyTorch runs the nodes one after the other."""

    def __init__(self, name: str) -> None:
        self._graph = GraphBuilder(name)
        self._inputs: list[str] = []
        self._outputs: list[str] = []
        self._made: set[str] = set()
        self._nodes = 0

    def add_input(self, name: str) -> str:
        self._inputs.append(name)
        return name

    def add_node(self, inputs: Sequence[str], operation: Any) -> Node:
        """Append a node for an Operation or a parameter object; its outputs get names of their own."""
        if type(operation).__name__ in WITHOUT_OVERLOAD:
            raise TypeError(f"add_node takes no {type(operation).__name__}; wrap it in an Operation")
        made = operation if isinstance(operation, Operation) else Operation(operation)
        name = made.name
        outputs = [f"node{self._nodes}_outTensor{i}_{name}" for i in range(made.output_num)]
        self._nodes += 1
        self._made.update(outputs)
        self._graph.add_operation(made, inputs, outputs)
        return Node(list(inputs), outputs, name)

    def reshape(self, src_name: str, function: ReshapeFunc, new_name: str) -> Builder:
        """`new_name` becomes a view of `src_name`."""
        self._graph.reshape(src_name, function, new_name)
        return self

    def mark_output(self, name: str) -> None:
        if name not in self._made:
            raise AtbError("ERROR_INVALID_GRAPH", "only an output of a node can be marked", tensor=name, stage="create")
        self._outputs.append(name)

    def set_execute_streams(self, streams: Sequence[int]) -> None:
        """Accepted for code that is written for an NPU."""

    def build(self) -> Operation:
        return self._graph.set_input_output(self._inputs, self._outputs).build()
