"""Metrics, intervals and baselines; expected values are worked by hand beside each test."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from perlhf.errors import DataError
from perlhf.method.metrics import (
    accuracy,
    auc,
    balanced_accuracy,
    calibration,
    cluster_bootstrap,
    distinct_ngrams,
    expected_calibration_error,
    log_loss,
    paired_bootstrap,
    pairwise_accuracy,
)


def is_nan(interval):
    return all(math.isnan(bound) for bound in interval)


# Metrics


def test_auc_counts_pairs():
    # Ups 0.35 and 0.8 against downs 0.1 and 0.4: 0.35 beats one, 0.8 beats both: 3 of 4.
    assert auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auc([1, 2], [True, False]) == 0
    assert auc([-5, 3, 4], [0, 1, 1]) == 1


def test_auc_ties_count_half():
    # Up 1 ties with down 1 (1/2) and loses to down 2 (0): 1/4.
    assert auc([1, 1, 2], [True, False, False]) == 0.25
    assert auc([7, 7, 7, 7, 7], [True, False, True, False, False]) == 0.5


def test_auc_agrees_with_scikit_learn():
    generator = np.random.default_rng(1)
    for ties in (3, 1000):
        scores, labels = generator.integers(ties, size=200), generator.random(200) < 0.2
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize(("label", "word"), [(True, "up"), (False, "down")])
def test_auc_and_balanced_accuracy_need_both_classes(label, word):
    with pytest.raises(DataError, match=f"all 3 labels are {word}"):
        auc([1, 2, 3], [label] * 3)
    with pytest.raises(DataError, match=f"all 3 labels are {word}"):
        balanced_accuracy([1, 2, 3], [label] * 3)


def test_accuracies_at_zero():
    # Ups 1, 2, -1 are 2 of 3 right; the down -3 is right: accuracy 3/4, balanced (2/3 + 1) / 2.
    scores, labels = [1, 2, -1, -3], [True, True, True, False]
    assert accuracy(scores, labels) == 0.75
    assert balanced_accuracy(scores, labels) == pytest.approx(5 / 6)
    assert accuracy([0.0, 0.0], [True, False]) == 0.5  # 0 predicts down
    assert accuracy([1, 2], [True, True]) == 1


def test_pairwise_accuracy_ties_count_half():
    assert pairwise_accuracy([1, 2, 3, 4], [0, 2, 5, 1]) == 0.625  # right, tie, wrong, right


def test_log_loss():
    # Probabilities of the label: 1/2, 3/4, 1/4: mean of log 2, log 4/3, log 4.
    assert log_loss([0, math.log(3), math.log(3)], [True, True, False]) == pytest.approx(math.log(32 / 3) / 3)
    assert log_loss([1000, -1000, 1000], [True, False, False]) == pytest.approx(1000 / 3)


def test_calibration_bins():
    rows = calibration([0.05, 0.15, 0.18, 1.0, 0.3], [False, True, False, True, True])
    assert [(row["low"], row["high"], row["observed"], row["n"]) for row in rows] == [
        (0.0, 0.1, 0.0, 1),
        (0.1, 0.2, 0.5, 2),
        (0.3, 0.4, 1.0, 1),
        (0.9, 1.0, 1.0, 1),
    ]
    assert [row["mean_predicted"] for row in rows] == pytest.approx([0.05, 0.165, 0.3, 1.0])


def test_expected_calibration_error():
    # (1 * 0.05 + 2 * |0.165 - 0.5| + 1 * 0.7 + 1 * 0) / 5
    found = expected_calibration_error([0.05, 0.15, 0.18, 1.0, 0.3], [False, True, False, True, True])
    assert found == pytest.approx(0.284)


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_calibration_refuses_what_is_no_probability(value):
    with pytest.raises(DataError, match="allowed: 0 to 1"):
        calibration([0.5, value], [True, False])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [True], r"shape \(2,\) and \(1,\)"),
        ([], [], r"shape \(0,\)"),
        ([[1.0], [2.0]], [[True], [False]], r"shape \(2, 1\)"),
        ([1.0, float("nan")], [True, False], "value nan at index 1"),
        ([float("-inf"), 1.0], [True, False], "value -inf at index 0"),
    ],
)
def test_metrics_refuse_broken_arrays(scores, labels, message):
    for metric in (auc, accuracy, balanced_accuracy, log_loss, calibration, pairwise_accuracy):
        with pytest.raises(DataError, match=message):
            metric(scores, labels)


def test_distinct_ngrams():
    texts, ids = ["a b a", "a  b"], [[1, 2, 1], [1, 2]]
    for tokens in (texts, ids):
        assert distinct_ngrams(tokens, 1) == 2 / 5
        assert distinct_ngrams(tokens, 2) == 2 / 3  # ab, ba, ab
        assert distinct_ngrams(tokens, 3) == 1
    assert math.isnan(distinct_ngrams(["a", "b"], 2))  # no n-gram crosses from one text to the next
    assert math.isnan(distinct_ngrams([], 1))


# Intervals


def test_bootstrap_of_two_groups():
    # Means of the resamples are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: quantiles 0.025 and 0.975 are 0 and 1,
    # quantiles 0.3 and 0.7 are 1/2. Of two groups, t at 0.45 is -0.158, times sqrt(2) -0.224: quantile 0.411 is 1/2;
    # t at 0.3 is -0.727, -1.027 with the root: quantile 0.152 is 0.
    values = np.array([0.0, 0.0, 1.0, 1.0])
    groups = ["a", "a", "b", "b"]
    assert cluster_bootstrap(lambda indices: values[indices].mean(), groups) == (0, 1)
    assert cluster_bootstrap(lambda indices: values[indices].mean(), groups, level=0.1) == (0.5, 0.5)
    assert cluster_bootstrap(lambda indices: values[indices].mean(), groups, level=0.4) == (0, 1)


def test_bootstrap_draws_whole_groups():
    groups = ["x", "y", "x", "z", "x", "y"]
    drawn = []
    cluster_bootstrap(lambda indices: drawn.append(np.bincount(indices, minlength=6)) or 0.0, groups, resamples=50)
    assert len(drawn) == 50
    for counts in drawn:
        assert counts[0] == counts[2] == counts[4] and counts[1] == counts[5]
        assert counts[0] + counts[1] + counts[3] == 3  # as many groups as there are


def test_bootstrap_is_keyed_by_seed_and_not_by_order():
    generator = np.random.default_rng(0)
    values, groups = generator.random(60), [f"g{index % 12}" for index in range(60)]
    first = cluster_bootstrap(lambda indices: values[indices].mean(), groups, 200, seed=3)
    assert first == cluster_bootstrap(lambda indices: values[indices].mean(), groups, 200, seed=3)
    assert first != cluster_bootstrap(lambda indices: values[indices].mean(), groups, 200, seed=4)
    turned = values[::-1]
    again = cluster_bootstrap(lambda indices: turned[indices].mean(), groups[::-1], 200, seed=3)
    assert again == pytest.approx(first, abs=1e-12)


def test_bootstrap_covers_the_truth_where_resampling_records_would_not():
    # 20 groups of 10 records that nearly share one normal value: there are only about 20 independent draws.
    generator = np.random.default_rng(5)
    groups = [f"g{index // 10}" for index in range(200)]
    alone = [f"r{index}" for index in range(200)]
    hits, hits_alone = 0, 0
    for seed in range(100):
        values = np.repeat(generator.normal(size=20), 10) + 0.1 * generator.normal(size=200)
        low, high = cluster_bootstrap(lambda i, values=values: values[i].mean(), groups, 200, seed)
        hits += low <= 0 <= high
        low, high = cluster_bootstrap(lambda i, values=values: values[i].mean(), alone, 200, seed)
        hits_alone += low <= 0 <= high
    assert hits >= 85  # 95 wanted; percentile intervals of 20 groups are a little narrow
    assert hits_alone <= 65  # three times too narrow


def test_bootstrap_leaves_out_a_few_undefined_resamples():
    # Group 0 comes at least four times in 10 draws with chance 0.013: below the share that is tolerated.
    values, groups = np.arange(10.0), [str(index) for index in range(10)]

    def statistic(indices):
        return values[indices].mean() if (indices == 0).sum() < 4 else float("nan")

    def raising(indices):
        return auc(values[indices], indices % 2 == 0)  # one class only: chance 2 * 0.5 ** 10

    assert any(math.isnan(statistic(np.array(drawn))) for drawn in ([0, 0, 0, 0], [1]))
    low, high = cluster_bootstrap(statistic, groups)
    assert 2 < low < 4.5 < high < 7
    low, high = cluster_bootstrap(raising, groups)
    assert 0 <= low < high <= 1


def test_bootstrap_gives_up_on_many_undefined_resamples():
    # One group all up, the other all down: half of the resamples have one class.
    scores, labels = np.array([1.0, 0.0]), np.array([True, False])
    assert is_nan(cluster_bootstrap(lambda indices: auc(scores[indices], labels[indices]), ["a", "b"]))
    assert is_nan(cluster_bootstrap(lambda indices: float("nan"), ["a", "b"]))


def test_bootstrap_of_one_group_or_none_has_no_interval():
    assert is_nan(cluster_bootstrap(lambda indices: 1.0, ["a", "a", "a"]))
    assert is_nan(cluster_bootstrap(lambda indices: 1.0, []))


def test_paired_bootstrap_cancels_what_both_share():
    generator = np.random.default_rng(2)
    values, groups = generator.normal(size=40), [str(index // 2) for index in range(40)]
    low, high = paired_bootstrap(lambda i: values[i].mean() + 0.25, lambda i: values[i].mean(), groups, 200)
    assert (low, high) == pytest.approx((0.25, 0.25))
    # First minus second, not the other way round: 1 against -1 in one of two groups, equal in the other.
    first, second = np.array([1.0, 0.0]), np.array([-1.0, 0.0])
    assert paired_bootstrap(lambda i: first[i].mean(), lambda i: second[i].mean(), ["a", "b"]) == (0, 2)
