"""How labels are stored, and what becomes of those that they replace, in a transaction of the database."""

import json
import re
import secrets
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from perlhf.errors import DataError, RunError
from perlhf.labelling.database import people
from perlhf.labelling.database.tables import LABELS, LABELS_GIVEN, QUESTIONS, TASKS, content_of, row_of, said_of
from perlhf.labelling.labels import Label, Labeller, Said
from perlhf.labelling.questions import Question

_PSEUDONYM = re.compile("labeller-[0-9a-f]{8}")


def store(
    connection: sa.Connection, task: int, question: int, said: Said, key: str, seconds: float, now: float
) -> None:
    """The label of a task, which is finished by it."""
    values = {"key": key, "task": task, "verdict": said.verdict, "said": content_of(said)}
    connection.execute(sa.insert(LABELS).values(**values, seconds=seconds, stored=now))
    connection.execute(sa.update(TASKS).where(TASKS.c.id == task).values(finished=now))
    _count(connection, question, said.verdict, 1)


def take_back(connection: sa.Connection, label: int, question: int, verdict: str, now: float) -> None:
    """A label stands no more; it is kept."""
    connection.execute(sa.update(LABELS).where(LABELS.c.id == label).values(undone=now))
    _count(connection, question, verdict, -1)


def standing(connection: sa.Connection, labeller: int, question: int) -> list[Any]:
    """What a person says of a question."""
    mine = (TASKS.c.labeller == labeller, TASKS.c.question == question)
    return list(connection.execute(LABELS_GIVEN.where(*mine)))


def tell(
    connection: sa.Connection, person: Labeller, question: Question, said: Said, key: str | None, now: float
) -> bool:
    """Stores what somebody says without being asked, in the place of what they said of the question before.

    Raises:
        RunError: the key has stored something else.
    """
    number = _stored(connection, question).id
    told = sa.select(LABELS, TASKS.c.labeller, TASKS.c.question).join(TASKS, TASKS.c.id == LABELS.c.task)
    if key is not None and (row := connection.execute(told.where(LABELS.c.key == key)).one_or_none()):
        stored = said_of(row)
        if (row.labeller, row.question) != (person.id, number) or _joined(stored, said) != stored:
            raise RunError("this key has stored something else", where="key", allowed="one key for each")
        return False
    for row in standing(connection, person.id, number):
        before = said_of(row)
        said = _joined(before, said)
        if said == before:
            return False
        take_back(connection, row.id, number, row.verdict, now)
    _insert(connection, Label(key or secrets.token_urlsafe(24), question, person, said, False, 0.0, now), number)
    return True


def take(connection: sa.Connection, label: Label, known: dict[str, Labeller], now: float) -> bool:
    """Whether a label of another copy was new, which is stored then.

    Args:
        known: people by name and pseudonym; those that are new are added.

    Raises:
        DataError: its question's key is that of another question.
    """
    if connection.scalar(sa.select(LABELS.c.id).where(LABELS.c.key == label.key)) is not None:
        return False
    asked = _stored(connection, label.question)
    if _texts(asked.body) != _texts(row_of(label.question)["body"]):
        what = f"the question of the label {label.key!r:.60} is here with another prompt or other answers"
        raise DataError(what, where=f"question.key {asked.key!r:.80}", allowed="a key for each question")
    name, pseudonym = label.labeller.name, label.labeller.pseudonym
    person = known.get(pseudonym) or known.get(name)
    if person is None:
        # Another copy's pseudonym stays, so that what its labeller says later is theirs in every copy.
        person = people.new(connection, name, now, pseudonym if _PSEUDONYM.fullmatch(pseudonym) else None)
        known |= {name: person, person.pseudonym: person}
    before = standing(connection, person.id, asked.id)
    if any(row.stored >= label.stored for row in before):
        return False
    for row in before:
        take_back(connection, row.id, asked.id, row.verdict, now)
    # A question that is open on the labeller's page has its answer now.
    waiting = (TASKS.c.labeller == person.id, TASKS.c.question == asked.id, TASKS.c.finished.is_(None))
    connection.execute(sa.update(TASKS).where(*waiting).values(finished=label.stored))
    _insert(connection, replace(label, labeller=person), asked.id)
    return True


def _stored(connection: sa.Connection, question: Question) -> Any:
    """The row of a question, which is stored unless it is there."""
    connection.execute(sa.insert(QUESTIONS).prefix_with("OR IGNORE").values(**row_of(question)))
    return connection.execute(sa.select(QUESTIONS).where(QUESTIONS.c.key == question.key)).one()


def _insert(connection: sa.Connection, label: Label, question: int) -> None:
    """A label with a task of its own."""
    row = {"question": question, "labeller": label.labeller.id, "turned": label.turned}
    task = connection.execute(sa.insert(TASKS).values(**row, given=label.stored - label.seconds)).inserted_primary_key
    assert task is not None
    store(connection, task[0], question, label.said, label.key, label.seconds, label.stored)


def _count(connection: sa.Connection, question: int, verdict: str, by: int) -> None:
    if verdict != "skip":
        more = {"answered": QUESTIONS.c.answered + by}
        connection.execute(sa.update(QUESTIONS).where(QUESTIONS.c.id == question).values(more))


def _joined(before: Said, now: Said) -> Said:
    """What somebody says now; what is left out stays as it was."""
    verdict = before.verdict if now.verdict == "edited" else now.verdict
    return replace(now, verdict=verdict, reason=now.reason or before.reason, edit=now.edit or before.edit)


def _texts(body: Any) -> str:
    """What is asked, as text that is the same for the same."""
    return json.dumps(body, sort_keys=True)
