"""A score head fitted on states of the network as it is, before an adapter moves them.

Logistic regression on standardised states. Starting the head there instead of at zero spares the adapter a first phase
in which gradients pass through a head that points nowhere and bend good states (linear probing, then fine-tuning:
Kumar et al., arXiv 2202.10054).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perlhf.errors import DataError

Floats = NDArray[np.float64]

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse regularisation, weakest last; cross-validation over groups picks one."""
FOLDS = 5
INTERCEPT_SCALE = 10.0
"""The intercept is a constant feature of this size: 1 / 100 of the other weights' regularisation."""


@dataclass(frozen=True)
class Probe:
    """A head: score = state @ weight + bias."""

    weight: Floats
    bias: float
    strength: float
    """Of `STRENGTHS`, the one that was picked."""
    log_loss: float
    """Mean held-out loss of the cross-validation, nats an example."""


def fit(
    states: Sequence[Floats],
    labels: Sequence[bool | None],
    groups: Sequence[str],
    weights: Sequence[float],
) -> Probe:
    """The head that minimises log-loss on ratings (label True or False) and comparisons (label None).

    Args:
        states: one [1, hidden] a rating, [2, hidden] a comparison (chosen, rejected).
        labels, groups, weights: one an example; folds hold whole groups.

    Returns:
        The head in raw states. Comparisons don't see `bias`, which makes their mean score 0 where there are no ratings.

    Raises:
        DataError: one label only.
    """
    every = np.concatenate(states)
    mean, deviation = every.mean(axis=0), every.std(axis=0) + 1e-6
    rows: list[Floats] = []
    targets: list[bool] = []
    owners: list[int] = []
    for number, (state, label) in enumerate(zip(states, labels, strict=True)):
        if label is None:  # once each way round, half the weight each: the same loss, and both classes exist
            difference = np.append((state[0] - state[1]) / deviation, 0.0)
            rows += [difference, -difference]
            targets += [True, False]
            owners += [number, number]
        else:
            rows.append(np.append((state[0] - mean) / deviation, INTERCEPT_SCALE))
            targets.append(label)
            owners.append(number)
    share = np.array([weights[i] * (0.5 if labels[i] is None else 1.0) for i in owners])
    features, right, names = np.array(rows), np.array(targets), [groups[i] for i in owners]
    if len(set(right[share > 0].tolist())) < 2:
        raise DataError(
            f"the {len(labels)} records for the score head have one label only, or no weight",
            where="probe_examples",
            allowed="records of both labels",
            hint="raise probe_examples, or set head_start: zero",
        )
    held_out = {strength: _held_out_loss(features, right, names, share, strength) for strength in STRENGTHS}
    best = min(STRENGTHS, key=lambda strength: held_out[strength])
    coefficients = _regression(features, right, share, best)
    weight = coefficients[:-1] / deviation
    return Probe(weight, float(INTERCEPT_SCALE * coefficients[-1] - weight @ mean), best, held_out[best])


def _held_out_loss(
    features: Floats, targets: NDArray[np.bool_], groups: Sequence[str], weights: Floats, strength: float
) -> float:
    """Weighted mean log-loss over folds of whole groups; of the training data itself where no fold has both classes."""
    from sklearn.model_selection import GroupKFold

    count = min(FOLDS, len(set(groups)))
    folds = list(GroupKFold(count).split(features, targets, groups)) if count > 1 else []
    counted = weights > 0
    usable = [(a, b) for a, b in folds if len(set(targets[a][counted[a]].tolist())) == 2 and counted[b].any()]
    everything = np.arange(len(targets))
    total = norm = 0.0
    for fitted, tested in usable or [(everything, everything)]:
        coefficients = _regression(features[fitted], targets[fitted], weights[fitted], strength)
        loss = np.logaddexp(0, np.where(targets[tested], -1, 1) * (features[tested] @ coefficients))
        total, norm = total + float(weights[tested] @ loss), norm + float(weights[tested].sum())
    return total / norm


def _regression(features: Floats, targets: NDArray[np.bool_], weights: Floats, strength: float) -> Floats:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000, tol=1e-6)
    model.fit(features, targets, sample_weight=weights)
    return np.asarray(model.coef_[0], dtype=float)
