"""llmc diff, explain and show: what they say, against sizes worked out by hand and against the generated code."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from generated import recorded

from llmc.compiler import artifact
from llmc.compiler.atb.core import snake_case
from llmc.compiler.cli import main
from llmc.compiler.listing import at_layer, collapse, expand, layer_numbers, ranges
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports.explain import explain, show_explanation

SMALL = """
extends: families/llama
name: small
sizes: {vocab: 96, hidden: 64, ffn: 160, layers: 6, heads: 4, kv_heads: 2, max_positions: 256}
"""


def diff(capsys, a, b):
    assert main(["diff", str(a), str(b), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["changes"]


def diff_text(capsys, a, b):
    assert main(["diff", str(a), str(b)]) == 0
    return capsys.readouterr().out


def find(changes, section, name):
    """The change of that thing, its layers as `first-last`."""
    (found,) = (c for c in changes if c["section"] == section and c["name"].replace("{i}", c["layers"]) == name)
    return found


@pytest.fixture
def small(tmp_path):
    """Writes a variant: its YAML, and what is added to it."""

    def write(name, more=""):
        path = tmp_path / f"{name}.yaml"
        path.write_text(SMALL + more)
        return path

    return write


# ---- diff


def test_one_rank_and_eight_differ_by_heads_collectives_and_eighths(capsys):
    changes = diff(capsys, "llama2-13b@tp=1", "llama2-13b@tp=8")
    assert find(changes, "settings", "world_size")["fields"] == {"value": {"a": 1, "b": 8}}
    for phase in ("prefill", "decode"):
        core = find(changes, phase, "layers.0-39.attn.core")["fields"]
        assert core["param.headNum"] == core["param.kvHeadNum"] == {"a": 40, "b": 5}
    for place in ("attn.o", "mlp.down"):
        added = find(changes, "decode", f"layers.0-39.{place}.all_reduce")
        assert (added["kind"], added["count"], added["fields"]["op"]) == ("added", 40, "AllReduce")
        assert added["fields"]["reads"] == [f"layers.{{i}}.{place}"]
        assert added["fields"]["param.rankSize"] == 8
        partial = find(changes, "decode", f"layers.0-39.{place}")["fields"][f"out.layers.{{i}}.{place}"]
        assert partial == {"a": "float16 [B, 5120] R", "b": "float16 [B, 5120] P"}
    shapes = {
        "layers.0-39.attn.qkv.weight": ("[15360, 5120] R", "[1920, 5120] S(0)"),
        "layers.0-39.attn.o.weight": ("[5120, 5120] R", "[5120, 640] S(1)"),
        "layers.0-39.mlp.gate_up.weight": ("[27648, 5120] R", "[3456, 5120] S(0)"),
        "layers.0-39.mlp.down.weight": ("[5120, 13824] R", "[5120, 1728] S(1)"),
        "lm_head.weight": ("[32000, 5120] R", "[4000, 5120] S(0)"),
    }
    weights = {c["name"].replace("{i}", c["layers"]): c["fields"]["type"] for c in changes if c["section"] == "weights"}
    assert weights == {name: {"a": f"float16 {a}", "b": f"float16 {b}"} for name, (a, b) in shapes.items()}


def test_bytes_are_those_of_the_published_parameters(capsys):
    parameters = 13_015_864_320  # of Llama-2-13b
    whole_everywhere = 32000 * 5120 + 81 * 5120  # the embedding; norms
    changes = diff(capsys, "llama2-13b@tp=1", "llama2-13b@tp=8")
    assert find(changes, "bytes", "weights of a rank")["fields"]["bytes"] == {
        "a": parameters * 2,
        "b": ((parameters - whole_everywhere) // 8 + whole_everywhere) * 2,
    }
    cache = 2 * 40 * 5120 * 2  # keys and values, layers, width, bytes
    assert find(changes, "bytes", "cache of a token")["fields"]["bytes"] == {"a": cache, "b": cache // 8}


def test_text_says_the_same_in_one_line_a_change(capsys):
    text = diff_text(capsys, "llama2-13b@tp=1", "llama2-13b@tp=8")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:2] == ["--- llama2-13b@tp=1", "+++ llama2-13b@tp=8"]
    assert "~ layers.0-39.attn.o.weight float16 [5120, 5120] R -> [5120, 640] S(1)" in lines
    assert any(
        line.startswith("+ layers.0-39.attn.o.all_reduce AllReduce float16 [B, 5120] R <- layers.{i}.attn.o {")
        for line in lines
    )
    assert any(
        line.startswith("~ layers.0-39.attn.core ") and line.endswith("headNum 40 -> 5; kvHeadNum 40 -> 5")
        for line in lines
    )
    assert lines[-1].startswith("differences: settings ")
    assert len(lines) < 70


@pytest.mark.parametrize("options", [[], ["--tp", "2"], ["--attention", "flash", "--dtype", "bfloat16"]], ids=" ".join)
def test_an_artifact_and_the_model_it_was_compiled_from_do_not_differ(options, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compile", "smollm2-135m", "--allow-unsupported", *options, "-o", str(out)]) == 0
    pairs = zip(options[::2], options[1::2], strict=True)
    side = "smollm2-135m@allow-unsupported" + "".join(f",{key[2:]}={value}" for key, value in pairs)
    capsys.readouterr()
    for a, b in ((out, side), (side, out), (out, out)):
        assert diff(capsys, a, b) == []
        assert diff_text(capsys, a, b) == f"{a} and {b}: no differences\n"


def test_two_artifacts_are_compared(small, tmp_path, capsys):
    """Cut otherwise, the segments hand over other tensors, and have other workspaces."""
    path = small("small")
    for name, options in (("one", []), ("two", ["--layers-per-segment", "2"])):
        assert main(["compile", str(path), "-o", str(tmp_path / name), *options]) == 0
    capsys.readouterr()
    changes = diff(capsys, tmp_path / "one", tmp_path / "two")
    assert {(c["section"], c["name"]) for c in changes} == {
        entry
        for phase in ("prefill", "decode")
        for entry in (("settings", f"{phase}.segments"), ("bytes", f"activations of a token in {phase}"))
    }


def test_more_layers_are_added_and_the_rest_is_collapsed(capsys):
    changes = diff(capsys, "llama2-7b", "llama2-13b")
    added = [c for c in changes if c["kind"] == "added"]
    assert {c["layers"] for c in added} == {"32-39"}
    assert {c["section"] for c in added} == {"caches", "weights", "prefill", "decode"}
    assert find(changes, "prefill", "layers.32-39.attn.core")["fields"]["op"] == "SelfAttention"
    assert not [c for c in changes if c["kind"] == "removed"]


def test_another_operation_in_a_nodes_place_is_told(capsys):
    changes = diff(capsys, "llama2-7b", "llama2-7b@attention=flash")
    op = find(changes, "decode", "layers.0-31.attn.core")["fields"]["op"]
    assert op == {"a": "PagedAttention", "b": "SelfAttention"}
    assert find(changes, "decode", "layers.0-31.attn.core.cache")["kind"] == "removed"
    assert "PagedAttention -> SelfAttention" in diff_text(capsys, "llama2-7b", "llama2-7b@attention=flash")


def test_layers_that_differ_otherwise_are_told_apart(small, capsys):
    base = small("base")
    mixed = small("mixed", 'policy: [{nodes: "layers.*.mlp.down", layers: 2-4, dtype: float32}]\n')
    changes = diff(capsys, f"{base}@device=host,tp=2", f"{mixed}@device=host,tp=2")
    weight = find(changes, "weights", "layers.2-4.mlp.down.weight")
    assert weight["fields"] == {"type": {"a": "float16 [64, 80] S(1)", "b": "float32 [64, 80] S(1)"}}
    assert {c["layers"] for c in changes if c["section"] == "decode"} <= {"2-4", "3-5", "2", "3-4", "5"}


def test_only_what_was_renamed_differs(small, capsys):
    path = small("small")
    other = path.with_name("other.yaml")
    other.write_text(path.read_text().replace("name: small", "name: other") + "# a comment\n")
    (change,) = diff(capsys, path, other)
    assert (change["name"], change["fields"]) == ("model", {"value": {"a": "small", "b": "other"}})


def test_another_tensor_of_the_checkpoint_is_a_difference(small, capsys):
    more = "graph: {norm: {weight: model.final.weight}}\n"
    (change,) = diff(capsys, small("small"), small("renamed", more))
    assert (change["section"], change["name"]) == ("weights", "norm.weight")
    assert change["fields"] == {"tensor.0": {"a": "model.norm.weight", "b": "model.final.weight"}}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("llama2-7b", "llama2-13b"),
        ("llama2-7b@tp=2", "smollm2-135m@attention=flash"),
    ],
)
def test_the_other_way_round_added_is_removed(a, b, capsys):
    there, back = (
        Counter((c["section"], c["kind"]) for c in changes for _ in range(c["count"]))
        for changes in (diff(capsys, a, b), diff(capsys, b, a))
    )
    swap = {"added": "removed", "removed": "added", "changed": "changed"}
    assert there
    assert back == Counter({(section, swap[kind]): n for (section, kind), n in there.items()})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["diff", "llama2-7b", "llama2-7b@atention=flash"], "did you mean 'attention'?"),
        (["diff", "llama2-7b", "llama2-7b@tp=two"], "llama2-7b@tp=two: argument --tp"),
        (["diff", "llama2-7b", "llama2-7b@tp"], "expected one argument"),
        (["diff", "llama2-7b", "llama2-7b@"], "unknown setting ''"),
        (["diff", "llama2-7b", "lama2-7b"], "did you mean 'llama2-7b'?"),
        (["diff", "llama2-7b", "llama2-7b@fuse=swigl"], "unknown fusion swigl"),
        (["diff", "llama2-7b", "."], "has no manifest.json"),
        (["diff", "llama2-7b"], "the following arguments are required: B"),
        (["explain", "llama2-7b", "layers.0.atn.o"], "did you mean 'layers.0.attn.o'?"),
        (["explain", "llama2-7b", "attn.o"], "did you mean 'layers.0.attn.o'?"),
        (["explain", "llama2-7b", "layers.32.attn.o"], "layers goes from 0 to 31"),
        (["explain", "llama2-7b", "layers.0.mlp"], "it is a block: layers.0.mlp.gate_up,"),
        (["explain", "llama2-7b", "?"], "has no node or value '?'"),
        (["explain", "llama2-7b"], "the following arguments are required: node"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_that_names_it(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2)
    assert words in err
    assert not out


def test_a_file_whose_name_has_an_at_sign_is_that_file(small, capsys):
    path = small("small@tp=2")
    assert diff(capsys, path, f"{path}@tp=1") == []


# ---- the operations that a manifest lists


def built(text):
    """(operation, parameters, numbers of inputs and outputs) of every operation that the generated `build` adds."""
    for graph in recorded(text):
        for node in graph.nodes:
            kind, arguments = node.param
            yield kind.removesuffix("Param"), frozenset(words(arguments)), len(node.ins), len(node.outs)


def words(arguments, prefix=""):
    """Keyword arguments as words; those of a communicator are arguments of `build` and no constants."""
    for name, value in arguments.items():
        if isinstance(value, tuple):
            yield from words(value[1], f"{prefix}{name}.")
        elif name not in ("rank", "rank_size", "rank_table_file", "comm_domain"):
            yield prefix + name, value if isinstance(value, str) and value.isupper() else repr(value)


def listed(entries):
    communicator = {"rank", "rankSize", "commDomain"}
    for _, entry in expand(entries):
        words = {
            (snake_case(key), value if isinstance(value, str) and value.isupper() else repr(value))
            for key, value in entry["param"].items()
            if key not in communicator
        }
        yield entry["op"], frozenset(words), len(entry["ins"]), len(entry["outs"])


@pytest.mark.parametrize(
    ("model", "options"),
    [("llama2-7b", {}), ("llama-33b", {"world_size": 8}), ("smollm2-135m", {"attention": "flash", "fusions": ()})],
)
def test_the_operations_that_a_manifest_lists_are_those_of_the_generated_code(model, options):
    files = artifact.files_of(compile_model(model, Options(**options, allow_unsupported=True)))
    phases = json.loads(files["manifest.json"])["phases"]
    for phase in ("prefill", "decode"):
        assert Counter(listed(phases[phase]["operations"])) == Counter(built(files[f"{phase}.py"]))


def test_layers_that_are_collapsed_expand_to_what_they_were():
    items = [
        (f"layers.{i}.o", {"reads": [f"layers.{i - 1}.o", f"layers.{i}.w"], "x": i in (2, 3)}) for i in range(1, 7)
    ]
    entries = collapse([("embed", {"reads": ["ids"]}), *items])
    assert [(e["name"], e["layers"]) for e in entries] == [
        ("embed", ""),
        ("layers.{i}.o", "1,4-6"),
        ("layers.{i}.o", "2-3"),
    ]
    names = {name: facts["reads"] for name, facts in expand(entries)}
    assert names["layers.4.o"] == ["layers.{i-1}.o", "layers.{i}.w"]
    assert {name: [at_layer(r, int(name[7])) for r in reads] for name, reads in names.items() if name != "embed"} == {
        name: facts["reads"] for name, facts in items
    }


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2], [1, 3], [0, 2, 3, 9, 10, 11]])
def test_ranges_of_layers_read_back(numbers):
    assert layer_numbers(ranges(numbers)) == numbers


# ---- explain


def explained(capsys, *args):
    assert main(["explain", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_row_split_matmul_on_eight_ranks(capsys):
    facts = explained(capsys, "llama2-70b", "layers.7.attn.o", "--tp", "8")
    (x,), (weight,), (out,) = facts["inputs"], facts["weights"], facts["outputs"]
    assert (x["producer"]["node"], x["shard"], x["local"]) == ("layers.7.attn.core", "S(1)", ["T", 1024])
    assert (weight["shape"], weight["local"], weight["shard"]) == ([8192, 8192], [8192, 1024], "S(1)")
    assert (weight["bytes"], weight["bytes_per_rank"]) == (8192 * 8192 * 2, 8192 * 8192 * 2 // 8)
    assert weight["ranks"][0]["runs"] == [[rank * 1024, 1024] for rank in range(8)]
    assert [t["tensor"] for t in weight["tensors"]] == ["model.layers.7.self_attn.o_proj.weight"]
    assert (out["shape"], out["shard"]) == (["T", 8192], "P")
    assert [c["node"] for c in out["consumers"]] == ["layers.7.attn.o.all_reduce"]


def test_places_are_the_lines_that_say_it(capsys):
    facts = explained(capsys, "smollm2-135m", "lm_head")
    root = Path(artifact.__file__).resolve().parents[1]
    for place, words in (
        (facts["place"], "lm_head"),
        (facts["weights"][0]["tensors"][0]["place"], "model.embed_tokens"),
    ):
        file, line, column = place.rsplit(":", 2)
        assert (root / file).read_text().splitlines()[int(line) - 1][int(column) - 1 :].startswith(words)


def test_rules_are_named_with_what_they_say(capsys):
    rules = explained(capsys, "llama2-13b", "layers.0.attn.o", "--tp", "2")["rules"]
    assert rules["type"] == {
        "function": "llmc.compiler.ops.linear.linear_shape",
        "says": "[T, k], weight [n, k] -> [T, n]",
    }
    assert rules["sharding"]["function"] == "llmc.compiler.ops.linear.linear_shard"
    assert "row: S(1) -> P" in rules["sharding"]["says"]
    assert "sharding" not in explained(capsys, "llama2-13b", "layers.0.attn.o")["rules"]


def test_a_rank_with_fewer_heads_has_zeros(capsys):
    """LLaMA-33B has 52 heads of 128: 7 a rank on eight, and 3 on the last (mindie-stack.md 4.2)."""
    facts = explained(capsys, "llama-33b", "layers.0.attn.qkv", "--tp", "8")
    for split in facts["weights"][0]["ranks"]:
        assert (split["local"], [count for _, count in split["runs"]]) == (7 * 128, [7 * 128] * 7 + [3 * 128])
    assert f"{49 * 128}-{52 * 128 - 1} + {4 * 128} zeros" in show_explanation(facts)


@pytest.mark.parametrize(
    ("node", "phase", "fusion", "into", "operation"),
    [
        ("layers.1.mlp.act", "prefill", "swiglu", "layers.1.mlp.gated", "Activation"),
        ("layers.1.mlp.gate_up.split", "decode", "swiglu", "layers.1.mlp.gated", "Activation"),
        ("layers.1.attn_sum", "decode", "add_norm", "layers.1.post_norm", "RmsNorm"),
        ("layers.1.mlp_sum", "prefill", "add_norm", "layers.2.input_norm", "RmsNorm"),
        ("layers.1.attn.o", "prefill", "linear_all_reduce", "layers.1.attn.o.all_reduce", "LinearParallel"),
        (
            "layers.1.mlp.down.all_reduce",
            "prefill",
            "linear_all_reduce",
            "layers.1.mlp.down.all_reduce",
            "LinearParallel",
        ),
    ],
)
def test_what_a_fusion_took_is_told_with_what_stands_in_its_place(node, phase, fusion, into, operation, capsys):
    facts = explained(capsys, "llama2-13b", node, "--tp", "8")
    found = facts["phases"][phase]
    assert [(step["pass"], step["into"]) for step in found["fused"]] == [(fusion, into)]
    assert [o["op"] for o in found["operations"]] == [operation]
    text = show_explanation(facts).partition(f"\n{phase}\n")[2]
    assert text.startswith(f"  {fusion} (")
    assert f"  {operation} {into}, in segment 1 of " in text


def test_without_the_fusion_the_node_is_itself(capsys):
    args = ("llama2-13b", "layers.1.attn.o", "--tp", "8", "--fuse", "none")
    found = explained(capsys, *args)["phases"]["prefill"]
    assert (found["fused"], [o["op"] for o in found["operations"]]) == ([], ["Linear"])


def test_decode_has_no_last_token(capsys):
    phases = explained(capsys, "llama2-7b", "last")["phases"]
    assert [o["op"] for o in phases["prefill"]["operations"]] == ["Gather"]
    assert (phases["decode"]["node"], phases["decode"]["operations"]) == (None, [])


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("layers.0.attn.qkv.split.q", "layers.0.attn.qkv.split"),
        ("layers.1.input_norm.sum", "layers.1.input_norm"),
        ("layers.0.attn.qkv.weight", "layers.0.attn.qkv"),
        ("layers.0.attn.core.v_cache", "layers.0.attn.core"),
        ("logits", "lm_head.all_gather"),
        ("lm_head.all_gather.gathered", "lm_head.all_gather"),
    ],
)
def test_a_node_is_found_by_what_it_makes_reads_and_keeps(name, node, capsys):
    assert explained(capsys, "llama2-7b", name, "--tp", "2")["node"] == node


@pytest.mark.parametrize(
    ("name", "role", "reader"),
    [("token_ids", "input", "Gather"), ("mask", "constant", "SelfAttention"), ("rope.cos", "internal", "Rope")],
)
def test_tensors_that_no_node_of_the_model_makes_are_explained_too(name, role, reader, capsys):
    facts = explained(capsys, "llama2-7b", name)
    found = facts["phases"]["prefill"]
    assert (found["role"], {r["op"] for r in found["readers"]}) == (role, {reader})
    assert f"{name} in prefill: {role}" in show_explanation(facts)


def test_text_is_what_json_says(capsys):
    facts = explained(capsys, "llama2-7b", "layers.0.attn.o")
    assert main(["explain", "llama2-7b", "layers.0.attn.o"]) == 0
    assert capsys.readouterr().out == show_explanation(facts) + "\n"


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_node_is_explained_and_neighbours_name_each_other(world_size, small):
    """And the code shown is the generated code."""
    compiled = compile_model(str(small("small")), Options(world_size=world_size))
    files = artifact.files_of(compiled)
    made, read, operations = set(), set(), Counter()
    for node in compiled.graph.nodes:
        facts = explain(compiled, node.name)
        read |= {(t["producer"]["node"], t["value"], node.name) for t in facts["inputs"] if t["producer"]}
        made |= {(node.name, t["value"], reader["node"]) for t in facts["outputs"] for reader in t["consumers"]}
        for phase, found in facts["phases"].items():
            for o in found["operations"]:
                code = "".join(f"    {line}\n" for line in o["code"])
                assert code[code.index("    graph.add_operation") :] in files[f"{phase}.py"]
                operations[phase] += found["node"] == node.name
    assert made == read
    # Each operation belongs to one node; the two rope tables belong to none.
    assert operations == {phase: len(low.nodes) - 2 for phase, low in compiled.lowered.items()}


# ---- show


def test_show_has_a_letter_on_every_edge_of_eight_ranks(capsys):
    assert main(["show", "llama2-13b", "--tp", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama2-13b on atlas-800i-a2, float16, paged attention, world size 8, lccl\n")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.partition("operators")[2].splitlines() if line}
    assert lines["layers.0.attn.o"].startswith(
        "linear float16 [T, 5120] P (layers.0.attn.core S(1), weight [5120, 640] S(1))"
    )
    assert lines["layers.0.attn.o.all_reduce"].startswith("all_reduce float16 [T, 5120] R (layers.0.attn.o P)")
    assert lines["layers.0.mlp.act"].startswith(
        "silu float16 [T, 13824] S(1), a rank [T, 1728] (layers.0.mlp.gate_up.split.gate S(1))"
    )
    assert lines["token_ids"] == "input int64 [T] R"
    assert lines["logits"] == "output lm_head.all_gather R"


def test_show_is_calm_with_one_rank(capsys):
    assert main(["show", "llama2-13b"]) == 0
    out = capsys.readouterr().out
    assert "paged attention, world size 1\n" in out
    assert "float16 [T, 5120] R  (layers.0.attn.core)" in out
    for words in ("a rank", "S(", "lccl", " P ", "reduce"):
        assert words not in out


# ---- docs


@pytest.mark.parametrize(
    ("block", "command"),
    [
        (0, "show llama2-13b --tp 8"),
        (1, "diff llama2-13b@tp=1 llama2-13b@tp=8"),
        (2, "explain llama-33b layers.0.attn.o --tp 8"),
    ],
)
def test_the_page_shows_what_the_commands_print(block, command, capsys):
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    assert command in page
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    shown = [text for language, text in blocks if not language][block].splitlines()
    assert main(command.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    left_out = {"...", ""}
    missing = [line for line in shown if line not in left_out and not _begins(printed, line.removesuffix("..."))]
    assert shown
    assert not missing, "docs/reports.md shows what is not printed"


def _begins(lines, start):
    return any(line.startswith(start) for line in lines)
