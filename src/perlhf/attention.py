"""Attention over a prefix tree: each node's tokens attend to their own path only, by one small causal product a node.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product
attention. The
backward recomputes the probabilities, so that only queries, keys and values are kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perlhf.packing import Node

NAME = "perlhf_tree"


def register() -> str:
    """Makes the attention known to transformers; returns its name."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def tree_attention(query: Tensor, key: Tensor, value: Tensor, nodes: Sequence[Node], scaling: float) -> Tensor:
    """softmax(scaling * q k^T) v over each token's path.

    Args:
        query: [heads, tokens, width]; key, value: [kv_heads, tokens, width], heads a multiple of kv_heads.
        nodes: of the layout, covering every token once.

    Returns:
        [heads, tokens, width].
    """
    return _TreeAttention.apply(query, key, value, tuple(nodes), scaling)  # pyright: ignore[reportReturnType]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scaling: float) -> Tensor:
        out = torch.empty_like(query)
        for node in nodes:
            queries, keys, values = _folded(query, node, len(key)), _path(key, node), _path(value, node)
            visible = ~_hidden(node, queries, keys)
            own = _own(out, node)
            # Four dimensions: with three, torch takes its slow path.
            mixed = F.scaled_dot_product_attention(queries[None], keys[None], values[None], visible, scale=scaling)
            own.copy_(mixed.view(own.shape))
        ctx.save_for_backward(query, key, value)
        ctx.nodes, ctx.scaling = nodes, scaling
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros_like(grad_key)
        for node in ctx.nodes:
            queries, keys, values = _folded(query, node, len(key)), _path(key, node), _path(value, node)
            # Rounded logits would move the probabilities, so this one product is float32.
            logits = (queries.float() @ keys.float().transpose(1, 2)).mul_(ctx.scaling)
            p = torch.softmax(logits.masked_fill_(_hidden(node, queries, keys), -torch.inf), -1)
            grad = _folded(grads[0], node, len(key))
            _scatter(grad_value, node, p.to(grad.dtype).transpose(1, 2) @ grad)
            inner = (grad @ values.transpose(1, 2)).float()
            inner = (inner.sub_((p * inner).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scaling)).to(query.dtype)
            own = _own(grad_query, node)
            own.copy_((inner @ keys).view(own.shape))
            _scatter(grad_key, node, inner.transpose(1, 2) @ queries)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: tuple[Node, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [batch, heads, time, width]; out [batch, time, heads, width]."""
    if tree is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    assert len(query) == 1 and not dropout, "a tree is one row"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree_attention(query[0], key[0], value[0], tree, scale).transpose(0, 1)[None], None


def _hidden(node: Node, queries: Tensor, keys: Tensor) -> Tensor:
    """[share * n, past + n], True where a query may not look: later tokens of its own node."""
    n, total = node.length, keys.shape[1]
    past = torch.zeros(n, total - n, dtype=torch.bool, device=keys.device)
    own = torch.ones(n, n, dtype=torch.bool, device=keys.device).triu(1)
    return torch.cat([past, own], 1).repeat(queries.shape[1] // n, 1)


def _own(tensor: Tensor, node: Node) -> Tensor:
    return tensor[:, node.start : node.start + node.length]


def _folded(tensor: Tensor, node: Node, kv_heads: int) -> Tensor:
    """[heads, n, width] as [kv_heads, share * n, width]: heads that share keys become rows."""
    own = _own(tensor, node)
    return own.reshape(kv_heads, -1, own.shape[-1])


def _path(tensor: Tensor, node: Node) -> Tensor:
    spans = (*node.prefix, (node.start, node.length))
    if not node.prefix:
        return _own(tensor, node)
    return torch.cat([tensor[:, start : start + length] for start, length in spans], 1)


def _scatter(total: Tensor, node: Node, part: Tensor) -> None:
    """Adds [kv_heads, past + n, width] to the path's places."""
    at = 0
    for start, length in (*node.prefix, (node.start, node.length)):
        total[:, start : start + length] += part[:, at : at + length]
        at += length
