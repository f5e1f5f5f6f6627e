"""What is offered over several ranks, how every edge lies over them, and what is refused with which words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.ir import Graph
from llmc.compiler.language.build import load_model
from llmc.compiler.language.source import catalogue
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model

MATRIX = Path(os.environ.get("LLMC_FEATURE_MATRIX", Path(__file__).parents[2] / "../shared/data/feature-matrix.yaml"))
GIVEN = pytest.mark.skipif(not MATRIX.is_file(), reason=f"no feature matrix at {MATRIX} (set LLMC_FEATURE_MATRIX)")
DEVICE = "atlas-800i-a2"
HOST_SIZES = range(1, 9)  # a host has 8 devices


# The feature matrix ---------------------------------------------------------------------------------------------------


def matrix() -> dict[str, Any]:
    return yaml.safe_load(MATRIX.read_text()) if MATRIX.is_file() else {"models": {}, "goal_common": {"dtypes": {}}}


def sizes() -> list[tuple[str, int]]:
    """Every model with every world size of the matrix."""
    return [(name, size) for name, model in matrix()["models"].items() for size in model["seed"][DEVICE]]


def kinds() -> list[tuple[str, str]]:
    """Every attention with its dtypes: the goal, which holds all that the seed had."""
    dtypes: Mapping[str, list[str]] = matrix()["goal_common"]["dtypes"]
    return [(name.removesuffix("_attention"), dtype) for name, found in dtypes.items() for dtype in found]


def two_layers(name: str, folder: Path) -> str:
    """A model of the catalogue without its equal layers: what one layer may, eighty may."""
    path = folder / "model.yaml"
    path.write_text(f"extends: {name}\nname: {name}\nsizes: {{layers: 2}}\n")
    return str(path)


@GIVEN
@pytest.mark.parametrize(("name", "world_size"), sizes())
def test_every_cell_of_the_feature_matrix_compiles(name, world_size, tmp_path):
    for attention, dtype in kinds():
        options = Options(device=DEVICE, world_size=world_size, attention=attention, dtype=dtype)
        compiled = compile_model(two_layers(name, tmp_path), options)
        assert set(compiled.segments) == {"prefill", "decode"}


@GIVEN
@pytest.mark.parametrize(("name", "world_size"), sizes())
def test_every_model_and_world_size_of_the_feature_matrix_compiles_at_full_depth(name, world_size):
    compiled = compile_model(name, Options(device=DEVICE, world_size=world_size))
    layers = {layer for part in compiled.segments["decode"] for layer in part.layers if layer.startswith("layers.")}
    assert len(layers) == compiled.graph.sizes["layers"]


@GIVEN
def test_the_feature_matrix_has_the_cells_that_the_catalogue_offers():
    assert len(kinds()) == 4
    offered = {(name, size) for name in catalogue() for size in load_model(name).support[DEVICE]["tp"]}
    assert set(sizes()) <= offered
    assert {name for name, _ in offered - set(sizes())} == {"smollm2-135m"}


@pytest.mark.parametrize("name", catalogue())
def test_a_size_that_is_not_offered_is_refused_with_the_offered_ones_unless_it_is_allowed(name, tmp_path):
    offered = load_model(name).support[DEVICE]["tp"]
    path = two_layers(name, tmp_path)
    others = [size for size in HOST_SIZES if size not in offered]
    assert others
    for world_size in others:
        with pytest.raises(UserError) as refused:
            compile_model(path, Options(device=DEVICE, world_size=world_size))
        assert f"world size {world_size} (offered: {', '.join(map(str, offered))})" in str(refused.value)
        assert "--allow-unsupported" in str(refused.value)
        compiled = compile_model(path, Options(device=DEVICE, world_size=world_size, allow_unsupported=True))
        assert compiled.graph.world_size == world_size


@pytest.mark.parametrize(("name", "smallest"), [("llama2-7b", 1), ("llama-33b", 4), ("llama2-70b", 8)])
def test_the_world_size_that_nobody_chose_is_the_smallest_offered(name, smallest, tmp_path):
    assert compile_model(two_layers(name, tmp_path), Options(device=DEVICE)).graph.world_size == smallest


@pytest.mark.parametrize("world_size", [0, -1, 9, 16])
def test_a_size_that_no_host_has_is_refused_also_when_unsupported_sizes_are_allowed(world_size):
    with pytest.raises(UserError, match="8 devices"):
        compile_model("llama2-7b", Options(device=DEVICE, world_size=world_size, allow_unsupported=True))


@pytest.mark.parametrize("world_size", HOST_SIZES)
def test_the_host_takes_every_size(world_size, tmp_path):
    options = Options(device="host", dtype="float32", world_size=world_size)
    assert compile_model(two_layers("llama2-70b", tmp_path), options).graph.world_size == world_size


# How edges lie --------------------------------------------------------------------------------------------------------

HEADER = "name: model\ndtype: float32\nsizes: {max_positions: 64}\nrope: {theta: 10000.0}\n"
EMBED = "  e: {op: embedding, ids: token_ids, rows: 32, width: 32, weight: e}\n"


def sharded(nodes: str, output: str, folder: Path, world_size: int = 2, embed: str = EMBED) -> Graph:
    """The model graph after the sharding pass; `nodes` read the embedding `e`."""
    path = folder / "model.yaml"
    path.write_text(f"{HEADER}graph:\n{embed}{nodes}outputs: {{logits: {output}}}\n")
    options = Options(device="host", world_size=world_size)
    return compile_model(str(path), options, until="shard").phases["model"]


def letters(graph: Graph) -> dict[str, str]:
    return {value: str(graph.types[value].shard) for node in graph.nodes for value in node.values}


def test_a_layer_of_llama_lies_over_two_ranks_as_the_vendor_splits_it():
    """mindie-stack.md 4.1: two sums a layer, one gathering for the head, norms and embedding whole."""
    graph = compile_model("llama2-7b", Options(world_size=2), until="shard").phases["model"]
    found = letters(graph)
    layer = {
        value.removeprefix("layers.3."): letter for value, letter in found.items() if value.startswith("layers.3.")
    }
    assert layer == {
        "input_norm": "R",
        "attn.qkv": "S(1)",
        "attn.qkv.split.q": "S(1)", "attn.qkv.split.k": "S(1)", "attn.qkv.split.v": "S(1)",
        "attn.rope.q": "S(1)", "attn.rope.k": "S(1)",
        "attn.core": "S(1)",
        "attn.o": "P",
        "attn.o.all_reduce": "R",
        "attn_sum": "R",
        "post_norm": "R",
        "mlp.gate_up": "S(1)", "mlp.gate_up.split.gate": "S(1)", "mlp.gate_up.split.up": "S(1)",
        "mlp.act": "S(1)", "mlp.gated": "S(1)",
        "mlp.down": "P",
        "mlp.down.all_reduce": "R",
        "mlp_sum": "R",
    }  # fmt: skip
    assert {value: letter for value, letter in found.items() if not value.startswith("layers.")} == {
        "embed": "R", "norm": "R", "last": "R", "lm_head": "S(1)", "lm_head.all_gather": "R",
    }  # fmt: skip
    weights = {name.removeprefix("layers.3."): str(w.type.shard) for name, w in graph.weights.items()}
    split = {name: letter for name, letter in weights.items() if letter != "R" and not name.startswith("layers.")}
    assert split == {
        "attn.qkv.weight": "S(0)", "attn.o.weight": "S(1)", "mlp.gate_up.weight": "S(0)", "mlp.down.weight": "S(1)",
        "lm_head.weight": "S(0)",
    }  # fmt: skip


def test_a_graph_for_one_rank_has_no_collective_and_is_whole_everywhere():
    graph = compile_model("llama2-7b", Options(world_size=1)).graph
    assert {str(t.shard) for t in graph.types.values()} == {"R"}
    assert not {node.op for node in graph.nodes} & {"all_reduce", "all_gather"}


def test_a_sum_is_made_once_for_all_its_readers(tmp_path):
    nodes = """
  up: {op: linear, x: e, out: 64, weight: u, tp: column}
  down: {op: linear, x: up, out: 32, weight: d, tp: row}
  one: {op: silu, x: down}
  two: {op: mul, a: down, b: one}
