"""Attention over a prefix tree: each node's tokens attend to their own path only, by small causal products.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product attention.
Nodes are cut into blocks of queries that look no further than their own end: about half the products of a long node,
and matrices that stay in the cache. The backward recomputes the probabilities, so that only queries, keys and values
are kept.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perlhf.cache import KeyValueCache, attend_part
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
    return _TreeAttention.apply(query, key, value, _cut(tuple(nodes), BLOCK), scaling)  # pyright: ignore[reportReturnType]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Node, ...], scaling: float) -> Tensor:
        heads, tokens, width = query.shape
        # In memory [tokens, heads, width]: what the output projection reads and keeps is this tensor, not a copy.
        out = query.new_empty(tokens, heads, width).transpose(0, 1)
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        longest, hidden = _hidden(blocks, query.dtype, query.device)
        for block in blocks:
            keys, values = _path(key, block), _path(value, block)
            mask = hidden[: block.length, longest + block.length - _seen(block) : longest + block.length]
            queries = _own(query, block).unflatten(0, (len(key), -1))
            keys, values = (part[:, None].expand(-1, queries.shape[1], -1, -1) for part in (keys, values))
            mixed, log_sum = attend_part(queries, keys, values, mask, scaling)
            _own(out, block).copy_(mixed.flatten(0, 1))
            _own(log_sums, block).copy_(log_sum.flatten(0, 1))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        """With p = exp(logits - log_sum), the gradient of the logits is p * (grad v^T - sum(grad * out))."""
        query, key, value, out, log_sums = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros_like(grad_key)
        along = torch.linalg.vecdot(grads[0].float(), out.float()).neg_()
        log_sums = log_sums.neg()
        longest, hidden = _hidden(ctx.blocks, torch.float32, key.device)
        for block in ctx.blocks:
            queries, keys, values = _folded(query, block, len(key)), _path(key, block), _path(value, block)
            grad, n = _folded(grads[0], block, len(key)), block.length
            mask = hidden[:n, longest + n - _seen(block) : longest + n]
            # Rounded logits would move the probabilities, so this one product is float32.
            p = (_own(log_sums, block)[..., None] + mask).view(len(key), -1, mask.shape[1])
            p.baddbmm_(queries.float(), keys.float().transpose(1, 2), alpha=ctx.scaling).exp_()
            _scatter(grad_value, block, p.to(grad.dtype).transpose(1, 2), grad)
            inner = (grad @ values.transpose(1, 2)).float()
            inner = inner.add_(_folded(along[..., None], block, len(key))).mul_(p).to(query.dtype)
            own = _own(grad_query, block)
            own.copy_((inner @ keys).view(own.shape))
            _scatter(grad_key, block, inner.transpose(1, 2), queries)
        return (
            grad_query.mul_(ctx.scaling),
            grad_key.mul_(ctx.scaling).to(key.dtype),
            grad_value.to(value.dtype),
            None,
            None,
        )


@lru_cache(maxsize=4)
def _hidden(blocks: tuple[Node, ...], dtype: torch.dtype, device: torch.device) -> tuple[int, Tensor]:
    """[length, before + length], of which every block's mask is a part, and `before`: 0 before the block, then -inf for
    later tokens.
    """
    before, length = max(map(_seen, blocks)), max(block.length for block in blocks)
    own = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu_(1)
    return before, torch.cat([own.new_zeros(length, before), own], 1)


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


@lru_cache(maxsize=4)
def _cut(nodes: tuple[Node, ...], size: int) -> tuple[Node, ...]:
    """The nodes as consecutive nodes of at most `size` tokens, each after all that comes before it."""
    return tuple(
        Node(node.start + at, min(size, node.length - at), _extended(node.prefix, (node.start, at)))
        for node in nodes
        for at in range(0, node.length, size)
    )


def _seen(block: Node) -> int:
    """Tokens that the block's last one looks at."""
    return sum(length for _, length in block.prefix) + block.length


def _extended(spans: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """`spans` and then `span`, in as few spans as possible: one span is read without a copy."""
    if span[1] == 0:
        return spans
    if spans and sum(spans[-1]) == span[0]:
        return (*spans[:-1], (spans[-1][0], spans[-1][1] + span[1]))
    return (*spans, span)


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


def _scatter(total: Tensor, block: Node, left: Tensor, right: Tensor) -> None:
    """Adds `left` @ `right` [kv_heads, past + n, width] to the path's places."""
    spans = _extended(block.prefix, (block.start, block.length))
    if len(spans) == 1 and left.dtype == torch.float32:
        ((start, length),) = spans
        total[:, start : start + length].baddbmm_(left, right)
        return
    part, at = left @ right, 0
    for start, length in spans:
        total[:, start : start + length] += part[:, at : at + length]
        at += length
