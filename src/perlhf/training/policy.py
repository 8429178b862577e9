"""Policy stage: REINFORCE with a KL anchor and a learned value baseline, every trained part a LoRA adapter on one base.

`policy_step` has the paper's step. Added here, since the paper is silent: scores are centred by the reference's mean,
the value head starts at the first rollout's mean return, a completion without end token pays a penalty, and the weights
with the best reward on held-out prompts are kept and reported on other ones. An update in which no completion has a
score is skipped. Not included: dropout, several epochs without `clip`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch

from perlhf.config.addresses import check_addresses
from perlhf.config.stages import PolicyConfig
from perlhf.data.records import Prompt
from perlhf.errors import Interrupted, RewardFunctionError, ServiceError
from perlhf.kernels.kv_cache import FIXED
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder
from perlhf.model.foretold.memory import keep_or_recompute
from perlhf.model.model import Model
from perlhf.model.open import load_sft, load_start, new_adapter, open_model, with_day
from perlhf.model.supported import told
from perlhf.parallel.together import together
from perlhf.parallel.workers import Workers
from perlhf.rollout.ahead import SAMPLER, Ahead, add_sampler, padded
from perlhf.rollout.completions import Centre, Setup, asked
from perlhf.rollout.local import Ends
from perlhf.rollout.scorers import load_scorers
from perlhf.rollout.vllm.probe import PROBE_TOKENS
from perlhf.rollout.vllm.server import Server
from perlhf.runs.earlier import check_disagreement
from perlhf.runs.run import Run
from perlhf.system.console import note, warn
from perlhf.system.machine import peak_memory_bytes
from perlhf.training import loop, optim
from perlhf.training.held_out import centre_of, nothing_scored, two_parts, validate
from perlhf.training.loop import Keeper
from perlhf.training.policy_step import POLICY, VALUE, At, Optimizers, Step, policy_step

CONSTANT_UPDATES = 3
"""Updates after which a reward that never varied is told."""
SECONDS = ("seconds_sample", "seconds_score", "seconds_learn")
"""What the time of an update is made of: what is sampled ahead takes none but that which it is waited for."""
NEGATIVE_KL = -1e-3
"""Nats a completion below which it is told: more than rounding."""
SKIPPED_IN_A_ROW = 5
"""So many updates without a single score end the run: what scores is broken, or scores none of these prompts."""


@dataclass
class PolicyState:
    """What a checkpoint has besides adapters, optimisers and what is kept."""

    centre: Centre
    validation_centre: Centre
    """Of the scorers that see held-out prompts."""
    before: dict[str, float]
    """How the reference does on held-out prompts."""
    learned: int = 0
    """Updates so far that weren't skipped."""
    skipped: int = 0
    """Updates in a row, up to now, in which no completion had a score."""
    tokens: int = 0
    """Sampled so far."""
    disagreement: float | None = None
    """Of the reward models at the first update, where `max_disagreement` goes by it."""
    stopped: str | None = None
    """Why the run ended before its last update."""


def train_policy(config: PolicyConfig) -> dict[str, Any]:
    """Trains a policy (and value) adapter into `config.run` and returns its result.

    Raises:
        StaleSamplerError: the sampler didn't use the current adapter.
        DivergenceError: a loss or gradient isn't finite; the last checkpoint is kept.
        RewardFunctionError, ServiceError: a reward failed, gave the reference no score at all, or none in several
            updates in a row, or the server that samples failed; what was learned is kept, and the same command goes on.
        Interrupted: a signal asked for it; likewise.
        DataError, ConfigError, ModelError, AdapterError, RunError: as the parts say.
    """
    check_addresses((*config.reward, *config.validation_reward))  # before they are written: a copy isn't validated
    with together() as workers:
        workers.check_enough(config.prompts_per_update, "prompts_per_update")
        base = Base.find(config.base)
        config = with_day(config, base, workers)
        with loop.opened(config, "policy", base, workers) as run:
            return workers.once(run.result) if run.finished else _train(config, base, run, workers)


