"""A label: what one person said to one question; and as a line of an export."""

import json
from dataclasses import dataclass, field
from typing import Any

from perlhf.labelling.questions import Question


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


def from_json(line: str) -> Label:
    """The label that `as_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is no such line.
    """
    row = json.loads(line)
    asked = row["question"] | {"answers": tuple(row["question"]["answers"])}
    said = Said(row["verdict"], row["reason"], row["span"], row["edit"], row["grades"])
    person = Labeller(0, row["labeller"], row["labeller"])
    return Label(row["key"], Question(**asked), person, said, row["turned"], row["seconds"], row["stored"])
