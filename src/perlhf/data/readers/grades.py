"""Grades of answers, and what becomes of them: labels, comparisons of answers to one prompt, or nothing."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import EQUAL_GRADES, Skipped, decoded, label_of, number, numeric
from perlhf.data.readers.columns import OTHER_NAMES, given, is_number, named_columns, optional_number
from perlhf.data.readers.messages import without_nulls
from perlhf.data.records import Comparison, Demonstration, Message, Rating, Record
from perlhf.errors import DataError

_STARS = re.compile(r"(\d+(?:\.\d+)?) *(?:-? ?stars?|(?:/|out of|of) *\d+(?: stars?)?)", re.IGNORECASE)


_TIED = frozenset(("status", "winner", "preference", "verdict", "label"))
"""Columns beside `chosen` and `rejected` that may say that there is no preference."""
_TIE_WORDS = ("tie", "ties", "tied", "draw", "equal", "tie (bothbad)", "tie (bothgood)")


VERDICTS = ("label", "rating", *OTHER_NAMES["label"], *OTHER_NAMES["rating"])
"""Columns that say what somebody thought of an answer."""


class NoRule(DataError):
    """A file of grades without a rule that says what they become: the same for each of its rows."""


def grade_of(verdict: Any, where: str) -> float:
    """A grade as a number: given as one, as text of one (`5 stars`, `3/5`), or as a list, whose mean counts."""
    if isinstance(verdict, list) and verdict:
        return math.fsum(grade_of(part, where) for part in verdict) / len(verdict)
    if isinstance(verdict, Mapping):
        inside = without_nulls(verdict, where)
        verdict = inside.get("rating", inside.get("value", verdict))
    if isinstance(verdict, str):
        stars = _STARS.fullmatch(verdict.strip())
        verdict = float(verdict) if is_number(verdict) else float(stars[1]) if stars else verdict
    if isinstance(verdict, bool) or not isinstance(verdict, int | float):
        raise DataError(
            f"rating is {verdict!r:.60}, which is no grade",
            where=where,
            allowed="a number, or true and false",
            hint="`data.grades: ignore` reads the answers without their grades",
        )
    return number({"rating": verdict}, "rating", 0.0, where)


def margin_of(row: dict[str, Any], where: str) -> float | None:
    """By how much `chosen` was preferred to `rejected`: 0.0 where nothing says so, None for a tie.

    It is `margin`, else the difference of the sides' scores (`score_chosen` and `score_rejected`), else that of two
    ratings, which are those of `generations` in their order where both texts are among them, else the verdict's. Equal
    scores are a tie, and so is one that a column calls so. Where scores say the opposite of the verdict, the difference
    is below 0.
    """
    said = () if _TIED.isdisjoint(row) else [row[name] for name in _TIED if isinstance(row.get(name), str)]
    if any(word.strip().lower() in _TIE_WORDS for word in said):
        return None
    if given(row, "margin"):
        return optional_number(row, "margin", 0.0, where)
    if given(row, "score_chosen") and given(row, "score_rejected"):
        by = optional_number(row, "score_chosen", 0.0, where) - optional_number(row, "score_rejected", 0.0, where)
        return by or None
    ratings = next((found for name in ("rating", "scores") if (found := _two_numbers(row.get(name)))), None)
    if ratings is None:
        return 0.0
    by, answers = ratings[0] - ratings[1], decoded(row.get("generations"))
    if answers == [row["rejected"], row["chosen"]]:
        by = -by
    elif answers != [row["chosen"], row["rejected"]]:
        by = abs(by)
    return by or None


def _two_numbers(content: Any) -> tuple[float, float] | None:
    parts = decoded(content)
    if not isinstance(parts, list) or len(parts) != 2:
        return None
    if any(isinstance(part, bool) or not (is_number(part) or isinstance(part, int | float)) for part in parts):
        return None
    first, second = map(float, parts)
    return (first, second) if math.isfinite(first - second) else None


def no_rule(grades: list[float], where: str) -> NoRule:
    low, high = min(grades), max(grades)
    up, down = low + 0.75 * (high - low), low + 0.25 * (high - low)
    if all(grade == int(grade) for grade in grades):
        up, down = math.ceil(up), math.floor(down)
    known = down < up
    rule = f"data.ratings: {{up: {up:g}, down: {down:g}}}" if known else "data.ratings: {up: ..., down: ...}"
    typed = f"--data.ratings.up {up:g} --data.ratings.down {down:g}" if known else "--data.ratings.up, .down"
    return NoRule(
        f"the answers have grades ({low:g} to {high:g}), and nothing says what becomes of them",
        where=where,
        allowed="`data.ratings` (which are a thumbs up and which a thumbs down), or `data.grades: comparisons` "
        "(of answers to one prompt) or `ignore`",
        hint=f"{rule} in a recipe, {typed} on the command line (without `data.` after `perlhf data`)",
    )


def refuse_order(ranking: list[Any], where: str) -> None:
    """Raises DataError for a ranking that says something else as the ranks of answers than as their order."""
    places = [numeric(place) for place in ranking]
    first = min((place for place in places if isinstance(place, int)), default=0)
    if sorted(map(str, places)) == sorted(map(str, range(first, first + len(places)))) and any(
        places[place - first] != number for number, place in enumerate(places, first)
    ):
        raise DataError(
            f"column 'ranking' is {ranking!r:.60}: the rank of each answer, or the answers from best to worst",
            where=where,
            allowed="a ranking that means the same in both ways, or a column 'ranks'",
            hint="`data.columns: {ranks: ranking}` reads the rank of each answer, the lowest being the best",
        )


def refuse_verdict_inside(turn: Message, where: str) -> None:
    """Raises DataError where a message holds what somebody thought of it: it would be imitated whatever that is."""
    said = {name: turn[name] for name in VERDICTS if name in turn}
    name = next((name for name, part in said.items() if label_of(part) is not None or may_be_grade("", part)), None)
    if name is not None:
        ours = (
            "label" if label_of(turn[name]) is not None and name not in ("rating", *OTHER_NAMES["rating"]) else "rating"
        )
        raise DataError(
            f"a message holds {name!r}, a verdict on itself ({turn[name]!r:.30})",
            where=where,
            allowed="a verdict in a column beside the messages",
            hint=f"`data.columns: {{{ours}: messages.-1.{name}}}`, of ShareGPT's turns `conversations.-1.{name}`",
        )


def may_be_grade(name: str, content: Any) -> bool:
    return (
        name == "rating" or is_number(content) or (isinstance(content, int | float) and not isinstance(content, bool))
    )


def no_rule_for_safety(name: str, content: Any, mapping: str | None, where: str) -> NoRule:
    """The error for a judgement of safety that nothing makes a verdict."""
    typed = f"{named_columns(mapping)} makes it the verdict; " if mapping else ""
    return NoRule(
        f"an answer has {name!r} ({content!r:.30}), a judgement of its safety, and nothing says what becomes of it",
        where=where,
        allowed="a verdict (`label`, `rating`) beside it, or a rule: harmful answers would be imitated otherwise",
        hint=f"{typed}`data.grades: ignore` imitates all answers",
    )


def by_rule(grade: float, rating: Rating, rules: LayoutConfig) -> Rating | Skipped:
    assert rules.ratings is not None
    if grade >= rules.ratings.up:
        return rating
    if rules.ratings.down is None or grade <= rules.ratings.down:
        return labelled(rating, False)
    return Skipped("a grade between ratings.down and ratings.up", rating.source)


def labelled(rating: Rating, label: bool) -> Rating:
    return Rating(
        rating.prompt,
        rating.completion,
        label,
        rating.group,
        rating.weight,
        rating.annotator,
        rating.source,
        rating.tools,
    )


def ungraded(rating: Rating) -> Demonstration:
    return Demonstration(rating.prompt, rating.completion, rating.group, rating.weight, rating.source, rating.tools)


def compared(answers: list[tuple[float, Rating]]) -> Iterator[Record | Skipped]:
    """Every pair of answers to one prompt with different grades; the margin is the difference."""
    if len(answers) < 2:
        yield Skipped("a graded answer whose prompt has no other", answers[0][1].source)
    for first, second in combinations(answers, 2):
        (high, better), (low, worse) = (first, second) if first[0] >= second[0] else (second, first)
        if math.isclose(high, low):
            yield Skipped(EQUAL_GRADES, better.source)
        else:
            yield Comparison(
                better.prompt,
                better.completion,
                worse.completion,
                better.group,
                weight=better.weight,
                margin=high - low,
                source=better.source,
                tools=better.tools,
            )
