"""How far a project is, and how well people agree, from what the store holds."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import krippendorff
import numpy as np

from perlhf.labelling.labels import Label, Labeller
from perlhf.runs.evaluations import measured
from perlhf.system.files import read_json

LEARNED = "learned.json"
"""In a project: what its labels have brought, for the owner's page."""
_SIDES = ("first", "second")
IDLE_SECONDS = 300.0
"""Longer times are pauses: they count as this."""


@dataclass(frozen=True)
class Share:
    """What one person did."""

    labeller: Labeller
    labels: int
    skipped: int
    median_seconds: float
    hours: float
    agreement: float | None
    """Share of the others' labels of the same questions that say the same (`verdict`); of labels that are used."""
    compared: int
    tests_right: int
    tests: int
    served: int
    """What they said about answers that were served to them: no number above counts that."""


@dataclass(frozen=True)
class Progress:
    """Of a project."""

    labels: int
    """As the database counts them, those of people who are left out among them: nobody is asked for theirs again."""
    wanted: int
    left_out: int
    """Labels of people who are left out; no number but `labels` and their own share counts them."""
    alpha: float | None
    """Krippendorff's alpha over the questions that several people answered; None where there are fewer than two."""
    several: int
    """Such questions."""
    verdicts: dict[str, int]
    """How many labels say what; grades are `up` or `down`, as records have them."""
    served: dict[str, int]
    """What was said about served answers, by `serve:MODEL@VERSION`; no number above counts that."""
    left: float | None
    """Share of the choices between two answers that fell on the one that stood left: far from 0.5, sides matter."""
    shares: list[Share]


def progress(labels: Sequence[Label], people: Sequence[Labeller], done: tuple[int, int], up: float) -> Progress:
    """The numbers of the owner's page and of the data statement.

    Args:
        labels: all that stand, skips among them.
        people: everybody.
        done: labels so far and wanted.
        up: the mean grade from which an answer is good.
    """
    served = Counter(one.question.source for one in labels if one.question.served and not one.labeller.left_out)
    everything, labels = labels, [label for label in labels if not label.question.served]
    judged = [label for label in labels if label.said.verdict != "skip"]
    by_question: dict[str, list[Label]] = defaultdict(list)
    asked = [label for label in judged if label.question.known is None]
    used = [label for label in asked if not label.labeller.left_out]
    for label in used:
        by_question[label.question.key].append(label)
    several = [found for found in by_question.values() if len({label.labeller.id for label in found}) > 1]
    verdicts = Counter(verdict(label, up) for label in used)
    sides = [(label.said.verdict == "first") != label.turned for label in used if label.said.verdict in _SIDES]
    left = sum(sides) / len(sides) if sides else None
    shares = [_share(person, everything, by_question, up) for person in people]
    out = len(asked) - len(used)
    return Progress(*done, out, agreement(several), len(several), dict(verdicts), dict(served), left, shares)


def learned(directory: Path) -> dict[str, Any]:
    """What labels have brought, where `perlhf loop` has noted that in the project: `sentence` and `rounds`."""
    file = directory / LEARNED
    if not file.is_file():
        return {}
    found = read_json(file)
    rounds = [one for one in found.get("rounds") or () if isinstance(one, dict)]
    shown = [(one.get("round"), one.get("labels"), measured(one.get("accuracy"))) for one in rounds]
    return {"sentence": str(found.get("sentence", "")), "rounds": shown}


def agreement(questions: Sequence[Sequence[Label]]) -> float | None:
    """Krippendorff's alpha (Content Analysis, 2004): nominal for verdicts, interval for mean grades.

    None where nothing was answered twice, or all said the same throughout, so that no chance agreement can be told.
    """
    graded = any(label.said.grades for labels in questions for label in labels)
    people = sorted({label.labeller.id for labels in questions for label in labels})
    if len(people) < 2:
        return None
    names = sorted({label.said.verdict for labels in questions for label in labels})
    table = np.full((len(people), len(questions)), np.nan)
    for column, labels in enumerate(questions):
        for label in labels:
            value = mean_grade(label) if graded else names.index(label.said.verdict)
            table[people.index(label.labeller.id), column] = value
    if len(np.unique(table[~np.isnan(table)])) < 2:
        return None
    return float(krippendorff.alpha(table, level_of_measurement="interval" if graded else "nominal"))


def mean_grade(label: Label) -> float:
    """Over the criteria."""
    return sum(label.said.grades.values()) / len(label.said.grades)


def verdict(label: Label, up: float) -> str:
    """What a label says as a record: grades are `up` where their mean is at least that, else `down`."""
    if label.said.verdict == "graded":
        return "up" if mean_grade(label) >= up else "down"
    return label.said.verdict


def _share(person: Labeller, labels: Sequence[Label], used: dict[str, list[Label]], up: float) -> Share:
    every = [label for label in labels if label.labeller.id == person.id]
    own = [label for label in every if not label.question.served]
    judged = [label for label in own if label.said.verdict != "skip"]
    tests = [label for label in judged if label.question.known is not None]
    times = [min(label.seconds, IDLE_SECONDS) for label in own]
    pairs = [
        verdict(mine, up) == verdict(other, up)
        for mine in judged
        for other in used.get(mine.question.key, [])
        if other.labeller.id != person.id
    ]
    return Share(
        person,
        len(judged) - len(tests),
        len(own) - len(judged),
        median(times) if times else 0.0,
        sum(times) / 3600,
        sum(pairs) / len(pairs) if pairs else None,
        len(pairs),
        sum(verdict(label, up) == label.question.known for label in tests),
        len(tests),
        len(every) - len(own),
    )
