"""Policy stage: REINFORCE with a KL anchor and a learned value baseline, every trained part a LoRA adapter on one base.

The paper's objective (arXiv 2403.10704, section 3.3; loop of arXiv 2309.00267, appendix): reward = (1 - beta) score
- beta KL
folded in per token, gamma 1, loss = -sum logprobs * stopgrad(return - value), separate value adapter. Added, since the
paper is silent: scores are centred by the reference's mean, the value head starts at the first rollout's mean
return, and a
completion without end token pays a penalty. Not included: dropout, several epochs without `clip`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perlhf import advantages, optim, order, store, training
from perlhf.config import PolicyConfig
from perlhf.data import load
from perlhf.data.records import Prompt
from perlhf.encode import Encoder
from perlhf.environment import peak_memory_bytes
from perlhf.losses import policy_loss, value_loss
from perlhf.model import Model, TokenLogprobs
from perlhf.packing import length_mask, microbatches
from perlhf.rewards import Rewards, load_rewards
from perlhf.run import Run, open_run
from perlhf.sampler import Rollout, probe, sample, uniforms
from perlhf.training import Best, Interrupted

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


def train_policy(config: PolicyConfig) -> dict[str, Any]:
    """Trains a policy (and value) adapter into `config.run` and returns its result.

    Raises:
        StaleSamplerError: the sampler didn't use the current adapter.
        DivergenceError: a loss or gradient isn't finite; the last checkpoint is kept.
        DataError, ConfigError, ModelError, AdapterError, RunError: as the parts say.
    """
    with open_run(config.run, "policy", config, training.facts(config)) as run:
        if run.finished:
            return run.result()
        stage = _open(config)
        model = stage.model
        optimizers = optim.build(
            {POLICY: (model.adapters[POLICY].trainable(), config.learning_rate)}
            | (
                {VALUE: (model.adapters[VALUE].trainable(), config.value_learning_rate)}
                if VALUE in model.adapters
                else {}
            ),
            config.optim,
        )
        step, best, state = training.restore(run, model, optimizers)
        if step == 0:
            with run.progress(2, 0, "reference") as bar:
                centre = _centre(stage)
                bar.advance()
                before = _validate(stage, centre, stage.reference)
                bar.advance()
            state = {"centre": asdict(centre), "before": before, "tokens": 0, "stopped": None}
        centre = Centre(**state["centre"])
        with run.progress(config.updates, step, "policy") as bar:
            while step < config.updates and state["stopped"] is None:
                step += 1
                values = _step(stage, run, optimizers, centre, step)
                state["tokens"] += int(values["tokens"])
                improved = False
                if config.max_kl is not None and values["kl"] > config.max_kl:
                    state["stopped"] = f"KL {values['kl']:.3g} exceeded max_kl {config.max_kl:g} at update {step}"
                if step % config.validate_every == 0 or step == config.updates or state["stopped"]:
                    held_out = _validate(stage, centre, POLICY)
                    values |= {f"validation_{key}": value for key, value in held_out.items()}
                    exceeded = state["stopped"] is not None and best.step is not None
                    if improved := held_out["reward"] > best.value and not exceeded:
                        best = Best(step, held_out["reward"], held_out)
                run.log(step, values)
                if improved or state["stopped"] or step % config.save_every == 0 or run.stop_requested:
                    kept = {key: state[key] for key in ("centre", "before", "tokens", "stopped")}
                    training.save(run, step, model, optimizers, best, kept)
                bar.advance()
                if run.stop_requested and step < config.updates:
                    raise Interrupted(
                        f"stopped at update {step} of {config.updates}", hint="run the same command to continue"
                    )
        training.restore_best(run.path, best, model.adapters[POLICY])
        store.save_adapter(model, POLICY, run.path / "adapter", stage.encoder)
        if VALUE in model.adapters:
            store.save_adapter(model, VALUE, run.path / "value", stage.encoder)
        result = {
            "updates": step,
            "stopped": state["stopped"],
            "best_step": best.step,
            "before": state["before"],
            "after": best.metrics,
            "score_before": state["before"]["score"],
            "score_after": best.metrics.get("score"),
            "kl": best.metrics.get("kl"),
            "validation_prompts": len(stage.held_out),
            "centre": state["centre"],
            "tokens": state["tokens"],
            "trainable_parameters": sum(p.numel() for name in optimizers for p in model.adapters[name].trainable()),
            "tuning": config.tuning,
        }
        run.finish(result)
        return run.result()


def _open(config: PolicyConfig) -> Stage:
    """The base with the reference, policy, value and reward adapters, and the prompts."""
    model, encoder = training.open_model(config)
    reference = None
    if config.sft is not None:
        reference = training.load_sft(model, config.sft, encoder)
    training.new_adapter(model, POLICY, "policy", config, start=reference)
    if config.baseline == "value":
        training.new_adapter(model, VALUE, "value", config, start=reference)
    rewards = load_rewards(model, config.reward, config.combine, encoder)
    prompts = [record for record in load(config.data, ("prompt",), "train") if isinstance(record, Prompt)]
    held_out = [record for record in load(config.data, ("prompt",), "validation") if isinstance(record, Prompt)]
    chosen = order.choose(held_out, config.validation_prompts, config.seed)
    return Stage(config, model, encoder, rewards, prompts, chosen, reference)


def _step(
    stage: Stage, run: Run, optimizers: dict[str, torch.optim.AdamW], centre: Centre, step: int
) -> dict[str, float]:
    """One rollout and its optimiser steps: sample, probe, score, reference, advantages, learn."""
    config, model = stage.config, stage.model
    began = time.perf_counter()
    numbers = order.cycle(len(stage.prompts), config.prompts_per_update, step, config.seed)
    prompts = [stage.prompts[i] for i in numbers]
    rollout = _sample(stage, prompts, POLICY, config.completions_per_prompt, step, numbers)
    probe(model, rollout, POLICY)
    sampled = time.perf_counter()
    batches = _whole_prompts(rollout, config)
    if batches is None:
        scored = _score(stage, rollout, prompts, centre, POLICY)
        kl = _bounded_kl(scored, step)
        rewards = _rewards(scored, config)
        returns = advantages.returns_to_go(rewards)
        if VALUE in model.adapters and step == 1:
            bias = model.adapters[VALUE].bias
            assert bias is not None
            bias.data.fill_(returns[scored.mask].mean().item())
        finished_scoring = time.perf_counter()
        learned = _learn(stage, optimizers, scored, rewards, returns, step)
    else:
        scored = _unseen(stage, rollout, prompts, centre)
        finished_scoring = time.perf_counter()
        rewards, learned = _policy_pass_at_once(stage, scored, batches)
        kl = _bounded_kl(scored, step)
        training.check_bounded("policy_loss", learned["policy_loss"], step)
        learned |= _optimise(stage, optimizers, step, False)
    run.write_rollout(step, _rows(stage, scored, prompts, rewards, kl, step))
    ended = time.perf_counter()
    gap = (_padded(rollout.sampler_logprobs, scored.mask) - scored.old_logprobs)[scored.mask].abs()
    lengths = scored.mask.sum(-1).float()
    return {
        "score_mean": float(scored.scores.mean()),
        "score_std": float(scored.scores.std()),
        "reward_mean": rewards.sum(-1).mean().item(),
        "kl": kl.mean().item(),
        "entropy": scored.entropy[scored.mask].mean().item(),
        "completion_tokens": lengths.mean().item(),
        "end_rate": float(np.mean(rollout.ended)),
        "sampler_gap_mean": gap.mean().item(),
        "sampler_gap_max": gap.max().item(),
        **learned,
        "tokens": float(lengths.sum().item()),
        "tokens_per_second": lengths.sum().item() / (ended - began),
        "seconds_sample": sampled - began,
        "seconds_score": finished_scoring - sampled,
        "seconds_learn": ended - finished_scoring,
        "memory_bytes": peak_memory_bytes(),
    }


def _sample(
    stage: Stage, prompts: Sequence[Prompt], adapter: str | None, samples: int, step: int, numbers: Sequence[int]
) -> Rollout:
    config = stage.config
    return sample(
        stage.model,
        [stage.encoder.cut_prompt(record.prompt, config.max_completion_tokens) for record in prompts],
        adapter=adapter,
        draws=uniforms(config.seed, step, numbers, samples, config.max_completion_tokens),
        end_id=stage.encoder.end_id,
        temperature=config.temperature,
        max_completion_tokens=config.max_completion_tokens,
    )


@torch.no_grad()
def _unseen(stage: Stage, rollout: Rollout, prompts: Sequence[Prompt], centre: Centre) -> Scored:
    """Scores; log-probabilities and entropy are still 0."""
    config, model = stage.config, stage.model
    samples = len(rollout.completions) // len(prompts)
    texts = [record.prompt for record in prompts for _ in range(samples)]
    raw = stage.rewards.scores(
        model, stage.encoder, rollout.prompts, rollout.completions, texts, config.microbatch_tokens, config.packing
    )
    paid = raw - centre.mean - np.where(rollout.ended, 0.0, centre.penalty)
    mask = length_mask([len(ids) for ids in rollout.completions], model.device)
    old, ref, entropy = (torch.zeros(mask.shape, device=model.device) for _ in range(3))
    return Scored(rollout, raw, paid, old, ref, entropy, mask)


@torch.no_grad()
def _score(stage: Stage, rollout: Rollout, prompts: Sequence[Prompt], centre: Centre, adapter: str | None) -> Scored:
    """Scores, and log-probabilities under `adapter` and the reference on the same batch layouts (so equal weights
    give KL 0).
    """
    config, model = stage.config, stage.model
    scored = _unseen(stage, rollout, prompts, centre)
    for batch in _microbatches(rollout, config):
        chosen = [rollout.prompts[i] for i in batch], [rollout.completions[i] for i in batch]
        now = model.logprobs(*chosen, adapter, temperature=config.temperature, packing=config.packing)
        reference = now
        if adapter != stage.reference:
            reference = model.logprobs(*chosen, stage.reference, temperature=config.temperature, packing=config.packing)
        scored.fill(batch, now, reference)
    return scored


def _rewards(scored: Scored, config: PolicyConfig, rows: Sequence[int] | None = None) -> Tensor:
    """Reward of each token [rows, time]: the score at the end, the KL's price everywhere."""
    chosen = list(range(len(scored.scores))) if rows is None else list(rows)
    return advantages.token_rewards(
        torch.from_numpy(scored.paid[chosen]).float().to(scored.mask.device),
        scored.old_logprobs[chosen],
        scored.ref_logprobs[chosen],
        scored.mask[chosen],
        kl_coef=config.kl_coef,
    )


