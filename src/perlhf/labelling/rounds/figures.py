"""What rounds have shown: how good reward models and policies are by labels that nothing was learned from.

Accuracies of all rounds are of the same held-out questions, and duels of all rounds of the same prompts, so that rounds
can be compared. Intervals are at 95 %, over groups of prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perlhf.labelling.rounds.order import Floats, preferences
from perlhf.method.metrics import cluster_bootstrap

MORE_LABELS = 100
"""How many more labels the sentence about them is of."""
POINTS = {"first": 0.0, "second": 1.0, "equal": 0.5, "both_bad": 0.5}
"""Of the policy, whose answer is the second one of a duel."""


@dataclass(frozen=True)
class Judged:
    """The held-out questions that have a preference."""

    first: NDArray[np.bool_]
    """Which of them prefer the first answer: [questions]."""
    groups: Sequence[str]


def right(scores: Floats, judged: Judged) -> Floats:
    """1 where the mean of the members' preferences is that of the label, 0 where it isn't, 1/2 at 1/2: [questions].

    Args:
        scores: [members, questions, 2].
    """
    preferred = preferences(scores).mean(axis=0)
    agrees = np.where(judged.first, preferred > 0.5, preferred < 0.5).astype(float)
    return np.where(preferred == 0.5, 0.5, agrees)


def measured(values: Floats, groups: Sequence[str], resamples: int, seed: int) -> dict[str, float | None] | None:
    """Mean of what is known (nan: unknown) with its interval; None where nothing is."""
    known = ~np.isnan(values)
    if not known.any():
        return None
    values, of = values[known], [group for group, has in zip(groups, known, strict=True) if has]
    low, high = cluster_bootstrap(lambda at: float(values[at].mean()), of, resamples, seed)
    ends = {"low": low, "high": high}
    return {"value": float(values.mean())} | {key: float(v) if np.isfinite(v) else None for key, v in ends.items()}


def learning_curve(labels: Sequence[int], correct: Floats, judged: Judged, resamples: int, seed: int) -> dict[str, Any]:
    """Accuracy against the number of labels, and what another hundred would bring.

    By least squares, accuracy = a + b ln(labels); the gain is b ln((n + 100) / n), or what is left up to 1. It tells
    how it would go on if it goes on as it did, and needs three rounds.

    Args:
        labels: learned from, of each round.
        correct: `right` of each round: [rounds, questions].
    """
    if len(set(labels)) < 3 or not len(judged.groups):
        return {"sentence": "What more labels would bring is said from the third round on."}
    logs = np.log(np.array(labels, dtype=float))
    centred = logs - logs.mean()
    more = np.log((labels[-1] + MORE_LABELS) / labels[-1])

    def gain(at: NDArray[np.intp]) -> float:
        accuracy = correct[:, at].mean(axis=1)
        found = (centred @ accuracy) / (centred @ centred) * more
        return float(np.clip(found, -accuracy[-1], 1 - accuracy[-1]))  # no accuracy is beyond 0 or 1

    value = gain(np.arange(correct.shape[1]))
    low, high = cluster_bootstrap(gain, judged.groups, resamples, seed)
    said = f"Another {MORE_LABELS} labels would bring about {100 * value:+.1f} points of held-out accuracy"
    interval = f" ({100 * low:+.1f} to {100 * high:+.1f})" if np.isfinite([low, high]).all() else ""
    return {"gain": value, "low": low, "high": high, "sentence": f"{said}{interval}, if it goes on as it did."}


def pleasing_alone(
    predicted: Sequence[Floats], preferred: Sequence[Floats], groups: Sequence[str], resamples: int, seed: int
) -> tuple[int | None, str]:
    """Since which round the policy has risen for its reward models and not for the labels; and a sentence.

    It rose for the reward models where the probability that they give it against the start is above that of the round
    before by more than chance (its interval is above 0), and it didn't for the labels where it won no more duels than
    before; and no later round won more than before it. Before the first round both are 1/2.

    Args:
        predicted: of each round, by prompt: the mean of the members' preferences for the policy's answer.
        preferred: of each round, by prompt: 1 where the label prefers it, 0 where it doesn't, 1/2 for neither; nan
            where nobody said.
    """
    before = np.full(len(groups), 0.5), np.full(len(groups), 0.5)
    for number, (by_model, by_labels) in enumerate(zip(predicted, preferred, strict=True), start=1):
        rose = measured(by_model - before[0], groups, resamples, seed)
        liked = measured(by_labels - before[1], groups, resamples, seed)
        if rose is None or liked is None:
            continue
        low, value, high = rose["low"], liked["value"], liked["high"]
        assert value is not None
        again = any(_mean(later - before[1]) > 0 for later in preferred[number:])
        if low is not None and low > 0 and value <= 0 and not again:
            sure = "the interval ends below 0" if high is not None and high < 0 else "chance can't be ruled out"
            return number, (
                f"From round {number} on the policy pleases the reward models more, and the labels no more than before "
                f"(duels {100 * value:+.0f} points; {sure}): keep the policy of round {number - 1}, or ask more of "
                "what the policy writes now."
                if number > 1
                else "In round 1 the policy pleases the reward models more than the start does, and the labels don't "
                f"prefer it (duels {100 * value:+.0f} points; {sure}): more labels come before more updates."
            )
        before = by_model, by_labels
    if not predicted:
        return None, "No round is finished."
    return None, "In no round did the policy rise for its reward models alone."


def _mean(values: Floats) -> float:
    """Of what is known; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def points(verdict: str | None, start: str, policy: str) -> float:
    """What a policy's answer gets against the start's; nan where nobody said.

    Nobody is asked about equal texts (1/2), or about an empty one, which loses.
    """
    if start.strip() == policy.strip():
        return 0.5
    if not start.strip() or not policy.strip():
        return 1.0 if policy.strip() else 0.0
    return POINTS.get(verdict or "", float("nan"))


def of_members(scores: Floats) -> Floats:
    """The mean of the members' preferences for the second answer, [pairs]; nan where a pair has no score."""
    return 1 - preferences(scores).mean(axis=0)


def spread(scores: Floats) -> float | None:
    """How far members disagree: the mean over pairs of the deviation of their preferences; None without any pair."""
    deviations = preferences(scores).std(axis=0)
    known = deviations[~np.isnan(deviations)]
    return float(known.mean()) if len(known) else None


def words(found: Mapping[str, float | None] | None, digits: int = 2) -> str:
    """`0.71 (0.62 to 0.79)`."""
    if found is None or found["value"] is None:
        return "–"
    if found.get("low") is None or found.get("high") is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
