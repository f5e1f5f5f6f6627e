"""Models of other families than llama's own, as transformers has them, traced with their own names of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from equal_ranks import shrunk
from tiny import LENGTHS, save_model, sequences
from traced import trace

from llmc.compiler.language.source import catalogue

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
COMMON = """
extends: families/llama
name: other
sizes: {vocab: 96, hidden: 64, ffn: 160, layers: 2, heads: 4, kv_heads: 2, max_positions: 256}
"""
QKV_BIASES = """
blocks:
  attention:
    nodes:
      qkv:
        parts:
          q: {bias: "model.layers.{i}.self_attn.q_proj.bias"}
          k: {bias: "model.layers.{i}.self_attn.k_proj.bias"}
          v: {bias: "model.layers.{i}.self_attn.v_proj.bias"}
"""
PACKED = """
blocks:
  attention:
    nodes:
      qkv:
        op: linear
        x: x
        tp: column
        weight: "model.layers.{i}.self_attn.qkv_proj.weight"
        parts:
          q: {out: heads * head_dim, heads: heads}
          k: {out: kv_heads * head_dim, heads: kv_heads}
          v: {out: kv_heads * head_dim, heads: kv_heads}
  mlp:
    nodes:
      gate_up:
        op: linear
        x: x
        tp: column
        weight: "model.layers.{i}.mlp.gate_up_proj.weight"
        parts: {gate: {out: ffn}, up: {out: ffn}}
"""
FAMILIES = {
    "mistral": (transformers.MistralConfig, {"sliding_window": None}, COMMON),
    "qwen2": (transformers.Qwen2Config, {}, COMMON + QKV_BIASES),
    "phi3": (transformers.Phi3Config, {}, COMMON + PACKED),
}


def save(folder: Path, family: str) -> str:
    """A random model of the family; the text of its variant."""
    config, more, text = FAMILIES[family]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **more)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)
    return text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_family_that_is_right_stays_inside_its_budgets(family, dtype, world_size, tmp_path):
    text = save(tmp_path, family)
    nodes = trace(
        tmp_path, text, sequences(96), LENGTHS, dtype=dtype, attention="paged", fusions=(), world_size=world_size
    )
    assert [node["name"] for node in nodes if node["counterpart"] is None] == []
    assert [(n["phase"], n["name"], n["relative"], n["budget"], n["worst"]) for n in nodes if not n["ok"]] == []


def test_parts_of_a_packed_tensor_are_columns_of_one_module(tmp_path):
    nodes = trace(tmp_path, save(tmp_path, "phi3"), sequences(96), LENGTHS, dtype="float32", attention="paged")
    said = {node["name"]: node["counterpart"] for node in nodes}
    assert said["layers.1.attn.qkv.split.k"] == "output of model.layers.1.self_attn.qkv_proj (some columns)"
    assert said["layers.1.attn.core"] == "input of model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("name", catalogue())
def test_every_catalogue_model_shrunk_to_test_size_stays_inside_its_budgets(name, tmp_path):
    case = shrunk(name)
    model = save_model(tmp_path, case.config)
    tokens = sequences(model.config.vocab_size)
    nodes = trace(tmp_path, case.text, tokens, LENGTHS, dtype="float32", attention="paged")
    assert [(n["phase"], n["name"], n["relative"], n["budget"], n["worst"]) for n in nodes if not n["ok"]] == []
