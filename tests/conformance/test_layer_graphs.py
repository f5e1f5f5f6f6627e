"""Decoder-layer graphs that the vendor's host library accepted: parameters, inferred descs and whole graphs agree.

The format of the files is described in the READMEs of the two data folders. The second collection has operations that
the table lacks; they are counted at the end of the run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from vendor_cases import DTYPES, LAYERS, LAYERS2

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import Desc, Param
from llmc.runtime.hostatb.graph import GraphBuilder
from llmc.runtime.hostatb.operation import Operation, Single

NOT_GRAPHS = ("refusals.json", "masks.json", "segments.json", "head-dims.json")
FILES = sorted(path for folder in (LAYERS, LAYERS2) for path in folder.glob("*.json") if path.name not in NOT_GRAPHS)


def _group(path: Path) -> str:
    """ "910b-paged", and "910b-paged second" in the second collection."""
    return "-".join(path.name.split("-")[:2]) + (" second" if path.parent == LAYERS2 else "")


GROUPS = sorted({_group(path) for path in FILES})
PRINTED_NAMES = {"local_expert_nums": "localExpertNums"}  # as the library prints them
UNSET = (None, 0)  # hcclComm: a null pointer prints as 0


def _graphs(group: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in FILES:
        if _group(path) == group:
            yield path, json.loads(path.read_text(encoding="utf-8"))


def _modelled(graph: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(number, node) for number, node in enumerate(graph["nodes"]) if node["op"] in OPS]


def _chip(graph: Mapping[str, Any]) -> str:
    return "Ascend910B" if graph["soc"].startswith("Ascend910B") else "Ascend310P"


def _desc(dtype: str, format: str, shape: list[int]) -> Desc:
    return Desc(dtype=DTYPES.get(dtype, dtype), format=format, shape=tuple(shape))


def _values(param: Param) -> dict[str, Any]:
    """All leaves by their own name: LinearParallel prints nested structs flat."""
    found: dict[str, Any] = {}
    for name, value in vars(param).items():
        found.update(_values(value) if isinstance(value, Param) else {name: value})
        found[name] = value
    return found


def _differences(printed: Mapping[str, Any], ours: Param) -> list[str]:
    values = _values(ours)
    texts = []
    for printed_name, theirs in printed.items():
        name = PRINTED_NAMES.get(printed_name, printed_name)
        mine = values.get(name, "missing")
        if isinstance(theirs, Mapping):
            texts += [f"{name}.{text}" for text in _differences(theirs, mine)]
        elif isinstance(theirs, float) and isinstance(mine, (int, float)):
            texts += [] if math.isclose(theirs, mine, rel_tol=1e-6) else [f"{name}: {mine} instead of {theirs}"]
        elif list(mine) != theirs if isinstance(theirs, list) else mine != theirs and {mine, theirs} != set(UNSET):
            texts.append(f"{name}: {mine} instead of {theirs}")
    return texts


@pytest.mark.skipif(not FILES, reason=f"no layer graphs in {LAYERS}; set LLMC_ATB_LAYERS")
@pytest.mark.parametrize("group", GROUPS)
def test_parameters_hold_what_the_library_holds(group: str) -> None:
    wrong = []
    for path, graph in _graphs(group):
        for number, node in _modelled(graph):
            param = OPS[node["op"]].param(node["param"])
            wrong += [f"{path.name} node {number} {node['op']}: {text}"
                      for text in _differences(node.get("effective_param", {}), param)]  # fmt: skip
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.skipif(not FILES, reason=f"no layer graphs in {LAYERS}; set LLMC_ATB_LAYERS")
@pytest.mark.parametrize("group", GROUPS)
def test_whole_graphs_are_accepted_with_the_librarys_descs(
    group: str, record_property: Callable[[str, object], None]
) -> None:
    """Nodes one by one, then the graph: build, InferShape and Setup."""
    ops = Counter(node["op"] for _, graph in _graphs(group) for node in graph["nodes"])
    record_property("layer nodes", dict(ops))
    for path, graph in _graphs(group):
        chip, modelled = _chip(graph), _modelled(graph)
        for number, node in modelled:
            single = Single(OPS[node["op"]], OPS[node["op"]].param(node["param"]), chip)
            outs = single.check([_desc(*desc) for desc in node["in_desc"]])
            assert list(outs) == [_desc(*desc) for desc in node["out_desc"]], f"{path.name} node {number} {node['op']}"
        if len(modelled) < len(graph["nodes"]):
            continue
        operation, descs = _built(graph, chip)
        outs = list(operation.core.plan(descs).outs)
        expected = [_desc(d["dtype"], d["format"], d["shape"]) for d in graph["graph_out"].values()]
        assert outs == expected, path.name


def _built(graph: Mapping[str, Any], chip: str) -> tuple[Operation, list[Desc]]:
    """The graph through GraphBuilder. A CPU tensor has host data only, so Rope gets its own copy of the lengths."""
    inputs = {name: _desc(d["dtype"], d["format"], d["shape"]) for name, d in graph["inputs"].items()}
    builder = GraphBuilder("layer")
    nodes = []
    for number, node in enumerate(graph["nodes"]):
        ins = list(node["in"])
        if node["op"] == "Rope" and ins[4] in inputs:
            inputs.setdefault(f"{ins[4]}_of_rope", inputs[ins[4]])
            ins[4] = f"{ins[4]}_of_rope"
        nodes.append((number, node, ins))
    builder.set_input_output(list(inputs), list(graph["outputs"]))
    for number, node, ins in nodes:
        for index, shape in node.get("reshape", {}).items():
            view = f"{ins[int(index)]}_view{number}_{index}"
            builder.reshape(ins[int(index)], lambda old, shape=shape: list(shape), view)
            ins[int(index)] = view
        single = Single(OPS[node["op"]], OPS[node["op"]].param(node["param"]), chip)
        builder.add_operation(Operation.of(single), ins, node["out"])
    return builder.build(), list(inputs.values())
