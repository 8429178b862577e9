"""Norms and gated MLPs with their own backward against the modules of transformers and their autograd."""

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

from perlhf.kernels import cpu, modules
from perlhf.kernels.modules import SelfAttention, rotated

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
    """Our own kernels have tests of their own (test_native.py)."""
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
