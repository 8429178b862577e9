"""Statistics of evaluation: classification metrics, cluster bootstrap, and text baselines that reward models must beat.

Scores are logits: above 0 means thumbs up. Labels are bools. Nothing here knows of models, runs or files.
scikit-learn takes over a second to import, so the baselines import it where they use it.
"""

# scipy and scikit-learn ship no types, so what comes out of them is unknown to pyright:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perlhf.data.records import Comparison, Rating, Text
from perlhf.errors import DataError

Floats = NDArray[np.float64]
Labelled = Sequence[Rating] | Sequence[Comparison]
"""Records of one kind; mixing both kinds is a `DataError`."""
Kind = TypeVar("Kind", Rating, Comparison)

MAX_UNDEFINED_SHARE = 0.1
"""With more resamples than this share undefined, an interval would describe only the lucky ones: it is (nan, nan)."""

# Chosen by 5-fold cross-validation over groups, in favour of the baseline (docs/experiments.md).
RATING_C, COMPARISON_C, COMPLETION_SCALE = 5.0, 1.0, 0.5


# Metrics


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that an up completion outscores a down one, ties counting half.

    Args:
        scores: float [n].
        labels: bool [n].

    Raises:
        DataError: one class only, unequal lengths, no or non-finite scores.
    """
    scores, labels = _scores_and_labels(scores, labels)
    ups, downs = _both_classes(labels, "AUC")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2  # ranks from 1, ties share their mean rank
    return float((mean_ranks[place][labels].sum() - ups * (ups + 1) / 2) / (ups * downs))


def accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of labels that `score > 0` predicts. Raises `DataError` like `auc`, except on one class."""
    scores, labels = _scores_and_labels(scores, labels)
    return float(((scores > 0) == labels).mean())


def balanced_accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the accuracies on ups and on downs at `score > 0`. Raises `DataError` like `auc`."""
    scores, labels = _scores_and_labels(scores, labels)
    _both_classes(labels, "balanced accuracy")
    return float(((scores[labels] > 0).mean() + (scores[~labels] <= 0).mean()) / 2)


def pairwise_accuracy(chosen_scores: ArrayLike, rejected_scores: ArrayLike) -> float:
    """Share of comparisons whose chosen completion scores higher, ties counting half.

    Raises:
        DataError: unequal lengths, no or non-finite scores.
    """
    chosen, rejected = _same_length(chosen_scores, rejected_scores)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def log_loss(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean binary cross-entropy of logits, in nats: log(1 + exp(-score)) for an up, log(1 + exp(score)) for a down.

    Raises `DataError` like `auc`, except on one class.
    """
    scores, labels = _scores_and_labels(scores, labels)
    return float(np.logaddexp(0, np.where(labels, -scores, scores)).mean())


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Predicted against observed share of ups, in bins of equal width.

    Returns:
        One dict per bin that is not empty, lowest first: `low`, `high` (the bin is [low, high), the last one closed),
        `mean_predicted`, `observed` (share of ups), `n`.

    Raises:
        DataError: a probability outside [0, 1], unequal lengths, nothing to bin.
    """
    probabilities, labels = _scores_and_labels(probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise DataError(f"probabilities go from {probabilities.min():g} to {probabilities.max():g}", allowed="0 to 1")
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "low": float(index / bins),
            "high": float((index + 1) / bins),
            "mean_predicted": float(probabilities[place == index].mean()),
            "observed": float(labels[place == index].mean()),
            "n": int((place == index).sum()),
        }
        for index in np.unique(place)
    ]


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Mean over examples of |predicted - observed| of their bin (Naeini et al., AAAI 2015).

    Raises `DataError` like `calibration`.
    """
    rows = calibration(probabilities, labels, bins)
    total = sum(row["n"] for row in rows)
    return sum(row["n"] * abs(row["mean_predicted"] - row["observed"]) for row in rows) / total


