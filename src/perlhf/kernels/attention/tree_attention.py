"""Attention over a prefix tree: each node's tokens attend to their own path only, as far back as the layer sees.

transformers' networks call it through `AttentionInterface`; without a tree it is their scaled-dot-product attention.
On a CPU our own kernel reads a node's path where it lies and needs no mask. Elsewhere, and where none is compiled, it
is one call of torch's attention under the tree's mask: the kernel's slow twin, and what suits a GPU, where many small
calls would cost more than they spare.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from perlhf.kernels import cpu
from perlhf.kernels.attention import flex, sight
from perlhf.kernels.attention.flex import Blocks
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.kernels.call import current_call
from perlhf.kernels.kv_cache import ALIGNED, KeyValueCache, without_sink, written_part
from perlhf.method.packing import Node, Span

Table = tuple[Any, Any, int]
NAME = "perlhf_tree"
PIECE_TOKENS = 128
"""Queries of one task of our own kernel."""
NOTHING_BEHIND = -(1 << 40)
NEUTRAL = ("position_ids", "cache_position", "position_embeddings", "input_ids", "is_causal", "sliding_window")
"""Arguments of networks' attention that change nothing beyond what their masks and rotated queries say."""


class Tree:
    """The nodes of a layout and what attention derives from them: once for all layers of a pass.

    Args:
        nodes: covering every token once.
        sights: how far back layers see, by number; those that are missing see all.
        apart: keys and values lie elsewhere (`kv_cache.Pool`): nodes and their prefixes say at which places, and the
            queries of each node follow those of the node before it.
    """

    def __init__(self, nodes: Sequence[Node], sights: Mapping[int, Sight] | None = None, *, apart: bool = False):
        self.nodes = tuple(nodes)
        self.sights = sights or {}
        self.apart = apart
        self._masks: dict[tuple[Sight, torch.device, torch.dtype], Tensor] = {}
        self._tables: dict[tuple[Sight, bool | None], Table] = {}
        self._places: Tensor | None = None
        self._blocks: dict[tuple[Sight, torch.device], Blocks] = {}

    def blocks(self, sight: Sight, device: torch.device) -> Blocks:
        """As the kernel for GPUs reads it."""
        if (sight, device) not in self._blocks:
            self._blocks[sight, device] = Blocks(self.nodes, sight, device)
        return self._blocks[sight, device]

    def table(self, sight: Sight, single: bool | None = None) -> "Table":
        """As our own kernel reads it: for each piece its first query, its first key's place, its length, first span,
        number of spans and how far its first query's window begins behind the first of them; the spans' places and
        lengths; the number of pieces.

        Args:
            single: only nodes of one token, or only the others; None for all.
        """
        if (sight, single) not in self._tables:
            rows, spans, first = [], [], 0
            for node in self.nodes:
                chosen = single is None or single == (node.length == 1)
                for piece in _pieces(node, PIECE_TOKENS, sight.chunk) if chosen else ():
                    depth = _depth(piece)
                    seen = int(sight.first(depth))
                    prefix = _merged(_from(piece.prefix, seen))
                    behind = NOTHING_BEHIND if sight.window is None else depth - sight.window + 1 - seen
                    query = first + piece.start - node.start if self.apart else piece.start
                    rows += [query, piece.start, piece.length, len(spans) // 2, len(prefix), behind]
                    spans += [number for span in prefix for number in span]
                first += node.length
            self._tables[sight, single] = cpu.int64s(rows), cpu.int64s(spans), len(rows) // 6
        return self._tables[sight, single]

    def places(self, device: torch.device) -> Tensor:
        """Where keys lie that any of the tokens sees, ascending, of a tree whose keys are `apart`."""
        if (found := self._places) is None:
            spans = [span for node in self.nodes for span in (*node.prefix, (node.start, node.length))]
            parts = [torch.arange(start, start + length) for start, length in set(spans)]
            found = self._places = torch.cat(parts).unique().to(device)
        return found

    def mask(self, sight: Sight, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[tokens, tokens], 0 where a token (row) sees another (column) and -inf elsewhere; columns are `places` where
        keys are apart.
        """
        if (sight, device, dtype) not in self._masks:
            if self.apart:
                self._masks[sight, device, dtype] = _mask_apart(self.nodes, self.places(device), sight, dtype)
            else:
                self._masks[sight, device, dtype] = _mask(self.nodes, sight, device, dtype)
        return self._masks[sight, device, dtype]


def register() -> str:
    """Makes the attention known to transformers; returns its name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sight.mask)
    return NAME


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scaling: float,
    sight: Sight = FULL,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scaling * q k^T) v over what each token sees of its path.

    Args:
        query: [heads, tokens, width]; key, value: [kv_heads, tokens, width], heads a multiple of kv_heads; or
            [kv_heads, places, width] of a tree whose keys are apart, without gradients. Values may be of another width.
        sight: how far back the tokens see.
        cap: scores s become cap * tanh(s / cap).
        sinks: [heads] a further score of each head, whose share of the softmax goes nowhere.

    Returns:
        [heads, tokens, width of value].
    """
    plain = cap is None and sinks is None and query.shape[-1] == value.shape[-1]
    if plain and cpu.usable(query, key, value):
        if tree.apart:
            return _attend_apart(query, key, value, tree, scaling, sight)
        return _NativeTreeAttention.apply(query, key, value, tree, scaling, sight)  # pyright: ignore[reportReturnType]
    if not tree.apart and flex.usable(query):
        return flex.attention(query, key, value, tree.blocks(sight, query.device), scaling, cap, sinks)
    return _masked_attention(query, key, value, tree, scaling, sight, cap, sinks)


class _NativeTreeAttention(torch.autograd.Function):
    """By our own kernel (`cpu`), which reads every node's keys where they lie."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float, sight: Sight) -> Tensor:
        heads, tokens, width = query.shape
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        out = _by_token(query)
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        pieces, spans, count = tree.table(sight)
        sizes = cpu.int64s([heads, len(key), tokens, width, count])
        strides = cpu.int64s([n for t in (query, key, value, out) for n in t.stride()[:2]])
        cpu.call("attend", query, key, value, out, log_sums, strides, sizes, pieces, spans, float(scaling))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.table, ctx.scaling, ctx.sizes = (pieces, spans), float(scaling), sizes
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, out, log_sums = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        by_input = [_by_token(tensor) for tensor in (query, key, value)]
        pieces, spans = ctx.table
        strides = cpu.int64s([n for t in (query, key, value, out, grad, *by_input) for n in t.stride()[:2]])
        inputs = query, key, value, out, grad, log_sums
        cpu.call("attend_backward", *inputs, *by_input, strides, ctx.sizes, pieces, spans, ctx.scaling)
        return *by_input, None, None, None