"""
    graph = sharded(nodes, "two", tmp_path)
    assert [node.name for node in graph.nodes if node.op == "all_reduce"] == ["down.all_reduce"]
    assert {node.name for node in graph.nodes if "down.all_reduce" in node.inputs.values()} == {"one", "two"}


def test_partial_sums_are_added_before_one_sum_over_the_ranks(tmp_path):
    nodes = """
  up: {op: linear, x: e, out: 64, weight: u, tp: column}
  a: {op: linear, x: up, out: 32, weight: a, tp: row}
  b: {op: linear, x: up, out: 32, weight: b, tp: row}
  both: {op: add, a: a, b: b}
  n: {op: rms_norm, x: both, eps: 1.0e-5, weight: n}
"""
    graph = sharded(nodes, "n", tmp_path)
    assert [node.name for node in graph.nodes if node.op == "all_reduce"] == ["both.all_reduce"]


def test_a_partial_sum_is_not_added_to_a_whole_value_before_it_is_summed(tmp_path):
    nodes = """
  up: {op: linear, x: e, out: 64, weight: u, tp: column}
  down: {op: linear, x: up, out: 32, weight: d, tp: row}
  sum: {op: add, a: e, b: down}
"""
    assert letters(sharded(nodes, "sum", tmp_path))["sum"] == "R"


@pytest.mark.parametrize(("tp", "expected"), [("column", "S(0)"), ("vocab", "S(0)"), ("row", "P"), ("replicate", "R")])
def test_a_bias_lies_like_its_outputs_and_of_a_row_split_on_rank_0_alone(tp, expected, tmp_path):
    nodes = f"""
  x: {{op: linear, x: e, out: 64, weight: u, tp: {"column" if tp == "row" else "replicate"}}}
  y: {{op: linear, x: x, out: 32, weight: w, bias: b, tp: {tp}}}
