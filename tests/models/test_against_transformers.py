"""A graph means what the model means: logits of the generated code against Hugging Face transformers."""

from __future__ import annotations

import pytest
import torch
from equal_ranks import shrunk
from tiny import CONFIGS, LENGTHS, load, reference, save_checkpoint, save_model, sequences, variant

from llmc.compiler.language.source import catalogue

ATTENTION = ("paged", "flash")


@pytest.mark.parametrize("fusions", [(), ("swiglu", "add_norm")], ids=["plain", "fused"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_equal_transformers_at_prefill_and_at_every_decode_step(name, attention, fusions, tmp_path):
    model = save_checkpoint(tmp_path, name)
    tokens = sequences(model.config.vocab_size)
    ours = load(tmp_path, tmp_path, attention=attention, dtype="float32", fusions=fusions).logits(tokens, LENGTHS)
    for a, b in zip(ours, reference(model, tokens), strict=True):
        assert a.shape == b.shape
        # float32 keeps 24 bits; two layers of sums of 160 terms lose a few of them
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "biases"])
def test_16_bit_error_is_at_most_a_quarter_above_that_of_transformers(name, dtype, attention, tmp_path):
    exact, theirs, ours = 0.0, 0.0, 0.0
    for seed in range(4):  # one model's error is luck; the sum over a few is not
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = save_checkpoint(folder, name, seed)
        tokens = sequences(model.config.vocab_size)
        truth = torch.cat(reference(model, tokens))
        low = torch.cat(reference(model, tokens, getattr(torch, dtype)))
        mine = torch.cat(load(folder, folder, attention=attention, dtype=dtype).logits(tokens, LENGTHS)).float()
        exact += truth.square().sum().item()
        theirs += (low - truth).square().sum().item()
        ours += (mine - truth).square().sum().item()
    assert theirs > 0
    assert (ours / exact) ** 0.5 <= 1.25 * (theirs / exact) ** 0.5


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_context_beyond_one_cache_block_and_the_compressed_mask_equals_transformers(attention, tmp_path):
    model = save_checkpoint(tmp_path, "gqa")
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (200, 140)]
    ours = load(tmp_path, tmp_path, attention=attention, dtype="float32").logits(tokens, [180, 126])
    with torch.no_grad():
        for t, n, a in zip(tokens, (180, 126), ours, strict=True):
            b = model(torch.tensor([t])).logits[0, n - 1 :]
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", catalogue())
def test_every_catalogue_model_shrunk_to_test_size_equals_transformers(name, attention, tmp_path):
    case = shrunk(name)
    model = save_model(tmp_path, case.config)
    tokens = sequences(model.config.vocab_size)
    ours = load(tmp_path, tmp_path, case.text, attention=attention, dtype="float32").logits(tokens, LENGTHS)
    for a, b in zip(ours, reference(model, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


def test_a_head_in_float32_gives_the_logits_that_bfloat16_rounds(tmp_path):
    save_checkpoint(tmp_path, "gqa").bfloat16().save_pretrained(tmp_path)  # so that both heads hold the same numbers
    tokens = sequences(96)
    options = {"attention": "paged", "dtype": "bfloat16"}
    plain = torch.cat(load(tmp_path, tmp_path, variant(tmp_path), **options).logits(tokens, LENGTHS))
    text = variant(tmp_path) + "policy: [{nodes: lm_head, dtype: float32}]\n"
    wide = torch.cat(load(tmp_path, tmp_path, text, **options).logits(tokens, LENGTHS))
    assert (plain.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    # Sums of 64 terms that lie between two bfloat16 numbers may round either way; hardly any does.
    assert (wide.bfloat16() != plain).float().mean() < 0.001
    torch.testing.assert_close(wide.bfloat16(), plain, rtol=2**-7, atol=1e-5)


def test_layers_in_float32_among_bfloat16_ones_bring_the_logits_nearer_to_the_truth(tmp_path):
    policy = 'policy: [{nodes: "layers.*.mlp.*", layers: "0-1", dtype: float32}, {nodes: lm_head, dtype: float32}]\n'
    errors = {"": 0.0, policy: 0.0}
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = save_checkpoint(folder, "gqa", seed)
        tokens = sequences(96)
        truth = torch.cat(reference(model, tokens))
        for extra in errors:
            ours = load(folder, folder, variant(folder) + extra, attention="paged", dtype="bfloat16")
            errors[extra] += (torch.cat(ours.logits(tokens, LENGTHS)).float() - truth).square().sum().item()
    assert errors[policy] < errors[""]
