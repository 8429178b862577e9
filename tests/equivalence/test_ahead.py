"""One step off: who samples what, that it doesn't matter when, and what an older policy's completions teach."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_stages import POLICY, ROWS, SFT, UNCENTRED, new_stage, number, optimizers, rollout
from tiny_models import digest, randomise
from torch import Tensor

from perlhf.config.stages import OptimConfig, ValueConfig
from perlhf.errors import DivergenceError, StaleSamplerError
from perlhf.model.model import Model
from perlhf.rollout import ahead, local
from perlhf.rollout.ahead import SAMPLER, Ahead, add_sampler
from perlhf.rollout.completions import Setup, asked
from perlhf.rollout.local import Rollout, sample
from perlhf.training import policy_step
from perlhf.training.policy_step import At, Step

UPDATES = 5
MOVING = {"optim": OptimConfig(learning_rate=3e-3), "max_sampler_gap": 1e9}


def stale_stage(directory: Path, **options: Any) -> Setup:
    given: dict[str, Any] = {"staleness": 1, "updates": UPDATES} | options
    stage = new_stage(directory, number, **given)
    add_sampler(stage.model, POLICY)
    return stage


def sampling(stage: Setup, in_turn: bool = False) -> Ahead:
    found = Ahead(stage.model, POLICY, partial(asked, stage, SAMPLER), UPDATES, stage.workers, 0)
    if in_turn:
        found._pool = None
    return found


def weights(stage: Setup) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stage.model.adapters[POLICY].tensors().items()}


def trained(stage: Setup, samples: Ahead) -> tuple[list[Step], list[dict[str, Tensor]]]:
    """Some updates, and the policy's weights before each of them."""
    learning, done, before = optimizers(stage), list[Step](), list[dict[str, Tensor]]()
    with samples:
        for step in range(1, UPDATES + 1):
            before.append(weights(stage))
            done.append(policy_step.policy_step(stage, learning, UNCENTRED, At(step, step), samples))
    return done, before


def logprobs_under(stage: Setup, rolled: Rollout, tensors: dict[str, Tensor] | None) -> Tensor:
    """Of the completions, by an adapter with these weights, or by the base."""
    adapter = None
    if tensors is not None:
        adapter = POLICY
        with torch.no_grad():
            for name, tensor in stage.model.adapters[POLICY].tensors().items():
                tensor.copy_(tensors[name])
    laid_out = policy_step.each_completion(rolled, stage)
    return policy_step.logprobs_of_all(stage, rolled, laid_out, adapter).old_logprobs


def test_completions_are_of_the_policy_that_they_name_and_of_no_other(tiny_base: Path) -> None:
    stage = stale_stage(tiny_base, **MOVING)
    done, before = trained(stage, sampling(stage))
    assert [step.sampler_step for step in done] == [0, 0, 1, 2, 3]
    for at, step in enumerate(done):
        rolled = step.scored.rollout
        told = ahead.padded(rolled, step.known.mask)
        gaps = [(told - logprobs_under(stage, rolled, old)).abs().max().item() for old in before]
        others = [gap for step_, gap in enumerate(gaps) if step_ != step.sampler_step]
        assert gaps[step.sampler_step] < 1e-4 < 2e-3 < min(others), f"update {at + 1}: {gaps}"
        assert (told - logprobs_under(stage, rolled, None)).abs().max() > 2e-3, "nor of the base"


def test_that_it_overlaps_changes_no_bit(tiny_base: Path) -> None:
    found = []
    for in_turn in (False, True):
        stage = stale_stage(tiny_base, **MOVING)
        done, _ = trained(stage, sampling(stage, in_turn))
        lines = [[step.scored.rollout.completions, step.scored.rollout.sampler_logprobs] for step in done]
        found.append((digest(stage.model, POLICY), digest(stage.model, SAMPLER), lines))
    assert found[0] == found[1]


@pytest.mark.parametrize("stale", [None, SFT, POLICY])
def test_a_sampler_with_other_weights_stops_the_run(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, stale: str | None
) -> None:
    """Planted: an engine with the base, the reference, or the newest policy, that claims the version it should have.

    The newest one is the right one until it has learned since: in update 3.
    """
    stage = stale_stage(tiny_base, **MOVING)

    def engine(model: Model, prompts: Any, *, adapter: str | None, **options: Any) -> Rollout:
        rolled = sample(model, prompts, adapter=stale, **options)
        return dataclasses.replace(rolled, adapter_version=model.version(adapter))

    learning = optimizers(stage)
    with sampling(stage, in_turn=True) as samples:
        for step in (1, 2):
            policy_step.policy_step(stage, learning, UNCENTRED, At(step, step), samples)
        monkeypatch.setattr(local, "sample", engine)
        with pytest.raises(StaleSamplerError, match="'sampler'"):
            policy_step.policy_step(stage, learning, UNCENTRED, At(3, 3), samples)


def test_an_error_of_the_sampler_is_raised_where_its_completions_are_wanted(tiny_base: Path) -> None:
    stage = stale_stage(tiny_base, updates=9)
    learning = optimizers(stage)
    with sampling(stage) as samples:
        policy_step.policy_step(stage, learning, UNCENTRED, At(1, 1), samples)
        with torch.no_grad():
            for tensor in stage.model.adapters[POLICY].tensors().values():
                tensor.fill_(float("nan"))
        samples._stop()
        samples.begin(2, 1)
        with pytest.raises(DivergenceError, match="not finite"):
            samples.take(2)


def test_what_nobody_wants_is_given_up(tiny_base: Path) -> None:
    """Leaving waits for a token, not for the completions: without end of either the first would never return."""
    stage = stale_stage(tiny_base, max_completion_tokens=60)
    before = digest(stage.model, SAMPLER)
    with sampling(stage) as samples:
        samples.begin(1, 0)
        samples._stop()
        assert samples._future is None
        with torch.no_grad():
            next(iter(stage.model.adapters[POLICY].tensors().values())).add_(1)
        samples.begin(2, 1)
        assert digest(stage.model, SAMPLER) != before
        samples.back()
        assert digest(stage.model, SAMPLER) == before and samples.learned == 0


def test_cancelled_at_the_next_token(tiny_base: Path) -> None:
    stage = stale_stage(tiny_base)
    asked_for = iter([False, False, True])
    given = asked(stage, SAMPLER, 1)
    with pytest.raises(local.CancelledError):
        given(cancelled=lambda: next(asked_for))


# ---- what it teaches ------------------------------------------------------------------------------------------------


def weighed(stage: Setup, wanted: list[float]) -> Rollout:
    """The usual rollout, sampled by somebody under whom the policy's ratios are these."""
    given = rollout()
    now = policy_step.logprobs_of_all(stage, given, policy_step.each_completion(given, stage), POLICY).old_logprobs
    log_ratios = torch.tensor(wanted).log()
    told = [(now[row, : len(ids)] - log_ratios[row] / len(ids)).tolist() for row, ids in enumerate(given.completions)]
    return dataclasses.replace(given, sampler_logprobs=told)


def gradients(directory: Path, wanted: list[float] | None, **options: Any) -> dict[str, Tensor]:
    """Of all that learns, in one update from the usual rollout; None: without staleness."""
    options = {"baseline": "value", "staleness": int(wanted is not None)} | options
    if wanted is not None:
        options |= {"max_sampler_gap": 1e9}
    stage = new_stage(directory, number, **options)
    randomise(stage.model, POLICY, 2)
    learning = optimizers(stage)
    given = rollout() if wanted is None else weighed(stage, wanted)
    scored = policy_step.score(stage, given, stage.prompts[:2], UNCENTRED, 1)
    laid_out = policy_step.whole_prompts(given, stage)
    if laid_out is None:
        policy_step.two_passes(stage, learning, scored, policy_step.each_completion(given, stage), At(2, 2))
    else:
        policy_step.one_pass(stage, learning, scored, laid_out, At(2, 2))
    found = {}
    for name, optimizer in learning.items():
        states = [optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]]
        found[name] = torch.cat([state.reshape(-1) for state in states])
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": "leave_one_out"}, {"baseline": "none", "tokens_per_microbatch": 12}, {"clip": 0.2}],
    ids=["value", "one pass", "several micro-batches", "clip"],
)
def test_each_completion_counts_by_its_ratio(tiny_base: Path, options: dict[str, Any]) -> None:
    """Gradients are linear in the ratios, are today's where all are 1, and stay below the limit."""
    options = {"value": ValueConfig(warmup_updates=0), **options}
    nearly_zero = 1e-30
    alone = [
        gradients(tiny_base, [1.0 if row == own else nearly_zero for row in range(len(ROWS))], **options)
        for own in range(len(ROWS))
    ]
    for wanted, more in (
        ([1.0, 1.0, 1.0, 1.0], {}),
        ([0.5, 1.0, 2.0, 3.0], {}),
        ([0.5, 1.0, 2.0, 2.0], {"max_ratio": 2.0}),
    ):
        given = [*wanted[:3], 3.0] if more else wanted
        for name, found in gradients(tiny_base, given, **options, **more).items():
            expected = torch.stack([w * one[name] for w, one in zip(wanted, alone, strict=True)]).sum(0)
            assert expected.norm() > 1e-3
            assert (found - expected).norm() <= 1e-4 * expected.norm()
    for name, usual in gradients(tiny_base, None, **options).items():
        assert (usual - torch.stack([one[name] for one in alone]).sum(0)).norm() <= 1e-4 * usual.norm()


def test_too_wide_a_gap_stops_the_run(tiny_base: Path) -> None:
    stage = new_stage(tiny_base, number, staleness=1, max_sampler_gap=0.3)
    given = weighed(stage, [1.0, 1.0, 1.0, 1.0])
    known = policy_step.logprobs_of_all(stage, given, policy_step.each_completion(given, stage), POLICY)
    policy_step.check_known(stage, known, given, 7)
    moved = dataclasses.replace(given, sampler_logprobs=[[x + 0.4 for x in row] for row in given.sampler_logprobs])
    before = digest(stage.model, POLICY)
    with pytest.raises(DivergenceError, match=r"max_sampler_gap: .* 0\.4 nats a token .* update 7") as raised:
        policy_step.check_known(stage, known, moved, 7)
    assert "staleness: 0" in str(raised.value) and digest(stage.model, POLICY) == before
