"""The way through a base before its weights are read.

It is as it was found when the weights were last read, else on a small copy. The copy has the base's configuration,
all its layers and their kinds, but is narrow and has random weights: which modules are called with what is decided by
code and configuration, not by how wide they are. Loading the weights tells for certain.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError
from perlhf.kernels import cpu
from perlhf.model.bases.found import first_line
from perlhf.model.bases.packaged import quiet
from perlhf.model.model import Model
from perlhf.model.supported import FAULTS, Way
from perlhf.model.ways import recall

KEPT, COPIED = "as found when it was last loaded", "as found on a small copy with random weights"
UNKNOWN = "found out when it is loaded"
_SIZE = 4.0
"""Matrices are so many times as large as they are initialised: attention then tells tokens and positions apart."""
_SIZES: dict[str, int] = {
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), 256),
    **dict.fromkeys("hidden_size d_model n_embd dim embed_dim attention_hidden_size".split(), 32),
    **dict.fromkeys("embedding_size word_embed_proj_dim".split(), 32),
    **dict.fromkeys("intermediate_size ffn_dim n_inner ffn_hidden_size mamba_d_ssm intermediate_size_mlp".split(), 64),
    "dff": 64,
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads linear_num_value_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads n_head_kv linear_num_key_heads".split(), 2),
    **dict.fromkeys("head_dim global_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim".split(), 8),
    **dict.fromkeys("hidden_size_per_layer_input index_head_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank moe_intermediate_size moe_hidden_size mamba_d_head".split(), 16),
    **dict.fromkeys("shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_head_dim".split(), 16),
    **dict.fromkeys("shared_intermediate_size expert_ffn_hidden_size".split(), 16),
    **dict.fromkeys("zero_expert_num num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("mamba_dt_rank laurel_rank time_step_rank rotary_dim lora_rank".split(), 4),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 4),
    **dict.fromkeys(
        "num_experts_per_tok top_k_experts moe_topk num_experts_per_token moe_k mamba_num_heads".split(), 4
    ),
    **dict.fromkeys("n_group topk_group n_groups mamba_n_groups".split(), 1),
    **dict.fromkeys("mamba_expand expand index_n_heads".split(), 2),
    **dict.fromkeys("mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size".split(), 8),
}
"""At most so much, by configuration key."""
_MOST = 2**26
"""Parameters of a copy that is still small."""


@dataclass(frozen=True)
class Foretold:
    """What is known of the way before the weights are read."""

    way: Way | None
    """None: nobody can tell."""
    source: str
    """How it was found, or why it can't be told."""

    @property
    def uncalled(self) -> tuple[str, ...]:
        """Layers that are never adapted, as far as that is known (`Way.uncalled`)."""
        return self.way.uncalled if self.way else ()


def foretell(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Foretold:
    """The way of a base with this configuration, loaded in a dtype onto a device."""
    if kept := recall(config, dtype, device):
        return Foretold(kept, KEPT)
    narrow = dict(_narrowed(config.to_dict()))
    try:
        network = _random(type(config).from_dict(narrow))
        with quiet(), cpu.off():
            return Foretold(Model(network, {"name": "a small copy", "sha256": ""}).way, COPIED)
    except (*FAULTS, ArithmeticError, AssertionError, ImportError, StrictDataclassError) as error:
        # Of sizes that don't go together.
        reason = error.what if isinstance(error, ModelError) else f"{type(error).__name__}: {first_line(error):.200}"
        return Foretold(None, f"{UNKNOWN}, since a small copy of it doesn't compute ({reason})")


def _random(config: PreTrainedConfig) -> PreTrainedModel:
    """A network with float32 random weights on the CPU.

    Raises:
        ValueError: it isn't small.
    """
    with quiet(), torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > _MOST:
        raise ValueError(f"it would have {size:,} parameters")
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(_SIZE)
    return network


def _narrowed(said: dict[str, Any], latent: bool = False) -> Iterator[tuple[str, Any]]:
    """A configuration's values, widths among them made small, in lists of each layer's and nested ones, too.

    Args:
        latent: attention has widths of its own, which stay, and a key for each head.
    """
    latent = latent or "qk_rope_head_dim" in said
    heads = next((said[key] for key in ("num_attention_heads", "n_head", "n_heads") if said.get(key)), None)
    for key, value in said.items():
        if key == "quantization_config":
            continue
        most = _SIZES.get(key)
        if key in ("num_key_value_heads", "num_kv_heads", "n_head_kv") and (latent or value == heads):
            most = _SIZES["num_attention_heads"]
        if key == "head_dim" and latent:
            most = None
        if key == "head_dim" and {"expand", "num_heads"} <= said.keys():  # heads of a recurrence (Mamba 2)
            most = _SIZES["expand"] * _SIZES["hidden_size"] // _SIZES["num_heads"]
        if str(key).endswith("token_id"):
            most = _SIZES["vocab_size"] - 1
        if key in ("short_factor", "long_factor") and isinstance(value, list) and not latent:
            turned = int(_SIZES["head_dim"] * (said.get("partial_rotary_factor") or 1))
            value = value[: turned // 2]  # one for each pair of a head's numbers that its position turns
        yield key, dict(_narrowed(value, latent)) if isinstance(value, dict) else _at_most(value, most)


def _at_most(value: Any, most: int | None) -> Any:
    if isinstance(value, list | tuple):
        return [_at_most(one, most) for one in value]
    if most is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    return min(value, most)
