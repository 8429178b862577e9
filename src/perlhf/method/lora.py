"""The adapted linear layer: one frozen weight, any number of named low-rank updates (LoRA, arXiv 2106.09685).

y = x W^T + bias + sum_i (alpha_i / rank_i) (drop(x) A_i^T) B_i^T over the active adapters i. The low-rank path runs in
the base's dtype on float32 master weights; the backward below saves only x and x A^T and never forms a gradient for W.
W may be kept in few bits: it is then made anew for the gradient of each layer's input, and never kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perlhf.errors import AdapterError, nearest


@dataclass
class LowRank:
    """The pair of one adapter on one layer, float32 masters: `a` [rank, in], `b` [out, rank], scale alpha / rank."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Quantised:
    """The frozen part of a layer whose weight W [outputs, inputs] is kept in few bits."""

    product: Callable[[Tensor], Tensor]
    """x W^T + bias for x [..., inputs], by the quantised layer's own forward; a new tensor."""
    weight: Callable[[], Tensor]
    """W in the base's dtype, made anew by each call."""
    outputs: int


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | Quantised, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None
    ) -> Tensor:
        y, low = _forward(x, weight, bias, a, b, keep)
        ctx.quantised = weight if isinstance(weight, Quantised) else None
        ctx.save_for_backward(x, None if isinstance(weight, Quantised) else weight, a, b, low, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's own signature
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        saved: Any = ctx.saved_tensors  # looked at once: where layers are recomputed, a second time is refused
        x, weight, a, b, low = cast(tuple[Tensor, ...], saved[:5])
        keep = cast(Tensor | None, saved[5])
        grad = grads[0].reshape(-1, b.shape[0])
        grad_low = grad @ b
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            if ctx.quantised is not None:
                weight = cast(Quantised, ctx.quantised).weight()
            if keep is None:
                grad_x = (grad @ weight).addmm_(grad_low, a)
            else:
                grad_x = (grad @ weight) + (grad_low @ a) * keep.reshape(-1, x.shape[-1])
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[3]:
            flat = x.reshape(-1, x.shape[-1])
            grad_a = grad_low.t() @ (flat if keep is None else flat * keep.reshape(flat.shape))
        if ctx.needs_input_grad[4]:
            grad_b = grad.t() @ low
        return grad_x, None, None, grad_a, grad_b, None


def _forward(
    x: Tensor, weight: Tensor | Quantised, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output and x a^T."""
    flat = x.reshape(-1, x.shape[-1])
    dropped = flat if keep is None else flat * keep.reshape(flat.shape)
    low = dropped @ a.t()
    frozen = weight.product(flat) if isinstance(weight, Quantised) else F.linear(flat, weight, bias)
    y = frozen.addmm_(low, b.t())
    # Not a view: some networks add to it in place.
    return y.resize_(*x.shape[:-1], b.shape[0]), low


def adapted_linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"] | Quantised,
    bias: Float[Tensor, " outputs"] | None,
    a: Float[Tensor, "rank inputs"],
    b: Float[Tensor, "outputs rank"],
    keep: Float[Tensor, "*batch inputs"] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """x W^T + bias + ((x * keep) a^T) b^T, with the scale already inside `b`; all in the dtype of `weight`.

    `weight` and `bias` get no gradient; a quantised weight has its bias inside. `keep` is the scaled dropout mask (0
    or 1 / (1 - p)).
    """
    if not torch.is_grad_enabled():
        # Without the cost of a graph's node, which shows where there are few rows.
        return _forward(x, weight, bias, a, b, keep)[0]
    apply = cast(Callable[..., Tensor], _AdaptedLinear.apply)  # pyright: ignore[reportUnknownMemberType]: untyped in torch
    return apply(x, weight, bias, a, b, keep)


def quantised_linear(x: Float[Tensor, "*batch inputs"], weight: Quantised) -> Float[Tensor, "*batch outputs"]:
    """x W^T + bias of a layer without adapters, whose backward gives x its gradient and keeps nothing."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return weight.product(x)
    apply = cast(Callable[..., Tensor], _QuantisedLinear.apply)  # pyright: ignore[reportUnknownMemberType]: untyped
    return apply(x, weight)


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised) -> Tensor:
        ctx.weight = weight
        return weight.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] @ cast(Quantised, ctx.weight).weight(), None


def dropout_keys(
    ids: Int[Tensor, "rows width"], sequences: Sequence[Sequence[int]], key: int
) -> Int[Tensor, "rows width"]:
    """A 64-bit number for each token, of `key` and of all tokens up to it: equal beginnings have equal numbers.

    Args:
        ids: tokens as they are computed.
        sequences: flat positions of each sequence's tokens, in order.
    """
    flat, out = ids.reshape(-1).cpu(), torch.zeros(ids.numel(), dtype=torch.int64)
    longest = max(map(len, sequences), default=0)
    # A polynomial of the tokens modulo 2^64, where integers wrap around; whatever it lacks in chance is mixed in later.
    factors = torch.cumprod(torch.full((longest,), 6364136223846793005, dtype=torch.int64), 0)
    for places in sequences:
        at = torch.tensor(places, dtype=torch.long)
        out[at] = torch.cumsum((flat[at] + 1) * factors[: len(at)], 0)
    return _mixed(out ^ key).view(ids.shape).to(ids.device)


