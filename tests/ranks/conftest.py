"""A checkpoint small enough to be loaded by ranks in no time."""

from __future__ import annotations

import pytest
import torch
from llmc.compiler.checkpoint import read_config, variant_from_config
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> list[str]:
    """Flags for a llama of 2 layers whose tokens are the words w0 to w63."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "mine.yaml").write_text(variant_from_config(read_config(path), "mine"))
    return ["--model-path", str(path), "--graph", str(path / "mine.yaml"), "--dtype", "float32"]
