"""Source trees become model graphs: merging, repeats, blocks, packed weights, order. Needs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.ir import Graph, Rows, TensorType
from llmc.compiler.language.build import build, build_model, load_model
from llmc.compiler.language.source import catalogue, loads

GRAPHS = Path(__file__).parents[2] / "graphs"
SIZES = "sizes: {vocab: 32, hidden: 16, ffn: 24, layers: 2, heads: 4, kv_heads: 2, max_positions: 64}\n"
LLAMA = f"extends: families/llama\nname: tiny\n{SIZES}"


def llama(changes: str = "") -> Graph:
    """A tiny LLaMA with changes."""
    return build(loads(LLAMA + changes))


def attention(changes: str) -> Graph:
    return llama(f"blocks: {{attention: {{nodes: {{{changes}}}}}}}\n")


def test_repeats_and_blocks_become_paths():
    names = [node.name for node in llama().nodes]
    assert names[:5] == ["embed", "layers.0.input_norm", "layers.0.attn.qkv", "layers.0.attn.qkv.split",
                         "layers.0.attn.rope"]  # fmt: skip
    assert names[-4:] == ["layers.1.mlp_sum", "norm", "last", "lm_head"]
    assert len(names) == 1 + 2 * 14 + 3


def test_edges_follow_carried_values_block_inputs_and_outputs():
    by_name = llama().by_name
    assert by_name["layers.0.input_norm"].inputs == {"x": "embed"}
    assert by_name["layers.1.input_norm"].inputs == {"x": "layers.0.mlp_sum"}
    assert by_name["layers.1.attn.qkv"].inputs == {"x": "layers.1.input_norm"}
    assert by_name["layers.1.attn_sum"].inputs == {"a": "layers.0.mlp_sum", "b": "layers.1.attn.o"}
    assert by_name["layers.1.attn.core"].inputs == {
        "q": "layers.1.attn.rope.q",
        "k": "layers.1.attn.rope.k",
        "v": "layers.1.attn.qkv.split.v",
    }
    assert by_name["norm"].inputs == {"x": "layers.1.mlp_sum"}


def test_parts_become_one_linear_and_a_split():
    by_name = llama().by_name
    qkv, split = by_name["layers.1.attn.qkv"], by_name["layers.1.attn.qkv.split"]
    weight = qkv.weights["weight"]
    assert (weight.name, weight.split) == ("layers.1.attn.qkv.weight", "column")
    assert weight.type == TensorType(dtype="float16", shape=(32, 16))
    assert [(s.tensor, s.shape, s.rows) for s in weight.sources] == [
        ("model.layers.1.self_attn.q_proj.weight", (16, 16), None),
        ("model.layers.1.self_attn.k_proj.weight", (8, 16), None),
        ("model.layers.1.self_attn.v_proj.weight", (8, 16), None),
    ]
    assert (qkv.attrs["out"], qkv.attrs["heads"]) == (32, (4, 2, 2))
    assert (split.op, split.attrs["sizes"], split.outputs) == ("split", (16, 8, 8), ("q", "k", "v"))


def test_a_single_part_needs_no_split():
    graph = llama(
        "blocks: {mlp: {nodes: {gate_up: {parts: {up: null}}, act: {x: gate_up.gate}, gated: {b: gate_up.gate}}}}\n"
    )
    assert "layers.0.mlp.gate_up.split" not in graph.by_name
    assert graph.by_name["layers.0.mlp.act"].inputs == {"x": "layers.0.mlp.gate_up"}


def test_packed_weight_takes_rows_one_after_the_other():
    """Baichuan's W_pack."""
    graph = attention(
        'qkv: {op: linear, x: x, tp: column, weight: "l.{i}.W_pack", '
        "parts: {q: {out: hidden}, k: {out: kv_heads * head_dim}, v: {out: kv_heads * head_dim}}}"
    )
    sources = graph.by_name["layers.1.attn.qkv"].weights["weight"].sources
    assert {(s.tensor, s.shape) for s in sources} == {("l.1.W_pack", (32, 16))}
    assert [s.rows for s in sources] == [
        Rows(groups=1, stride=32, offset=0, size=16),
        Rows(groups=1, stride=32, offset=16, size=8),
        Rows(groups=1, stride=32, offset=24, size=8),
    ]


