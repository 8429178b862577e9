"""Metrics of evaluation: AUC, accuracy, calibration; cluster bootstrap; and what the interval of a difference says.

Scores are logits: above 0 means thumbs up. Labels are bools. Nothing here knows of models, runs or files.
"""

# scipy and scikit-learn ship no types, so what comes out of them is unknown to pyright:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perlhf.errors import DataError

Floats = NDArray[np.float64]
Statistic = Callable[[NDArray[np.intp]], float]
"""The value of a metric for an array of record indices."""
Verdict = Literal["equivalent", "better", "worse", "undecided", "undecided: one seed"]

MAX_UNDEFINED_SHARE = 0.1
"""With more resamples than this share undefined, an interval would describe only the lucky ones: it is (nan, nan)."""
LEVEL = 0.95
"""Of intervals, and of all verdicts about one reference together."""
POINTS = 20_000
"""Of a distribution whose quantiles are intervals: enough for those of a fraction of 1 - LEVEL."""


# Metrics


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that an up completion outscores a down one, ties counting half.

    Args:
        scores: float [n].
        labels: bool [n].

    Raises:
        DataError: one class only, unequal lengths, no or non-finite scores.
    """
    scores, labels = _scores_and_labels(scores, labels)
    ups, downs = both_classes(labels, "AUC")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2  # ranks from 1, ties share their mean rank
    return float((mean_ranks[place][labels].sum() - ups * (ups + 1) / 2) / (ups * downs))


def accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of labels that `score > 0` predicts. Raises `DataError` like `auc`, except on one class."""
    scores, labels = _scores_and_labels(scores, labels)
    return float(((scores > 0) == labels).mean())


def balanced_accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the accuracies on ups and on downs at `score > 0`. Raises `DataError` like `auc`."""
    scores, labels = _scores_and_labels(scores, labels)
    both_classes(labels, "balanced accuracy")
    return float(((scores[labels] > 0).mean() + (scores[~labels] <= 0).mean()) / 2)


def pairwise_accuracy(chosen_scores: ArrayLike, rejected_scores: ArrayLike) -> float:
    """Share of comparisons whose chosen completion scores higher, ties counting half.

    Raises:
        DataError: unequal lengths, no or non-finite scores.
    """
    chosen, rejected = _same_length(chosen_scores, rejected_scores)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def log_loss(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean binary cross-entropy of logits, in nats: log(1 + exp(-score)) for an up, log(1 + exp(score)) for a down.

    Raises `DataError` like `auc`, except on one class.
    """
    scores, labels = _scores_and_labels(scores, labels)
    return float(np.logaddexp(0, np.where(labels, -scores, scores)).mean())


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Predicted against observed share of ups, in bins of equal width.

    Returns:
        One dict per bin that is not empty, lowest first: `low`, `high` (the bin is [low, high), the last one closed),
        `mean_predicted`, `observed` (share of ups), `n`.

    Raises:
        DataError: a probability outside [0, 1], unequal lengths, nothing to bin.
    """
    probabilities, labels = _scores_and_labels(probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise DataError(f"probabilities go from {probabilities.min():g} to {probabilities.max():g}", allowed="0 to 1")
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "low": float(index / bins),
            "high": float((index + 1) / bins),
            "mean_predicted": float(probabilities[place == index].mean()),
            "observed": float(labels[place == index].mean()),
            "n": int((place == index).sum()),
        }
        for index in np.unique(place)
    ]


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Mean over examples of |predicted - observed| of their bin (Naeini et al., AAAI 2015).

    Raises `DataError` like `calibration`.
    """
    rows = calibration(probabilities, labels, bins)
    total = sum(row["n"] for row in rows)
    return sum(row["n"] * abs(row["mean_predicted"] - row["observed"]) for row in rows) / total


