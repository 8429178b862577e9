"""What rounds show: by hand."""

import math

import numpy as np
import pytest

from perlhf.labelling.rounds.figures import (
    Judged,
    learning_curve,
    measured,
    of_members,
    pleasing_alone,
    points,
    right,
    spread,
)

GROUPS = [f"g{at}" for at in range(40)]


def test_the_mean_preference_is_right_or_wrong() -> None:
    ln3 = math.log(3)
    # Preferences 3/4 and 1/4 (mean 1/2); 3/4 and 1/2; 1/4 and 1/4.
    scores = np.array([[[ln3, 0], [ln3, 0], [0, ln3]], [[0, ln3], [0, 0], [0, ln3]]])
    judged = Judged(np.array([True, True, True]), ["a", "b", "c"])
    assert right(scores, judged) == pytest.approx([0.5, 1.0, 0.0])
    assert of_members(scores) == pytest.approx([0.5, 0.375, 0.75])
    assert spread(scores) == pytest.approx((0.25 + 0.125 + 0.0) / 3)


def test_what_is_unknown_is_left_out() -> None:
    values = np.array([1.0, math.nan, 0.0, 1.0])
    found = measured(values, ["a", "b", "c", "d"], 50, 0)
    assert found is not None and found["value"] == pytest.approx(2 / 3)
    assert measured(np.array([math.nan]), ["a"], 50, 0) is None
    assert measured(np.array([1.0]), ["a"], 50, 0) == {"value": 1.0, "low": None, "high": None}


def test_another_hundred_labels() -> None:
    # 60, 70 and 80 % of the same questions with 50, 100 and 200 labels: 10 points for each doubling.
    correct = np.zeros((3, 40))
    for row, count in enumerate((24, 28, 32)):
        correct[row, :count] = 1
    judged = Judged(np.ones(40, dtype=bool), GROUPS)
    found = learning_curve([50, 100, 200], correct, judged, 200, 0)
    assert found["gain"] == pytest.approx(0.1 * math.log2(1.5))
    assert found["low"] < found["gain"] < found["high"]
    assert "+5.8 points" in found["sentence"]
    few = Judged(judged.first[:4], GROUPS[:4])
    rising = np.array([[0.0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]])  # from 0 to 3/4 by 60 labels
    assert learning_curve([20, 40, 60], rising, few, 50, 0)["gain"] == 0.25
    assert "third round" in learning_curve([50, 100], correct[:2], judged, 200, 0)["sentence"]


@pytest.mark.parametrize(
    ("verdict", "start", "policy", "expected"),
    [
        ("second", "a", "b", 1.0),
        ("first", "a", "b", 0.0),
        ("both_bad", "a", "b", 0.5),
        (None, "same ", "same", 0.5),
        (None, "", "b", 1.0),
        (None, "a", " ", 0.0),
        (None, "a", "b", math.nan),
        ("skip", "a", "b", math.nan),
    ],
)
def test_points_of_a_duel(verdict: str | None, start: str, policy: str, expected: float) -> None:
    assert points(verdict, start, policy) == pytest.approx(expected, nan_ok=True)


def test_when_the_loop_began_to_please_its_reward_models_alone() -> None:
    def constant(value: float) -> np.ndarray:
        return np.full(40, value)

    predicted = [constant(0.6), constant(0.7), constant(0.8)]
    since, sentence = pleasing_alone(predicted, [constant(0.6), constant(0.6), constant(0.5)], GROUPS, 50, 0)
    assert since == 2 and "keep the policy of round 1" in sentence and "can't be ruled out" in sentence
    since, sentence = pleasing_alone(predicted, [constant(0.6), constant(0.5), constant(0.5)], GROUPS, 50, 0)
    assert since == 2 and "the interval ends below 0" in sentence
    since, sentence = pleasing_alone(predicted, [constant(0.6), constant(0.7), constant(0.8)], GROUPS, 50, 0)
    assert since is None and "In no round" in sentence
    since, sentence = pleasing_alone(predicted, [constant(0.6), constant(0.5), constant(0.7)], GROUPS, 50, 0)
    assert since is None and "In no round" in sentence, "a later round is liked more than any before"
    since, _ = pleasing_alone(predicted, [constant(0.7), constant(0.5), constant(0.6)], GROUPS, 50, 0)
    assert since == 2, "a later round is liked more than the second, and less than the first"
    since, _ = pleasing_alone([constant(0.5)], [constant(0.3)], GROUPS, 50, 0)
    assert since is None, "its reward models weren't pleased either"
    since, sentence = pleasing_alone([constant(0.6)], [constant(0.4)], GROUPS, 50, 0)
    assert since == 1 and "In round 1" in sentence
    unknown = [np.full(40, math.nan)]
    assert pleasing_alone([constant(0.9)], unknown, GROUPS, 50, 0)[0] is None
