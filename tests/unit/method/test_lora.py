"""The adapted linear layer against autograd through the formula; which modules targets name."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from perlhf.errors import AdapterError
from perlhf.kernels.modules import AdaptedLinear, match_targets
from perlhf.method.lora import LowRank, adapted_linear, mean, new_pair, stacked


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


class TestLayer:
    @pytest.fixture
    def layer(self) -> AdaptedLinear:
        torch.manual_seed(3)
        return AdaptedLinear(nn.Linear(4, 5).requires_grad_(False))

    @staticmethod
    def pair(seed: int, rank: int, scale: float, dropout: float = 0.0) -> LowRank:
        _, _, _, a, b = operands((), 4, 5, rank, torch.float32, seed)
        return LowRank(nn.Parameter(a), nn.Parameter(b), scale, dropout)

    def test_off_is_the_linear_layer_exactly(self, layer: AdaptedLinear) -> None:
        layer.pairs["a"] = self.pair(1, 2, 0.5)
        x = torch.randn(3, 4)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.active = ("somebody_else",)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    def test_several_adapters_add_up(self, layer: AdaptedLinear) -> None:
        layer.pairs |= {"a": self.pair(1, 2, 0.5), "b": self.pair(2, 3, 4.0), "idle": self.pair(3, 1, 9.0)}
        layer.active = ("a", "b")
        x = torch.randn(6, 4)
        assert layer.bias is not None
        expected = x @ layer.weight.T + layer.bias
        for name in ("a", "b"):
            pair = layer.pairs[name]
            expected = expected + pair.scale * (x @ pair.a.T) @ pair.b.T
        torch.testing.assert_close(layer(x), expected)
        fast = torch.autograd.grad(layer(x).square().sum(), [layer.pairs["a"].a, layer.pairs["b"].b])
        by_formula = torch.autograd.grad(expected.square().sum(), [layer.pairs["a"].a, layer.pairs["b"].b])
        torch.testing.assert_close(fast, by_formula, rtol=1e-4, atol=1e-4)

    def test_a_frozen_adapter_beneath_gets_no_gradient(self, layer: AdaptedLinear) -> None:
        layer.pairs |= {"below": self.pair(1, 2, 0.5), "above": self.pair(2, 2, 0.5)}
        layer.pairs["below"].a.requires_grad_(False)
        layer.pairs["below"].b.requires_grad_(False)
        layer.active = ("below", "above")
        layer(torch.randn(3, 4)).sum().backward()
        assert layer.pairs["below"].a.grad is None and layer.pairs["below"].b.grad is None
        assert layer.pairs["above"].a.grad is not None

    def test_dropout_only_in_training(self, layer: AdaptedLinear) -> None:
        layer.pairs["a"] = self.pair(1, 2, 1.0, dropout=0.5)
        layer.active = ("a",)
        pair, x = layer.pairs["a"], torch.randn(2000, 4)
        layer.eval()
        without = layer(x)
        torch.testing.assert_close(without, slow(x, layer.weight, layer.bias, pair.a, pair.b, None, 1.0))
        layer.train()
        torch.manual_seed(5)
        dropped = layer(x)
        torch.manual_seed(5)
        keep = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
        assert set(keep.unique().tolist()) == {0.0, 2.0}
        torch.testing.assert_close(dropped, slow(x, layer.weight, layer.bias, pair.a, pair.b, keep, 1.0))
        assert not torch.allclose(dropped, without)

    def test_what_lies_beneath_is_never_dropped(self, layer: AdaptedLinear) -> None:
        # The adapter on top has no pair on this layer: the frozen one beneath is all there is, and stays whole.
        layer.pairs["sft"] = self.pair(1, 2, 1.0, dropout=0.5)
        layer.active, x = ("sft", "reward"), torch.randn(50, 4)
        without = layer.eval()(x)
        torch.testing.assert_close(layer.train()(x), without, rtol=0, atol=0)

    def test_computes_in_the_dtype_of_the_base_on_float32_masters(self, layer: AdaptedLinear) -> None:
        layer.to(torch.bfloat16)
        layer.pairs["a"] = self.pair(1, 2, 0.5)
        layer.active = ("a",)
        y = layer(torch.randn(3, 4, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        gradient = layer.pairs["a"].a.grad
        assert gradient is not None and gradient.dtype == torch.float32

    def test_adapters_are_no_parameters_of_the_base(self, layer: AdaptedLinear) -> None:
        layer.pairs["a"] = self.pair(1, 2, 0.5)
        assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]


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
    layer = AdaptedLinear(nn.Linear(16, 3))
    pair = new_pair(layer.weight, 4, 10.0, 0.1, torch.Generator().manual_seed(0))
    assert pair.scale == 2.5 and pair.dropout == 0.1
    assert pair.a.shape == (4, 16) and pair.b.shape == (3, 4)
    assert not pair.b.any()
    # uniform in +-1/sqrt(16), so nearly 1/4 somewhere among 64 numbers, of both signs
    assert 0.22 < pair.a.abs().max() <= 0.25 and pair.a.min() < 0 < pair.a.max()
    again = new_pair(layer.weight, 4, 10.0, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(pair.a, again.a)
    assert pair.a.dtype == pair.b.dtype == torch.float32
    assert math.isclose(pair.a.std().item(), 0.25 / math.sqrt(3), rel_tol=0.3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "act": nn.ReLU()})


class TestTargets:
    ALL = tuple(f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))

    @pytest.fixture
    def network(self) -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "lm_head": nn.Linear(2, 7)})

    def test_presets(self, network: nn.Module) -> None:
        found = match_targets(network.named_modules(), "attention")
        assert found == [path for path in self.ALL if "attn" in path]
        assert match_targets(network.named_modules(), "all", skip=("lm_head",)) == list(self.ALL)
        assert match_targets(network.named_modules(), "all") == [*self.ALL, "lm_head"]

    def test_names_are_ends_of_paths(self, network: nn.Module) -> None:
        assert match_targets(network.named_modules(), ("up_proj", "layers.1.self_attn.q_proj")) == [
            "layers.0.mlp.up_proj",
            "layers.1.self_attn.q_proj",
            "layers.1.mlp.up_proj",
        ]
        assert match_targets(network.named_modules(), "o_proj") == [path for path in self.ALL if "o_proj" in path]

    def test_layers_that_are_adapted_already_match_too(self, network: nn.Module) -> None:
        attention = network.get_submodule("layers.0.self_attn")
        attention["q_proj"] = AdaptedLinear(attention["q_proj"])  # pyright: ignore[reportIndexIssue]
        assert match_targets(network.named_modules(), ("q_proj",)) == [p for p in self.ALL if "q_proj" in p]

    def test_a_name_that_matches_nothing(self, network: nn.Module) -> None:
        with pytest.raises(AdapterError) as caught:
            match_targets(network.named_modules(), ("q_proj", "u_proj"), skip=("lm_head",))
        message = str(caught.value)
        assert "'u_proj'" in message and "adapter.targets" in message and "try: up_proj" in message
        assert "o_proj, q_proj, up_proj" in message and "lm_head" not in message

    def test_part_of_a_name_is_no_match(self, network: nn.Module) -> None:
        with pytest.raises(AdapterError):
            match_targets(network.named_modules(), ("proj",))

    def test_a_base_without_such_layers(self) -> None:
        def modules() -> Iterator[tuple[str, nn.Module]]:
            yield "conv", nn.Conv1d(1, 1, 1)

        with pytest.raises(AdapterError, match="match no linear layer"):
            match_targets(modules(), "attention")
