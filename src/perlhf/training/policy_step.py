"""What a policy learns from a rollout: scores, log-probabilities, advantages, gradients and optimiser steps.

A step takes two passes of the policy, one for the old log-probabilities and one that learns (`score`, `learn`), or one
that does both where a micro-batch tells its own advantages (`whole_prompts`, `learn_at_once`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perlhf.config.stages import PolicyConfig
from perlhf.data.records import Prompt
from perlhf.method import advantages
from perlhf.method.losses import policy_loss, value_loss
from perlhf.method.packing import length_mask, microbatches
from perlhf.model.encode import Encoder
from perlhf.model.model import Model, TokenLogprobs
from perlhf.rollout.local import Rollout
from perlhf.rollout.rewards import Rewards
from perlhf.training import loop, optim

POLICY, VALUE = "policy", "value"


@dataclass(frozen=True)
class Centre:
    """The reference's scores before training: what is subtracted, and the price of a missing end token."""

    mean: float
    std: float
    penalty: float


@dataclass(frozen=True)
class Scored:
    """A rollout with everything that learning needs, all [batch, time] but `scores` and `rewards` [batch]."""

    rollout: Rollout
    scores: np.ndarray
    """Raw, before centring and penalty."""
    paid: np.ndarray
    """Centred, missing ends penalised."""
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    mask: Tensor

    def fill(self, rows: Sequence[int], now: TokenLogprobs, reference: TokenLogprobs) -> None:
        """Puts in what a pass over these completions has found."""
        width = now.mask.shape[1]
        self.old_logprobs[rows, :width] = now.logprobs.detach()
        self.ref_logprobs[rows, :width] = reference.logprobs
        self.entropy[rows, :width] = now.entropy


@dataclass(frozen=True)
class Stage:
    """What every step uses and nothing changes."""

    config: PolicyConfig
    model: Model
    encoder: Encoder
    rewards: Rewards
    prompts: list[Prompt]
    held_out: list[Prompt]
    reference: str | None


