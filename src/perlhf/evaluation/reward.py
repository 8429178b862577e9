"""Evaluation of a reward run: metrics on held-out groups beside baselines that were fitted on its training groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from perlhf.config.commands import EvaluateConfig
from perlhf.data import order
from perlhf.data.records import Comparison, Rating, Record, completions_of
from perlhf.errors import DataError
from perlhf.evaluation import baselines
from perlhf.evaluation.shared import both_sides, measure, plain, progress, seen_groups
from perlhf.method import metrics
from perlhf.method.metrics import Statistic
from perlhf.method.packing import Packing, batches
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import FinishedRun
from perlhf.model.model import Model
from perlhf.parallel.shares import own_of
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout.ensemble import passes
from perlhf.rollout.scorers import mean_scores, score_members
from perlhf.runs.evaluations import Evaluation, Measured, Measures
from perlhf.training import loop

BASELINE_METRICS = ("auc", "accuracy", "balanced_accuracy", "pairwise_accuracy")
"""Metrics that baselines are measured by, too."""
MAX_SAMPLES = 500
KINDS = ("comparison", "rating")

Scores = NDArray[np.float64]
Table = list[list[float] | None]
"""Of each record the scores of its completions by one adapter; None where it was dropped as too long."""
Sides = tuple[Scores | None, Scores | None]
"""Scores of the ratings and of the comparisons, None where there are none."""


@dataclass(frozen=True)
class Judged:
    """Ratings or comparisons with scores: [n] of ratings, [n, 2] (chosen, rejected) of comparisons."""

    ratings: list[Rating]
    comparisons: list[Comparison]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Judged":
        """Both kinds apart, in order."""
        return cls(
            [record for record in records if isinstance(record, Rating)],
            [record for record in records if isinstance(record, Comparison)],
        )

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Of the ratings."""
        return np.array([record.label for record in self.ratings], dtype=bool)

    def statistics(self, rated: Scores | None, compared: Scores | None) -> dict[str, tuple[Statistic, list[str]]]:
        """Metrics of these scores by name, each with the groups that it is resampled by."""
        of_ratings = {} if rated is None else _rating_statistics(rated, self.labels)
        of_comparisons = {} if compared is None else _comparison_statistics(compared)
        groups = [[record.group for record in records] for records in (self.ratings, self.comparisons)]
        return {
            name: (statistic, of_kind)
            for statistics, of_kind in zip((of_ratings, of_comparisons), groups, strict=True)
            for name, statistic in statistics.items()
        }


def evaluate_reward(run: FinishedRun, config: EvaluateConfig, workers: Workers) -> Callable[[], Evaluation]:
    """The evaluation of a reward run, once one of the workers that have scored its records concludes."""
    trained_on, held_out = both_sides(run, config, KINDS)
    model, encoder = run.open(config.device, config.shard, workers)
    budget = config.tokens_per_microbatch or run.config.microbatch_tokens
    packing = model.packing(run.config.packing)
    tables, counts = score_by_members(model, encoder, held_out, tuple(run.members), budget, packing, workers)
    scored = mean_of_members(tables)
    return lambda: _concluded(trained_on, held_out, scored, counts, config)


def _concluded(
    trained_on: Sequence[Record],
    held_out: Sequence[Record],
    scored: Sequence[list[float] | None],
    counts: dict[str, int],
    config: EvaluateConfig,
) -> Evaluation:
    pairs = [(record, scores) for record, scores in zip(held_out, scored, strict=True) if scores is not None]
    records = [record for record, _ in pairs]
    test, train = Judged.of(records), Judged.of(trained_on)
    rated = [scores[0] for record, scores in pairs if isinstance(record, Rating)]
    compared = [scores for record, scores in pairs if isinstance(record, Comparison)]
    own = (np.array(rated) if rated else None, np.array(compared) if compared else None)
    measures, of_baselines, difference = _measures(test, own, _fit_baselines(train, test), config)
    return Evaluation(
        kind="reward",
        split=config.split,
        n=len(records),
        groups=len({record.group for record in records}),
        ratings=len(test.ratings),
        comparisons=len(test.comparisons),
        groups_seen_in_training=seen_groups(records, trained_on),
        counts=counts,
        metrics=measures,
        baselines=of_baselines,
        minus_bag_of_words=difference,
        calibration=_calibration(own[0], test, config),
        bootstrap=config.bootstrap,
        seed=config.seed,
        records=_scores_of(test, own),
        samples=_sample_rows(order.choose(pairs, MAX_SAMPLES, config.seed)),
    )


def score_records(
    model: Model,
    encoder: Encoder,
    records: Sequence[Record],
    adapter: str,
    max_tokens: int,
    packing: Packing,
    workers: Workers = ALONE,
) -> tuple[list[list[float] | None], dict[str, int]]:
    """`score_by_members` of one adapter alone."""
    tables, counts = score_by_members(model, encoder, records, (adapter,), max_tokens, packing, workers)
    return tables[0], counts


def score_by_members(
    model: Model,
    encoder: Encoder,
    records: Sequence[Record],
    adapters: Sequence[str],
    max_tokens: int,
    packing: Packing,
    workers: Workers = ALONE,
) -> tuple[list[Table], dict[str, int]]:
    """Scores of each record's completions (chosen, rejected; or the one) by each adapter, in one pass where that pays;
    None for a record dropped as too long.

    Records are laid out as in training's own validation, so that the same records give bit-equal scores. Also counts of
    cut and dropped records.

    Raises:
        TooLong: a completion that can't fit, unless the run's encoding.drop_long says to drop it.
    """
    encoded, counts = loop.encode_all(encoder, records, encoder.config.drop_long)
    fitting = [number for number, examples in enumerate(encoded) if examples is not None]
    examples = [[example.tokens for example in examples] for examples in encoded if examples is not None]
    groups = passes(model, adapters, packing)
    laid_out = batches(examples, max(1, max_tokens // len(groups[0])), packing, model.device)
    with progress(len(groups) * len(own_of(laid_out, workers)), "scores") as bar:
        found = score_members(model, laid_out, groups, bar.advance, workers)
    tables: list[Table] = []
    for lines in found:
        by_number = dict(zip(fitting, lines, strict=True))
        tables.append([by_number.get(number) for number in range(len(records))])
    return tables, counts


def mean_of_members(tables: Sequence[Table]) -> Table:
    """The members' mean score of each completion; None for a record that was dropped."""
    means = iter(mean_scores([[line for line in table if line is not None] for table in tables]))
    return [None if line is None else next(means) for line in tables[0]]


def _rating_statistics(scores: Scores, labels: NDArray[np.bool_]) -> dict[str, Statistic]:
    probabilities = expit(scores)
    return {
        "auc": lambda i: metrics.auc(scores[i], labels[i]),
        "accuracy": lambda i: metrics.accuracy(scores[i], labels[i]),
        "balanced_accuracy": lambda i: metrics.balanced_accuracy(scores[i], labels[i]),
        "rating_loss": lambda i: metrics.log_loss(scores[i], labels[i]),
        "expected_calibration_error": lambda i: metrics.expected_calibration_error(probabilities[i], labels[i]),
    }


def _comparison_statistics(scores: Scores) -> dict[str, Statistic]:
    losses = np.logaddexp(0, scores[:, 1] - scores[:, 0])
    return {
        "pairwise_accuracy": lambda i: metrics.pairwise_accuracy(scores[i, 0], scores[i, 1]),
        "comparison_loss": lambda i: float(losses[i].mean()),
    }


def _fit_baselines(train: Judged, test: Judged) -> dict[str, tuple[Sides, str]]:
    """By name: scores of the test records, and why a fit failed or ""."""
    fits: dict[str, tuple[Callable[[], Scores] | None, Callable[[], Scores] | None]] = {
        "bag_of_words": (
            lambda: baselines.bag_of_words(train.ratings, test.ratings),
            lambda: baselines.bag_of_words(train.comparisons, test.comparisons),
        ),
        "position": (lambda: baselines.position_baseline(train.ratings, test.ratings), None),
        "length": (
            lambda: baselines.length_baseline(train.ratings, test.ratings),
            lambda: baselines.length_baseline(train.comparisons, test.comparisons),
        ),
        "majority": (lambda: _majority(train, test), None),
    }
    fitted: dict[str, tuple[Sides, str]] = {}
    with progress(len(fits), "baselines") as bar:
        for name, (rate, compare) in fits.items():
            rated, why = _fit(rate if test.ratings else None)
            compared, why_not = _fit(compare if test.comparisons else None)
            fitted[name] = (rated, compared), why or why_not
            bar.advance()
    return fitted


def _fit(fit: Callable[[], Scores] | None) -> tuple[Scores | None, str]:
    if fit is None:
        return None, ""
    try:
        return fit(), ""
    except DataError as error:  # such as training records of one class: there is nothing to compare with
        return None, error.what


def _majority(train: Judged, test: Judged) -> Scores:
    """The more frequent label of training (up on a tie), for every rating."""
    labels = train.labels
    if not len(labels):
        raise DataError("the run's training groups hold no rating")
    return np.full(len(test.ratings), 1.0 if 2 * labels.sum() >= len(labels) else -1.0)


def _measures(
    test: Judged, own: Sides, baselines: Mapping[str, tuple[Sides, str]], config: EvaluateConfig
) -> tuple[Measures, dict[str, dict[str, Measured | str | None]], Measures]:
    """Metrics of the model, of each baseline, and of the model minus bag of words on the same resamples."""
    sides = {"model": test.statistics(*own)}
    sides |= {name: test.statistics(*scores) for name, (scores, _) in baselines.items()}
    words, model = sides["bag_of_words"], sides["model"]
    sides["difference"] = {name: (_minus(model[name][0], words[name][0]), words[name][1]) for name in words}
    wanted = [
        (side, name) for side, named in sides.items() for name in named if side == "model" or name in BASELINE_METRICS
    ]
    measures: dict[str, dict[str, Measured | None]] = {side: {} for side in sides}
    measures["model"] = dict.fromkeys(BASELINE_METRICS)
    with progress(len(wanted), "intervals") as bar:
        for side, name in wanted:
            statistic, groups = sides[side][name]
            measures[side][name] = measure(statistic, groups, config)
            bar.advance()
    of_baselines = {
        name: {**measures[name], **({"unavailable": why} if why else {})} for name, (_, why) in baselines.items()
    }
    return measures["model"], of_baselines, measures["difference"]


def _minus(first: Statistic, second: Statistic) -> Statistic:
    return lambda indices: first(indices) - second(indices)


def _calibration(scores: Scores | None, test: Judged, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Bins of `metrics.calibration` with an interval of the observed share; none for comparisons."""
    if scores is None:
        return []
    probabilities, labels = expit(scores), test.labels
    groups = [record.group for record in test.ratings]
    rows: list[dict[str, Any]] = []
    for row in metrics.calibration(probabilities, labels):
        last = row["high"] == 1
        inside = (probabilities >= row["low"]) & ((probabilities < row["high"]) | last)
        low, high = metrics.cluster_bootstrap(_share(labels, inside), groups, config.bootstrap, config.seed)
        rows.append({**row, "observed_low": low, "observed_high": high})
    return rows


def _share(labels: NDArray[np.bool_], inside: NDArray[np.bool_]) -> Statistic:
    """Share of ups among the records inside; nan when a resample has none there."""

    def share(indices: NDArray[np.intp]) -> float:
        chosen = labels[indices][inside[indices]]
        return float(chosen.mean()) if len(chosen) else float("nan")

    return share


def _scores_of(test: Judged, own: Sides) -> dict[str, dict[str, list[Any]]]:
    """Every record's group and scores, column by column: what `compare` resamples."""
    rated, compared = ([] if scores is None else scores.round(6).tolist() for scores in own)
    return {
        "ratings": {"group": [record.group for record in test.ratings], "label": test.labels.tolist(), "score": rated},
        "comparisons": {"group": [record.group for record in test.comparisons], "scores": compared},
    }


def _sample_rows(pairs: Sequence[tuple[Record, list[float]]]) -> list[dict[str, Any]]:
    """One row a completion; `label` of a comparison's is whether it was chosen."""
    rows = []
    for record, scores in pairs:
        verdicts = [record.label] if isinstance(record, Rating) else [True, False]
        for text, label, score in zip(completions_of(record), verdicts, scores, strict=True):
            kind = "rating" if isinstance(record, Rating) else "comparison"
            row = {"prompt": plain(record.prompt), "completion": plain(text), "label": label, "score": score}
            rows.append({**row, "kind": kind, "source": record.source})
    return rows
