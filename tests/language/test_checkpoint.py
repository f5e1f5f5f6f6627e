"""config.json against the models. The configurations are transformers' LlamaConfig. Needs transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.language.build import build_model, load_model
from llmc.compiler.language.checkpoint import (
    check_config,
    choose_variant,
    read_config,
    rope_from_config,
    variant_from_config,
)
from llmc.compiler.language.source import loads

pytestmark = pytest.mark.transformers

# hidden, ffn, layers, heads, kv heads (None: the file has none), vocabulary, positions, eps
PUBLISHED = {
    "llama-7b": (4096, 11008, 32, 32, None, 32000, 2048, 1e-6),
    "llama-13b": (5120, 13824, 40, 40, None, 32000, 2048, 1e-6),
    "llama-33b": (6656, 17920, 60, 52, None, 32000, 2048, 1e-6),
    "llama-65b": (8192, 22016, 80, 64, None, 32000, 2048, 1e-5),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e-5),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e-5),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000, 4096, 1e-5),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 1e-5),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def published(name: str, **changes: Any) -> dict:
    """The model's config.json as transformers writes it today."""
    from transformers import LlamaConfig

    hidden, ffn, layers, heads, kv_heads, vocab, positions, eps = PUBLISHED[name]
    settings: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": positions,
        "rms_norm_eps": eps, "tie_word_embeddings": name.startswith("smollm2"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5 if name.startswith("smollm2") else 1e4},
    }  # fmt: skip
    return json.loads(LlamaConfig(**(settings | changes)).to_json_string(use_diff=False))


def old_style(name: str) -> dict:
    """As the original files were: no head_dim, no rope keys at their defaults, no kv heads where they equal heads."""
    config = published(name)
    theta = config.pop("rope_parameters")["rope_theta"]
    for key in ("head_dim", "attention_bias", "mlp_bias"):
        config.pop(key)
    if PUBLISHED[name][4] is None:
        config.pop("num_key_value_heads")
    return config | ({"rope_theta": theta, "rope_scaling": None} if theta != 1e4 else {})


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("write", [published, old_style])
def test_published_configuration_fits_and_chooses_its_model(name, write):
    check_config(load_model(name), write(name))
    assert choose_variant(write(name)) == name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 4160),
        ("intermediate_size", 11009),
        ("num_hidden_layers", 31),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 8),
        ("head_dim", 64),
        ("vocab_size", 32001),
        ("max_position_embeddings", 2048),
        ("rms_norm_eps", 1e-6),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("model_type", "mistral"),
        ("hidden_size", "4096"),
        ("attention_bias", 0),
    ],
)
def test_any_difference_is_told_with_both_places(key, value):
    config = published("llama2-7b") | {key: value}
    with pytest.raises(DiagnosticError) as caught:
        check_config(load_model("llama2-7b"), config, "weights/config.json")
    (found,) = caught.value.diagnostics
    assert found.code == "E502"
    assert found.found.startswith(f"weights/config.json: {key} = ")
    assert found.place.file in ("graphs/llama2-7b.yaml", "graphs/families/llama.yaml")


def test_a_size_is_shown_where_the_model_says_it():
    with pytest.raises(DiagnosticError) as caught:
        check_config(load_model("llama2-7b"), published("llama2-7b") | {"num_key_value_heads": 8})
    assert "heads: 32" in str(caught.value)
    assert caught.value.diagnostics[0].place.file == "graphs/llama2-7b.yaml"


def test_all_differences_come_together():
    with pytest.raises(DiagnosticError) as caught:
        check_config(load_model("llama2-7b"), published("llama2-13b"))
    assert len(caught.value.diagnostics) == 5


def test_absent_key_means_what_transformers_means_by_it():
    config = published("llama2-7b")
    del config["rms_norm_eps"]  # 1e-6
    with pytest.raises(DiagnosticError, match=r"rms_norm_eps 1e-06, the model says 1e-05[\s\S]*absent"):
        check_config(load_model("llama2-7b"), config)
    del config["hidden_size"]
    with pytest.raises(DiagnosticError, match="has no 'hidden_size'"):
        check_config(load_model("llama2-7b"), config)


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 1024},
    ],
    ids=lambda s: s["rope_type"],
)
def test_rope_is_compared_whole_in_both_spellings(scaling):
    new = published("llama2-7b") | {"rope_parameters": scaling | {"rope_theta": 5e5}}
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in scaling.items()}}
    assert rope_from_config(new) == rope_from_config(old)
    with pytest.raises(DiagnosticError, match=r"rope theta 500000[\s\S]*rope scaling.type"):
        check_config(load_model("llama2-7b"), new)
    model = build_model(loads(variant_from_config(new, "long")))
    check_config(model, new)
    check_config(model, old)
    for key in ("factor", "original_max_position_embeddings"):
        changed = new | {"rope_parameters": new["rope_parameters"] | {key: 77}}
        if key == "factor" or scaling["rope_type"] != "linear":
            with pytest.raises(DiagnosticError, match="77, the model says"):
                check_config(model, changed)


def test_rope_settings_that_we_do_not_know_are_differences():
    config = published("llama2-7b")
    config["rope_parameters"] |= {"partial_rotary_factor": 0.5}
    with pytest.raises(DiagnosticError, match=r"partial_rotary_factor 0\.5, the model says nothing"):
        check_config(load_model("llama2-7b"), config)
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]}
    with pytest.raises(DiagnosticError, match="'longrope', the model says 'default'"):
        check_config(load_model("llama2-7b"), config)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"tie_word_embeddings": True, "head_dim": 64, "dtype": "bfloat16"},
        {"rms_norm_eps": 3e-6, "max_position_embeddings": 123},
    ],
)
def test_a_new_variant_written_from_a_configuration_fits_it(changes):
    config = published("llama2-7b") | changes
    config |= {"num_key_value_heads": changes.get("num_key_value_heads", config["num_attention_heads"])}
    config |= {"head_dim": changes.get("head_dim", config["hidden_size"] // config["num_attention_heads"])}
    text = variant_from_config(config, "mine")
    model = build_model(loads(text))
    check_config(model, config)
    assert model.graph.dtype == changes.get("dtype", "float16")
    assert len(text.splitlines()) <= 25


def test_no_model_of_the_catalogue_gives_the_nearest_and_a_new_one():
    with pytest.raises(UserError) as caught:
        choose_variant(published("llama2-7b", vocab_size=32016), "w/config.json")
    text = str(caught.value)
    assert "nearest is llama2-7b" in text
    assert "vocab_size 32016, the model says 32000" in text
    build_model(loads(text[text.index("extends:") :]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_size": "big"}, "hidden_size must be a number"),
        ({"hidden_size": None}, "hidden_size must be a number"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling is not offered"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope settings are not offered"),
    ],
)
def test_what_the_family_cannot_say_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        variant_from_config(published("llama2-7b") | change, "mine")
    with pytest.raises(UserError, match="no model of the catalogue"):
        choose_variant(published("llama2-7b") | change)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_damaged_configuration_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_configuration_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path)
