"""GraphBuilder from outside: in-place writes, views, reuse of operations, limits, the host/device rule, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.runtime import hostatb as atb

Elewise = atb.ElewiseParam.ElewiseType


def add() -> atb.Operation:
    return atb.Operation(atb.ElewiseParam(elewise_type=Elewise.ELEWISE_ADD), chip="host")


def neg() -> atb.Operation:
    return atb.Operation(atb.ElewiseParam(elewise_type=Elewise.ELEWISE_NEG), chip="host")


def rope(chip: str = "host") -> atb.Operation:
    return atb.Operation(atb.RopeParam(rotary_coeff=2), chip=chip)


def attention(chip: str) -> atb.Operation:
    calc = atb.SelfAttentionParam.CalcType.PA_ENCODER
    return atb.Operation(
        atb.SelfAttentionParam(head_num=2, kv_head_num=2, qk_scale=0.25, calc_type=calc),
        chip=chip,
    )


def refusal(builder: Any) -> atb.AtbError:
    with pytest.raises(atb.AtbError) as caught:
        builder.build()
    return caught.value


def test_nodes_run_in_list_order() -> None:
    builder = atb.GraphBuilder("sum").set_input_output(["a", "b"], ["y"])
    graph = builder.add_operation(add(), ["a", "b"], ["t"]).add_operation(neg(), ["t"], ["y"]).build()
    (y,) = graph.forward([torch.ones(2, 2), torch.ones(2, 2)])
    assert (graph.name, graph.input_num, graph.output_num) == ("sum", 2, 1)
    assert torch.equal(y, torch.full((2, 2), -2.0))


def test_naming_an_input_as_output_changes_the_callers_tensor() -> None:
    graph = atb.GraphBuilder("g").set_input_output(["a", "b"], [])
    operation = graph.add_operation(add(), ["a", "b"], ["a"]).build()
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    assert operation.forward([a, b]) == []
    assert torch.equal(a, torch.full((2, 2), 2.0))


def test_later_nodes_see_an_in_place_write() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a", "b"], ["y"])
    builder.add_operation(add(), ["a", "b"], ["a"]).add_operation(add(), ["a", "b"], ["y"])
    a = torch.ones(2, 2)
    (y,) = builder.build().forward([a, torch.ones(2, 2)])
    assert torch.equal(y, torch.full((2, 2), 3.0))


def test_rewriting_an_internal_does_not_touch_earlier_results() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["first", "second"])
    builder.add_operation(neg(), ["a"], ["t"]).add_operation(add(), ["t", "t"], ["first"])
    builder.add_operation(add(), ["t", "a"], ["t"]).add_operation(add(), ["t", "t"], ["second"])
    first, second = builder.build().forward([torch.ones(2, 2)])
    assert torch.equal(first, torch.full((2, 2), -2.0))
    assert torch.equal(second, torch.zeros(2, 2))


def test_rope_writes_over_q_and_k() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["q", "k", "cos", "sin", "len"], [])
    graph = builder.add_operation(rope(), ["q", "k", "cos", "sin", "len"], ["q", "k"]).build()
    q, k = torch.randn(3, 32), torch.randn(3, 32)
    before = q.clone()
    cos, sin = torch.zeros(3, 32), torch.ones(3, 32)
    graph.forward([q, k, cos, sin, torch.tensor([3], dtype=torch.int32)])
    assert torch.equal(q, torch.cat((-before[:, 16:], before[:, :16]), 1))


def test_caches_are_updated_in_place_and_keep_their_other_slots() -> None:
    names = ["k", "v", "kc", "vc", "slots"]
    builder = atb.GraphBuilder("g").set_input_output(names, [])
    cache = atb.Operation(atb.ReshapeAndCacheParam(), chip="host")
    builder.reshape("k", lambda s: [s[0], 2, s[1] // 2], "k3").reshape("v", lambda s: [s[0], 2, s[1] // 2], "v3")
    graph = builder.add_operation(cache, ["k3", "v3", "kc", "vc", "slots"], ["kc", "vc"]).build()
    keys, values = torch.full((3, 4, 2, 16), 7.0), torch.full((3, 4, 2, 16), 7.0)
    graph.forward([torch.ones(2, 32), torch.ones(2, 32), keys, values, torch.tensor([0, 9], dtype=torch.int32)])
    assert (keys.flatten(0, 1)[[0, 9]] == 1).all()
    assert (keys.flatten(0, 1)[[1, 8, 11]] == 7).all()


def test_an_in_place_write_to_a_non_contiguous_input_is_refused() -> None:
    graph = atb.GraphBuilder("g").set_input_output(["a", "b"], []).add_operation(add(), ["a", "b"], ["a"]).build()
    with pytest.raises(atb.AtbError, match=r"not contiguous(.|\n)*tensor: a"):
        graph.forward([torch.ones(3, 2).T, torch.ones(2, 3)])


def test_an_in_place_write_of_another_size_is_refused() -> None:
    graph = atb.GraphBuilder("g").set_input_output(["a", "b"], []).add_operation(add(), ["a", "b"], ["a"]).build()
    with pytest.raises(atb.AtbError, match=r"in-place write of another(.|\n)*tensor: a \(output 0\)"):
        graph.forward([torch.ones(1, 2), torch.ones(3, 2)])


def test_a_view_is_planned_from_the_shape_that_arrives() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y"])
    builder.reshape("a", lambda shape: [shape[0] // 2, 2 * shape[1]], "wide").add_operation(neg(), ["wide"], ["y"])
    graph = builder.build()
    for rows in (2, 6):
        assert graph.forward([torch.ones(rows, 4)])[0].shape == (rows // 2, 8)


def test_views_of_views_compose_and_writing_one_writes_its_source() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], [])
    builder.reshape("a", lambda s: [s[0] * s[1]], "flat").reshape("flat", lambda s: [1, s[0]], "row")
    graph = builder.add_operation(neg(), ["row"], ["flat"]).build()
    a = torch.ones(2, 3)
    graph.forward([a])
    assert torch.equal(a, -torch.ones(2, 3))


@pytest.mark.parametrize("function", [lambda s: [s[0] + 1, s[1]], lambda s: "2,2", lambda s: None])
def test_a_bad_reshape_is_refused_with_node_and_name(function: Any) -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y"]).reshape("a", function, "v")
    graph = builder.add_operation(neg(), ["v"], ["y"]).build()
    with pytest.raises(atb.AtbError, match=r"ERROR_GRAPH_NODE_RESHAPE_FUNC_FAIL(.|\n)*tensor: v \(input 0\)"):
        graph.forward([torch.ones(2, 2)])


def test_an_operation_goes_into_one_node_only() -> None:
    op = neg()
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y"]).add_operation(op, ["a"], ["t"])
    with pytest.raises(atb.AtbError, match="was given to a graph"):
        builder.add_operation(op, ["t"], ["y"])
    with pytest.raises(atb.AtbError, match="was given to a graph"):
        op.forward([torch.ones(2, 2)])


def test_graphs_nest_and_write_through_to_the_caller() -> None:
    inner = atb.GraphBuilder("inner").set_input_output(["x", "b"], ["n"])
    inner.add_operation(add(), ["x", "b"], ["x"]).add_operation(neg(), ["x"], ["n"])
    outer = atb.GraphBuilder("outer").set_input_output(["a", "b"], ["y"])
    outer.add_operation(inner.build(), ["a", "b"], ["t"]).add_operation(add(), ["t", "a"], ["y"])
    a = torch.ones(2, 2)
    (y,) = outer.build().forward([a, torch.ones(2, 2)])
    assert torch.equal(a, torch.full((2, 2), 2.0))
    assert torch.equal(y, torch.zeros(2, 2))


def test_a_value_read_before_it_is_produced_is_refused() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y"])
    builder.add_operation(add(), ["a", "late"], ["y"]).add_operation(neg(), ["a"], ["late"])
    error = refusal(builder)
    assert (error.code, error.tensor) == ("ERROR_INVALID_GRAPH", "late")
    assert "node 0" in str(error)


def test_an_output_that_no_node_produces_is_refused() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y", "z"]).add_operation(neg(), ["a"], ["y"])
    assert refusal(builder).tensor == "z"


def test_wrong_counts_of_a_node_are_refused() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y"]).add_operation(add(), ["a"], ["y"])
    error = refusal(builder)
    assert (error.found, error.expected) == ("1", "2")


def test_one_value_for_two_outputs_of_a_node_is_refused() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["q", "cos", "len"], ["y"])
    builder.add_operation(rope(), ["q", "q", "cos", "cos", "len"], ["y", "y"])
    assert "two of its outputs" in refusal(builder).message


@pytest.mark.parametrize("name", ["a b", "x" * 129, "naïve"])
def test_a_bad_graph_name_is_refused(name: str) -> None:
    builder = atb.GraphBuilder(name).set_input_output(["a"], ["y"]).add_operation(neg(), ["a"], ["y"])
    assert "letters, digits and _" in refusal(builder).message


def test_an_empty_graph_name_becomes_the_librarys_default() -> None:
    builder = atb.GraphBuilder("").set_input_output(["a"], ["y"]).add_operation(neg(), ["a"], ["y"])
    assert builder.build().name == "GraphOperation"


def _chain(nodes: int, reuse: bool) -> Any:
    builder = atb.GraphBuilder("chain").set_input_output(["a"], ["y"])
    names = ["a"] + ([("t", "u")[i % 2] for i in range(nodes - 1)] if reuse else [f"t{i}" for i in range(nodes - 1)])
    for source, target in zip(names, [*names[1:], "y"], strict=True):
        builder.add_operation(neg(), [source], [target])
    return builder


def test_256_internals_pass_and_257_do_not() -> None:
    assert _chain(257, reuse=False).build().output_num == 1
    error = refusal(_chain(258, reuse=False))
    assert ("internals" in error.message, error.found) == (True, "257")


def test_inputs_are_limited_too() -> None:
    names = [f"a{i}" for i in range(257)]
    builder = atb.GraphBuilder("g").set_input_output(names, ["y"]).add_operation(neg(), ["a0"], ["y"])
    assert "too many inputs" in refusal(builder).message


def test_nodes_are_limited_at_build_and_tighter_at_the_first_setup() -> None:
    """Measured on the library: creation takes 1024 nodes, Setup throws from 257 on (segments.json)."""
    (y,) = _chain(256, reuse=True).build().forward([torch.ones(1, 1)])
    assert y.item() == 1.0
    graph = _chain(257, reuse=True).build()
    with pytest.raises(atb.AtbError, match="at most 256 nodes") as caught:
        graph.forward([torch.ones(1, 1)])
    assert (caught.value.code, caught.value.stage) == ("ERROR_OUT_OF_HOST_MEMORY", "setup")
    assert "too many nodes" in refusal(_chain(1025, reuse=True)).message


def test_one_input_cannot_be_read_on_the_host_and_on_the_device() -> None:
    names = ["q", "k", "v", "cos", "sin", "len"]
    builder = atb.GraphBuilder("g").set_input_output(names, ["y"])
    builder.add_operation(rope("Ascend910B"), ["q", "k", "cos", "sin", "len"], ["q", "k"])
    builder.add_operation(attention("Ascend910B"), ["q", "k", "v", "len"], ["y"])
    error = refusal(builder)
    assert (error.code, error.tensor) == ("ERROR_INVALID_TENSOR_ADDR", "len")
    assert "SelfAttentionOperation (node 1" in error.found
    assert "RopeOperation (node 0" in error.found


def test_a_computed_value_cannot_be_read_on_the_host() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["q", "k", "v", "len"], ["y"])
    builder.add_operation(neg(), ["len"], ["len2"])
    builder.add_operation(attention("host"), ["q", "k", "v", "len2"], ["y"])
    error = refusal(builder)
    assert "tensor.hostData is null" in error.message
    assert error.tensor == "len2"


def test_operations_of_two_chips_do_not_mix() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["q", "cos", "len"], ["y", "z"])
    builder.add_operation(rope("Ascend310P"), ["q", "q", "cos", "cos", "len"], ["t", "u"])
    builder.add_operation(neg(), ["t"], ["y"]).add_operation(neg(), ["u"], ["z"])
    assert "one chip" in refusal(builder).message


def test_a_refusal_inside_a_graph_says_graph_node_tensor_and_place() -> None:
    builder = atb.GraphBuilder("layer").set_input_output(["x", "w"], ["y"])
    builder.add_operation(neg(), ["x"], ["n"])
    builder.add_operation(atb.Operation(atb.LinearParam(has_bias=False), chip="host"), ["n", "w"], ["y"])
    graph = builder.build()
    graph.core.places = {"w": "tiny.yaml:6:20"}
    with pytest.raises(atb.AtbError) as caught:
        graph.forward([torch.ones(2, 8), torch.ones(4, 7)])
    error = caught.value
    assert (error.graph, error.tensor, error.place) == ("layer", "w (input 1)", "tiny.yaml:6:20")
    assert error.operation == "LinearOperation (node 1: n, w -> y)"
    assert str(error).startswith("layer LinearOperation (node 1: n, w -> y): ERROR_INVALID_TENSOR_DIM at infer")


def test_a_refusal_while_running_is_located_in_the_innermost_graph() -> None:
    inner = atb.GraphBuilder("inner").set_input_output(["q", "cos", "n"], ["a", "b"])
    inner.add_operation(rope(), ["q", "q", "cos", "cos", "n"], ["a", "b"])
    outer = atb.GraphBuilder("outer").set_input_output(["x", "table", "n"], ["y", "z"])
    graph = outer.add_operation(inner.build(), ["x", "table", "n"], ["y", "z"]).build()
    with pytest.raises(atb.AtbError) as caught:
        graph.forward([torch.ones(3, 16), torch.ones(2, 16), torch.tensor([3], dtype=torch.int32)])
    error = caught.value
    assert (error.graph, error.stage, error.tensor) == ("inner", "execute", "cos (input 2)")


def test_names_are_declared_once() -> None:
    with pytest.raises(atb.AtbError, match=r"declared twice(.|\n)*tensor: a"):
        atb.GraphBuilder("g").set_input_output(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="must be a list of str"):
        atb.GraphBuilder("g").set_input_output("ab", ["y"])


def test_a_graph_may_be_built_once() -> None:
    builder = atb.GraphBuilder("g").set_input_output(["a"], ["y"]).add_operation(neg(), ["a"], ["y"])
    builder.build()
    assert "built already" in refusal(builder).message