def _train(config: PolicyConfig, base: Base, run: Run, workers: Workers) -> dict[str, Any]:
    """The run from where it is to its end; its result."""
    setup = _open(config, base, workers)
    if setup.server is None:
        return _learn(setup, run)
    with setup.server as server:
        server.check(POLICY, temperature=config.temperature, slots=config.slots)
        return _learn(setup, run)


def _learn(setup: Setup, run: Run) -> dict[str, Any]:
    config, workers = setup.config, setup.workers
    run.note("way", told(setup.model.way, config.packing))
    run.note_session("memory", keep_or_recompute(config, setup.model, workers))
    model, optimizers = setup.model, _optimizers(setup)
    validation = _validation(setup)
    frozen = [SAMPLER] if config.staleness else []
    step, keeper, saved_state = loop.restore(run, model, optimizers, workers, frozen)
    state = _state(saved_state, step, setup) if saved_state else _before(setup, validation, run, keeper)
    setup, validation = _on_level(setup, state.centre), _on_level(validation, state.validation_centre)

    def save(step: int) -> None:
        loop.save(run, step, model, optimizers, keeper, asdict(state), frozen)

    if not saved_state:
        save(0)
    oddities = _Oddities(config)
    if step < config.updates and state.stopped is None:
        loop.check_goes_on(run, step, keeper, config.validate_every)
    with run.progress(config.updates, step, "policy") as bar, _ahead(setup, step) as ahead:
        while step < config.updates and state.stopped is None:
            step += 1
            done = _update(setup, optimizers, state, step, ahead, save)
            loop.check_same(workers, step, config.check_every, (model.adapters[name] for name in optimizers))
            if run.writes:
                run.write_rollout(step, _rows(setup, done, step))
            values = workers.once(lambda done=done: _values(done))
            state.tokens += int(values["tokens"])
            if config.max_kl is not None and values["kl"] > config.max_kl:
                state.stopped = f"KL {values['kl']:.3g} exceeded max_kl {config.max_kl:g} at update {step}"
            _stop_by_disagreement(done, state, step, config)
            if step % config.validate_every == 0 or state.stopped:
                values |= _validate(validation, keeper, state, step)
            run.log(step, values)
            oddities.note(done, step)
            asked = workers.any(run.stop_requested)
            due = step % config.save_every == 0 or step == config.updates
            if due or keeper.step == step or state.stopped or asked:
                save(step)
            bar.advance()
            loop.stop_if_asked(asked, step, config.updates)
    if step % config.validate_every and state.stopped is None:
        # The end, of which checkpoints know nothing (`loop.check_goes_on`).
        run.amend(step, _validate(validation, keeper, state, step))
    loop.restore_best(run.path, step, keeper, [model.adapters[POLICY]], workers)
    if run.writes:
        saved.save_adapter(model, POLICY, run.path / "adapter", setup.encoder)
    if run.writes and VALUE in model.adapters:
        saved.save_adapter(model, VALUE, run.path / "value", setup.encoder)
    result = _result(setup, step, keeper, state, _reached(validation, keeper, state, step))
    run.finish(result)
    oddities.note_result(result)
    return workers.once(run.result)


def _update(
    setup: Setup,
    optimizers: Optimizers,
    state: PolicyState,
    step: int,
    ahead: Ahead | None,
    save: Callable[[int], None],
) -> Step:
    """One update. Where a reward fails, or a stop is asked while it is waited for, all is saved as it was before."""
    try:
        done = policy_step(setup, optimizers, state.centre, At(step, state.learned + 1), ahead)
        _count(done, state, step, setup.config)
    except (Interrupted, RewardFunctionError, ServiceError):
        # The reward's, or the sampler's: nothing was learned since.
        if ahead is not None:
            ahead.back()
        save(step - 1)
        raise
    return done


