"""Rope tables against transformers. Needs torch and transformers."""

from __future__ import annotations

import random

import pytest
import torch

from llmc.compiler.diagnostics import UserError
from llmc.compiler.language.build import build_model
from llmc.compiler.language.checkpoint import check_config, rope_from_config, variant_from_config
from llmc.compiler.language.source import loads
from llmc.runtime.rope import rope_frequencies, rope_tables

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
# type, settings that both sides spell alike, trained context, positions of the table, theta, head_dim
CASES = [
    ("default", {}, 2048, 2048, 1e4, 64),
    ("default", {}, 4096, 4096, 5e5, 128),
    ("linear", {"factor": 2.5}, 2048, 5120, 1e4, 128),
    ("dynamic", {"factor": 2.0}, 2048, 1024, 1e4, 64),
    ("dynamic", {"factor": 4.0}, 512, 512, 1e5, 128),
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


def some_settings(kind: str, seeded: random.Random) -> dict:
    """rope_parameters as somebody may write them; those of other types among them."""
    rope: dict = {"rope_type": kind, "rope_theta": seeded.choice([10.0, 1e4, 5e5, 1e6, 12345.5])}
    if kind != "default":
        rope["factor"] = seeded.choice([1.0, 1.5, 2.0, 8.0, 40.0])
    if kind == "llama3":
        low = seeded.choice([0.5, 1.0, 2.0])
        rope |= {"low_freq_factor": low, "high_freq_factor": low * seeded.choice([0.5, 1.0, 2.0, 4.0, 16.0])}
    if kind in ("llama3", "yarn", "dynamic") and seeded.random() < 0.7:
        rope["original_max_position_embeddings"] = seeded.choice([16, 512, 4096])
    if kind == "yarn":
        for key, values in {
            "beta_fast": [32, 8.0, 0, None], "beta_slow": [1, 0.5, 2], "truncate": [True, False, None],
            "attention_factor": [1.0, 1.3], "mscale": [1.0, 0.707, 0], "mscale_all_dim": [1.0, 0.5],
        }.items():  # fmt: skip
            if seeded.random() < 0.4:
                rope[key] = seeded.choice(values)
        if seeded.random() < 0.1:
            rope["factor"] = None
    return rope


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("seed", range(3))
def test_random_settings_of_config_json_become_the_frequencies_of_transformers(kind, seed):
    """From the file's words to frequencies: reading them, the variant that `llmc init` writes, and the tables."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    seeded = random.Random(seed)
    for _ in range(25):
        settings, head_dim = some_settings(kind, seeded), seeded.choice([2, 8, 16, 64, 80, 128])
        positions = seeded.choice([32, 4096, 131072])
        config = LlamaConfig(
            hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=positions,
            rope_parameters=dict(settings),
        )  # fmt: skip
        make = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
        if kind == "dynamic" and head_dim == 2:
            continue  # transformers divides by head_dim - 2
        length = seeded.randint(1, positions)
        expected, expected_factor = make(config, seq_len=length)
        said = {"max_position_embeddings": positions, "rope_parameters": settings}
        got, factor = rope_frequencies(rope_from_config(said), head_dim=head_dim, positions=length)
        # The blends of llama3 weigh with a difference of turns over a difference of factors.
        slack = 2e-5 if kind == "llama3" else 4e-6
        torch.testing.assert_close(got, expected, rtol=slack, atol=0)
        assert factor == pytest.approx(expected_factor, rel=1e-12)
        saved = config.to_dict() | {"rope_parameters": settings}
        if all(value != 0 for value in settings.values()):
            model = build_model(loads(variant_from_config(saved, "mine")))
            check_config(model, saved)
            again, factor = rope_frequencies(model.graph.rope, head_dim=head_dim, positions=length)
            torch.testing.assert_close(again, expected, rtol=slack, atol=0)
            assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_tables_of_a_shorter_run_are_the_first_rows_of_those_of_a_longer_one(kind):
    """--max-position-embeddings changes no answer."""
    settings = {"linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN}.get(kind, {})
    rope = ours(kind, settings, 512, 1e4)
    short, long = (rope_tables(rope, head_dim=16, positions=n, dtype=torch.float32) for n in (64, 512))
    assert all(torch.equal(a, b[:64]) for a, b in zip(short, long, strict=True))


def test_dynamic_reads_no_length_but_max_position_embeddings():
    """`original_max_position_embeddings` is for other types; the answer would depend on the engine's limit."""
    config = {"max_position_embeddings": 64,
              "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}}  # fmt: skip
    assert rope_from_config(config)["scaling"] == {"type": "dynamic", "factor": 2.0, "original_max_positions": 64}


def test_dynamic_beyond_the_trained_length_is_refused():
    rope = ours("dynamic", {"factor": 2.0}, 64, 1e4)
    with pytest.raises(UserError, match="up to the trained length, 64 positions; asked for: 65"):
        rope_tables(rope, head_dim=16, positions=65, dtype=torch.float32)


def test_a_model_that_goes_beyond_it_is_refused_where_it_is_written():
    text = (
        "extends: llama2-7b\nname: long\nsizes: {max_positions: 8192}\n"
        "rope: {scaling: {type: dynamic, factor: 2.0, original_max_positions: 4096}}\n"
    )
    with pytest.raises(UserError, match=r"E106 .*max_positions 8192 is beyond the trained length"):
        build_model(loads(text))


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
        ({"scaling": {"type": "longrope"}}, 64, ["longrope"]),
        ({"theta": 1.0, "scaling": {"type": "yarn", "factor": 2.0, "original_max_positions": 8}}, 64, ["theta", "1"]),
    ],
)
def test_bad_settings_are_named(rope, head_dim, words):
    with pytest.raises(UserError) as error:
        rope_tables(rope, head_dim=head_dim, positions=4, dtype=torch.float32)
    assert all(word in str(error.value) for word in words)
