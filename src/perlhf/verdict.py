"""Two ways of training compared on the same groups: intervals over seeds and groups, and what they say."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perlhf.statistics import cluster_bootstrap

Statistic = Callable[[NDArray[np.intp]], float]
Verdict = Literal["equivalent", "better", "worse", "undecided"]


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


def seeds_interval(
    first: Sequence[Statistic],
    second: Sequence[Statistic],
    groups: Sequence[str],
    noise: SeedNoise | None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean of `first` over its seeds, minus that of `second` (none: of `first` alone).

    Every resample draws groups, the same for both sides, so that what they share cancels, and adds what other seeds
    would have changed: deviation * sqrt(1 / seeds of first + 1 / seeds of second) * t, t drawn from Student's
    distribution. Drawing from two or three seeds again instead never leaves what they reached, and covers far less than
    it says.

    Args:
        first, second: for each seed, the value for an array of record indices.
        groups: group of each record, [n].
        noise: between seeds; None, and the interval is over groups alone.

    Returns:
        (low, high), as `statistics.cluster_bootstrap`.
    """
    generator = np.random.default_rng(seed + 1)
    sides = [side for side in (first, second) if side]
    width = noise.deviation * math.sqrt(sum(1 / len(side) for side in sides)) if noise else 0.0

    def drawn(indices: NDArray[np.intp]) -> float:
        means = [float(np.mean([value(indices) for value in side])) for side in sides]
        moved = width * generator.standard_t(noise.degrees) if noise else 0.0
        return means[0] - sum(means[1:]) + moved

    return cluster_bootstrap(drawn, groups, resamples, seed, level)


def verdict(low: float, high: float, margin: float) -> Verdict:
    """What the interval of a difference in quality (higher is better) says, given a margin fixed beforehand.

    `equivalent`: all of it within the margin; else `better` or `worse`: all of it on one side of 0; else `undecided`.
    """
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"
