"""Intervals over seeds and groups on numbers that can be worked by hand; what an interval says."""

import math

import numpy as np
import pytest

from perlhf.method.metrics import SeedNoise, cluster_bootstrap, interval, seed_noise, seeds_spread, verdict, verdicts

GROUPS = [f"g{number}" for number in range(20)]


def seeds_interval(*given):
    return interval(seeds_spread(*given))


def constant(value: float):
    return lambda indices: value


def mean_of(values):
    return lambda indices: float(np.asarray(values)[indices].mean())


def test_constant_sides_differ_by_a_constant():
    assert seeds_interval([constant(3.0)], [constant(1.0)], GROUPS, None, 50) == (2.0, 2.0)
    assert seeds_interval([constant(3.0), constant(3.0)], [], GROUPS, SeedNoise(0.0, 1), 50) == (3.0, 3.0)


def test_noise_between_seeds_by_hand():
    """(0, 1) and (2, 2, 5): squares 1/2 and 6 over 1 + 2 degrees; a side of one seed adds nothing."""
    found = seed_noise([[0.0, 1.0], [2.0, 2.0, 5.0], [9.0]])
    assert found is not None and found.degrees == 3 and found.deviation == pytest.approx(math.sqrt(6.5 / 3))
    assert seed_noise([[1.0], [2.0]]) is None


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (4, 2.776), (1000, 1.962)])
def test_other_seeds_move_the_mean_by_students_distribution(degrees: int, quantile: float):
    """One seed against four: sqrt(1 + 1/4) deviations times the tabulated 97.5 % quantile, each way."""
    sides = [constant(1.0)], [constant(0.5)] * 4
    low, high = seeds_interval(*sides, GROUPS, SeedNoise(0.1, degrees), 40_000)
    wide = 0.1 * math.sqrt(1.25) * quantile
    assert (low, high) == pytest.approx((0.5 - wide, 0.5 + wide), rel=0.06)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Two sides of no difference, three seeds each that differ by 0.05: 95 % of 400 intervals hold 0, give or take."""
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        sides = [list(generator.normal(0, 0.05, 3)) for _ in range(2)]
        first, second = ([constant(value) for value in side] for side in sides)
        low, high = seeds_interval(first, second, GROUPS, seed_noise(sides), 200, trial)
        held += low < 0 < high
    assert 0.92 < held / 400 < 0.98


def test_what_both_sides_share_cancels():
    """Values that vary widely between groups, and the same a tenth less: the difference doesn't vary."""
    values = np.arange(20.0)
    alone = seeds_interval([mean_of(values)], [], GROUPS, None, 200)
    assert alone[1] - alone[0] > 3
    low, high = seeds_interval([mean_of(values)], [mean_of(values - 0.1)], GROUPS, None, 200)
    assert (low, high) == pytest.approx((0.1, 0.1))


def test_groups_not_records_are_drawn():
    """Ten records of two groups: a draw of two groups has mean 0, 1/2 or 1 only."""
    values, groups = [0.0] * 5 + [1.0] * 5, ["a"] * 5 + ["b"] * 5
    assert seeds_interval([mean_of(values)], [], groups, None, 400) == (0.0, 1.0)


def test_one_group_has_no_interval():
    assert all(math.isnan(end) for end in seeds_interval([constant(1.0)], [], ["a", "a"], None, 10))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.01, 0.015, "equivalent"),
        (0.001, 0.019, "equivalent"),
        (0.001, 0.03, "better"),
        (-0.05, -0.001, "worse"),
        (-0.05, 0.01, "undecided"),
        (-0.02, 0.01, "undecided"),  # the margin itself is outside
        (0.0, 0.05, "undecided"),
        (math.nan, math.nan, "undecided"),
    ],
)
def test_verdict(low: float, high: float, expected: str):
    assert verdict(low, high, 0.02) == expected


