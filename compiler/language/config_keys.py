"""The keys of a checkpoint's config.json: what each changes in the computation, and which change nothing.

    KEYS["sliding_window"].is_off(None, config, positions=4096)     # True: it says that there is no window
    HARMLESS["torch_dtype"]                                         # why it may say what it likes
    DEFAULTS["mistral"]["sliding_window"]                           # 4096: what leaving it out means there

A key that the model's `config:` names is compared with the model. Of the others, a key of KEYS must be off, a key of
HARMLESS may say anything, and a key of neither is refused by its name (`checkpoint.py`). To teach llmc a key, write its
row here: read what transformers' `models/TYPE/modeling_TYPE.py` does with it, and name that in `source`.

Sources are paths inside transformers 5 (`models/` left out), or the program that writes or reads the key. transformers
sets attributes for keys that it does not know, so a key means something only to the model types whose code reads it;
here it is refused whatever the model type says, because other programs read other keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """A key that changes the computation. `off`: values by which it changes nothing; `unless`: the same as a function
    of value, whole configuration and longest context. null is always off. `whole`: a number that must be whole."""

    does: str
    source: str
    needs: str = "nodes that compute it, and a rule under `config:`"
    off: tuple[Any, ...] = ()
    unless: Callable[[Any, Config, int | None], bool] | None = None
    whole: bool = False

    def is_off(self, value: Any, config: Config, positions: int | None) -> bool:
        """Does this value leave the computation as it is without the key?"""
        if value is None or any(value == off for off in self.off):
            return True
        return self.unless is not None and self.unless(value, config, positions)


# ---- values that are off in some configurations

# Model types whose windows have a switch; others have a window whatever `use_sliding_window` says
# (grep of configuration_*.py and modeling_*.py).
SWITCHED = ("llama", "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "smollm3")
ATTENTION_MULTIPLIER = ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared")


def number(value: Any) -> TypeGuard[int | float]:
    """A number to reckon with: neither NaN nor infinite, and not beyond float64."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def reaches_all(value: Any, config: Config, positions: int | None) -> bool:
    """A window of at least the longest context shows every token: row i sees the columns from i - window + 1."""
    return number(value) and positions is not None and value >= positions


def window_is_off(value: Any, config: Config, positions: int | None) -> bool:
    switched_off = config.get("use_sliding_window") is False and config.get("model_type") in SWITCHED
    return switched_off or reaches_all(value, config, positions)


def no_window(value: Any, config: Config, positions: int | None) -> bool:
    """Settings of windows, where there are none."""
    return KEYS["sliding_window"].is_off(config.get("sliding_window"), config, positions)


def all_full(value: Any, config: Config, positions: int | None) -> bool:
    """Each layer sees everything: it is said so, or the windows of the others reach as far."""
    reach = {
        "full_attention": True,
        "sliding_attention": no_window(value, config, positions),
        "chunked_attention": KEYS["attention_chunk_size"].is_off(config.get("attention_chunk_size"), config, positions),
    }
    return isinstance(value, list) and all(isinstance(kind, str) and reach.get(kind, False) for kind in value)


def all_ones(value: Any, config: Config, positions: int | None) -> bool:
    """1: the layer has rope. An empty list has the layers counted by `no_rope_layer_interval`."""
    return isinstance(value, list) and bool(value) and all(one == 1 for one in value)


def rope_everywhere(value: Any, config: Config, positions: int | None) -> bool:
    return all_ones(config.get("no_rope_layers"), config, positions)


def head_dim(config: Config) -> float | None:
    said, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if number(said):
        return said
    return hidden / heads if number(hidden) and number(heads) and heads > 0 else None


def is_head_dim(value: Any, config: Config, positions: int | None) -> bool:
    return number(value) and value == head_dim(config)


def is_usual_scale(value: Any, config: Config, positions: int | None) -> bool:
    """The factor of QK^T: 1 / sqrt(head_dim) is what everybody has. Only Granite's code reads the key."""
    if value == 1 and config.get("model_type") not in ATTENTION_MULTIPLIER:
        return True
    size = head_dim(config)
    return number(value) and size is not None and size > 0 and abs(value * size**0.5 - 1) < 1e-6


def is_hidden_size(value: Any, config: Config, positions: int | None) -> bool:
    return number(value) and value == config.get("hidden_size")


