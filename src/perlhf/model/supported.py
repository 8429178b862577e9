"""Which networks can be a base: decoder-only language models with plain causal attention.

Packing, the chunked log-probabilities and the sampler assume things about a forward pass. What a configuration gives
away is refused by name before any weight is read (`check_supported`); the rest is found out by running a few tokens
once the network is loaded (`verify_forward`).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError
from perlhf.kernels.modules import match_targets
from perlhf.method.packing import pad

if TYPE_CHECKING:
    from perlhf.model.model import Model

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
_TOLERANCE = 0.08
"""In bfloat16. On a CPU, SmolLM2-135M's states differ by up to 0.03 (2e-6 in float32) where all is well, by 0.1 with
positions off by one, and by 0.4 for sampled tokens where positions are ignored."""


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


def target_paths(network: PreTrainedModel, targets: str | tuple[str, ...], layers: str = "all") -> list[str]:
    """Paths of the linear layers below the output head that `targets` names in `layers` (`lora.match`).

    Raises:
        AdapterError: a target that matches nothing.
    """
    head = network.get_output_embeddings()
    skip = tuple(path for path, module in network.named_modules() if module is head)
    return match_targets(network.named_modules(), targets, skip, layers)


@torch.no_grad()
def verify_forward(model: "Model") -> None:
    """Computes four short sequences in each way that training and sampling do, to see that all give the same states.

    1. logits = head(last hidden state), with nothing done to them afterwards;
    2. a later token changes no earlier state: two rows agree as far as they share a prefix;
    3. in a tree, where a shared prefix is computed once, position ids and our attention are obeyed;
    4. one more token, of which the cache has what comes before, is computed as in its row.

    Raises:
        ModelError: naming what differs.
    """
    network, (decoder, head) = model.base, decoder_and_head(model.base)
    vocab = int(network.config.get_text_config().vocab_size)
    sequences = [[(37 * t + 11 * s) % vocab for t in range(5)] for s in (40, 41)]
    sequences += [sequences[0][:3], [*sequences[0][:2], *sequences[1][:3]]]
    ids = pad(sequences, 0, model.device)
    states = decoder(input_ids=ids, use_cache=False).last_hidden_state
    if _distance(network(input_ids=ids, use_cache=False).logits, head(states)) > 1e-3:
        raise _differs(network, "logits are not head(last hidden state): they are scaled, capped or otherwise changed")
    tolerance = 1e-3 if model.dtype == torch.float32 else _TOLERANCE
    if _distance(states[2, :3], states[0, :3]) > tolerance:
        raise _differs(network, "a later token changes earlier logits, so attention is not causal")
    obeyed = "position ids or a four-dimensional attention mask are not"
    try:
        shared, cache = model.prefill([row[:-1] for row in sequences], None)
        cache.fork(1)
        sampled = model.decode(torch.tensor([row[-1] for row in sequences], device=model.device), cache, None)
    except (TypeError, ValueError, RuntimeError, LookupError, StopIteration) as error:
        raise _differs(network, f"{obeyed} accepted ({error!r})") from error
    for what, of, other, back in (("tree", "shared prefixes", shared, 2), ("cache", "sampled tokens", sampled, 1)):
        separate = torch.stack([row[len(tokens) - back] for tokens, row in zip(sequences, states, strict=True)])
        if (off := _distance(other, separate)) > tolerance:
            reason = f"or our attention isn't handed its {what}: states of {of} are off by {off:.1%}"
            raise _differs(network, f"{obeyed} obeyed, {reason}")


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


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
