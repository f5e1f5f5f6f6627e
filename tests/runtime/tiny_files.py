"""Small checkpoints: a model as a GGUF file, vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

CORPUS = ["the quick brown fox jumps over the lazy dog", "Hello world, hello there!", "naïve café 你好 😀 ok"] * 20


def byte_level() -> Fast:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    return fast


# The widest blocks have 256 values, so that is the smallest hidden size that holds every type.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
SMALL = {**SIZES, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
GGUF_NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
]


def tiny_model(sizes: dict[str, Any], *, tied: bool = False, **more) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(**{**sizes, **more}, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path, sizes: dict[str, Any], tensors: dict[str, Any], *, meta: dict | None = None, architecture: str = "llama"
) -> Path:
    """`tensors`: GGUF name -> array, or (raw bytes, type). `meta` adds or replaces keys; None leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "llama.context_length": sizes["max_position_embeddings"],
        "llama.embedding_length": sizes["hidden_size"],
        "llama.block_count": sizes["num_hidden_layers"],
        "llama.feed_forward_length": sizes["intermediate_size"],
        "llama.attention.head_count": sizes["num_attention_heads"],
        "llama.attention.head_count_kv": sizes["num_key_value_heads"],
        "llama.attention.key_length": sizes["head_dim"],
        "llama.attention.value_length": sizes["head_dim"],
        "llama.rope.dimension_count": sizes["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": sizes["rms_norm_eps"],
        "llama.rope.freq_base": sizes["rope_theta"],
        **(meta or {}),
    }
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, numpy.ndarray]:
    """The state dict as llama.cpp's converter would store it: its names, q and k interleaved for its rope."""
    config, out = model.config, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        for part, heads in ((".q_proj.", config.num_attention_heads), (".k_proj.", config.num_key_value_heads)):
            if part in name:  # [heads, half, pair, ...] -> [heads, pair, half, ...]
                split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                array = split.swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in GGUF_NAMES:
            name = name.replace(ours, theirs)
        out[name] = numpy.ascontiguousarray(array)
    return out


BYTES = {f"tokenizer.ggml.{key}": value for key, value in {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [chr(c) for c in range(33, 127)] + ["Ġ", "<s>", "</s>", "Ġa"] + [f"[{i}]" for i in range(320 - 98)],
    "token_type": [1] * 95 + [3, 3, 1] + [1] * (320 - 98),
    "merges": ["Ġ a"],
    "bos_token_id": 95,
    "eos_token_id": 96,
}.items()}  # fmt: skip
