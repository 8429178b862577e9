"""Whether a server has the weights that it was sent: numbers worked by hand, and the tiny base."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import open_model, randomise

from perlhf.rollout import local
from perlhf.rollout.local import Ends
from perlhf.rollout.vllm.probe import Greedy, differs, follows, gap, greedy_of, logprobs_of

HALF = math.log(0.5)


def table(*places: tuple[float, ...]) -> Greedy:
    """Log-probabilities of one answer of these probabilities; the likeliest is the token."""
    probabilities = torch.tensor(places)
    return Greedy([probabilities.argmax(-1).tolist()], probabilities.log()[None])


def test_equal_tokens_differ_in_nothing():
    ours = table((0.5, 0.3, 0.2), (0.1, 0.6, 0.3))
    assert differs(ours, [([0, 1], [HALF, 0.0])], 0.1) is None


def test_a_token_that_is_less_likely_is_named():
    ours = table((0.5, 0.3, 0.2), (0.1, 0.6, 0.3))
    said = differs(ours, [([0, 2], [HALF, 0.0])], 0.1)
    assert said is not None and "token 2" in said and "0.693 nats" in said  # log(0.6 / 0.3)


def test_after_a_tie_nothing_is_compared_since_the_context_is_another():
    ours = table((0.5, 0.49, 0.01), (0.98, 0.01, 0.01))
    found = [([1, 2], [math.log(0.49), -9.0])]
    assert differs(ours, found, 0.1) is None  # log(0.5 / 0.49) = 0.02
    assert gap(ours, found) == pytest.approx(0, abs=1e-6), "of the second token nothing is known"


def test_a_token_that_the_vocabulary_lacks_and_a_missing_one_differ():
    ours = table((0.5, 0.3, 0.2), (0.1, 0.6, 0.3))
    assert "inf nats" in str(differs(ours, [([0, 7], [HALF, 0.0])], 0.1))
    assert "1 tokens of 2" in str(differs(ours, [([0], [HALF])], 0.1))


def test_the_gap_is_the_mean_over_tokens_whose_context_is_the_same():
    ours = table((0.5, 0.3, 0.2), (0.1, 0.6, 0.3))
    assert gap(ours, [([0, 1], [HALF - 0.2, math.log(0.6) + 0.4])]) == pytest.approx(0.3)
    assert gap(ours, [([1, 1], [math.log(0.3) + 0.1, 5.0])]) == pytest.approx(0.1)


class TestFollows:
    """now: 0.6, 0.7; before: 0.5, 0.8 at the same tokens, so d = (log 5/6, log 8/7) = (-0.182, 0.134)."""

    now = table((0.6, 0.4), (0.7, 0.3))
    before = table((0.5, 0.5), (0.8, 0.2))

    def test_those_of_the_version_before(self):
        assert follows([([0, 0], [math.log(0.5), math.log(0.8)])], self.now, self.before)

    def test_those_as_they_are_now(self):
        assert not follows([([0, 0], [math.log(0.6), math.log(0.7)])], self.now, self.before)

    def test_noise_that_points_elsewhere_is_no_proof(self):
        # r = (0.134, 0.182) is at right angles to d.
        assert not follows([([0, 0], [math.log(0.6) + 0.134, math.log(0.7) + 0.182])], self.now, self.before)

    def test_versions_nearer_than_rounding_are_not_told_apart(self):
        near = table((0.60001, 0.39999), (0.70001, 0.29999))
        assert not follows([([0, 0], [math.log(0.60001), math.log(0.70001)])], self.now, near)
        assert not follows([([0, 0], [math.log(0.5), math.log(0.8)])], self.now, self.now)


def test_tables_are_those_that_greedy_sampling_reports(tiny_base: Path):
    model = open_model(tiny_base)
    model.add_adapter("policy", "policy", rank=4, alpha=8.0)
    randomise(model, "policy", 1)
    prompts = [[5, 6, 7, 8], [9, 10]]
    found = greedy_of(model, "policy", prompts, 6)
    given = {"draws": torch.zeros(2, 6, dtype=torch.float64), "ends": Ends(()), "temperature": 0.0}
    sampled = local.sample(model, prompts, adapter="policy", max_completion_tokens=6, **given)
    answers = list(zip(sampled.completions, sampled.sampler_logprobs, strict=True))
    assert found.tokens == sampled.completions and gap(found, answers) < 1e-5
    assert found.logprobs.exp().sum(-1) == pytest.approx(torch.ones(2, 6), abs=1e-5)
    assert gap(Greedy(found.tokens, logprobs_of(model, None, prompts, found.tokens)), answers) > 0.1