def whole_prompts(rollout: Rollout, config: PolicyConfig) -> list[list[int]] | None:
    """Micro-batches that hold all completions of their prompts, so that each tells its own advantages.

    None where it takes all completions to tell them (a value adapter, normalisation, several steps a rollout) or where
    those of one prompt don't fit.
    """
    if config.baseline == "value" or config.advantage_norm != "none" or config.steps_per_rollout > 1:
        return None
    samples = len(rollout.completions) // len(rollout.prompt_states)
    rows = [(*p, *c) for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    examples = [rows[at : at + samples] for at in range(0, len(rows), samples)]
    most = max(len(microbatches([[r] for r in e], config.microbatch_tokens, config.packing)) for e in examples)
    if most > 1:
        return None
    batches = microbatches(examples, config.microbatch_tokens, config.packing)
    return [[number * samples + k for number in batch for k in range(samples)] for batch in batches]


def raw_scores(stage: Stage, rollout: Rollout, prompts: Sequence[Prompt]) -> np.ndarray:
    """Scores [batch] as the rewards give them; each prompt has equally many completions."""
    config = stage.config
    samples = len(rollout.completions) // len(prompts)
    texts = [record.prompt for record in prompts for _ in range(samples)]
    return stage.rewards.scores(
        stage.model,
        stage.encoder,
        rollout.prompts,
        rollout.completions,
        texts,
        config.microbatch_tokens,
        config.packing,
    )


@torch.no_grad()
def without_logprobs(stage: Stage, rollout: Rollout, prompts: Sequence[Prompt], centre: Centre) -> Scored:
    """Scores; log-probabilities and entropy are still 0."""
    model = stage.model
    raw = raw_scores(stage, rollout, prompts)
    paid = raw - centre.mean - np.where(rollout.ended, 0.0, centre.penalty)
    mask = length_mask([len(ids) for ids in rollout.completions], model.device)
    old, ref, entropy = (torch.zeros(mask.shape, device=model.device) for _ in range(3))
    return Scored(rollout, raw, paid, old, ref, entropy, mask)


@torch.no_grad()
def score(stage: Stage, rollout: Rollout, prompts: Sequence[Prompt], centre: Centre, adapter: str | None) -> Scored:
    """Scores, and log-probabilities under `adapter` and the reference on the same batch layouts (so equal weights
    give KL 0).
    """
    config, model = stage.config, stage.model
    scored = without_logprobs(stage, rollout, prompts, centre)
    for batch in _microbatches(rollout, config):
        chosen = [rollout.prompts[i] for i in batch], [rollout.completions[i] for i in batch]
        now = model.logprobs(*chosen, adapter, temperature=config.temperature, packing=config.packing)
        reference = now
        if adapter != stage.reference:
            reference = model.logprobs(*chosen, stage.reference, temperature=config.temperature, packing=config.packing)
        scored.fill(batch, now, reference)
    return scored


def token_rewards(scored: Scored, config: PolicyConfig, rows: Sequence[int] | None = None) -> Tensor:
    """Reward of each token [rows, time]: the score at the end, the KL's price everywhere."""
    chosen = list(range(len(scored.scores))) if rows is None else list(rows)
    return advantages.token_rewards(
        torch.from_numpy(scored.paid[chosen]).float().to(scored.mask.device),
        scored.old_logprobs[chosen],
        scored.ref_logprobs[chosen],
        scored.mask[chosen],
        kl_coef=config.kl_coef,
    )


def bounded_kl(scored: Scored, step: int) -> Tensor:
    """KL [batch]; raises DivergenceError where it has exploded."""
    kl = advantages.completion_kl(scored.old_logprobs, scored.ref_logprobs, scored.mask)
    loop.check_bounded("kl", kl.mean().item(), step, loop.KL_LIMIT)
    return kl


def learn(
    stage: Stage,
    optimizers: dict[str, torch.optim.AdamW],
    scored: Scored,
    rewards: Tensor,
    returns: Tensor,
    step: int,
) -> dict[str, float]:
    """Advantages, then `steps_per_rollout` optimiser steps of policy and value on the rollout."""
    config = stage.config
    warming_up = VALUE in optimizers and step <= config.value.warmup_updates
    values: dict[str, float] = {}
    advantage = torch.zeros_like(rewards)
    for number in range(config.steps_per_rollout):
        summed = {"policy_loss": 0.0, "value_loss": 0.0, "clipped": 0.0}
        predicted = None
        if VALUE in optimizers:
            # Values first: the pass that learns them gives those of the advantages too, since no weight moves before
            # `optimise`.
            predicted, summed["value_loss"] = value_pass(stage, scored, returns)
        if number == 0:
            advantage = advantages_of(config, scored.mask, rewards, returns, predicted)
            values["advantage_std"] = advantage[scored.mask].std(correction=0).item()
        if not warming_up:
            summed["policy_loss"], summed["clipped"] = _policy_pass(stage, scored, advantage)
        for key, value in summed.items():
            loop.check_bounded(key, value, step)
        values |= summed | {"clipped": summed["clipped"] / max(1, int(scored.mask.sum()))}
        values |= optimise(stage, optimizers, step, warming_up)
    return values


def value_pass(stage: Stage, scored: Scored, returns: Tensor) -> tuple[Tensor, float]:
    """Gradients of the value loss; the values [batch, time] and the loss."""
    config, total = stage.config, 0.0
    values = torch.zeros_like(returns)
    for batch in _microbatches(scored.rollout, config):
        prompts = [scored.rollout.prompts[i] for i in batch]
        chosen = [scored.rollout.completions[i] for i in batch]
        predicted = stage.model.values(prompts, chosen, VALUE, packing=config.packing)
        width = predicted.shape[1]
        mask = scored.mask[batch, :width]
        loss, _ = value_loss(predicted, returns[batch, :width], mask, divisor=len(scored.rollout.completions))
        loss.backward()
        total += loss.item()
        values[batch, :width] = predicted.detach()
    return values, total


def _policy_pass(stage: Stage, scored: Scored, advantage: Tensor) -> tuple[float, float]:
    """Gradients of the policy loss; the loss and the number of clipped tokens."""
    config, total, clipped = stage.config, 0.0, 0.0
    for batch in _microbatches(scored.rollout, config):
        prompts = [scored.rollout.prompts[i] for i in batch]
        chosen = [scored.rollout.completions[i] for i in batch]
        now = stage.model.logprobs(prompts, chosen, POLICY, temperature=config.temperature, packing=config.packing)
        loss, outside = _policy_backward(config, scored, batch, now, advantage)
        total, clipped = total + loss, clipped + outside
    return total, clipped


def learn_at_once(stage: Stage, scored: Scored, batches: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, float]]:
    """Fills `scored` and forms the policy's gradients in the same pass: no other one tells the old log-probabilities,
    which on-policy are those that are learned from. Returns the rewards of all tokens and the losses.

    Args:
        batches: as `whole_prompts` gives them.
    """
    config, model = stage.config, stage.model
    rewards, advantage = torch.zeros_like(scored.old_logprobs), torch.zeros_like(scored.old_logprobs)
    values = {"policy_loss": 0.0, "value_loss": 0.0, "clipped": 0.0}
    for batch in batches:
        chosen = [scored.rollout.prompts[i] for i in batch], [scored.rollout.completions[i] for i in batch]
        with torch.no_grad():
            reference = model.logprobs(*chosen, stage.reference, temperature=config.temperature, packing=config.packing)
        now = model.logprobs(*chosen, POLICY, temperature=config.temperature, packing=config.packing)
        scored.fill(batch, now, reference)
        rewards[batch] = token_rewards(scored, config, batch)
        returns = advantages.returns_to_go(rewards[batch])
        advantage[batch] = advantages_of(config, scored.mask[batch], rewards[batch], returns, None)
        loss, outside = _policy_backward(config, scored, batch, now, advantage)
        values["policy_loss"] += loss
        values["clipped"] += outside
    values["clipped"] /= max(1, int(scored.mask.sum()))
    values["advantage_std"] = advantage[scored.mask].std(correction=0).item()
    return rewards, values