# ---- what changes the computation

NO = (False, 0)
ONE = (1, 1.0)
RULE = "a rule under `config:` that names the model's size"
MOE = "experts in place of the MLP"
LATENT = "multi-head latent attention"
BIASES = "`bias:` beside the weights (docs/add-a-variant.md), and a rule under `config:`"
ROPE_OF = "`rope:` settings"
FLOAT = "the float checkpoint that it was made from"

KEYS: Mapping[str, Key] = {
    # sizes, by every name that they have
    "hidden_size": Key("width of the model", "llama", RULE, whole=True),
    "intermediate_size": Key("width of the MLP", "llama", RULE, whole=True),
    "num_hidden_layers": Key("number of layers", "llama", RULE, whole=True),
    "num_attention_heads": Key("number of query heads", "llama", RULE, whole=True),
    "num_key_value_heads": Key("number of key and value heads", "llama", RULE, whole=True),
    "head_dim": Key("size of a head", "llama", RULE, whole=True),
    "vocab_size": Key("rows of the vocabulary", "llama", RULE, whole=True),
    "max_position_embeddings": Key("longest context; dynamic, yarn and llama3 rope read it", "modeling_rope_utils.py",
                                   RULE, whole=True),
    "rms_norm_eps": Key("number that the norms add to the mean square", "llama", RULE),
    **dict.fromkeys(
        ("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "epsilon"),
        Key("number that the norms add to the variance", "stablelm, nemotron, falcon, starcoder2; MindIE", RULE),
    ),
    **dict.fromkeys(
        ("n_embd", "d_model", "n_layer", "n_layers", "num_layers", "n_head", "n_heads", "n_inner", "n_positions",
         "num_kv_heads", "n_kv_heads", "kv_n_heads", "n_head_kv", "kv_channels", "ffn_hidden_size", "ffn_dim",
         "multi_query_group_num", "padded_vocab_size", "qk_head_dim"),
        Key("a size under another name", "gpt2, falcon, dbrx; chatglm", RULE),
    ),
    "model_type": Key("the code that computes the model", "auto/configuration_auto.py",
                      "a model of that type, which says `config: {model_type: {text: ...}}`"),
    "hidden_act": Key("function between the MLP's matmuls", "llama LlamaMLP", "an operator for it"),
    "hidden_activation": Key("function between the MLP's matmuls", "gemma2 Gemma2MLP", "an operator for it"),
    **dict.fromkeys(
        ("activation", "activation_function", "ffn_act_fn"),
        Key("function between the MLP's matmuls", "falcon, gpt2, dbrx", "an operator for it"),
    ),
    "tie_word_embeddings": Key("whether the embedding is also the weight of lm_head", "modeling_utils.py",
                               "`lm_head: {weight: model.embed_tokens.weight}` or a tensor of its own, and a rule"),
    # biases
    "attention_bias": Key("biases of q, k, v and o", "llama LlamaAttention", BIASES, NO),
    "attention_out_bias": Key("a bias of o", "seed_oss", BIASES, NO),
    "mlp_bias": Key("biases of gate, up and down", "llama LlamaMLP", BIASES, NO),
    **dict.fromkeys(("qkv_bias", "use_qkv_bias", "add_qkv_bias"),
                    Key("biases of q, k and v", "qwen2_moe, stablelm; chatglm", BIASES, NO)),
    **dict.fromkeys(("bias", "use_bias", "add_bias_linear", "lm_head_bias"),
                    Key("biases of the matmuls", "falcon, starcoder2; internlm2, chatglm", BIASES, NO)),
    "no_bias": Key("biases of the matmuls, where it is false", "Qwen 1", BIASES, (True,)),
    # which tokens a token sees
    **dict.fromkeys(("sliding_window", "sliding_window_size"),
                    Key("a token sees only so many tokens up to itself",
                        "mistral create_sliding_window_causal_mask; gemma2",
                        "attention with a window, or max_positions within it", NO, window_is_off)),
    "use_sliding_window": Key("switches the window of `sliding_window` on", "qwen2 configuration_qwen2.py",
                              "attention with a window", NO, no_window),
    "max_window_layers": Key("layers from this one on have a window", "qwen2 configuration_qwen2.py",
                             "attention with a window", (), no_window),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"),
                    Key("how often a layer has no window", "exaone4, gemma3", "attention with a window",
                        unless=no_window)),
    "layer_types": Key("attention of each layer", "qwen2 configuration_qwen2.py", "layers of several kinds", ([],),
                       all_full),
    "attention_chunk_size": Key("a token sees only its own chunk", "llama4 create_chunked_causal_mask",
                                "attention in chunks", NO, reaches_all),
    "use_bidirectional_attention": Key("tokens see later ones", "gemma2", "attention without a causal mask", NO),
    "is_causal": Key("tokens see later ones, where it is false", "masking_utils.py",
                     "attention without a causal mask", (True,)),
    # scores and logits
    "attn_logit_softcapping": Key("a tanh limits the scores", "gemma2 eager_attention_forward", off=NO),
    "final_logit_softcapping": Key("a tanh limits the logits", "gemma2 Gemma2ForCausalLM.forward", off=NO),
    **dict.fromkeys(("logit_softcapping", "logits_soft_cap", "attn_soft_cap", "final_logits_soft_cap", "logit_cap"),
                    Key("a tanh limits scores or logits", "recurrent_gemma; vLLM", off=NO)),
    "query_pre_attn_scalar": Key("scores are divided by its root, not by that of the head size",
                                 "gemma2 Gemma2Attention", "`scale:` of the attention, and a rule", (), is_head_dim),
    "attention_multiplier": Key("factor of the scores in place of 1 / sqrt(head_dim)", "granite GraniteAttention",
                                "`scale:` of the attention, and a rule", (), is_usual_scale),
    "attn_temperature_tuning": Key("queries of far positions are scaled", "llama4 Llama4TextAttention", off=NO),
    "use_logn_attn": Key("scores of far positions are scaled", "Qwen 1", off=NO),
    "scale_attn_weights": Key("scores are not scaled, where it is false", "gpt2", off=(True,)),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
                    Key("scores are scaled by layer", "gpt2", off=NO)),
    "logit_scale": Key("factor of the logits", "cohere CohereForCausalLM.forward", off=ONE),
    "logits_scaling": Key("the logits are divided by it", "granite GraniteForCausalLM.forward", off=ONE),
    "residual_multiplier": Key("factor of what each block adds", "granite GraniteDecoderLayer", off=ONE),
    "embedding_multiplier": Key("factor of the embedding", "granite GraniteModel.forward", off=ONE),
    "lm_head_multiplier": Key("factor of the logits", "falcon_h1", off=ONE),
    **dict.fromkeys(("mlp_multipliers", "attention_in_multiplier", "attention_out_multiplier", "key_multiplier"),
                    Key("factors inside the layers", "falcon_h1", off=ONE)),
    "scale_emb": Key("factor of the embedding", "minicpm3 MiniCPM3Model.forward", off=ONE),
    "scale_depth": Key("factor of what each block adds, times 1 / sqrt(layers)", "minicpm3 MiniCPM3DecoderLayer"),
    "dim_model_base": Key("the logits are divided by hidden_size over it", "minicpm3", off=(), unless=is_hidden_size),
    "mup_width_scale": Key("factor of the logits", "mup models such as XVERSE and TeleChat", off=ONE),
    # norms and the layer
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm"),
                    Key("norms of q and k", "cohere, stablelm, phi, llama4", "norms behind q and k", NO)),
    "clip_qkv": Key("q, k and v are clipped", "olmo OlmoAttention.forward", off=NO),
    **dict.fromkeys(("use_parallel_residual", "parallel_attn"),
                    Key("attention and MLP read the same input", "gpt_neox, stablelm, falcon",
                        "a layer whose MLP reads the attention's input, and a rule", NO)),
    **dict.fromkeys(("new_decoder_architecture", "num_ln_in_parallel_attn", "multi_query", "skip_word_embedding",
                     "apply_residual_connection_post_layernorm", "use_post_norm", "post_layer_norm",
                     "normalize_embedding"),
                    Key("another layer", "falcon; chatglm, MindIE", off=NO)),
    "rmsnorm": Key("LayerNorm in place of RMSNorm, where it is false", "chatglm", off=(True,)),
    "block_configs": Key("layers that differ in size", "DeciLM, Nemotron-NAS", "layers of several kinds"),
    "per_layer_config": Key("layers that differ", "heterogeneity", "layers of several kinds", ({},)),
    "pruned_heads": Key("heads that were removed", "configuration_utils.py until transformers 4", off=({},)),
    **dict.fromkeys(("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder", "cross_attention_hidden_size",
                     "cross_attention_layers"),
                    Key("an encoder beside the decoder", "configuration_utils.py, mllama", "a decoder alone", NO)),
    **dict.fromkeys(("text_config", "llm_config", "language_config", "vision_config", "audio_config", "speech_config",
                     "thinker_config", "mm_vision_tower", "visual"),
                    Key("a model of several parts", "llama4, gemma3, llava",
                        "the text model alone, its settings at the top of config.json", ({},))),
    # positions
    "rope_theta": Key("base of the rotary position embedding", "modeling_rope_utils.py", ROPE_OF),
    "rope_scaling": Key("settings of the rotary position embedding", "modeling_rope_utils.py", ROPE_OF, ({},)),
    "rope_parameters": Key("settings of the rotary position embedding", "modeling_rope_utils.py", ROPE_OF, ({},)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent"),
                    Key("only this part of a head is rotated", "phi, gpt_neox, stablelm", "rope over part of a head",
                        ONE)),
    "rotary_dim": Key("only so much of a head is rotated", "gptj", "rope over part of a head", (), is_head_dim),
    "original_max_position_embeddings": Key("trained length of the rope scaling", "phi3, modeling_rope_utils.py",
                                            ROPE_OF),
    **dict.fromkeys(("rotary_emb_base", "rope_local_base_freq", "rotary_base", "global_rope_theta", "local_rope_theta"),
                    Key("base of the rotary position embedding", "gpt_neox, gemma3, modernbert", ROPE_OF)),
    **dict.fromkeys(("rope_interleaved", "rope_interleave"),
                    Key("rope turns adjacent pairs, not halves", "deepseek_v3; SmolLM2's trainer nanotron",
                        "`rope: {pairing: interleaved}`, and a rule under `config:`", NO)),
    "rope_ratio": Key("factor of rope's base", "chatglm", ROPE_OF, ONE),
    "no_rope_layers": Key("layers without rope", "smollm3, llama4", "layers of several kinds", (), all_ones),
    **dict.fromkeys(("no_rope_layer_interval", "nope_layer_interval"),
                    Key("layers without rope", "smollm3, llama4", "layers of several kinds", (), rope_everywhere)),
    "use_dynamic_ntk": Key("rope's base grows with the sequence", "Qwen 1", ROPE_OF, NO),
    "rope_mscale": Key("factor of cos and sin", "MindIE-LLM config_llama.py", ROPE_OF, (*NO, *ONE)),
    **dict.fromkeys(("rope_given_inv_feq_str", "rope_keep_local_base_windows", "rope_vanilla_theta"),
                    Key("other frequencies of rope", "MindIE-LLM config_llama.py", ROPE_OF, (*NO, ""))),
    **dict.fromkeys(("alibi", "use_alibi"), Key("ALiBi in place of rope", "falcon, mpt", off=NO)),
    "pe_type": Key("ALiBi in place of rope", "MindIE-LLM config_llama.py", off=("ROPE",)),
    **dict.fromkeys(("position_embedding_type", "position_embedding", "position_encoding"),
                    Key("another position embedding", "granitemoehybrid, bert; baichuan",
                        off=("rope", "rotary", "ROPE"))),
    "learned_pos_emb": Key("learned positions", "mpt", off=NO),
    # experts
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_top_k",
         "moe_topk", "num_shared_experts", "n_shared_experts", "moe_intermediate_size",
         "shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp", "moe_layers",
         "mlp_only_layers", "norm_topk_prob", "topk_method", "scoring_func", "n_group", "topk_group",
         "routed_scaling_factor", "decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq",
         "interleave_moe_layer_step"),
        Key("a mixture of experts", "mixtral, qwen2_moe, deepseek_v3, llama4", MOE, (*NO, []))),
    # latent attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
                    Key("multi-head latent attention", "deepseek_v2, minicpm3", LATENT, NO)),
    # other kinds of models
    **dict.fromkeys(
        ("mamba_d_state", "mamba_expand", "attn_layer_period", "ssm_cfg", "linear_attn_config", "lambda_std_dev",
         "swiglu_limit", "swiglu_alpha", "attn_config", "ffn_config", "hybrid_override_pattern"),
        Key("another kind of layer", "jamba, diffllama, gpt_oss, dbrx, nemotron_h", off=NO)),
    # stored numbers
    **dict.fromkeys(("quantization_config", "compression_config", "quantization"),
                    Key("quantised weights", "quantizers/auto.py; compressed-tensors, mlx-lm", FLOAT, (*NO, {}))),
    "quantize": Key("quantised weights", "MindIE-LLM config_llama.py", FLOAT, (*NO, "", "float")),
}  # fmt: skip