def _bounded_kl(scored: Scored, step: int) -> Tensor:
    """KL [batch]; raises DivergenceError where it has exploded."""
    kl = advantages.completion_kl(scored.old_logprobs, scored.ref_logprobs, scored.mask)
    training.check_bounded("kl", kl.mean().item(), step, training.KL_LIMIT)
    return kl


def _learn(
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
            # `_optimise`.
            predicted, summed["value_loss"] = _value_pass(stage, scored, returns)
        if number == 0:
            advantage = _advantages(config, scored.mask, rewards, returns, predicted)
            values["advantage_std"] = advantage[scored.mask].std(correction=0).item()
        if not warming_up:
            summed["policy_loss"], summed["clipped"] = _policy_pass(stage, scored, advantage)
        for key, value in summed.items():
            training.check_bounded(key, value, step)
        values |= summed | {"clipped": summed["clipped"] / max(1, int(scored.mask.sum()))}
        values |= _optimise(stage, optimizers, step, warming_up)
    return values


def _value_pass(stage: Stage, scored: Scored, returns: Tensor) -> tuple[Tensor, float]:
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


def _policy_pass_at_once(
    stage: Stage, scored: Scored, batches: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, float]]:
    """Fills `scored` and forms the policy's gradients in the same pass: no other one tells the old log-probabilities,
    which on-policy are those that are learned from. Returns the rewards of all tokens and the losses.

    Args:
        batches: as `_whole_prompts` gives them.
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
        rewards[batch] = _rewards(scored, config, batch)
        returns = advantages.returns_to_go(rewards[batch])
        advantage[batch] = _advantages(config, scored.mask[batch], rewards[batch], returns, None)
        loss, outside = _policy_backward(config, scored, batch, now, advantage)
        values["policy_loss"] += loss
        values["clipped"] += outside
    values["clipped"] /= max(1, int(scored.mask.sum()))
    values["advantage_std"] = advantage[scored.mask].std(correction=0).item()
    return rewards, values


def _optimise(stage: Stage, optimizers: dict[str, torch.optim.AdamW], step: int, warming_up: bool) -> dict[str, float]:
    config = stage.config
    peaks = {POLICY: config.learning_rate, VALUE: config.value_learning_rate}
    out: dict[str, float] = {}
    for name, optimizer in optimizers.items():
        if name == POLICY and warming_up:
            continue
        rate = optim.learning_rate_at(step, config.updates, peaks[name], config.optim)
        adapter = stage.model.adapters[name]
        norm = training.optimiser_step(optimizer, adapter, rate, config.optim.max_grad_norm)
        prefix = "" if name == POLICY else "value_"
        out |= {f"{prefix}grad_norm": norm, f"{prefix}learning_rate": rate}
    return out


def _advantages(config: PolicyConfig, mask: Tensor, rewards: Tensor, returns: Tensor, values: Tensor | None) -> Tensor:
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


def _centre(stage: Stage) -> Centre:
    """Mean and deviation of the reference's scores on `centre_prompts` training prompts, one completion each."""
    config = stage.config
    numbers = order.cycle(len(stage.prompts), min(config.centre_prompts, len(stage.prompts)), 1, config.seed)
    prompts = [stage.prompts[i] for i in numbers]
    rollout = _sample(stage, prompts, stage.reference, 1, 0, numbers)
    texts = [record.prompt for record in prompts]
    raw = stage.rewards.scores(
        stage.model,
        stage.encoder,
        rollout.prompts,
        rollout.completions,
        texts,
        config.microbatch_tokens,
        config.packing,
    )
    std = float(raw.std())
    penalty = std if config.missing_end_penalty is None else config.missing_end_penalty
    return Centre(float(raw.mean()), std, penalty)


