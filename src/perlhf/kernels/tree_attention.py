"""Attention over a prefix tree: each node's tokens attend to their own path only, in two parts that need no mask.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product attention.
A node's queries see all of what comes before the node, and of the node itself what isn't later: two of torch's own
kernels, joined by the logarithms of their sums of exponentials. Given the joint sums, each kernel's backward is exact.
On a GPU, where so many small kernels would cost more than what they spare, it is one call under the tree's mask.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perlhf.kernels import cpu, kv_cache
from perlhf.kernels.kv_cache import KeyValueCache, attend_part, join_parts
from perlhf.method.packing import Node, Span

NAME = "perlhf_tree"
WRITTEN_OUT_TOKENS = 128
"""Queries of one task of our own kernel, or whose products exist at one time where they are written out."""
KERNEL_TOKENS = 192
"""From this many new tokens on, a CPU's kernel is the faster backward in bfloat16 too."""


def register() -> str:
    """Makes the attention known to transformers; returns its name."""
    AttentionInterface.register(NAME, attend)
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
    if cpu.usable(query, key, value) and query.shape[-1] == value.shape[-1]:
        return _NativeTreeAttention.apply(query, key, value, tuple(nodes), scaling)  # pyright: ignore[reportReturnType]
    if query.device.type not in kv_cache.KERNELS:
        return _masked_attention(query, key, value, tuple(nodes), scaling)
    return _TreeAttention.apply(query, key, value, tuple(nodes), scaling)  # pyright: ignore[reportReturnType]


class _NativeTreeAttention(torch.autograd.Function):
    """As `_TreeAttention`, every node's keys read where they lie, by our own kernel (`native`)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scaling: float) -> Tensor:
        heads, tokens, width = query.shape
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        out = _by_token(query)
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        pieces, spans, count = _table(nodes)
        sizes = cpu.int64s([heads, len(key), tokens, width, count])
        strides = cpu.int64s([n for t in (query, key, value, out) for n in t.stride()[:2]])
        cpu.call("attend", query, key, value, out, log_sums, strides, sizes, pieces, spans, float(scaling))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.nodes, ctx.scaling, ctx.sizes = nodes, float(scaling), sizes
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, out, log_sums = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        found = [_by_token(tensor) for tensor in (query, key, value)]
        pieces, spans, _ = _table(ctx.nodes)
        strides = cpu.int64s([n for t in (query, key, value, out, grad, *found) for n in t.stride()[:2]])
        inputs = query, key, value, out, grad, log_sums
        cpu.call("attend_backward", *inputs, *found, strides, ctx.sizes, pieces, spans, ctx.scaling)
        return *found, None, None


def _by_token(like: Tensor) -> Tensor:
    """An empty [heads, tokens, width], in memory [tokens, heads, width]: what linear layers read without a copy."""
    heads, tokens, width = like.shape
    return like.new_empty(tokens, heads, width).transpose(0, 1)


@functools.lru_cache(maxsize=4)
def _table(nodes: tuple[Node, ...]) -> tuple[Any, Any, int]:
    """The nodes in pieces, as the kernel reads them, for all layers."""
    pieces = _pieces(nodes, WRITTEN_OUT_TOKENS)
    rows, spans = [], []
    for piece in pieces:
        prefix = _merged(piece.prefix)
        rows += [piece.start, piece.length, len(spans) // 2, len(prefix)]
        spans += [number for span in prefix for number in span]
    return cpu.int64s(rows), cpu.int64s(spans), len(pieces)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scaling: float) -> Tensor:
    """As `tree_attention`, by torch's own choice of kernel and its backward."""
    key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    mask = _mask(nodes, query.device, query.dtype)[:, : query.shape[1]]
    return F.scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=scaling)[0]


