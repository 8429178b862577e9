"""What a reward model must beat: scores from words, from the completion's length or from the turn alone.

scikit-learn takes over a second to import, so the functions import it where they use it.
"""

# scikit-learn and scipy ship no types, so what comes out of them is unknown to pyright:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from perlhf.data.records import Comparison, Rating, text_of
from perlhf.errors import DataError
from perlhf.method.metrics import both_classes

Floats = NDArray[np.float64]
Labelled = Sequence[Rating] | Sequence[Comparison]
"""Records of one kind; mixing both kinds is a `DataError`."""
Kind = TypeVar("Kind", Rating, Comparison)

# Chosen by 5-fold cross-validation over groups, in favour of the baseline (docs/experiments.md).
RATING_C, COMPARISON_C, COMPLETION_SCALE = 5.0, 1.0, 0.5


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
    train_lengths, test_lengths = (_lengths(_narrow(Comparison, side)) for side in (train, test))
    longer_wins = np.sign(train_lengths[:, 0] - train_lengths[:, 1]).sum() > 0
    return test_lengths if longer_wins else -test_lengths


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
    both_classes(labels, "a baseline")
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


def _kind(train: Labelled, test: Labelled) -> type[Rating] | type[Comparison]:
    """The one kind of record that both sides hold."""
    if not train or not test:
        raise DataError(f"{len(train)} train and {len(test)} test records", allowed="at least one each")
    kinds = {type(record) for side in (train, test) for record in side}
    for kind in (Rating, Comparison):
        if kinds == {kind}:
            return kind
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DataError(f"a baseline got records of kind {names}", allowed="only Rating, or only Comparison")


def _narrow(kind: type[Kind], records: Labelled) -> list[Kind]:
    return [record for record in records if isinstance(record, kind)]
