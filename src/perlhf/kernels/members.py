"""Several adapters in one pass, each for its own part of the tokens: members of an ensemble, or requests of many.

Requests: each token of a pass has one of several adapters, in any order (`Mixed`). The pairs of all of them stand
beside each other in one pair, and what isn't a token's own is masked between its halves, so that a layer costs two
further products however many adapters there are.

Members: the tokens of a batch stand once for each member, one member after the other. The base's products are computed
for all of them at once, the low-rank ones for each member's part. Below the first layer in which members differ their
states are the same: there the tokens stand once, and are repeated where that layer begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perlhf.kernels import cpu
from perlhf.kernels.attention.tree_attention import Tree
from perlhf.kernels.call import Call, HeldPair, calling, continued, current_call
from perlhf.method.lora import LowRank, Quantised, joined, quantised_linear
from perlhf.method.packing import Batch, Node


def linear(
    x: Float[Tensor, "*batch inputs"],
    frozen: Float[Tensor, "outputs inputs"] | Quantised,
    bias: Float[Tensor, " outputs"] | None,
    pairs: Sequence[Sequence[LowRank]],
    dtype: torch.dtype,
) -> Float[Tensor, "*batch outputs"]:
    """x W^T + bias, and to each member's equal part of the tokens the update of its own pairs.

    Args:
        x: the tokens, one member after the other; [batch] flattens to members times tokens.
        pairs: of each member; none where it adapts other layers only.
    """
    y = F.linear(x, frozen, bias) if isinstance(frozen, Tensor) else quantised_linear(x, frozen)
    outputs = y.shape[-1]
    downs, ups = zip(*(_pair(own, x.shape[-1], outputs, dtype, x.device) for own in pairs), strict=True)
    rank = max(len(a) for a in downs)
    down = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a in downs])
    up = torch.stack([F.pad(b, (0, rank - b.shape[1])) for b in ups])
    parts = x.reshape(len(pairs), -1, x.shape[-1])
    update = torch.bmm(torch.bmm(parts, down.transpose(1, 2)), up.transpose(1, 2))
    return y + update.reshape(y.shape)


@dataclass(frozen=True)
class Beside:
    """The pairs of several adapters in one layer beside each other."""

    a: Tensor
    """[sum of ranks, inputs]."""
    b: Tensor
    """[outputs, sum of ranks], with the scales inside."""
    ranks: tuple[int, ...]
    """Of each adapter; 0 where it leaves the layer as it is."""
    padded: tuple[Tensor, Tensor]
    """Both, as `cpu.linear` takes them."""


def beside(adapters: Sequence[Mapping[nn.Module, HeldPair]]) -> dict[nn.Module, Beside]:
    """The pairs of each layer that any of these adapters changes, as `Model.hold` has converted them."""
    layers = dict.fromkeys(layer for pairs in adapters for layer in pairs)
    found: dict[nn.Module, Beside] = {}
    for layer in layers:
        own = [pairs[layer].pair if layer in pairs else None for pairs in adapters]
        there = [pair for pair in own if pair is not None]
        ranks = tuple(0 if pair is None else len(pair[0]) for pair in own)
        a, b = torch.cat([a for a, _ in there]), torch.cat([b for _, b in there], 1)
        found[layer] = Beside(a, b, ranks, cpu.padded(a, b))
    return found


class Mixed:
    """One pass whose tokens have different adapters.

    Args:
        pairs: by layer (`beside`).
        numbers: [tokens] of each token's adapter among them.
    """

    def __init__(self, pairs: Mapping[nn.Module, Beside], numbers: Tensor):
        self.pairs, self.numbers = pairs, numbers
        self._others: dict[tuple[int, ...], Tensor] = {}
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def added(self, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """The layer's output y [*batch, outputs] for x [*batch, inputs], and each token's own update; y is overwritten.

        Without gradients.
        """
        pairs = self.pairs.get(layer)
        if pairs is None:
            return y
        low = F.linear(x.reshape(-1, x.shape[-1]), pairs.a)
        # Not a product: what another adapter makes of a token may be no number.
        low.masked_fill_(self._of_others(pairs.ranks), 0.0)
        y.view(-1, y.shape[-1]).addmm_(low, pairs.b.t())
        return y

    def of_few_rows(self, x: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
        """The layer's output, each token's own update in it, where `cpu.few_rows` said yes."""
        pairs = self.pairs.get(layer)
        if pairs is None:
            return cpu.linear(x, weight)
        if pairs.ranks not in self._masks:
            own = (~self._of_others(pairs.ranks)).float()
            self._masks[pairs.ranks] = F.pad(own, (0, len(pairs.padded[0]) - own.shape[1]))
        return cpu.linear(x, weight, pairs.padded, self._masks[pairs.ranks])

    def _of_others(self, ranks: tuple[int, ...]) -> Tensor:
        """[tokens, sum of ranks], whether a rank isn't of the token's adapter."""
        if ranks not in self._others:
            device = self.numbers.device
            owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(device)
            self._others[ranks] = self.numbers[:, None] != owners
        return self._others[ranks]


def repeated(tree: Tree, members: int, tokens: int) -> Tree:
    """The tree once for each member, whose tokens follow those of the member before."""
    nodes = [
        Node(at + node.start, node.length, tuple((at + start, length) for start, length in node.prefix))
        for at in range(0, members * tokens, tokens)
        for node in tree.nodes
    ]
    return Tree(nodes, tree.sights)


@contextmanager
def repeated_from(layers: Sequence[nn.Module], members: int, tokens: int, call: Call) -> Iterator[None]:
    """Passes of `current_call()` go on by `call` from the first of `layers` on, with the tokens once for each member.

    Args:
        layers: that one and all that follow it.
        tokens: of the row that comes into the first one, [1, tokens, ...]; whatever else of that shape these layers are
            given is repeated, too.

    Raises:
        ValueError: in the pass: what comes into the first layer has another shape.
    """
    below = current_call()

    def repeat(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(repeat(each) for each in value)
        if isinstance(value, Tensor) and value.shape[:2] == (1, tokens):
            return value.repeat(1, members, *[1] * (value.ndim - 2))
        return value

    def begin(
        _: nn.Module, given: tuple[Any, ...], named: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        # torch asks for `with_kwargs` after it has taken its list of hooks, so that a pass of another thread, meeting
        # one that comes or goes, may call it without `named`.
        if named is None:
            return None
        if current_call() is below:
            states = given[0] if given else named.get("hidden_states")
            if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[:2] != (1, tokens):
                raise ValueError("the layer's input is no row of states")
            continued(call)
        elif current_call() is not call:
            return None  # of another pass, in another thread
        return repeat(given), {name: repeat(value) for name, value in named.items()}

    hooks = [layer.register_forward_pre_hook(begin, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_layer(paths: Sequence[str]) -> tuple[str, int] | None:
    """The lowest numbered layer that holds one of these modules: where layers lie, and its number; None where one of
    them is in none.

    >>> first_layer(["model.layers.12.mlp.up_proj", "model.layers.3.self_attn.q_proj"])
    ('model.layers', 3)
    """
    found: set[tuple[str, int]] = set()
    for path in paths:
        names = path.split(".")
        at = next((at for at, name in enumerate(names) if name.isdigit()), None)
        if at is None:
            return None
        found.add((".".join(names[:at]), int(names[at])))
    return min(found) if len({where for where, _ in found}) == 1 else None


def states(
    decoder: nn.Module,
    batch: Batch,
    members: Sequence[tuple[str, ...]],
    layers: Sequence[nn.Module],
    tree: Tree | None,
    common: tuple[str, ...] = (),
) -> Float[Tensor, "members tokens width"]:
    """States of all of the batch's tokens for each member.

    Args:
        members: names of each one's adapters, from the lowest to the uppermost.
        layers: the first one in which members differ, and all that follow it; without any the tokens stand for each
            member from the start.
        tree: of the batch; None where it is rows.
        common: adapters that all members have beneath, which compute what lies below those layers.
    """
    count, (rows, width) = len(members), batch.ids.shape
    given: dict[str, Any] = {"use_cache": False}
    if tree is None:
        call = replace(current_call(), members=tuple(members))
        with calling(call):
            found = decoder(input_ids=batch.ids.repeat(count, 1), **given).last_hidden_state
        return found.reshape(count, rows * width, -1)
    # As a single pass does: a mask of four dimensions is passed on as it is.
    given["attention_mask"] = torch.zeros(1, 1, 1, 1, device=batch.ids.device)
    call = replace(current_call(), members=tuple(members), tree=repeated(tree, count, width))
    if not layers:
        with calling(call):
            ids, positions = batch.ids.repeat(1, count), batch.positions.repeat(1, count)
            found = decoder(input_ids=ids, position_ids=positions, **given).last_hidden_state
    else:
        with calling(replace(current_call(), adapters=common, tree=tree)), repeated_from(layers, count, width, call):
            found = decoder(input_ids=batch.ids, position_ids=batch.positions, **given).last_hidden_state
    return found.reshape(count, width, -1)


def _pair(
    pairs: Sequence[LowRank], inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    if pairs:
        return joined(pairs, dtype)
    return torch.zeros(1, inputs, dtype=dtype, device=device), torch.zeros(outputs, 1, dtype=dtype, device=device)
