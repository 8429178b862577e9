"""Intervals over seeds and groups on numbers that can be worked by hand; what an interval says."""

import math

import numpy as np
import pytest

from perlhf.method.metrics import SeedNoise, seed_noise, seeds_interval, verdict

GROUPS = [f"g{number}" for number in range(20)]


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


def test_no_margin_no_equivalence():
    assert verdict(0.0, 0.0, 0.0) == "undecided"
