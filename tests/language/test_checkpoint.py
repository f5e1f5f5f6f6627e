"""config.json against the models. The configurations are transformers' LlamaConfig, and published ones. Needs
transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from published import FIT, OTHERS

from llmc.compiler import cli
from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.language.build import build_model, load_model
from llmc.compiler.language.checkpoint import (
    check_config,
    choose_variant,
    read_config,
    rope_from_config,
    stored_dtype,
    variant_from_config,
)
from llmc.compiler.language.config_keys import DEFAULTS, HARMLESS, KEYS, ROPE_KEYS
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
        if key == "factor" or scaling["rope_type"] in ("llama3", "yarn"):
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "\xff",
        "[" * 100_000,
        '{"a": ' * 100_000,
        '{"vocab_size": ' + "9" * 200_000 + "}",
        '{"a": 1, "a": 2}',
    ],
    ids=["empty", "cut", "list", "latin", "deep", "deep-objects", "digits", "twice"],
)
def test_a_damaged_configuration_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_configuration_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path)


# ---- every key is known, checked or refused

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 16}  # fmt: skip


def config_of(kind: str, **changes: Any) -> dict:
    """What transformers writes for a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return json.loads(CONFIG_MAPPING[kind](**changes).to_json_string(use_diff=False))


def model_of(kind: str, config: dict):
    """A model of the LLaMA family for another type, as its author starts: the type is said, and nothing else."""
    text = variant_from_config({**config, "model_type": "llama"}, "mine")
    return build_model(loads(f"{text}config: {{model_type: {{text: {kind}}}}}\n"))


@pytest.mark.parametrize("name", FIT)
def test_published_llama_is_described_and_fits(name):
    text = variant_from_config(FIT[name], "mine")
    check_config(build_model(loads(text)), FIT[name])


@pytest.mark.parametrize("name", OTHERS)
def test_of_a_published_other_model_every_key_that_the_family_lacks_is_told_at_once(name):
    config, lacking = OTHERS[name]
    with pytest.raises(UserError) as caught:
        variant_from_config(config, "mine")
    lines = [line.strip() for line in caught.value.message.splitlines()[1:]]
    told = {line.split(" ")[0] for line in lines}
    told = {"rope scaling" if word == "rope" else word for word in told}
    assert lacking - told == set()
    # Llama 4 has its sizes in its text_config, and a key of its own.
    sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    assert told - lacking <= {*sizes, "config.json"}
    words = ("; it takes ", "needed", "must be", "rope", "may change")
    assert all(any(word in line for word in words) for line in lines)


@pytest.mark.parametrize("kind", ["llama", "transformers 4.31"])
def test_everything_that_transformers_dumps_passes(kind):
    """`LlamaConfig().to_dict()`, whose older versions held the settings of generate too."""
    old = {
        "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
        "torch_dtype": None, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
        "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
        "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
        "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
        "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
        "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
        "num_return_sequences": 1, "chunk_size_feed_forward": 0, "output_scores": False,
        "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
        "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
        "begin_suppress_tokens": None, "architectures": None, "finetuning_task": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "tokenizer_class": None, "prefix": None, "sep_token_id": None, "decoder_start_token_id": None,
        "task_specific_params": None, "problem_type": None, "_name_or_path": "", "rope_scaling": None,
        "pretraining_tp": 1,
    }  # fmt: skip
    config = old_style("llama2-7b") | old if kind != "llama" else published("llama2-7b")
    check_config(load_model("llama2-7b"), config)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_key_of_transformers_is_in_the_tables_and_its_default_is_told(kind):
    """What a config.json does not say is what the configuration class says: either off, or in DEFAULTS. Families of
    layers follow from keys that are there."""
    config = config_of(kind)
    known = {*KEYS, *HARMLESS, *ROPE_KEYS}
    assert [key for key in config if key not in known] == []
    rope = config.get("rope_parameters") or {}
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    assert {key: config.get(key) for key in DEFAULTS[kind]} == DEFAULTS[kind]
    family = {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-6, "hidden_act": "silu",
              "head_dim": config["hidden_size"] // config["num_attention_heads"], "attention_bias": False,
              "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 1e4,
              "partial_rotary_factor": 1.0}  # fmt: skip
    derived = {"layer_types", "_sliding_window_pattern", "no_rope_layers", "rope_parameters"}
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type"}
    for key, value in config.items():
        if key in family and value is not None and key not in DEFAULTS[kind]:
            assert value == family[key], key
        elif key in KEYS and key not in {*DEFAULTS[kind], *derived, *sizes, *family}:
            assert KEYS[key].is_off(value, config, None), key


def test_no_key_is_both_harmless_and_not():
    assert set(HARMLESS) & {*KEYS, *ROPE_KEYS} == set()
    assert all(row.does and row.source and row.needs for row in KEYS.values())


