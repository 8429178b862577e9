"""Scores of several adapters on one base in one pass: the members of an ensemble."""

from collections.abc import Sequence
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from perlhf.errors import ModelError
from perlhf.kernels import members
from perlhf.kernels.attention.tree_attention import Tree
from perlhf.kernels.modules import AdaptedLinear, features
from perlhf.method.lora import LowRank
from perlhf.method.packing import Batch, Packing, Tokens, pack
from perlhf.model.adapter import Adapter
from perlhf.model.model import Model
from perlhf.model.supported import FAULTS

PROBE = ((11, 12, 13, 14, 15), (11, 12, 16), (17, 18))
"""Sequences of which two share a prefix."""
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far the states of one pass may be from those of separate ones, of their norm."""


def member_scores(model: Model, batch: Batch, adapters: Sequence[str]) -> Tensor:
    """What `model.scores` gives each of the adapters, within rounding, from one pass: float32 [adapter, batch].

    The base's products are computed for all of them together, each adapter's own for its part. With a tree, what lies
    below the first layer in which they differ is computed once (`adapter.layers: last:4` shares nearly all of it), with
    the adapters that all of them have beneath.
    Gradients reach each adapter as in a pass of its own; nothing is dropped out.

    Passes are separate where the network doesn't compute each token's row by itself in its linear layers (experts that
    get a choice of tokens), which is tried once, and where an adapter holds whole weights.

    Raises:
        ModelError: a sequence is too long (`Model.check_length`).
    """
    chains, paths = _chains(model, adapters), _paths(model, adapters)
    whole = any(model.adapters[name].weights for chain in chains for name in chain)
    if len(adapters) == 1 or whole or not in_one_pass(model, paths):
        return torch.stack([model.scores(batch, adapter) for adapter in adapters])
    model.check_length(max(sum(length for _, length in spans) for spans in batch.spans))
    ends = _states(model, batch, chains)[:, batch.ends].to(model.dtype).float()
    heads = [model.adapters[name] for name in adapters]
    return torch.stack([_scored(states, head) for states, head in zip(ends, heads, strict=True)])


def passes(model: Model, adapters: Sequence[str], packing: Packing) -> list[tuple[str, ...]]:
    """The adapters that are best computed in one pass: all of them where they share a trunk, else each by itself.

    A pass of several computes each token once for each of them (above the trunk), and is given so many fewer.
    """
    return [tuple(adapters)] if shares_trunk(model, adapters, packing) else [(name,) for name in adapters]


def shares_trunk(model: Model, adapters: Sequence[str], packing: Packing) -> bool:
    """Whether one pass spares these adapters what lies below the first layer in which they differ, computed once."""
    if len(adapters) < 2:
        return False
    chains = _chains(model, adapters)
    first = members.first_layer(_own(model, chains))
    whole = any(model.adapters[name].weights for chain in chains for name in chain)
    below = packing == "tree" and first is not None and first[1] > 0
    return below and not whole and in_one_pass(model, _paths(model, adapters))


def in_one_pass(model: Model, paths: Sequence[str]) -> bool:
    """Whether adapters of these layers are computed in one pass as in separate ones: two random ones are tried.

    Not where the base lies in parts on several workers, all of whom must make the same passes.
    """
    if model.shards is not None:
        return False
    known = _TRIED.setdefault(model, {})
    key = tuple(paths)
    if key not in known:
        known[key] = _holds(model, paths)
    return known[key]


def _chains(model: Model, adapters: Sequence[str]) -> list[tuple[str, ...]]:
    """The active adapters of each, from the lowest to the uppermost."""
    return [tuple(name for name, _ in model.version(adapter)) for adapter in adapters]


def _paths(model: Model, adapters: Sequence[str]) -> list[str]:
    """Layers that any of them adapts."""
    return sorted({p for chain in _chains(model, adapters) for name in chain for p in model.adapters[name].pairs})


def _common(chains: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The adapters that lie beneath all others in each of the chains."""
    return tuple(each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*chains, strict=False)))


def _own(model: Model, chains: Sequence[tuple[str, ...]]) -> list[str]:
    """Layers in which they differ."""
    beneath = len(_common(chains))
    return sorted({path for chain in chains for name in chain[beneath:] for path in model.adapters[name].pairs})


_TRIED: WeakKeyDictionary[Model, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


@torch.no_grad()
def _holds(model: Model, paths: Sequence[str]) -> bool:
    if not paths or any("experts" in path.split(".") for path in paths):
        return False
    vocab = int(model.base.config.get_text_config().vocab_size)
    batch = pack([[Tokens([i % vocab for i in ids])] for ids in PROBE], model.packing("auto"), model.device)
    names = [f"probe of members {number}" for number in range(2)]
    try:
        for number, name in enumerate(names):
            model.adopt(_random(model, name, paths, number))
        alone = torch.stack([model.last_states(batch, name) for name in names]).float()
        together = _states(model, batch, [(name,) for name in names])[:, batch.ends].float()
    except (*FAULTS, ModelError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    finally:
        for name in names:
            forget(model, name)
    return float((together - alone).norm() / alone.norm()) < NEAR.get(model.dtype, 0.05)


def _states(model: Model, batch: Batch, chains: Sequence[tuple[str, ...]]) -> Tensor:
    tree = None if batch.nodes is None else Tree(batch.nodes, model.way.sights)
    layers: list[nn.Module] = []
    if (first := members.first_layer(_own(model, chains))) is not None:
        where, number = first
        layers = list(model.base.get_submodule(where).children())[number:]
    return members.states(model.decoder, batch, chains, layers, tree, _common(chains))


def _scored(states: Tensor, head: Adapter) -> Tensor:
    assert head.score_head is not None and head.bias is not None, f"adapter '{head.name}' has no score head"
    return (states @ head.score_head.t()).squeeze(-1) + head.bias


def _random(model: Model, name: str, paths: Sequence[str], seed: int) -> Adapter:
    """An adapter of rank 1 whose update of each layer is as large as its input."""
    draw = torch.Generator().manual_seed(seed)
    layers = dict(model.base.named_modules())
    found = Adapter(name, "policy", rank=1, alpha=1.0)
    for path in paths:
        shape = features(layers[path])
        assert shape is not None
        inputs, outputs = shape
        down, up = torch.randn(1, inputs, generator=draw), torch.randn(outputs, 1, generator=draw)
        found.pairs[path] = LowRank(nn.Parameter(down / inputs**0.5), nn.Parameter(up / 4), 1.0)
    return found


def forget(model: Model, name: str) -> None:
    """Takes an adapter off the base."""
    model.adapters.pop(name, None)
    for layer in model.base.modules():
        if isinstance(layer, AdaptedLinear):
            layer.pairs.pop(name, None)