def test_interleaved_weight_takes_rows_of_every_group():
    """InternLM2's wqkv: for each kv head its query heads, then k, then v. The parts cover the tensor once."""
    graph = attention(
        'qkv: {op: linear, x: x, tp: column, weight: "l.{i}.wqkv", bias: "l.{i}.bqkv", groups: kv_heads, '
        "parts: {q: {out: heads * head_dim}, k: {out: kv_heads * head_dim}, v: {out: kv_heads * head_dim}}}"
    )
    node = graph.by_name["layers.0.attn.qkv"]
    rows = [s.rows for s in node.weights["weight"].sources]
    assert rows == [
        Rows(groups=2, stride=16, offset=0, size=8),
        Rows(groups=2, stride=16, offset=8, size=4),
        Rows(groups=2, stride=16, offset=12, size=4),
    ]
    taken = [g * r.stride + r.offset + n for r in rows for g in range(r.groups) for n in range(r.size)]
    assert sorted(taken) == list(range(32))
    assert [(s.tensor, s.shape, s.rows) for s in node.weights["bias"].sources] == [("l.0.bqkv", (32,), r) for r in rows]
    assert "groups" not in node.attrs


def test_biases_of_parts_are_concatenated_like_the_weights():
    """Qwen2: q, k and v have a bias, o has none."""
    graph = attention('qkv: {parts: {q: {bias: "{i}.qb"}, k: {bias: "{i}.kb"}, v: {bias: "{i}.vb"}}}')
    bias = graph.by_name["layers.1.attn.qkv"].weights["bias"]
    assert [(s.tensor, s.shape) for s in bias.sources] == [("1.qb", (16,)), ("1.kb", (8,)), ("1.vb", (8,))]
    assert (bias.type.shape, bias.split) == ((32,), "column")
    assert list(graph.by_name["layers.1.attn.o"].weights) == ["weight"]


def test_bias_of_a_row_split_is_whole():
    graph = attention('o: {bias: "{i}.ob"}')
    node = graph.by_name["layers.0.attn.o"]
    assert {slot: w.split for slot, w in node.weights.items()} == {"weight": "row", "bias": "replicate"}


def test_tied_embeddings_read_one_tensor_for_two_weights():
    graph = llama("graph: {lm_head: {weight: model.embed_tokens.weight}}\n")
    tensors = [graph.by_name[name].weights["weight"].sources[0].tensor for name in ("embed", "lm_head")]
    assert tensors == ["model.embed_tokens.weight"] * 2


def test_explicit_head_dim():
    graph = llama("").by_name, build(loads(LLAMA.replace("heads: 4,", "heads: 4, head_dim: 8,"))).by_name
    assert [g["layers.0.attn.core"].attrs["head_dim"] for g in graph] == [4, 8]
    assert graph[1]["layers.0.attn.o"].weights["weight"].type.shape == (16, 32)


def test_changing_an_attribute_keeps_the_rest_of_the_node():
    node = llama("graph: {norm: {eps: 2e-3}}\n").by_name["norm"]
    assert (node.attrs["eps"], node.inputs, "weight" in node.weights) == (2e-3, {"x": "layers.1.mlp_sum"}, True)


def test_a_node_with_an_operator_replaces_the_whole_node():
    node = llama("graph: {norm: {op: silu, x: layers.x}}\n").by_name["norm"]
    assert (node.op, node.weights, node.attrs) == ("silu", {}, {})


