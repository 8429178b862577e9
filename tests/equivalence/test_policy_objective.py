"""The policy stage's decisions (DESIGN.md section 5), each against numbers worked out apart from the code."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from policy_stages import (
    COMPLETIONS,
    ENDED,
    POLICY,
    ROWS,
    SFT,
    UNCENTRED,
    VALUE,
    constant,
    gradients,
    new_stage,
    optimizers,
    rollout,
)
from tiny_models import (
    END,
    answers,
    apart,
    digest,
    merged_network,
    random_ids,
    randomise,
    reference_logprobs,
)
from torch import Tensor

from perlhf.config.stages import AdapterConfig, OptimConfig, PolicyConfig, ValueConfig
from perlhf.data.records import Text
from perlhf.errors import DivergenceError, RewardFunctionError, StaleSamplerError
from perlhf.method.packing import length_mask
from perlhf.model.model import Model
from perlhf.rollout import local
from perlhf.rollout.functions import Asked
from perlhf.rollout.local import Rollout, sample
from perlhf.rollout.scorers import Scorers
from perlhf.training import held_out, policy_step
from perlhf.training import policy as policy_stage
from perlhf.training.policy_step import At, Centre, Known, Scored, Setup


def score(stage: Setup, centre: Centre = UNCENTRED) -> Scored:
    return policy_step.score(stage, rollout(), stage.prompts[:2], centre, 1)


def known(stage: Setup) -> Known:
    """Log-probabilities of the rollout under the policy and the reference."""
    return policy_step.logprobs_of_all(stage, rollout(), policy_step.each_completion(rollout(), stage), POLICY)


def two_passes(stage: Setup, trained: dict[str, torch.optim.AdamW], step: int = 2) -> tuple[Known, Tensor, Any]:
    """The step after the first, which would start the value."""
    laid_out = policy_step.each_completion(rollout(), stage)
    return policy_step.two_passes(stage, trained, score(stage), laid_out, At(step, step))


class TestStart:
    """KL at step 0."""

    @pytest.mark.parametrize("packing", ["tree", "none"])
    @pytest.mark.parametrize("max_tokens", [10, 10_000])
    @pytest.mark.parametrize(
        ("shape", "beneath"),
        [
            (AdapterConfig(rank=4, alpha=8.0), None),  # a copy of the SFT adapter
            (AdapterConfig(rank=2), SFT),  # other rank: stacked over it
            (AdapterConfig(rank=4, alpha=4.0), SFT),  # other scale
            (AdapterConfig(rank=4, alpha=8.0, targets="all"), SFT),  # other layers
        ],
    )
    def test_kl_is_exactly_zero(
        self, tiny_base: Path, shape: AdapterConfig, beneath: str | None, max_tokens: int, packing: str
    ) -> None:
        stage = new_stage(tiny_base, adapter=shape, tokens_per_microbatch=max_tokens, packing=packing)
        assert stage.model.adapters[POLICY].beneath == beneath
        told = known(stage)
        assert torch.equal(told.old_logprobs, told.ref_logprobs)
        assert told.old_logprobs[told.mask].abs().min() > 0

    def test_kl_of_full_tuning_is_zero_within_rounding(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base, tuning="full")
        assert stage.model.adapters[POLICY].weights
        told = known(stage)
        torch.testing.assert_close(told.old_logprobs, told.ref_logprobs, rtol=0, atol=1e-4)

    def test_the_reference_is_the_sft_adapter(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base)
        randomise(stage.model, POLICY, 2)
        told = known(stage)
        networks = {name: merged_network(tiny_base, stage.model, name) for name in (POLICY, SFT)}
        for name, found in ((POLICY, told.old_logprobs), (SFT, told.ref_logprobs)):
            for row, (prompt, ids) in enumerate(zip(ROWS, COMPLETIONS, strict=True)):
                expected = reference_logprobs(networks[name], prompt, ids)
                torch.testing.assert_close(found[row, : len(ids)], expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("shape", [AdapterConfig(rank=4, alpha=8.0), AdapterConfig(rank=2)])
    def test_no_dropout_although_sft_had_some(self, tiny_base: Path, shape: AdapterConfig) -> None:
        stage = new_stage(tiny_base, adapter=shape)
        for name in (POLICY, VALUE):
            assert {pair.dropout for pair in stage.model.adapters[name].pairs.values()} == {0.0}


class TestTemperature:
    def test_all_logprobs_are_at_the_sampling_temperature(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base, temperature=0.6)
        randomise(stage.model, POLICY, 2, size=0.1)
        rolled = policy_step.sample_completions(stage, stage.prompts[:2], POLICY, 2, 1, [0, 1])
        told = policy_step.logprobs_of_all(stage, rolled, policy_step.each_completion(rolled, stage), POLICY)
        policy, reference = (merged_network(tiny_base, stage.model, name) for name in (POLICY, SFT))
        for row, (prompt, ids) in enumerate(zip(rolled.prompts, rolled.completions, strict=True)):
            reported = torch.tensor(rolled.sampler_logprobs[row])
            expected = reference_logprobs(policy, prompt, ids, 0.6)
            torch.testing.assert_close(reported, expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(told.old_logprobs[row, : len(ids)], expected, rtol=0, atol=1e-4)
            anchor = reference_logprobs(reference, prompt, ids, 0.6)
            torch.testing.assert_close(told.ref_logprobs[row, : len(ids)], anchor, rtol=0, atol=1e-4)


class TestValuePosition:
    @pytest.mark.parametrize("packing", ["none", "tree"])
    def test_a_value_has_not_seen_its_token(self, model: Model, packing: Any) -> None:
        """values[t] is read where token t is predicted; from t + 1 on they know it."""
        model.add_adapter(VALUE, "value", rank=4)
        randomise(model, VALUE)
        prompt, completion = ROWS[0], random_ids([6], seed=9)[0]
        with torch.no_grad():
            before = model.values(answers([prompt], [completion], packing=packing), VALUE)[0]
            for t in range(6):
                other = [*completion[:t], (completion[t] + 1) % 200 + 2, *completion[t + 1 :]]
                after = model.values(answers([prompt], [other], packing=packing), VALUE)[0]
                torch.testing.assert_close(after[: t + 1], before[: t + 1], rtol=0, atol=1e-5)
                assert t == 5 or (after[t + 1 :] - before[t + 1 :]).abs().max() > 0.1

    def test_the_first_value_is_at_the_last_prompt_token(self, model: Model) -> None:
        model.add_adapter(VALUE, "value", rank=4)
        randomise(model, VALUE)
        with torch.no_grad():
            values = model.values(answers([ROWS[0]], [COMPLETIONS[0]]), VALUE)
            torch.testing.assert_close(values[0, :1], model.scores(apart([ROWS[0]]), VALUE))
            seen = model.scores(apart([[*ROWS[0], COMPLETIONS[0][0]]]), VALUE)
        torch.testing.assert_close(values[0, 1:2], seen)


class TestScores:
    def test_centring(self, tiny_base: Path) -> None:
        """Mean and deviation of the reference's scores on the prompts 1, 2, 3, 6: 3 and sqrt((4 + 1 + 0 + 9) / 4)."""
        centre = held_out.centre_of(new_stage(tiny_base))
        assert (centre.mean, centre.std) == pytest.approx((3, 3.5**0.5))
        assert centre.penalty == pytest.approx(3.5**0.5)
        assert held_out.centre_of(new_stage(tiny_base, missing_end_penalty=0.25)).penalty == 0.25
        assert held_out.centre_of(new_stage(tiny_base, missing_end_penalty=0.0)).penalty == 0

    @pytest.mark.parametrize(("value", "given", "penalty"), [(0.0, None, 0.5), (-1e6, None, 0.5), (2.0, 0.0, 0.0)])
    def test_scores_that_do_not_vary_leave_a_penalty(
        self, tiny_base: Path, capsys: pytest.CaptureFixture[str], value: float, given: float | None, penalty: float
    ) -> None:
        """0.5, the most that scores from 0 to 1 can deviate: one half at 0, the other at 1."""
        centre = held_out.centre_of(new_stage(tiny_base, constant(value), missing_end_penalty=given))
        assert (centre.mean, centre.std, centre.penalty) == (value, 0, penalty)
        assert ("a missing end token costs 0.5" in capsys.readouterr().err) == (given is None)

    def test_centring_scores_the_reference_not_the_policy(self, tiny_base: Path) -> None:
        seen: list[str] = []

        def remember(asked: Asked) -> list[float]:
            seen.extend(asked.completions)
            return [0.0] * len(asked.completions)

        stage = new_stage(tiny_base, remember)
        held_out.centre_of(stage)
        first = seen.copy()
        seen.clear()
        randomise(stage.model, POLICY, 7)
        held_out.centre_of(stage)
        assert seen == first

    def test_a_missing_end_is_scored_and_then_pays(self, tiny_base: Path) -> None:
        # prompts 1 and 2, two completions each, the last one without its end token
        scored = score(new_stage(tiny_base), Centre(mean=0.5, std=1.0, penalty=0.75))
        assert scored.scores.tolist() == [1, 1, 2, 2]  # raw, as logged
        assert scored.paid.tolist() == [0.5, 0.5, 1.5, 0.75]

    def test_bounded_pay_is_against_the_references_answer(self, tiny_base: Path) -> None:
        # The prompts' numbers are the scores: 1 and 2, of two completions each; the last one has no end.
        stage = new_stage(tiny_base, bounded=True)
        against = policy_step.reference_scores(stage, stage.prompts[:2], UNCENTRED, 1, [0, 1])
        assert against.tolist() == [1.0, 2.0]
        centre = dataclasses.replace(UNCENTRED, penalty=0.5)
        scored = policy_step.score(stage, rollout(), stage.prompts[:2], centre, 1, against - np.log([3.0, 1.0]))
        assert scored.paid == pytest.approx([0.25, 0.25, 0.0, -0.5])
        assert held_out.centre_of(stage).penalty == held_out.PENALTY_WHERE_EQUAL

    def test_members_that_disagree_far_more_than_at_first_end_the_run(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base, max_disagreement=3.0, reward=("given:directly", "given:too"))
        state = policy_stage.PolicyState(UNCENTRED, UNCENTRED, {})
        for spread, said in ((2.0, None), (6.0, None), (6.1, "3.05 times as at the start"), (9.0, "3.05 times")):
            # The second member puts them at -spread/2 and spread/2, the first at 0: deviations of spread/4.
            members = (constant(0.0), lambda asked, spread=spread: [0.0, spread, 1.0, 1.0 + spread])
            scored = score(dataclasses.replace(stage, scorers=Scorers((), members, "mean")))
            assert scored.disagreement == pytest.approx(spread / 4)
            done: Any = SimpleNamespace(scored=scored)
            policy_stage._stop_by_disagreement(done, state, 7, stage.config)
            assert state.disagreement == pytest.approx(0.5)
            assert (state.stopped is None) == (said is None) and (said or "") in (state.stopped or "")

    def test_sampled_ids_are_scored_as_they_are(self, tiny_base: Path) -> None:
        """ "h", "e" (two tokens) would come back from text as "he" (one); the reward adapter must see the two."""
        stage = new_stage(tiny_base)
        model, encoder = stage.model, stage.encoder
        model.add_adapter("reward_0", "reward", rank=4)
        randomise(model, "reward_0", 4)
        sampled = [73, 70, END]
        again = list(encoder.example("x", encoder.decode(sampled)).completion)
        assert again == [259, END]
        one = dataclasses.replace(rollout([True]), prompts=ROWS[:1], completions=[sampled])
        stage = dataclasses.replace(stage, scorers=Scorers(("reward_0",), (), "mean"))
        found = policy_step.score(stage, one, stage.prompts[:1], UNCENTRED, 0).scores
        with torch.no_grad():
            as_sampled, re_encoded = model.scores(
                apart([[*ROWS[0], *sampled], [*ROWS[0], *again]]), "reward_0"
            ).tolist()
        assert found[0] == pytest.approx(as_sampled, abs=1e-5)
        assert abs(as_sampled - re_encoded) > 1e-2

    def test_functions_see_the_text_without_its_end_token(self, tiny_base: Path) -> None:
        seen: list[tuple[Text, str]] = []

        def remember(asked: Asked) -> list[float]:
            seen.extend(zip(asked.prompts, asked.completions, strict=True))
            return [0.0] * len(asked.completions)

        stage = new_stage(tiny_base, remember)
        ends = dataclasses.replace(rollout([True, True]), prompts=ROWS[:2], completions=[[73, 74, END], [73, 70, END]])
        policy_step.score(stage, ends, stage.prompts[:2], UNCENTRED, 0)
        assert seen == [("1", "hi"), ("2", "he")]


