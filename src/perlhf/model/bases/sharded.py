"""A base spread over several workers while it is loaded, layer by layer: none of them ever holds all of it.

Its files are mapped. One layer after the other gets into the dtype and to the device of its use, its modules become
ours (`kernels.modules`), and all but this worker's part of it is given back. Modules can't be exchanged later on, so
every linear layer is made one that takes adapters.

Embedding and output head stay whole on each worker. They are used in every pass, and a gathered copy exists twice for a
moment, beside the worker's part: that is more than they are. So nobody reads a part of the head for all of it, either.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError
from perlhf.kernels import modules
from perlhf.model.bases.weights import forget_pages, give_back_at_once
from perlhf.model.supported import network_below
from perlhf.parallel.shard import Shards

_WHOLE = "shard: none keeps the base whole on each worker"


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
    if device.type == "cpu":
        give_back_at_once()
    decoder, head = network_below(network), network.get_output_embeddings()
    _check_apart(network, head)
    blocks = _blocks(network, decoder)
    dtype_of_parts = dtype if network.dtype != dtype else None
    inside: set[str] = set()
    for path, block in blocks.items():
        _into(block.parameters(), dtype_of_parts, device)
        paths = {f"{path}.{name}" if name else path for name, _ in block.named_modules()}
        inside |= paths
        modules.fuse(network, paths)
        _take_adapters(network, paths, None)
        for mlp in (part for part in block.children() if isinstance(part, modules.GatedMlp)):
            for linear in mlp.children():  # most of a layer: each apart, so that less of it is whole at a time
                _give(linear, shards)
        _give(block, shards)
    rest = {path for path, _ in network.named_modules()} - inside
    outside = [module for path, module in network.named_modules() if path in rest]
    _into((p for module in outside for p in module.parameters(recurse=False)), dtype_of_parts, device)
    modules.fuse(network, rest)
    head = network.get_output_embeddings()
    _take_adapters(network, rest, head)
    whole = [module for module in network.modules() if module is head or isinstance(module, nn.Embedding)]
    kept = [parameter for module in whole for parameter in module.parameters()]
    # Whoever calls the layers first: some networks pass over the module that they are in by name.
    path = next(iter(blocks)).rpartition(".")[0].rpartition(".")[0]
    _give(network.get_submodule(path), shards, kept)
    if next(_plain(decoder, kept), None) is not None:
        _give(decoder, shards, kept)
    if device.type != "cpu":
        for buffers in (module._buffers for module in network.modules()):
            buffers |= {name: None if one is None else one.to(device) for name, one in buffers.items()}
    if dtype_of_parts is not None:
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


def _check_apart(network: PreTrainedModel, head: nn.Module | None) -> None:
    """Raises ModelError where more modules share a weight than embedding and head."""
    seen = list(network.named_parameters(remove_duplicate=False))
    tied = getattr(head, "weight", None) is getattr(network.get_input_embeddings(), "weight", 0)
    if len(seen) - len({id(parameter) for _, parameter in seen}) > int(tied):
        raise ModelError("layers of the base share weights", where="shard", allowed="none", hint=_WHOLE)


def _into(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None, device: torch.device) -> None:
    for parameter in parameters:
        read = parameter.data
        parameter.data = read.to(device, dtype if read.is_floating_point() else None).contiguous()
        if parameter.data_ptr() != read.data_ptr():
            forget_pages(read)


def _take_adapters(network: nn.Module, paths: set[str], head: nn.Module | None) -> None:
    for path, module in list(network.named_modules()):
        if path in paths and module is not head and modules.is_linear(module):
            modules.adapted(network, path)


def _give(part: nn.Module, shards: Shards, kept: Sequence[nn.Parameter] = ()) -> None:
    """Keeps this worker's part of a part, and all of the parameters in `kept`."""
    held = [parameter.data for parameter in _plain(part, kept)]
    shards.spread(part, kept)
    for tensor in held:
        forget_pages(tensor)


def _plain(part: nn.Module, kept: Sequence[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Its parameters that aren't spread yet."""
    from torch.distributed.tensor import DTensor

    whole = {id(parameter) for parameter in kept}
    yield from (p for p in part.parameters() if not isinstance(p, DTensor) and id(p) not in whole)
