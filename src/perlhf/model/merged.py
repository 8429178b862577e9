"""Base and adapter in one plain network of transformers: an adapter merged into whole weights, or read-back ones."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from perlhf.errors import AdapterError, ConfigError
from perlhf.kernels.modules import update_of
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import comes_quantised, load_base, load_network
from perlhf.model.bases.quantised import is_quantised, quantised_layers
from perlhf.model.model import Model


def merged_network(model: Model, adapter: Adapter, base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """A second network with the adapter's update in its weights; a classifier where the adapter has a score head.

    A quantised base's weights are those that are read back, not those of the checkpoint that it was quantised from.

    Raises:
        ConfigError: transformers has no such classifier; AdapterError: a layer that it lacks.
    """
    network = bare_network(model, base, dtype) if adapter.score_head is None else _classifier(base, model, dtype)
    _merge(network, adapter)
    return network


def bare_network(model: Model, base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """A second network of plain layers without any adapter; of a quantised base with the weights that are read back."""
    if is_quantised(model.base):
        return _plain_network(model.base, AutoModelForCausalLM, dtype)
    return load_base(base, dtype, model.device)


@torch.no_grad()
def rounded_to(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes each weight one that `dtype` can hold; weights stay in the dtype that they are in."""
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype))


def _classifier(base: Base, model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A second network, plain, with a classification head."""
    if AutoModelForSequenceClassification._model_mapping.get(type(model.base.config), None) is None:
        name = type(model.base).__name__
        raise ConfigError(f"transformers has no classifier beside {name}", where="format", hint="--format peft")
    network: Any
    if is_quantised(model.base) or comes_quantised(base):
        network = _plain_network(model.base, AutoModelForSequenceClassification, dtype)
    else:
        network = load_network(base, AutoModelForSequenceClassification, dtype, model.device, num_labels=1)
    head = getattr(network, "score", None)
    if not isinstance(head, nn.Linear) or head.weight.shape != (1, model.hidden_size) or head.bias is not None:
        what = f"the head of {type(network).__name__} isn't one row without bias"
        raise ConfigError(what, where="format", hint="--format peft")
    return network.to(model.device).eval().requires_grad_(False)


@torch.no_grad()
def _merge(network: PreTrainedModel, adapter: Adapter) -> None:
    """Adds the adapter to the network's weights, in float32, one weight at a time."""
    parameters = dict(network.named_parameters())
    for name, weight in adapter.weights.items():
        if name in parameters:  # a classifier has no output head
            parameters[name].copy_(weight)
    for path, pair in adapter.pairs.items():
        name = f"{path}.weight"
        if name not in parameters:
            raise AdapterError(f"{type(network).__name__} has no '{path}' to merge into", hint="--format peft")
        parameters[name].copy_(parameters[name].float() + update_of(network.get_submodule(path), pair))
    if adapter.score_head is not None:
        parameters["score.weight"].copy_(adapter.score_head)


@torch.no_grad()
def _plain_network(quantised: PreTrainedModel, kind: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A network of plain layers with the weights of a quantised one as they are read back, on its device.

    Args:
        quantised: the network that holds them.
        kind: of transformers' classes that make a network of a configuration. A head that only this one has is zero.
        dtype: of the weights.
    """
    config: Any = copy.deepcopy(quantised.config)
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(config, dtype=dtype)
    dense = {f"{path}.weight": layer for path, layer in quantised_layers(quantised)}
    held = dict(quantised.named_parameters(remove_duplicate=False))
    for name, parameter in list(network.named_parameters(remove_duplicate=False)):
        module, leaf = _place(network, name)
        value = dense[name].dense() if name in dense else held.get(name)
        if value is None and name == "score.weight":
            value = torch.zeros(parameter.shape, device=quantised.device)
        if value is None:
            raise AdapterError(f"the base has no '{name}' for {type(network).__name__}", hint="--format peft")
        if name in dense and isinstance(module, Conv1D):  # whose weight lies the other way round
            value = value.t()
        setattr(module, leaf, nn.Parameter(value.to(dtype, copy=True), requires_grad=False))
    for name, buffer in quantised.named_buffers():
        module, leaf = _place(network, name)
        if hasattr(module, leaf):
            module.register_buffer(leaf, buffer.clone(), persistent=leaf not in module._non_persistent_buffers_set)
    network.tie_weights()
    network.generation_config = copy.deepcopy(quantised.generation_config)
    return network.to(quantised.device).eval()


def _place(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter of this name, and its name there."""
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf
