"""No module imports, by whatever way, a module that imports it: imports inside functions and for types count."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    files = [path for top in ("compiler", "runtime") for path in (ROOT / top).rglob("*.py")]
    names = [".".join(("llmc", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def test_no_imports_in_circles():
    known = modules()
    graph = nx.DiGraph((name, other) for name, path in known.items() for other in imported(path, known) - {name})
    assert graph.number_of_edges() > 300
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []
