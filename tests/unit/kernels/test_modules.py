"""Norms and gated MLPs with their own backward against the modules of transformers and their autograd; adapted linear
layers against the formula; which modules targets name.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import open_model, random_ids
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from perlhf.errors import AdapterError
from perlhf.kernels import cpu, modules
from perlhf.kernels.call import Call, calling
from perlhf.kernels.elementwise import rotated
from perlhf.kernels.modules import AdaptedLinear, SelfAttention, match_targets
from perlhf.method.lora import LowRank

SMALL = LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)


def norm() -> LlamaRMSNorm:
    found = LlamaRMSNorm(12)
    nn.init.normal_(found.weight)
    return found


def gradients(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of every parameter."""
    own = x.clone().requires_grad_()
    out = module(own)
    found = torch.autograd.grad(out, [own, *module.parameters()], grad)
    return [out, *found]


@pytest.fixture(autouse=True)
def torchs_operations() -> Iterator[None]:
    """Our own kernels have tests of their own (test_cpu.py)."""
    with cpu.off():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [norm, lambda: LlamaMLP(SMALL)])
def test_equals_the_slow_twin(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    slow = build().to(dtype)
    holder = nn.Sequential(copy.deepcopy(slow))
    assert modules.fuse(holder) == 1
    fast = holder[0]
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in slow.named_parameters()]
    x, grad = torch.randn(2, 2, 7, 12).to(dtype)
    pairs = zip(gradients(fast, x, grad), gradients(slow, x, grad), strict=True)
    (out, expected), *others = pairs
    assert torch.equal(out, expected), "bit for bit"
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for found, wanted in others:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_norm_by_hand() -> None:
    # x = (3, 4): mean square 12.5, r = 1 / sqrt(12.5); y = w x r.
    layer = modules.RmsNorm(nn.Parameter(torch.tensor([2.0, 1.0])), 0.0)
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    r = 1 / math.sqrt(12.5)
    y = layer(x)
    assert y.tolist() == pytest.approx([6 * r, 4 * r])
    # d y_0 / dx = 2 (r - 3 * 3 r^3 / 2, - 3 * 4 r^3 / 2) = 2 r (1 - 9 / 25, -12 / 25)
    y[0].backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx([2 * r * 16 / 25, -2 * r * 12 / 25])
    assert layer.weight.grad is not None and layer.weight.grad.tolist() == pytest.approx([3 * r, 0.0])


def test_what_computes_something_else_stays_as_it_is() -> None:
    class Shifted(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    relu = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, hidden_act="relu"))
    network = nn.Sequential(GemmaRMSNorm(12), Shifted(SMALL), relu, nn.LayerNorm(12))
    before = list(network)
    assert modules.fuse(network) == 0
    assert list(network) == before


def test_a_base_is_fused_and_gives_the_same_bits(tiny_base: Path) -> None:
    stock = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    ids = torch.tensor(random_ids([9, 9]))
    with torch.no_grad():
        expected = stock(ids).logits
        model = open_model(tiny_base)
        found = model.base(ids).logits
    kinds = [type(module) for module in model.base.modules()]
    layers = stock.config.num_hidden_layers
    assert kinds.count(modules.RmsNorm) == 2 * layers + 1 and kinds.count(modules.GatedMlp) == layers
    assert kinds.count(SelfAttention) == layers
    assert list(dict(model.base.named_parameters())) == list(dict(stock.named_parameters()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "replaced"),
    [("llama", True), ("qwen2", True), ("mistral", True), ("qwen3", False), ("stablelm", False), ("gpt_neox", False)],
)
def test_attention_of_other_networks(kind: str, replaced: bool) -> None:
    """Modules with norms of their own, or that turn a part of each head only, stay; outputs are the same bits."""
    sizes: dict[str, Any] = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4} | ({} if kind == "gpt_neox" else {"num_key_value_heads": 2})
    config: Any = CONFIG_MAPPING[kind](**sizes)
    config.sliding_window = None
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor(random_ids([9]))
    with torch.no_grad():
        expected = network(ids).logits
        modules.fuse(network)
        modules.fuse_attention(network)
        found = network(ids).logits
    assert (SelfAttention in [type(module) for module in network.modules()]) == replaced
    assert torch.equal(found, expected)


def test_rotation_by_hand() -> None:
    # One head of width 2 at a quarter turn: (1, 2) becomes (-2, 1); a gradient (5, 7) comes back as (7, -5).
    x = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    out = rotated(x, cos, sin)
    assert out.flatten().tolist() == [-2.0, 1.0]
    (grad,) = torch.autograd.grad(out, x, torch.tensor([[[[5.0, 7.0]]]]))
    assert grad.flatten().tolist() == [7.0, -5.0]


class TestAdaptedLinear:
    @pytest.fixture
    def layer(self) -> AdaptedLinear:
        torch.manual_seed(3)
        return AdaptedLinear(nn.Linear(4, 5).requires_grad_(False))

    @staticmethod
    def pair(seed: int, rank: int, scale: float, dropout: float = 0.0) -> LowRank:
        draw = torch.Generator().manual_seed(seed)
        a, b = torch.randn(rank, 4, generator=draw), torch.randn(5, rank, generator=draw)
        return LowRank(nn.Parameter(a), nn.Parameter(b), scale, dropout)

    @staticmethod
    def out(layer: AdaptedLinear, x: Tensor, *adapters: str, dropout: bool = False) -> Tensor:
        with calling(Call(adapters, dropout)):
            return layer(x)

    @staticmethod
    def formula(layer: AdaptedLinear, x: Tensor, *adapters: str, keep: Tensor | float = 1.0) -> Tensor:
        """y = x W^T + bias + sum of scale ((x * keep) A^T) B^T, left to autograd."""
        assert layer.bias is not None
        out = x @ layer.weight.T + layer.bias
        for name in adapters:
            pair = layer.pairs[name]
            out = out + pair.scale * ((x * keep) @ pair.a.T) @ pair.b.T
        return out

    def test_off_is_the_linear_layer_exactly(self, layer: AdaptedLinear) -> None:
        layer.pairs["a"] = self.pair(1, 2, 0.5)
        x = torch.randn(3, 4)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        out = self.out(layer, x, "somebody_else")
        assert torch.equal(out, nn.functional.linear(x, layer.weight, layer.bias))

    def test_several_adapters_add_up(self, layer: AdaptedLinear) -> None:
        layer.pairs |= {"a": self.pair(1, 2, 0.5), "b": self.pair(2, 3, 4.0), "idle": self.pair(3, 1, 9.0)}
        x = torch.randn(6, 4)
        out, expected = self.out(layer, x, "a", "b"), self.formula(layer, x, "a", "b")
        torch.testing.assert_close(out, expected)
        fast = torch.autograd.grad(out.square().sum(), [layer.pairs["a"].a, layer.pairs["b"].b])
        by_formula = torch.autograd.grad(expected.square().sum(), [layer.pairs["a"].a, layer.pairs["b"].b])
        torch.testing.assert_close(fast, by_formula, rtol=1e-4, atol=1e-4)

    def test_a_frozen_adapter_beneath_gets_no_gradient(self, layer: AdaptedLinear) -> None:
        layer.pairs |= {"below": self.pair(1, 2, 0.5), "above": self.pair(2, 2, 0.5)}
        layer.pairs["below"].a.requires_grad_(False)
        layer.pairs["below"].b.requires_grad_(False)
        self.out(layer, torch.randn(3, 4), "below", "above").sum().backward()
        assert layer.pairs["below"].a.grad is None and layer.pairs["below"].b.grad is None
        assert layer.pairs["above"].a.grad is not None

    def test_dropout_only_where_the_call_says_so(self, layer: AdaptedLinear) -> None:
        layer.pairs["a"] = self.pair(1, 2, 1.0, dropout=0.5)
        x = torch.randn(2000, 4)
        without = self.out(layer, x, "a")
        torch.testing.assert_close(without, self.formula(layer, x, "a"))
        torch.manual_seed(5)
        dropped = self.out(layer, x, "a", dropout=True)
        torch.manual_seed(5)
        keep = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
        assert set(keep.unique().tolist()) == {0.0, 2.0}
        torch.testing.assert_close(dropped, self.formula(layer, x, "a", keep=keep))
        assert not torch.allclose(dropped, without)

    def test_what_lies_beneath_is_never_dropped(self, layer: AdaptedLinear) -> None:
        # The adapter on top has no pair on this layer: the frozen one beneath is all there is, and stays whole.
        layer.pairs["sft"] = self.pair(1, 2, 1.0, dropout=0.5)
        x = torch.randn(50, 4)
        without = self.out(layer, x, "sft", "reward")
        torch.testing.assert_close(self.out(layer, x, "sft", "reward", dropout=True), without, rtol=0, atol=0)

    def test_computes_in_the_dtype_of_the_base_on_float32_masters(self, layer: AdaptedLinear) -> None:
        layer.to(torch.bfloat16)
        layer.pairs["a"] = self.pair(1, 2, 0.5)
        y = self.out(layer, torch.randn(3, 4, dtype=torch.bfloat16), "a")
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        gradient = layer.pairs["a"].a.grad
        assert gradient is not None and gradient.dtype == torch.float32

    def test_held_pairs_give_the_same_bits_on_the_layers_that_have_them(self, layer: AdaptedLinear) -> None:
        layer.pairs |= {"a": self.pair(1, 2, 0.5), "b": self.pair(2, 3, 4.0)}
        x = torch.randn(6, 4)
        for adapters in (("a",), ("a", "b"), ("somebody_else",), ()):
            with torch.no_grad():
                held = layer.hold(adapters)
                expected = self.out(layer, x, *adapters)
                with calling(Call(adapters, held={layer: held} if held else {})):
                    assert torch.equal(layer(x), expected)
            assert (held is None) == ("a" not in adapters)

    def test_adapters_are_no_parameters_of_the_base(self, layer: AdaptedLinear) -> None:
        layer.pairs["a"] = self.pair(1, 2, 0.5)
        assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]


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
