"""Two ways of training compared on the same groups: intervals over seeds and groups, and what they say."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perlhf.statistics import cluster_bootstrap

Statistic = Callable[[NDArray[np.intp]], float]
Verdict = Literal["equivalent", "better", "worse", "undecided"]


def seeds_interval(
    first: Sequence[Statistic],
    second: Sequence[Statistic],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean of `first` over its seeds, minus that of `second` (none: of `first` alone).

    Every resample draws groups, the same for both sides, so that what they share cancels, and seeds of each side. With
    one seed a side the interval is over groups alone.

    Args:
        first, second: for each seed, the value for an array of record indices.
        groups: group of each record, [n].

    Returns:
        (low, high), as `statistics.cluster_bootstrap`.
    """
    generator = np.random.default_rng(seed + 1)

    def mean(side: Sequence[Statistic], indices: NDArray[np.intp]) -> float:
        drawn = generator.integers(len(side), size=len(side))
        return float(np.mean([side[i](indices) for i in drawn]))

    def difference(indices: NDArray[np.intp]) -> float:
        return mean(first, indices) - (mean(second, indices) if second else 0.0)

    return cluster_bootstrap(difference, groups, resamples, seed, level)


def verdict(low: float, high: float, margin: float) -> Verdict:
    """What the interval of a difference in quality (higher is better) says, given a margin fixed beforehand.

    `equivalent`: all of it within the margin; else `better` or `worse`: all of it on one side of 0; else `undecided`.
    """
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"