def _validate(stage: Stage, centre: Centre, adapter: str | None) -> dict[str, float]:
    """One completion of each held-out prompt with draws that never change: score, KL, reward, length, end rate."""
    config = stage.config
    numbers = list(range(len(stage.held_out)))
    rollout = _sample(stage, stage.held_out, adapter, 1, -1, numbers)
    scored = _score(stage, rollout, stage.held_out, centre, adapter)
    kl = advantages.completion_kl(scored.old_logprobs, scored.ref_logprobs, scored.mask).mean().item()
    return {
        "score": float(scored.scores.mean()),
        "kl": kl,
        "reward": float((1 - config.kl_coef) * scored.paid.mean() - config.kl_coef * kl),
        "completion_tokens": scored.mask.sum(-1).float().mean().item(),
        "end_rate": float(np.mean(rollout.ended)),
    }


def _microbatches(rollout: Rollout, config: PolicyConfig) -> list[list[int]]:
    rows = [[(*p, *c)] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    return microbatches(rows, config.microbatch_tokens, config.packing)


def _whole_prompts(rollout: Rollout, config: PolicyConfig) -> list[list[int]] | None:
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


def _rows(
    stage: Stage, scored: Scored, prompts: Sequence[Prompt], rewards: Tensor, kl: Tensor, step: int
) -> list[dict[str, Any]]:
    """What rollouts/STEP.jsonl keeps for people and the report."""
    samples = stage.config.completions_per_prompt
    rows = []
    for i, ids in enumerate(scored.rollout.completions):
        prompt = prompts[i // samples].prompt
        rows.append(
            {
                "step": step,
                "prompt_index": i // samples,
                "sample_index": i % samples,
                "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
                "completion": stage.encoder.decode(ids),
                "score": float(scored.scores[i]),
                "reward": rewards[i].sum().item(),
                "kl": kl[i].item(),
                "tokens": len(ids),
                "ended": scored.rollout.ended[i],
            }
        )
    return rows


def _padded(lists: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    out = torch.zeros(like.shape, device=like.device)
    for row, values in enumerate(lists):
        out[row, : len(values)] = torch.tensor(values, device=like.device)
    return out