def _open(config: PolicyConfig, base: Base, workers: Workers) -> Setup:
    """The base with the reference, policy, value and reward adapters, and the prompts."""
    check_disagreement(config)
    model, encoder = open_model(config, base, workers=workers)
    reference = None if config.sft is None else load_sft(model, config.sft, encoder)
    start = reference if config.start is None else load_start(model, config, encoder, "policy")
    new_adapter(model, POLICY, "policy", config, start=start)
    if config.baseline == "value":
        new_adapter(model, VALUE, "value", config, start=reference)
    if config.staleness:
        add_sampler(model, POLICY)
    sides = loop.read_sides(config, ("prompt",))
    prompts = cast(Sequence[Prompt], sides.train)
    choosing, others = two_parts(len(sides.validation), config)
    held_out, reported_on = (cast(list[Prompt], [sides.validation[i] for i in part]) for part in (choosing, others))
    scorers = load_scorers(
        model,
        config.reward,
        config.combine,
        encoder,
        prompts=prompts,
        weights=config.reward_weights,
        timeout_seconds=config.reward_timeout_seconds,
    )
    loop.tell(sides)
    if (count := len(sides.train)) < config.prompts_per_update:
        several = f"an update's {config.prompts_per_update} (prompts_per_update) hold some more than once"
        warn(f"there are only {count} training prompts: {several}")
    if config.max_rows is not None and not (model.device.type in FIXED and model.way.packing == "tree"):
        warn("max_rows is of a GPU and a base that is computed as a tree: here all of an update are sampled at once")
    server = _server(config, model, encoder, prompts, workers) if config.sampler == "vllm" else None
    return Setup(config, model, encoder, scorers, prompts, held_out, reference, reported_on, workers, server)


def _server(
    config: PolicyConfig, model: Model, encoder: Encoder, prompts: Sequence[Prompt], workers: Workers
) -> Server:
    """The server that samples, as it is configured."""
    longest = config.max_completion_tokens
    return Server(
        model,
        encoder,
        workers,
        url=config.vllm.url,
        directory=config.vllm.directory or config.run / "sampler",
        run=config.run,
        prompts=[encoder.cut_prompt(one.prompt, max(longest, PROBE_TOKENS), one.tools) for one in prompts[:2]],
        max_gap=config.max_sampler_gap,
        timeout_seconds=config.vllm.timeout_seconds,
    )


def _ahead(setup: Setup, step: int) -> AbstractContextManager[Ahead | None]:
    """What samples ahead, as it is after an update; None where nothing does."""
    if not setup.config.staleness:
        return nullcontext()
    ask = partial(asked, setup, SAMPLER)
    elsewhere = setup.server is not None
    return Ahead(setup.model, POLICY, ask, setup.config.updates, setup.workers, max(0, step - 1), elsewhere)


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
    sources, name, limit = config.validation_reward, "validation_reward", config.reward_timeout_seconds
    given = setup.model, sources, config.combine, setup.encoder, name, name
    prompts = chain(setup.prompts, setup.held_out)
    return replace(setup, scorers=load_scorers(*given, prompts=prompts, timeout_seconds=limit))


def _before(setup: Setup, validation: Setup, run: Run, keeper: Keeper) -> PolicyState:
    """The state before the first update: what centres the scores, and how the reference does on held-out prompts.

    Offers the start to the keeper: it does as its reference, unless it goes on from another run.

    Raises:
        RewardFunctionError: none of the reference's completions has a score.
    """
    with run.progress(2, 0, "reference") as bar:
        centre = centre_of(setup)
        validation_centre = centre if validation is setup else centre_of(validation, "validation_reward")
        bar.advance()
        on_level = _on_level(validation, validation_centre)
        start = before = validate(on_level, validation.held_out, validation_centre, setup.reference, 0)
        if setup.config.start is not None:
            start = validate(on_level, validation.held_out, validation_centre, POLICY, 0)
        bar.advance()
    if not {"score"} <= before.metrics.keys() & start.metrics.keys():
        key = "validation_reward" if setup.config.validation_reward else "reward"
        raise nothing_scored(len(setup.held_out), "of the held-out prompts", setup.config, key)
    keeper.offer(0, start.metrics["reward"], start.metrics, start.rewards)
    return PolicyState(centre, validation_centre, before.metrics)


