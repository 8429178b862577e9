"""Attention over a tree against softmax over each sequence alone: values and gradients, on trees of random shape."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perlhf.kernels import cpu
from perlhf.kernels.attention import tree_attention
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.kernels.attention.tree_attention import Tree
from perlhf.method.packing import Layout, Node, lay_out

SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=5)
SCALING = 0.3
WAYS = {"native": nullcontext, "masked": cpu.off}
"""By our own kernel where it is compiled, or under the tree's mask."""


SIGHTS = [FULL, Sight(window=1), Sight(window=3), Sight(window=100), Sight(chunk=1), Sight(chunk=4)]


def slow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    sight: Sight = FULL,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[heads, tokens, width], the softmax of each sequence written out as if there were no other."""
    key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    for i in range(len(layout.spans)):
        path = torch.tensor(layout.indices(i, 0, layout.tokens))
        logits = SCALING * query[:, path] @ key[:, path].transpose(1, 2)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        depth = torch.arange(len(path))
        hidden = (depth[None] > depth[:, None]) | (depth[None] < sight.first(depth)[:, None])
        logits = logits.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, len(path), 1)], -1)
        p = torch.softmax(logits, -1)[..., : len(path)]
        out = out.index_copy(1, path, p @ value[:, path])
    return out


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [4, tokens, 8], key and value [2, tokens, 8]: two heads share keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, tokens, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    return query, key, value


@pytest.mark.parametrize("way", WAYS)
@given(sequences=SEQUENCES, sight=st.sampled_from(SIGHTS))
def test_equals_the_slow_twin(way: str, sequences: list[list[int]], sight: Sight) -> None:
    layout = lay_out(sequences, "tree")
    assert layout.nodes is not None
    tensors = query, key, value = inputs(layout.tokens)
    expected = slow(query, key, value, layout, sight)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    with pytest.MonkeyPatch.context() as patch, WAYS[way]():
        patch.setattr(tree_attention, "PIECE_TOKENS", 2)
        found = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING, sight)
        grads = torch.autograd.grad((found * weight).sum(), tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


@given(sequences=SEQUENCES, sight=st.sampled_from(SIGHTS), capped=st.booleans(), sinking=st.booleans())
def test_caps_sinks_and_values_of_another_width(
    sequences: list[list[int]], sight: Sight, capped: bool, sinking: bool
) -> None:
    layout = lay_out(sequences, "tree")
    assert layout.nodes is not None
    query, key, value = inputs(layout.tokens)
    tensors = query, key, value = query, key, value[..., :5]
    cap, sinks = 0.7 if capped else None, torch.tensor([0.0, 2.0, -9.0, 0.5]) if sinking else None
    expected = slow(query, key, value, layout, sight, cap, sinks)
    found = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING, sight, cap, sinks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pairs = zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (found, expected)), strict=True)
    for grad, want in pairs:
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@given(sequences=SEQUENCES, sight=st.sampled_from(SIGHTS), new=st.integers(1, 4), seed=st.integers(0, 9))
def test_keys_that_lie_elsewhere(way: str, sequences: list[list[int]], sight: Sight, new: int, seed: int) -> None:
    """The last tokens of each sequence, whose keys lie in any order among others', as if they lay side by side."""
    tokens = sum(map(len, sequences))
    query, key, value = (tensor.detach() for tensor in inputs(tokens))
    layout = lay_out([[at] * len(ids) for at, ids in enumerate(sequences)], "tree")  # nothing is shared
    expected = slow(query, key, value, layout, sight)
    # Each token at another place of a pool that has more of them; the last tokens of a sequence side by side.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    nodes, wanted, free = [], [], 3
    pool = torch.randn(2, 2, tokens + 20, 8, generator=generator)
    for at in order:
        flat = layout.indices(at, 0, len(sequences[at]))
        count = min(new, len(flat))
        prefix = []
        for source in flat[: len(flat) - count]:
            pool[0][:, free], pool[1][:, free] = key[:, source], value[:, source]
            prefix.append((free, 1))
            free += 1
        free += 1
        for offset, source in enumerate(flat[len(flat) - count :]):
            pool[0][:, free + offset], pool[1][:, free + offset] = key[:, source], value[:, source]
        nodes.append(Node(free, count, tuple(prefix)))
        wanted += flat[len(flat) - count :]
        free += count
        pool = torch.cat([pool, torch.randn(2, 2, 2, 8, generator=generator)], 2)
    with WAYS[way]():
        tree = Tree(nodes, apart=True)
        found = tree_attention.tree_attention(query[:, wanted], pool[0], pool[1], tree, SCALING, sight)
    torch.testing.assert_close(found, expected[:, wanted], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_by_hand(way: str) -> None:
    # One head of width 1, scaling 1. Token 1 sees keys 0 and ln 3 with query 1: weights 1/4 and 3/4 of values 4 and 8.
    layout = lay_out([[1, 2]], "tree")
    assert layout.nodes is not None
    query, key, value = (torch.tensor(x).view(1, 2, 1) for x in ([1.0, 1.0], [0.0, 1.0986123], [4.0, 8.0]))
    with WAYS[way]():
        found = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), 1.0)
    assert found.flatten().tolist() == pytest.approx([4.0, 7.0])


