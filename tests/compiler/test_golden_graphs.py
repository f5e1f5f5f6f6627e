"""The lowered graphs of every catalogue model at world size 2, as text: a change of the compiler shows in review.

`golden/NAME.txt` has both attentions and phases of the model on atlas-800i-a2 as one rank sees them, equal layers once.
After an intended change, write the files anew and read their diff:

    LLMC_WRITE_GOLDEN=1 pytest tests/compiler/test_golden_graphs.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.ir import AtbGraph
from llmc.compiler.language.source import catalogue
from llmc.compiler.layers import groups_of
from llmc.compiler.listing import collapse, operations, show_tensor
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model

GOLDEN = Path(__file__).parent / "golden"
WRITE = bool(os.environ.get("LLMC_WRITE_GOLDEN"))


@pytest.mark.parametrize("name", catalogue())
def test_the_lowered_graph_at_world_size_2_is_the_golden_text(name):
    text = golden(name)
    path = GOLDEN / f"{name}.txt"
    if WRITE:
        path.write_text(text, encoding="utf-8")
        pytest.skip(f"wrote {path.name}")
    assert text == path.read_text(encoding="utf-8"), "after an intended change: see the top of this file"


def test_every_golden_text_belongs_to_a_model_of_the_catalogue():
    assert {path.stem for path in GOLDEN.iterdir()} == set(catalogue())


def golden(name: str) -> str:
    lines = []
    for attention in ("paged", "flash"):
        options = Options(world_size=2, attention=attention, allow_unsupported=True)
        lowered = compile_model(name, options).lowered
        lines += [f"== {attention}: what one rank is given", *input_lines(lowered), ""]
        for phase, graph in lowered.items():
            lines += [f"== {attention} {phase}", *operation_lines(graph), ""]
    return "\n".join(lines)


def input_lines(lowered: Mapping[str, AtbGraph]) -> Iterator[str]:
    """Of both phases; an input of both is shown as prefill has it."""
    tensors = {name: graph.tensors[name] for graph in reversed(lowered.values()) for name in graph.inputs}
    order = dict.fromkeys(name for graph in lowered.values() for name in graph.inputs)
    for entry in collapse((name, {"role": tensors[name].role, "type": show_tensor(tensors[name])}) for name in order):
        yield f"{labelled(entry)}: {entry['role']} {entry['type']}"


def operation_lines(graph: AtbGraph) -> Iterator[str]:
    """`name [layers]: operation parameters: inputs -> outputs`; names in a layer without `layers.N.`"""
    for entry in operations(groups_of(graph)):
        ins = [f"{name} as {entry['views'][str(i)]}" if str(i) in entry["views"] else name
               for i, name in enumerate(entry["ins"])]  # fmt: skip
        outs = [f"{name} {kind}" for name, kind in entry["outs"]]
        param = "".join(f" {key}={value}" for key, value in entry["param"].items())
        yield short(f"{labelled(entry)}: {entry['op']}{param}: {', '.join(ins)} -> {', '.join(outs)}")


def labelled(entry: Mapping[str, Any]) -> str:
    """`attn.o.weight [0-31]`, by the layers that a line stands for."""
    return short(f"{entry['name']} [{entry['layers']}]" if entry["layers"] else entry["name"])


def short(line: str) -> str:
    return line.replace("layers.{i}.", "").replace("layers.{i-1}.", "{i-1}.")