@pytest.mark.parametrize(("groups", "least", "most"), [(5, 0.87, 0.95), (10, 0.90, 0.97), (20, 0.92, 0.98)])
def test_intervals_of_few_groups_hold_the_truth(groups: int, least: float, most: float):
    """A mean of normal groups; percentiles alone hold it in 84, 90 and 93 % of cases."""
    generator, names, held, alone = np.random.default_rng(3), [str(number) for number in range(groups)], 0, 0
    for trial in range(300):
        values = generator.normal(size=groups)
        low, high = cluster_bootstrap(mean_of(values), names, 200, trial)
        held += low < 0 < high
        drawn = values[np.random.default_rng(trial).integers(groups, size=(200, groups))].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        alone += low < 0 < high
    assert least < held / 300 < most and alone < held


def trials(sides: int, seeds: int, apart: float, margin: float, count: int = 200):
    """Verdicts of that many sides, each `apart` from its reference; seeds differ by 0.05, groups don't matter."""
    generator = np.random.default_rng(4)
    for trial in range(count):
        found = {str(side): list(generator.normal(apart, 0.05, seeds)) for side in range(sides)}
        reference = list(generator.normal(0, 0.05, seeds))
        noise = seed_noise([reference, *found.values()])
        others = [constant(value) for value in reference]
        points = {
            side: seeds_spread([constant(value) for value in own], others, GROUPS[:2], noise, 5, trial)
            for side, own in found.items()
        }
        alone = [verdict(*interval(one), margin) for one in points.values()]
        yield set(verdicts(points, margin, noise).values()), set(alone)


def share(found: list, wanted: set) -> float:
    return float(np.mean([bool(said & wanted) for said in found]))


def test_a_difference_is_rarely_seen_where_there_is_none():
    """Four sides like their reference, three seeds each: any is called better or worse in 5 % of cases at the most."""
    corrected, alone = zip(*trials(sides=4, seeds=3, apart=0.0, margin=0.0), strict=True)
    assert share(list(corrected), {"better", "worse"}) <= 0.07  # 0.05, and 1.6 standard errors
    assert share(list(alone), {"better", "worse"}) > 0.09, "each by itself"


def test_equivalence_is_rarely_seen_where_there_is_none():
    """Two sides that differ by the margin: equivalent in 5 % of cases at the most; and seen where they are alike."""
    corrected, _ = zip(*trials(sides=2, seeds=5, apart=0.1, margin=0.1), strict=True)
    assert share(list(corrected), {"equivalent"}) <= 0.07
    alike, _ = zip(*trials(sides=2, seeds=5, apart=0.0, margin=0.1), strict=True)
    assert share(list(alike), {"equivalent"}) > 0.5
    far, _ = zip(*trials(sides=2, seeds=5, apart=0.2, margin=0.1), strict=True)
    assert share(list(far), {"better"}) > 0.8


def test_one_seed_a_side_decides_nothing():
    """Sides that are alike, of seeds that differ by 0.05: groups alone would call every single one better or worse."""
    corrected, alone = zip(*trials(sides=2, seeds=1, apart=0.0, margin=0.01, count=50), strict=True)
    assert all(said == {"undecided: one seed"} for said in corrected)
    assert share(list(alone), {"better", "worse"}) > 0.9


def test_holm_by_hand():
    """Points from -1 to 1 around each middle: the interval at 1 - a reaches 1 - a each way.

    Of three, 1 - 0.05 / 3 reaches 0.983: 1.0 is decided. Of two, 0.975 is reached: 0.98 is, at the second step. Then
    0.95 is reached: 0.96 is. By itself 0.94 isn't.
    """
    points, noise = np.linspace(-1, 1, 100_001), SeedNoise(0.1, 4)
    middles = {"a": 0.98, "b": 1.0, "c": 0.96}
    assert set(verdicts({s: points + m for s, m in middles.items()}, 0.0, noise).values()) == {"better"}
    found = verdicts({side: points + middle for side, middle in (middles | {"b": 0.0}).items()}, 0.0, noise)
    assert set(found.values()) == {"undecided"}, "0.98 is below 0.983, so that no step is taken"
    assert verdicts({"c": points - 0.96}, 0.0, noise) == {"c": "worse"}
    assert verdicts({"c": points + 0.94}, 0.0, noise) == {"c": "undecided"}
    assert verdicts({"c": np.zeros(0)}, 0.5, noise) == {"c": "undecided"}, "no interval"


def test_no_margin_no_equivalence():
    assert verdict(0.0, 0.0, 0.0) == "undecided"