def by_formula(directory: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of policy and value from the paper's two sums, one completion at a time, divided by 4 completions."""
    stage = new_stage(directory)
    prepare(stage)
    model = stage.model
    rewards = reward_of(score(stage), known(stage), 0.1)
    for row, (prompt, ids) in enumerate(zip(ROWS, COMPLETIONS, strict=True)):
        logprobs = model.logprobs(answers([prompt], [ids], packing="none"), POLICY).logprobs[0]
        values = model.values(answers([prompt], [ids], packing="none"), VALUE)[0]
        returns = torch.stack([rewards[row, t : len(ids)].sum() for t in range(len(ids))])
        loss = -(logprobs * (returns - values.detach())).sum() / 4 + ((values - returns) ** 2).sum() / 4
        loss.backward()
    found = [[p.grad for p in model.adapters[n].trainable() if p.grad is not None] for n in (POLICY, VALUE)]
    return found[0], found[1]


def prepare(stage: Setup) -> None:
    randomise(stage.model, POLICY, 2, size=0.1)
    if VALUE in stage.model.adapters:
        randomise(stage.model, VALUE, 3, size=0.1)


def reward_of(scored: Scored, told: Known, kl_coef: float) -> Tensor:
    """Token rewards written out: the KL of every token, and the score at the last."""
    rewards = torch.zeros(told.mask.shape)
    for row, ids in enumerate(COMPLETIONS):
        for t in range(len(ids)):
            rewards[row, t] = -kl_coef * (told.old_logprobs[row, t] - told.ref_logprobs[row, t])
        rewards[row, len(ids) - 1] += (1 - kl_coef) * scored.paid[row]
    return rewards


def returns_of(rewards: Tensor) -> Tensor:
    return torch.stack([rewards[:, t:].sum(-1) for t in range(rewards.shape[1])], 1)


class TestGradients:
    @pytest.mark.parametrize("clip", [None, 0.2])
    @pytest.mark.parametrize(("max_tokens", "packing"), [(10_000, "tree"), (1, "tree"), (10_000, "none"), (15, "none")])
    def test_are_those_of_the_paper_however_the_update_is_cut(
        self, tiny_base: Path, max_tokens: int, packing: str, clip: float | None
    ) -> None:
        """The divisor is 4 completions, not those of a micro-batch. At ratio 1 the clipped objective's are the same."""
        expected = by_formula(tiny_base)
        stage = new_stage(tiny_base, tokens_per_microbatch=max_tokens, packing=packing, clip=clip, kl_coef=0.1)
        prepare(stage)
        trained = optimizers(stage)
        two_passes(stage, trained)
        for name, wanted in zip((POLICY, VALUE), expected, strict=True):
            found = gradients(trained[name])
            assert len(found) == len(wanted) and max(g.abs().max() for g in wanted) > 1e-2
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    def test_clip_allows_several_steps_and_limits_them(self, tiny_base: Path) -> None:
        big_steps = OptimConfig(learning_rate=0.02, beta1=0.0, max_grad_norm=1e9)
        stage = new_stage(tiny_base, clip=0.1, steps_per_rollout=5, optim=big_steps)
        prepare(stage)
        _, _, values = two_passes(stage, optimizers(stage))
        assert values["clipped"] > 0  # of the last step: by then ratios have left 1 +- 0.1
        with pytest.raises(ValueError, match="steps_per_rollout"):
            PolicyConfig(reward=("a:b",), steps_per_rollout=2)

    def test_not_a_number_stops_before_any_weight_changes(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base)
        prepare(stage)
        before, scored = digest(stage.model, POLICY), score(stage)
        scored.paid[0] = float("nan")
        laid_out = policy_step.each_completion(rollout(), stage)
        with pytest.raises(DivergenceError, match="policy_loss is nan at update 4"):
            policy_step.two_passes(stage, optimizers(stage), scored, laid_out, At(4, 4))
        assert digest(stage.model, POLICY) == before

    def test_norms_are_clipped_per_adapter(self, tiny_base: Path) -> None:
        """A huge policy gradient is cut to norm 1 and leaves the value adapter's small one as it is."""
        stage = new_stage(tiny_base, optim=OptimConfig(beta1=0.0, max_grad_norm=1.0))
        trained = optimizers(stage)
        for name, size in ((POLICY, 100.0), (VALUE, 1e-4)):
            for parameter in stage.model.adapters[name].trainable():
                parameter.grad = torch.full_like(parameter, size)
        values = policy_step.optimise(stage, trained, 1, warming_up=False)
        norm = torch.stack([g.norm() for g in gradients(trained[POLICY])]).norm().item()
        assert norm == pytest.approx(1.0, rel=1e-4) and values["grad_norm"] > 1000
        assert all(torch.allclose(g, torch.full_like(g, 1e-4)) for g in gradients(trained[VALUE]))

    def test_the_value_adapter_has_its_own_learning_rate(self, tiny_base: Path) -> None:
        value = ValueConfig(learning_rate=3e-3, warmup_updates=0)
        stage = new_stage(tiny_base, value=value, optim=OptimConfig(learning_rate=5e-4))
        values = policy_step.optimise(stage, optimizers(stage), 1, warming_up=False)
        assert (values["learning_rate"], values["value_learning_rate"]) == (5e-4, 3e-3)


class TestAtOnce:
    """The pass that scores the policy and learns from it, against its twin in two passes."""

    @pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "none"])
    @pytest.mark.parametrize(
        ("packing", "max_tokens"), [("tree", 10_000), ("tree", 25), ("none", 10_000), ("none", 25)]
    )
    def test_equals_two_passes(self, tiny_base: Path, baseline: str, packing: str, max_tokens: int) -> None:
        found: list[list[Tensor]] = []
        for at_once in (True, False):
            stage = new_stage(tiny_base, baseline=baseline, packing=packing, tokens_per_microbatch=max_tokens)
            prepare(stage)
            trained = optimizers(stage)
            if at_once:
                batches = policy_step.whole_prompts(rollout(), stage)
                assert batches is not None and len(batches) == (1 if max_tokens > 25 else 2)
                told, rewards, values = policy_step.one_pass(stage, trained, score(stage), batches, At(2, 2))
            else:
                told, rewards, values = two_passes(stage, trained)
            numbers = torch.tensor([values[key] for key in ("policy_loss", "advantage_std", "grad_norm")])
            found.append([told.old_logprobs, told.ref_logprobs, rewards, numbers, *gradients(trained[POLICY])])
        assert max(g.abs().max() for g in found[0][4:]) > 1e-3
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_kl_is_exactly_zero_at_step_0(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base, baseline="leave_one_out")
        batches = policy_step.whole_prompts(rollout(), stage)
        assert batches is not None
        told, _, _ = policy_step.one_pass(stage, optimizers(stage), score(stage), batches, At(1, 1))
        assert torch.equal(told.old_logprobs, told.ref_logprobs)
        assert told.old_logprobs[told.mask].abs().min() > 0

    @pytest.mark.parametrize(
        "changed",
        [
            {"baseline": "value"},
            {"advantage_norm": "whiten"},
            {"steps_per_rollout": 2, "clip": 0.2},
            {"tokens_per_microbatch": 5},
        ],
    )
    def test_not_where_it_takes_all_completions_or_a_prompt_does_not_fit(
        self, tiny_base: Path, changed: dict[str, Any]
    ) -> None:
        options: dict[str, Any] = {"baseline": "leave_one_out", **changed}
        stage = new_stage(tiny_base, **options)
        assert policy_step.whole_prompts(rollout(), stage) is None


