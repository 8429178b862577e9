"""Tiny random multimodal networks, made from configurations as transformers reads them."""

from typing import Any

import networks
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOWER |= {
    "num_heads": 4,
    "depth": 2,
    "embed_dim": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_THREE_WAYS: dict[str, dict[str, Any]] = {
    "glm4v": {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
    "glm4v_moe": {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
    "glm_ocr": {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
    "hunyuan_vl": {"mrope_section": [1, 1, 2]},
    "qwen2_5_omni_thinker": {"mrope_section": [2, 3, 3]},
    "qwen2_5_vl": {"mrope_section": [2, 3, 3]},
    "qwen2_vl": {"mrope_section": [2, 3, 3]},
}
"""Sections of rotary embeddings with three positions: they must add up to half a head's width."""
_WIDTHS = {"glm4v": 512, "glm4v_moe": 512, "glm_ocr": 512, "hunyuan_vl": 32}


def configuration(family: str) -> PreTrainedConfig:
    """A small configuration of the whole network."""
    kind: Any = CONFIG_MAPPING[family]
    whole = kind()
    text = whole.get_text_config(decoder=True)
    for name in whole.sub_configs:
        part = getattr(whole, name, None)
        if part is text:
            setattr(whole, name, _text(family, text.model_type))
        elif part is not None or (family == "gemma4" and name == "vision_config"):
            setattr(whole, name, _shrunk(part or whole.sub_configs[name]()))
    return whole


def network(family: str) -> PreTrainedModel:
    """A random one in float32, its matrices four times as large as its initialisation makes them."""
    torch.manual_seed(0)
    made: Any = AutoModelForImageTextToText.from_config(configuration(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made


def _text(family: str, model_type: str) -> PreTrainedConfig:
    if model_type in ("gemma4_text", "gemma4_unified_text"):
        kind: Any = CONFIG_MAPPING[model_type]
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": 272}
        more = {"vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8, "sliding_window": 4}
        layers = ["sliding_attention", "full_attention"] * 2
        return kind(**sizes, **more, layer_types=layers, num_kv_shared_layers=0, pad_token_id=0)
    text: Any = networks.configuration(model_type)
    if family in _THREE_WAYS:
        text.rope_parameters = _PLAIN | _THREE_WAYS[family]
        text.hidden_size = _WIDTHS.get(family, 64)
    if hasattr(text, "moe_intermediate_size"):
        text.moe_intermediate_size = 24
    return text


def _shrunk(part: Any) -> Any:
    for key, value in _TOWER.items():
        had = getattr(part, key, None)
        if (
            isinstance(had, int)
            and not isinstance(had, bool)
            and not isinstance(getattr(type(part), key, None), property)
        ):
            setattr(part, key, value)
    return part
