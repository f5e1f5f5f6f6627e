"""config.json files as their authors published them, with every key that those have.

Written down from the Hugging Face Hub (the repository is the key); `transformers_version` and the like are part of it,
because a checker has to pass over them.
"""

from __future__ import annotations

from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "llama", "torch_dtype": "float16", "use_cache": True,
}  # fmt: skip
LLAMA2 = {**LLAMA, "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False,
          "transformers_version": "4.31.0.dev0"}  # fmt: skip
LLAMA3 = {**LLAMA2, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
          "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "vocab_size": 128256,
          "transformers_version": "4.40.0.dev0"}  # fmt: skip
LLAMA31_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip


def sizes(hidden: int, ffn: int, layers: int, heads: int, positions: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "max_position_embeddings": positions} | more  # fmt: skip


# What the LLaMA family describes.
FIT: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": {
        **LLAMA, **sizes(4096, 11008, 32, 32, 2048), "max_sequence_length": 2048, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "transformers_version": "4.28.0.dev0", "vocab_size": 32000,
    },
    "meta-llama/Llama-2-13b-hf": {
        **LLAMA2, **sizes(5120, 13824, 40, 40, 4096), "_name_or_path": "meta-llama/Llama-2-13b-hf",
        "num_key_value_heads": 40, "rms_norm_eps": 1e-05, "vocab_size": 32000,
    },
    "meta-llama/Meta-Llama-3-8B": {**LLAMA3, **sizes(4096, 14336, 32, 32, 8192), "num_key_value_heads": 8},
    "meta-llama/Llama-3.1-8B-Instruct": {
        **LLAMA3, **sizes(4096, 14336, 32, 32, 131072), "eos_token_id": [128001, 128008, 128009], "mlp_bias": False,
        "num_key_value_heads": 8, "rope_scaling": LLAMA31_ROPE,
    },
    "unsloth/Llama-3.2-1B": {
        **LLAMA3, **sizes(2048, 8192, 16, 32, 131072), "_name_or_path": "meta-llama/Llama-3.2-1B", "head_dim": 64,
        "mlp_bias": False, "num_key_value_heads": 8, "pad_token_id": 128004, "tie_word_embeddings": True,
        "rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "unsloth_fixed": True,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        **LLAMA2, **sizes(2048, 5632, 22, 32, 2048), "attention_bias": False, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 32000, "torch_dtype": "bfloat16",
    },
    "lmsys/vicuna-7b-v1.5": {
        **LLAMA2, **sizes(4096, 11008, 32, 32, 4096), "_name_or_path": "vicuna-7b-v1.5", "num_key_value_heads": 32,
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "vocab_size": 32000,
    },
    "lmsys/vicuna-7b-v1.5-16k": {
        **LLAMA2, **sizes(4096, 11008, 32, 32, 4096), "max_sequence_length": 16384, "num_key_value_heads": 32,
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 4.0, "type": "linear"},
        "vocab_size": 32000,
    },
    "01-ai/Yi-6B": {
        **LLAMA2, **sizes(4096, 11008, 32, 32, 4096), "num_key_value_heads": 4, "pad_token_id": 0,
        "rms_norm_eps": 1e-05, "rope_theta": 5000000.0, "vocab_size": 64000,
    },
    "codellama/CodeLlama-7b-hf": {
        **LLAMA2, **sizes(4096, 11008, 32, 32, 16384), "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000, "vocab_size": 32016,
    },
    "deepseek-ai/deepseek-llm-7b-base": {
        **LLAMA2, **sizes(4096, 11008, 30, 32, 4096), "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001,
    },
    "deepseek-ai/deepseek-coder-6.7b-base": {
        **LLAMA2, **sizes(4096, 11008, 32, 32, 16384), "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "vocab_size": 32256,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        **LLAMA2, **sizes(576, 1536, 30, 9, 8192), "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.041666666666666664, "is_llama_config": True,
        "mlp_bias": False, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
}  # fmt: skip

# What it does not describe, and the keys by which.
OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mistralai/Mistral-7B-v0.1": (
        {**LLAMA, **sizes(4096, 14336, 32, 32, 32768), "architectures": ["MistralForCausalLM"], "model_type": "mistral",
         "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000},
        {"model_type", "sliding_window"}),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {**LLAMA, **sizes(4096, 14336, 32, 32, 32768), "architectures": ["MistralForCausalLM"], "model_type": "mistral",
         "attention_dropout": 0.0, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32768},
        {"model_type"}),
    "Qwen/Qwen2-7B": (
        {**LLAMA, **sizes(3584, 18944, 28, 28, 131072), "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
         "attention_dropout": 0.0, "max_window_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "use_sliding_window": False,
         "torch_dtype": "bfloat16", "vocab_size": 152064},
        {"model_type"}),
    "mistralai/Mixtral-8x7B-v0.1": (
        {**LLAMA, **sizes(4096, 14336, 32, 32, 32768), "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
         "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
         "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000},
        {"model_type", "num_experts_per_tok", "num_local_experts"}),
    "ibm-granite/granite-3.0-2b-base": (
        {**LLAMA, **sizes(2048, 8192, 40, 32, 4096), "architectures": ["GraniteForCausalLM"], "model_type": "granite",
         "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625, "bos_token_id": 0,
         "embedding_multiplier": 12.0, "eos_token_id": 0, "logits_scaling": 8.0, "mlp_bias": False,
         "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
         "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "vocab_size": 49155},
        {"model_type", "attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"}),
    "google/gemma-7b": (
        {**LLAMA, **sizes(3072, 24576, 28, 16, 8192), "architectures": ["GemmaForCausalLM"], "model_type": "gemma",
         "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256,
         "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None, "num_key_value_heads": 16, "pad_token_id": 0,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
         "vocab_size": 256000},
        {"model_type", "hidden_act"}),
    "google/gemma-2-9b": (
        {**LLAMA, **sizes(3584, 14336, 42, 16, 8192), "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
         "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "cache_implementation":
         "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
         "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 8, "pad_token_id": 0,
         "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
         "sliding_window_size": 4096, "torch_dtype": "float32", "vocab_size": 256000},
        {"model_type", "hidden_act", "hidden_activation", "sliding_window", "sliding_window_size",
         "attn_logit_softcapping", "final_logit_softcapping"}),
    "microsoft/Phi-3-mini-128k-instruct": (
        {**LLAMA, **sizes(3072, 8192, 32, 32, 131072), "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
         "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
         "embd_pdrop": 0.0, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
         "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
         "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064},
        {"model_type", "rope scaling"}),
    "internlm/internlm2-7b": (
        {**LLAMA, **sizes(4096, 14336, 32, 32, 32768), "architectures": ["InternLM2ForCausalLM"],
         "attn_implementation": "eager", "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"},
         "bias": False, "model_type": "internlm2", "num_key_value_heads": 8, "pad_token_id": 2, "rms_norm_eps": 1e-05,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "vocab_size": 92544},
        {"model_type"}),
    "meta-llama/Llama-4-Scout-17B-16E": (
        {"architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "model_type": "llama4",
         "text_config": {"hidden_size": 5120}, "vision_config": {"hidden_size": 1408}, "torch_dtype": "bfloat16"},
        {"model_type", "text_config", "vision_config"}),
}  # fmt: skip
