"""Attention over a prefix tree: each node's tokens attend to their own path only, by small causal products.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product attention.
Nodes are cut into blocks of queries that look no further than their own end: about half the products of a long node,
and matrices that stay in the cache. The backward recomputes the probabilities, so that only queries, keys and values
are kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perlhf.cache import KeyValueCache
from perlhf.packing import Node, Span

NAME = "perlhf_tree"
BLOCK = 128
"""Queries computed together: measured on a CPU by `benchmarks/attention.py`; untested on a GPU, where more may win."""


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
    blocks = tuple(block for node in nodes for block in _blocks(node))
    return _TreeAttention.apply(query, key, value, blocks, scaling)  # pyright: ignore[reportReturnType]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Node, ...], scaling: float) -> Tensor:
        out = torch.empty_like(query)
        for block in blocks:
            queries, keys, values = _folded(query, block, len(key)), _path(key, block), _path(value, block)
            own = _own(out, block)
            # Four dimensions: with three, torch takes its slow path.
            mixed = F.scaled_dot_product_attention(
                queries[None], keys[None], values[None], _visible(block, queries, keys), scale=scaling
            )
            own.copy_(mixed.view(own.shape))
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros_like(grad_key)
        for block in ctx.blocks:
            queries, keys, values = _folded(query, block, len(key)), _path(key, block), _path(value, block)
            # Rounded logits would move the probabilities, so this one product is float32.
            logits = (queries.float() * ctx.scaling) @ keys.float().transpose(1, 2)
            _hide_later(logits, block)
            p = torch.softmax(logits, -1)
            grad = _folded(grads[0], block, len(key))
            _scatter(grad_value, block, p.to(grad.dtype).transpose(1, 2) @ grad)
            inner = (grad @ values.transpose(1, 2)).float()
            inner = torch.ops.aten._softmax_backward_data(inner, p, -1, torch.float32).to(query.dtype)
            own = _own(grad_query, block)
            own.copy_((inner @ keys).view(own.shape))
            _scatter(grad_key, block, inner.transpose(1, 2) @ queries)
        return (
            grad_query.mul_(ctx.scaling),
            grad_key.mul_(ctx.scaling).to(key.dtype),
            grad_value.to(value.dtype),
            None,
            None,
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: tuple[Node, ...] | None = None,
    sampled: KeyValueCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [batch, heads, time, width]; out [batch, time, heads, width]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sampled is not None and tree is None:
        layer: Any = module.layer_idx
        return sampled.attend(layer, query, key, value, scale).transpose(1, 2), None
    if tree is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    assert len(query) == 1 and not dropout, "a tree is one row"
    if sampled is not None:
        layer = module.layer_idx
        sampled.record(layer, key[0], value[0])
    return tree_attention(query[0], key[0], value[0], tree, scale).transpose(0, 1)[None], None


def _blocks(node: Node) -> list[Node]:
    """The node as consecutive nodes of at most `BLOCK` tokens, each after all that comes before it."""
    return [
        Node(node.start + at, min(BLOCK, node.length - at), _extended(node.prefix, (node.start, at)))
        for at in range(0, node.length, BLOCK)
    ]


def _extended(spans: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """`spans` and then `span`, in as few spans as possible: one span is read without a copy."""
    if span[1] == 0:
        return spans
    if spans and sum(spans[-1]) == span[0]:
        return (*spans[:-1], (spans[-1][0], spans[-1][1] + span[1]))
    return (*spans, span)


def _visible(block: Node, queries: Tensor, keys: Tensor) -> Tensor:
    """[share * n, past + n], True where a query may look: not at later tokens of its own block."""
    visible = torch.ones(block.length, keys.shape[1], dtype=torch.bool, device=keys.device)
    return visible.tril_(keys.shape[1] - block.length).repeat(queries.shape[1] // block.length, 1)


def _hide_later(logits: Tensor, block: Node) -> None:
    """Sets [kv_heads, share * n, past + n] to -inf where `_visible` is False."""
    n = block.length
    own = logits.view(len(logits), -1, n, logits.shape[-1])[..., -n:]
    own.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=logits.device).triu_(1), -torch.inf)


def _own(tensor: Tensor, block: Node) -> Tensor:
    return tensor[:, block.start : block.start + block.length]


def _folded(tensor: Tensor, block: Node, kv_heads: int) -> Tensor:
    """[heads, n, width] as [kv_heads, share * n, width]: heads that share keys become rows."""
    own = _own(tensor, block)
    return own.reshape(kv_heads, -1, own.shape[-1])


def _path(tensor: Tensor, block: Node) -> Tensor:
    spans = _extended(block.prefix, (block.start, block.length))
    parts = [tensor[:, start : start + length] for start, length in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _scatter(total: Tensor, block: Node, part: Tensor) -> None:
    """Adds [kv_heads, past + n, width] to the path's places."""
    at = 0
    for start, length in _extended(block.prefix, (block.start, block.length)):
        total[:, start : start + length] += part[:, at : at + length]
        at += length