# Keys of the rotary position embedding that `checkpoint.py` reads whole.
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
             "original_max_position_embeddings")  # fmt: skip
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization", "quantize")


# ---- what changes nothing: why -> names

_HARMLESS: Mapping[str, str] = {
    "says who wrote it and for whom (configuration_utils.py; Hugging Face Hub; unsloth, transformers.js, nanotron)": """
        _name_or_path name_or_path _commit_hash architectures transformers_version auto_map custom_pipelines
        tokenizer_class transformers.js_config is_llama_config unsloth_version unsloth_fixed model_name finetuning_task
        base_model base_model_name_or_path license language tags vllm_version sglang_version mlx_version onnx
        llamafactory_version axolotl_config _from_auto attribute_map is_decoder""",
    "weights are cast to the graph's dtype": """
        torch_dtype dtype use_bfloat16 bf16 fp16 fp32 _pre_quantization_dtype params_dtype""",
    "chooses a kernel for the same sum, or keeps memory (llama: _attn_implementation, use_cache)": """
        use_cache _attn_implementation attn_implementation _attn_implementation_internal _attn_implementation_autoset
        _experts_implementation experts_implementation _experts_implementation_internal _flash_attn_2_enabled
        use_flash_attn use_flash_attention use_flash_attention_2 use_memory_efficient_attention use_sdpa torchscript
        tf_legacy_loss gradient_checkpointing _gradient_checkpointing use_gradient_checkpointing chunk_size_feed_forward
        low_cpu_mem_usage use_cache_quantization use_cache_kernel softmax_in_fp32 fused_qkv use_fused_rms_norm
        use_fused_mlp use_fused_rope fuse_attention_qkv fuse_attention_ffn alibi_bias_max""",
    "slices matmuls and adds the parts: the same sum up to rounding, and no longer read (llama until 4.47)": """
        pretraining_tp tensor_parallel_degree sequence_parallel""",
    "chooses what a call returns": """
        output_attentions output_hidden_states return_dict output_router_logits tie_last_hidden_states""",
    "of training only": """
        initializer_range initializer_factor init_std embedding_init_std use_mup_init attention_dropout hidden_dropout
        residual_dropout embedding_dropout resid_pdrop embd_pdrop emb_pdrop attn_pdrop classifier_dropout
        hidden_dropout_prob attention_probs_dropout_prob activation_dropout dropout router_aux_loss_coef
        router_jitter_noise router_z_loss_coef aux_loss_alpha seq_aux z_loss_weight neftune_noise_alpha label_smoothing
        ignore_index""",
    "of classifiers (configuration_utils.py)": "id2label label2id num_labels problem_type",
    "token ids and texts of the tokenizer": """
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id eod_token_id
        decoder_start_token_id bos_token eos_token pad_token unk_token prefix chat_format chat_template""",
    "lengths of other programs and of training": """
        model_max_length max_sequence_length seq_length max_seq_len max_seq_length max_model_len
        tokenizer_model_max_length training_max_length train_seq_len n_ctx""",
    "settings of generate (generation/configuration_utils.py); llmc has flags for them": """
        assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids begin_suppress_tokens
        cache_implementation cache_config compile_config constraints diversity_penalty do_sample dola_layers
        early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
        exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id guidance_scale
        length_penalty low_memory max_length max_new_tokens max_time min_length min_new_tokens min_p
        no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
        num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
        remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate sequence_bias stop_strings
        suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p typical_p watermarking_config
        task_specific_params generation_config""",
}
HARMLESS: Mapping[str, str] = {name: why for why, names in _HARMLESS.items() for name in names.split()}