class TestAdvantages:
    REWARDS = torch.tensor([[1.0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 3, 0], [4.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 6.0]])
    TOTALS = (3.0, 3.0, 5.0, 6.0)
    MASK = length_mask([3, 5, 2, 6])

    def advantages(self, directory: Path, **options: Any) -> Tensor:
        stage = new_stage(directory, **options)
        prepare(stage)
        laid_out, returns, values = policy_step.each_completion(rollout(), stage), returns_of(self.REWARDS), None
        if VALUE in stage.model.adapters:
            values, _ = policy_step.value_pass(stage, rollout(), laid_out, returns, self.MASK)
        return policy_step.advantage_of(stage.config, self.MASK, self.REWARDS, returns, values)

    def test_none(self, tiny_base: Path) -> None:
        assert torch.equal(self.advantages(tiny_base, baseline="none"), returns_of(self.REWARDS))

    def test_leave_one_out(self, tiny_base: Path) -> None:
        # of two completions, each is compared with the other: 3, 3 and 6, 5
        expected = torch.where(self.MASK, returns_of(self.REWARDS) - torch.tensor([[3.0], [3], [6], [5]]), 0)
        torch.testing.assert_close(self.advantages(tiny_base, baseline="leave_one_out"), expected)

    def test_group_mean(self, tiny_base: Path) -> None:
        expected = torch.where(self.MASK, returns_of(self.REWARDS) - torch.tensor([[3.0], [3], [5.5], [5.5]]), 0)
        torch.testing.assert_close(self.advantages(tiny_base, baseline="group_mean"), expected)

    @pytest.mark.parametrize("max_tokens", [1, 10_000])
    def test_value(self, tiny_base: Path, max_tokens: int) -> None:
        stage = new_stage(tiny_base)
        prepare(stage)
        with torch.no_grad():
            rows = [stage.model.values(answers([p], [c]), VALUE)[0] for p, c in zip(ROWS, COMPLETIONS, strict=True)]
        found = self.advantages(tiny_base, tokens_per_microbatch=max_tokens)
        for row, values in enumerate(rows):
            length = len(values)
            expected = returns_of(self.REWARDS)[row, :length] - values
            torch.testing.assert_close(found[row, :length], expected, rtol=0, atol=1e-5)
            assert not found[row, length:].any()

    @pytest.mark.parametrize("max_tokens", [1, 10_000])
    def test_whitening_is_over_the_update_not_per_micro_batch(self, tiny_base: Path, max_tokens: int) -> None:
        options = {"baseline": "none", "tokens_per_microbatch": max_tokens}
        found = self.advantages(tiny_base, advantage_norm="whiten", **options)
        tokens = returns_of(self.REWARDS)[self.MASK].numpy()
        assert len(tokens) == 16
        expected = (tokens - tokens.mean()) / tokens.std()
        np.testing.assert_allclose(found[self.MASK].numpy(), expected, rtol=1e-5)
        assert abs(found[0, :3].mean()) > 0.1  # a row by itself is not centred
        centred = self.advantages(tiny_base, advantage_norm="center", **options)
        np.testing.assert_allclose(centred[self.MASK].numpy(), tokens - tokens.mean(), rtol=1e-5, atol=1e-6)