def _attend_apart(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float, sight: Sight) -> Tensor:
    """By our own kernels: one for nodes of one token, which are sampled from, and that of the tree for the others."""
    heads, tokens, width = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = _by_token(query)
    strides = cpu.int64s([n for t in (query, key, value, out) for n in t.stride()[:2]])
    for single in (True, False):
        pieces, spans, count = tree.table(sight, single)
        sizes = cpu.int64s([heads, len(key), tokens, width, count])
        if single and count:
            cpu.call("attend_one", query, key, value, out, strides, sizes, pieces, spans, float(scaling))
        elif count:
            log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
            cpu.call("attend", query, key, value, out, log_sums, strides, sizes, pieces, spans, float(scaling))
    return out


def _by_token(like: Tensor) -> Tensor:
    """An empty [heads, tokens, width], in memory [tokens, heads, width]: what linear layers read without a copy."""
    heads, tokens, width = like.shape
    return like.new_empty(tokens, heads, width).transpose(0, 1)


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scaling: float,
    sight: Sight,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `tree_attention`, by torch's own choice of kernel and its backward, or written out under a cap or sinks."""
    if tree.apart:
        key, value = (tensor[:, tree.places(query.device)] for tensor in (key, value))
    key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    mask = tree.mask(sight, query.device, query.dtype)
    return _under_mask(query[None], key[None], value[None], mask, scaling, cap, sinks)[0]


