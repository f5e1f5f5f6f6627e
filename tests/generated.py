"""Runs generated modules without an ATB: `build` gets a stand-in that writes down what it is told.

(graph, ...) = recorded(files_of(compiled)["decode.py"])
graph.nodes[3].param        # ("LinearParam", {"has_bias": False})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    param: tuple[str, dict[str, Any]]  # class, keyword arguments; nested structs alike
    ins: list[str]
    outs: list[str]


@dataclass
class Recorded:
    """What a GraphBuilder was told. `views`: name of the view -> source, and the function from shape to shape."""

    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    views: dict[str, tuple[str, Callable]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def set_input_output(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.inputs, self.outputs = list(inputs), list(outputs)

    def reshape(self, source: str, function: Callable, view: str) -> None:
        assert view not in self.views, f"two views are called {view}"
        self.views[view] = (source, function)

    def add_operation(self, operation: tuple[str, dict[str, Any]], ins: Sequence[str], outs: Sequence[str]) -> None:
        self.nodes.append(Node(operation, list(ins), list(outs)))

    def build(self) -> Recorded:
        return self

    def values(self) -> list[tuple[tuple[str, dict[str, Any]], list[Any], list[str]]]:
        """The nodes with values for names: a name that is written anew is another value, `%n` in order of making; a
        view is (value, the shape that it makes of [a, b, c, d])."""
        known = {name: name for name in self.inputs}
        made = 0
        found = []
        for node in self.nodes:
            ins: list[Any] = []
            for name in node.ins:
                source, function = self.views.get(name, (name, None))
                ins.append((known[source], function(list("abcd"))) if function else known[source])
            for name in node.outs:
                if name not in self.inputs:
                    known[name], made = f"%{made}", made + 1
            found.append((node.param, ins, [known[name] for name in node.outs]))
        return found


class _Words:
    """`atb.RmsNormParam.RmsNormType.RMS_NORM_NORM` as its last word; called, a class with its arguments."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> _Words:
        return _Words(f"{self.path}.{name}")

    def __call__(self, **arguments: Any) -> tuple[str, dict[str, Any]]:
        plain = {key: str(v) if isinstance(v, _Words) else v for key, v in arguments.items()}
        return self.path.removeprefix("."), plain

    def __str__(self) -> str:
        return self.path.rpartition(".")[2]


class _Atb(_Words):
    GraphBuilder = Recorded

    @staticmethod
    def Operation(param: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return param


def recorded(text: str, **build: Any) -> list[Recorded]:
    """The graphs that a generated module builds."""
    module: dict[str, Any] = {}
    exec(compile(text, "<generated>", "exec"), module)
    return module["build"](_Atb(""), **build)
