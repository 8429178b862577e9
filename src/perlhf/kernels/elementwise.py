"""Norms, gates and rotations between linear layers, with backwards that read memory less often, and keep less of it.

They do what the networks' own code does, operation by operation, so that outputs are the same bit for bit. A CPU's own
kernels (`cpu`) then add up in another order.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perlhf.kernels import cpu
from perlhf.kernels.call import current_call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), in float32, over the last dimension of x.

    Args:
        x: [..., width]; the result has its shape and dtype.
    """
    if torch.is_grad_enabled():
        return cast(Tensor, _RmsNorm.apply(x, weight, eps))
    # Without the cost of a graph's node, which shows where there are few rows.
    own_kernel = cpu.usable(x, weight)
    plain = x.dtype == weight.dtype == torch.float32 and not own_kernel
    if plain or (x.device.type == "cuda" and current_call().sampling):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _normed(x, weight, eps, own_kernel=own_kernel)[0]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    if torch.is_grad_enabled():
        return cast(Tensor, _SiluProduct.apply(gate, up))
    return _gated(gate, up, own_kernel=cpu.usable(gate, up))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-second half, first half of x) sin: rotary positions (arXiv 2104.09864), halves as in Llama.

    Args:
        x: [batch, time, heads, width].
        cos, sin: [batch or 1, time, width], or narrower: the rest of each head isn't turned.
    """
    if (turned := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotated(x[..., :turned], cos, sin), x[..., turned:]], -1)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Rotated.apply(x, cos, sin))
    return _rotated(x, cos, sin, back=False, own_kernel=_can_rotate(x, cos, sin))


def _normed(x: Tensor, weight: Tensor, eps: float, *, own_kernel: bool) -> tuple[Tensor, Tensor]:
    """The output and 1 / sqrt(mean(x^2) + eps)."""
    if own_kernel:
        x = x.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        cpu.call("norm", x, weight, out, inverse, inverse.numel(), x.shape[-1], float(eps))
        return out, inverse
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.own_kernel = cpu.usable(x, weight)
        out, inverse = _normed(x, weight, eps, own_kernel=ctx.own_kernel)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = cast(tuple[Tensor, ...], ctx.saved_tensors)
        if ctx.own_kernel and not ctx.needs_input_grad[1]:
            x, above = x.contiguous(), grads[0].contiguous()
            grad_x = torch.empty_like(x)
            cpu.call("norm_backward", x, weight, inverse, above, grad_x, inverse.numel(), x.shape[-1])
            return grad_x, None, None
        wide, grad = x.float(), grads[0].float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse)).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # With n = x r and r = (mean(x^2) + eps)^(-1/2): dx = r (g w) - x r^3 mean(g w x).
        grad = grad * weight.float()
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * inverse.pow(3) / -x.shape[-1]
        return grad.mul_(inverse).addcmul_(wide, along).to(x.dtype), grad_weight, None


def _gated(gate: Tensor, up: Tensor, *, own_kernel: bool) -> Tensor:
    if not own_kernel:
        return F.silu(gate).mul_(up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    cpu.call("gated", gate, up, out, gate.numel())
    return out


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.own_kernel = cpu.usable(gate, up)
        ctx.save_for_backward(gate, up)
        return _gated(gate, up, own_kernel=ctx.own_kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = cast(tuple[Tensor, ...], ctx.saved_tensors)
        if ctx.own_kernel:
            gate, up, above = gate.contiguous(), up.contiguous(), grads[0].contiguous()
            by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
            cpu.call("gated_backward", gate, up, above, by_gate, by_up, gate.numel())
            return by_gate, by_up
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


def _can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return x.shape[-1] % 2 == 0 and cpu.usable(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool, own_kernel: bool) -> Tensor:
    """The rotation, or with `back` its gradient by x of a gradient by its output."""
    batch, time, heads, width = x.shape
    if own_kernel:
        x, (cos, sin) = x.contiguous(), (t.expand(batch, -1, -1).contiguous() for t in (cos, sin))
        out = torch.empty_like(x)
        cpu.call("rotate", x, cos, sin, out, batch * time, heads, width, int(back))
        return out
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if not back:
        first, second = x.chunk(2, -1)
        return (x * cos) + (torch.cat((-second, first), -1) * sin)
    first, second = (x * sin).chunk(2, -1)
    return (x * cos) + torch.cat((second, -first), -1)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.own_kernel = _can_rotate(x, cos, sin)
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False, own_kernel=ctx.own_kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        return _rotated(grads[0], cos, sin, back=True, own_kernel=ctx.own_kernel), None, None
