"""Held-out prompts of a policy: which choose and which report, what centres scores, how an adapter does on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perlhf.config.stages import PolicyConfig
from perlhf.data import order
from perlhf.data.records import Prompt
from perlhf.errors import RewardFunctionError
from perlhf.method import advantages
from perlhf.rollout.completions import Centre, Setup, member_scores, reference_scores, sample_completions, score
from perlhf.system.console import note
from perlhf.training.policy_step import each_completion, logprobs_of_all

SourcesKey = Literal["reward", "validation_reward"]
LEAST_DEVIATION = 1e-6
"""Scores that deviate by less, in units of their mean (or of 1), count as equal."""
PENALTY_WHERE_EQUAL = 0.5
"""Of a missing end where the reference's scores are equal, or pay is bounded: the most that scores between 0 and 1 can
deviate."""


def two_parts(count: int, config: PolicyConfig) -> tuple[list[int], list[int]]:
    """Numbers of the held-out prompts that choose, and of twice as many that only report, where there are so many.

    A third of few prompts report; of one or two, none.
    """
    drawn = order.choose(range(count), min(config.validation_prompts, count - count // 3), config.seed)
    rest = sorted({*range(count)} - {*drawn})
    return drawn, order.choose(rest, 2 * config.validation_prompts, config.seed)


def centre_of(setup: Setup, key: SourcesKey = "reward") -> Centre:
    """Mean and deviation of the reference's scores on `centre_prompts` training prompts, one completion each.

    Where rewards combine by more than their mean, each of them is brought to the level of its own scores first. Where
    the scores don't vary, a missing end token costs `PENALTY_WHERE_EQUAL`, and that is told.

    Args:
        key: of the configuration, which names what scores.

    Raises:
        RewardFunctionError: no completion has a score.
    """
    config = setup.config
    numbers = order.cycle(len(setup.prompts), min(config.centre_prompts, len(setup.prompts)), 1, config.seed)
    prompts = [setup.prompts[i] for i in numbers]
    rollout = sample_completions(setup, prompts, setup.reference, 1, 0, numbers)
    table = member_scores(setup, rollout, prompts, 0)
    if np.isnan(table).all():
        raise nothing_scored(len(prompts), "of the reference", config, key)
    scorers = setup.scorers.on_level(table)
    members = None if scorers.levels is None else [list(level) for level in scorers.levels]
    raw = scorers.combined(table)
    raw = raw[~np.isnan(raw)]
    mean, std = float(raw.mean()), float(raw.std())
    if config.missing_end_penalty is not None:
        return Centre(mean, std, config.missing_end_penalty, members)
    if config.bounded:
        return Centre(mean, std, PENALTY_WHERE_EQUAL, members)
    if std > LEAST_DEVIATION * max(1.0, abs(mean)):
        return Centre(mean, std, std, members)
    what = f"the scores of the reference's {len(raw)} completions are all {mean:g}: a missing end token"
    note(f"{what} costs {PENALTY_WHERE_EQUAL:g} (missing_end_penalty sets it)")
    return Centre(mean, std, PENALTY_WHERE_EQUAL, members)


@dataclass(frozen=True)
class Validated:
    """How an adapter does on prompts."""

    metrics: dict[str, float]
    """Score, KL, reward, length, end rate. Without score and reward, where no completion has a score."""
    rewards: list[float | None]
    """Of each prompt; None where it has no score."""


def validate(
    setup: Setup, prompts: Sequence[Prompt], centre: Centre, adapter: str | None, done: int, first: int = 0
) -> Validated:
    """One completion of each prompt with draws that never change. Scores are means over the completions that have one.

    Args:
        done: updates so far.
        first: number of the first prompt, which keys its draws.
    """
    config = setup.config
    numbers = range(first, first + len(prompts))
    rollout = sample_completions(setup, prompts, adapter, 1, -1, numbers)
    against = reference_scores(setup, prompts, centre, -1, numbers) if config.bounded else None
    scored = score(setup, rollout, prompts, centre, done, against)
    known = logprobs_of_all(setup, rollout, each_completion(rollout, setup), adapter)
    of_each = advantages.completion_kl(known.old_logprobs, known.ref_logprobs, known.mask)
    kl, given, earned = of_each.mean().item(), scored.given, 1 - config.kl_coef
    rewards = earned * scored.paid - config.kl_coef * of_each.cpu().double().numpy()
    metrics = {"kl": kl}
    if given.any():
        reward = float(earned * scored.paid[given].mean() - config.kl_coef * kl)
        metrics = {"score": float(scored.scores[given].mean()), "kl": kl, "reward": reward}
    metrics["completion_tokens"] = known.mask.sum(-1).float().mean().item()
    metrics["end_rate"] = float(np.mean(rollout.ended))
    return Validated(metrics, [float(one) if has else None for one, has in zip(rewards, given, strict=True)])


def nothing_scored(count: int, which: str, config: PolicyConfig, key: SourcesKey) -> RewardFunctionError:
    """The error that `count` completions have no score, which names what gave them none."""
    return RewardFunctionError(
        f"none of {count} completions {which} got a score: {', '.join(getattr(config, key))} returned None for them",
        where=key,
        allowed="a score of at least one of them",
        hint="add a reward that scores these prompts, or more prompts to an update",
    )
