"""The attention module of Llama-like networks: rotary positions in one pass, then our attention.

It takes the place of a network's own module where that computes the same (`fused.fuse`).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from perlhf import attention, native

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
KNOWN = ("config", "layer_idx", "head_dim", "scaling", "num_key_value_groups")


class SelfAttention(nn.Module):
    """Queries, keys and values of linear layers, turned by their positions; parameters keep their names.

    Args:
        stock: the network's own module, with the layers of `LAYERS`.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        known: Any = stock
        self.q_proj: nn.Module = known.q_proj
        self.k_proj: nn.Module = known.k_proj
        self.v_proj: nn.Module = known.v_proj
        self.o_proj: nn.Module = known.o_proj
        self.config, self.layer_idx, self.head_dim = known.config, known.layer_idx, known.head_dim
        self.scaling, self.num_key_value_groups, self.is_causal = known.scaling, known.num_key_value_groups, True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[batch, time, hidden] to the same shape; what transformers' layers call."""
        shape = hidden_states.shape[:-1]
        layers = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (layer(hidden_states).view(*shape, -1, self.head_dim) for layer in layers)
        query, key = (rotated(x, *position_embeddings).transpose(1, 2) for x in (query, key))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, _ = attention.attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape, -1)), None


def replaces(module: nn.Module) -> bool:
    """Whether `SelfAttention` may take the place of `module`: it has the same layers and nothing else."""
    return (
        sorted(name for name, _ in module.named_children()) == sorted(LAYERS)
        and not list(module.parameters(recurse=False))
        and all(isinstance(getattr(module, name), nn.Linear) for name in LAYERS)
        and all(hasattr(module, name) for name in KNOWN)
    )


def same(module: nn.Module, own: Any) -> bool:
    """Whether both give the same bits on a few random rows, by torch's operations."""
    weight = own.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (
        torch.randn(1, 5, width, generator=generator).to(weight) for width in (weight.shape[1], *2 * [own.head_dim])
    )
    found = []
    for graph in (True, False):
        with torch.set_grad_enabled(graph), native.off():
            try:
                expected = module(x, position_embeddings=(cos, sin), attention_mask=None)[0]
            except (TypeError, RuntimeError):
                return False  # called otherwise, or positions turn a part of each head only
            found.append(torch.equal(expected, own(x, (cos, sin))[0]))
    return all(found)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-second half, first half of x) sin: rotary positions (arXiv 2104.09864), halves as in Llama.

    Args:
        x: [batch, time, heads, width].
        cos, sin: [batch or 1, time, width].
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Rotated.apply(x, cos, sin))
    return _rotated(x, cos, sin, back=False)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """The rotation, or with `back` its gradient by x of a gradient by its output."""
    batch, time, heads, width = x.shape
    if native.usable(x, cos, sin) and width % 2 == 0:
        x, (cos, sin) = x.contiguous(), (t.expand(batch, -1, -1).contiguous() for t in (cos, sin))
        out = torch.empty_like(x)
        native.call("rotate", x, cos, sin, out, batch * time, heads, width, int(back))
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
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        return _rotated(grads[0], cos, sin, back=True), None, None
