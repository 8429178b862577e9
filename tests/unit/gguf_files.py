"""Networks of transformers written as GGUF files, as llama.cpp's converter writes them; nothing of our reader is used.

Each family's tensors are stored its way: names of the gguf package, heads of a llama interleaved, norms that count from
one, matrices of GPT-2 turned, experts apart. So what is read back from a file must be the network that went in.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

LAYERS, HIDDEN, HEADS, KEYS, INNER, WIDTH = 2, 32, 4, 2, 48, 16
"""WIDTH isn't HIDDEN / HEADS, so that a reader has to look."""
CONTROL, USER, BYTE, NORMAL = 3, 4, 6, 1
BYTE_LEVEL = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "12", "ab", "\u0120a", "\u0120ab", "<|turn|>"]
MERGES = ["1 2", "a b", "\u0120 a", "\u0120a b"]
_SHAPE: dict[str, Any] = {
    **{"vocab_size": len(BYTE_LEVEL), "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INNER},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": WIDTH, "max_position_embeddings": 256},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
_FULL_WIDTH = {"head_dim": HIDDEN // HEADS}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def gemma_rope(**full: Any) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": 1000.0}
    both = {"full_attention": {"rope_type": "default", "rope_theta": 50000.0, **full}, "sliding_attention": sliding}
    return {"rope_parameters": both}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WIDE = [1.0 + index / 2 for index in range(WIDTH // 2)]
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", rope(5000.0)),
    "llama, untied": ("llama", "llama", rope(5000.0) | {"tie_word_embeddings": False}),
    "llama, biases": ("llama", "llama", rope(5000.0) | {"attention_bias": True}),
    "llama 3.1": ("llama", "llama", rope(500000.0, **LLAMA3, original_max_position_embeddings=8192)),
    "llama, linear": ("llama", "llama", rope(5000.0, rope_type="linear", factor=4.0)),
    "llama, yarn": ("llama", "llama", rope(5000.0, **YARN)),
    "mistral": ("llama", "mistral", rope(5000.0) | {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", rope(5000.0) | _FULL_WIDTH),
    "qwen2, yarn": ("qwen2", "qwen2", rope(5000.0, **YARN) | _FULL_WIDTH),
    "qwen3": ("qwen3", "qwen3", rope(5000.0)),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        rope(5000.0)
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "gemma2": ("gemma2", "gemma2", rope(5000.0) | {"sliding_window": 4, "query_pre_attn_scalar": WIDTH}),
    "gemma3": ("gemma3", "gemma3_text", gemma_rope() | {"sliding_window": 4, "query_pre_attn_scalar": WIDTH}),
    "gemma3, stretched": (
        "gemma3",
        "gemma3_text",
        gemma_rope(rope_type="linear", factor=8.0) | {"sliding_window": 4, "query_pre_attn_scalar": WIDTH},
    ),
    "gemma3, other windows": (
        "gemma3",
        "gemma3_text",
        gemma_rope()
        | {"sliding_window": 4, "query_pre_attn_scalar": WIDTH, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "phi3": ("phi3", "phi3", rope(5000.0) | _FULL_WIDTH),
    "phi3, long": (
        "phi3",
        "phi3",
        rope(5000.0, rope_type="longrope", long_factor=[2.0] * 4, short_factor=[1.0, 1.5, 2.0, 3.0])
        | _FULL_WIDTH
        | {"original_max_position_embeddings": 64},
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        rope(5000.0, partial_rotary_factor=0.5) | _FULL_WIDTH | {"use_qkv_bias": True},
    ),
    "starcoder2": ("starcoder2", "starcoder2", rope(5000.0) | _FULL_WIDTH | {"sliding_window": None}),
    "gpt2": ("gpt2", "gpt2", {"n_inner": INNER}),
    "nemotron": ("nemotron", "nemotron", rope(5000.0, partial_rotary_factor=0.5) | _FULL_WIDTH),
    "mamba": ("mamba", "mamba", {"state_size": 8, "time_step_rank": 4, "conv_kernel": 4, "intermediate_size": 64}),
    "lfm2": (
        "lfm2",
        "lfm2",
        rope(5000.0)
        | _FULL_WIDTH
        | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    ),
}
"""By what is tested: GGUF's architecture, transformers' family, and settings of its own."""


def random_network(family: str) -> PreTrainedModel:
    """A network in float32 whose weights bfloat16 holds exactly, none of them what they begin as."""
    torch.manual_seed(0)
    _, kind, own = FAMILIES[family]
    config = CONFIG_MAPPING[kind](**_SHAPE | own)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(0.0, 1.0)
            elif "norm" in name and parameter.ndim == 1:
                parameter.uniform_(0.25, 0.75)
            else:
                parameter.normal_(0.0, 0.2)
            parameter.copy_(parameter.to(torch.bfloat16))
    network.tie_weights()
    return network


def write_network(path: Path, family: str, network: PreTrainedModel, **tokenizer: Any) -> Path:
    """A whole GGUF file in float32. `tokenizer` changes what `write_tokenizer` writes."""
    architecture = FAMILIES[family][0]
    writer = gguf.GGUFWriter(path, architecture)
    write_settings(writer, architecture, network.config)
    write_tokenizer(writer, **tokenizer)
    for name, tensor in stored_tensors(architecture, network).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(
    writer: gguf.GGUFWriter,
    model: str = "gpt2",
    pre: str | None = "gpt-2",
    tokens: list[str] = BYTE_LEVEL,
    types: list[int] | None = None,
    scores: list[float] | None = None,
    merges: list[str] | None = MERGES,
    settings: dict[str, float] | None = None,
    **flags: Any,
) -> None:
    """A byte-level BPE, or other tables; `flags` are calls of the writer, `settings` any numbers."""
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [CONTROL if token.startswith("<") and token != "<" else NORMAL for token in tokens])
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, number in (settings or {}).items():
        writer.add_float32(key, number)
    for name, value in flags.items():
        getattr(writer, name)(value)


def write_settings(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings if architecture != "mamba" else 256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "mamba":
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    layers = getattr(config, "layer_types", None) or []
    keys: Any = [KEYS * (kind != "conv") for kind in layers] if architecture == "lfm2" else config.num_key_value_heads
    writer.add_head_count_kv(keys)
    for name in ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps"):
        if hasattr(config, name):
            plain = architecture in ("stablelm", "starcoder2")
            (writer.add_layer_norm_eps if plain else writer.add_layer_norm_rms_eps)(getattr(config, name))
            break
    width = getattr(config, "head_dim", None) or HIDDEN // HEADS
    if width != HIDDEN // HEADS:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma3" and "full_attention" in layers:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in layers])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _write_positions(writer, config, width)


def _write_positions(writer: gguf.GGUFWriter, config: Any, width: int) -> None:
    settings = config.rope_parameters
    settings = settings.get("full_attention", settings)
    writer.add_rope_freq_base(settings["rope_theta"])
    if "sliding_attention" in config.rope_parameters:
        base = config.rope_parameters["sliding_attention"]["rope_theta"]
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", base)
    turned = int(width * settings.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(turned)
    match settings["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(settings["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(settings["factor"])
            writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        case "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(settings, turned))
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
            for which in ("long", "short"):
                writer.add_tensor(f"rope_factors_{which}.weight", np.array(settings[f"{which}_factor"], np.float32))
        case _:
            pass


def llama3_factors(settings: dict[str, Any], width: int) -> np.ndarray:
    """What llama.cpp divides each angle by: wavelengths below 8192 / 4 stay, those above 8192 are stretched."""
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * np.pi * settings["rope_theta"] ** (index / width)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(settings["factor"])
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / settings["factor"] + smooth))
    return np.array(factors, np.float32)


def stored_tensors(architecture: str, network: PreTrainedModel) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[_enum(architecture)], LAYERS)
    tied = network.config.tie_word_embeddings
    found: dict[str, np.ndarray] = {}
    for name, tensor in network.state_dict().items():
        value = tensor.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = np.split(value, 2, axis=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        if name == "lm_head.weight" and tied:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        found[stored] = _stored(architecture, name, value)
    return found


def _enum(architecture: str) -> str:
    return next(one.name for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _stored(architecture: str, name: str, value: np.ndarray) -> np.ndarray:
    """A tensor's values as the converter of its architecture keeps them."""
    match architecture:
        case "llama" if ".q_proj." in name or ".k_proj." in name:
            heads = HEADS if ".q_proj." in name else KEYS
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            return halves.swapaxes(1, 2).reshape(value.shape)
        case "gemma2" | "gemma3" | "nemotron" if name.endswith("norm.weight"):
            return value + 1
        case "gpt2" if value.ndim == 2 and ".h." in name:
            return value.T
        case "mamba" if name.endswith("A_log"):
            return -np.exp(value)
        case "mamba" | "lfm2" if ".conv" in name and value.ndim == 3:
            return value.squeeze(1)
        case _:
            return value


def logits(network: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0]


def sentencepiece(text: str, tokens: list[str], types: list[int], scores: list[float], space_before: bool) -> list[int]:
    """SentencePiece as it is described, slowly: special tokens whole, then the best pair is joined, again and again;
    what is no token in the end becomes bytes.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER)]
    cut = re.compile("|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True)))
    found: list[int] = []

    def join(part: str) -> None:
        pieces = list(part.replace(" ", "\u2581"))
        while True:
            pairs = [(at, a + b) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
            known = [(-scores[ids[pair]], at) for at, pair in pairs if pair in ids and types[ids[pair]] == NORMAL]
            if not known:
                break
            best = min(known)[1]
            pieces[best : best + 2] = ["".join(pieces[best : best + 2])]
        for piece in pieces:
            found.extend([ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()])

    at = 0
    for match in cut.finditer(text):
        join((" " if space_before and not at and match.start() else "") + text[at : match.start()])
        found.append(ids[match[0]])
        at = match.end()
    join((" " if space_before and not at and text else "") + text[at:])
    return found
