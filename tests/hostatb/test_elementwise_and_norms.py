"""What the vendor's test vectors leave out, against torch's own functions and transformers' rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from llmc.runtime import hostatb as atb

Elewise, Activation = atb.ElewiseParam.ElewiseType, atb.ActivationType
Rms, Layer = atb.RmsNormParam, atb.LayerNormParam


def run(param: Any, *tensors: torch.Tensor, chip: str = "Ascend910B") -> list[torch.Tensor]:
    return atb.Operation(param, chip=chip).forward(list(tensors))


def activation(kind: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return run(atb.ActivationParam(activation_type=kind, **kwargs), x)[0]


def test_activations_round_the_float32_function_once() -> None:
    x = torch.randn(4, 32).bfloat16()
    wide, erf = x.float(), atb.ActivationParam.GeLUMode.NONE_MODE
    for ours, theirs in (
        (activation(Activation.ACTIVATION_RELU, x), functional.relu(wide)),
        (activation(Activation.ACTIVATION_GELU, x, gelu_mode=erf), functional.gelu(wide)),
        (activation(Activation.ACTIVATION_SWISH, x, scale=2.0), wide * torch.sigmoid(2 * wide)),
        (activation(Activation.ACTIVATION_SWIGLU_FORWARD, x), functional.silu(wide[:, :16]) * wide[:, 16:]),
    ):
        assert torch.equal(ours, theirs.bfloat16())


def test_swiglu_backward_is_the_gradient_of_forward() -> None:
    x, gradient = torch.randn(3, 16, requires_grad=True), torch.randn(3, 8)
    gate, up = x.chunk(2, -1)
    (functional.silu(gate) * up).backward(gradient)
    (ours,) = run(atb.ActivationParam(activation_type=Activation.ACTIVATION_SWIGLU_BACKWARD), gradient, x.detach())
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dynamic_quantisation_restores_x_within_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64).to(dtype)
    q, scale = run(atb.ElewiseParam(elewise_type=Elewise.ELEWISE_DYNAMIC_QUANT), x)
    assert q.abs().amax(-1).eq(127).all()
    assert ((q * scale[:, None] - x.float()).abs() <= scale[:, None] * 0.5001).all()


def test_a_row_of_zeros_is_quantised_to_zeros() -> None:
    q, scale = run(atb.ElewiseParam(elewise_type=Elewise.ELEWISE_DYNAMIC_QUANT), torch.zeros(2, 32).half())
    assert not q.any()
    assert not scale.any()


def test_per_channel_quantisation_clamps_and_takes_an_empty_offset() -> None:
    x = torch.tensor([[-1000.0, 0.5, 1.5, 1000.0] * 8]).bfloat16()
    param = atb.ElewiseParam(elewise_type=Elewise.ELEWISE_QUANT_PER_CHANNEL)
    (q,) = run(param, x, torch.ones(1).bfloat16(), torch.empty(0, dtype=torch.int8))
    assert q[0, :4].tolist() == [-128, 0, 2, 127]
    (q,) = run(param, x, torch.ones(1).bfloat16(), torch.tensor([3], dtype=torch.int8))
    assert q[0, :4].tolist() == [-128, 4, 4, 127]


def test_quantisation_can_stop_at_minus_127(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASDOPS_QUANT_MIN_NEG_127", "1")
    param = atb.ElewiseParam(elewise_type=Elewise.ELEWISE_QUANT_PER_CHANNEL)
    (q,) = run(param, torch.full((1, 32), -999.0).half(), torch.ones(1).half(), torch.zeros(1, dtype=torch.int8))
    assert (q == -127).all()


def test_quant_multiplies_by_its_scale() -> None:
    quant = atb.ElewiseParam.QuantParam(input_scale=2.0, input_offset=1)
    param = atb.ElewiseParam(elewise_type=Elewise.ELEWISE_QUANT, quant_param=quant)
    assert (run(param, torch.full((1, 32), 3.0).half())[0] == 7).all()


def rms(kind: str, **kwargs: Any) -> Any:
    return Rms(layer_type=getattr(Rms.RmsNormType, f"RMS_NORM_{kind}"), **kwargs)


def test_rms_norm_is_torchs_rounded_once() -> None:
    x, gamma = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    expected = functional.rms_norm(x.float(), (64,), gamma.float(), 1e-6).bfloat16()
    (ours,) = run(rms("NORM", norm_param=Rms.NormParam(epsilon=1e-6)), x, gamma)
    assert (ours.float() - expected.float()).abs().max() <= expected.abs().max() * 2**-8
    assert (ours == expected).float().mean() > 0.99


def test_prenorm_without_bias_adds_the_residual_and_returns_the_sum() -> None:
    x, residual, gamma = (torch.randn(4, 64).half() for _ in range(3))
    y, total = run(rms("PRENORM"), x, residual, gamma[:1])
    assert torch.equal(total, (x.float() + residual.float()).half())
    expected = functional.rms_norm(x.float() + residual.float(), (64,), gamma[0].float(), 1e-5)
    torch.testing.assert_close(y.float(), expected, rtol=2**-10, atol=2**-20)


def test_high_performance_rounds_before_gamma() -> None:
    x, gamma = torch.randn(4, 64).half(), torch.randn(64).half()
    unit = functional.rms_norm(x.float(), (64,), None, 1e-5).half()
    fast = Rms.NormParam(precision_mode=Rms.PrecisionMode.HIGH_PERFORMANCE_MODE)
    (ours,) = run(rms("NORM", norm_param=fast), x, gamma)
    torch.testing.assert_close(ours, unit * gamma, rtol=2**-9, atol=0)


def test_dynamically_quantised_layer_norm_restores_the_norm() -> None:
    x, gamma, beta = torch.randn(4, 64).half(), torch.randn(64).half(), torch.randn(64).half()
    dynamic = Layer.NormParam(
        quant_type=atb.QuantType.QUANT_INT8, dynamic_quant_type=atb.DynamicQuantType.DYNAMIC_QUANT_SYMMETRIC
    )
    param = Layer(layer_type=Layer.LayerNormType.LAYER_NORM_NORM, norm_param=dynamic)
    q, scale = run(param, x, gamma, beta)
    expected = functional.layer_norm(x.float(), (64,), gamma.float(), beta.float(), 1e-5)
    assert ((q * scale[:, None] - expected).abs() <= scale[:, None] * 0.501).all()


def test_rope_turns_halves_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(5, 4, 32), torch.randn(5, 2, 32)
    angles = torch.outer(torch.arange(5.0), 10000.0 ** (-torch.arange(0, 32, 2) / 32)).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    ours = run(atb.RopeParam(rotary_coeff=2), q.flatten(1), k.flatten(1), cos, sin,
               torch.tensor([5], dtype=torch.int32), chip="host")  # fmt: skip
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other[0].transpose(0, 1).flatten(1))


def test_rope_turns_adjacent_pairs_when_the_coefficient_is_the_head_size() -> None:
    q = torch.randn(3, 32)
    cos, sin = torch.randn(3, 16).repeat_interleave(2, 1)[:, :16], torch.randn(3, 16).repeat_interleave(2, 1)[:, :16]
    (ours, _) = run(atb.RopeParam(rotary_coeff=16), q, q, cos, sin, torch.tensor([3], dtype=torch.int32), chip="host")
    pairs = torch.view_as_complex(q.reshape(3, 2, 8, 2).contiguous())
    turned = pairs * torch.complex(cos[:, None, ::2], sin[:, None, ::2])
    torch.testing.assert_close(ours, torch.view_as_real(turned).reshape(3, 32))


def test_rope_with_a_table_starts_every_sequence_at_its_first_row() -> None:
    q, cos, sin = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8, 16)
    rows = torch.tensor([0, 1, 0, 1, 2])
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    table = run(atb.RopeParam(2, 1), q, q, cos, sin, lengths, chip="host")[0]
    gathered = run(atb.RopeParam(2, 0), q, q, cos[rows], sin[rows], lengths, chip="host")[0]
    assert torch.equal(table, gathered)


def test_float32_tables_make_rope_round_once() -> None:
    q = torch.randn(64, 64).half()
    angles = torch.rand(64, 64)
    lengths = torch.tensor([64], dtype=torch.int32)
    exact = q.float() * angles.cos() + torch.cat((-q[:, 32:], q[:, :32]), 1).float() * angles.sin()
    once = run(atb.RopeParam(2), q, q, angles.cos(), angles.sin(), lengths)[0]
    twice = run(atb.RopeParam(2), q, q, angles.cos().half(), angles.sin().half(), lengths)[0]
    assert torch.equal(once, exact.half())
    assert not torch.equal(once, twice)


def test_4d_rope_equals_2d_rope() -> None:
    q, cos, sin = torch.randn(2, 3, 4, 16), torch.randn(6, 16), torch.randn(6, 16)
    lengths = torch.tensor([3, 3], dtype=torch.int32)
    four = run(atb.RopeParam(2), q, q[:, :, :2].contiguous(), cos, sin, lengths, chip="host")[0]
    two = run(atb.RopeParam(2), q.reshape(6, 64), q[:, :, :2].reshape(6, 32), cos, sin, lengths, chip="host")[0]
    assert torch.equal(four.reshape(6, 64), two)


@pytest.mark.parametrize("transposed", [True, False])
def test_blocked_int8_weights_give_what_plain_ones_give(transposed: bool) -> None:
    from llmc.runtime.hostatb.numeric import nd_to_nz

    x = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    weight = torch.randint(-128, 128, (32, 64) if transposed else (64, 32), dtype=torch.int8)
    scale = torch.rand(32) * 1e-4
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bias = torch.randint(-999, 999, (32,), dtype=torch.int32)
    param = atb.LinearParam(transpose_b=transposed, out_data_type=atb.AclDataType.ACL_FLOAT16)
    plain = run(param, x, weight, bias, bits)[0]
    blocked = run(param, x, atb.set_format(nd_to_nz(weight), "nz"), bias, bits)[0]
    dense = x.double() @ (weight.T if transposed else weight).double() + bias
    assert torch.equal(plain, (dense.float() * scale).half())
    assert torch.equal(plain, blocked)


def test_per_token_scales_multiply_rows() -> None:
    x, weight = torch.randint(-9, 9, (3, 32), dtype=torch.int8), torch.randint(-9, 9, (16, 32), dtype=torch.int8)
    scale, tokens = torch.rand(16), torch.rand(3)
    param = atb.LinearParam(
        has_bias=False, out_data_type=atb.AclDataType.ACL_BF16, quant_mode=atb.LinearParam.QuantMode.PER_TOKEN
    )
    expected = (x.float() @ weight.float().T * scale * tokens[:, None]).bfloat16()
    assert torch.equal(run(param, x, weight, scale, tokens)[0], expected)


def test_sparse_weights_compressed_by_the_vendors_tool_are_refused_at_execution() -> None:
    x = torch.zeros(1, 64, dtype=torch.int8)
    index = torch.zeros(8, dtype=torch.int8)
    rest = [torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int64), index]
    with pytest.raises(atb.AtbError, match="cannot read compressed weights") as caught:
        run(atb.LinearSparseParam(), x, torch.zeros(100, dtype=torch.int8), *rest, chip="Ascend310P")
    assert caught.value.stage == "execute"
