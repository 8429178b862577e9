"""The tables of a project's database, and their rows as questions, people and labels."""

from typing import Any

import sqlalchemy as sa

from perlhf.labelling.labels import Label, Labeller, Said
from perlhf.labelling.questions import Question

VERSION = 1
"""A perlhf that knows a smaller one refuses the database."""
METADATA = sa.MetaData()
PROJECT = sa.Table("project", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
QUESTIONS = sa.Table(
    "questions",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text, unique=True, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("group", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("place", sa.Float, nullable=False),
    sa.Column("drawn", sa.Text, nullable=False),
    sa.Column("wanted", sa.Integer, nullable=False),
    sa.Column("answered", sa.Integer, nullable=False, default=0),
    sa.Column("known", sa.Text),
)
OPEN = sa.text("answered < wanted AND known IS NULL")
"""Of questions that may be asked: as the index `open_questions` says it, so that SQLite takes that index."""
sa.Index("open_questions", QUESTIONS.c.place, sqlite_where=OPEN)
LABELLERS = sa.Table(
    "labellers",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, unique=True, nullable=False),
    sa.Column("pseudonym", sa.Text, unique=True, nullable=False),
    sa.Column("token_hash", sa.Text, unique=True),
    sa.Column("owner", sa.Boolean, nullable=False, default=False),
    sa.Column("left_out", sa.Boolean, nullable=False, default=False),
    sa.Column("since", sa.Float, nullable=False),
)
TASKS = sa.Table(
    "tasks",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("question", sa.ForeignKey("questions.id"), nullable=False, index=True),
    sa.Column("labeller", sa.ForeignKey("labellers.id"), nullable=False, index=True),
    sa.Column("turned", sa.Boolean, nullable=False),
    sa.Column("given", sa.Float, nullable=False),
    sa.Column("finished", sa.Float),
)
LABELS = sa.Table(
    "labels",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text, unique=True, nullable=False),
    sa.Column("task", sa.ForeignKey("tasks.id"), nullable=False, index=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("said", sa.JSON, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("stored", sa.Float, nullable=False),
    sa.Column("undone", sa.Float),
)
EXPLAINED = sa.Table(
    "explained",
    METADATA,
    sa.Column("labeller", sa.ForeignKey("labellers.id"), primary_key=True),
    sa.Column("question", sa.ForeignKey("questions.id"), primary_key=True),
    sa.Column("shown", sa.Float, nullable=False),
)
"""Questions about whose answers a labeller knows what reward models say: they are asked of them no more."""

LABELS_GIVEN = (
    sa.select(LABELS, TASKS.c.turned, TASKS.c.labeller, TASKS.c.question)
    .join(TASKS, TASKS.c.id == LABELS.c.task)
    .where(LABELS.c.undone.is_(None))
)
"""Labels that stand, with what their tasks say."""


def row_of(question: Question) -> dict[str, Any]:
    """Columns of `QUESTIONS`, without `id` and `answered`."""
    names = ("key", "group", "source", "place", "drawn", "wanted", "known")
    own = {name: getattr(question, name) for name in names}
    return own | {"body": {"prompt": question.prompt, "answers": question.answers}}


def question_of(row: Any) -> Question:
    """A row of `QUESTIONS`."""
    prompt, answers = row.body["prompt"], tuple(row.body["answers"])
    return Question(row.key, prompt, answers, row.group, row.source, row.place, row.drawn, row.wanted, row.known)


def labeller_of(row: Any) -> Labeller:
    """A row of `LABELLERS`."""
    return Labeller(row.id, row.name, row.pseudonym, row.owner, row.left_out, row.token_hash or "")


def label_of(row: Any, question: Question, labeller: Labeller) -> Label:
    """A row of `LABELS_GIVEN`."""
    return Label(row.key, question, labeller, said_of(row), row.turned, row.seconds, row.stored)


def said_of(row: Any) -> Said:
    """What a row of `LABELS` says."""
    return Said(row.verdict, **row.said)


def content_of(said: Said) -> dict[str, Any]:
    """The column `said` of `LABELS`: all but the verdict."""
    return {"reason": said.reason, "span": said.span, "edit": said.edit, "grades": said.grades}