def test_a_block_can_replace_an_operator():
    graph = llama("graph: {norm: {block: twice, x: layers.x}}\n"
                  "blocks: {twice: {inputs: [x], nodes: {a: {op: silu, x: x}, b: {op: silu, x: a}}, output: b}}\n"
                  )  # fmt: skip
    assert graph.by_name["last"].inputs == {"x": "norm.b"}
    assert graph.by_name["norm.a"].inputs == {"x": "layers.1.mlp_sum"}


def test_an_inserted_node_runs_before_its_reader():
    graph = attention("q_act: {op: silu, x: qkv.q}, rope: {q: q_act}")
    names = [node.name for node in graph.nodes]
    assert names.index("layers.0.attn.q_act") == names.index("layers.0.attn.rope") - 1


def test_null_removes_a_node_when_its_readers_are_led_elsewhere():
    graph = llama("graph: {norm: null, last: {x: layers.x}}\n")
    assert "norm" not in graph.by_name
    assert graph.by_name["last"].inputs == {"x": "layers.1.mlp_sum"}
    with pytest.raises(DiagnosticError, match="E201 there is no 'norm' here"):
        llama("graph: {norm: null}\n")


def test_a_block_with_several_outputs():
    graph = llama(
        "blocks: {mlp: {output: null, outputs: {main: down, gate: act}}}\n"
        "graph: {layers: {nodes: {mlp_sum: {b: mlp.main}, x2: {op: add, a: mlp.main, b: mlp_sum}}, next: {x: x2}}}\n"
    )
    assert graph.by_name["layers.0.mlp_sum"].inputs["b"] == "layers.0.mlp.down"
    with pytest.raises(DiagnosticError, match=r"several outputs[\s\S]*mlp\.main, mlp\.gate"):
        llama("blocks: {mlp: {output: null, outputs: {main: down, gate: act}}}\n")


def test_two_carried_values():
    """`before` is the value of the iteration before; what only a next iteration would read is left out of the last."""
    graph = llama(
        "graph: {layers: {carry: {before: embed}, next: {before: x},"
        " nodes: {attn_sum: {a: before}, note: {op: silu, x: attn_sum}, mlp_sum: {a: attn_sum}}}}\n".replace(
            " note: {op: silu, x: attn_sum},", ""
        )
    )
    assert graph.by_name["layers.0.attn_sum"].inputs["a"] == "embed"
    assert graph.by_name["layers.1.attn_sum"].inputs["a"] == "embed"
    three = build(loads(LLAMA.replace("layers: 2", "layers: 3") + "graph: {layers: {carry: {before: embed},"
                        " next: {before: x}, nodes: {attn_sum: {a: before}}}}\n"))  # fmt: skip
    assert three.by_name["layers.2.attn_sum"].inputs["a"] == "layers.0.mlp_sum"


def test_work_for_the_next_iteration_is_left_out_of_the_last():
    graph = llama(
        "graph: {layers: {carry: {y: embed}, next: {y: spare},"
        " nodes: {spare: {op: silu, x: attn_sum}, attn_sum: {a: y}}}}\n"
    )
    assert "layers.0.spare" in graph.by_name
    assert "layers.1.spare" not in graph.by_name


def test_rope_settings_are_plain_numbers():
    rope = llama(
        "rope: {theta: 5e5, scaling: {type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4,"
        " original_max_positions: max_positions * 2}}\n"
    ).rope
    assert rope == {
        "theta": 500000.0,
        "pairing": "half",
        "scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_positions": 128,
        },
    }


def test_stating_the_type_of_a_scaling_replaces_it(tmp_path):
    (tmp_path / "long.yaml").write_text(
        f"{LLAMA}rope: {{scaling: {{type: dynamic, factor: 2.0, original_max_positions: 64}}}}\n"
    )
    for change, expected in (
        ("{type: linear, factor: 4.0}", {"type": "linear", "factor": 4.0}),
        ("{factor: 3.0}", {"type": "dynamic", "factor": 3.0, "original_max_positions": 64}),
        ("null", None),
    ):
        path = tmp_path / "m.yaml"
        path.write_text(f"extends: long\nrope: {{scaling: {change}}}\n")
        assert load_model(path).graph.rope.get("scaling") == expected