def distinct_ngrams(texts: Sequence[str | Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts (Li et al., arXiv 1510.03055); nan when no text has n tokens.

    A string is split at white space; token ids are taken as they are. The value falls as the number of texts grows, so
    compare equal numbers only, and give it no bootstrap interval: a resample repeats texts.
    """
    ngrams = [
        tuple(tokens[start : start + n])
        for tokens in (text.split() if isinstance(text, str) else text for text in texts)
        for start in range(len(tokens) - n + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


# Intervals


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic when whole groups, not records, are the independent draws.

    Args:
        statistic: value for an array of record indices; an index comes as often as its group was drawn.
        groups: group of each record, [n].

    Returns:
        (low, high). Resamples where the statistic is not finite or raises `DataError` (as `auc` does on one class) are
        left out; if they are more than `MAX_UNDEFINED_SHARE`, or there are fewer than two groups: (nan, nan).
    """
    places: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        places.setdefault(group, []).append(index)
    if len(places) < 2:
        return float("nan"), float("nan")
    members = [np.array(places[group], dtype=np.intp) for group in sorted(places)]
    generator = np.random.default_rng(seed)
    values = np.array(
        [
            _value_or_nan(statistic, np.concatenate([members[index] for index in drawn]))
            for drawn in generator.integers(len(members), size=(resamples, len(members)))
        ]
    )
    defined = values[np.isfinite(values)]
    if len(defined) < (1 - MAX_UNDEFINED_SHARE) * resamples:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    first: Callable[[NDArray[np.intp]], float],
    second: Callable[[NDArray[np.intp]], float],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of `first - second` where both see the same resample, so that what they share cancels.

    Else as `cluster_bootstrap`.
    """
    return cluster_bootstrap(lambda indices: first(indices) - second(indices), groups, resamples, seed, level)


def mean_interval(
    values: ArrayLike, groups: Sequence[str], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Mean of `values` [n] with its cluster-bootstrap interval: `value`, `low`, `high` (nan as in `cluster_bootstrap`).

    Raises:
        DataError: no values, or another number of groups.
    """
    numbers = np.asarray(values, dtype=float)
    if len(numbers) != len(groups) or not len(numbers):
        raise DataError(f"{len(numbers)} values for {len(groups)} groups", allowed="one group per value, at least one")
    low, high = cluster_bootstrap(lambda indices: float(numbers[indices].mean()), groups, resamples, seed, level)
    return {"value": float(numbers.mean()), "low": low, "high": high}


# Baselines


def text_of(text: Text) -> str:
    """Plain text as it is; chat messages as `role: content` lines."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def bag_of_words(train: Labelled, test: Labelled) -> Floats:
    """Scores by logistic regression on tf-idf of words and word pairs, fitted on `train`; deterministic.

    Ratings: features of prompt + completion, and of the completion alone. Comparisons: difference of the two
    completions' features, no intercept (the prompt cancels).

    Returns:
        Ratings: logits [n]. Comparisons: [n, 2], chosen and rejected.

    Raises:
        DataError: nothing to train or score, mixed kinds, train ratings of one class, no word in any train text.
    """
    if _kind(train, test) is Rating:
        return _rating_words(_narrow(Rating, train), _narrow(Rating, test))
    return _comparison_words(_narrow(Comparison, train), _narrow(Comparison, test))


def position_baseline(train: Sequence[Rating], test: Sequence[Rating]) -> Floats:
    """Logits [n] from the number of turns in the prompt alone.

    Raises:
        DataError: as `bag_of_words`; also for comparisons, whose two completions stand at the same turn.
    """
    if _kind(train, test) is not Rating:
        raise DataError("the position baseline needs ratings: both completions of a comparison stand at the same turn")
    return _one_feature(train, test, lambda rating: 1 if isinstance(rating.prompt, str) else len(rating.prompt))


def length_baseline(train: Labelled, test: Labelled) -> Floats:
    """Scores from the completion's length alone.

    Returns:
        Ratings: logits [n] from log(1 + characters), fitted on `train`. Comparisons: [n, 2], characters of chosen and
        rejected where the longer wins more often in `train`, else minus these: "pick the longer" or "the shorter".

    Raises:
        DataError: as `bag_of_words`.
    """
    if _kind(train, test) is Rating:
        ratings = _narrow(Rating, train), _narrow(Rating, test)
        return _one_feature(*ratings, lambda rating: float(np.log1p(len(text_of(rating.completion)))))
    seen, found = (_lengths(_narrow(Comparison, side)) for side in (train, test))
    longer_wins = np.sign(seen[:, 0] - seen[:, 1]).sum() > 0
    return found if longer_wins else -found


def _lengths(pairs: Sequence[Comparison]) -> Floats:
    """Characters of chosen and rejected, [n, 2]."""
    return np.array([[len(text_of(pair.chosen)), len(text_of(pair.rejected))] for pair in pairs], dtype=float)


def _rating_words(train: Sequence[Rating], test: Sequence[Rating]) -> Floats:
    from scipy.sparse import hstack

    train_columns, test_columns = [], []
    for scale, text in ((1.0, _whole_text), (COMPLETION_SCALE, _completion_text)):
        vectoriser, words = _words([text(rating) for rating in train])
        train_columns.append(scale * words)
        test_columns.append(scale * vectoriser.transform([text(rating) for rating in test]))
    return _logistic(hstack(train_columns).tocsr(), train, hstack(test_columns).tocsr(), RATING_C)


def _comparison_words(train: Sequence[Comparison], test: Sequence[Comparison]) -> Floats:
    from scipy.sparse import diags
    from sklearn.linear_model import LogisticRegression

    if len(train) < 2:
        raise DataError("one comparison to train on", allowed="at least two")
    chosen, rejected = [text_of(pair.chosen) for pair in train], [text_of(pair.rejected) for pair in train]
    vectoriser, words = _words(chosen + rejected)
    # Without intercept a comparison and its mirror image are one example: every second is mirrored, for two classes.
    signs = np.where(np.arange(len(train)) % 2, -1.0, 1.0)
    differences = diags(signs) @ (words[: len(train)] - words[len(train) :])
    model = LogisticRegression(C=COMPARISON_C, fit_intercept=False, max_iter=2000)
    model.fit(differences.tocsr(), signs, sample_weight=[pair.weight for pair in train])
    sides = [text_of(pair.chosen) for pair in test], [text_of(pair.rejected) for pair in test]
    return np.stack([vectoriser.transform(side) @ model.coef_[0] for side in sides], axis=1)


def _one_feature(train: Sequence[Rating], test: Sequence[Rating], feature: Callable[[Rating], float]) -> Floats:
    train_column, test_column = (
        np.array([[feature(rating)] for rating in side], dtype=float) for side in (train, test)
    )
    mean, spread = train_column.mean(), train_column.std() or 1.0
    return _logistic((train_column - mean) / spread, train, (test_column - mean) / spread, 1.0)


def _logistic(train_features: Any, train: Sequence[Rating], test_features: Any, inverse_penalty: float) -> Floats:
    """Logits [n] for `test_features` of a logistic regression on the train labels, each with its record's weight."""
    from sklearn.linear_model import LogisticRegression

    labels = np.array([rating.label for rating in train], dtype=bool)
    _both_classes(labels, "a baseline")
    model = LogisticRegression(C=inverse_penalty, max_iter=2000)
    model.fit(train_features, labels, sample_weight=[rating.weight for rating in train])
    return np.asarray(model.decision_function(test_features), dtype=float)


def _words(texts: list[str]) -> tuple[Any, Any]:
    """Fitted vectoriser and its sparse [texts, words]: tf-idf of words and word pairs, with 1 + log(count)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(character.isalnum() for text in texts for character in text):
        raise DataError("no word in any train text: bag of words has nothing to learn from")
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+")
    return vectoriser, vectoriser.fit_transform(texts)


def _completion_text(rating: Rating) -> str:
    return text_of(rating.completion)


def _whole_text(rating: Rating) -> str:
    return f"{text_of(rating.prompt)}\n{text_of(rating.completion)}"


# Checks


def _kind(train: Labelled, test: Labelled) -> type[Rating] | type[Comparison]:
    """The one kind of record that both sides hold."""
    if not train or not test:
        raise DataError(f"{len(train)} train and {len(test)} test records", allowed="at least one each")
    kinds = {type(record) for side in (train, test) for record in side}
    for kind in (Rating, Comparison):
        if kinds == {kind}:
            return kind
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DataError(f"a baseline got records of kind {found}", allowed="only Rating, or only Comparison")


def _narrow(kind: type[Kind], records: Labelled) -> list[Kind]:
    return [record for record in records if isinstance(record, kind)]


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    numbers, truths = _same_length(scores, labels)
    return numbers, truths.astype(bool)


def _same_length(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    left, right = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if left.shape != right.shape or left.ndim != 1 or not left.size:
        raise DataError(f"arrays of shape {left.shape} and {right.shape}", allowed="two of one equal length above 0")
    for values in (left, right):
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"value {values[index]} at index {index}", allowed="finite numbers")
    return left, right


def _both_classes(labels: NDArray[np.bool_], what: str) -> tuple[int, int]:
    """Number of ups and of downs, both above 0."""
    ups = int(labels.sum())
    if ups in (0, len(labels)):
        raise DataError(
            f"all {len(labels)} labels are {'up' if ups else 'down'}: {what} needs both", allowed="at least one of each"
        )
    return ups, len(labels) - ups


def _value_or_nan(statistic: Callable[[NDArray[np.intp]], float], indices: NDArray[np.intp]) -> float:
    try:
        return float(statistic(indices))
    except DataError:
        return float("nan")
