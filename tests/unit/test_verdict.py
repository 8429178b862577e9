"""Intervals over seeds and groups on numbers that can be worked by hand; what an interval says."""

import math

import numpy as np
import pytest

from perlhf.verdict import seeds_interval, verdict

GROUPS = [f"g{number}" for number in range(20)]


def constant(value: float):
    return lambda indices: value


def mean_of(values):
    return lambda indices: float(np.asarray(values)[indices].mean())


def test_constant_sides_differ_by_a_constant():
    assert seeds_interval([constant(3.0)], [constant(1.0)], GROUPS, 50) == (2.0, 2.0)
    assert seeds_interval([constant(3.0), constant(3.0)], [], GROUPS, 50) == (3.0, 3.0)


def test_seeds_are_drawn_too():
    """Two seeds at 0 and 1: a draw of two has mean 0, 1/2 or 1, the ends each with chance 1/4."""
    assert seeds_interval([constant(0.0), constant(1.0)], [], GROUPS, 400) == (0.0, 1.0)
    assert seeds_interval([constant(0.0), constant(1.0)], [], GROUPS, 400, level=0.7) == (0.0, 1.0)
    assert seeds_interval([constant(0.0), constant(1.0)], [], GROUPS, 400, level=0.3) == (0.5, 0.5)


def test_what_both_sides_share_cancels():
    """Values that vary widely between groups, and the same a tenth less: the difference doesn't vary."""
    values = np.arange(20.0)
    alone = seeds_interval([mean_of(values)], [], GROUPS, 200)
    assert alone[1] - alone[0] > 3
    low, high = seeds_interval([mean_of(values)], [mean_of(values - 0.1)], GROUPS, 200)
    assert (low, high) == pytest.approx((0.1, 0.1))


def test_groups_not_records_are_drawn():
    """Ten records of two groups: a draw of two groups has mean 0, 1/2 or 1 only."""
    values, groups = [0.0] * 5 + [1.0] * 5, ["a"] * 5 + ["b"] * 5
    assert seeds_interval([mean_of(values)], [], groups, 400) == (0.0, 1.0)


def test_one_group_has_no_interval():
    assert all(math.isnan(end) for end in seeds_interval([constant(1.0)], [], ["a", "a"], 10))


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
