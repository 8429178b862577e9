"""Attention over a tree against softmax computed token by token: values and gradients, on trees of random shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perlhf import attention
from perlhf.packing import Layout, lay_out

SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=5)
SCALING = 0.3


def slow(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """[heads, tokens, width], each token's softmax written out over the tokens before it in its sequence."""
    share = len(query) // len(key)
    rows: dict[int, Tensor] = {}
    for i in range(len(layout.spans)):
        path = layout.indices(i, 0, layout.tokens)
        for position, at in enumerate(path):
            seen = path[: position + 1]
            heads = []
            for head in range(len(query)):
                p = torch.softmax(SCALING * (key[head // share, seen] @ query[head, at]), 0)
                heads.append(p @ value[head // share, seen])
            rows[at] = torch.stack(heads)
    return torch.stack([rows[at] for at in range(layout.tokens)], 1)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [4, tokens, 8], key and value [2, tokens, 8]: two heads share keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, tokens, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    return query, key, value


@pytest.mark.parametrize("block", [1, 2, 3, 128])
@given(sequences=SEQUENCES)
def test_equals_the_slow_twin(block: int, sequences: list[list[int]]) -> None:
    layout = lay_out(sequences, "tree")
    assert layout.nodes is not None
    tensors = query, key, value = inputs(layout.tokens)
    expected = slow(query, key, value, layout)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        found = attention.tree_attention(query, key, value, layout.nodes, SCALING)
        grads = torch.autograd.grad((found * weight).sum(), tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


def test_by_hand() -> None:
    # One head of width 1, scaling 1. Token 1 sees keys 0 and ln 3 with query 1: weights 1/4 and 3/4 of values 4 and 8.
    layout = lay_out([[1, 2]], "tree")
    assert layout.nodes is not None
    query, key, value = (torch.tensor(x).view(1, 2, 1) for x in ([1.0, 1.0], [0.0, 1.0986123], [4.0, 8.0]))
    found = attention.tree_attention(query, key, value, layout.nodes, 1.0)
    assert found.flatten().tolist() == pytest.approx([4.0, 7.0])


def test_a_node_longer_than_a_block_is_read_without_a_copy() -> None:
    layout = lay_out([list(range(300))], "tree")
    assert layout.nodes is not None
    key = torch.zeros(2, 300, 8)
    blocks = attention._cut(layout.nodes, 128)
    assert [(block.start, block.length, block.prefix) for block in blocks] == [
        (0, 128, ()),
        (128, 128, ((0, 128),)),
        (256, 44, ((0, 256),)),
    ]
    for block in blocks:
        path = attention._path(key, block)
        assert path.data_ptr() == key.data_ptr() and path.shape[1] == block.start + block.length


def test_later_tokens_and_other_branches_change_nothing() -> None:
    layout = lay_out([[1, 2, 3], [1, 2, 4, 5], [9]], "tree")
    assert layout.nodes is not None
    query, key, value = (tensor.detach() for tensor in inputs(layout.tokens))
    before = attention.tree_attention(query, key, value, layout.nodes, SCALING)
    at = layout.index(1, 2)  # of 4, which only 4 and 5 see
    key[:, at], value[:, at] = 7.0, -7.0
    after = attention.tree_attention(query, key, value, layout.nodes, SCALING)
    changed = (before != after).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [at, layout.index(1, 3)]
