"""Policy stage: REINFORCE with a KL anchor and a learned value baseline, every trained part a LoRA adapter on one base.

`policy_step` has the paper's step. Added here, since the paper is silent: scores are centred by the reference's mean,
the value head starts at the first rollout's mean return, a completion without end token pays a penalty, and the weights
with the best reward on held-out prompts are kept. Not included: dropout, several epochs without `clip`.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from perlhf.config.stages import PolicyConfig
from perlhf.data import order
from perlhf.data.records import Prompt
from perlhf.method import advantages
from perlhf.model import saved
from perlhf.model.base import Base
from perlhf.model.open import load_sft, new_adapter, open_model, with_day
from perlhf.rollout.scorers import load_scorers
from perlhf.runs.run import Run, open_run
from perlhf.system.machine import peak_memory_bytes
from perlhf.training import loop, optim
from perlhf.training.loop import Keeper
from perlhf.training.policy_step import (
    POLICY,
    VALUE,
    Centre,
    Optimizers,
    Setup,
    Step,
    each_completion,
    logprobs_of_all,
    policy_step,
    raw_scores,
    sample_completions,
    score,
)


@dataclass
class PolicyState:
    """What a checkpoint has besides adapters, optimisers and what is kept."""

    centre: Centre
    validation_centre: Centre
    """Of the scorers that see held-out prompts."""
    before: dict[str, float]
    """How the reference does on held-out prompts."""
    tokens: int = 0
    """Sampled so far."""
    stopped: str | None = None
    """Why the run ended before its last update."""


def train_policy(config: PolicyConfig) -> dict[str, Any]:
    """Trains a policy (and value) adapter into `config.run` and returns its result.

    Raises:
        StaleSamplerError: the sampler didn't use the current adapter.
        DivergenceError: a loss or gradient isn't finite; the last checkpoint is kept.
        DataError, ConfigError, ModelError, AdapterError, RunError: as the parts say.
    """
    base = Base.find(config.base)
    config = with_day(config, base)
    with open_run(config.run, "policy", config, loop.facts(config, base)) as run:
        if run.finished:
            return run.result()
        setup = _open(config, base)
        model, optimizers = setup.model, _optimizers(setup)
        validation = _validation(setup)
        step, keeper, saved_state = loop.restore(run, model, optimizers)
        if saved_state:
            state = _state(saved_state)
        else:
            state = _before(setup, validation, run)
            keeper.offer(0, state.before["reward"], state.before)  # the policy starts as its reference
            loop.save(run, 0, model, optimizers, keeper, asdict(state))
        with run.progress(config.updates, step, "policy") as bar:
            while step < config.updates and state.stopped is None:
                step += 1
                done = policy_step(setup, optimizers, state.centre, step)
                run.write_rollout(step, _rows(setup, done, step))
                values = _values(done)
                state.tokens += int(values["tokens"])
                if config.max_kl is not None and values["kl"] > config.max_kl:
                    state.stopped = f"KL {values['kl']:.3g} exceeded max_kl {config.max_kl:g} at update {step}"
                if step % config.validate_every == 0 or step == config.updates or state.stopped:
                    held_out = validate(validation, state.validation_centre, POLICY)
                    values |= {f"validation_{key}": value for key, value in held_out.items()}
                    _offer(keeper, state, step, held_out, config)
                run.log(step, values)
                if keeper.step == step or state.stopped or step % config.save_every == 0 or run.stop_requested:
                    loop.save(run, step, model, optimizers, keeper, asdict(state))
                bar.advance()
                loop.stop_if_asked(run, step, config.updates)
        loop.restore_best(run.path, keeper, model.adapters[POLICY])
        saved.save_adapter(model, POLICY, run.path / "adapter", setup.encoder)
        if VALUE in model.adapters:
            saved.save_adapter(model, VALUE, run.path / "value", setup.encoder)
        run.finish(_result(setup, step, keeper, state))
        return run.result()


def _open(config: PolicyConfig, base: Base) -> Setup:
    """The base with the reference, policy, value and reward adapters, and the prompts."""
    model, encoder = open_model(config, base)
    reference = None if config.sft is None else load_sft(model, config.sft, encoder)
    new_adapter(model, POLICY, "policy", config, start=reference)
    if config.baseline == "value":
        new_adapter(model, VALUE, "value", config, start=reference)
    scorers = load_scorers(model, config.reward, config.combine, encoder)
    sides = loop.read_sides(config, ("prompt",))
    chosen = order.choose(sides.validation, config.validation_prompts, config.seed)
    loop.tell(sides)
    if (count := len(sides.train)) < config.prompts_per_update:
        several = f"an update's {config.prompts_per_update} (prompts_per_update) hold some more than once"
        print(f"warning: there are only {count} training prompts: {several}", file=sys.stderr)
    prompts, held_out = cast(Sequence[Prompt], sides.train), cast(list[Prompt], chosen)
    return Setup(config, model, encoder, scorers, prompts, held_out, reference)


def _optimizers(setup: Setup) -> Optimizers:
    rates = {POLICY: setup.config.learning_rate, VALUE: setup.config.value_learning_rate}
    adapters = setup.model.adapters
    trained = {name: (adapters[name].trainable_by_name(), rate) for name, rate in rates.items() if name in adapters}
    return optim.build(trained, setup.config.optim)


def _validation(setup: Setup) -> Setup:
    """What held-out prompts see: other scorers, where `validation_reward` names some."""
    config = setup.config
    if not config.validation_reward:
        return setup
    sources, name = config.validation_reward, "validation_reward"
    return replace(setup, scorers=load_scorers(setup.model, sources, config.combine, setup.encoder, name, name))


def _before(setup: Setup, validation: Setup, run: Run) -> PolicyState:
    """The state before the first update: what centres the scores, and how the reference does on held-out prompts."""
    with run.progress(2, 0, "reference") as bar:
        centre = centre_of(setup)
        validation_centre = centre if validation is setup else centre_of(validation)
        bar.advance()
        before = validate(validation, validation_centre, setup.reference)
        bar.advance()
    return PolicyState(centre, validation_centre, before)


def _state(saved_state: dict[str, Any]) -> PolicyState:
    """As a checkpoint has it."""
    first, second = (Centre(**saved_state[key]) for key in ("centre", "validation_centre"))
    return PolicyState(first, second, *(saved_state[key] for key in ("before", "tokens", "stopped")))


def _offer(keeper: Keeper, state: PolicyState, step: int, held_out: dict[str, float], config: PolicyConfig) -> None:
    """Offers the step's weights to the keeper, and stops the run where `patience` is used up.

    Where the KL exceeded `max_kl`, weights that stayed below it go first.
    """
    if state.stopped is None or not keeper.step:
        keeper.offer(step, held_out["reward"], held_out)
    if state.stopped is None and config.patience is not None and keeper.worse >= config.patience:
        times = f"{config.patience} times in a row, at update {step}"
        state.stopped = f"held-out reward was no better {times}"


def centre_of(setup: Setup) -> Centre:
    """Mean and deviation of the reference's scores on `centre_prompts` training prompts, one completion each."""
    config = setup.config
    numbers = order.cycle(len(setup.prompts), min(config.centre_prompts, len(setup.prompts)), 1, config.seed)
    prompts = [setup.prompts[i] for i in numbers]
    rollout = sample_completions(setup, prompts, setup.reference, 1, 0, numbers)
    raw = raw_scores(setup, rollout, prompts)
    std = float(raw.std())
    penalty = std if config.missing_end_penalty is None else config.missing_end_penalty
    return Centre(float(raw.mean()), std, penalty)


