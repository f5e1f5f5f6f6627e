"""The parameter classes behave as torch_atb binds them: names, order, defaults, nested structs and enums, refusals.

Oracle: the table of bound parameters in the ATB reference (section 2.2), written down here by hand.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmc.compiler.atb import OPS
from llmc.runtime import hostatb as atb

BOUND: dict[str, dict[str, Any]] = {  # class: {keyword: default}; enums by member name, "struct" for a nested one
    "LinearParam": {
        "transpose_a": False, "transpose_b": True, "has_bias": True, "out_data_type": "ACL_DT_UNDEFINED",
        "en_accum": False, "matmul_type": "MATMUL_UNDEFINED", "quant_mode": "QUANT_UNDEFINED",
    },
    "ElewiseParam": {
        "elewise_type": "ELEWISE_UNDEFINED", "quant_param": "struct", "muls_param": "struct",
        "out_tensor_type": "ACL_DT_UNDEFINED",
    },
    "ElewiseParam.QuantParam": {"input_scale": 1.0, "asymmetric": False, "input_offset": 0},
    "ElewiseParam.MulsParam": {"var_attr": 0.0},
    "RmsNormParam": {
        "layer_type": "RMS_NORM_UNDEFINED", "norm_param": "struct", "pre_norm_param": "struct",
        "post_norm_param": "struct",
    },
    "RmsNormParam.NormParam": {
        "quant_type": "QUANT_UNQUANT", "epsilon": 1e-5, "layer_norm_eps": 1e-5, "rstd": False,
        "precision_mode": "HIGH_PRECISION_MODE", "model_type": "LLAMA_MODEL",
        "dynamic_quant_type": "DYNAMIC_QUANT_UNDEFINED",
    },
    "RmsNormParam.PreNormParam": {"quant_type": "QUANT_UNQUANT", "epsilon": 1e-5, "has_bias": False},
    "RmsNormParam.PostNormParam": {"quant_type": "QUANT_UNQUANT", "epsilon": 1e-5, "has_bias": False},
    "LayerNormParam": {
        "layer_type": "LAYER_NORM_UNDEFINED", "norm_param": "struct", "pre_norm_param": "struct",
        "post_norm_param": "struct",
    },
    "LayerNormParam.NormParam": {
        "quant_type": "QUANT_UNQUANT", "epsilon": 1e-5, "begin_norm_axis": 0, "begin_params_axis": 0,
        "dynamic_quant_type": "DYNAMIC_QUANT_UNDEFINED",
    },
    "LayerNormParam.PostNormParam": {
        "quant_type": "QUANT_UNQUANT", "epsilon": 1e-5, "op_mode": 0, "zoom_scale_value": 1.0,
    },
    "SelfAttentionParam": {
        "quant_type": "TYPE_QUANT_UNQUANT", "out_data_type": "ACL_DT_UNDEFINED", "head_num": 0, "kv_head_num": 0,
        "q_scale": 1, "qk_scale": 1, "batch_run_status_enable": False, "is_triu_mask": 0, "calc_type": "UNDEFINED",
        "kernel_type": "KERNELTYPE_DEFAULT", "clamp_type": "CLAMP_TYPE_UNDEFINED", "clamp_min": 0, "clamp_max": 0,
        "mask_type": "MASK_TYPE_UNDEFINED", "kvcache_cfg": "K_CACHE_V_CACHE", "scale_type": "SCALE_TYPE_TOR",
        "input_layout": "TYPE_BSND", "mla_v_head_size": 0, "cache_type": "CACHE_TYPE_NORM", "window_size": 0,
    },
    "PagedAttentionParam": {
        "head_num": 0, "qk_scale": 1.0, "kv_head_num": 0, "mask_type": "UNDEFINED", "batch_run_status_enable": False,
        "quant_type": "TYPE_QUANT_UNQUANT", "out_data_type": "ACL_DT_UNDEFINED", "has_quant_offset": False,
        "compress_type": "COMPRESS_TYPE_UNDEFINED", "calc_type": "CALC_TYPE_UNDEFINED",
        "scale_type": "SCALE_TYPE_TOR", "input_layout": "TYPE_BSND",
    },
    "RopeParam": {"rotary_coeff": 4, "cos_format": 0},
    "ReshapeAndCacheParam": {"compress_type": "COMPRESS_TYPE_UNDEFINED", "kv_cache_cfg": "K_CACHE_V_CACHE"},
    "ActivationParam": {
        "activation_type": "ACTIVATION_UNDEFINED", "scale": 1.0, "dim": -1, "gelu_mode": "TANH_MODE",
    },
    "SplitParam": {"split_dim": 0, "split_num": 2, "split_sizes": []},
    "GatherParam": {"axis": 0, "batch_dims": 0},
    "ConcatParam": {"concat_dim": 0},
    "SliceParam": {"offsets": [], "size": []},
    "TransposeParam": {"perm": []},
    "SoftmaxParam": {"axes": []},
    "CumsumParam": {"axes": [], "exclusive": False, "reverse": False},
    "FillParam": {"with_mask": True, "value": [], "out_dim": []},
    "MultinomialParam": {"num_samples": 1, "rand_seed": 0},
    "GatingParam": {"topk_expert_num": 1, "cum_sum_num": 0, "cum_sum_int64": False, "device_expert": []},
    "AllReduceParam": {
        "rank": 0, "rank_size": 0, "rank_root": 0, "all_reduce_type": "sum", "backend": "hccl", "hccl_comm": None,
        "comm_mode": "COMM_MULTI_PROCESS", "rank_table_file": "", "comm_domain": "",
    },
    "AllGatherParam": {
        "rank": 0, "rank_size": 0, "rank_root": 0, "backend": "hccl", "hccl_comm": None,
        "comm_mode": "COMM_MULTI_PROCESS", "rank_table_file": "", "comm_domain": "",
    },
    "ReduceScatterParam": {"reduce_type": "sum", "backend": "lccl"},
    "LinearParallelParam": {
        "trans_weight": True, "rank": 0, "rank_size": 0, "rank_root": 0, "has_residual": False, "backend": "hccl",
        "hccl_comm": None, "comm_mode": "COMM_MULTI_PROCESS", "rank_table_file": "", "type": "LINEAR_ALL_REDUCE",
        "keep_intermediate": False, "quant_group_size": 0, "out_data_type": "ACL_DT_UNDEFINED", "comm_domain": "",
    },
    "LinearSparseParam": {"transpose_a": False, "transpose_b": True, "tiling_k": 8, "tiling_n": 8},
}  # fmt: skip


def _class(path: str) -> Any:
    found: Any = atb
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", BOUND)
def test_defaults_are_those_of_the_binding(path: str) -> None:
    param = _class(path)()
    for name, default in BOUND[path].items():
        found = getattr(param, name)
        if default == "struct":
            assert type(found).__qualname__.startswith(f"{path}.")
        else:
            assert getattr(found, "name", found) == default, f"{path}.{name}"


def test_bound_classes_take_keywords_only_the_table_knows() -> None:
    for path in BOUND:
        with pytest.raises(TypeError, match="no parameter 'headNumber'"):
            _class(path)(headNumber=1)


def test_a_misspelt_keyword_is_named_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"LinearParam: no parameter 'hasbias'; did you mean 'has_bias'\?"):
        atb.LinearParam(hasbias=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: atb.LinearParam(has_bias="no"), "has_bias must be bool, found str 'no'"),
        (lambda: atb.LinearParam(out_data_type=1), "out_data_type must be AclDataType, found int 1"),
        (lambda: atb.LinearParam(quant_mode=atb.QuantType.QUANT_INT8), "quant_mode must be LinearParam.QuantMode"),
        (lambda: atb.RopeParam(rotary_coeff=2.0), "rotary_coeff must be int, found float 2.0"),
        (lambda: atb.SplitParam(split_sizes=3), "split_sizes must be list of int, found int 3"),
        (lambda: atb.LinearSparseParam(tiling_k=-8), "tiling_k must be non-negative int"),
        (lambda: atb.RmsNormParam(norm_param=atb.LayerNormParam.NormParam()), "norm_param must be RmsNormParam.NormPa"),
    ],
)
def test_a_wrong_type_names_the_parameter(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_attributes_are_checked_like_keywords() -> None:
    param = atb.RmsNormParam()
    param.layer_type = atb.RmsNormParam.RmsNormType.RMS_NORM_NORM
    param.norm_param.epsilon = 1e-6
    assert param.norm_param.epsilon == 1e-6
    with pytest.raises(TypeError, match="epsilon must be float"):
        param.norm_param.epsilon = "small"
    with pytest.raises(AttributeError, match="did you mean 'layer_type'"):
        param.layerType = 1


def test_positional_arguments_follow_the_order_of_the_binding() -> None:
    param = atb.RopeParam(2, 1)
    assert (param.rotary_coeff, param.cos_format) == (2, 1)
    with pytest.raises(TypeError, match="at most 2 arguments"):
        atb.RopeParam(2, 1, 0)


def test_two_parameter_objects_share_no_nested_struct_or_list() -> None:
    first, second = atb.RmsNormParam(), atb.RmsNormParam()
    first.norm_param.epsilon = 1.0
    assert second.norm_param.epsilon == 1e-5
    sizes = [1, 2]
    split = atb.SplitParam(split_sizes=sizes)
    sizes.append(3)
    assert split.split_sizes == [1, 2]


def test_operations_that_torch_atb_does_not_bind_are_kept_apart() -> None:
    for op in OPS.values():
        assert hasattr(atb, op.param_class) == op.bound, op.name
        assert hasattr(atb.unbound, op.param_class) != op.bound, op.name


def test_enums_have_the_values_of_the_headers() -> None:
    assert (int(atb.AclDataType.ACL_FLOAT16), int(atb.AclDataType.ACL_BF16)) == (1, 27)
    assert int(atb.AclFormat.ACL_FORMAT_FRACTAL_NZ) == 29
    assert int(atb.QuantType.QUANT_INT8) == 2
    assert int(atb.LinearParam.QuantMode.PER_TOKEN) == 2
    assert int(atb.ActivationType.ACTIVATION_SWIGLU_FORWARD) == 6
    assert int(atb.ElewiseParam.ElewiseType.ELEWISE_TANH) == 20
    assert int(atb.CommMode.COMM_MULTI_THREAD) == 1


@pytest.mark.parametrize(
    ("path", "last", "value"),
    [
        ("LinearParam.MatmulType", "MATMUL_EIN_SUM", 1),
        ("PagedAttentionParam.CompressType", "COMPRESS_TYPE_MAX", 3),
        ("PagedAttentionParam.ScaleType", "SCALE_TYPE_MAX", 2),
        ("SelfAttentionParam.ScaleType", "SCALE_TYPE_MAX", 2),
        ("LinearParallelParam.ParallelType", "MAX", 7),
        ("ActivationType", "ACTIVATION_MAX", 10),
    ],
)
def test_enums_end_with_the_member_that_the_binding_ends_with(path: str, last: str, value: int) -> None:
    assert list(_class(path).__members__)[-1] == last
    assert int(_class(path)[last]) == value


def test_structs_made_by_the_binding_differ_from_those_a_parameter_makes_for_itself() -> None:
    """pybind gives MoeInfo's keywords default 0; LinearParallelParam's own member is made by C++, where they are 1."""
    moe = atb.LinearParallelParam().moe_info
    assert (moe.localExpertNums, moe.epSize, moe.tpSize) == (1, 1, 1)
    moe = atb.LinearParallelParam.MoeInfo()
    assert (moe.localExpertNums, moe.epSize, moe.tpSize) == (0, 0, 0)


def test_a_name_torch_atb_lacks_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="no 'KvCacheParam'"):
        _class("KvCacheParam")