# ---- what the code of a model type does without a key that says so (modeling_TYPE.py), beyond a LLaMA's

TYPES: Mapping[str, str] = {
    "qwen": "biases of q, k and v, which are packed (c_attn); intermediate_size is that of gate and up together",
    "qwen2": "biases of q, k and v",
    "qwen2_moe": "biases of q, k and v; experts with a shared one",
    "qwen3": "norms of q and k",
    "qwen3_moe": "norms of q and k; experts",
    "internlm2": "q, k and v packed by groups (wqkv); tensors of other names",
    "baichuan": "q, k and v packed (W_pack); the 13B has ALiBi; Baichuan 2 normalises lm_head",
    "chatglm": "packed tensors of other names; rope turns adjacent pairs of half a head",
    "phi": "LayerNorm; one norm for attention and MLP, which read the same input; an MLP without gate",
    "phi3": "packed tensors (qkv_proj, gate_up_proj)",
    "gemma": "norms multiply with 1 + weight; the embedding is multiplied with sqrt(hidden_size)",
    "gemma2": "as gemma, and norms behind the blocks",
    "gemma3_text": "as gemma2, and norms of q and k",
    "cohere": "LayerNorm without bias; attention and MLP read the same input; rope turns adjacent pairs",
    "olmo": "LayerNorm without weights",
    "olmo2": "norms behind the blocks; norms of q and k over all heads",
    "stablelm": "LayerNorm; rope over part of a head",
    "starcoder2": "LayerNorm; an MLP without gate",
    "nemotron": "LayerNorm with 1 + weight; an MLP without gate",
    "glm": "packed gate and up; rope turns adjacent pairs of half a head",
    "glm4": "packed gate and up; norms behind the blocks; rope turns adjacent pairs of half a head",
    "helium": "rope turns adjacent pairs",
    "arcee": "an MLP without gate",
    "ernie4_5": "rope turns adjacent pairs",
    "mixtral": "experts; tensors of other names",
    "gpt_neox": "LayerNorm; packed q, k and v by heads; an MLP without gate",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
}  # fmt: skip


