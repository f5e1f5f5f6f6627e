"""A single Operation from outside: forward, refusals, chips, tensors on the wrong side, in-place rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.runtime import hostatb as atb
from llmc.runtime.hostatb.numeric import nd_to_nz, nz_to_nd, round_to

Elewise = atb.ElewiseParam.ElewiseType


def linear(chip: str = "host", **kwargs: Any) -> atb.Operation:
    return atb.Operation(atb.LinearParam(**{"has_bias": False, **kwargs}), chip=chip)


def test_forward_gives_the_product() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    (y,) = linear().forward([x, weight])
    torch.testing.assert_close(y, x @ weight.T)


def test_name_counts_and_repr_are_torch_atbs() -> None:
    op = atb.Operation(atb.RmsNormParam(layer_type=atb.RmsNormParam.RmsNormType.RMS_NORM_PRENORM))
    assert (op.name, op.input_num, op.output_num) == ("RmsNormOperation", 3, 2)
    assert repr(op) == "op name: RmsNormOperation, input_num: 3, output_num: 2"


def test_a_refused_parameter_is_a_runtime_error_at_creation() -> None:
    with pytest.raises(RuntimeError, match="Linear: ERROR_INVALID_PARAM at create") as caught:
        linear(en_accum=True, has_bias=True)
    assert isinstance(caught.value, atb.AtbError)


def test_operation_wants_a_parameter_object() -> None:
    with pytest.raises(TypeError, match=r"parameter object such as LinearParam\(...\), found str"):
        atb.Operation("Linear")


@pytest.mark.parametrize(
    ("tensors", "code", "words"),
    [
        ([torch.zeros(2, 8)], "ERROR_INVALID_IN_TENSOR_NUM", "found: 1"),
        ([torch.zeros(2, 8), torch.zeros(4, 7)], "ERROR_INVALID_TENSOR_DIM", "k of x and k of the weight differ"),
        ([torch.zeros(2, 8), torch.zeros(4, 8).int()], "ERROR_INVALID_TENSOR_INI_MATCH", "float32, int32"),
        ([torch.zeros(8), torch.zeros(4, 8)], "ERROR_INVALID_TENSOR_DIM_NUM", "dimensions of x"),
    ],
)
def test_a_refusal_says_code_stage_and_what_was_found(tensors: list[torch.Tensor], code: str, words: str) -> None:
    with pytest.raises(atb.AtbError, match=words) as caught:
        linear().forward(tensors)
    assert caught.value.code == code
    assert caught.value.stage == "infer"
    assert "Linear" in str(caught.value)


def test_something_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"LinearOperation: input 1 must be a torch.Tensor, found NoneType"):
        linear().forward([torch.zeros(2, 8), None])


def test_each_operation_keeps_the_chip_it_was_created_for() -> None:
    before = atb.current_chip()
    try:
        atb.use_chip("Ascend310P")
        old = atb.Operation(atb.LinearParam(has_bias=False))
        atb.use_chip("Ascend910B")
        new = atb.Operation(atb.LinearParam(has_bias=False))
    finally:
        atb.use_chip(before)
    tensors = [torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(4, 16, dtype=torch.bfloat16)]
    assert new.forward(tensors)[0].dtype == torch.bfloat16
    with pytest.raises(atb.AtbError):
        old.forward(tensors)


def test_an_unknown_chip_is_refused_with_the_known_ones() -> None:
    with pytest.raises(atb.AtbError, match="Ascend910B, Ascend310P, host"):
        atb.use_chip("Ascend910")


def test_float32_is_for_the_chip_host_only() -> None:
    mul = atb.ElewiseParam(elewise_type=Elewise.ELEWISE_MUL)
    x = torch.full((2, 2), 3.0)
    assert torch.equal(atb.Operation(mul, chip="host").forward([x, x])[0], x * x)
    with pytest.raises(atb.AtbError, match="ERROR_INVALID_TENSOR_INI_MATCH"):
        atb.Operation(mul, chip="Ascend910B").forward([x, x])


def test_float16_overflows_to_inf_on_910b_and_saturates_on_310p() -> None:
    mul = atb.ElewiseParam(elewise_type=Elewise.ELEWISE_MUL)
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert atb.Operation(mul, chip="Ascend910B").forward([x, x])[0].isinf().all()
    assert (atb.Operation(mul, chip="Ascend310P").forward([x, x])[0] == 65504).all()


def test_a_16_bit_bias_rounds_twice_and_a_float32_bias_once() -> None:
    x = torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16)  # 1 + 2**-8 is a tie in bfloat16
    weight = torch.ones(1, 2, dtype=torch.bfloat16)
    small = torch.tensor([2.0**-9])
    op = linear("Ascend910B", has_bias=True)
    twice = op.forward([x, weight, small.bfloat16()])[0].item()
    once = op.forward([x, weight, small])[0].item()
    assert (twice, once) == (1.0, 1.0 + 2.0**-7)


def test_forward_allocates_every_output_fresh() -> None:
    op = linear()
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    first, second = op.forward([x, weight])[0], op.forward([x, weight])[0]
    assert first.data_ptr() != second.data_ptr()


def test_one_operation_serves_changing_shapes() -> None:
    op, weight = linear(), torch.randn(5, 8)
    for tokens in (1, 7, 1):
        assert op.forward([torch.randn(tokens, 8), weight])[0].shape == (tokens, 5)


def test_a_non_contiguous_input_is_read_as_it_looks() -> None:
    x, weight = torch.randn(8, 3), torch.randn(8, 5)
    (y,) = linear().forward([x.T, weight.T])
    torch.testing.assert_close(y, x.T @ weight)


def test_reshape_and_cache_alone_leaves_the_caller_s_caches_alone() -> None:
    """torch_atb gives new outputs of which only the slots are written; hostatb shows the rest as NaN."""
    op = atb.Operation(atb.ReshapeAndCacheParam(), chip="Ascend910B")
    key, cache = torch.ones(1, 2, 16, dtype=torch.float16), torch.zeros(2, 4, 2, 16, dtype=torch.float16)
    key_out, value_out = op.forward([key, key, cache, cache.clone(), torch.tensor([5], dtype=torch.int32)])
    assert not cache.any()
    assert (key_out[1, 1] == 1).all()
    assert key_out[0].isnan().all()
    assert (value_out[1, 1] == 1).all()


def test_a_nz_output_is_marked_and_round_trips() -> None:
    x = torch.arange(2 * 17 * 33, dtype=torch.float16).reshape(2, 17, 33)
    blocks = nd_to_nz(x)
    assert blocks.shape == (2, 3, 32, 16)
    assert torch.equal(nz_to_nd(blocks, 17, 33), x)
    to_nz = atb.unbound.TransdataParam.TransdataType.ND_TO_FRACTAL_NZ
    (y,) = atb.Operation(atb.unbound.TransdataParam(transdata_type=to_nz), chip="Ascend910B").forward([x])
    assert atb.format_of(y) == "nz"
    assert torch.equal(y, blocks)


def test_set_format_marks_a_weight_without_changing_it() -> None:
    weight = torch.randn(5, 8, dtype=torch.float16)
    x = torch.randn(2, 8, dtype=torch.float16)
    plain = linear("Ascend310P").forward([x, weight])[0]
    cast = linear("Ascend310P").forward([x, atb.set_format(weight, "nz")])[0]
    assert torch.equal(plain, cast)


def test_rounding_is_half_to_even() -> None:
    assert round_to(torch.tensor([1 + 2.0**-11]), torch.float16, "host").item() == 1.0


def test_prof_counts_forward_calls_in_whole_microseconds() -> None:
    op = atb.Operation(atb.ElewiseParam(elewise_type=Elewise.ELEWISE_NEG), chip="host")
    before = len(atb.Prof.get_prof_stats().get_run_time_stats("ElewiseOperation"))
    op.forward([torch.ones(2, 2)])
    times = atb.Prof.get_prof_stats().get_run_time_stats("ElewiseOperation")
    assert len(times) == min(before + 1, 1000)
    assert all(type(time) is int for time in times)


def test_set_buffer_size_checks_its_argument() -> None:
    atb.set_buffer_size(1 << 20)
    atb.set_buffer_size(bytes=1 << 20)
    with pytest.raises(TypeError, match="non-negative int"):
        atb.set_buffer_size(-1)
    with pytest.raises(TypeError):
        atb.set_buffer_size(size=1)  # type: ignore[call-arg]
