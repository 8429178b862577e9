"""The same numbers on CUDA as on the CPU. Skipped where there is no CUDA device; these paths are untested there."""

from pathlib import Path

import pytest
import torch

from perlhf.model import Model
from perlhf.sampler import probe, sample, uniforms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]
COMPLETIONS = [[10, 11, 12], [13]]


def _model(path: Path, device: str) -> Model:
    model = Model.load(str(path), "float32", device)
    model.add_adapter("policy", "policy", rank=4)
    adapter = model.add_adapter("reward_0", "reward", rank=4)
    generator = torch.Generator().manual_seed(0)
    for name in ("policy", "reward_0"):
        for tensor in model.adapters[name].tensors().values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    assert adapter.head is not None
    return model


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_scores_logprobs_and_gradients_equal_the_cpus(tiny_base: Path, packing) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = _model(tiny_base, device)
        scores = model.scores([[1, 2, 3], [1, 2, 4, 5], [1, 2]], "reward_0", packing=packing)
        scores.sum().backward()
        logprobs = model.logprobs(PROMPTS, COMPLETIONS, "policy", packing=packing).logprobs
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
            end_id=2,
            temperature=0.0,
            max_completion_tokens=8,
        )
        probe(model, rollout, "policy")
        found[device] = rollout.completions
    assert found["cuda"] == found["cpu"]