# ---- what a missing key means: model type -> key -> value (the defaults of models/TYPE/configuration_TYPE.py), where
# that is not what a LLaMA means by it. Only keys that a variant may leave to its family, and such as are not off.

LLAMA = {"max_position_embeddings": 2048}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
GRANITE = {"max_position_embeddings": 2048, "attention_multiplier": 1.0}
COHERE = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**MISTRAL, "sliding_window": 4096},
    "ministral": {**MISTRAL, "sliding_window": 4096},
    "mixtral": {**MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "gemma": {**GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {**GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 8192, "sliding_window": 4096,
               "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0,
               "attn_logit_softcapping": 50.0},
    "gemma3_text": {**GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 131072, "sliding_window": 4096,
                    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phi": {"max_position_embeddings": 2048, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "cohere": {**COHERE, "rope_theta": 5e5},
    "cohere2": {**COHERE, "sliding_window": 4096},
    "olmo": {"max_position_embeddings": 2048},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "stablelm": {"num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5,
                 "partial_rotary_factor": 0.25},
    "starcoder2": {"num_key_value_heads": 2, "max_position_embeddings": 4096, "hidden_act": "gelu_pytorch_tanh",
                   "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True},
    "smollm3": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
                "no_rope_layer_interval": 4, "tie_word_embeddings": True},
    "nemotron": {"max_position_embeddings": 4096, "hidden_act": "relu2", "norm_eps": 1e-5,
                 "partial_rotary_factor": 0.5},
    "helium": {"num_key_value_heads": 20, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8, "head_dim": 128,
               "rope_theta": 1e5},
    "glm": {"num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "head_dim": 128,
            "attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "head_dim": 128,
             "attention_bias": True, "partial_rotary_factor": 0.5},
    "arcee": {"max_position_embeddings": 4096, "hidden_act": "relu2", "rms_norm_eps": 1e-5},
    "seed_oss": {"num_key_value_heads": 8, "max_position_embeddings": 524288, "attention_bias": True, "head_dim": 128},
    "ernie4_5": {"num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "head_dim": 128,
                 "tie_word_embeddings": True, "rope_theta": 5e5},
}  # fmt: skip


def with_defaults(config: Config) -> dict[str, Any]:
    """The configuration with what its missing keys mean to its model type. A key that says null keeps it."""
    kind = config.get("model_type")
    return {**(DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}), **config}