def test_policy_and_support_are_normalised():
    model = build_model(
        loads(
            LLAMA
            + 'policy:\n  - {nodes: "*.down", layers: 0-1, dtype: float32}\n  - {nodes: lm_head, dtype: float32}\n'
            "support: {host: {tp: [1, kv_heads], dtypes: [float32], attention: [paged]}}\n"
        )
    )
    assert model.graph.policy == (
        {"nodes": "*.down", "layers": (0, 1), "dtype": "float32"},
        {"nodes": "lm_head", "dtype": "float32"},
    )
    assert model.support == {"host": {"tp": (1, 2), "dtypes": ("float32",), "attention": ("paged",)}}


def test_sizes_that_read_each_other_twice_are_evaluated_once():
    """40 to the power of 18 otherwise."""
    chain = "".join(f"  s{i}: ({' + '.join([f's{i + 1}'] * 40)}) / 40\n" for i in range(18))
    text = (
        f"name: t\nsizes:\n  max_positions: 8\n{chain}  s18: 4\noutputs: {{logits: a}}\n"
        "graph: {a: {op: embedding, ids: token_ids, rows: s0, width: s0, weight: w}}\n"
    )
    assert build(loads(text)).sizes["s0"] == 4


def test_an_edge_may_be_written_before_what_it_names():
    text = (
        "name: t\nsizes: {n: 4, max_positions: 8}\noutputs: {logits: b}\n"
        "graph:\n  b: {op: silu, x: a}\n  a: {op: embedding, ids: token_ids, rows: n, width: n, weight: w}\n"
    )
    assert [node.name for node in build(loads(text)).nodes] == ["a", "b"]


@pytest.mark.parametrize("name", catalogue())
def test_catalogue_is_short_and_builds(name):
    model = load_model(name)
    assert model.name == name
    assert len((GRAPHS / f"{name}.yaml").read_text().splitlines()) <= 25
    assert len(model.graph.nodes) == 1 + 14 * model.graph.sizes["layers"] + 3


# hidden, ffn, layers, heads, kv heads, vocabulary, positions, eps: the public config.json files
PUBLISHED = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, 2048, 1e-6),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, 2048, 1e-6),
    "llama-33b": (6656, 17920, 60, 52, 52, 32000, 2048, 1e-6),
    "llama-65b": (8192, 22016, 80, 64, 64, 32000, 2048, 1e-5),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e-5),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e-5),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000, 4096, 1e-5),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 1e-5),
}
# Parameters, as the papers and model cards count them (LLaMA table 2; SmolLM2 135M), in billions
PARAMETERS = {"llama-7b": 6.7, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.2, "llama2-70b": 69.0,
              "smollm2-135m": 0.135}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_catalogue_has_the_published_sizes(name):
    sizes = load_model(name).graph.sizes
    keys = ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab", "max_positions", "eps")
    assert tuple(sizes[key] for key in keys) == PUBLISHED[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_catalogue_has_the_published_number_of_parameters(name):
    tensors = {s.tensor: s.shape for w in load_model(name).graph.weights.values() for s in w.sources}
    count = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tensors.values())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)


def test_building_70b_is_fast_and_needs_no_torch():
    code = (
        "import json, sys, time; from llmc.compiler.language.build import load_model; load_model('llama2-7b');"
        "start = time.process_time(); load_model('llama2-70b'); end = time.process_time();"
        "print(json.dumps([end - start, sorted({'torch', 'numpy'} & set(sys.modules))]))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(done.stdout)
    assert heavy == []
    assert seconds < 0.5, f"{seconds:.3f} s; {time.perf_counter() - start:.3f} s with process start"