def test_what_a_tree_tells_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of 3, 1 and 1 tokens in pieces of two: what lies side by side is one span."""
    monkeypatch.setattr(tree_attention, "PIECE_TOKENS", 2)
    layout = lay_out([[1, 2, 4], [1, 2, 3], [1, 2, 4, 5]], "tree")
    assert layout.nodes is not None and layout.ids.tolist() == [[1, 2, 4, 5, 3]]
    tree = Tree(layout.nodes)
    rows, spans, count = tree.table(FULL)
    none = tree_attention.NOTHING_BEHIND
    # query, place, length, first span, number of spans, how far the window has left the first of them behind
    assert [*rows] == [0, 0, 2, 0, 0, none, 2, 2, 2, 0, 1, none, 4, 4, 1, 1, 1, none]
    assert [*spans] == [0, 2, 0, 2] and count == 3
    # Of the first piece's two tokens the third sees the second alone, and begins there.
    assert [*tree.table(Sight(window=2))[0]] == [0, 0, 2, 0, 0, -1, 2, 2, 2, 0, 1, 0, 4, 4, 1, 1, 1, 0]
    assert [*tree.table(Sight(window=2))[1]] == [1, 1, 1, 1]
    # Chunks of three: the piece of the third and fourth token is cut, and the fourth sees nothing before it.
    chunked = [(0, 0, 2, 0, 0, none), (2, 2, 1, 0, 1, none), (3, 3, 1, 1, 0, none), (4, 4, 1, 1, 1, none)]
    assert [*tree.table(Sight(chunk=3))[0]] == [number for row in chunked for number in row]
    mask = tree.mask(FULL, torch.device("cpu"), torch.float32)
    assert (mask == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert (tree.mask(Sight(window=2), torch.device("cpu"), torch.float32) == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]
    assert tree.table(FULL) is tree.table(FULL), "once for all layers"
    assert tree.mask(FULL, torch.device("cpu"), torch.float32) is mask


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(700, 300), (40, 900), (1, 1)])
@pytest.mark.parametrize("sight", [FULL, Sight(window=150), Sight(chunk=200)])
def test_long_nodes_and_bfloat16(lengths: tuple[int, int], way: str, sight: Sight) -> None:
    """Sizes at which kernels work in several blocks; in bfloat16 as near as its rounding."""
    first, second = ([*range(n)] for n in lengths)
    layout = lay_out([[1000, *first], [1000, *first[: len(first) // 2], *(2000 + i for i in second)]], "tree")
    assert layout.nodes is not None
    tensors = inputs(layout.tokens)
    expected = slow(*tensors, layout, sight)
    exact = [expected, *torch.autograd.grad(expected.square().sum(), tensors)]
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
        with WAYS[way]():
            out = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING, sight)
            found = [out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))]
        for ours, wanted in zip(found, exact, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)
            elif wanted.norm() >= 1e-4:
                assert (ours.float() - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_that_learns_has_the_same_bits_as_one_that_does_not(way: str, dtype: torch.dtype) -> None:
    """Or the KL of an untrained policy would not be exactly 0."""
    layout = lay_out([[*range(150)], [*range(60), *range(200, 290)], [*range(60), 7]], "tree")
    assert layout.nodes is not None
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs(layout.tokens))
    with WAYS[way]():
        learning = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING)
        with torch.no_grad():
            reading = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING)
    assert torch.equal(learning, reading)


@pytest.mark.parametrize("way", WAYS)
def test_later_tokens_and_other_branches_change_nothing(way: str) -> None:
    layout = lay_out([[1, 2, 3], [1, 2, 4, 5], [9]], "tree")
    assert layout.nodes is not None
    query, key, value = (tensor.detach() for tensor in inputs(layout.tokens))
    at = layout.indices(1, 2, 1)[0]  # of 4, which only 4 and 5 see
    with WAYS[way]():
        before = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING)
        key[:, at], value[:, at] = 7.0, -7.0
        after = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), SCALING)
    changed = (before != after).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [at, layout.indices(1, 3, 1)[0]]
