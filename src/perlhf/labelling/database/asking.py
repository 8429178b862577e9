"""Which question a person is asked next, and which may be explained to them, in a transaction of the database."""

from typing import Any

import sqlalchemy as sa

from perlhf.errors import RunError
from perlhf.labelling.database.tables import EXPLAINED, LABELS, OPEN, QUESTIONS, TASKS, question_of
from perlhf.labelling.labels import Labeller, Task
from perlhf.labelling.questions import SERVED, uniform


def task(connection: sa.Connection, number: int) -> Task:
    """The task with this number."""
    joined = sa.select(QUESTIONS, TASKS.c.turned, TASKS.c.given).join(TASKS).where(TASKS.c.id == number)
    row = connection.execute(joined).one()
    return Task(number, question_of(row), row.turned, row.given)


def waiting_task(connection: sa.Connection, labeller: Labeller) -> int | None:
    """The number of the labeller's oldest task without an answer."""
    unfinished = sa.select(TASKS.c.id).where(TASKS.c.labeller == labeller.id, TASKS.c.finished.is_(None))
    return connection.scalar(unfinished.order_by(TASKS.c.id).limit(1))


def next_question(
    connection: sa.Connection, labeller: Labeller, given_after: float, test_share: float, seed: int
) -> int | None:
    """The number of a question that the labeller neither had nor knows an explanation of: a hidden test of this share
    of times, else the first that wants more labels than it has, with those that others were asked for lately.

    Args:
        given_after: a task that was given before is nobody's any more.
    """
    known = sa.select(EXPLAINED.c.question).where(EXPLAINED.c.labeller == labeller.id)
    seen = sa.select(TASKS.c.question).where(TASKS.c.labeller == labeller.id).union(known)
    unseen = sa.select(QUESTIONS.c.id).where(QUESTIONS.c.id.not_in(seen)).order_by(QUESTIONS.c.place).limit(1)
    number = connection.scalar(sa.select(sa.func.count()).where(TASKS.c.labeller == labeller.id)) or 0
    if uniform(seed, "test", labeller.id, number) < test_share:
        found = connection.scalar(unseen.where(QUESTIONS.c.known.is_not(None)))
        if found is not None:
            return found
    here = (TASKS.c.question == QUESTIONS.c.id, TASKS.c.finished.is_(None), TASKS.c.given > given_after)
    elsewhere = sa.select(sa.func.count()).where(*here).scalar_subquery()
    return connection.scalar(unseen.where(OPEN, QUESTIONS.c.answered + elsewhere < QUESTIONS.c.wanted))


def last_answer(connection: sa.Connection, labeller: Labeller) -> sa.Row[Any, Any, Any, Any] | None:
    """Numbers of label, task and question, and the verdict, of the labeller's last answer on the page that stands."""
    return connection.execute(
        sa.select(LABELS.c.id.label("label"), LABELS.c.verdict, LABELS.c.task, TASKS.c.question)
        .join(TASKS, TASKS.c.id == LABELS.c.task)
        .join(QUESTIONS, QUESTIONS.c.id == TASKS.c.question)
        .where(TASKS.c.labeller == labeller.id, LABELS.c.undone.is_(None), QUESTIONS.c.drawn != SERVED)
        .order_by(LABELS.c.id.desc())
        .limit(1)
    ).one_or_none()


def explainable(connection: sa.Connection, labeller: Labeller) -> tuple[int, list[int]]:
    """The number of the labeller's last task, and those of its question and of all that share an answer with it.

    Raises:
        RunError: they may not know yet what reward models say of it.
    """
    last = last_answer(connection, labeller)
    if last is None or last.verdict == "skip":
        raise RunError("Scores are explained after an answer: answer a question first.")
    own = connection.execute(sa.select(QUESTIONS).where(QUESTIONS.c.id == last.question)).one()
    group = connection.execute(sa.select(QUESTIONS).where(QUESTIONS.c.group == own.group))
    alike = [row for row in group if _shares_an_answer(row.body, own.body)]
    given = sa.select(TASKS.c.question, TASKS.c.finished).where(TASKS.c.labeller == labeller.id)
    mine = {row.question: row.finished for row in connection.execute(given)}
    to_ask = [
        row
        for row in alike
        if mine.get(row.id) is None and (row.id in mine or row.known is not None or row.answered < row.wanted)
    ]
    if own.known is not None or to_ask:
        raise RunError("There is no explanation for this question, or not yet.")
    return last.task, [row.id for row in alike]


def _shares_an_answer(one: Any, other: Any) -> bool:
    return one["prompt"] == other["prompt"] and any(answer in other["answers"] for answer in one["answers"])
