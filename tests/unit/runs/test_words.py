"""Numbers in words."""

import pytest

from perlhf.runs.evaluations import Measured
from perlhf.runs.words import count, duration, interval, memory, number, with_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"), (0.84651, "0.847"), (-0.3271, "−0.327"), (1.0344, "1.03"), (25.31, "25.3"), (431.4, "431"),
        (53120.4, "53,120"), (0.0002, "2.0e−4"), (1e-12, "1.0e−12"), (None, "–"),
    ],
)  # fmt: skip
def test_numbers_have_about_three_digits(value: float | None, text: str):
    assert number(value) == text


def test_numbers_that_are_read_together_share_their_decimals():
    assert number(-0.3271, scale=1.03) == "−0.33"
    assert interval(Measured(0.5, 0.4, 1.25)) == "0.400 to 1.250"
    assert interval(Measured(0.5)) == ""
    assert interval(Measured(0.0, 0.0, 0.0)) == ""
    assert with_interval(Measured(0.5, 0.4, 1.25)) == "0.500 (0.400 to 1.250)"
    assert with_interval(Measured(0.5, 0.4, 1.25), scale=1.25) == "0.50 (0.40 to 1.25)"
    assert with_interval(Measured(0.5)) == "0.500"


def test_times_and_sizes_have_units():
    seconds = [3.14, 47.6, 365, 7630, None]
    assert [duration(each) for each in seconds] == ["3.1 s", "48 s", "6 min 05 s", "2 h 07 min", "–"]
    assert [memory(each) for each in (5 * 2**20, 1.5 * 2**30, None)] == ["5 MiB", "1.50 GiB", "–"]
    assert [count(each) for each in (921600, 0, None)] == ["921,600", "0", "–"]
