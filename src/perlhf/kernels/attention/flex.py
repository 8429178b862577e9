"""Attention over a tree on a GPU by FlexAttention: only blocks that somebody sees are computed, and no mask is kept.

Tokens of a tree are numbered so that all that see a token have numbers from its own up to a last one: two numbers a
token say who sees whom (`Blocks`), and which blocks of 128 by 128 hold anything follows from the nodes' spans. Windows
and chunks are one more comparison, caps a change of scores, sinks a share of the softmax.

Never run on a GPU so far: `$PERLHF_GPU_ATTENTION=flex` takes it there for rows of at least `MIN_TOKENS`; without, the
masked call computes all (`tree_attention`), which is its twin in `tests/unit` and `tests/gpu`.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.kernels.kv_cache import without_sink
from perlhf.method.packing import Node

VARIABLE = "PERLHF_GPU_ATTENTION"
"""`flex` in the environment takes this kernel on a GPU."""
MIN_TOKENS = 1024
"""Shorter rows are faster under a mask (0.72 times at 512 tokens, 1.3 at 2,048 on an H200, of one layer alone)."""
BLOCK = 128
FORMS = 64
"""Most that are compiled in a process."""


def usable(query: Tensor) -> bool:
    """Whether it is wanted, and the faster way, for queries [heads, tokens, width]."""
    wanted = query.device.type == "cuda" and query.shape[1] >= MIN_TOKENS
    return wanted and os.environ.get(VARIABLE) == "flex"


class Blocks:
    """A tree as the kernel reads it, its tokens padded to whole blocks; a padded token sees itself alone.

    Args:
        nodes: covering every token once; each one's prefix is the path of the prefix's last token.
        sight: how far back tokens see.
    """

    def __init__(self, nodes: Sequence[Node], sight: Sight, device: torch.device):
        from torch.nn.attention.flex_attention import BlockMask  # takes seconds to import

        self.tokens = sum(node.length for node in nodes)
        self.padding = -self.tokens % BLOCK
        first, last, depth = numbered(nodes, self.tokens + self.padding)
        seen, whole = pairs_of_blocks(nodes, sight, (self.tokens + self.padding) // BLOCK)
        some, full = (_listed(torch.from_numpy(each).to(device)) for each in (seen & ~whole, whole))
        lengths = (self.tokens + self.padding, self.tokens + self.padding)
        at = [first, last] if sight == FULL else [first, last, depth, _first_seen(sight, depth)]
        sees = _sees(*(torch.from_numpy(each).to(device) for each in at))
        self.mask = BlockMask.from_kv_blocks(*some, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)


def attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """As `tree_attention.tree_attention`, values and gradients, of keys that aren't apart."""
    from torch.nn.attention.flex_attention import AuxRequest

    padded = (F.pad(each, (0, 0, 0, blocks.padding))[None] for each in (query, key, value))
    given: dict[str, Any] = {"block_mask": blocks.mask, "scale": scaling, "enable_gqa": len(query) != len(key)}
    given["score_mod"] = None if cap is None else _capped(torch.tensor(cap, device=query.device))
    if sinks is None:
        return _flex(query.device.type)(*padded, **given)[0, :, : blocks.tokens]
    mixed, told = _flex(query.device.type)(*padded, **given, return_aux=AuxRequest(lse=True))
    return without_sink(mixed[0], told.lse[0], sinks[:, None])[:, : blocks.tokens]


