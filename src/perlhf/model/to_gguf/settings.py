"""What llama.cpp must be told of a network, and which networks it would compute otherwise.

llama.cpp has a program of its own for each shape, in which much is fixed that transformers reads from a configuration.
A network that differs there would run and say something else: it is refused, by what differs.
"""

import math
from collections.abc import Iterator
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from perlhf.errors import ModelError

SHAPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""llama.cpp's architectures by transformers' model_type."""
_ALLOWED = "Llama, Qwen 2, Qwen 3 and Gemma 3 (the text model)"
_HINT = (
    "leave out --gguf: --format merged writes a checkpoint for transformers, which llama.cpp's own converter may read"
)
_STRETCHES = {
    "llama": ("default", "linear", "yarn", "llama3"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "gemma3": ("default", "linear"),
}
"""How positions may be stretched, by architecture."""
_PATTERN = 6
"""One of so many layers of a Gemma 3 sees all tokens where a file doesn't say which."""
_LARGEST = 62
"""Layers of Gemma 3 27B, by which llama.cpp knows that its attention scores are scaled by another number."""


def check_shape(config: PreTrainedConfig) -> None:
    """Refuses a network that llama.cpp doesn't compute as transformers does.

    Raises:
        ModelError: it says what differs.
    """
    kind = config.model_type
    if kind not in SHAPES:
        raise ModelError(f"no GGUF file is written of a {kind} network", where="gguf", allowed=_ALLOWED, hint=_HINT)
    for difference in _differences(SHAPES[kind], config):
        what = f"llama.cpp would compute this {kind} network otherwise: {difference}"
        raise ModelError(what, where="gguf", allowed=f"{_ALLOWED} as they were published", hint=_HINT)


def width(config: Any) -> int:
    """Numbers of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_settings(writer: gguf.GGUFWriter, config: Any, rows: int) -> None:
    """Writes what the network's program is told: sizes, norms, positions, windows.

    Args:
        writer: of a file of the network's architecture.
        config: of a network that `check_shape` lets through.
        rows: of its embedding.
    """
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width(config))
    writer.add_value_length(width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width(config))
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original(config))
    if SHAPES[config.model_type] == "gemma3" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
        windowed = [kind == "sliding_attention" for kind in config.layer_types]
        if windowed != [(layer + 1) % _PATTERN != 0 for layer in range(len(windowed))]:
            writer.add_array("gemma3.attention.sliding_window_pattern", windowed)


def rope_factors(config: Any) -> Tensor | None:
    """What Llama 3's stretching divides each angle by, float32 [width / 2]; None for networks without it."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    plain = rope["rope_theta"] ** -(torch.arange(0, width(config), 2).float() / width(config))
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return plain / stretched


def _differences(architecture: str, config: Any) -> Iterator[str]:
    """What of a network llama.cpp's program for its architecture has otherwise."""
    gemma = architecture == "gemma3"
    act, usual = config.hidden_activation if gemma else config.hidden_act, "gelu_pytorch_tanh" if gemma else "silu"
    if act != usual:
        yield f"its activation is {act}, not {usual}"
    if architecture in ("qwen3", "gemma3") and config.attention_bias:
        yield "its attention has biases"
    if architecture == "qwen2" and width(config) * config.num_attention_heads != config.hidden_size:
        yield f"its heads are {width(config)} wide, not hidden_size / num_attention_heads"
    if architecture.startswith("qwen") and "sliding_attention" in (config.layer_types or ()):
        yield "some of its layers see a window alone (use_sliding_window)"
    if gemma:
        yield from _differences_of_gemma(config)
    rope = _rope(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "only a part of each head is turned by positions (partial_rotary_factor)"
    if rope["rope_type"] not in _STRETCHES[architecture]:
        yield f"its positions are stretched by {rope['rope_type']}"
    elif rope["rope_type"] == "yarn":
        attention = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1]
        usual_ramp = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True))
        if usual_ramp != (32, 1, True) or not math.isclose(attention, 0.1 * math.log(rope["factor"]) + 1):
            yield "YaRN has other settings than factor and original_max_position_embeddings"


def _differences_of_gemma(config: Any) -> Iterator[str]:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        yield "its logits are capped (softcapping)"
    if getattr(config, "use_bidirectional_attention", None):
        yield "it reads in both directions (use_bidirectional_attention)"
    largest = config.num_hidden_layers == _LARGEST
    scaled_by = config.hidden_size // config.num_attention_heads if largest else width(config)
    if config.query_pre_attn_scalar != scaled_by:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scaled_by}"
    if config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
        yield "positions within its windows are stretched"
    if not config.sliding_window and "sliding_attention" in config.layer_types:
        yield "it has layers with a window (layer_types), and no sliding_window"


def _rope(config: Any) -> dict[str, Any]:
    """How positions become angles in layers that see all tokens."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    return {"rope_type": "default"} | rope


def _original(config: Any) -> int:
    return _rope(config).get("original_max_position_embeddings") or config.max_position_embeddings
