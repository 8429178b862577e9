"""Tiny random networks of transformers' decoder-only families, made from their configurations."""

from typing import Any

import torch
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
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon": {"new_decoder_architecture": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
}
"""What single families need beyond that."""


def configuration(family: str) -> PreTrainedConfig:
    """A small configuration with each of the family's kinds of layers."""
    kind: Any = CONFIG_MAPPING[family]
    standard = kind()
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
    return kind(**given | _OWN.get(family, {}))


def network(family: str, size: float = 4.0) -> PreTrainedModel:
    """A random network in float32, its matrices `size` times as large as its initialisation makes them."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(configuration(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(size)
    return made