"""
    graph = sharded(nodes, "y", tmp_path)
    assert str(graph.weights["y.bias"].type.shard) == expected


def test_a_hidden_split_embedding_is_gathered_for_who_reads_it_whole(tmp_path):
    embed = EMBED.replace("weight: e", "weight: e, tp: hidden")
    graph = sharded("  n: {op: rms_norm, x: e, eps: 1.0e-5, weight: n}\n", "n", tmp_path, embed=embed)
    assert letters(graph) == {"e": "S(1)", "e.all_gather": "R", "n": "R"}
    assert graph.weights["e.weight"].type.local == (32, 16)


def test_kv_heads_are_copied_where_ranks_outnumber_them():
    """Llama 2 70B at 8 ranks has one kv head a rank; a model with 4 of them shares each between two ranks."""
    graph = compile_model("llama2-70b", Options(world_size=8), until="shard").phases["model"]
    assert graph.types["layers.0.attn.rope.k"].shard.split.is_partition
    options = Options(device="host", world_size=8)
    small = compile_model("smollm2-135m", options, until="shard").phases["model"]
    keys, queries = (small.types[f"layers.0.attn.rope.{name}"].shard.split for name in "kq")
    assert [start // 64 for start, count in keys.runs if count] == [0, 0, 1, 1, 2, 2]
    assert [count // 64 for _, count in queries.runs] == [2, 1, 2, 1, 2, 1, 0, 0]


def test_llama_33b_at_8_ranks_has_7_heads_a_rank_and_zeros_on_the_last():
    graph = compile_model("llama-33b", Options(world_size=8), until="shard").phases["model"]
    split = graph.types["layers.0.attn.core"].shard.split
    assert (split.local, split.runs[-1]) == (7 * 128, (49 * 128, 3 * 128))
    assert graph.weights["layers.0.attn.qkv.weight"].type.local == (3 * 7 * 128, 6656)
    assert graph.weights["layers.0.attn.o.weight"].type.local == (6656, 7 * 128)


# Refusals -------------------------------------------------------------------------------------------------------------

QKV_ALONE = """
  q: {op: linear, x: e, out: 28 * 4, heads: 28, weight: q, tp: column}
  k: {op: linear, x: e, out: 4 * 4, heads: 4, weight: k, tp: column}
  v: {op: linear, x: e, out: 4 * 4, heads: 4, weight: v, tp: column}
  y: {op: attention, q: q, k: k, v: v, heads: 28, kv_heads: 4, head_dim: 4}
