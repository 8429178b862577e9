"""Tiny random networks of transformers' decoder-only families, made from their configurations."""

from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 272
WIDTH, WINDOW = 8, 6
_GIVEN: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "attention_hidden_size"], 4 * WIDTH),
    **dict.fromkeys(["embedding_size", "word_embed_proj_dim"], 4 * WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "mamba_d_ssm"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_head_kv", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "swa_head_dim", "linear_key_head_dim"], WIDTH),
    **dict.fromkeys(["linear_value_head_dim", "hidden_size_per_layer_input", "index_head_dim"], WIDTH),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "moe_hidden_size"], 16),
    **dict.fromkeys(["shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"], 256),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["linear_conv_kernel_dim", "conv_kernel", "mamba_d_conv", "mamba_dt_rank", "laurel_rank"], 4),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "time_step_rank", "rotary_dim", "lora_rank"], 4),
    **dict.fromkeys(["num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_k"], 2),
    **dict.fromkeys(["mamba_expand", "expand", "index_n_heads", "num_codebooks"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "moe_layer_start_index"], 1),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_chunk_size"], WINDOW),
    **dict.fromkeys(["window_size", "local_attention_window", "attention_window_size"], WINDOW),
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size", "chunk_size", "mamba_chunk_size"], 8),
    **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "num_kv_shared_layers": 0},
}
"""Sizes by configuration key; only keys that a configuration has are set."""
_INDEXED: dict[str, Any] = {
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 4},
    "index_n_heads": 16,  # the fewer, the more scores are 0, and equal ones are chosen by the row's length
}
_PART: dict[str, Any] = {**{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}}
_OWN: dict[str, dict[str, Any]] = {
    "axk2": _INDEXED,
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "patcher_config": _PART | {"num_hidden_layers": 1},
        "encoder_config": _PART | {"hidden_size_global": 32},
        "decoder_config": _PART | {"hidden_size_global": 32, "num_hidden_layers": 2},
        "global_config": _PART | {"num_hidden_layers": 2},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v32": _INDEXED,
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "index_topk": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_head_dim": 16,
    },
    "dots3_note_text": _INDEXED
    | {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 12,
    },
    "falcon_h1": {},
    "falcon": {"new_decoder_architecture": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "git": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    },
    "glm_moe_dsa": _INDEXED,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hy_v4": _INDEXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mimo_v2_flash": {"v_head_dim": 4, "num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "recurrent", "attention"]},
    "trocr": {"decoder_ffn_dim": 64, "decoder_layers": 4, "decoder_attention_heads": 4},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64, "n_mamba_heads": 2},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1, "sliding_window": WINDOW, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}
"""What single families need beyond that."""


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
_LONG = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128},
    **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama 3.1": ("llama", "positions scaled by wavelength", {"rope_parameters": _LLAMA3}),
    "llama linear": (
        "llama",
        "positions divided",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2 yarn": ("qwen2", "YaRN", {"rope_parameters": _YARN, "use_sliding_window": False}),
    "phi3 longrope": ("phi3", "LongRoPE", {"rope_parameters": _LONG, "original_max_position_embeddings": 128}),
    "mistral without window": ("mistral", "no window", {"sliding_window": None}),
    "gemma2 caps": (
        "gemma2",
        "caps on scores and logits",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "olmo clipped": ("olmo", "clipped queries, keys and values", {"clip_qkv": 0.5}),
    "cohere norms": ("cohere", "norms of queries and keys", {"use_qk_norm": True}),
    "llama4 untempered": ("llama4_text", "scores not scaled by position", {"attn_temperature_tuning": False}),
    "llama4 tempered": ("llama4_text", "scores scaled by position", {"floor_scale": 4, "attn_scale": 0.5}),
    "falcon alibi": ("falcon", "ALiBi", {"alibi": True, "new_decoder_architecture": False}),
    "opt projected": ("opt", "states narrower outside", {"word_embed_proj_dim": 16}),
    "gpt2 scaled": ("gpt2", "scores divided by layer", {"scale_attn_by_inverse_layer_idx": True}),
    "deepseek_v3 direct": ("deepseek_v3", "queries of full rank", {"q_lora_rank": None}),
    "gemma3n shared": ("gemma3n_text", "last layers read the keys of earlier ones", {"num_kv_shared_layers": 2}),
    "gemma4 shared": ("gemma4_text", "last layers read the keys of earlier ones", {"num_kv_shared_layers": 2}),
    "gemma4 experts": (
        "gemma4_text",
        "a mixture of experts",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "granite scaled": (
        "granite",
        "multipliers of embeddings, residuals, scores and logits",
        {
            **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
            **{"attention_multiplier": 0.2, "logits_scaling": 8.0},
        },
    ),
    "jamba dense": ("jamba", "no experts", {"num_experts": 1, "num_experts_per_tok": 1}),
    "stablelm parallel": (
        "stablelm",
        "parallel residuals, norms by head",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "gpt_neox sequential": ("gpt_neox", "sequential residuals", {"use_parallel_residual": False}),
}
"""Settings of real checkpoints, tiny: family, what is unlike its defaults, and the settings."""


def configuration(family: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration with each of the family's kinds of layers, and `changes`."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    kind: Any = CONFIG_MAPPING[family]
    standard = kind()
    standard.allow_global_per_layer_attribute_access = True
    given = {}
    for key, value in _GIVEN.items():
        had = getattr(standard, key, None)
        window = had is None and "window" in key
        numeric = isinstance(had, int | float) and not isinstance(had, bool)
        if hasattr(standard, key) and not isinstance(getattr(kind, key, None), property) and not window:
            if numeric or (had is None and key != "n_inner"):
                given[key] = value
    if hasattr(standard, "qk_rope_head_dim"):  # latent attention has widths of its own, and a key for each head
        given = {key: value for key, value in given.items() if key != "head_dim"} | {"num_key_value_heads": 4}
    layers = getattr(standard, "layer_types", None)
    if layers and not isinstance(getattr(kind, "layer_types", None), property) and family not in _OWN:
        given["layer_types"] = (list(dict.fromkeys(layers)) * 4)[:4]
    return kind(**given | _OWN.get(family, {}) | changes)


STEEP = {"mamba": 2.0}
"""Matrices of these are made so many times as large, not 4: with 4 rounding the weights in their last digit moves
gradients by 0.24 %, through the exponents of the recurrence, and no family may be off by more than 0.2 %."""


def network(family: str, size: float | None = None, **changes: Any) -> PreTrainedModel:
    """A random network in float32, its matrices `size` (4) times as large as its initialisation makes them."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(configuration(family, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(size or STEEP.get(family, 4.0))
    return made
