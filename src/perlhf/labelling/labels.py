"""A label: what one person said to one question; and as a line of an export."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from perlhf.config.stages import Frozen
from perlhf.data.readers.messages import messages
from perlhf.errors import DataError
from perlhf.labelling.questions import SERVED, Question

VERDICTS_OF = {1: ("up", "down", "graded", "edited", "skip"), 2: ("first", "second", "equal", "both_bad", "skip")}
"""What can be said of so many answers."""
Verdict = Literal["first", "second", "equal", "both_bad", "up", "down", "graded", "edited", "skip"]
_YEAR_10000 = 253_402_300_800.0


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
    try:
        row = _Line.model_validate_json(line, strict=True)
    except ValidationError as error:
        raise _refused(error, where) from None
    asked = Question(**(row.question.model_dump(exclude_unset=True)))
    for text in (asked.prompt, *asked.answers):
        if not isinstance(text, str):
            messages(text, "question", where)
    _check(row, asked, where)
    said = Said(row.verdict, row.reason, row.span, row.edit, row.grades)
    person = Labeller(0, row.labeller, row.labeller)
    return Label(row.key, asked, person, said, row.turned, row.seconds, row.stored)


def _printable(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("a name")
    return name


class _Turn(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: str
    content: str | None = None


_Key = Annotated[str, Field(min_length=1, max_length=1000)]
_Text = str | Annotated[list[_Turn], Field(min_length=1)]


class _Asked(Frozen):
    """The question of a line; what is said of each key is what it may be."""

    key: _Key
    """Text of 1 to 1,000 letters."""
    prompt: _Text
    """Text, or a list of messages."""
    answers: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=2)]
    """A list of one answer, or of two that differ: texts or lists of messages."""
    group: str
    """Text."""
    source: str
    """Text."""
    place: Annotated[float, Field(ge=0, le=1)]
    """A number from 0 to 1."""
    drawn: Literal["random", "disagreement", "information", "served"]
    """How it was drawn: random, disagreement, information or served."""
    wanted: Annotated[int, Field(ge=0, le=1000)]
    """0 to 1,000."""
    known: Verdict | None
    """Null, or a verdict."""


class _Line(Frozen):
    """A line of an export; what is said of each key is what it may be."""

    key: _Key
    """Text of 1 to 1,000 letters."""
    labeller: Annotated[_Key, AfterValidator(_printable)]
    """A name of 1 to 1,000 letters, digits and signs."""
    verdict: Verdict
    """First, second, equal, both_bad, up, down, graded, edited or skip."""
    reason: str
    """Text."""
    span: str
    """Text."""
    edit: str
    """Text."""
    grades: dict[str, Annotated[int, Field(ge=1, le=5)]]
    """Whole numbers from 1 to 5 by their criteria."""
    turned: bool
    """True or false."""
    seconds: Annotated[float, Field(ge=0, le=1e9)]
    """A number of seconds."""
    stored: Annotated[float, Field(ge=0, lt=_YEAR_10000)]
    """Seconds since 1970."""
    question: _Asked
    """What was asked, with keys as exported."""


def _check(row: _Line, asked: Question, where: str) -> None:
    """What one key says of another."""
    fitting, many = VERDICTS_OF[len(asked.answers)], f"of {len(asked.answers)} answers"
    if many == "of 2 answers" and asked.answers[0] == asked.answers[1]:
        _refuse(f"question.answers is {list(asked.answers)!r:.60}", where, "two answers that differ")
    for name, found in (("verdict", row.verdict), ("question.known", asked.known)):
        if found is not None and found not in fitting:
            _refuse(f"{name} is {found!r} {many}", where, ", ".join(fitting))
    if (row.verdict == "graded") != bool(row.grades):
        _refuse(f"verdict is {row.verdict!r} with the grades {row.grades!r:.60}", where, "grades where it is graded")
    if row.verdict == "edited" and not row.edit.strip():
        _refuse("verdict is 'edited' without an edit", where, "edit: a better answer")
    if asked.served != (asked.wanted == 0):
        _refuse(f"question.wanted is {asked.wanted}", where, f"0 where drawn is {SERVED}, else 1 or more")


def _refused(error: ValidationError, where: str) -> DataError:
    """The first thing that is wrong with a line; unknown keys before all else, since they explain missing ones."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda one: one["type"] != "extra_forbidden")
    location = problem["loc"]
    if not location:
        reason = problem["msg"] if problem["type"] == "json_invalid" else f"{problem['input']!r:.60}"
        return DataError(f"no label: {reason}", where=where, allowed="lines as exported")
    named = location[:2] if location[0] == "question" else location[:1]
    name = ".".join(map(str, named))
    fields = (_Asked if len(named) == 2 else _Line).model_fields
    if problem["type"] == "extra_forbidden":
        return DataError(f"{name:.60} is no key of a label", where=where, allowed=", ".join(fields))
    said = fields[str(named[-1])].description or ""
    allowed = said[0].lower() + said[1:].rstrip(".")
    if problem["type"] == "missing":
        return DataError(f"{name} is missing", where=where, allowed=allowed)
    # What follows names a place in a list or a criterion, or which of several types was tried.
    within = [part for part in location[len(named) :] if isinstance(part, int) or name == "grades"]
    at = "".join(f"[{part!r:.60}]" for part in within)
    return DataError(f"{name}{at} is {problem['input']!r:.60}", where=where, allowed=allowed)


def _refuse(what: str, where: str, allowed: str) -> NoReturn:
    raise DataError(what, where=where or None, allowed=allowed)
