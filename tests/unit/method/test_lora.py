"""The low-rank update of a linear layer against autograd through the formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from perlhf.method.lora import LowRank, adapted_linear, dropout_keys, keyed_dropout, mean, new_pair, stacked


def slow(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """The formula of the paper, left to autograd."""
    y = x @ w.T + scale * ((x if keep is None else x * keep) @ a.T) @ b.T
    return y if bias is None else y + bias


def operands(shape: tuple[int, ...], inputs: int, outputs: int, rank: int, dtype: torch.dtype, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((*shape, inputs), (outputs, inputs), (outputs,), (rank, inputs), (outputs, rank))
    return [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


@given(
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=2).map(tuple),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    rank=st.integers(1, 4),
    with_bias=st.booleans(),
    drop=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_value_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], inputs: int, outputs: int, rank: int, with_bias: bool, drop: bool, dtype: torch.dtype
) -> None:
    x, w, bias, a, b = operands(shape, inputs, outputs, rank, dtype)
    scale = 2.5
    keep = (torch.arange(x.numel()) % 2).view(x.shape).to(dtype) * 2 if drop else None
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        own_bias = bias if with_bias else None
        if fused:
            y = adapted_linear(leaves[0], w, own_bias, leaves[1], leaves[2] * scale, keep)
        else:
            y = slow(leaves[0], w, own_bias, leaves[1], leaves[2], keep, scale)
        # a gradient that differs at every output
        (y * torch.arange(1, y.numel() + 1).view(y.shape).to(dtype)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for fast, expected in zip(*results, strict=True):
        torch.testing.assert_close(fast, expected, rtol=tolerance, atol=tolerance * 10)


def test_by_hand() -> None:
    # x W^T = 1*3 + 2*4 = 11; x A^T = 1*1 + 2*-1 = -1; times B = 5 -> -5; bias 0.5: 6.5
    x, w, a = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -1.0]])
    y = adapted_linear(x, w, torch.tensor([0.5]), a, torch.tensor([[5.0]]))
    assert y.tolist() == [[6.5]]
    y.backward()
    # W + B A = [3 + 5, 4 - 5]
    assert x.grad is not None and x.grad.tolist() == [[8.0, -1.0]]


@pytest.mark.parametrize("with_keep", [False, True])
def test_gradcheck(with_keep: bool) -> None:
    x, w, bias, a, b = operands((2, 3), 4, 5, 2, torch.float64)
    keep = torch.bernoulli(torch.full_like(x, 0.5)) * 2 if with_keep else None
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, w, bias, a, b, keep), (x, a, b))


def test_no_gradient_for_the_frozen_weight_even_if_it_asks() -> None:
    x, w, bias, a, b = (tensor.requires_grad_() for tensor in operands((3,), 4, 5, 2, torch.float32))
    adapted_linear(x, w, bias, a, b).sum().backward()
    assert w.grad is None and bias.grad is None
    assert all(t.grad is not None and t.grad.any() for t in (x, a, b))


def test_gradients_only_where_needed() -> None:
    """Below the first adapter there is no graph: x needs no gradient and gets none."""
    x, w, _, a, b = operands((3,), 4, 5, 2, torch.float32)
    adapted_linear(x, w, None, a.requires_grad_(), b).sum().backward()
    assert x.grad is None and b.grad is None and a.grad is not None


def test_keeps_a_non_contiguous_input_right() -> None:
    x, w, _, a, b = operands((3, 2), 4, 5, 2, torch.float64)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(adapted_linear(turned, w, None, a, b), slow(turned, w, None, a, b, None, 1.0))


def three_pairs() -> list[LowRank]:
    """Of rank 1: scales 2, 3 and 4."""
    rows = [([1.0, 1.0], [1.0, 0.0], 2.0), ([1.0, 0.0], [0.0, 1.0], 3.0), ([0.0, 1.0], [1.0, 1.0], 4.0)]
    return [LowRank(nn.Parameter(torch.tensor([a])), nn.Parameter(torch.tensor([b]).T), s, 0.1) for a, b, s in rows]


def test_stacked_by_hand() -> None:
    """2 [1 0]' [1 1] + 3 [0 1]' [1 0] + 4 [1 1]' [0 1] = [[2, 6], [3, 4]]."""
    pair = stacked(three_pairs())
    assert (pair.a.shape, pair.b.shape, pair.scale, pair.dropout) == ((3, 2), (2, 3), 1.0, 0.0)
    assert (pair.b @ pair.a).tolist() == [[2.0, 6.0], [3.0, 4.0]]


