"""Families of transformers as bases: training and sampling compute what the plain network does, with the adapter merged
into its weights by hand.
"""

import copy
from typing import Any

import networks
import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from perlhf.method.packing import completed, pack
from perlhf.model.model import Model
from perlhf.rollout.local import Ends, sample

TREE = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3
    dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text glm glm4
    glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama
    llama4_text longcat_flash mellum minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi
    nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    solar_open starcoder2 vaultgemma youtu
""".split()
ROWS = """
    bailing_hybrid bamba bloom codegen diffllama doge falcon falcon_mamba gpt_neo gpt_neox_japanese gptj
    granitemoehybrid hrm_text inkling2_text inkling_text jamba lfm3 mamba mamba2 minimax mpt nemotron nemotron_h
    olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next rwkv stablelm xglm xlstm
""".split()
TEMPERATURE = 0.7


def ids(lengths: list[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(5, 270, (length,), generator=draw).tolist() for length in lengths]


LONG, SHORT, *ANSWERS = ids([14, 4, 7, 3, 9, 5])
PROMPTS = [LONG, LONG, SHORT, LONG[:9]]
WEIGHTS = torch.linspace(0.5, 1.5, sum(map(len, ANSWERS)))


def adapted(family: str) -> tuple[Model, PreTrainedModel]:
    """A base with a random adapter on all linear layers, and the plain network with its update in the weights."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    network = networks.network(family)
    merged: Any = copy.deepcopy(network)
    model = Model(network, {"name": family, "sha256": ""})
    model.add_adapter("policy", "policy", rank=4, targets="all")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.adapters["policy"].tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
        for path, pair in model.adapters["policy"].pairs.items():
            as_linear(merged, path, merged.get_parameter(path + ".weight")).add_(pair.scale * pair.b @ pair.a)
    own: Any = model.base.config._attn_implementation
    merged.set_attn_implementation("eager" if model.way.packing == "tree" else own)
    return model, merged.requires_grad_(True)


def as_linear(network: Any, path: str, tensor: Tensor) -> Tensor:
    """A layer's weight, or its gradient, as [out, in]: GPT-2 keeps it the other way round."""
    return tensor.t() if isinstance(network.get_submodule(path), Conv1D) else tensor


def of_answers(network: Any) -> Tensor:
    """Log-probabilities of all answers' tokens by plain passes, one after the other."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = network(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        found.append(torch.log_softmax(logits / TEMPERATURE, -1)[torch.arange(len(answer)), torch.tensor(answer)])
    return torch.cat(found)


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found - expected).norm()) <= tolerance * (float(expected.norm()) + 1e-4)


@pytest.mark.parametrize("family", [*TREE, *ROWS])
def test_a_family_is_what_it_is_without_us(family: str) -> None:
    model, merged = adapted(family)
    assert model.way.packing == ("tree" if family in TREE else "none"), model.way.why
    pairs = model.adapters["policy"].pairs
    expected = of_answers(merged)
    (expected * WEIGHTS).sum().backward()
    examples = [[completed(prompt, answer)] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    for packing in ("tree", "none") if family in TREE else ("none",):
        batch = pack(examples, packing)
        found = model.logprobs(batch, "policy", temperature=TEMPERATURE).logprobs[batch.completion_mask]
        assert float((found - expected).detach().abs().max()) < 1e-3
        a = [pair.a for pair in pairs.values()]
        grads = torch.autograd.grad((found * WEIGHTS).sum(), a, allow_unused=True)
        for (path, pair), grad in zip(pairs.items(), grads, strict=True):
            weight = merged.get_parameter(path + ".weight")
            grad_of_weight = torch.zeros_like(weight) if weight.grad is None else weight.grad
            wanted = pair.scale * pair.b.t() @ as_linear(merged, path, grad_of_weight)
            assert near(torch.zeros_like(pair.a) if grad is None else grad, wanted.detach(), 2e-3), path
    with torch.no_grad():
        check_sampling(model, merged)


def check_sampling(model: Model, merged: Any, tokens: int = 10) -> None:
    """Two greedy answers to prompts of three lengths, beside the likeliest tokens of plain passes."""
    prompts = [LONG, SHORT, LONG[:9]]
    draws = torch.zeros(2 * len(prompts), tokens, dtype=torch.float64)
    settings: Any = {"adapter": "policy", "ends": Ends(()), "temperature": 0.0, "max_completion_tokens": tokens}
    rollout = sample(model, prompts, draws=draws, **settings)
    for number, prompt in enumerate(prompts):
        whole = list(prompt)
        for _ in range(tokens):
            whole.append(int(merged(torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
        assert rollout.completions[2 * number : 2 * number + 2] == [whole[len(prompt) :]] * 2


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama4_text", "mamba", "qwen3_next"])
def test_in_bfloat16_both_ways_are_near(family: str) -> None:
    """Some networks keep their residuals in float32: heads are of the base's dtype all the same."""
    network = networks.network(family, size=1.0)
    plain = copy.deepcopy(network).requires_grad_(False)
    plain.set_attn_implementation("eager")
    model = Model(network.bfloat16(), {"name": family, "sha256": ""})
    batch = pack(
        [[completed(prompt, answer)] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)], model.packing("auto")
    )
    found = model.logprobs(batch, None, temperature=TEMPERATURE).logprobs[batch.completion_mask]
    assert float((found - of_answers(plain)).abs().max()) < 0.1
    draws = torch.zeros(2, 3, dtype=torch.float64)
    settings: Any = {"adapter": None, "ends": Ends(()), "temperature": 1.0, "max_completion_tokens": 3}
    assert sample(model, [LONG, SHORT], draws=draws, **settings).tokens == 6
