"""Attention by blocks, as a GPU computes it: step by step on a CPU, against softmax over each sequence alone."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torchs
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental import _config

from perlhf.kernels.attention import flex
from perlhf.kernels.attention.flex import BLOCK, Blocks, numbered, pairs_of_blocks
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.kernels.attention.tree_attention import Tree, tree_attention
from perlhf.method.packing import Layout, Node, lay_out

SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=5)
SIGHTS = st.sampled_from([FULL, Sight(window=1), Sight(window=3), Sight(chunk=4)])
CPU = torch.device("cpu")
TREES = ((460, 0), (300, 3), (500, 2), (130, 1), (20, 5), (0, 4))
"""Tokens that branches share, and how many there are. The first has as many blocks as the test has heads."""


def nodes_of(layout: Layout) -> tuple[Node, ...]:
    assert layout.nodes is not None
    return layout.nodes


@pytest.fixture
def _gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch computes them step by step on a CPU, too, and refuses to because it has no kernel for them there."""
    monkeypatch.setattr(torchs, "_validate_device", lambda *given: None)
    settings: Any = _config
    torch._dynamo.reset()
    with settings.patch(use_duck_shape=True):  # as it is, and becomes again
        yield
    torch._dynamo.reset()


@given(SEQUENCES, SIGHTS)
def test_who_sees_whom(sequences: list[list[int]], sight: Sight) -> None:
    layout = lay_out(sequences, "tree")
    tree = Tree(nodes_of(layout))
    expected = tree.mask(sight, CPU, torch.float32) == 0
    sees = tree.blocks(sight, CPU).mask.mask_mod
    at = torch.arange(layout.tokens)
    none = torch.zeros((), dtype=torch.long)
    assert torch.equal(sees(none, none, at[:, None], at[None]), expected)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 300)), min_size=1, max_size=5), SIGHTS)
def test_blocks_that_hold_anything(shapes: list[tuple[int, int]], sight: Sight) -> None:
    sight = Sight(sight.window and sight.window * 50, sight.chunk and sight.chunk * 30)
    layout = lay_out([[0] * (shared * 60) + [number + 1] * own for number, (shared, own) in enumerate(shapes)], "tree")
    tokens = layout.tokens + -layout.tokens % BLOCK
    count = tokens // BLOCK
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    allowed[: layout.tokens, : layout.tokens] = Tree(nodes_of(layout)).mask(sight, CPU, torch.float32) == 0
    by_block = allowed.view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)
    seen, whole = pairs_of_blocks(nodes_of(layout), sight, count)
    assert not (by_block.any(-1).numpy() & ~seen).any(), "nothing that somebody sees is left out"
    assert not (whole & ~by_block.all(-1).numpy()).any(), "what is taken whole is seen whole"
    if sight == FULL:
        # Blocks on the diagonal are always computed; whole ones are those below it that are seen whole.
        assert np.array_equal(seen, by_block.any(-1).numpy() | np.eye(count, dtype=bool))
        assert np.array_equal(whole, by_block.all(-1).numpy())


def test_numbers_by_hand() -> None:
    # `abc`, `ax` and `abcd`: laid out are `ax`, and `bcd` that branches off after a.
    layout = lay_out([[1, 2, 3], [1, 9], [1, 2, 3, 4]], "tree")
    first, last, depth = numbered(nodes_of(layout), layout.tokens + 1)
    by_path = {tuple(layout.indices(i, 0, layout.tokens)): i for i in range(3)}
    (a, b, c), (_, x), (*_, d) = by_path
    assert [first[t] for t in (a, b, c, d, x)] == [0, 2, 3, 4, 1]
    assert [last[t] for t in (a, b, c, d, x)] == [5, 5, 5, 5, 2]
    assert [depth[t] for t in (a, b, c, d, x)] == [0, 1, 2, 3, 1]
    assert (first[-1], last[-1]) == (5, 6), "what fills the block sees itself alone"


@pytest.mark.usefixtures("_gradients")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
@pytest.mark.parametrize("sight", [FULL, Sight(window=40), Sight(chunk=64)])
@pytest.mark.parametrize("bent", [False, True])
def test_values_and_gradients_are_those_under_a_mask(sight: Sight, bent: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = lay_out([[0] * 140 + [1] * 50, [0] * 60 + [2] * 90, [0] * 140 + [3] * 20, [4] * 30], "tree")
    query, key, value = (
        torch.randn(heads, layout.tokens, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    cap, sinks = (5.0, torch.randn(4, generator=generator).requires_grad_()) if bent else (None, None)
    learned = [query, key, value, *([sinks] if sinks is not None else [])]
    tree, weight = Tree(nodes_of(layout)), torch.randn(4, layout.tokens, 16, generator=generator)
    expected = tree_attention(query, key, value, tree, 0.3, sight, cap, sinks)
    found = flex.attention(query, key, value, Blocks(tree.nodes, sight, CPU), 0.3, cap, sinks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for by_flex, by_mask in zip(
        torch.autograd.grad((found * weight).sum(), learned),
        torch.autograd.grad((expected * weight).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(by_flex, by_mask, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_gradients")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("bent", [False, True])
def test_it_is_compiled_for_forms_and_not_for_trees(monkeypatch: pytest.MonkeyPatch, bent: bool) -> None:
    """torch's tracer decides what is compiled anew, on a CPU as on a GPU: graphs are counted and run step by step."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    generator, by_sight = torch.Generator().manual_seed(0), []
    compiled = flex.compiled(count)
    monkeypatch.setattr(flex, "_flex", lambda device: compiled)
    for sight in (FULL, Sight(window=40), Sight(chunk=64)):
        for shared, branches in TREES:
            sequences = [[0] * shared, *([0] * shared + [at] * (60 * at) for at in range(1, branches + 1))]
            layout = lay_out([sequence for sequence in sequences if sequence], "tree")
            drawn = (torch.randn(heads, layout.tokens, 16, generator=generator) for heads in (4, 2, 2))
            query, key, value = (each.requires_grad_() for each in drawn)
            cap, sinks = (5.0, torch.randn(4, generator=generator)) if bent else (None, None)
            given = Blocks(nodes_of(layout), sight, CPU), 0.3, cap, sinks
            found = flex.attention(query, key, value, *given)
            expected = tree_attention(query, key, value, Tree(nodes_of(layout)), 0.3, sight, cap, sinks)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                flex.attention(query, key, value, *given)
        by_sight.append(len(graphs))
    # With gradients and without; of all that is seen, and of a part, a window or a chunk.
    assert by_sight == [2, 4, 4]


def test_nobody_takes_it_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flex.VARIABLE, "flex")
    assert not flex.usable(torch.zeros(1, 2 * flex.MIN_TOKENS, 8)), "not on a CPU"
    monkeypatch.delenv(flex.VARIABLE)
    assert not flex.usable(torch.zeros(1, 2 * flex.MIN_TOKENS, 8, device="meta"))