def _policy_backward(
    config: PolicyConfig, scored: Scored, batch: Sequence[int], now: TokenLogprobs, advantage: Tensor
) -> tuple[float, float]:
    """Adds the gradients of these completions' part of the policy loss; that part and the number of clipped tokens."""
    width = now.mask.shape[1]
    loss, metrics = policy_loss(
        now.logprobs,
        scored.old_logprobs[batch, :width],
        advantage[batch, :width],
        now.mask,
        clip=config.clip,
        divisor=len(scored.rollout.completions),
    )
    loss.backward()
    return loss.item(), metrics["clipped"]


def advantages_of(
    config: PolicyConfig, mask: Tensor, rewards: Tensor, returns: Tensor, values: Tensor | None
) -> Tensor:
    """[batch, time], after the chosen baseline and normalisation over all tokens given."""
    match config.baseline:
        case "value":
            assert values is not None
            advantage = advantages.gae(rewards, values, mask, gae_lambda=config.gae_lambda)
        case "leave_one_out" | "group_mean":
            totals = rewards.sum(-1)
            baseline = advantages.group_baseline(totals, config.completions_per_prompt, baseline=config.baseline)
            advantage = torch.where(mask, returns - baseline[:, None], 0.0)
        case "none":
            advantage = returns
    return advantages.normalise(advantage, mask, config.advantage_norm)


def optimise(stage: Stage, optimizers: dict[str, torch.optim.AdamW], step: int, warming_up: bool) -> dict[str, float]:
    """Clips and steps each adapter that learns now; the gradients' norms and the learning rates."""
    config = stage.config
    peaks = {POLICY: config.learning_rate, VALUE: config.value_learning_rate}
    out: dict[str, float] = {}
    for name, optimizer in optimizers.items():
        if name == POLICY and warming_up:
            continue
        rate = optim.learning_rate_at(step, config.updates, peaks[name], config.optim)
        adapter = stage.model.adapters[name]
        norm = loop.optimiser_step(optimizer, adapter, rate, config.optim.max_grad_norm)
        prefix = "" if name == POLICY else "value_"
        out |= {f"{prefix}grad_norm": norm, f"{prefix}learning_rate": rate}
    return out


def _microbatches(rollout: Rollout, config: PolicyConfig) -> list[list[int]]:
    rows = [[(*p, *c)] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    return microbatches(rows, config.microbatch_tokens, config.packing)