class TestUnscored:
    """A completion that no source scored is learned from as if it hadn't been sampled."""

    CENTRE = Centre(mean=1.0, std=1.0, penalty=0.5)

    def gradients(self, directory: Path, kept: Sequence[int], given: Sequence[float], **options: Any) -> list[Tensor]:
        """After `two_passes` over some of the rollout's completions, scored so; nan stands for no score."""
        stage = new_stage(directory, lambda asked: list(given), tokens_per_microbatch=10_000, **options)
        prepare(stage)
        whole = rollout()
        part = dataclasses.replace(
            whole,
            prompts=[ROWS[i] for i in kept],
            completions=[COMPLETIONS[i] for i in kept],
            sampler_logprobs=[whole.sampler_logprobs[i] for i in kept],
            ended=[ENDED[i] for i in kept],
            prompt_states=torch.zeros(len({i // 2 for i in kept}), 64),
        )
        scored = policy_step.score(stage, part, stage.prompts[: len(part.prompt_states)], self.CENTRE, 1)
        trained = optimizers(stage)
        if laid_out := policy_step.whole_prompts(part, stage):
            policy_step.one_pass(stage, trained, scored, laid_out, At(2, 2))
        else:
            policy_step.two_passes(stage, trained, scored, policy_step.each_completion(part, stage), At(2, 2))
        return [gradient for optimizer in trained.values() for gradient in gradients(optimizer)]

    @pytest.mark.parametrize(
        "options",
        [
            {"baseline": "value"},
            {"baseline": "none"},
            {"baseline": "value", "advantage_norm": "whiten"},
            {"baseline": "value", "clip": 0.2},
        ],
    )
    def test_it_leaves_no_gradient_behind(self, tiny_base: Path, options: dict[str, Any]) -> None:
        nan = float("nan")
        found = self.gradients(tiny_base, [0, 1, 2, 3], [3.0, nan, 1.0, nan], **options)
        expected = self.gradients(tiny_base, [0, 2], [3.0, 1.0], completions_per_prompt=1, **options)
        assert max(g.abs().max() for g in expected) > 1e-3
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
    def test_it_is_nobodys_baseline(self, tiny_base: Path, baseline: str) -> None:
        """A prompt's only scored completion has nothing to be compared with; a mere 0 for the other would teach it."""
        nan = float("nan")
        found = self.gradients(tiny_base, [0, 1], [3.0, nan], baseline=baseline, kl_coef=0.0)
        assert max(g.abs().max() for g in found) == 0

    def test_a_reference_without_any_score_is_an_error(self, tiny_base: Path) -> None:
        with pytest.raises(RewardFunctionError, match="none of 4 completions of the reference got a score: given:dir"):
            held_out.centre_of(new_stage(tiny_base, constant(float("nan"))))


class TestSteps:
    """Whole steps of the loop."""

    CENTRE = Centre(mean=1.0, std=1.0, penalty=0.0)

    def step(self, stage: Setup, steps: int = 1) -> list[dict[str, float]]:
        trained = optimizers(stage)
        done = [policy_step.policy_step(stage, trained, self.CENTRE, At(step, step)) for step in range(1, steps + 1)]
        return [policy_stage._values(each) for each in done]

    def test_cold_start_of_the_value(self, tiny_base: Path) -> None:
        """All scores 3, centred by 1: returns are 0.95 * 2 everywhere, which the value predicts before it learns."""
        stage = new_stage(
            tiny_base, constant(3.0), kl_coef=0.05, value=ValueConfig(learning_rate=1e-6, warmup_updates=1)
        )
        head, bias = stage.model.adapters[VALUE].score_head, stage.model.adapters[VALUE].bias
        assert head is not None and bias is not None and not head.any() and bias.item() == 0
        (values,) = self.step(stage)
        assert values["kl"] == 0 and values["reward_mean"] == pytest.approx(1.9)
        assert bias.item() == pytest.approx(1.9, abs=1e-5)
        assert values["value_loss"] == pytest.approx(0, abs=1e-9)
        assert values["advantage_std"] == pytest.approx(0, abs=1e-6)

    def test_value_learns_alone_at_first(self, tiny_base: Path) -> None:
        stage = new_stage(tiny_base, value=ValueConfig(warmup_updates=2))
        start = {name: digest(stage.model, name) for name in (POLICY, VALUE, SFT)}
        first = self.step(stage, 2)
        assert [values["policy_loss"] for values in first] == [0, 0] and "grad_norm" not in first[0]
        assert digest(stage.model, POLICY) == start[POLICY] and digest(stage.model, VALUE) != start[VALUE]
        third = self.step(stage, 3)[-1]
        assert third["grad_norm"] > 0 and digest(stage.model, POLICY) != start[POLICY]
        assert digest(stage.model, SFT) == start[SFT]

    def test_the_schedule_of_the_policy_counts_its_own_updates(self, tiny_base: Path) -> None:
        """Two of six updates are the value's alone; of the policy's four, two warm it up, and then it sinks to 0."""
        rates = OptimConfig(learning_rate=0.4, warmup_updates=2, schedule="linear")
        value = ValueConfig(warmup_updates=2, learning_rate=0.6)
        stage = new_stage(tiny_base, value=value, optim=rates, updates=6)
        trained = optimizers(stage)
        done = [policy_step.optimise(stage, trained, number, warming_up=number <= 2) for number in range(1, 7)]
        assert [values.get("learning_rate") for values in done] == [None, None, 0.2, 0.4, 0.4, 0.2]
        own = [0.3, 0.6, 0.6, 0.45, 0.3, 0.15]
        assert [values["value_learning_rate"] for values in done] == pytest.approx(own)

    def test_an_update_without_scores_learns_nothing_and_is_not_counted(self, tiny_base: Path) -> None:
        """Were it counted, the value would neither start at the first return nor learn alone first."""
        stage = new_stage(tiny_base, constant(float("nan")), value=ValueConfig(warmup_updates=1))
        trained = optimizers(stage)
        before = {name: digest(stage.model, name) for name in (POLICY, VALUE)}
        done = policy_step.policy_step(stage, trained, self.CENTRE, At(1, 1))
        assert not done.scored.given.any() and done.rewards.shape == done.known.mask.shape and not done.rewards.any()
        assert {"unscored", "kl", "entropy"} <= (values := policy_stage._values(done)).keys()
        assert not {"score_mean", "policy_loss", "grad_norm", "value_grad_norm"} & values.keys()
        assert before == {name: digest(stage.model, name) for name in before}
        scored = dataclasses.replace(stage, scorers=Scorers((), (constant(3.0),), "mean"))
        values = policy_step.policy_step(scored, trained, self.CENTRE, At(2, 1)).values
        bias = stage.model.adapters[VALUE].bias
        assert bias is not None and bias.item() == pytest.approx(1.9, abs=1e-3)
        assert "grad_norm" not in values and digest(stage.model, POLICY) == before[POLICY]

    def test_gap_between_sampler_and_trainer_is_reported(self, tiny_base: Path) -> None:
        (values,) = self.step(new_stage(tiny_base))
        assert 0 <= values["sampler_gap_mean"] <= values["sampler_gap_max"] < 1e-4

    @pytest.mark.parametrize("stale", [None, SFT])
    def test_a_stale_sampler_stops_the_run(
        self, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, stale: str | None
    ) -> None:
        """Planted: an engine that goes on with the base, or with the weights of step 0, and claims the current ones."""
        stage = new_stage(tiny_base)
        randomise(stage.model, POLICY, 2)

        def engine(model: Model, prompts: Any, *, adapter: str | None, **options: Any) -> Rollout:
            rolled = sample(model, prompts, adapter=stale, **options)
            return dataclasses.replace(rolled, adapter_version=model.version(adapter))

        monkeypatch.setattr(local, "sample", engine)
        before = digest(stage.model, POLICY)
        with pytest.raises(StaleSamplerError, match="'policy'"):
            self.step(stage)
        assert digest(stage.model, POLICY) == before

    def test_repeats_bit_for_bit(self, tiny_base: Path) -> None:
        digests = []
        for _ in range(2):
            stage = new_stage(tiny_base)
            self.step(stage, 2)
            digests.append((digest(stage.model, POLICY), digest(stage.model, VALUE)))
        assert digests[0] == digests[1]
