"""Attention over a prefix tree: each node's tokens attend to their own path only, in two parts that need no mask.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product attention.
A node's queries see all of what comes before the node, and of the node itself what isn't later: two of torch's own
kernels, joined by the logarithms of their sums of exponentials. Given the joint sums, each kernel's backward is exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perlhf import cache
from perlhf.cache import KeyValueCache, attend_part, join_parts
from perlhf.packing import Node, Span

NAME = "perlhf_tree"
WRITTEN_OUT_TOKENS = 128
"""Queries whose products exist at one time where torch has no kernel."""


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
    if query.device.type not in cache.KERNELS:
        nodes = _pieces(nodes, WRITTEN_OUT_TOKENS)
    return _TreeAttention.apply(query, key, value, tuple(nodes), scaling)  # pyright: ignore[reportReturnType]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scaling: float) -> Tensor:
        heads, tokens, width = query.shape
        # In memory [tokens, heads, width]: what the output projection reads and keeps is this tensor, not a copy.
        out = query.new_empty(tokens, heads, width).transpose(0, 1)
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        for node in nodes:
            queries = _own(query, node).unflatten(0, (len(key), -1))
            shared = queries.shape[1]
            own = attend_part(
                queries, _shared(_own(key, node), shared), _shared(_own(value, node), shared), scaling, causal=True
            )
            if node.prefix:
                keys, values = _shared(_before(key, node), shared), _shared(_before(value, node), shared)
                own = join_parts(attend_part(queries, keys, values, scaling), own)
            _own(out, node).copy_(own[0].flatten(0, 1))
            _own(log_sums, node).copy_(own[1].flatten(0, 1))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.nodes, ctx.scaling = nodes, scaling
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, out, log_sums = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros_like(grad_key)
        for node in ctx.nodes:
            queries, grad, mixed, log_sum = (
                _own(tensor, node).unflatten(0, (len(key), -1)) for tensor in (query, grads[0], out, log_sums)
            )
            parts = [(True, ((node.start, node.length),), _own(key, node), _own(value, node))]
            if node.prefix:
                parts.append((False, node.prefix, _before(key, node), _before(value, node)))
            found = torch.zeros_like(queries)
            for causal, spans, keys, values in parts:
                shared = queries.shape[1]
                of_queries, of_keys, of_values = _backward_of_part(
                    grad, queries, _shared(keys, shared), _shared(values, shared), mixed, log_sum, ctx.scaling, causal
                )
                found += of_queries
                _scatter(grad_key, spans, of_keys.sum(1, dtype=torch.float32))
                _scatter(grad_value, spans, of_values.sum(1, dtype=torch.float32))
            _own(grad_query, node).copy_(found.flatten(0, 1))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _backward_of_part(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scaling: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, keys and values of one part, [kv_heads, share, ...], given the joint `out` and `log_sum`.

    With p = exp(scaling * q k^T - log_sum), the gradient of the logits is p * (grad v^T - sum(grad * out)).
    """
    if query.device.type in cache.KERNELS:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, keys, values, out, log_sum, 0.0, causal, scale=scaling
        )
    # Rounded logits would move the probabilities, so this one product is float32.
    p = torch.exp((query.float() @ keys.float().transpose(2, 3)) * scaling - log_sum[..., None])
    if causal:
        p = p.tril()
    along = torch.linalg.vecdot(grad.float(), out.float())[..., None]
    inner = (p * ((grad @ values.transpose(2, 3)).float() - along) * scaling).to(query.dtype)
    return inner @ keys, inner.transpose(2, 3) @ query, p.to(grad.dtype).transpose(2, 3) @ grad


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


def _pieces(nodes: Sequence[Node], size: int) -> list[Node]:
    """The nodes as consecutive nodes of at most `size` tokens, each after all that comes before it."""
    return [
        Node(node.start + at, min(size, node.length - at), (*node.prefix, *([(node.start, at)] if at else [])))
        for node in nodes
        for at in range(0, node.length, size)
    ]


def _own(tensor: Tensor, node: Node) -> Tensor:
    return tensor[:, node.start : node.start + node.length]


def _before(tensor: Tensor, node: Node) -> Tensor:
    """What the node's path has before it; a path in one span is read without a copy."""
    parts = [tensor[:, start : start + length] for start, length in _merged(node.prefix)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _merged(spans: tuple[Span, ...]) -> list[Span]:
    """The same places in as few spans as possible."""
    merged: list[Span] = []
    for start, length in spans:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged


def _shared(tensor: Tensor, share: int) -> Tensor:
    """[kv_heads, n, width] for each of the `share` heads that use it, without a copy."""
    return tensor[:, None].expand(-1, share, -1, -1)


def _scatter(total: Tensor, spans: Sequence[Span], part: Tensor) -> None:
    """Adds [kv_heads, n, width] to these places."""
    at = 0
    for start, length in spans:
        total[:, start : start + length] += part[:, at : at + length]
        at += length
