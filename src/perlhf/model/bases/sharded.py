"""A base spread over several workers while it is loaded, layer by layer: none of them ever holds all of it.

Its files are mapped. One layer after the other gets into the dtype and to the device of its use, its modules become
ours (`kernels.modules`), and all but this worker's part of it is given back. Modules can't be exchanged later on, so
every linear layer is made one that takes adapters.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError
from perlhf.kernels import modules
from perlhf.model.bases.weights import forget_pages
from perlhf.model.supported import network_below
from perlhf.parallel.shard import Shards, whole

_WHOLE = "shard: none keeps the base whole on each worker"


class TiedHead(nn.Module):
    """An output head whose weight is the embedding's, which is kept in parts."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self._embedding = (embedding,)  # no module of its own, or its parameters would be there twice

    @property
    def weight(self) -> Tensor:
        """The embedding's: whole inside `whole(holder_of_head(network))` alone."""
        weight: Any = self._embedding[0].weight
        return weight

    def forward(self, states: Tensor) -> Tensor:
        """Products [..., vocab] of states [..., hidden]."""
        with whole(self._embedding[0]):
            return F.linear(states, self.weight)


def holder_of_head(network: PreTrainedModel) -> nn.Module:
    """The part that `whole` takes for the output head's weight to be whole."""
    head = network.get_output_embeddings()
    return head._embedding[0] if isinstance(head, TiedHead) else head  # pyright: ignore[reportReturnType]


def held_dtype(config: PreTrainedConfig, dtype: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """The dtype in which a network is read before its layers are converted to `dtype`: as it is stored, where it is
    the same whether it is converted while it is read or later.

    Args:
        stored: of the files; None where there are several.
    """
    if stored in (None, dtype):
        return dtype
    with torch.device("meta"):
        read, used = (AutoModelForCausalLM.from_config(config, dtype=one) for one in (stored, dtype))
    buffers = [{name: buffer.dtype for name, buffer in network.named_buffers()} for network in (read, used)]
    return stored if buffers[0] == buffers[1] and not used._keep_in_fp32_modules_strict else dtype


def spread(network: PreTrainedModel, dtype: torch.dtype, device: torch.device, shards: Shards) -> PreTrainedModel:
    """The network with its layers in parts, on `device` in `dtype`; its modules are ours already.

    Args:
        network: frozen, mapped or copied, on the CPU in `held_dtype`.

    Raises:
        ModelError: it has no layers, or layers share weights, so that it can't be spread.
    """
    decoder, head, embedding = network_below(network), network.get_output_embeddings(), network.get_input_embeddings()
    blocks = _blocks(network, decoder)
    tied = isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
    _check_apart(network, tied)
    converts = network.dtype != dtype
    inside: set[str] = set()
    for path, block in blocks.items():
        _into(block, dtype if converts else None, device)
        paths = {f"{path}.{name}" if name else path for name, _ in block.named_modules()}
        inside |= paths
        modules.fuse(network, paths)
        _take_adapters(network, paths, None)
        _give(block, shards)
    rest = {path for path, _ in network.named_modules()} - inside
    outside = [m for path, m in network.named_modules() if path in rest]
    for module in outside:
        _into(module, dtype if converts else None, device, recurse=False)
    modules.fuse(network, rest)
    head = network.get_output_embeddings()
    _take_adapters(network, rest, head)
    for module in outside:
        if isinstance(module, nn.Embedding):
            _give(module, shards)
    if tied:
        path = next(path for path, module in network.named_modules() if module is head)
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, TiedHead(embedding).train(False))
    elif head is not None:
        _give(head, shards)
    # Whoever calls the layers first: some networks pass over the module that they are in by name.
    path = next(iter(blocks)).rpartition(".")[0].rpartition(".")[0]
    _give(network.get_submodule(path), shards)
    if next(_plain(decoder), None) is not None:
        _give(decoder, shards)
    if device.type != "cpu":
        for buffers in (module._buffers for module in network.modules()):
            buffers |= {name: None if one is None else one.to(device) for name, one in buffers.items()}
    if converts:
        network.config.dtype = dtype
    return network


def _blocks(network: nn.Module, decoder: nn.Module) -> dict[str, nn.Module]:
    """The layers: members of the decoder's list of modules with most parameters, by their paths in the network.

    Raises:
        ModelError: there is no such list.
    """
    inside = {*decoder.modules()}
    named = [(path, one) for path, one in network.named_modules() if isinstance(one, nn.ModuleList) and one in inside]
    lists = {path: one for path, one in named if len(one)}
    if not lists:
        raise ModelError("the base has no list of layers to spread", where="shard", allowed="none", hint=_WHOLE)
    path = max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
    return {f"{path}.{name}": block for name, block in lists[path].named_children()}


def _check_apart(network: nn.Module, tied: bool) -> None:
    """Raises ModelError where more modules share a weight than embedding and head."""
    seen = list(network.named_parameters(remove_duplicate=False))
    if len(seen) - len({id(parameter) for _, parameter in seen}) > int(tied):
        raise ModelError("layers of the base share weights", where="shard", allowed="none", hint=_WHOLE)


def _into(module: nn.Module, dtype: torch.dtype | None, device: torch.device, recurse: bool = True) -> None:
    for parameter in module.parameters(recurse):
        read = parameter.data
        parameter.data = read.to(device, dtype if read.is_floating_point() else None).contiguous()
        if parameter.data_ptr() != read.data_ptr():
            forget_pages(read)


def _take_adapters(network: nn.Module, paths: set[str], head: nn.Module | None) -> None:
    for path, module in list(network.named_modules()):
        if path in paths and module is not head and modules.is_linear(module):
            modules.adapted(network, path)


def _give(part: nn.Module, shards: Shards) -> None:
    """Keeps this worker's part of a part."""
    held = [parameter.data for parameter in _plain(part)]
    shards.spread(part)
    for tensor in held:
        forget_pages(tensor)


def _plain(part: nn.Module) -> Iterator[nn.Parameter]:
    """Its parameters that aren't spread yet."""
    from torch.distributed.tensor import DTensor

    yield from (parameter for parameter in part.parameters() if not isinstance(parameter, DTensor))
