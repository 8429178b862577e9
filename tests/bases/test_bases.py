"""Families of transformers as bases: training and sampling compute what the plain network does, with the adapter merged
into its weights by hand.
"""

import copy
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import networks
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from perlhf.config.stages import SftConfig
from perlhf.kernels.modules import is_transposed, update_of
from perlhf.method.packing import completed, pack
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_base
from perlhf.model.bases.packaged import quiet
from perlhf.model.foretold.memory import keep_or_recompute
from perlhf.model.model import Model
from perlhf.model.supported import network_below
from perlhf.rollout.ensemble import in_one_pass, member_scores, shares_trunk
from perlhf.rollout.local import Ends, sample
from perlhf.rollout.rows import Groups, Rows, Under, Wish

TEMPERATURE = 0.7
ROOT = Path(__file__).resolve().parents[2]
reference = runpy.run_path(str(ROOT / "scripts/generate_bases_reference.py"))
SAID = reference["layers_said"]((ROOT / "docs/bases.md").read_text("utf-8"))
"""Which layers of each family the page says are adapted."""


def ids(lengths: list[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(5, 270, (length,), generator=draw).tolist() for length in lengths]


NO_LIST = ("blt", "hrm_text", "longcat_flash")
"""Families whose layers aren't in one list."""
LONG, SHORT, *ANSWERS = ids([14, 4, 7, 3, 9, 5])
NAMES = ("one", "two")
PROMPTS = [LONG, LONG, SHORT, LONG[:9]]
WEIGHTS = torch.linspace(0.5, 1.5, sum(map(len, ANSWERS)))


def adapted(network: PreTrainedModel) -> tuple[Model, PreTrainedModel]:
    """A base with random adapters on all linear layers, and the plain network with their update in the weights."""
    merged: Any = copy.deepcopy(network)
    model = Model(network, {"name": type(network).__name__, "sha256": "0" * 64})
    policy = model.add_adapter("policy", "policy", rank=4, targets="all")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in policy.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
        reward = model.copy_adapter("policy", "reward", "reward")
        assert reward.score_head is not None and reward.bias is not None
        reward.score_head.copy_(torch.randn(reward.score_head.shape, generator=draw))
        reward.bias.fill_(0.25)
        for path, pair in policy.pairs.items():
            merged.get_parameter(path + ".weight").add_(update_of(model.base.get_submodule(path), pair))
    own: Any = model.base.config._attn_implementation
    merged.set_attn_implementation("eager" if model.way.packing == "tree" else own)
    return model, merged.requires_grad_(True)


def of_answers(network: Any) -> Tensor:
    """Log-probabilities of all answers' tokens by plain passes, one after the other."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = network(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        found.append(torch.log_softmax(logits / TEMPERATURE, -1)[torch.arange(len(answer)), torch.tensor(answer)])
    return torch.cat(found)


def last_states(network: Any) -> Tensor:
    """What a score is read from, by plain passes."""
    below, rows = network_below(network), [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return torch.stack([below(torch.tensor([row]), use_cache=False).last_hidden_state[0, -1] for row in rows])


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found - expected).norm()) <= tolerance * (float(expected.norm()) + 1e-4)


@pytest.mark.parametrize("family", [*families.TREE, *families.ROWS])
def test_a_family_is_what_it_is_without_us(family: str, tmp_path: Path) -> None:
    model, merged = adapted(networks.network(family))
    assert (model.way.packing, model.way.why) == (
        ("tree", "") if family in families.TREE else ("none", families.ROWS[family])
    )
    check(model, merged)
    check_saved(model, merged, tmp_path)
    check_generated(model, merged, use_cache=family not in families.CACHE_OFF)
    assert reference["layers_of"](model) == SAID[family], "make docs"


@pytest.mark.parametrize("family", [*families.TREE, *families.ROWS])
def test_layers_that_are_recomputed_give_the_same_bits(family: str) -> None:
    """Log-probabilities and gradients; and what a step takes can be told of each family that has a list of layers."""
    model, _ = adapted(networks.network(family))
    batch = pack([[completed(p, c)] for p, c in zip(PROMPTS, ANSWERS, strict=True)], model.packing("auto"))
    learned = model.adapters["policy"].trainable()

    def passed() -> list[Tensor]:
        logprobs = model.logprobs(batch, "policy").logprobs
        gradients = torch.autograd.grad(logprobs.square().sum(), learned, allow_unused=True)
        return [logprobs.detach(), *(each for each in gradients if each is not None)]

    kept = passed()
    told = keep_or_recompute(SftConfig(recompute="auto", dtype="float32", device="cpu"), model)
    assert ("step_bytes" in told) == (family not in NO_LIST)
    assert model.recompute_layers() == (family not in NO_LIST)
    assert all(torch.equal(one, other) for one, other in zip(kept, passed(), strict=True))


def test_attention_is_found_whatever_its_module_is_called() -> None:
    model, _ = adapted(networks.network("nemotron_h"))
    names = {path.rpartition(".")[2] for path in model.targets("attention")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}  # the last two of shared experts


@pytest.mark.parametrize(("family", "apart"), [("phi4_multimodal", "embed_tokens_extend"), ("git", "image_encoder")])
def test_what_text_never_reaches_is_not_adapted(family: str, apart: str) -> None:
    model, _ = adapted(networks.network(family))
    linear = [path for path, module in model.base.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any(apart in path for path in linear)
    assert not any(apart in path for path in model.targets("all"))


@pytest.mark.parametrize("variant", networks.VARIANTS)
def test_a_variant_is_what_it_is_without_us(variant: str) -> None:
    """Settings that real checkpoints of the main families have."""
    family, _, changes = networks.VARIANTS[variant]
    model, merged = adapted(networks.network(family, **changes))
    rows = family in families.ROWS and variant != "llama4 untempered"
    assert model.way.packing == ("none" if rows else "tree"), model.way.why
    check(model, merged)


def check(model: Model, merged: Any) -> None:
    """Scores, log-probabilities, gradients and sampled tokens, by all ways of the base."""
    pairs, reward = model.adapters["policy"].pairs, model.adapters["reward"]
    expected = of_answers(merged)
    (expected * WEIGHTS).sum().backward()
    with torch.no_grad():
        assert reward.score_head is not None and reward.bias is not None
        scores = last_states(merged).float() @ reward.score_head[0] + reward.bias
    examples = [[completed(prompt, answer)] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    for packing in ("tree", "none") if model.way.packing == "tree" else ("none",):
        batch = pack(examples, packing)
        found = model.logprobs(batch, "policy", temperature=TEMPERATURE).logprobs[batch.completion_mask]
        assert float((found - expected).detach().abs().max()) < 1e-3
        tensors = [tensor for pair in pairs.values() for tensor in (pair.a, pair.b)]
        grads = iter(torch.autograd.grad((found * WEIGHTS).sum(), tensors, allow_unused=True))
        for path, pair in pairs.items():
            weight = merged.get_parameter(path + ".weight")
            wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
            wanted = wanted.t() if is_transposed(model.base.get_submodule(path)) else wanted
            by_hand = pair.scale * pair.b.t() @ wanted, pair.scale * wanted @ pair.a.t()
            for tensor, hand in zip((pair.a, pair.b), by_hand, strict=True):
                grad = next(grads)
                assert near(torch.zeros_like(tensor) if grad is None else grad, hand.detach(), 2e-3), path
        with torch.no_grad():
            assert near(model.scores(batch, "reward"), scores, 1e-3)
    with torch.no_grad():
        check_sampling(model, merged)


@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gemma2", "gpt2", "gpt_oss", "llama4_text", "mamba", "qwen3_next"])
def test_several_adapters_in_one_pass(family: str, layers: str) -> None:
    model = Model(networks.network(family, size=1.0), {"name": family, "sha256": "0" * 64})
    for number, name in enumerate(NAMES):
        adapter = model.add_adapter(name, "reward", rank=2, targets="all", layers=layers)
        draw = torch.Generator().manual_seed(number)
        for tensor in adapter.tensors().values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
    batch = pack([[completed(p, c)] for p, c in zip(PROMPTS, ANSWERS, strict=True)], model.packing("auto"))
    assert in_one_pass(model, sorted(model.adapters[NAMES[0]].pairs))
    assert shares_trunk(model, NAMES, model.packing("auto")) == (model.way.packing == "tree" and layers == "last:1")
    with torch.no_grad():
        assert near(member_scores(model, batch, NAMES), torch.stack([model.scores(batch, n) for n in NAMES]), 1e-3)


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
    check_served(model, prompts, rollout.completions[::2], tokens)


def check_served(model: Model, prompts: Sequence[Sequence[int]], expected: Sequence[list[int]], tokens: int) -> None:
    """The same greedy answers of rows that come one after the other, beside one of the bare base where that may be."""
    rows: Rows | Groups = Rows(model, 1000, pass_tokens=7) if model.way.packing == "tree" else Groups(model, 8)
    under, greedy = Under("policy", model.hold("policy")), Wish(temperature=0.0)
    if isinstance(rows, Rows):
        rows.join(prompts[0], [np.random.default_rng()], tokens, Under("base", model.hold(None)), greedy)
    joined = [rows.join(prompt, [np.random.default_rng()], tokens, under, greedy) for prompt in prompts]
    while len(rows):
        for token in rows.step():
            if len(token.row.ids) == tokens:
                rows.leave(token.row)
    assert [own[0].ids for own in joined if own is not None] == list(expected)


@torch.no_grad()
def check_generated(model: Model, merged: Any, tokens: int = 8, **given: Any) -> None:
    """Greedy answers are those of transformers' `generate`."""
    draws = torch.zeros(1, tokens, dtype=torch.float64)
    settings: Any = {"adapter": "policy", "ends": Ends(()), "temperature": 0.0, "max_completion_tokens": tokens}
    given |= {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "eos_token_id": None}
    for prompt in (LONG, SHORT):
        ids = torch.tensor([prompt])
        found = merged.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **given)
        assert sample(model, [prompt], draws=draws, **settings).completions == [found[0, len(prompt) :].tolist()]


def check_saved(model: Model, merged: Any, directory: Path) -> None:
    """The adapter comes back with the same bits, and the merged network, read by our loader, computes the same."""
    settings = {"system": "", "template_sha256": "", "template_kwargs": {}, "end_token": ""}
    policy = model.adapters["policy"]
    saved.write_adapter(directory / "adapter", saved.SavedAdapter(policy, model.fingerprint, settings, [*policy.pairs]))
    again = model.adopt(saved.read_adapter(directory / "adapter", "again").adapter)
    assert set(again.pairs) == set(policy.pairs)
    for name, tensor in policy.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    with quiet():
        merged.save_pretrained(directory / "merged")
    read: Any = load_base(Base(directory / "merged"), torch.float32, "cpu")
    read.set_attn_implementation(merged.config._attn_implementation)
    ids = torch.tensor([LONG])
    with torch.no_grad():
        assert near(read(ids, use_cache=False).logits, merged(ids, use_cache=False).logits, 1e-5)


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