"""
QK = """  x: {op: linear, x: e, tp: column,
      parts: {q: {out: 24, heads: 3, weight: q}, k: {out: 8, heads: 1, weight: k}}}
"""
# nodes -> line of the node that is refused, and what the message must say
REFUSED = {
    "a row split of a whole input": (
        "  y: {op: linear, x: e, out: 32, weight: w, tp: row}\n", 1,
        ["'y' (linear)", "R [T, 32]", "S(1)", "tp: column where 'x' is made, or tp: replicate here"],
    ),
    "a row split whose heads the input does not keep": (
        "  x: {op: linear, x: e, out: 40, weight: u, tp: column}\n"
        "  y: {op: linear, x: x, out: 32, heads: 5, weight: w, tp: row}\n", 2,
        ["'y' (linear)", "whole heads", "S(1) [T, 40] with 14 a rank", "say `heads` where 'x' is made"],
    ),
    "rope over a head that two ranks share": (
        "  q: {op: linear, x: e, out: 32, weight: q, tp: column}\n"
        "  y: {op: rope, q: q, k: q, head_dim: 16}\n"
        "  z: {op: add, a: y.q, b: y.k}\n", 2,
        ["'y' (rope)", "whole heads of 16", "S(1) [T, 32] with 11 a rank", "say `heads`"],
    ),
    "query heads that are not with their kv heads": (
        QKV_ALONE.lstrip("\n"), 4,
        ["'y' (attention)", "query heads", "q S(1) [T, 112] with 40 a rank", "make q, k and v in one linear"],
    ),
    "a norm over a kv head that several ranks hold": (
        QK + "  y: {op: rms_norm, x: x.k, eps: 1.0e-5, weight: n}\n", 3,
        ["'y' (rms_norm)", "cannot be made whole", "S(1)", "no head on two ranks"],
    ),
    "a row split over a kv head that several ranks hold": (
        QK + "  y: {op: linear, x: x.k, out: 32, weight: w, tp: row}\n", 3,
        ["'y' (linear)", "S(1) [T, 8] with 8 a rank", "each column on one rank"],
    ),
    "parts whose heads form no groups": (
        "  x: {op: linear, x: e, tp: column, parts: {a: {out: 30, heads: 5, weight: a}, "
        "b: {out: 30, heads: 3, weight: b}}}\n  y: {op: mul, a: x.a, b: x.b}\n", 1,
        ["'x' (linear)", "30 features in 5 heads", "3 of them or a multiple"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_with_place_what_was_found_what_was_needed_and_a_way_out(name, tmp_path):
    nodes, line, said = REFUSED[name]
    first = f"{HEADER}graph:\n{EMBED}".count("\n")
    output = "z" if "\n  z:" in nodes else "y"
    sharded(nodes, output, tmp_path, world_size=1)
    with pytest.raises(DiagnosticError) as refused:
        sharded(nodes, output, tmp_path, world_size=3)
    problem, *_ = refused.value.diagnostics
    assert (problem.code, problem.place.line) == ("E303", first + line)
    text = str(refused.value)
    assert [words for words in said if words not in text] == []
    assert "model cannot be split over 3 ranks" in text


def test_all_nodes_without_a_rule_are_told_together_with_the_sizes_that_are_possible(tmp_path):
    nodes = """
  x: {op: linear, x: e, out: 40, weight: u, tp: column}
  a: {op: linear, x: x, out: 32, heads: 4, weight: a, tp: row}
  b: {op: linear, x: x, out: 32, heads: 2, weight: b, tp: row}
  y: {op: add, a: a, b: b}
"""
    with pytest.raises(DiagnosticError) as refused:
        sharded(nodes, "y", tmp_path, world_size=8)
    *problems, closing = refused.value.diagnostics
    assert [problem.message.split("'")[1] for problem in problems] == ["a", "b"]
    assert closing.needed == "world size 1, 2"
