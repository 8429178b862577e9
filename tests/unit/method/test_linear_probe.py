"""The head that logistic regression finds on standardised states."""

import numpy as np
import pytest

from perlhf.errors import DataError
from perlhf.method.linear_probe import STRENGTHS, Floats, _held_out_loss, _regression, fit


def some_states(count: int, width: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, width))


def test_one_weight_by_hand() -> None:
    # Minimise u^2 / 2 + C * 10 * log(1 + e^-u) over u, C = 0.1: u = 1 / (1 + e^u), so u = 0.40106.
    features = np.array([[1.0], [-1.0]] * 5)
    targets = np.array([True, False] * 5)
    assert _regression(features, targets, np.ones(10), 0.1)[0] == pytest.approx(0.40106, abs=1e-4)
    # Weight 2 counts twice: u = 2 / (1 + e^u), u = 0.67483.
    assert _regression(features, targets, np.full(10, 2.0), 0.1)[0] == pytest.approx(0.67483, abs=1e-4)


def test_held_out_loss_is_of_groups_not_seen() -> None:
    # Each group's label is a feature of its own: seen, it is learned; unseen, nothing is known of it.
    groups = [f"g{i // 4}" for i in range(40)]
    features = np.eye(10)[np.arange(40) // 4]
    targets = np.arange(40) // 4 % 2 == 0
    seen = _regression(features, targets, np.ones(40), 0.1)
    assert np.logaddexp(0, np.where(targets, -1, 1) * (features @ seen)).mean() < np.log(2) - 0.05
    assert _held_out_loss(features, targets, groups, np.ones(40), 0.1) == pytest.approx(np.log(2), abs=1e-9)


def test_ratings_are_told_apart_and_their_share_is_kept() -> None:
    states = some_states(600, 6)
    labels = [bool(row[2] + 1.5 > 0) for row in states]  # most are up
    probe = fit([row[None] for row in states], labels, [str(i) for i in range(600)], [1.0] * 600)
    scores = states @ probe.weight + probe.bias
    assert np.mean((scores > 0) == labels) > 0.95
    assert np.argmax(np.abs(probe.weight)) == 2 and probe.weight[2] > 0
    assert np.mean(1 / (1 + np.exp(-scores))) == pytest.approx(np.mean(labels), abs=0.02)
    assert probe.strength in STRENGTHS and 0 < probe.log_loss < np.log(2)


def test_the_scale_of_a_state_changes_no_score() -> None:
    states = some_states(200, 4, seed=1) + 7.0
    labels = [bool(row[0] - row[3] > 0) for row in states]
    groups, weights = [str(i // 2) for i in range(200)], [1.0] * 200
    stretch = np.array([1.0, 1000.0, 0.01, 30.0])
    plain = fit([row[None] for row in states], labels, groups, weights)
    stretched = fit([row[None] for row in states * stretch], labels, groups, weights)
    before, after = states @ plain.weight + plain.bias, (states * stretch) @ stretched.weight + stretched.bias
    np.testing.assert_allclose(after, before, rtol=1e-2, atol=1e-2)


def test_comparisons_are_learned_from_differences() -> None:
    states = some_states(400, 5, seed=2).reshape(200, 2, 5)
    for pair in states:
        if pair[0, 1] < pair[1, 1]:
            pair[[0, 1]] = pair[[1, 0]]  # the chosen one has more of feature 1
    probe = fit(list(states), [None] * 200, [str(i) for i in range(200)], [1.0] * 200)
    scores = states @ probe.weight + probe.bias
    assert np.mean(scores[:, 0] > scores[:, 1]) > 0.95
    assert scores.mean() == pytest.approx(0, abs=1e-9)


def test_both_kinds_and_a_single_group() -> None:
    states = some_states(40, 3, seed=3)
    ratings, shift = [row[None] for row in states[:20]], np.array([1.0, 0.0, 0.0])
    pairs = [np.stack([row + shift, row - shift]) for row in states[20:]]
    labels = [bool(row[0] > 0) for row in states[:20]] + [None] * 20
    probe = fit(ratings + pairs, labels, ["only"] * 40, [1.0] * 40)
    assert probe.weight[0] > 0 and np.isfinite(probe.bias)


def test_one_label_is_refused_and_one_comparison_is_enough() -> None:
    states = some_states(6, 3, seed=4)
    ups = [row[None] for row in states]
    with pytest.raises(DataError, match="one label only") as caught:
        fit(ups, [True] * 6, list("abcdef"), [1.0] * 6)
    assert caught.value.where == "probe_examples"
    with pytest.raises(DataError, match="no weight"):
        fit(ups, [True, False] * 3, list("abcdef"), [0.0] * 6)
    probe = fit([states[:2]], [None], ["a"], [1.0])
    assert states[0] @ probe.weight > states[1] @ probe.weight
