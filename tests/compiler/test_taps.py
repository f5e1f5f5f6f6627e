"""Taps: values of the inside leave the graph under their own names, and nothing else changes."""

from __future__ import annotations

import pytest

from llmc.compiler.artifact import files_of, make_manifest
from llmc.compiler.diagnostics import UserError
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model


def compiled(*taps: str, **options):
    return compile_model("smollm2-135m", Options(**{"device": "host", **options}, taps=taps), every_layer=False)


def taps_of(phase: str, *taps: str, **options) -> dict[str, dict]:
    manifest = make_manifest(compiled(*taps, **options))
    return {tap["name"]: tap for tap in manifest["phases"][phase]["taps"]}


def test_without_taps_the_manifest_does_not_speak_of_them():
    assert not any("taps" in phase for phase in make_manifest(compiled())["phases"].values())


def test_values_that_fusions_took_away_are_not_tapped():
    fused, plain = taps_of("prefill", "layers.1.*"), taps_of("prefill", "layers.1.*", fusions=())
    assert {"layers.1.mlp.gated", "layers.1.post_norm.sum"} < fused.keys()
    assert "layers.1.mlp.act" not in fused
    assert "layers.1.mlp.act" in plain


def test_operations_are_those_of_the_graph_without_taps():
    with_taps, without = (compiled(*taps, fusions=("swiglu",)) for taps in (("*",), ()))
    for phase in ("prefill", "decode"):
        a, b = ([node for group in part for node in group.layer.nodes] for part in
                ([g for s in c.segments[phase] for g in s.groups] for c in (with_taps, without)))  # fmt: skip
        assert [(node.op, dict(node.param)) for node in a] == [(node.op, dict(node.param)) for node in b]


def test_every_tap_is_an_output_of_a_segment_and_has_a_place():
    manifest = make_manifest(compiled("*", world_size=3))
    for phase in manifest["phases"].values():
        outputs = {name for part in phase["segments"] for name in part["outputs"]}
        assert {tap["name"] for tap in phase["taps"]} <= outputs
        assert all(":" in tap["place"] for tap in phase["taps"])
        assert all(part["counts"]["outputs"] <= 256 for part in phase["segments"])


def test_shares_of_ranks_are_described_by_the_splits_of_the_weights():
    taps = taps_of("decode", "layers.0.*", world_size=3)
    assert taps["layers.0.attn.o"]["shard"] == "P"
    assert taps["layers.0.attn.o.all_reduce"]["shard"] == "R"
    assert taps["layers.0.attn.qkv"]["splits"] == ["576:192", "192:64", "192:64"]


@pytest.mark.parametrize(
    ("name", "what", "tensors"),
    [
        ("layers.2.attn.qkv.split.k", "output", ["model.layers.2.self_attn.k_proj.weight"]),
        ("layers.2.attn.rope.q", "rope", ["model.layers.2.self_attn.q_proj.weight"]),
        ("layers.2.attn.core", "input", ["model.layers.2.self_attn.o_proj.weight"]),
        ("layers.2.mlp.act", "activation", ["model.layers.2.mlp.gate_proj.weight"]),
        ("layers.2.mlp.gated", "input", ["model.layers.2.mlp.down_proj.weight"]),
        ("layers.2.mlp_sum", "input", ["model.layers.3.input_layernorm.weight"]),
        ("layers.29.mlp_sum", "input", ["model.norm.weight"]),
        ("last", "output", ["model.norm.weight"]),
        ("logits", "output", ["model.embed_tokens.weight"]),
    ],
)
def test_names_of_weights_tell_what_a_value_stands_for(name, what, tensors):
    found = taps_of("prefill", "*", fusions=())[name]["stands_for"]
    assert (found["what"], [part["tensor"] for part in found["parts"]]) == (what, tensors)


def test_what_layers_hand_on_is_tapped_by_one_word():
    names = taps_of("prefill", "@layers")
    assert {"embed", "layers.0.mlp.down", "layers.0.post_norm.sum", "norm.y", "last", "logits"} <= names.keys()
    assert not {"layers.0.attn.qkv", "layers.5.attn.core", "layers.5.input_norm.y"} & names.keys()


def test_a_pattern_that_names_nothing_is_refused_by_name():
    with pytest.raises(UserError, match=r"layrs\.\*"):
        compiled("layrs.*")


def test_the_name_of_an_artifact_says_that_values_are_tapped():
    from llmc.compiler.artifact import default_name

    assert default_name(compiled("embed"))[:-8].endswith("-taps-")
    assert files_of(compiled("embed"))["prefill.py"] != files_of(compiled())["prefill.py"]
