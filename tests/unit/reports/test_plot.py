"""Figures as SVG: round ticks, labels that tell them apart, places worked out by hand, words that stay words."""

import math
import re

import pytest

from perlhf.reports.plot import RULE, Plot, labels, limits, thinned, ticks


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 10, False, ["0", "2", "4", "6", "8", "10"]),
        (-0.02, 1.02, False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.431, 0.664, False, ["0.45", "0.50", "0.55", "0.60", "0.65"]),
        (0, 1.03, True, ["0", "1"]),
        (0, 61.8, True, ["0", "20", "40", "60"]),
        (0, 12_400, True, ["0", "2,500", "5,000", "7,500", "10,000"]),
        (-1.2, 1.2, False, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0, 2.1e-4, False, ["0", "5.0e−5", "1.0e−4", "1.5e−4", "2.0e−4"]),
        (-9e-7, -1e-7, False, ["−8e−7", "−6e−7", "−4e−7", "−2e−7"]),
        (0, 3e7, False, ["0", "1e7", "2e7", "3e7"]),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, whole: bool, expected: list[str]):
    assert labels(ticks(low, high, whole)) == expected


def test_limits_leave_a_margin_and_are_never_of_no_width():
    assert limits([0, 10, 5], 0.05) == (-0.5, 10.5)
    assert limits([3.0], 0.05) == pytest.approx((2.85, 3.15))
    assert limits([0.0, 0.0], 0.05) == (-0.05, 0.05)
    assert limits([1e9, 1e9 + 1e-7], 0.05) == pytest.approx((0.95e9, 1.05e9))


@pytest.mark.parametrize("values", [[1.7e308, -1.7e308], [5e-324, 0.0], [1e300, 1e300], [-1e-295, 1e-295], [1e-310]])
def test_no_finite_numbers_stop_it(values: list[float]):
    plot = Plot()
    plot.line(list(enumerate(values)), "red", 1)
    assert "nan" not in plot.svg() and "inf" not in plot.svg()


def test_points_stand_where_their_numbers_say():
    """One digit a label, so that the axes begin at 8 + 8 * 0.58 = 12.64; they end 6 before the figure's edge."""
    plot = Plot((113, 122), xlim=(0, 10), ylim=(0, 9))
    plot.line([(0, 0), (10, 9), (5, 4.5)], "red", 2, 0.5, "1 2")
    plot.dots([(5, 4.5)], "blue", 3)
    svg = plot.svg()
    assert 'viewBox="0 0 113 122"' in svg
    # From 12.64 to 107 and from 122 - 16 = 106 up to 6: the middle is at 59.82 and 56.
    path = '<path d="M12.6 106L107 6L59.8 56" fill="none" stroke="red" stroke-width="2" stroke-opacity="0.5"'
    assert f'{path} stroke-dasharray="1 2"/>' in svg
    assert '<g fill="blue"><circle cx="59.8" cy="56" r="3"/></g>' in svg
    assert f'M12.6 106H107" fill="none" stroke="{RULE}"' in svg


def test_words_stay_words():
    plot = Plot(xlabel="<b>x", ylabel='"y"&')
    plot.line([(0, 0), (1, 1)], "red", 1)
    plot.words((1, 1), "</svg><script>", 3, 0)
    svg = plot.svg()
    assert "&lt;b&gt;x" in svg and "&lt;/svg&gt;&lt;script&gt;" in svg and "&#34;y&#34;&amp;" in svg
    assert set(re.findall(r"<(\w+)", svg)) == {"svg", "path", "g", "text"}


def test_an_arrow_keeps_its_distance_and_close_ends_have_none():
    plot = Plot(xlim=(0, 1), ylim=(0, 1))
    plot.arrow((0.2, 0.5), (0.8, 0.5))
    assert plot.svg().count("<path") == 3
    plot = Plot(xlim=(0, 1), ylim=(0, 1))
    plot.arrow((0.5, 0.5), (0.51, 0.5))
    assert plot.svg().count("<path") == 1


def test_a_long_line_loses_only_points_that_stand_above_each_other():
    short = [(x, 0.0) for x in range(1000)]
    assert thinned(short) == short
    noisy = [(x / 100, math.sin(x) * (x == 4321) * 7) for x in range(10_000)]
    kept = list(thinned(noisy))
    assert len(kept) < 1000 and kept[0] == noisy[0] and kept[-1] == noisy[-1] and noisy[4321] in kept
    assert kept == sorted(kept, key=lambda point: point[0])
