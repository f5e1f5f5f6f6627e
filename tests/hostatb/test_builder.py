"""torch_atb's newer graph style: nodes name their own outputs."""

from __future__ import annotations

import pytest
import torch

from llmc.runtime import hostatb
from llmc.runtime.hostatb import AtbError


@pytest.fixture(autouse=True)
def host():
    hostatb.use_chip("host")


def test_a_graph_of_two_nodes_computes_what_its_nodes_compute():
    builder = hostatb.Builder("mlp")
    x, w = builder.add_input("x"), builder.add_input("w")
    linear = builder.add_node([x, w], hostatb.LinearParam(has_bias=False))
    swish = hostatb.Operation(hostatb.ActivationParam(activation_type=hostatb.ACTIVATION_SWISH))
    act = builder.add_node([linear.get_output(0)], swish)
    builder.mark_output(act.get_output(0))
    mlp = builder.build()
    assert (mlp.input_num, mlp.output_num) == (2, 1)
    a, b = torch.randn(3, 16), torch.randn(32, 16)
    torch.testing.assert_close(mlp.forward([a, b])[0], torch.nn.functional.silu(a @ b.T))


def test_a_view_is_read_under_its_new_shape():
    builder = hostatb.Builder("view")
    x, y = builder.add_input("x"), builder.add_input("y")
    assert builder.reshape(x, lambda shape: [shape[0] * shape[1], shape[2]], "flat") is builder
    add = builder.add_node(["flat", y], hostatb.ElewiseParam(elewise_type=hostatb.ElewiseParam.ElewiseType.ELEWISE_ADD))
    builder.mark_output(add.get_output(0))
    a, b = torch.randn(2, 3, 4), torch.randn(6, 4)
    torch.testing.assert_close(builder.build().forward([a, b])[0], a.reshape(6, 4) + b)


def test_paged_attention_needs_an_operation_around_it():
    with pytest.raises(TypeError, match="wrap it in an Operation"):
        hostatb.Builder("g").add_node([], hostatb.PagedAttentionParam(head_num=1))


def test_only_outputs_of_nodes_can_be_marked():
    builder = hostatb.Builder("g")
    builder.add_input("x")
    with pytest.raises(AtbError, match="only an output of a node"):
        builder.mark_output("x")
