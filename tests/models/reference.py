"""What the operators of the language mean, in float64 and a line or two each; independent of compiler and hostatb."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmc.compiler.ir import Graph, Node


def random_weights(graph: Graph, seed: int) -> dict[str, Tensor]:
    """float64 values that float32 holds exactly, so that both sides start from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(w.type.shape, generator=generator) / w.type.shape[-1] ** 0.5).float().double()
        for name, w in graph.weights.items()
    }


def evaluate(graph: Graph, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the model graph by name. `last` rows are those of one sequence of all tokens."""
    values = dict(inputs)
    for node in graph.nodes:
        args = {slot: values[value] for slot, value in node.inputs.items()}
        args |= {slot: weights[w.name] for slot, w in node.weights.items()}
        results = OPERATORS[node.op](node, **args)
        values.update(zip(node.values, results if isinstance(results, tuple) else (results,), strict=True))
    return {name: values[value] for name, value in graph.outputs.items()}


def rms_norm(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + node.attrs["eps"]) * weight


def add_rms_norm(node: Node, a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(node, a + b, weight), a + b


def linear(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.T + (0 if bias is None else bias)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


OPERATORS = {
    "embedding": lambda node, ids, weight: weight[ids],
    "last_token": lambda node, x: x[-1:],
    "linear": linear,
    "split": lambda node, x: torch.split(x, list(node.attrs["sizes"]), -1),
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "add": lambda node, a, b: a + b,
    "mul": lambda node, a, b: a * b,
    "silu": lambda node, x: silu(x),
    "swiglu": lambda node, x: silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :],
    "cast": lambda node, x: x,
}
