"""Rope tables against transformers. Needs torch and transformers."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.diagnostics import UserError
from llmc.runtime.rope import rope_frequencies, rope_tables

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
# type, settings that both sides spell alike, trained context, positions of the table, theta, head_dim
CASES = [
    ("default", {}, 2048, 2048, 1e4, 64),
    ("default", {}, 4096, 4096, 5e5, 128),
    ("linear", {"factor": 2.5}, 2048, 5120, 1e4, 128),
    ("dynamic", {"factor": 2.0}, 2048, 1024, 1e4, 64),
    ("dynamic", {"factor": 2.0}, 2048, 4096, 1e4, 64),
    ("dynamic", {"factor": 4.0}, 512, 4096, 1e5, 128),
    ("llama3", LLAMA3, 8192, 16384, 5e5, 128),
    ("llama3", LLAMA3 | {"factor": 32.0}, 8192, 16384, 5e5, 64),
    ("yarn", YARN, 4096, 16384, 1e4, 128),
    ("yarn", YARN | {"truncate": False}, 4096, 16384, 1e6, 128),
    ("yarn", YARN | {"attention_factor": 1.5}, 4096, 16384, 1e4, 64),
    ("yarn", YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, 4096, 16384, 1e4, 64),
    ("yarn", {"factor": 1.0}, 4096, 4096, 1e4, 64),
]


def theirs(kind: str, settings: dict, original: int, positions: int, theta: float, head_dim: int):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": kind, "rope_theta": theta} | settings
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = original
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=original if kind == "dynamic" else positions,
        rope_parameters=rope,
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=positions)


def ours(kind: str, settings: dict, original: int, theta: float, pairing: str = "half") -> dict:
    scaling = {"type": kind, "original_max_positions": original} | settings
    return {"theta": theta, "pairing": pairing, "scaling": scaling}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[5]}-{c[3]}")
def test_frequencies_and_factor_equal_transformers(case):
    kind, settings, original, positions, theta, head_dim = case
    expected, expected_factor = theirs(*case)
    inv_freq, factor = rope_frequencies(ours(kind, settings, original, theta), head_dim=head_dim, positions=positions)
    # transformers evaluates the power in float32: a few roundings of 2^-24 each
    torch.testing.assert_close(inv_freq, expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
def test_tables_equal_the_rotary_embedding_of_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {"default": {}, "llama3": LLAMA3, "yarn": YARN}[kind]
    rope = {"rope_type": kind, "rope_theta": 1e4} | settings
    if kind != "default":
        rope["original_max_position_embeddings"] = 64
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=256, rope_parameters=rope
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1), torch.arange(256)[None])
    got_cos, got_sin = rope_tables(ours(kind, settings, 64, 1e4), head_dim=32, positions=256, dtype=torch.float32)
    # one rounding of the frequency, 6e-8, times position 256
    torch.testing.assert_close(got_cos, cos[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(got_sin, sin[0], rtol=0, atol=5e-5)


def test_interleaved_holds_each_frequency_twice_in_a_row():
    half, _ = rope_tables({"theta": 1e4, "pairing": "half"}, head_dim=8, positions=5, dtype=torch.float32)
    inter, _ = rope_tables({"theta": 1e4, "pairing": "interleaved"}, head_dim=8, positions=5, dtype=torch.float32)
    assert torch.equal(inter[:, 0::2], half[:, :4])
    assert torch.equal(inter[:, 1::2], half[:, :4])


def test_low_precision_tables_are_the_float32_tables_rounded_once():
    full = rope_tables({"theta": 1e4}, head_dim=16, positions=300, dtype=torch.float32)
    low = rope_tables({"theta": 1e4}, head_dim=16, positions=300, dtype=torch.bfloat16)
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in zip(full, low, strict=True))


@pytest.mark.parametrize(
    ("rope", "head_dim", "words"),
    [
        ({"scaling": {"type": "lama3"}}, 64, ["lama3", "did you mean 'llama3'"]),
        ({"scaling": {"type": "linear"}}, 64, ["linear", "'factor'"]),
        ({"pairing": "both"}, 64, ["both", "half or interleaved"]),
        ({}, 63, ["even head_dim", "63"]),
    ],
)
def test_bad_settings_are_named(rope, head_dim, words):
    with pytest.raises(UserError) as error:
        rope_tables(rope, head_dim=head_dim, positions=4, dtype=torch.float32)
    assert all(word in str(error.value) for word in words)