def distinct_ngrams(texts: Sequence[str | Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts (Li et al., arXiv 1510.03055); nan when no text has n tokens.

    A string is split at white space; token ids are taken as they are. The value falls as the number of texts grows, so
    compare equal numbers only, and give it no bootstrap interval: a resample repeats texts.
    """
    ngrams = [
        tuple(tokens[start : start + n])
        for tokens in (text.split() if isinstance(text, str) else text for text in texts)
        for start in range(len(tokens) - n + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


# Intervals


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Interval of a statistic when whole groups, not records, are the independent draws.

    The percentile interval, its quantiles moved outwards as Student's distribution asks (`spread`).

    Args:
        statistic: value for an array of record indices; an index comes as often as its group was drawn.
        groups: group of each record, [n].

    Returns:
        (low, high). Resamples where the statistic is not finite or raises `DataError` (as `auc` does on one class) are
        left out; if they are more than `MAX_UNDEFINED_SHARE`, or there are fewer than two groups: (nan, nan).
    """
    return interval(spread(statistic, groups, resamples, seed), level)


def spread(statistic: Statistic, groups: Sequence[str], resamples: int = 1000, seed: int = 0) -> Floats:
    """What a statistic may be with other groups: ascending [POINTS]; empty where `cluster_bootstrap` has no interval.

    Resamples of few groups vary too little: the percentile interval of a mean of 5 normal groups holds the truth in
    84 % of cases, of 10 in 90 %, of 20 in 93 %. So the quantile p of the resamples stands where Student's distribution
    has it, at p' = Phi(sqrt(n / (n - 1)) t(p, n - 1)) for n groups (Hesterberg, arXiv 1411.5279, "expanded
    percentile"). That gives 91, 94 and 95 %, and never leaves what resamples reached: with 5 groups it is still short.
    """
    places: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        places.setdefault(group, []).append(index)
    if (count := len(places)) < 2:
        return np.zeros(0)
    members = [np.array(places[group], dtype=np.intp) for group in sorted(places)]
    generator = np.random.default_rng(seed)
    values = np.array(
        [
            _value_or_nan(statistic, np.concatenate([members[index] for index in drawn]))
            for drawn in generator.integers(count, size=(resamples, count))
        ]
    )
    defined = values[np.isfinite(values)]
    if len(defined) < (1 - MAX_UNDEFINED_SHARE) * resamples:
        return np.zeros(0)
    return np.quantile(defined, _expanded(count))


@cache
def _expanded(groups: int) -> Floats:
    """Where the quantiles of `POINTS` equal parts are looked for among resamples of so many groups, at least two."""
    from scipy.special import ndtr, stdtrit

    students = stdtrit(groups - 1, (np.arange(POINTS) + 0.5) / POINTS)
    return ndtr(math.sqrt(groups / (groups - 1)) * students)


def interval(points: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The middle share `level` of a distribution, as `spread` gives it; (nan, nan) of an empty one."""
    if not len(points):
        return float("nan"), float("nan")
    low, high = np.quantile(points, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    first: Callable[[NDArray[np.intp]], float],
    second: Callable[[NDArray[np.intp]], float],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Interval of `first - second` where both see the same resample, so that what they share cancels.

    Else as `cluster_bootstrap`.
    """
    return cluster_bootstrap(lambda indices: first(indices) - second(indices), groups, resamples, seed, level)


# Two ways of training compared


@dataclass(frozen=True)
class SeedNoise:
    """How far a metric on the same records differs between seeds."""

    deviation: float
    degrees: int
    """Degrees of freedom of the estimate: seeds less sides."""


def seed_noise(values: Iterable[Sequence[float]]) -> SeedNoise | None:
    """Pooled standard deviation between seeds, taken to be that of every side; None where no side has two seeds.

    deviation^2 = sum over sides of the squared distances from the side's mean / sum over sides of (seeds - 1)

    Args:
        values: of each side, the metric of each seed.
    """
    sides = [np.array(side, dtype=float) for side in values]
    degrees = sum(len(side) - 1 for side in sides)
    if degrees == 0:
        return None
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in sides)
    return SeedNoise(math.sqrt(squares / degrees), degrees)


def seeds_spread(
    first: Sequence[Statistic],
    second: Sequence[Statistic],
    groups: Sequence[str],
    noise: SeedNoise | None,
    resamples: int = 1000,
    seed: int = 0,
) -> Floats:
    """What the mean of `first` over its seeds, minus that of `second` (none: `first` alone), may be: [POINTS].

    Every resample draws groups, the same for both sides, so that what they share cancels (`spread`). To that comes what
    other seeds would have changed: deviation * sqrt(1 / seeds of first + 1 / seeds of second) * t, t drawn from
    Student's distribution. Drawing from two or three seeds again instead never leaves what they reached, and covers far
    less than it says.

    Args:
        first, second: for each seed, the value for an array of record indices.
        groups: group of each record, [n].
        noise: between seeds; None, and only groups vary.

    Returns:
        Points of the distribution; none where `cluster_bootstrap` has no interval.
    """
    sides = [side for side in (first, second) if side]

    def over_seeds(indices: NDArray[np.intp]) -> float:
        means = [float(np.mean([value(indices) for value in side])) for side in sides]
        return means[0] - sum(means[1:])

    points = spread(over_seeds, groups, resamples, seed)
    if noise is None or not len(points):
        return points
    width = noise.deviation * math.sqrt(sum(1 / len(side) for side in sides))
    return points + width * np.random.default_rng(seed + 1).standard_t(noise.degrees, len(points))


def verdicts(
    differences: Mapping[str, Floats], margin: float, noise: SeedNoise | None, level: float = LEVEL
) -> dict[str, Verdict]:
    """What several sides' differences from one reference say, wrong about any of them in 1 - level of cases (Holm).

    A side is decided by its interval (`verdict`) at 1 - (1 - level) / sides that are left undecided, until no further
    one is. So an interval at `level` that excludes 0 may belong to an undecided side. Without a side of several seeds
    nobody knows what another seed would have given: all are `undecided: one seed`.

    Args:
        differences: of each side, points of its distribution, as `seeds_spread` gives them.
        margin: as `verdict`.
        noise: between seeds.
    """
    said: dict[str, Verdict] = {}
    for side in differences:
        said[side] = "undecided" if noise else "undecided: one seed"
    left = dict(differences) if noise else {}
    while left:
        at = 1 - (1 - level) / len(left)
        found: dict[str, Verdict] = {side: verdict(*interval(points, at), margin) for side, points in left.items()}
        still = {side: points for side, points in left.items() if found[side] == "undecided"}
        if len(still) == len(left):
            break
        said |= found
        left = still
    return said


def verdict(low: float, high: float, margin: float) -> Verdict:
    """What the interval of a difference in quality (higher is better) says, given a margin fixed beforehand.

    `equivalent`: all of it within the margin; else `better` or `worse`: all of it on one side of 0; else `undecided`.
    """
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"


# Checks


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    numbers, truths = _same_length(scores, labels)
    return numbers, truths.astype(bool)


def _same_length(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    left, right = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if left.shape != right.shape or left.ndim != 1 or not left.size:
        raise DataError(f"arrays of shape {left.shape} and {right.shape}", allowed="two of one equal length above 0")
    for values in (left, right):
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"value {values[index]} at index {index}", allowed="finite numbers")
    return left, right


def both_classes(labels: NDArray[np.bool_], what: str) -> tuple[int, int]:
    """Number of ups and of downs, both above 0."""
    ups = int(labels.sum())
    if ups in (0, len(labels)):
        raise DataError(
            f"all {len(labels)} labels are {'up' if ups else 'down'}: {what} needs both", allowed="at least one of each"
        )
    return ups, len(labels) - ups


def _value_or_nan(statistic: Callable[[NDArray[np.intp]], float], indices: NDArray[np.intp]) -> float:
    try:
        return float(statistic(indices))
    except DataError:
        return float("nan")


def of_scores(rated: Sequence[float], labels: Sequence[bool], compared: Sequence[Sequence[float]]) -> dict[str, float]:
    """Accuracy, balanced accuracy and AUC of ratings, pairwise accuracy of comparisons; the sum of their mean losses.

    Args:
        rated, labels: scores of ratings, and what was said.
        compared: scores of the chosen and of the rejected completion of each comparison.
    """
    found: dict[str, float] = {}
    losses: list[float] = []
    if labels:
        found["accuracy"] = accuracy(rated, labels)
        losses.append(log_loss(rated, labels))
        if len(set(labels)) == 2:
            found["balanced_accuracy"] = balanced_accuracy(rated, labels)
            found["auc"] = auc(rated, labels)
    if compared:
        chosen, rejected = [scores[0] for scores in compared], [scores[1] for scores in compared]
        found["pairwise_accuracy"] = pairwise_accuracy(chosen, rejected)
        losses.append(float(np.logaddexp(0, np.array(rejected) - np.array(chosen)).mean()))
    return found | {"loss": sum(losses)}
