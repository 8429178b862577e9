"""The adapted linear layer: one frozen weight, any number of named low-rank updates (LoRA, arXiv 2106.09685).

y = x W^T + bias + sum_i (alpha_i / rank_i) (drop(x) A_i^T) B_i^T over the active adapters i. The low-rank path runs in
the base's dtype on float32 master weights; the backward below saves only x and x A^T and never forms a gradient for W.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perlhf import native
from perlhf.targets import match


@dataclass
class LowRank:
    """The pair of one adapter on one layer, float32 masters: `a` [rank, in], `b` [out, rank], scale alpha / rank."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float = 0.0


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None
    ) -> Tensor:
        y, low = _forward(x, weight, bias, a, b, keep)
        ctx.save_for_backward(x, weight, a, b, low, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's own signature
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, weight, a, b, low = cast(tuple[Tensor, ...], ctx.saved_tensors[:5])
        keep = cast(Tensor | None, ctx.saved_tensors[5])
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_low = grad @ b
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
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
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output and x a^T."""
    flat = x.reshape(-1, x.shape[-1])
    dropped = flat if keep is None else flat * keep.reshape(flat.shape)
    low = dropped @ a.t()
    y = F.linear(flat, weight, bias).addmm_(low, b.t())
    return y.view(*x.shape[:-1], weight.shape[0]), low


def adapted_linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    a: Float[Tensor, "rank inputs"],
    b: Float[Tensor, "outputs rank"],
    keep: Float[Tensor, "*batch inputs"] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """x W^T + bias + ((x * keep) a^T) b^T, with the scale already inside `b`; all in the dtype of `weight`.

    `weight` and `bias` get no gradient. `keep` is the scaled dropout mask (0 or 1 / (1 - p)).
    """
    if not torch.is_grad_enabled():
        # Without the cost of a graph's node, which shows where there are few rows.
        return _forward(x, weight, bias, a, b, keep)[0]
    apply = cast(Callable[..., Tensor], _AdaptedLinear.apply)  # pyright: ignore[reportUnknownMemberType]: untyped in torch
    return apply(x, weight, bias, a, b, keep)


class AdaptedLinear(nn.Module):
    """Replaces an `nn.Linear` of the base. With no active adapter it is that layer exactly.

    The adapters in `pairs` are deliberately not registered as parameters: the base's names and parameters stay its own.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.pairs: dict[str, LowRank] = {}
        self.active: tuple[str, ...] = ()
        self._held: tuple[Tensor, Tensor] | None = None
        self._held_for_few: tuple[Tensor, Tensor] | None = None

    def hold(self) -> None:
        """Converts the active pairs once, for all passes until `release`: their weights must not change meanwhile."""
        pairs = self._pairs()
        if pairs:
            self._held = self._joined(pairs)
            self._held_for_few = native.padded(*self._held)

    def release(self) -> None:
        """The pairs are read at every pass again."""
        self._held = self._held_for_few = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] under the active adapters."""
        if self.bias is None and native.few_rows(x, self.weight):
            if self._held_for_few is not None:
                return native.linear(x, self.weight, self._held_for_few)
            if not self._pairs():
                return native.linear(x, self.weight)
        if self._held is not None:
            return adapted_linear(x, self.weight, self.bias, *self._held)
        pairs = self._pairs()
        if not pairs:
            return F.linear(x, self.weight, self.bias)
        dtype, top = self.weight.dtype, self.pairs.get(self.active[-1])
        if top is not None and top.dropout and self.training:
            keep = F.dropout(torch.ones_like(x), top.dropout)
            a, b = top.a.to(dtype), (top.b * top.scale).to(dtype)
            if len(pairs) == 1:
                return adapted_linear(x, self.weight, self.bias, a, b, keep)
            # What lies beneath is frozen: its input isn't dropped.
            return self._adapted(x, pairs[:-1]) + F.linear(F.linear(x * keep, a), b)
        return self._adapted(x, pairs)

    def _pairs(self) -> list[LowRank]:
        return [self.pairs[name] for name in self.active if name in self.pairs]

    def _adapted(self, x: Tensor, pairs: Sequence[LowRank]) -> Tensor:
        return adapted_linear(x, self.weight, self.bias, *self._joined(pairs))

    def _joined(self, pairs: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """All pairs as one, scales inside `b`, in the dtype of `weight`."""
        downs: list[Tensor] = [pair.a for pair in pairs]
        ups = [pair.b * pair.scale for pair in pairs]
        a = (torch.cat(downs) if len(pairs) > 1 else downs[0]).to(self.weight.dtype)
        return a, (torch.cat(ups, 1) if len(pairs) > 1 else ups[0]).to(self.weight.dtype)


def new_pair(layer: AdaptedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> LowRank:
    """A zero update: A uniform in +-1/sqrt(in) (as PEFT), B = 0. Drawn on the CPU, so that devices agree."""
    bound = 1 / math.sqrt(layer.in_features)
    a = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
    device = layer.weight.device
    return LowRank(
        nn.Parameter(a.to(device)),
        nn.Parameter(torch.zeros(layer.out_features, rank, device=device)),
        alpha / rank,
        dropout,
    )


def match_targets(
    modules: Iterable[tuple[str, nn.Module]],
    targets: str | tuple[str, ...],
    skip: tuple[str, ...] = (),
    layers: str = "all",
) -> list[str]:
    """Module paths that `targets` names in `layers`, in module order (`targets.match`).

    Args:
        modules: `named_modules()` of the base.
        skip: paths never adapted (the output head).
    """
    linear = [n for n, m in modules if isinstance(m, nn.Linear | AdaptedLinear) and n not in skip]
    return match(linear, targets, layers)