# A change of config.json, and which type it is made to. Some change what transformers computes, some do not.
CHANGES = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"rms_norm_eps": 0.5}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"pretraining_tp": 2}),
    ("llama", {"attention_dropout": 0.9, "initializer_range": 0.9}),
    ("llama", {"use_cache": False, "output_attentions": True, "pad_token_id": 3}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 64}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4, "use_sliding_window": False}),
    ("mistral", {"hidden_act": "gelu"}),
    ("mistral", {"attention_dropout": 0.9}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}),
    ("qwen2", {"hidden_act": "relu"}),
    ("granite", {"residual_multiplier": 0.5}),
    ("granite", {"embedding_multiplier": 12.0}),
    ("granite", {"logits_scaling": 8.0}),
    ("granite", {"attention_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25}),
    ("cohere", {"logit_scale": 0.5}),
    ("olmo", {"clip_qkv": 0.1}),
    ("gemma2", {"query_pre_attn_scalar": 64}),
    ("gemma2", {"final_logit_softcapping": 1.0}),
    ("gemma2", {"attn_logit_softcapping": 0.5}),
]  # fmt: skip
# What is off in each type, so that its base is a model without special keys.
PLAIN: dict[str, dict] = {
    "mistral": {"sliding_window": None},
    "granite": {"attention_multiplier": 0.25},
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": False},
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": None, "attn_logit_softcapping": None,
               "sliding_window": 64, "tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=lambda c: c if isinstance(c, str) else "-".join(map(str, c)))
def test_a_key_is_refused_exactly_where_it_changes_the_logits_of_transformers(kind, change):
    base = TINY | {"tie_word_embeddings": False} | PLAIN.get(kind, {})
    before, after = config_of(kind, **base), config_of(kind, **(base | change))
    after |= {key: value for key, value in change.items() if key not in after}
    model = model_of_types(kind, before)
    check_config(model, before)
    if same_logits(kind, base, base | change):
        check_config(model, after)
    else:
        with pytest.raises(DiagnosticError):
            check_config(model, after)


def model_of_types(kind: str, config: dict):
    """The family with what the type has instead of the family's keys, stated as its author would."""
    rules = {"model_type": f"{{text: {kind}}}"}
    for key in ("hidden_activation", "hidden_act"):
        if key in config and config[key] != "silu":
            rules[key] = f"{{text: {config[key]}}}"
    for key in ("layer_norm_eps", "norm_eps"):
        if key in config:
            rules[key] = f"{{is: {config[key]}}}"
    if "rms_norm_eps" not in config:
        rules["rms_norm_eps"] = "{ignore: the type has another}"
    if kind == "gemma2":
        rules["hidden_act"] = "{ignore: the type has another}"
    llama = {**config, "model_type": "llama", "hidden_act": "silu", "hidden_activation": None}
    llama = {key: value for key, value in llama.items() if key not in ("layer_norm_eps", "norm_eps")}
    lines = [f"  {key}: {rule}" for key, rule in rules.items()]
    return build_model(loads("\n".join([variant_from_config(llama, "mine"), "config:", *lines, ""])))


def same_logits(kind: str, before: dict, after: dict) -> bool:
    """Two tiny models with the same weights where they have the same tensors; new ones are random."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tokens = torch.arange(12)[None] * 5 % 64
    logits, weights = [], {}
    for settings in (before, after):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings)).eval()
        for name, tensor in model.state_dict().items():
            weights.setdefault(name, torch.randn(tensor.shape) * 0.3)
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    return torch.allclose(*logits, rtol=0, atol=1e-4)


# Keys that strangers put into a LLaMA's file: changes -> words of the message; "" where it passes.
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sliding_window": 8}, "sliding_window 8, and the model has no rule for it: a token sees only"),
        ({"sliding_window": "8"}, "sliding_window '8'"),
        ({"sliding_window": 4096}, ""),
        ({"sliding_window": 4095, "use_sliding_window": False}, ""),
        ({"sliding_window": 0}, ""),
        ({"use_sliding_window": True, "sliding_window": 100}, "use_sliding_window true"),
        ({"layer_types": ["full_attention"] * 32}, ""),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"no_rope_layers": [1] * 32}, ""),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"attention_chunk_size": 8192}, ""),
        ({"attention_chunk_size": 128}, "attention_chunk_size"),
        ({"attn_logit_softcapping": None, "final_logit_softcapping": 0}, ""),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30"),
        ({"query_pre_attn_scalar": 128}, ""),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
        ({"use_qk_norm": True}, "use_qk_norm true"),
        ({"qk_layernorm": False}, ""),
        ({"residual_multiplier": 1.0, "embedding_multiplier": 1, "logits_scaling": 1.0}, ""),
        ({"attention_multiplier": 1.0, "logit_scale": 1}, ""),
        ({"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
        ({"clip_qkv": None, "num_local_experts": 0, "bias": False}, ""),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 1.0, "rotary_pct": 1.0}, ""),
        ({"rope_interleaved": True}, "rope_interleaved true"),
        ({"alibi": True}, "alibi true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised"),
        ({"quantize": "w8a8"}, "the weights are quantised"),
        ({"quantization_config": None, "quantize": ""}, ""),
        ({"text_config": {"hidden_size": 4096}}, "text_config"),
        ({"pretraining_tp": 8, "max_sequence_length": 9, "vllm_version": "1", "unsloth_version": "2025.1"}, ""),
        ({"rope_scaling": "linear"}, "rope rope_scaling 'linear'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "says two things"),
        ({"rope_theta": 5e5}, "says two things"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}}, ""),
        ({"rope_parameters": {"rope_type": ["linear"], "rope_theta": 1e4}}, "rope scaling.type"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope theta NaN"),
        ({"wobble": 3}, "a key that llmc does not know: 'wobble'"),
        ({"wobble": None}, ""),
        ({"hidden_sise": 4096}, "did you mean 'hidden_size'"),
        ({f"k{i}": i for i in range(30)}, "30 keys that llmc does not know: .* and 10 more"),
        ({"vocab_size": 10**399}, "vocab_size 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN"),
        ({"num_hidden_layers": True}, "num_hidden_layers true"),
    ],
    ids=lambda c: "-".join(c)[:60] if isinstance(c, dict) else "",
)  # fmt: skip
def test_keys_that_a_llama_does_not_have_are_off_or_refused_by_name(change, words):
    config = published("llama2-7b") | change
    if not words:
        check_config(load_model("llama2-7b"), config)
        assert choose_variant(config) == "llama2-7b"
        variant_from_config(config, "mine")
        return
    with pytest.raises(UserError, match=words):
        check_config(load_model("llama2-7b"), config)
    with pytest.raises(UserError):
        choose_variant(config)
    with pytest.raises(UserError):
        variant_from_config(config, "mine")


def test_a_missing_key_means_what_its_model_type_means_by_it():
    """MistralConfig has a window of 4096 and 8 kv heads where config.json is silent."""
    config = {k: v for k, v in config_of("mistral").items() if k not in ("sliding_window", "num_key_value_heads")}
    model = model_of("mistral", config_of("mistral", sliding_window=None))
    with pytest.raises(DiagnosticError) as caught:
        check_config(model, config)
    (window,) = caught.value.diagnostics
    assert "sliding_window 4096" in window.message
    assert "absent, which means this" in window.found
    check_config(model, config | {"sliding_window": None})


def test_a_model_without_rules_refuses_what_nobody_checked():
    text = variant_from_config(published("llama2-7b", **TINY), "mine")
    model = build_model(loads(f"{text}config: {{rms_norm_eps: null, num_key_value_heads: null}}\n"))
    with pytest.raises(DiagnosticError) as caught:
        check_config(model, published("llama2-7b", **TINY))
    told = [d.message.split()[2] for d in caught.value.diagnostics]
    assert sorted(told) == ["num_key_value_heads", "rms_norm_eps"]


@pytest.mark.parametrize(
    ("said", "dtype"),
    [("float16", "float16"), ("torch.bfloat16", "bfloat16"), ("auto", None), (None, None), ("", "''"), ("int8", "int8"),
     (5, "5"), (["float16"], "float16"), (True, "true"), (float("nan"), "NaN")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_stored_dtype_is_one_of_ours_or_told(said, dtype, key):
    if dtype in ("float16", "bfloat16", None) and not isinstance(said, list):
        assert stored_dtype({key: said}) == dtype
        return
    with pytest.raises(UserError, match=f"config.json says dtype .*{dtype}.* float16"):
        stored_dtype({key: said})


def test_a_window_that_a_shorter_model_never_reaches_is_off():
    """Mistral 0.1 up to 4096 positions: its author says why the length differs."""
    config, _ = OTHERS["mistralai/Mistral-7B-v0.1"]
    text = variant_from_config({**config, "model_type": "llama", "sliding_window": None}, "mine")
    rules = "config: {model_type: {text: mistral}, max_position_embeddings: {ignore: within the window}}\n"
    check_config(build_model(loads(text.replace("32768", "4096") + rules)), config)
    with pytest.raises(DiagnosticError, match="sliding_window 4096"):
        check_config(build_model(loads(text.replace("32768", "4097") + rules)), config)


def test_what_a_model_type_has_without_a_key_is_told_by_init():
    with pytest.raises(UserError, match=r"model_type 'qwen2' .*biases of q, k and v"):
        variant_from_config(OTHERS["Qwen/Qwen2-7B"][0], "mine")


def test_an_unknown_key_is_passed_knowingly_by_the_model_or_by_a_flag(tmp_path, capsys):
    config = published("llama2-7b") | {"wobble": 3, "trainer step": {"a": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["init", "--model-path", str(tmp_path), "--name", "mine"]) == 1
    assert "--ignore-config wobble 'trainer step'" in capsys.readouterr().err
    words = ["--ignore-config", "wobble", "trainer step"]
    assert cli.main(["init", "--model-path", str(tmp_path), "--name", "mine", *words]) == 0
    text = capsys.readouterr().out
    check_config(build_model(loads(text)), config)
    with pytest.raises(DiagnosticError, match="wobble"):
        check_config(load_model("llama2-7b"), config)
    assert cli.main(["init", "--model-path", str(tmp_path), "--name", "mine", "--ignore-config", "wobbel"]) == 1
    assert "did you mean 'wobble'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 64}, "num_attention_heads 32 must be a multiple of num_key_value_heads 64"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_key_value_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to 2147483647, found 0"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None}, "multiple of num_attention_heads 7"),
        ({"num_attention_heads": -32}, "num_attention_heads must be a whole number"),
        ({"num_attention_heads": 32.5}, "num_attention_heads must be a whole number"),
        ({"num_attention_heads": 10**300}, "num_attention_heads must be a whole number from 1 to 2147483647"),
        ({"num_attention_heads": True}, "num_attention_heads must be a number larger than 0, found true"),
        ({"hidden_size": {"a": 1}}, "hidden_size must be a number"),
        ({"vocab_size": float("inf")}, "vocab_size must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"head_dim": 127}, "head_dim 127 must be even"),
        ({"max_position_embeddings": []}, "max_position_embeddings must be a number"),
    ],
    ids=lambda c: "-".join(map(str, c.values()))[:30] if isinstance(c, dict) else "",
)  # fmt: skip
def test_sizes_that_no_model_has_are_told_by_the_key(change, words):
    config = published("llama2-7b") | change
    for ask in (lambda: variant_from_config(config, "mine"), lambda: choose_variant(config)):
        with pytest.raises(UserError, match=words):
            ask()


VALUES = [None, True, False, 0, 1, -1, 3, 0.0, 1.5, 1e-6, 10**30, 10**320, float("nan"), float("inf"), "", "silu",
          "yarn", [], [1], [[1]], {}, {"type": "yarn"}, {"rope_type": "dynamic", "factor": 2.0}, {"a": {"b": [None]}},
          {"rope_type": "yarn", "factor": 2, "rope_theta": 1.0, "original_max_position_embeddings": 7.5},
          {"rope_theta": [], "rope_type": {}}, {"type": "yarn", "factor": None, "truncate": 3}]  # fmt: skip


def answer(ask: Callable[..., Any], *what: Any) -> tuple[Any, str]:
    """What comes back, and what is said instead."""
    try:
        return ask(*what), ""
    except UserError as error:
        return None, str(error)


def test_mutated_configurations_give_a_model_or_one_message(tmp_path):
    """Seeded. A model that comes out is whole and fits the file that it was made from."""
    seeded = random.Random(6)
    base = published("llama2-7b", **TINY)
    names = [*base, "rope_scaling", "rope_theta", "partial_rotary_factor", "sliding_window", "layer_types",
             "original_max_position_embeddings", "use_sliding_window", "quantization_config", "text_config",
             "wobble", "no_rope_layers", "query_pre_attn_scalar", "attention_multiplier", "dim_model_base",
             "torch_dtype", "", "a b\nc", "\u2028", "x" * 3000]  # fmt: skip
    model = build_model(loads(variant_from_config(base, "mine")))
    made = 0
    for _ in range(400):
        config = dict(base)
        for name in seeded.sample(names, seeded.randint(1, 3)):
            if seeded.random() < 0.3:
                config.pop(name, None)
            else:
                config[name] = seeded.choice([*VALUES, config.get(name)])
        (tmp_path / "config.json").write_text(json.dumps(config))
        config = read_config(tmp_path)
        text, problem = answer(variant_from_config, config, "mine")
        assert len(problem) < 20_000
        if text:
            made += 1
            check_config(build_model(loads(text)), config)
        assert len(answer(check_config, model, config)[1]) < 20_000
    assert 30 < made < 370


def test_a_mutated_configuration_chooses_a_model_or_gives_one_message():
    seeded = random.Random(7)
    for _ in range(25):
        config = published("llama2-7b") | {seeded.choice([*TINY, "rope_scaling", "wobble"]): seeded.choice(VALUES)}
        name, problem = answer(choose_variant, config)
        assert name == "llama2-7b" or "no model of the catalogue" in problem
