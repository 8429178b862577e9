"""Policy stage: REINFORCE with a KL anchor and a learned value baseline, every trained part a LoRA adapter on one base.

The paper's objective (arXiv 2403.10704, section 3.3; loop of arXiv 2309.00267, appendix): reward = (1 - beta) score
- beta KL folded in per token, gamma 1, loss = -sum logprobs * stopgrad(return - value), separate value adapter. Added,
since the paper is silent: scores are centred by the reference's mean, the value head starts at the first rollout's mean
return, and a completion without end token pays a penalty. Not included: dropout, several epochs without `clip`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perlhf.config.stages import PolicyConfig
from perlhf.data import order
from perlhf.data.records import Prompt
from perlhf.data.splits import load
from perlhf.method import advantages
from perlhf.model import saved
from perlhf.model.base import Base
from perlhf.model.open import load_sft, new_adapter, open_model
from perlhf.rollout.local import Rollout, probe, sample, uniforms
from perlhf.rollout.rewards import load_rewards
from perlhf.runs.run import Run, open_run
from perlhf.system.machine import peak_memory_bytes
from perlhf.training import loop, optim, policy_step
from perlhf.training.loop import Best, Interrupted
from perlhf.training.policy_step import POLICY, VALUE, Centre, Scored, Stage

STATE = ("centre", "judged_centre", "before", "tokens", "stopped", "no_better")
"""What a checkpoint keeps besides adapters, optimisers and the best validation."""


def train_policy(config: PolicyConfig) -> dict[str, Any]:
    """Trains a policy (and value) adapter into `config.run` and returns its result.

    Raises:
        StaleSamplerError: the sampler didn't use the current adapter.
        DivergenceError: a loss or gradient isn't finite; the last checkpoint is kept.
        DataError, ConfigError, ModelError, AdapterError, RunError: as the parts say.
    """
    base = Base.find(config.base)
    with open_run(config.run, "policy", config, loop.facts(config, base)) as run:
        if run.finished:
            return run.result()
        stage = _open(config, base)
        model = stage.model
        optimizers = optim.build(
            {POLICY: (model.adapters[POLICY].trainable_by_name(), config.learning_rate)}
            | (
                {VALUE: (model.adapters[VALUE].trainable_by_name(), config.value_learning_rate)}
                if VALUE in model.adapters
                else {}
            ),
            config.optim,
        )
        judged = _judged(stage)
        step, best, state = loop.restore(run, model, optimizers)
        if not state:
            state = _before(stage, judged, run)
            best = Best(0, state["before"]["reward"], state["before"])  # the policy starts as its reference
            loop.save(run, 0, model, optimizers, best, {key: state[key] for key in STATE})
        state = {"judged_centre": state["centre"], "no_better": 0} | state  # of runs begun before these were kept
        centre, judged_centre = Centre(**state["centre"]), Centre(**state["judged_centre"])
        with run.progress(config.updates, step, "policy") as bar:
            while step < config.updates and state["stopped"] is None:
                step += 1
                values = _step(stage, run, optimizers, centre, step)
                state["tokens"] += int(values["tokens"])
                improved = False
                if config.max_kl is not None and values["kl"] > config.max_kl:
                    state["stopped"] = f"KL {values['kl']:.3g} exceeded max_kl {config.max_kl:g} at update {step}"
                if step % config.validate_every == 0 or step == config.updates or state["stopped"]:
                    held_out = _validate(judged, judged_centre, POLICY)
                    values |= {f"validation_{key}": value for key, value in held_out.items()}
                    exceeded = state["stopped"] is not None and best.step  # a trained one within max_kl goes first
                    if improved := held_out["reward"] > best.value and not exceeded:
                        best = Best(step, held_out["reward"], held_out)
                    state["no_better"] = 0 if improved else state["no_better"] + 1
                    if state["no_better"] == config.patience:
                        found = f"held-out reward was no better {config.patience} times in a row, at update {step}"
                        state["stopped"] = state["stopped"] or found
                run.log(step, values)
                if improved or state["stopped"] or step % config.save_every == 0 or run.stop_requested:
                    loop.save(run, step, model, optimizers, best, {key: state[key] for key in STATE})
                bar.advance()
                if run.stop_requested and step < config.updates:
                    raise Interrupted(
                        f"stopped at update {step} of {config.updates}", hint="run the same command to continue"
                    )
        loop.restore_best(run.path, best, model.adapters[POLICY])
        saved.save_adapter(model, POLICY, run.path / "adapter", stage.encoder)
        if VALUE in model.adapters:
            saved.save_adapter(model, VALUE, run.path / "value", stage.encoder)
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


def _open(config: PolicyConfig, base: Base) -> Stage:
    """The base with the reference, policy, value and reward adapters, and the prompts."""
    model, encoder = open_model(config, base)
    reference = None
    if config.sft is not None:
        reference = load_sft(model, config.sft, encoder)
    new_adapter(model, POLICY, "policy", config, start=reference)
    if config.baseline == "value":
        new_adapter(model, VALUE, "value", config, start=reference)
    rewards = load_rewards(model, config.reward, config.combine, encoder)
    prompts = [record for record in load(config.data, ("prompt",), "train") if isinstance(record, Prompt)]
    held_out = [record for record in load(config.data, ("prompt",), "validation") if isinstance(record, Prompt)]
    chosen = order.choose(held_out, config.validation_prompts, config.seed)
    return Stage(config, model, encoder, rewards, prompts, chosen, reference)


def _judged(stage: Stage) -> Stage:
    """The stage that held-out prompts see: scored by `validation_reward` where that is given."""
    config = stage.config
    if not config.validation_reward:
        return stage
    sources, name = config.validation_reward, "validation_reward"
    return replace(stage, rewards=load_rewards(stage.model, sources, config.combine, stage.encoder, name, name))


def _before(stage: Stage, judged: Stage, run: Run) -> dict[str, Any]:
    """The state before the first update: what centres the scores, and how the reference does on held-out prompts."""
    with run.progress(2, 0, "reference") as bar:
        centre = _centre(stage)
        judged_centre = centre if judged is stage else _centre(judged)
        bar.advance()
        before = _validate(judged, judged_centre, stage.reference)
        bar.advance()
    centres = {"centre": asdict(centre), "judged_centre": asdict(judged_centre)}
    return centres | {"before": before, "tokens": 0, "stopped": None, "no_better": 0}


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
    batches = policy_step.whole_prompts(rollout, config)
    if batches is None:
        scored = policy_step.score(stage, rollout, prompts, centre, POLICY)
        kl = policy_step.bounded_kl(scored, step)
        rewards = policy_step.token_rewards(scored, config)
        returns = advantages.returns_to_go(rewards)
        if VALUE in model.adapters and step == 1:
            bias = model.adapters[VALUE].bias
            assert bias is not None
            bias.data.fill_(returns[scored.mask].mean().item())
        finished_scoring = time.perf_counter()
        learned = policy_step.learn(stage, optimizers, scored, rewards, returns, step)
    else:
        scored = policy_step.without_logprobs(stage, rollout, prompts, centre)
        finished_scoring = time.perf_counter()
        rewards, learned = policy_step.learn_at_once(stage, scored, batches)
        kl = policy_step.bounded_kl(scored, step)
        loop.check_bounded("policy_loss", learned["policy_loss"], step)
        learned |= policy_step.optimise(stage, optimizers, step, False)
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


def _centre(stage: Stage) -> Centre:
    """Mean and deviation of the reference's scores on `centre_prompts` training prompts, one completion each."""
    config = stage.config
    numbers = order.cycle(len(stage.prompts), min(config.centre_prompts, len(stage.prompts)), 1, config.seed)
    prompts = [stage.prompts[i] for i in numbers]
    rollout = _sample(stage, prompts, stage.reference, 1, 0, numbers)
    raw = policy_step.raw_scores(stage, rollout, prompts)
    std = float(raw.std())
    penalty = std if config.missing_end_penalty is None else config.missing_end_penalty
    return Centre(float(raw.mean()), std, penalty)


def _validate(stage: Stage, centre: Centre, adapter: str | None) -> dict[str, float]:
    """One completion of each held-out prompt with draws that never change: score, KL, reward, length, end rate."""
    config = stage.config
    numbers = list(range(len(stage.held_out)))
    rollout = _sample(stage, stage.held_out, adapter, 1, -1, numbers)
    scored = policy_step.score(stage, rollout, stage.held_out, centre, adapter)
    kl = advantages.completion_kl(scored.old_logprobs, scored.ref_logprobs, scored.mask).mean().item()
    return {
        "score": float(scored.scores.mean()),
        "kl": kl,
        "reward": float((1 - config.kl_coef) * scored.paid.mean() - config.kl_coef * kl),
        "completion_tokens": scored.mask.sum(-1).float().mean().item(),
        "end_rate": float(np.mean(rollout.ended)),
    }


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
