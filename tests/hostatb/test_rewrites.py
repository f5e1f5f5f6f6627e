"""Rewritten steps give the numbers of the plain kernels: one unit in the last place in 16 bit, rounding in float32."""

from __future__ import annotations

import pytest
import torch

from llmc.runtime import hostatb
from llmc.runtime.hostatb import graph as graph_module
from llmc.runtime.hostatb import rewrites

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(TOLERANCE)


def linear(dtype, rows, bias):
    inputs = [torch.randn(rows, 64), torch.randn(96, 64) / 8, *([torch.randn(96)] if bias else [])]
    return hostatb.LinearParam(has_bias=bias), [t.to(dtype) for t in inputs], 1


def norm(dtype, rows, prenorm):
    types = hostatb.RmsNormParam.RmsNormType
    x, residual, gamma = torch.randn(rows, 64), torch.randn(rows, 64), torch.rand(64) + 0.5
    if prenorm:
        pre = hostatb.RmsNormParam.PreNormParam(epsilon=1e-6)
        param = hostatb.RmsNormParam(layer_type=types.RMS_NORM_PRENORM, pre_norm_param=pre)
        return param, [t.to(dtype) for t in (x, residual, gamma)], 2
    plain = hostatb.RmsNormParam.NormParam(epsilon=1e-6)
    return hostatb.RmsNormParam(layer_type=types.RMS_NORM_NORM, norm_param=plain), [x.to(dtype), gamma.to(dtype)], 1


def rope(dtype, rows, interleaved):
    angles = torch.rand(rows, 32)
    tables = [f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin)]
    inputs = [t.to(dtype) for t in (torch.randn(rows, 256), torch.randn(rows, 128), *tables)]
    param = hostatb.RopeParam(rotary_coeff=64 if interleaved else 2)
    return param, [*inputs, torch.tensor([rows], dtype=torch.int32)], 2


CASES = [
    pytest.param(make, option, id=f"{make.__name__}-{word}")
    for make, words in ((linear, ("plain", "bias")), (norm, ("norm", "prenorm")), (rope, ("halves", "pairs")))
    for option, word in zip((False, True), words, strict=True)
]


def run(param, inputs, outputs):
    names = [f"in{i}" for i in range(len(inputs))]
    results = [f"out{i}" for i in range(outputs)]
    builder = hostatb.GraphBuilder("one")
    builder.set_input_output(names, results)
    builder.add_operation(hostatb.Operation(param, chip="host"), names, results)
    return builder.build().forward(inputs)


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "option"), CASES)
def test_a_rewritten_step_gives_the_numbers_of_the_kernel(make, option, dtype, rows, monkeypatch):
    torch.manual_seed(rows)
    case = make(dtype, rows, option)
    fast = run(*case)
    monkeypatch.setattr(graph_module, "rewrite", lambda steps: steps)
    plain = run(*case)
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_weight_that_changes_in_place_is_packed_anew():
    param, (x, weight), outputs = linear(torch.bfloat16, 1, False)
    run(param, [x, weight], outputs)
    weight.mul_(2)
    doubled = run(param, [x, weight], outputs)[0]
    torch.testing.assert_close(doubled, run(param, [x, weight.clone()], outputs)[0])


def test_where_memory_is_short_weights_are_used_as_they_are(monkeypatch):
    monkeypatch.setattr(rewrites, "free_memory", lambda: 1 << 20)
    param, (x, weight), outputs = linear(torch.bfloat16, 1, False)
    torch.testing.assert_close(run(param, [x, weight], outputs)[0], torch.nn.functional.linear(x, weight))
    assert rewrites._packed(weight) is None


@pytest.mark.parametrize("totals", [(7, 7, 7), (3, 7, 1)], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_decode_in_one_call_is_the_kernel_and_reads_nothing_beyond_a_sequences_end(dtype, totals, monkeypatch):
    """Rows beyond the ends hold NaN: a read of one shows."""
    torch.manual_seed(1)
    calc = hostatb.SelfAttentionParam.CalcType.DECODER
    param = hostatb.SelfAttentionParam(head_num=4, kv_head_num=2, qk_scale=0.25, calc_type=calc)
    q, k, v = (torch.randn(3, n).to(dtype) for n in (64, 32, 32))
    caches = [torch.randn(1, 3, 16, 32).to(dtype) for _ in range(2)]
    for cache in caches:
        for row, total in enumerate(totals):
            cache[0, row, total - 1 :] = float("nan")
    lengths = [torch.tensor(values, dtype=torch.int32) for values in (totals, (1, 1, 1), (0,))]
    results = []
    for change in (None, lambda steps: steps):
        if change:
            monkeypatch.setattr(graph_module, "rewrite", change)
        mine = [c.clone() for c in caches]
        results.append((run(param, [q, k, v, *mine, *lengths], 1)[0], *mine))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(
            fast.float(), plain.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True
        )
    assert not results[0][0].isnan().any()


@pytest.mark.parametrize("lengths", [(130, 130), (130, 3), (5,), (130,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_decode_in_one_call_is_the_kernel_also_in_a_view_of_a_larger_cache(dtype, lengths, monkeypatch):
    torch.manual_seed(2)
    batch = len(lengths)
    param = hostatb.PagedAttentionParam(head_num=4, kv_head_num=2, qk_scale=0.25)
    q = torch.randn(batch, 4, 16).to(dtype)
    caches = [torch.randn(9, 128, 2, 16).to(dtype)[1:] for _ in range(2)]
    tables = torch.tensor([[6, 2], [1, 5]][:batch], dtype=torch.int32)
    inputs = [q, *caches, tables, torch.tensor(lengths, dtype=torch.int32)]
    fast = run(param, inputs, 1)[0]
    monkeypatch.setattr(graph_module, "rewrite", lambda steps: steps)
    close(fast, run(param, inputs, 1)[0], dtype)


def close(a, b, dtype, **more) -> None:
    """Attention rounds twice, the weights of the sum and the result, and the two ways may differ in both."""
    torch.testing.assert_close(a.float(), b.float(), rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype], **more)
