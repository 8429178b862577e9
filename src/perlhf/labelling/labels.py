"""A label: what one person said to one question; and as a line of an export."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from perlhf.data.readers.messages import messages
from perlhf.errors import DataError
from perlhf.labelling.questions import SERVED, Question

VERDICTS_OF = {1: ("up", "down", "graded", "edited", "skip"), 2: ("first", "second", "equal", "both_bad", "skip")}
"""What can be said of so many answers."""
_VERDICTS = tuple(dict.fromkeys(verdict for some in VERDICTS_OF.values() for verdict in some))
_DRAWN = ("random", "disagreement", "information", SERVED)
_YEAR_10000 = 253_402_300_800.0
_MOST_SECONDS, _MOST_WANTED, _MOST_LETTERS = 1e9, 1000, 1000


@dataclass(frozen=True)
class Labeller:
    """One person."""

    id: int
    name: str
    pseudonym: str
    owner: bool = False
    left_out: bool = False
    token_hash: str = field(default="", repr=False, compare=False)
    """Of the link that opens the page; a new one ends what the older has opened."""


@dataclass(frozen=True)
class Task:
    """One question as one person sees it."""

    id: int
    question: Question
    turned: bool
    """The second answer stands left."""
    given: float


@dataclass(frozen=True)
class Said:
    """What a person says to a task."""

    verdict: str
    """`first`, `second`, `equal`, `both_bad`; `up`, `down`; `graded`; `edited` (an edit alone); `skip`."""
    reason: str = ""
    span: str = ""
    """A marked part of an answer."""
    edit: str = ""
    """A better answer, written by the labeller."""
    grades: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Label:
    """A stored answer with its question and who gave it."""

    key: str
    question: Question
    labeller: Labeller
    said: Said
    turned: bool
    seconds: float
    stored: float


def as_json(label: Label) -> str:
    """A label as one line, of which `from_json` makes it again."""
    question = label.question
    content: dict[str, Any] = {
        "key": label.key,
        "labeller": label.labeller.pseudonym,
        "verdict": label.said.verdict,
        "reason": label.said.reason,
        "span": label.said.span,
        "edit": label.said.edit,
        "grades": label.said.grades,
        "turned": label.turned,
        "seconds": round(label.seconds, 3),
        "stored": label.stored,
        "question": {
            "key": question.key,
            "prompt": question.prompt,
            "answers": question.answers,
            "group": question.group,
            "source": question.source,
            "place": question.place,
            "drawn": question.drawn,
            "wanted": question.wanted,
            "known": question.known,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def from_json(line: str, where: str = "") -> Label:
    """The label that `as_json` wrote.

    Args:
        where: `file:line`, for errors.

    Raises:
        DataError: it is no such line, or a value of it is none that a label has.
    """
    row = _object(line, where)
    _check(row, _LABEL, where)
    asked, verdict = row["question"], row["verdict"]
    _check(asked, _QUESTION, where, "question.")
    for text in (asked["prompt"], *asked["answers"]):
        if not isinstance(text, str):
            messages(text, "question", where)
    fitting = VERDICTS_OF[len(asked["answers"])]
    for name, found in (("verdict", verdict), ("question.known", asked["known"])):
        if found is not None and found not in fitting:
            _refuse(f"{name} is {found!r} of {len(asked['answers'])} answers", where, ", ".join(fitting))
    if (verdict == "graded") != bool(row["grades"]):
        _refuse(f"verdict is {verdict!r} with the grades {row['grades']!r:.60}", where, "grades where it is graded")
    if verdict == "edited" and not row["edit"].strip():
        _refuse("verdict is 'edited' without an edit", where, "edit: a better answer")
    if (asked["drawn"] == SERVED) != (asked["wanted"] == 0):
        _refuse(f"question.wanted is {asked['wanted']}", where, f"0 where drawn is {SERVED}, else 1 or more")
    said = Said(verdict, row["reason"], row["span"], row["edit"], row["grades"])
    person = Labeller(0, row["labeller"], row["labeller"])
    question = Question(**(asked | {"answers": tuple(asked["answers"])}))
    return Label(row["key"], question, person, said, row["turned"], float(row["seconds"]), float(row["stored"]))


Rule = tuple[str, Callable[[Any], bool]]
"""What a key may hold, in words and as a test."""


def _is_text(content: Any) -> bool:
    return isinstance(content, str)


def _is_key(content: Any) -> bool:
    return isinstance(content, str) and 1 <= len(content) <= _MOST_LETTERS


def _is_name(content: Any) -> bool:
    return _is_key(content) and bool(content.strip()) and content.isprintable()


def _is_flag(content: Any) -> bool:
    return isinstance(content, bool)


def _is_number(content: Any, most: float) -> bool:
    return isinstance(content, int | float) and not isinstance(content, bool) and 0 <= content <= most


def _is_grades(content: Any) -> bool:
    return isinstance(content, dict) and all(type(grade) is int and 1 <= grade <= 5 for grade in content.values())


def _is_said(content: Any) -> bool:
    """Whether it is text, or chat messages."""
    if not isinstance(content, list):
        return isinstance(content, str)
    turns = [turn for turn in content if isinstance(turn, dict) and isinstance(turn.get("role"), str)]
    return bool(content) and len(turns) == len(content) and all(_has_content(turn) for turn in turns)


def _has_content(turn: Mapping[str, Any]) -> bool:
    return turn.get("content") is None or isinstance(turn["content"], str)


def _is_answers(content: Any) -> bool:
    if not isinstance(content, list) or len(content) not in VERDICTS_OF or not all(map(_is_said, content)):
        return False
    return len(content) == 1 or content[0] != content[1]


_TEXT: Rule = ("text", _is_text)
_KEY: Rule = (f"text of 1 to {_MOST_LETTERS:,} letters", _is_key)
_LABEL: dict[str, Rule] = {
    "key": _KEY,
    "labeller": (f"a name of 1 to {_MOST_LETTERS:,} letters, digits and signs", _is_name),
    "verdict": (", ".join(_VERDICTS), lambda content: _is_text(content) and content in _VERDICTS),
    "reason": _TEXT,
    "span": _TEXT,
    "edit": _TEXT,
    "grades": ("whole numbers from 1 to 5 by their criteria", _is_grades),
    "turned": ("true or false", _is_flag),
    "seconds": ("a number of seconds", lambda content: _is_number(content, _MOST_SECONDS)),
    "stored": ("seconds since 1970", lambda content: _is_number(content, _YEAR_10000 - 1)),
    "question": ("an object", lambda content: isinstance(content, dict)),
}
_QUESTION: dict[str, Rule] = {
    "key": _KEY,
    "prompt": ("text, or a list of messages", _is_said),
    "answers": ("a list of one answer, or of two that differ: texts or lists of messages", _is_answers),
    "group": _TEXT,
    "source": _TEXT,
    "place": ("a number from 0 to 1", lambda content: _is_number(content, 1)),
    "drawn": (", ".join(_DRAWN), lambda content: _is_text(content) and content in _DRAWN),
    "wanted": (f"0 to {_MOST_WANTED:,}", lambda content: type(content) is int and 0 <= content <= _MOST_WANTED),
    "known": ("null, or a verdict", lambda content: content is None or (_is_text(content) and content in _VERDICTS)),
}


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        _refuse("text holds half of a surrogate pair", where, "text that can be written as UTF-8")
    except (ValueError, RecursionError) as error:
        _refuse(f"no label: {error!r:.100}", where, "lines as exported")
    if not isinstance(row, dict):
        _refuse(f"no label: {row!r:.60}", where, "lines as exported")
    return row


def _check(row: Mapping[str, Any], rules: Mapping[str, Rule], where: str, within: str = "") -> None:
    for name in row:
        if name not in rules:
            _refuse(f"{within}{name!s:.60} is no key of a label", where, ", ".join(rules))
    for name, (allowed, fits) in rules.items():
        if name not in row:
            _refuse(f"{within}{name} is missing", where, allowed)
        if not fits(row[name]):
            _refuse(f"{within}{name} is {row[name]!r:.60}", where, allowed)


def _refuse(what: str, where: str, allowed: str) -> NoReturn:
    raise DataError(what, where=where or None, allowed=allowed)