def validate(setup: Setup, centre: Centre, adapter: str | None) -> dict[str, float]:
    """One completion of each held-out prompt with draws that never change: score, KL, reward, length, end rate."""
    config = setup.config
    rollout = sample_completions(setup, setup.held_out, adapter, 1, -1, range(len(setup.held_out)))
    scored = score(setup, rollout, setup.held_out, centre)
    known = logprobs_of_all(setup, each_completion(rollout, setup), adapter)
    kl = advantages.completion_kl(known.old_logprobs, known.ref_logprobs, known.mask).mean().item()
    return {
        "score": float(scored.scores.mean()),
        "kl": kl,
        "reward": float((1 - config.kl_coef) * scored.paid.mean() - config.kl_coef * kl),
        "completion_tokens": known.mask.sum(-1).float().mean().item(),
        "end_rate": float(np.mean(rollout.ended)),
    }


def _values(done: Step) -> dict[str, float]:
    """What metrics.jsonl has of an update."""
    known, scored, rollout = done.known, done.scored, done.scored.rollout
    gap = (_padded(rollout.sampler_logprobs, known.mask) - known.old_logprobs)[known.mask].abs()
    lengths = known.mask.sum(-1).float()
    seconds = sum(value for key, value in done.values.items() if key.startswith("seconds_"))
    return {
        "score_mean": float(scored.scores.mean()),
        "score_std": float(scored.scores.std()),
        "reward_mean": done.rewards.sum(-1).mean().item(),
        "kl": done.kl.mean().item(),
        "entropy": known.entropy[known.mask].mean().item(),
        "completion_tokens": lengths.mean().item(),
        "end_rate": float(np.mean(rollout.ended)),
        "sampler_gap_mean": gap.mean().item(),
        "sampler_gap_max": gap.max().item(),
        **done.values,
        "tokens": float(lengths.sum().item()),
        "tokens_per_second": lengths.sum().item() / seconds,
        "memory_bytes": peak_memory_bytes(),
    }


def _rows(setup: Setup, done: Step, step: int) -> list[dict[str, Any]]:
    """What rollouts/STEP.jsonl keeps for people and the report."""
    samples, rollout = setup.config.completions_per_prompt, done.scored.rollout
    rows = []
    for i, ids in enumerate(rollout.completions):
        prompt = done.prompts[i // samples].prompt
        rows.append(
            {
                "step": step,
                "prompt_index": i // samples,
                "sample_index": i % samples,
                "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
                "completion": setup.encoder.decode(ids),
                "score": float(done.scored.scores[i]),
                "reward": done.rewards[i].sum().item(),
                "kl": done.kl[i].item(),
                "tokens": len(ids),
                "ended": rollout.ended[i],
            }
        )
    return rows


def _result(setup: Setup, step: int, keeper: Keeper, state: PolicyState) -> dict[str, Any]:
    """What result.json has."""
    adapters = [setup.model.adapters[name] for name in (POLICY, VALUE) if name in setup.model.adapters]
    return {
        "updates": step,
        "stopped": state.stopped,
        "best_step": keeper.step,
        "before": state.before,
        "after": keeper.metrics,
        "score_before": state.before["score"],
        "score_after": keeper.metrics["score"],
        "kl": keeper.metrics["kl"],
        "validation_prompts": len(setup.held_out),
        "centre": asdict(state.centre),
        "tokens": state.tokens,
        "trainable_parameters": sum(p.numel() for adapter in adapters for p in adapter.trainable()),
        "tuning": setup.config.tuning,
    }


def _padded(lists: list[list[float]], like: Tensor) -> Tensor:
    out = torch.zeros(like.shape, device=like.device)
    for row, values in enumerate(lists):
        out[row, : len(values)] = torch.tensor(values, device=like.device)
    return out