@functools.lru_cache(maxsize=2)
def _mask(nodes: tuple[Node, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[tokens, tokens or a few more], 0 where a token sees another and -inf elsewhere, for all layers.

    A node sees the first tokens of others on its path; all spans of a path start where a node does. Rows are as long as
    the kernels want them in memory.
    """
    number = {node.start: at for at, node in enumerate(nodes)}
    seen = torch.zeros(len(nodes), len(nodes), dtype=torch.long)
    for at, node in enumerate(nodes):
        for start, length in node.prefix:
            seen[at, number[start]] = length
    lengths = torch.tensor([node.length for node in nodes])
    of = torch.repeat_interleave(torch.arange(len(nodes)), lengths)
    offset = torch.cat([torch.arange(node.length) for node in nodes])
    seen, of, offset = (tensor.to(device) for tensor in (seen, of, offset))
    allowed = offset < seen[of][:, of]
    allowed |= (of[:, None] == of) & (offset[:, None] >= offset)
    tokens = len(of)
    mask = torch.full((tokens, tokens + -tokens % kv_cache.ALIGNED), -torch.inf, dtype=dtype, device=device)
    mask[:, :tokens].masked_fill_(allowed, 0)
    return mask


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scaling: float) -> Tensor:
        heads, tokens, _ = query.shape
        out = _by_token(query)
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        for node in nodes:
            queries = _own(query, node).unflatten(0, (len(key), -1))
            shared = queries.shape[1]
            own = attend_part(
                queries, _shared(_own(key, node), shared), _shared(_own(value, node), shared), scaling, causal=True
            )
            if node.prefix:
                keys, values = (_shared(_path(tensor, node.prefix), shared) for tensor in (key, value))
                own = join_parts(attend_part(queries, keys, values, scaling), own)
            _own(out, node).copy_(own[0].flatten(0, 1))
            _own(log_sums, node).copy_(own[1].flatten(0, 1))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.nodes, ctx.scaling = nodes, scaling
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value = ctx.saved_tensors[:3]
        grads_out = torch.empty_like(query), *(torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        by_kernel, written_out = [], []
        for node in ctx.nodes:
            kernel = query.dtype == torch.float32 or node.length >= KERNEL_TOKENS
            (by_kernel if kernel else written_out).append(node)
        for gradients, nodes in (_by_kernel, by_kernel), (_written_out, written_out):
            if nodes:
                gradients(grads_out, grads[0], ctx.saved_tensors, nodes, ctx.scaling)
        return *(grad.to(query.dtype) for grad in grads_out), None, None


def _by_kernel(
    grads: Sequence[Tensor], grad: Tensor, saved: Sequence[Tensor], nodes: Sequence[Node], scaling: float
) -> None:
    """Puts these nodes' gradients by query, key and value into `grads`: torch's kernel on each part, given the joint
    `out` and `log_sums` among what the forward `saved`.
    """
    query, key, value, out, log_sums = saved
    for node in nodes:
        own = [_own(tensor, node).unflatten(0, (len(key), -1)) for tensor in (grad, query, out, log_sums)]
        shared = own[0].shape[1]
        found = torch.zeros_like(own[1])
        for causal, spans in (True, ((node.start, node.length),)), (False, node.prefix):
            if not spans:
                continue
            keys, values = (_shared(_path(tensor, spans), shared) for tensor in (key, value))
            of_queries, of_keys, of_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *own[:2], keys, values, *own[2:], 0.0, causal, scale=scaling
            )
            found += of_queries
            _scatter(grads[1], spans, of_keys.sum(1, dtype=torch.float32))
            _scatter(grads[2], spans, of_values.sum(1, dtype=torch.float32))
        _own(grads[0], node).copy_(found.flatten(0, 1))


def _written_out(
    grads: Sequence[Tensor], grad: Tensor, saved: Sequence[Tensor], nodes: Sequence[Node], scaling: float
) -> None:
    """As `_by_kernel`, as matrix products: in bfloat16 faster than a CPU's kernel on short nodes.

    With p = exp(scaling * q k^T - log_sum), the gradient of the logits is p * (grad v^T - sum(grad * out)). Those two
    products are float32: rounded logits would move the probabilities, and the difference loses digits.
    """
    query, key, value, out, log_sums = saved
    kv_heads, width, dtype = len(key), key.shape[-1], query.dtype
    wide_query, wide_key, wide_value, wide_grad = (tensor.float() for tensor in (query, key, value, grad))
    along = torch.linalg.vecdot(wide_grad, out.float())
    for node in _pieces(nodes, WRITTEN_OUT_TOKENS):
        spans = (*node.prefix, (node.start, node.length))
        keys, values = _path(wide_key, spans), _path(wide_value, spans)
        rows = [_own(tensor, node).reshape(kv_heads, -1, width) for tensor in (wide_query, wide_grad)]
        sums, means = (_own(tensor, node).reshape(kv_heads, -1, 1) for tensor in (log_sums, along))
        p = torch.baddbmm(sums, rows[0], keys.transpose(1, 2), beta=-1, alpha=scaling).exp_()
        p.unflatten(1, (-1, node.length))[..., -node.length :].tril_()
        inner = torch.baddbmm(means, rows[1], values.transpose(1, 2), beta=-1).mul_(p)
        p, inner, keys = p.to(dtype), inner.to(dtype), keys.to(dtype)
        queries, gradients = (tensor.to(dtype) for tensor in rows)
        _own(grads[0], node).copy_(torch.bmm(inner, keys).mul_(scaling).view(-1, node.length, width))
        _scatter(grads[1], spans, torch.bmm(inner.transpose(1, 2), queries), scaling)
        _scatter(grads[2], spans, torch.bmm(p.transpose(1, 2), gradients))


def attend(
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


def _path(tensor: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """The tokens of these places; what lies in one row is read without a copy."""
    parts = [tensor[:, start : start + length] for start, length in _merged(spans)]
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


def _scatter(total: Tensor, spans: Sequence[Span], part: Tensor, scale: float = 1.0) -> None:
    """Adds `scale` times [kv_heads, n, width] to these places."""
    at = 0
    for start, length in spans:
        total[:, start : start + length].add_(part[:, at : at + length], alpha=scale)
        at += length
