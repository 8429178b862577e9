"""The language model inside a multimodal checkpoint: its configuration, and which of the checkpoint's tensors are its.

Where transformers has a causal language model for the text part's configuration, it is that one. `_SAME_ON_TEXT` has
text parts that compute what a plain family does as long as there is text alone. Towers of images and sounds are never
read.
"""

import copy
from collections.abc import Collection
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError

_SAME_ON_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4v_moe_text": ("glm4_moe", {}),
    "glm4v_text": ("glm4", {}),
    "glm_ocr_text": ("glm4", {"attention_bias": False}),
    "hunyuan_vl_text": ("hunyuan_v1_dense", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_vl_text": ("qwen3", {}),
}
"""Their tokens have three positions (time, height, width), which are one where there is text alone: their rotary
embeddings are then the plain family's."""
_BOTH_WAYS = ("paligemma",)
"""Networks whose prompts are read in both directions, which their language model alone doesn't do."""
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""What rotary embeddings of three positions are told besides."""
_ALLOWED = "text models, and multimodal ones whose text part is one (Gemma 3, Llama 4, Mistral 3, Qwen 2.5-VL, ...)"
_HINT = "a text model of the same family; most multimodal ones are made from one"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a configuration has a text part and others, all of which read only what comes before."""
    return not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config


def text_config(whole: PreTrainedConfig, names: Collection[str]) -> PreTrainedConfig:
    """The configuration of the language model alone.

    Args:
        whole: of a multimodal network (`is_multimodal`).
        names: the checkpoint's tensors. An output head among them isn't tied to the embedding.

    Raises:
        ModelError: its text part can't stand alone.
    """
    if whole.model_type in _BOTH_WAYS:
        what = f"{whole.model_type} can't be a base: it reads prompts in both directions"
        raise ModelError(what, where="base", allowed=_ALLOWED, hint=_HINT)
    part = copy.deepcopy(whole.get_text_config(decoder=True))
    if AutoModelForCausalLM._model_mapping.get(type(part), None) is None:
        part = _plain(whole, part)
    part.tie_word_embeddings = not any(name.endswith("lm_head.weight") for name in names)
    for key in _TOKENS:
        if getattr(part, key, None) is None:
            setattr(part, key, getattr(whole, key, None))
    if (quantised := getattr(whole, "quantization_config", None)) is not None:
        part.quantization_config = quantised
    return part


def names_of_text(names: Collection[str], network: PreTrainedModel) -> dict[str, str]:
    """Which tensors of a multimodal checkpoint are the language model's: their names there, and in `network`.

    Its embedding tells how all names of it begin; where several parts have one, the one is taken of which most tensors
    are the network's.

    Args:
        names: all of the checkpoint.
        network: the language model, without weights.

    Raises:
        ModelError: there is none in it.
    """
    embedding: Any = network.get_input_embeddings()
    whole_path = next(name for name, module in network.named_modules() if module is embedding) + ".weight"
    body = whole_path.partition(".")[0] + "."
    path = whole_path.removeprefix(body)
    own = {name.removeprefix(body) for name in network.state_dict() if name.startswith(body)}
    roots = {name.partition(".")[0] for name in own}
    starts = {name[: -len(path)] for name in names if name == path or name.endswith("." + path)}
    if not starts:
        what = f"the weights hold no language model: no tensor is called {path}"
        raise ModelError(what, where="base", hint="the checkpoint as its authors published it, with all its parts")
    start = max(sorted(starts), key=lambda start: sum(start + name in names for name in own))
    found = {}
    for name in names:
        rest = name.removeprefix(start)
        if name.startswith(start) and rest.partition(".")[0] in roots:
            found[name] = body + rest
    outer = start.split(".")[0] + "."
    heads = [name for name in names if name.endswith("lm_head.weight") and name not in found]
    if heads:  # beside the text part's body; other parts may have heads of their own
        found[max(heads, key=lambda name: (name.startswith(outer), -len(name)))] = "lm_head.weight"
    return found


def _plain(whole: PreTrainedConfig, part: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the plain family that computes the same on text.

    Raises:
        ModelError: there is none.
    """
    family, fixed = _SAME_ON_TEXT.get(part.model_type, ("", {}))
    if not family:
        raise ModelError(
            f"{whole.model_type} can't be a base: transformers has no causal language model for its text part alone "
            f"({part.model_type})",
            where="base",
            allowed=_ALLOWED,
            hint=_HINT,
        )
    kind: Any = CONFIG_MAPPING[family]
    known = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    given = {key: value for key, value in part.to_dict().items() if key in known}
    if "head_dim" in known and given.get("head_dim") is None:
        given["head_dim"] = part.hidden_size // part.num_attention_heads
    given["rope_parameters"] = {
        key: "default" if value == "mrope" else value
        for key, value in (given.get("rope_parameters") or {}).items()
        if key not in _OF_IMAGES
    }
    return kind(**given | fixed)