def _under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[batch, heads, time, width] of queries, keys and values with as many heads under an additive or boolean mask."""
    if cap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    mixed, log_sum = written_part(query, key, value, scaling, mask, cap)
    return mixed if sinks is None else without_sink(mixed, log_sum, sinks[None, :, None])


def _mask(nodes: Sequence[Node], sight: Sight, device: torch.device, dtype: torch.dtype) -> Tensor:
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
    if sight != FULL:
        depth = offset + torch.tensor([_depth(node) for node in nodes], device=device)[of]
        allowed &= depth >= sight.first(depth)[:, None]
    tokens = len(of)
    mask = torch.full((tokens, tokens + -tokens % ALIGNED), -torch.inf, dtype=dtype, device=device)
    return mask[:, :tokens].masked_fill_(allowed, 0)


def _mask_apart(nodes: Sequence[Node], places: Tensor, sight: Sight, dtype: torch.dtype) -> Tensor:
    """`Tree.mask` of keys that lie at `places`."""
    tokens = sum(node.length for node in nodes)
    mask = torch.full((tokens, len(places) + -len(places) % ALIGNED), -torch.inf, dtype=dtype, device=places.device)
    mask, first = mask[:, : len(places)], 0
    for node in nodes:
        for number in range(node.length):
            path = (*node.prefix, (node.start, number + 1))
            seen = _from(path, int(sight.first(_depth(node) + number)))
            at = torch.cat([torch.arange(start, start + length) for start, length in seen])
            mask[first + number, torch.searchsorted(places, at.to(places.device))] = 0
        first += node.length
    return mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls, under `Call.tree` and `Call.sampled`: query [batch, heads, time, width]; out
    [batch, time, heads, width].

    Args:
        softcap, s_aux: `cap` and `sinks` of `tree_attention`, by transformers' names.

    Raises:
        ValueError: an argument that changes attention in a way that isn't known here.
    """
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in NEUTRAL:
            raise ValueError(f"attention is given {name}")
    tree, sampled = current_call().tree, current_call().sampled
    layer: Any = getattr(module, "layer_idx", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sampled is not None and tree is None:
        assert isinstance(sampled, KeyValueCache), "places of a pool are named by a tree"
        return sampled.attend(layer, query, key, value, scale, softcap, s_aux).transpose(1, 2), None
    if tree is None:
        sight.note(layer, attention_mask)
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )[0], None
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        return _under_mask(query, key, value, attention_mask, scale, softcap, s_aux).transpose(1, 2), None
    assert len(query) == 1 and not dropout, "a tree is one row"
    keys, values = (key[0], value[0]) if sampled is None else sampled.record(layer, key[0], value[0])
    sees = tree.sights.get(layer, FULL)
    return tree_attention(query[0], keys, values, tree, scale, sees, softcap, s_aux).transpose(0, 1)[None], None


def _depth(node: Node) -> int:
    """Of its first token: how many come before it."""
    return sum(length for _, length in node.prefix)


def _pieces(node: Node, size: int, chunk: int | None = None) -> list[Node]:
    """The node as consecutive nodes of at most `size` tokens, each after all that comes before it; with a chunk none
    holds tokens of two.
    """
    pieces, at, depth = [], 0, _depth(node)
    while at < node.length:
        room = size if chunk is None else min(size, chunk - (depth + at) % chunk)
        before = ((node.start, at),) if at else ()
        pieces.append(Node(node.start + at, min(room, node.length - at), (*node.prefix, *before)))
        at += pieces[-1].length
    return pieces


def _from(spans: Sequence[Span], first: int) -> tuple[Span, ...]:
    """The spans without their first tokens."""
    left = []
    for start, length in spans:
        skipped = min(first, length)
        first -= skipped
        if skipped < length:
            left.append((start + skipped, length - skipped))
    return tuple(left)


def _merged(spans: tuple[Span, ...]) -> list[Span]:
    """The same places in as few spans as possible."""
    merged: list[Span] = []
    for start, length in spans:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged
