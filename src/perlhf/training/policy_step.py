"""One step of the policy in the paper's words: sample, score, reward, advantage, loss, step.

The objective is that of arXiv 2403.10704, section 3.3, the loop that of arXiv 2309.00267, appendix: REINFORCE on
J = (1 - kl_coef) score - kl_coef KL, with a learned value as the baseline. Ways to depart from it are visible choices
below: another baseline, PPO's clip with several steps a rollout, and one pass of the policy instead of two where a
micro-batch tells its own advantages.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perlhf.config.stages import PolicyConfig
from perlhf.data.records import Prompt
from perlhf.method import advantages
from perlhf.method.losses import completion_ratio, policy_loss, value_loss
from perlhf.method.packing import Batch, completed, join_rows, length_mask, microbatches, rows_of
from perlhf.model.model import Model
from perlhf.parallel.shares import own_batches
from perlhf.rollout.ahead import Ahead, check_gap, padded
from perlhf.rollout.completions import (
    Centre,
    Scored,
    Setup,
    prompt_numbers,
    proof,
    reference_scores,
    sample_completions,
    score,
)
from perlhf.rollout.local import Rollout
from perlhf.training import loop, optim

POLICY, VALUE = "policy", "value"
Optimizers = dict[str, torch.optim.AdamW]


@dataclass(frozen=True)
class Known:
    """What the network says of all completion tokens, [batch, time], 0 beyond each completion."""

    old_logprobs: Tensor
    """Under the policy that sampled them."""
    ref_logprobs: Tensor
    entropy: Tensor
    mask: Tensor
    """True at completion tokens."""


@dataclass(frozen=True)
class At:
    """Which update it is, both from 1."""

    step: int
    """Of the run: keys what is drawn."""
    number: int
    """Of those that learn, updates without any score left out: what warm-ups and schedules go by."""


@dataclass(frozen=True)
class Step:
    """What one step did: completions, their rewards [batch, time] and numbers for metrics.jsonl."""

    prompts: list[Prompt]
    scored: Scored
    known: Known
    rewards: Tensor
    kl: Tensor
    """To the reference, of each completion, in nats: [batch]."""
    weights: Tensor
    """How much each completion counts: [batch] (`weights_of`)."""
    sampler_step: int
    """Updates that the policy which sampled had learned from."""
    values: dict[str, float]


def policy_step(setup: Setup, optimizers: Optimizers, centre: Centre, at: At, ahead: Ahead | None = None) -> Step:
    """Samples completions of the step's prompts, scores them and learns from them: nothing, where none has a score.

    Args:
        ahead: has sampled them, and samples the next step's meanwhile (`staleness: 1`).

    Raises:
        StaleSamplerError: the sampler didn't use the current adapter.
        DivergenceError: a loss, gradient or KL isn't finite or has exploded.
        RewardFunctionError, ServiceError: a reward failed, or a server that samples; nothing was learned.
        Interrupted: a stop was asked while one of these was waited for; nothing was learned.
    """
    config, step, began = setup.config, at.step, time.perf_counter()
    numbers, sampler_step, ahead_seconds = prompt_numbers(setup, step), step - 1, 0.0
    prompts = [setup.prompts[i] for i in numbers]
    if ahead is None:
        given = setup, prompts, POLICY, config.completions_per_prompt, step, numbers
        rollout = sample_completions(*given, proof(setup, POLICY))
    else:
        rollout, sampler_step, ahead_seconds = ahead.take(step), ahead.learned, ahead.seconds
        ahead.begin(step + 1, step - 1)
    sampled = time.perf_counter()
    against = reference_scores(setup, prompts, centre, step, numbers) if config.bounded else None
    scored = score(setup, rollout, prompts, centre, step - 1, against)
    scored_at = time.perf_counter()
    if not scored.given.any():
        known = logprobs_of_all(setup, rollout, each_completion(rollout, setup), POLICY)
        rewards, values = torch.zeros_like(known.old_logprobs), dict[str, float]()
    elif (laid_out := whole_prompts(rollout, setup)) is not None:
        known, rewards, values = one_pass(setup, optimizers, scored, laid_out, at)
    else:
        known, rewards, values = two_passes(setup, optimizers, scored, each_completion(rollout, setup), at)
    values |= {"seconds_sample": sampled - began, "seconds_score": scored_at - sampled}
    values["seconds_learn"] = time.perf_counter() - scored_at
    kl = advantages.completion_kl(known.old_logprobs, known.ref_logprobs, known.mask)
    weights = weights_of(setup, known.old_logprobs, padded(rollout, known.mask), known.mask)
    if config.off_policy:
        values |= {"ratio_mean": weights.mean().item(), "ratio_max": weights.max().item()}
    if ahead is not None:
        values["seconds_ahead"] = ahead_seconds
    if setup.server is not None:
        values |= setup.server.spent()
    return Step(prompts, scored, known, rewards, kl, weights, sampler_step, values)


def two_passes(
    setup: Setup, optimizers: Optimizers, scored: Scored, laid_out: Sequence[Batch], at: At
) -> tuple[Known, Tensor, dict[str, float]]:
    """A pass for the log-probabilities that advantages need, then `steps_per_rollout` passes that learn."""
    config, values = setup.config, dict[str, float]()
    known = logprobs_of_all(setup, scored.rollout, laid_out, POLICY)
    check_known(setup, known, scored.rollout, at.step)
    weights = weights_of(setup, known.old_logprobs, padded(scored.rollout, known.mask), known.mask)
    paid, price = torch.from_numpy(scored.paid).float().to(setup.model.device), config.kl_coef
    rewards = advantages.token_rewards(paid, known.old_logprobs, known.ref_logprobs, known.mask, kl_coef=price)
    returns = advantages.returns_to_go(rewards)
    given = torch.from_numpy(scored.given).to(setup.model.device)
    mask = known.mask & given[:, None]
    if VALUE in optimizers and at.number == 1:
        start_value(setup.model, returns[mask].mean().item())
    warming_up = VALUE in optimizers and at.number <= config.value.warmup_updates
    advantage = torch.zeros_like(rewards)
    for number in range(config.steps_per_rollout):
        # Values first: the pass that learns them gives those of the advantages too, since no weight moves before the
        # optimisers' steps.
        predicted, losses = None, {"policy_loss": 0.0, "value_loss": 0.0, "clipped": 0.0}
        if VALUE in optimizers:
            predicted, losses["value_loss"] = value_pass(setup, scored.rollout, laid_out, returns, mask, weights)
        if number == 0:
            advantage = advantage_of(config, mask, rewards, returns, predicted) * weights[:, None]
        if not warming_up:
            losses["policy_loss"], losses["clipped"] = policy_pass(setup, laid_out, known, advantage, mask)
        values |= step_on(setup, optimizers, losses, advantage, mask, at, warming_up)
    return known, rewards, values


def one_pass(
    setup: Setup, optimizers: Optimizers, scored: Scored, laid_out: Sequence[Batch], at: At
) -> tuple[Known, Tensor, dict[str, float]]:
    """The pass that tells the old log-probabilities learns from them, too: on-policy they are the same ones.

    Args:
        laid_out: as `whole_prompts` gives them.
    """
    config, model, divisor = setup.config, setup.model, int(scored.given.sum())
    all_paid, price = torch.from_numpy(scored.paid).float().to(model.device), config.kl_coef
    all_given = torch.from_numpy(scored.given).to(model.device)
    sampled = padded(scored.rollout, mask_of(scored.rollout, setup))
    losses, parts = {"policy_loss": 0.0, "value_loss": 0.0, "clipped": 0.0}, []
    for batch in laid_out:
        with torch.no_grad():
            reference = model.logprobs(batch, setup.reference, temperature=config.temperature)
        now = model.logprobs(batch, POLICY, temperature=config.temperature)
        paid, given = all_paid[list(batch.sequences)], all_given[list(batch.sequences)]
        rewards = advantages.token_rewards(paid, now.logprobs, reference.logprobs, batch.completion_mask, kl_coef=price)
        mask = batch.completion_mask & given[:, None]
        weights = weights_of(setup, now.logprobs, rows_of(sampled, batch), batch.completion_mask)
        returns = advantages.returns_to_go(rewards)
        advantage = advantage_of(config, mask, rewards, returns, None) * weights[:, None]
        loss, counted = policy_loss(now.logprobs, now.logprobs, advantage, mask, clip=config.clip, divisor=divisor)
        loss.backward()
        losses["policy_loss"] += loss.item()
        losses["clipped"] += counted["clipped"]
        parts.append((now.logprobs.detach(), reference.logprobs, now.entropy, rewards, advantage))
    columns = whole_update(setup, scored.rollout, laid_out, parts, 5)
    logprobs, ref_logprobs, entropy, rewards, advantage = columns
    known = Known(logprobs, ref_logprobs, entropy, mask_of(scored.rollout, setup))
    check_known(setup, known, scored.rollout, at.step)
    mask = known.mask & all_given[:, None]
    return known, rewards, step_on(setup, optimizers, losses, advantage, mask, at, warming_up=False)


def advantage_of(config: PolicyConfig, mask: Tensor, rewards: Tensor, returns: Tensor, values: Tensor | None) -> Tensor:
    """How much better each token did than the baseline: [batch, time], normalised over all tokens of the mask.

    Args:
        mask: tokens of completions that have a score; the others get 0, and are nobody's baseline.
    """
    match config.baseline:
        case "value":
            assert values is not None
            advantage = returns - values  # the paper's
            if config.gae_lambda < 1:
                advantage = advantages.gae(rewards, values, mask, gae_lambda=config.gae_lambda)
        case "leave_one_out" | "group_mean":
            totals = rewards.sum(-1)
            size, kind = config.completions_per_prompt, config.baseline
            others = advantages.group_baseline(totals, size, baseline=kind, scored=mask.any(-1))
            advantage = returns - others[:, None]
        case "none":
            advantage = returns
    advantage = torch.where(mask, advantage, 0.0)
    return advantages.normalise(advantage, mask, config.advantage_norm)


def value_pass(
    setup: Setup,
    rollout: Rollout,
    laid_out: Sequence[Batch],
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Gradients of the value loss over the tokens of the mask; the values [batch, time] and the loss.

    Gradients and loss are those of this worker's share, the divisor is that of all.
    """
    total, parts, divisor = 0.0, [], completions_in(mask)
    for batch in laid_out:
        predicted = setup.model.values(batch, VALUE)
        own = None if weights is None else weights[list(batch.sequences)]
        loss, _ = value_loss(predicted, rows_of(returns, batch), rows_of(mask, batch), divisor=divisor, weights=own)
        loss.backward()
        total += loss.item()
        parts.append((predicted.detach(),))
    (values,) = whole_update(setup, rollout, laid_out, parts, 1)
    return values, total


def policy_pass(
    setup: Setup, laid_out: Sequence[Batch], known: Known, advantage: Tensor, mask: Tensor
) -> tuple[float, float]:
    """Gradients of the policy loss over the tokens of the mask; the loss and the number of clipped tokens."""
    config, total, clipped, divisor = setup.config, 0.0, 0.0, completions_in(mask)
    for batch in laid_out:
        now = setup.model.logprobs(batch, POLICY, temperature=config.temperature)
        old, own = rows_of(known.old_logprobs, batch), rows_of(advantage, batch)
        loss, counted = policy_loss(now.logprobs, old, own, rows_of(mask, batch), clip=config.clip, divisor=divisor)
        loss.backward()
        total, clipped = total + loss.item(), clipped + counted["clipped"]
    return total, clipped


def step_on(
    setup: Setup,
    optimizers: Optimizers,
    losses: dict[str, float],
    advantage: Tensor,
    mask: Tensor,
    at: At,
    warming_up: bool,
) -> dict[str, float]:
    """The optimisers' step on the gradients that all workers have, unless a loss isn't finite; numbers for
    metrics.jsonl.
    """
    losses = setup.workers.numbers(losses)
    for key, value in losses.items():
        loop.check_bounded(key, value, at.step)
    values = losses | {"clipped": losses["clipped"] / max(1, int(mask.sum()))}
    values["advantage_std"] = advantage[mask].std(correction=0).item()
    return values | optimise(setup, optimizers, at.number, warming_up)


def optimise(setup: Setup, optimizers: Optimizers, number: int, warming_up: bool) -> dict[str, float]:
    """Clips and steps each adapter that learns now; the gradients' norms and the learning rates.

    The policy's schedule begins where the value no longer learns alone: it counts the policy's own updates.

    Args:
        number: of the update, among those that learn.
    """
    config = setup.config
    alone = config.value.warmup_updates if VALUE in optimizers else 0
    peaks = {POLICY: config.learning_rate, VALUE: config.value_learning_rate}
    out: dict[str, float] = {}
    learning = {name: optimizer for name, optimizer in optimizers.items() if not (name == POLICY and warming_up)}
    setup.workers.sum_gradients(p for name in learning for p in setup.model.adapters[name].trainable())
    for name, optimizer in learning.items():
        before = alone if name == POLICY else 0
        rate = optim.learning_rate_at(number - before, config.updates - before, peaks[name], config.optim)
        norm = loop.optimiser_step(optimizer, setup.model.adapters[name], rate, config.optim.max_grad_norm)
        prefix = "" if name == POLICY else "value_"
        out |= {f"{prefix}grad_norm": norm, f"{prefix}learning_rate": rate}
    return out


def start_value(model: Model, mean: float) -> None:
    """The value predicts the first rollout's mean return before it learns."""
    bias = model.adapters[VALUE].bias
    assert bias is not None
    bias.data.fill_(mean)


def weights_of(setup: Setup, logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """How much each completion counts: [batch], the ratio of the policy to what sampled it, where that is another."""
    if not setup.config.off_policy:
        return torch.ones(len(mask), device=mask.device)
    return completion_ratio(logprobs, sampler_logprobs, mask, limit=setup.config.max_ratio)


def check_known(setup: Setup, known: Known, rollout: Rollout, step: int) -> None:
    """Raises DivergenceError where the KL to the reference has exploded, or the gap to what sampled."""
    kl = advantages.completion_kl(known.old_logprobs, known.ref_logprobs, known.mask)
    loop.check_bounded("kl", kl.mean().item(), step, loop.KL_LIMIT)
    if setup.config.off_policy:
        gap = (padded(rollout, known.mask) - known.old_logprobs)[known.mask].abs().mean().item()
        check_gap(gap, setup.config.max_sampler_gap, step, setup.server is not None)


def completions_in(mask: Tensor) -> int:
    """How many completions have tokens in a mask [batch, time]."""
    return int(mask.any(-1).sum())


# ---- micro-batches and the tensors of a whole update -----------------------------------------------------------------


def each_completion(rollout: Rollout, setup: Setup) -> list[Batch]:
    """This worker's micro-batches of prompts with their completions."""
    examples = [[completed(p, c)] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    return own_batches(examples, setup.config.microbatch_tokens, setup.packing, setup.model.device, setup.workers)


def whole_prompts(rollout: Rollout, setup: Setup) -> list[Batch] | None:
    """This worker's micro-batches that hold all completions of their prompts, so that each tells its own advantages.

    None where it takes all completions to tell them (a value adapter, normalisation, several steps a rollout) or where
    those of one prompt don't fit.
    """
    config = setup.config
    if config.baseline == "value" or config.advantage_norm != "none" or config.steps_per_rollout > 1:
        return None
    samples = config.completions_per_prompt
    rows = [completed(p, c) for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    examples = [rows[at : at + samples] for at in range(0, len(rows), samples)]
    for example in examples:
        if len(microbatches([[row.ids] for row in example], config.microbatch_tokens, setup.packing)) > 1:
            return None
    return own_batches(examples, config.microbatch_tokens, setup.packing, setup.model.device, setup.workers)


def mask_of(rollout: Rollout, setup: Setup) -> Tensor:
    """True at completion tokens: [batch, time] of the whole update."""
    return length_mask([len(ids) for ids in rollout.completions], setup.model.device)


def whole_update(
    setup: Setup, rollout: Rollout, laid_out: Sequence[Batch], parts: Sequence[tuple[Tensor, ...]], count: int
) -> list[Tensor]:
    """Tensors of the whole update [batch, time] from those of all workers' micro-batches.

    Args:
        laid_out: this worker's micro-batches.
        parts: `count` tensors [batch, time] of each.
    """
    shape = len(rollout.completions), max(map(len, rollout.completions))
    columns = [join_rows(laid_out, [part[column] for part in parts], shape) for column in range(count)]
    whole = torch.stack([column.to(setup.model.device) for column in columns])
    return list(setup.workers.sum(whole))


@torch.no_grad()
def logprobs_of_all(setup: Setup, rollout: Rollout, laid_out: Sequence[Batch], adapter: str | None) -> Known:
    """Log-probabilities under `adapter` and the reference, on the same layouts (so that equal weights give KL 0).

    Args:
        laid_out: this worker's micro-batches of the rollout.
    """
    model, temperature, parts = setup.model, setup.config.temperature, []
    for batch in laid_out:
        now = reference = model.logprobs(batch, adapter, temperature=temperature)
        if adapter != setup.reference:
            reference = model.logprobs(batch, setup.reference, temperature=temperature)
        parts.append((now.logprobs, reference.logprobs, now.entropy))
    logprobs, ref_logprobs, entropy = whole_update(setup, rollout, laid_out, parts, 3)
    return Known(logprobs, ref_logprobs, entropy, mask_of(rollout, setup))