def keyed_dropout(
    keys: Int[Tensor, "*batch"], layer: int, inputs: int, dropout: float
) -> Float[Tensor, "*batch inputs"]:
    """The scaled mask of dropout, 0 or 1 / (1 - dropout): a function of the tokens' keys, the layer and the input.

    It doesn't depend on who computes a token, nor beside which others.
    """
    columns = _mixed(torch.arange(1, inputs + 1, device=keys.device) + (layer << 31))
    # The upper bits of a product depend on all bits of both; 24 of them are a uniform number.
    mixed = (_mixed(keys + layer) | 1)[..., None] * columns
    mixed ^= (mixed >> 32) & 0xFFFFFFFF
    mixed *= -7046029254386353131
    uniform = ((mixed >> 40) & 0xFFFFFF).float() / 2**24
    return (uniform >= dropout).float() / (1 - dropout)


def _mixed(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Each number's bits spread over all 64 as splitmix64 does."""
    numbers = (numbers ^ ((numbers >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    numbers = (numbers ^ ((numbers >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return numbers ^ ((numbers >> 31) & 0x1FFFFFFFF)


def new_pair(
    outputs: int, inputs: int, rank: int, alpha: float, dropout: float, generator: torch.Generator, device: torch.device
) -> LowRank:
    """A zero update of a layer from `inputs` to `outputs`: A uniform in +-1/sqrt(inputs) (as PEFT), B = 0.

    A is drawn on the CPU, so that devices agree.
    """
    a = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * (1 / math.sqrt(inputs))
    b = torch.zeros(outputs, rank, device=device)
    return LowRank(nn.Parameter(a.to(device)), nn.Parameter(b), alpha / rank, dropout)


def joined(
    pairs: Sequence[LowRank], dtype: torch.dtype
) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]:
    """All pairs of a layer as one (A, B) in `dtype`, with the scales inside B: their updates add up."""
    downs: list[Tensor] = [pair.a for pair in pairs]
    ups = [pair.b * pair.scale for pair in pairs]
    a = (torch.cat(downs) if len(pairs) > 1 else downs[0]).to(dtype)
    return a, (torch.cat(ups, 1) if len(pairs) > 1 else ups[0]).to(dtype)


@torch.no_grad()
def stacked(pairs: Sequence[LowRank]) -> LowRank:
    """One pair of scale 1 whose update is the sum of the pairs' updates; its rank is the sum of their ranks."""
    a, b = joined(pairs, torch.float32)
    return LowRank(nn.Parameter(a), nn.Parameter(b), 1.0)


def mean(pairs: Sequence[LowRank]) -> LowRank:
    """One pair of scale 1 whose update is the mean of the n pairs' updates, without approximation.

    mean_i scale_i B_i A_i = [scale_1 / n B_1 .. scale_n / n B_n] [A_1; ..; A_n], so that its rank is the sum of theirs.
    (mean(B) mean(A) would be another update.) This is how weights are averaged in WARM (arXiv 2401.12187).
    """
    return stacked([replace(pair, scale=pair.scale / len(pairs)) for pair in pairs])


def match(
    linear: Sequence[str], targets: str | tuple[str, ...], layers: str = "all", shared: Sequence[str] = ()
) -> list[str]:
    """Those of the paths in `linear` that are adapted, in their order.

    Args:
        linear: paths of all linear layers that may be adapted.
        targets: `attention` (inside a module called `*attn*` or `*attention*`, or one that holds `q_proj`, `k_proj` and
            `v_proj`), `all`, or names that equal a path's end (`q_proj`, `layers.0.mlp.up_proj`).
        layers: `all` layers of the network, or `last:N`.
        shared: paths among them that `attention` takes, too: what all tokens share beside experts.

    Raises:
        AdapterError: a name that matches nothing, with the nearest existing one; nothing in these layers.
    """
    last = sorted({path.split(".")[-1] for path in linear})
    if targets == "all":
        matched = list(linear)
    elif targets == "attention":
        held = {*linear}
        matched = [path for path in linear if path in shared or _is_of_attention(path, held)]
    else:
        wanted = (targets,) if isinstance(targets, str) else targets
        for target in wanted:
            if not any(ends_with(path, target) for path in linear):
                raise AdapterError(
                    f"adapter target '{target}' matches no linear layer of the base",
                    where="adapter.targets",
                    allowed=f"attention, all, or names among {', '.join(last)}",
                    hint=nearest(target, last),
                )
        matched = [path for path in linear if any(ends_with(path, target) for target in wanted)]
    if not matched:
        raise AdapterError(
            f"adapter targets '{targets}' match no linear layer of the base",
            where="adapter.targets",
            allowed=f"names among {', '.join(last) or '(the base has no nn.Linear)'}",
            hint="--adapter.targets all" if last else None,
        )
    if layers == "all":
        return matched
    first = 1 + max(map(_layer, linear)) - int(layers.removeprefix("last:"))
    uppermost = [path for path in matched if _layer(path) >= max(first, 0)]
    if not uppermost:
        raise AdapterError(f"adapter targets '{targets}' match nothing in layers {layers}", where="adapter.layers")
    return uppermost


def _is_of_attention(path: str, linear: set[str]) -> bool:
    around = path.rpartition(".")[0]
    named = any("attn" in part or "attention" in part for part in around.split("."))
    return named or all(f"{around}.{name}" in linear for name in ("q_proj", "k_proj", "v_proj"))


def ends_with(path: str, name: str) -> bool:
    """Whether a path is the name, or ends with it after a dot."""
    return path == name or path.endswith("." + name)


def _layer(path: str) -> int:
    """The layer that a module is in, from 0; -1 outside the layers."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)
