"""Root-mean-square norms and gated MLPs with a backward of their own: fewer passes over memory, fewer tensors kept.

The forward does what the network's modules do, operation by operation, so that its outputs are theirs bit for bit; a
module whose output differs on random input stays as it is. Parameters keep their names.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RmsNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), in float32, over the last dimension."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        if not torch.is_grad_enabled():
            # Without the cost of a graph's node, which shows where there are few rows.
            if x.dtype == torch.float32:
                return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
            return _normed(x, self.weight, self.eps)[0]
        return cast(Tensor, _RmsNorm.apply(x, self.weight, self.eps))


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) of three linear layers, which may be adapted later."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = _SiluProduct.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)
        return self.down_proj(cast(Tensor, product))


def fuse(base: nn.Module) -> int:
    """Replaces the norms and MLPs of `base` that compute what is computed here; returns how many."""
    replaced = 0
    for path, module in list(base.named_modules()):
        own = _twin(module)
        if own is not None and _same(module, own):
            parent, _, leaf = path.rpartition(".")
            setattr(base.get_submodule(parent), leaf, own.train(module.training))
            replaced += 1
    return replaced


def _twin(module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and isinstance(eps, float):
        return RmsNorm(weight, eps)
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(part, nn.Linear) for part in parts) and len(list(module.parameters(recurse=False))) == 0:
        return GatedMlp(*cast(list[nn.Module], parts))
    return None


def _same(module: nn.Module, own: nn.Module) -> bool:
    """Whether both give the same bits on a few random rows, with a graph and without."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, weight.shape[-1], generator=generator).to(weight)
    equal = []
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            equal.append(torch.equal(module(x), own(x)))
    return all(equal)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output and 1 / sqrt(mean(x^2) + eps)."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = cast(tuple[Tensor, ...], ctx.saved_tensors)
        wide, grad = x.float(), grads[0].float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse)).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # With n = x r and r = (mean(x^2) + eps)^(-1/2): dx = r (g w) - x r^3 mean(g w x).
        grad = grad * weight.float()
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * inverse.pow(3) / -x.shape[-1]
        return grad.mul_(inverse).addcmul_(wide, along).to(x.dtype), grad_weight, None


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = cast(tuple[Tensor, ...], ctx.saved_tensors)
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])
