"""Which networks can be a base: decoder-only language models with plain causal attention.

Packing, the chunked log-probabilities and the sampler assume things about a forward pass. What a configuration gives
away is refused by name before any weight is read (`check_supported`); the rest is found out by running eight tokens
once the model is loaded (`verify_forward`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError

_ALLOWED = "decoder-only language models with full causal attention (Llama, Qwen2, Qwen3, SmolLM2, OPT, GPT-NeoX, ...)"
_NEUTRAL_LOGITS = {  # configuration keys that change logits or attention scores, other than by these values
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "output_logit_soft_cap": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
# Relative distances of SmolLM2-135M on a CPU: 0 (bfloat16) and 2e-6 (float32) where all is well; 0.28 with positions
# off by one, 0.35 with the mask ignored, 5 with attention to later tokens.
_TOLERANCE = 0.08


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses architectures whose attention or logits aren't those that training assumes.

    Raises:
        ModelError: naming the architecture and the property.
    """
    reason = next(_unsupported(config), None)
    if reason:
        raise ModelError(f"{config.model_type} can't be a base: {reason}", where="base", allowed=_ALLOWED)


def decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The network below the head (gives `last_hidden_state`) and the linear layer that makes logits of it.

    Raises:
        ModelError: there is no such layer.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise _differs(model, "it has no output layer")
    return model.base_model, head


@torch.no_grad()
def verify_forward(model: PreTrainedModel) -> None:
    """Runs eight tokens to see that the model computes what training assumes.

    1. logits = head(last hidden state), with nothing done to them afterwards;
    2. a later token changes no earlier logits;
    3. position ids and a four-dimensional mask are obeyed: behind four shared tokens, a branch that can't see the
       branch beside it and counts its positions from the fork gives the logits that it has on its own.

    Raises:
        ModelError: naming what differs.
    """
    ids = ((torch.arange(8, device=model.device) * 13 + 5) % model.config.vocab_size)[None]
    decoder, head = decoder_and_head(model)
    logits = model(ids, use_cache=False).logits
    if _distance(head(decoder(ids, use_cache=False).last_hidden_state), logits) > 1e-3:
        raise _differs(model, "logits are not head(last hidden state): they are scaled, capped or otherwise changed")
    other = model(torch.cat([ids[:, :7], ids[:, :1]], dim=1), use_cache=False).logits
    if _distance(other[:, :7], logits[:, :7]) > _TOLERANCE:
        raise _differs(model, "a later token changes earlier logits, so attention is not causal")
    alone = model(ids[:, [0, 1, 2, 3, 6, 7]], use_cache=False).logits
    if _distance(_forked_logits(model, ids)[:, 6:], alone[:, 4:]) > _TOLERANCE:
        raise _differs(model, "position ids or a four-dimensional attention mask are not obeyed")


def _forked_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [1, 8, vocab] of tokens 0-3, then 4-5 and 6-7 as two branches that don't see each other."""
    visible = torch.ones(8, 8, dtype=torch.bool, device=ids.device).tril()
    visible[6:, 4:6] = False
    mask = torch.zeros(8, 8, dtype=model.dtype, device=ids.device)
    mask = mask.masked_fill(~visible, torch.finfo(model.dtype).min)[None, None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]], device=ids.device)
    try:
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise _differs(model, f"position ids or a four-dimensional mask are not accepted ({error})") from error


def _distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected` centred on its mean over the vocabulary."""
    found, expected = found.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float((found - expected).norm() / spread.clamp_min(1e-12))


def _differs(model: PreTrainedModel, what: str) -> ModelError:
    name = type(model).__name__
    return ModelError(f"{name} can't be a base: {what}", where="base", allowed=_ALLOWED)


def _unsupported(config: PreTrainedConfig) -> Iterator[str]:
    """Why a configuration is refused, most telling reason first."""
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder"
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        yield "it attends to later tokens (is_decoder is false)"
    if config.get_text_config(decoder=True) is not config:
        yield "it joins several networks (a text model inside a multimodal one)"
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantized"
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        yield "transformers has no causal language model for it"
    yield from _attention_reasons(config)
    for key, neutral in _NEUTRAL_LOGITS.items():
        value = getattr(config, key, None)
        if value is not None and value != neutral:
            yield f"{key} = {value} changes logits or attention scores"
    if getattr(model_class, "_is_stateful", False):
        yield "it keeps a recurrent state"


def _attention_reasons(config: PreTrainedConfig) -> Iterator[str]:
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    for kind in layer_types or ():
        if kind == "sliding_attention":
            yield f"it has layers with a sliding window of {window} tokens"
        elif kind != "full_attention":
            yield f"it has {kind} layers"
    may_slide = not layer_types and getattr(config, "use_sliding_window", True)
    if window and may_slide and window < getattr(config, "max_position_embeddings", float("inf")):
        yield f"its attention has a sliding window of {window} tokens"
    if "local" in getattr(config, "attention_layers", ()):
        yield f"it has local attention layers (a sliding window of {getattr(config, 'window_size', '?')} tokens)"
    if getattr(config, "alibi", False):
        yield "its positions are ALiBi biases, not position ids"