def numbered(nodes: Sequence[Node], tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Of each token its number, the one after the last that sees it, and its depth; all [tokens].

    A node's tokens have numbers in their order, then those of what branches off come: first what branches off last.
    What is beyond the nodes, up to `tokens`, is numbered last.

    >>> first, last, _ = numbered([Node(0, 3), Node(3, 2, ((0, 1),)), Node(5, 1, ((0, 3),))], 6)
    >>> first.tolist(), last.tolist()
    ([0, 1, 2, 4, 5, 3], [6, 4, 4, 6, 6, 4])
    """
    first, last, depth = np.zeros((3, tokens), np.int32)
    by_start = {node.start: at for at, node in enumerate(nodes)}
    children: list[list[tuple[int, int]]] = [[] for _ in nodes]  # after how many of a node's tokens, who
    roots: list[int] = []
    for at, node in enumerate(nodes):
        depth[node.start : node.start + node.length] = sum(length for _, length in node.prefix) + np.arange(node.length)
        if node.prefix:
            start, length = node.prefix[-1]
            parent = nodes[by_start[start]]
            assert (*parent.prefix, (start, length)) == tuple(node.prefix), "a path is that of its last token"
            children[by_start[start]].append((length, at))
        else:
            roots.append(at)
    for own in children:
        own.sort()
    number = 0
    stack = [(at, False) for at in reversed(roots)]
    open_until: dict[int, int] = {}  # of a node whose branches are being numbered: its tokens without a last number yet
    while stack:
        at, begun = stack.pop()
        node = nodes[at]
        if not begun:
            first[node.start : node.start + node.length] = number + np.arange(node.length)
            number += node.length
            open_until[at] = node.length
        # Nobody but the node itself sees the tokens behind the next branch.
        after = children[at][-1][0] if children[at] else 0
        last[node.start + after : node.start + open_until[at]] = number
        open_until[at] = min(open_until[at], after)
        if children[at]:
            stack += [(at, True), (children[at].pop()[1], False)]
    beyond = sum(node.length for node in nodes)
    first[beyond:] = np.arange(number, number + tokens - beyond)
    last[beyond:] = first[beyond:] + 1
    return first, last, depth


def pairs_of_blocks(nodes: Sequence[Node], sight: Sight, count: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks of queries (rows) see any of a block of keys (columns), and which see all of it: [count, count]."""
    seen, pairs = np.eye(count, dtype=np.bool_), np.zeros((count, count), np.int64)
    for node in nodes:
        depth, end = sum(length for _, length in node.prefix), node.start + node.length
        for block in range(node.start // BLOCK, -(-end // BLOCK)):
            begin, stop = max(node.start, block * BLOCK), min(end, (block + 1) * BLOCK)
            back = int(sight.first(depth + begin - node.start))  # the first depth that any of these sees
            for start, length in (*node.prefix, (node.start, begin - node.start)):
                skipped, back = min(back, length), max(0, back - length)
                _mark(seen, pairs, block, stop - begin, start + skipped, start + length)
            seen[block, begin // BLOCK : -(-stop // BLOCK)] = True
    return seen, (pairs == BLOCK * BLOCK) if sight == FULL else np.zeros_like(seen)


def _mark(seen: NDArray[np.bool_], pairs: NDArray[np.int64], block: int, rows: int, start: int, end: int) -> None:
    """So many rows of a block see the keys from `start` to `end`."""
    if start == end:
        return
    columns = np.arange(start // BLOCK, -(-end // BLOCK))
    seen[block, columns] = True
    pairs[block, columns] += rows * (np.minimum(end, (columns + 1) * BLOCK) - np.maximum(start, columns * BLOCK))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are chosen, and which: theirs first. As BlockMask has them."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _first_seen(sight: Sight, depth: NDArray[np.int32]) -> NDArray[np.int32]:
    """Of each token's depth: the depth from which on it sees its path."""
    return sight.first(torch.from_numpy(depth)).int().numpy()


def _sees(first: Tensor, last: Tensor, depth: Tensor | None = None, back: Tensor | None = None) -> Any:
    """Who sees whom, as BlockMask asks it. What it looks up are tensors: a window as a number would be compiled into
    the kernel, and a network whose layers see differently would have one for each.

    Args:
        first, last: numbers of tokens (`numbered`).
        depth, back: of tokens that don't see all of their path: their depth, and the first that they see.
    """

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (first[key] <= first[query]) & (first[query] < last[key])
        return on_path if depth is None or back is None else on_path & (depth[key] >= back[query])

    return sees


def _capped(cap: Tensor) -> Any:
    """Scores under a cap, a tensor: beside a Python number torch falls back to computing step by step, with all of
    the scores in memory, under `dynamic=True`."""

    def change(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return change


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """Compiled for rows of any length; step by step on a CPU, where tests compare it."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled("inductor") if device == "cuda" else flex_attention


def compiled(backend: Any) -> Callable[..., Any]:
    """FlexAttention compiled once for each form: with and without gradients, a window, a cap or sinks; not for lengths
    and trees. What can't be compiled, or would be too often, is an error: step by step all scores would be in memory.

    Args:
        backend: `torch.compile`'s.
    """
    from torch.fx.experimental import _config
    from torch.nn.attention.flex_attention import flex_attention

    # Else sizes that are equal in the first pack (as many blocks as heads) would be taken to be equal in all.
    _config.use_duck_shape = False
    compiling: Any = torch.compile  # whose annotations lack the limit
    return compiling(flex_attention, dynamic=True, fullgraph=True, recompile_limit=FORMS, backend=backend)
