"""The same numbers on CUDA as on the CPU. Skipped where there is no CUDA device; these paths are untested there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import apart

from perlhf.kernels.attention import flex
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.kernels.attention.tree_attention import Tree, tree_attention
from perlhf.kernels.modules import AdaptedLinear
from perlhf.method.packing import Batch, completed, lay_out, pack
from perlhf.model.bases.found import Base
from perlhf.model.model import Model
from perlhf.rollout.local import Decoding, Ends, Rollout, probe, sample, uniforms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]
COMPLETIONS = [[10, 11, 12], [13]]


def _model(path: Path, device: str) -> Model:
    model = Model.load(Base(path), "float32", device)
    model.add_adapter("policy", "policy", rank=4)
    adapter = model.add_adapter("reward_0", "reward", rank=4)
    generator = torch.Generator().manual_seed(0)
    for name in ("policy", "reward_0"):
        for tensor in model.adapters[name].tensors().values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    assert adapter.score_head is not None
    return model


def _answers(prompts: Any, completions: Any, packing: Any, model: Model) -> Batch:
    return pack([[completed(p, c)] for p, c in zip(prompts, completions, strict=True)], packing, model.device)


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_scores_logprobs_and_gradients_equal_the_cpus(tiny_base: Path, packing) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = _model(tiny_base, device)
        scores = model.scores(apart([[1, 2, 3], [1, 2, 4, 5], [1, 2]], packing, model.device), "reward_0")
        scores.sum().backward()
        logprobs = model.logprobs(_answers(PROMPTS, COMPLETIONS, packing, model), "policy").logprobs
        gradient = model.adapters["reward_0"].trainable()[0].grad
        assert gradient is not None
        found[device] = scores.detach().cpu(), logprobs.detach().cpu(), gradient.cpu()
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)


def test_greedy_samples_equal_the_cpus(tiny_base: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = _model(tiny_base, device)
        rollout = sample(
            model,
            PROMPTS,
            adapter="policy",
            draws=uniforms(0, 1, [0, 1], 2, 8),
            ends=Ends([2]),
            temperature=0.0,
            max_completion_tokens=8,
        )
        probe(model, rollout, "policy")
        found[device] = rollout.completions
    assert found["cuda"] == found["cpu"]


def _roll(model: Model, end_id: int, length: int = 24) -> Rollout:
    return sample(
        model,
        PROMPTS,
        adapter="policy",
        draws=uniforms(0, 1, [0, 1], 6, length),
        ends=Ends([end_id]),
        temperature=1.0,
        max_completion_tokens=length,
    )


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("end", [-1, None])
def test_recorded_steps_equal_plain_ones(tiny_base: Path, monkeypatch, tuning, end: int | None) -> None:
    """A replayed graph against the same steps run one by one, also where rows end and it is recorded anew."""
    model = _model(tiny_base, "cuda")
    if tuning == "full":
        model.adapters.pop("policy")
        for layer in model.base.modules():
            if isinstance(layer, AdaptedLinear):
                layer.pairs.pop("policy", None)
        model.add_adapter("policy", "policy", tuning="full")
    end_id = _roll(model, -1).completions[0][2] if end is None else end
    recorded = _roll(model, end_id)
    monkeypatch.setattr(Decoding, "__call__", lambda self, ids: model.decode(ids, self.cache, self.held))
    plain = _roll(model, end_id)
    assert recorded.completions == plain.completions and recorded.ended == plain.ended
    for one, other in zip(recorded.sampler_logprobs, plain.sampler_logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_prompts_that_take_turns_sample_as_all_at_once(tiny_base: Path) -> None:
    """In two places of one recorded step, and in one."""
    model, prompts = _model(tiny_base, "cuda"), [*PROMPTS, [9, 9], [5, 6, 7, 8, 11, 12]]
    end_id = _roll(model, -1).completions[0][2]
    found = [
        sample(
            model,
            prompts,
            adapter="policy",
            draws=uniforms(0, 1, range(4), 6, 24),
            ends=Ends([end_id]),
            temperature=1.0,
            max_completion_tokens=24,
            max_rows=max_rows,
        )
        for max_rows in (None, 12, 6)
    ]
    for turns in found[1:]:
        assert turns.completions == found[0].completions and turns.ended == found[0].ended
        for one, other in zip(turns.sampler_logprobs, found[0].sampler_logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_the_sampler_uses_the_adapter_as_it_is_now(tiny_base: Path) -> None:
    """Sampled log-probabilities are the trainer's, before and after the adapter changes."""
    model = _model(tiny_base, "cuda")
    for _ in range(2):
        rollout = _roll(model, -1)
        probe(model, rollout, "policy")
        batch = _answers(rollout.prompts, rollout.completions, "tree", model)
        logprobs = model.logprobs(batch, "policy").logprobs[batch.completion_mask]
        flat = torch.tensor([value for row in rollout.sampler_logprobs for value in row])
        torch.testing.assert_close(flat, logprobs.detach().cpu(), rtol=0, atol=2e-3)
        for tensor in model.adapters["policy"].trainable():
            tensor.data.mul_(1.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tree_equals_separate_rows(tiny_base: Path, dtype: str) -> None:
    model = Model.load(Base(tiny_base), dtype, "cuda")
    sequences = [[1, 2, 3, *range(20, 60)], [1, 2, 4, 5], [1, 2], [1, 2, 3, *range(20, 40), 9], [7]]
    tree, separate = (
        model.last_states(apart(sequences, packing, model.device), None).float() for packing in ("tree", "none")
    )
    assert ((tree - separate).norm() / separate.norm()).item() < (1e-3 if dtype == "float32" else 0.02)


def test_layers_that_are_recomputed_give_the_same(tiny_base: Path) -> None:
    """The backward pass runs in a thread of its own there, and computes by the call of the first time."""
    model, found = _model(tiny_base, "cuda"), list[list[torch.Tensor]]()
    learned = model.adapters["policy"].trainable()
    for again in (False, True):
        if again:
            assert model.recompute_layers()
        logprobs = model.logprobs(_answers(PROMPTS, [[5, 6, 7], [8]], "tree", model), "policy").logprobs
        found.append([logprobs.detach(), *torch.autograd.grad(logprobs.square().sum(), learned)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bent", [False, True])
def test_attention_by_blocks_equals_that_under_a_mask(monkeypatch: pytest.MonkeyPatch, bent: bool) -> None:
    """Values and gradients; and trees of another shape compile nothing anew."""
    monkeypatch.setattr(flex, "MIN_TOKENS", 1)
    generator = torch.Generator("cuda").manual_seed(0)
    sinks = torch.randn(9, device="cuda", generator=generator).requires_grad_() if bent else None
    compiled: list[int] = []
    for shared in (500, 900, 300, 1400):
        layout = lay_out([[0] * shared + [number] * (60 * number) for number in range(1, 6)], "tree")
        assert layout.nodes is not None
        query, key, value = (
            torch.randn(heads, layout.tokens, 64, device="cuda", generator=generator).requires_grad_()
            for heads in (9, 3, 3)
        )
        for sight in (FULL, Sight(window=256)):
            found = {}
            for way in ("flex", ""):
                monkeypatch.setenv(flex.VARIABLE, way)
                tree = Tree(layout.nodes)
                out = tree_attention(query, key, value, tree, 0.125, sight, 30.0 if bent else None, sinks)
                learned = [query, key, value, *([sinks] if sinks is not None else [])]
                found[way] = [out.detach(), *torch.autograd.grad(out.square().sum(), learned)]
            for by_blocks, by_mask in zip(found["flex"], found[""], strict=True):
                torch.testing.assert_close(by_blocks, by_mask, rtol=2e-2, atol=2e-2)  # tensor cores, in tf32
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[1]
