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
    assert rewrites.packed(weight) is None


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


# ---- whichever way is the fastest, it gives the kernel's numbers


@pytest.fixture
def force(monkeypatch):
    """force("plain"): wherever there is a choice, this candidate."""

    def choose(way: str) -> None:
        monkeypatch.setattr(
            rewrites.CHOICES, "pick", lambda question, names, prepare: way if way in names else names[0]
        )

    return choose


@pytest.mark.parametrize("way", ["packed", *rewrites.WAYS])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_way_of_a_product_is_the_kernels(dtype, rows, bias, way, force, monkeypatch):
    torch.manual_seed(rows)
    force(way)
    case = linear(dtype, rows, bias)
    fast = run(*case)[0]
    monkeypatch.setattr(graph_module, "rewrite", lambda steps: steps)
    torch.testing.assert_close(fast, run(*case)[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_measured_are_calls_that_work(dtype, rows, monkeypatch):
    def prepared(question, names, prepare):
        calls = prepare()
        assert sorted(calls) == sorted(names)
        assert all(torch.is_tensor(call()) for call in calls.values())
        return names[0]

    monkeypatch.setattr(rewrites.CHOICES, "pick", prepared)
    rewrites.linear_way(dtype, rows, 300, 200)
    rewrites.query_shape(dtype, rows, 8, 2, 32)
    rewrites.prefill_way(dtype, 8, 2, 32, rows)


LAYER = """x residual gamma w_o w_gate_up w_down -> y total"""


def layer():
    """Two products with what follows them: residual and norm, and the gated activation."""
    types = hostatb.RmsNormParam.RmsNormType
    pre = hostatb.RmsNormParam.PreNormParam(epsilon=1e-6)
    builder = hostatb.GraphBuilder("layer")
    names, results = LAYER.split(" -> ")
    builder.set_input_output(names.split(), results.split())

    def add(param, ins, outs):
        builder.add_operation(hostatb.Operation(param, chip="host"), ins.split(), outs.split())

    product = hostatb.LinearParam(has_bias=False)
    norm = hostatb.RmsNormParam(layer_type=types.RMS_NORM_PRENORM, pre_norm_param=pre)
    gated = hostatb.ActivationParam(activation_type=hostatb.ActivationType.ACTIVATION_SWIGLU_FORWARD)
    add(product, "x w_o", "o")
    add(norm, "o residual gamma", "n sum")
    add(product, "n w_gate_up", "both")
    add(gated, "both", "act")
    add(product, "act w_down", "down")
    add(norm, "down sum gamma", "y total")
    return builder.build()


def layer_inputs(dtype, rows, hidden=256, ffn=320):
    sizes = [(rows, hidden), (rows, hidden), (hidden,), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]
    return [(torch.randn(size) / (1 if i < 3 else 16)).to(dtype) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("way", ["packed", "plain"])
@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_joined_with_what_follows_are_as_near_to_the_exact_numbers(dtype, rows, way, force, monkeypatch):
    """Joined, a rounding is left out and another made elsewhere: the distance from float64 is what must not grow."""
    torch.manual_seed(rows)
    force(way)
    graph, kernels = layer(), layer()
    with monkeypatch.context() as patch:
        patch.setattr(graph_module, "rewrite", lambda steps: steps)
        kernels.forward(layer_inputs(dtype, rows))  # planned, for the shapes that follow
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(1 + 12 // rows):
        inputs = layer_inputs(dtype, rows)
        exact = exact_layer(*(t.double() for t in inputs))
        for i, tensors in enumerate((graph.forward(inputs), kernels.forward(inputs))):
            for j, (one, wanted) in enumerate(zip(tensors, exact, strict=True)):
                assert (one.dtype, one.shape) == (dtype, wanted.shape)
                errors[i, j] += (one.double() - wanted).square().sum()
                torch.testing.assert_close(one.double(), wanted, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    assert (errors[0].sqrt() <= 1.1 * errors[1].sqrt()).all()


def exact_layer(x, residual, gamma, w_o, w_gate_up, w_down):
    def norm(total):
        return total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gamma

    total = x @ w_o.T + residual
    gate, up = (norm(total) @ w_gate_up.T).chunk(2, -1)
    total = (torch.nn.functional.silu(gate) * up) @ w_down.T + total
    return norm(total), total


def test_joined_products_make_do_without_copies_where_memory_is_short(force, monkeypatch):
    force("packed")
    monkeypatch.setattr(rewrites, "free_memory", lambda: 1 << 20)
    inputs = layer_inputs(torch.bfloat16, 3)
    for one, wanted in zip(layer().forward(inputs), exact_layer(*(t.double() for t in inputs)), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=2**-5, atol=2**-5)
    assert all(rewrites.packed(weight) is None for weight in inputs[3:])


@pytest.mark.parametrize("way", ["whole", "pieces", "kernel"])
@pytest.mark.parametrize("lengths", [(5,), (300,), (130, 3, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prefill_attention_in_16_bit_is_the_kernel(dtype, lengths, way, force, monkeypatch):
    torch.manual_seed(3)
    force(way)
    types, tokens = hostatb.SelfAttentionParam, sum(lengths)
    param = types(
        head_num=4, kv_head_num=2, qk_scale=0.25, calc_type=types.CalcType.PA_ENCODER, is_triu_mask=1,
        mask_type=types.MaskType.MASK_TYPE_NORM_COMPRESS,
    )  # fmt: skip
    q, k, v = (torch.randn(tokens, n).to(dtype) for n in (64, 32, 32))
    above = torch.ones(128, 128).triu(1)
    causal = (above if dtype == torch.bfloat16 else above * -65504).to(dtype)
    counts = torch.tensor(lengths, dtype=torch.int32)
    for mask in (causal, causal.roll(1, 0)):  # only the first is what "causal" says
        fast = run(param, [q, k, v, mask, counts], 1)[0]
        with monkeypatch.context() as patch:
            patch.setattr(graph_module, "rewrite", lambda steps: steps)
            close(fast, run(param, [q, k, v, mask, counts], 1)[0], dtype)
    with pytest.raises(hostatb.AtbError, match="does not sum up"):
        run(param, [q, k, v, causal, counts + 1], 1)


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_split_product_that_turns_and_goes_to_the_cache_is_the_kernels(dtype, rows, monkeypatch):
    """What later steps write leaves the parts, which are views of one product, as they are."""
    builder = hostatb.GraphBuilder("qkv")
    builder.set_input_output(["qkv", "cos", "sin", "n", "kc", "vc", "slots"], ["q", "k", "v2"])
    add = hostatb.ElewiseParam(elewise_type=hostatb.ElewiseParam.ElewiseType.ELEWISE_ADD)
    for name in ("k", "v"):
        builder.reshape(name, lambda s: [s[0], 2, 32], f"{name}3")
    for param, ins, outs in (
        (hostatb.SplitParam(split_dim=1, split_num=3, split_sizes=[128, 64, 64]), "qkv", "q0 k0 v"),
        (hostatb.RopeParam(rotary_coeff=2), "q0 k0 cos sin n", "q k"),
        (hostatb.ReshapeAndCacheParam(), "k3 v3 kc vc slots", "kc vc"),
        (add, "v v", "v2"),
    ):
        builder.add_operation(hostatb.Operation(param, chip="host"), ins.split(), outs.split())
    angles = torch.rand(rows, 32)
    tensors = [torch.randn(rows, 256), angles.cos(), angles.sin()]
    caches = [torch.zeros(3, 128, 2, 32, dtype=dtype) for _ in range(4)]
    fixed = [t.to(dtype) for t in tensors] + [torch.tensor([rows], dtype=torch.int32)]
    slots = torch.randperm(384)[:rows].to(torch.int32)
    graph = builder.build()
    fast = graph.forward([*fixed, *caches[:2], slots])
    assert all(t.is_contiguous() for t in fast)
    monkeypatch.setattr(graph_module, "rewrite", lambda steps: steps)
    graph._plans.clear()
    plain = graph.forward([*fixed, *caches[2:], slots])
    for a, b in zip((*fast, *caches[:2]), (*plain, *caches[2:]), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def close(a, b, dtype, **more) -> None:
    """Attention rounds twice, the weights of the sum and the result, and the two ways may differ in both."""
    torch.testing.assert_close(a.float(), b.float(), rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype], **more)