def test_mean_by_hand() -> None:
    """A third of the sum, as one pair of rank 3."""
    pair = mean(three_pairs())
    assert (pair.a.shape, pair.b.shape, pair.scale, pair.dropout) == ((3, 2), (2, 3), 1.0, 0.0)
    torch.testing.assert_close(pair.b @ pair.a, torch.tensor([[2.0, 6.0], [3.0, 4.0]]) / 3)
    assert pair.a.requires_grad and pair.a.is_leaf


def test_new_pair_is_a_zero_update() -> None:
    pair = new_pair(3, 16, 4, 10.0, 0.1, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert pair.scale == 2.5 and pair.dropout == 0.1
    assert pair.a.shape == (4, 16) and pair.b.shape == (3, 4)
    assert not pair.b.any()
    # uniform in +-1/sqrt(16), so nearly 1/4 somewhere among 64 numbers, of both signs
    assert 0.22 < pair.a.abs().max() <= 0.25 and pair.a.min() < 0 < pair.a.max()
    again = new_pair(3, 16, 4, 10.0, 0.1, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(pair.a, again.a)
    assert pair.a.dtype == pair.b.dtype == torch.float32
    assert math.isclose(pair.a.std().item(), 0.25 / math.sqrt(3), rel_tol=0.3)


class TestKeyedDropout:
    """What is dropped is a function of the tokens, whoever computes them and beside which others."""

    def test_equal_beginnings_have_equal_keys_in_any_layout(self) -> None:
        # 5 6 7 and 5 6 8 as a tree, as padded rows, and 5 6 8 alone
        tree = dropout_keys(torch.tensor([[5, 6, 8, 7]]), [[0, 1, 3], [0, 1, 2]], 3)[0].tolist()
        rows = dropout_keys(torch.tensor([[5, 6, 7], [5, 6, 8]]), [[0, 1, 2], [3, 4, 5]], 3).tolist()
        alone = dropout_keys(torch.tensor([[5, 6, 8]]), [[0, 1, 2]], 3)[0].tolist()
        assert rows == [[tree[0], tree[1], tree[3]], [tree[0], tree[1], tree[2]]]
        assert alone == rows[1]
        assert len({*tree, *dropout_keys(torch.tensor([[5, 6, 8, 7]]), [[0, 1, 3], [0, 1, 2]], 4)[0].tolist()}) == 8
        assert dropout_keys(torch.tensor([[6, 5]]), [[0, 1]], 3)[0, 1] != tree[1], "the order counts"

    @pytest.mark.parametrize("dropout", [0.1, 0.5])
    def test_masks_are_as_many_and_as_independent_as_drawn_ones(self, dropout: float) -> None:
        ids = torch.arange(400)[None] % 7  # few different tokens
        keys = dropout_keys(ids, [list(range(400))], 11)[0]
        masks = torch.stack([keyed_dropout(keys, layer, 250, dropout) for layer in (3, 4, 2**31 - 1)])
        assert set(masks.unique().tolist()) == {0.0, torch.tensor(1 / (1 - dropout)).item()}
        dropped = (masks == 0).double()
        deviation = (dropout * (1 - dropout)) ** 0.5
        # five standard errors: of all, of each row and column, of products of neighbours in each direction
        assert abs(dropped.mean() - dropout) < 5 * deviation / dropped.numel() ** 0.5
        for along, count in ((1, 400), (2, 250)):
            assert (dropped.mean(along) - dropout).abs().max() < 5 * deviation / count**0.5
        centred = dropped - dropout
        pairs = [centred[:, 1:] * centred[:, :-1], centred[..., 1:] * centred[..., :-1], centred[1:] * centred[:-1]]
        pairs.append(centred[:, 1:, 1:] * centred[:, :-1, :-1] * centred[:, 1:, :-1] * centred[:, :-1, 1:])
        for product in pairs:
            assert abs(product.mean()) < 5 * product.std() / product.numel() ** 0.5