def _on_level(setup: Setup, centre: Centre) -> Setup:
    return replace(setup, scorers=centre.level(setup.scorers))


def _state(saved_state: dict[str, Any], step: int, setup: Setup) -> PolicyState:
    """As a checkpoint has it. One of an earlier version knows of no update that was skipped; a run that began before
    rewards were brought to one level goes on as it began.
    """
    centres = {key: Centre(**saved_state[key]) for key in ("centre", "validation_centre")}
    if centres["centre"].members is None and setup.scorers.levels_matter:
        what = f"this run began with combine: {setup.config.combine} of scores as they are, and goes on so"
        note(f"{what}; a new run brings each reward to its own level first")
    return PolicyState(**{"learned": step, **saved_state, **centres})


def _count(done: Step, state: PolicyState, step: int, config: PolicyConfig) -> None:
    """Notes whether an update learned, and tells of one that didn't.

    Raises:
        RewardFunctionError: it is the last of `SKIPPED_IN_A_ROW` without a single score.
    """
    if done.scored.given.any():
        state.learned, state.skipped = state.learned + 1, 0
        return
    count, sources = len(done.scored.scores), ", ".join(config.reward)
    if state.skipped + 1 == SKIPPED_IN_A_ROW:
        which = f"of update {step}, the {SKIPPED_IN_A_ROW}th such in a row,"
        raise nothing_scored(count, which, config, "reward")
    state.skipped += 1
    note(f"update {step} is skipped: none of {count} completions got a score from {sources}")


def _stop_by_disagreement(done: Step, state: PolicyState, step: int, config: PolicyConfig) -> None:
    """Ends the run where reward models disagree far more than about the first update's completions."""
    now = done.scored.disagreement
    if config.max_disagreement is None or now is None:
        return
    if state.disagreement is None:
        state.disagreement = now
    if state.stopped is None and now > config.max_disagreement * state.disagreement > 0:
        times = f"{now / state.disagreement:.3g} times as at the start"
        state.stopped = (
            f"the reward models disagreed {times} (max_disagreement {config.max_disagreement:g}) at update {step}"
        )


def _validate(validation: Setup, keeper: Keeper, state: PolicyState, step: int) -> dict[str, float]:
    """How the policy does on held-out prompts, as metrics.jsonl has it.

    Offers the step's weights to the keeper, unless no completion has a score, and stops the run where `patience` is
    used up. Where the KL exceeded `max_kl`, weights that stayed below it go first.
    """
    began = time.perf_counter()
    found, config = validate(validation, validation.held_out, state.validation_centre, POLICY, step), validation.config
    if "reward" in found.metrics and config.keep == "last":
        keeper.take(step, found.metrics["reward"], found.metrics)
    elif "reward" in found.metrics and (state.stopped is None or not keeper.step):
        keeper.offer(step, found.metrics["reward"], found.metrics, found.rewards)
    if state.stopped is None and config.patience is not None and keeper.worse >= config.patience:
        times = f"{config.patience} times in a row, at update {step}"
        state.stopped = f"held-out reward was no better {times}"
    return loop.validated(found.metrics, began)


def _reached(validation: Setup, keeper: Keeper, state: PolicyState, step: int) -> tuple[dict[str, float], ...]:
    """How the reference and what is kept do on the prompts that didn't choose it; else on those that did."""
    if not validation.reported_on:
        return state.before, keeper.metrics
    draws, centre = len(validation.held_out), state.validation_centre
    given = validation, validation.reported_on, centre
    before = validate(*given, validation.reference, step, draws).metrics
    if keeper.step == 0 and validation.config.start is None:
        return before, before
    return before, validate(*given, POLICY, step, draws).metrics


