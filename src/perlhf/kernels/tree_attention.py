"""Attention over a prefix tree: each node's tokens attend to their own path only.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product attention.
On a CPU our own kernel reads a node's path where it lies and needs no mask. Elsewhere, and where none is compiled, it
is one call of torch's attention under the tree's mask: the kernel's slow twin, and what suits a GPU, where many small
calls would cost more than they spare.
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

from perlhf.kernels import cpu
from perlhf.kernels.kv_cache import ALIGNED, KeyValueCache
from perlhf.method.packing import Node, Span

NAME = "perlhf_tree"
PIECE_TOKENS = 128
"""Queries of one task of our own kernel."""


class Tree:
    """The nodes of a layout and what attention derives from them: once for all layers of a pass.

    Args:
        nodes: covering every token once.
    """

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = tuple(nodes)
        self._masks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @functools.cached_property
    def table(self) -> tuple[Any, Any, int]:
        """As our own kernel reads it: for each piece its start, length, first span and number of spans; the spans'
        starts and lengths; the number of pieces.
        """
        pieces = _pieces(self.nodes, PIECE_TOKENS)
        rows, spans = [], []
        for piece in pieces:
            prefix = _merged(piece.prefix)
            rows += [piece.start, piece.length, len(spans) // 2, len(prefix)]
            spans += [number for span in prefix for number in span]
        return cpu.int64s(rows), cpu.int64s(spans), len(pieces)

    def mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[tokens, tokens], 0 where a token (row) sees another (column) and -inf elsewhere."""
        if (device, dtype) not in self._masks:
            self._masks[device, dtype] = _mask(self.nodes, device, dtype)
        return self._masks[device, dtype]


def register() -> str:
    """Makes the attention known to transformers; returns its name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float) -> Tensor:
    """softmax(scaling * q k^T) v over each token's path.

    Args:
        query: [heads, tokens, width]; key, value: [kv_heads, tokens, width], heads a multiple of kv_heads.

    Returns:
        [heads, tokens, width].
    """
    if cpu.usable(query, key, value) and query.shape[-1] == value.shape[-1]:
        return _NativeTreeAttention.apply(query, key, value, tree, scaling)  # pyright: ignore[reportReturnType]
    return _masked_attention(query, key, value, tree, scaling)


class _NativeTreeAttention(torch.autograd.Function):
    """By our own kernel (`cpu`), which reads every node's keys where they lie."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float) -> Tensor:
        heads, tokens, width = query.shape
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        out = _by_token(query)
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        pieces, spans, count = tree.table
        sizes = cpu.int64s([heads, len(key), tokens, width, count])
        strides = cpu.int64s([n for t in (query, key, value, out) for n in t.stride()[:2]])
        cpu.call("attend", query, key, value, out, log_sums, strides, sizes, pieces, spans, float(scaling))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.tree, ctx.scaling, ctx.sizes = tree, float(scaling), sizes
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, out, log_sums = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        by_input = [_by_token(tensor) for tensor in (query, key, value)]
        pieces, spans, _ = ctx.tree.table
        strides = cpu.int64s([n for t in (query, key, value, out, grad, *by_input) for n in t.stride()[:2]])
        inputs = query, key, value, out, grad, log_sums
        cpu.call("attend_backward", *inputs, *by_input, strides, ctx.sizes, pieces, spans, ctx.scaling)
        return *by_input, None, None


def _by_token(like: Tensor) -> Tensor:
    """An empty [heads, tokens, width], in memory [tokens, heads, width]: what linear layers read without a copy."""
    heads, tokens, width = like.shape
    return like.new_empty(tokens, heads, width).transpose(0, 1)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float) -> Tensor:
    """As `tree_attention`, by torch's own choice of kernel and its backward."""
    key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    mask = tree.mask(query.device, query.dtype)
    return F.scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=scaling)[0]


def _mask(nodes: Sequence[Node], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`Tree.mask`. A node sees the first tokens of others on its path; all spans of a path start where a node does.
    Rows are as far apart in memory as the kernels want them.
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
    mask = torch.full((tokens, tokens + -tokens % ALIGNED), -torch.inf, dtype=dtype, device=device)
    return mask[:, :tokens].masked_fill_(allowed, 0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
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


def _merged(spans: tuple[Span, ...]) -> list[Span]:
    """The same places in as few spans as possible."""
    merged: list[Span] = []
    for start, length in spans:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged
