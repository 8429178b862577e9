"""Norms, gated MLPs and attention modules with a backward of their own: fewer passes over memory, fewer tensors kept.

The forward does what the network's modules do, operation by operation, so that its outputs are theirs bit for bit; a
module whose output differs on random input stays as it is. A CPU's own kernels (`native`) then add up in another order.
Parameters keep their names.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perlhf import native, self_attention


class RmsNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), in float32, over the last dimension."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        if not torch.is_grad_enabled():
            # Without the cost of a graph's node, which shows where there are few rows.
            plain = x.dtype == torch.float32 and not native.usable(x, self.weight)
            if plain or (x.device.type == "cuda" and native.is_sampling()):
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
        product = _SiluProduct.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)
        return self.down_proj(cast(Tensor, product))


class Linear(nn.Linear):
    """A linear layer that is faster while sampling, where there is a kernel for few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.bias is None and native.few_rows(input, self.weight):
            return native.linear(input, self.weight)
        return F.linear(input, self.weight, self.bias)


def fuse(base: nn.Module) -> int:
    """Replaces linear layers, and the norms, MLPs and attention modules of `base` that compute what is computed here;
    tells how many of these.
    """
    for path, module in list(base.named_modules()):
        if type(module) is nn.Linear:
            own = Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            own.weight, own.bias = module.weight, module.bias
            _put(base, path, own.train(module.training))
    replaced = 0
    for path, module in list(base.named_modules()):
        own = _twin(module)
        equal = self_attention.same if isinstance(own, self_attention.SelfAttention) else _same
        if own is not None and equal(module, own):
            _put(base, path, own.train(module.training))
            replaced += 1
    return replaced


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(base.get_submodule(parent), leaf, module)


def _twin(module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and isinstance(eps, float):
        return RmsNorm(weight, eps)
    if self_attention.replaces(module):
        return self_attention.SelfAttention(module)
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(part, nn.Linear) for part in parts) and len(list(module.parameters(recurse=False))) == 0:
        return GatedMlp(*cast(list[nn.Module], parts))
    return None


def _same(module: nn.Module, own: Any) -> bool:
    """Whether both give the same bits on a few random rows, with a graph and without."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, weight.shape[-1], generator=generator).to(weight)
    equal = []
    for graph in (True, False):
        with torch.set_grad_enabled(graph), native.off():
            equal.append(torch.equal(module(x), own(x)))
    return all(equal)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output and 1 / sqrt(mean(x^2) + eps)."""
    if native.usable(x, weight):
        x = x.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        native.call("norm", x, weight, out, inverse, inverse.numel(), x.shape[-1], float(eps))
        return out, inverse
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
        if native.usable(x, weight, grads[0]) and not ctx.needs_input_grad[1]:
            x, above = x.contiguous(), grads[0].contiguous()
            grad_x = torch.empty_like(x)
            native.call("norm_backward", x, weight, inverse, above, grad_x, inverse.numel(), x.shape[-1])
            return grad_x, None, None
        wide, grad = x.float(), grads[0].float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse)).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # With n = x r and r = (mean(x^2) + eps)^(-1/2): dx = r (g w) - x r^3 mean(g w x).
        grad = grad * weight.float()
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * inverse.pow(3) / -x.shape[-1]
        return grad.mul_(inverse).addcmul_(wide, along).to(x.dtype), grad_weight, None


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if not native.usable(gate, up):
        return F.silu(gate).mul_(up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.call("gated", gate, up, out, gate.numel())
    return out


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = cast(tuple[Tensor, ...], ctx.saved_tensors)
        if native.usable(gate, up, grads[0]):
            gate, up, above = gate.contiguous(), up.contiguous(), grads[0].contiguous()
            by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
            native.call("gated_backward", gate, up, above, by_gate, by_up, gate.numel())
            return by_gate, by_up
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])