def _values(done: Step) -> dict[str, float]:
    """What metrics.jsonl has of an update."""
    known, scored, rollout = done.known, done.scored, done.scored.rollout
    gap = (padded(rollout, known.mask) - known.old_logprobs)[known.mask].abs()
    lengths = known.mask.sum(-1).float()
    seconds = sum(value for key, value in done.values.items() if key in SECONDS)
    given, paid = scored.given, dict[str, float]()
    if scored.disagreement is not None:
        paid["disagreement"] = scored.disagreement
    if not given.all():
        paid["unscored"] = float((~given).sum())
    if given.any():
        paid["score_mean"] = float(scored.scores[given].mean())
        paid["score_std"] = float(scored.scores[given].std())
        paid["reward_mean"] = done.rewards.sum(-1)[torch.from_numpy(given)].mean().item()
    return {
        **paid,
        "kl": (done.kl * done.weights).mean().item(),
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
    ends = rollout.ends or Ends.of(setup.encoder)
    rows = []
    given = done.scored.given
    for i, ids in enumerate(rollout.completions):
        prompt = done.prompts[i // samples].prompt
        rows.append(
            {
                "step": step,
                "prompt_index": i // samples,
                "sample_index": i % samples,
                "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
                "completion": ends.text(ids),
                "score": float(done.scored.scores[i]) if given[i] else None,
                "reward": done.rewards[i].sum().item() if given[i] else None,
                "kl": done.kl[i].item(),
                "tokens": len(ids),
                "ended": rollout.ended[i],
            }
        )
        if setup.config.off_policy:
            rows[-1] |= {"sampler_step": done.sampler_step, "sampler_logprobs": rollout.sampler_logprobs[i]}
    return rows


class _Oddities:
    """What is told once on standard error while a policy is trained: a reward that never varies, a negative KL."""

    def __init__(self, config: PolicyConfig):
        self._config = config
        self._low, self._high, self._updates = math.inf, -math.inf, 0
        self._told: set[str] = set()

    def note(self, done: Step, step: int) -> None:
        """Looks at an update of this session."""
        scores, kl_of_each = done.scored.scores[done.scored.given].tolist(), done.kl * done.weights
        kl = kl_of_each.mean().item()
        self._low, self._high = min([self._low, *scores]), max([self._high, *scores])
        self._updates += bool(scores)
        seen_enough = self._updates == CONSTANT_UPDATES or (step == self._config.updates and self._updates > 1)
        if seen_enough and self._low == self._high:
            what = f"all scores of {self._updates} updates are {self._low:g}"
            self._tell("reward", f"{what}: a reward that never varies teaches nothing but the KL and the end token")
        error = kl_of_each.std(correction=0).item() / len(kl_of_each) ** 0.5
        if kl < min(NEGATIVE_KL, -2 * error):
            what = f"the KL of update {step} is {kl:.3g}, below 0 by more than chance ({error:.2g}) explains"
            self._tell("kl", f"{what}: the completions don't come from the policy that is trained")

    def note_result(self, result: Mapping[str, Any]) -> None:
        """Looks at what is kept."""
        if result["kl"] < NEGATIVE_KL:
            count = result["reported_prompts"] or result["validation_prompts"]
            what = f"the KL of what is kept is {result['kl']:.3g}, estimated from {count}"
            self._tell("kl", f"{what} completions: chance brought it below 0, so take it as about 0")

    def _tell(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            note(text)


def _result(
    setup: Setup, step: int, keeper: Keeper, state: PolicyState, reached: tuple[dict[str, float], ...]
) -> dict[str, Any]:
    """What result.json has."""
    before, after = reached
    adapters = [setup.model.adapters[name] for name in (POLICY, VALUE) if name in setup.model.adapters]
    return {
        "updates": step,
        "stopped": state.stopped,
        "best_step": keeper.step,
        "skipped": step - state.learned,
        "before": before,
        "after": after,
        "score_before": before.get("score"),
        "score_after": after.get("score"),
        "kl": after["kl"],
        "reported_prompts": len(setup.reported_on),
        "chosen_by": {"before": state.before, "after": keeper.metrics},
        "validation_prompts": len(setup.held_out),
        "centre": asdict(state.centre),
        "tokens": state.tokens,
        "trainable_parameters": sum(p.numel() for adapter in adapters for p in adapter.trainable()),
        "tuning": setup.config.tuning,
    }
