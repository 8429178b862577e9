"""What people were asked and what they said, in one SQLite file.

An answer is acknowledged after its transaction is on the disk (WAL, `synchronous=FULL`). A label has a key that the
page made: a page that sends an answer twice, because it never saw the acknowledgement, stores it once. Nothing is
deleted: a label that is undone is kept with the time at which it was.
"""

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from perlhf.errors import DataError, RunError, StorageError
from perlhf.labelling.labels import Label, Labeller, Said, Task
from perlhf.labelling.questions import SERVED, Question, uniform
from perlhf.system.files import write_atomic

VERSION = 1
_PSEUDONYM = re.compile("labeller-[0-9a-f]{8}")
_metadata = sa.MetaData()
_project = sa.Table("project", _metadata, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
_questions = sa.Table(
    "questions",
    _metadata,
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
sa.Index("open_questions", _questions.c.place, sqlite_where=sa.text("answered < wanted AND known IS NULL"))
_labellers = sa.Table(
    "labellers",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, unique=True, nullable=False),
    sa.Column("pseudonym", sa.Text, unique=True, nullable=False),
    sa.Column("token_hash", sa.Text, unique=True),
    sa.Column("owner", sa.Boolean, nullable=False, default=False),
    sa.Column("left_out", sa.Boolean, nullable=False, default=False),
    sa.Column("since", sa.Float, nullable=False),
)
_tasks = sa.Table(
    "tasks",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("question", sa.ForeignKey("questions.id"), nullable=False, index=True),
    sa.Column("labeller", sa.ForeignKey("labellers.id"), nullable=False, index=True),
    sa.Column("turned", sa.Boolean, nullable=False),
    sa.Column("given", sa.Float, nullable=False),
    sa.Column("finished", sa.Float),
)
_labels = sa.Table(
    "labels",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text, unique=True, nullable=False),
    sa.Column("task", sa.ForeignKey("tasks.id"), nullable=False, index=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("said", sa.JSON, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("stored", sa.Float, nullable=False),
    sa.Column("undone", sa.Float),
)
_explained = sa.Table(
    "explained",
    _metadata,
    sa.Column("labeller", sa.ForeignKey("labellers.id"), primary_key=True),
    sa.Column("question", sa.ForeignKey("questions.id"), primary_key=True),
    sa.Column("shown", sa.Float, nullable=False),
)
"""Questions about whose answers a labeller knows what reward models say: they are asked of them no more."""


class Store:
    """The labels of one project. Each call is one transaction; threads and processes may share the file.

    Raises:
        RunError: the file is no database of ours, or was written by a newer perlhf.
        StorageError: it can't be written.
    """

    def __init__(self, path: Path, now: Any = time.time):
        self.path, self._now = path, now
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30.0})
        event.listen(self._engine, "connect", _set_up)
        weakref.finalize(self, self._engine.dispose)  # at the latest when nobody has it any more
        with self._writing() as connection:
            _metadata.create_all(connection)
            found = connection.scalar(sa.select(_project.c.value).where(_project.c.key == "version"))
            if found is None:
                values = {"version": str(VERSION), "secret": secrets.token_hex(32), "salt": secrets.token_hex(16)}
                connection.execute(sa.insert(_project), [{"key": k, "value": v} for k, v in values.items()])
            elif int(found) > VERSION:
                raise RunError(
                    f"it was written by a newer perlhf (version {found} of the database)",
                    where=str(path),
                    allowed=f"version {VERSION}",
                    hint="pip install --upgrade perlhf",
                )
        self._secret = self._setting("secret")
        self._settled: dict[str, str] = {}

    def close(self) -> None:
        """Lets go of the file; it may be used again."""
        self._engine.dispose()

    @property
    def name(self) -> str:
        """What tells this project from others, for everybody to see."""
        return self.signed("name")[:12]

    def signed(self, text: str) -> str:
        """What nobody can make of the text who doesn't have the database: 64 hexadecimal digits."""
        return hmac.new(self._secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    def mark(self, task: int, question: str) -> str:
        """What a page sends back with the number of a task, so that no answer goes to another question."""
        return self.signed(f"task {task} {question}")[:16]

    # questions

    def settle(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Has settings kept for good from the first question on; returns those that are kept."""
        self._settled = dict(settings)
        with self._writing() as connection:
            return self._kept(connection) if self._count(connection) else {}

    def want(self, wanted: Callable[[str, str], int]) -> None:
        """Sets how many labels each question of the page wants, never fewer than it has of those it wanted.

        Args:
            wanted: that number, by a question's key and source.
        """
        of = _questions.c
        asked = sa.select(of.id, of.key, of.source, of.wanted, of.answered)
        with self._writing() as connection:
            for row in connection.execute(asked.where(of.known.is_(None), of.drawn != SERVED)).all():
                number = max(wanted(row.key, row.source), min(row.answered, row.wanted))
                if number != row.wanted:
                    values = {"wanted": number}
                    connection.execute(sa.update(_questions).where(of.id == row.id).values(**values))

    def add(self, questions: Iterable[Question]) -> int:
        """Stores questions that aren't there yet; returns how many they were."""
        rows = [_row(question) for question in questions]
        with self._writing() as connection:
            before = self._count(connection)
            if rows:
                self._keep_settings(connection)
            for row in rows:
                connection.execute(sa.insert(_questions).prefix_with("OR IGNORE").values(**row))
            return self._count(connection) - before

    def questions(self, after: int = 0) -> dict[int, Question]:
        """By their numbers in the database, those above `after`."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(_questions).where(_questions.c.id > after).order_by(_questions.c.id))
            return {row.id: _question(row) for row in rows}

    def keys(self) -> set[str]:
        """Of the questions that are there."""
        with self._reading() as connection:
            return set(connection.scalars(sa.select(_questions.c.key)))

    def next_task(
        self, labeller: Labeller, lease_seconds: float, test_share: float = 0.0, seed: int = 0
    ) -> Task | None:
        """The labeller's open task, or else the first question that nobody else has; None where none is left."""
        with self._writing() as connection:
            now = self._now()
            unfinished = sa.select(_tasks.c.id).where(_tasks.c.labeller == labeller.id, _tasks.c.finished.is_(None))
            waiting = connection.scalar(unfinished.order_by(_tasks.c.id).limit(1))
            if waiting is not None:
                connection.execute(sa.update(_tasks).where(_tasks.c.id == waiting).values(given=now))
                return self._task(connection, waiting)
            known = sa.select(_explained.c.question).where(_explained.c.labeller == labeller.id)
            seen = sa.select(_tasks.c.question).where(_tasks.c.labeller == labeller.id).union(known)
            number = connection.scalar(sa.select(sa.func.count()).where(_tasks.c.labeller == labeller.id)) or 0
            found = None
            if uniform(seed, "test", labeller.id, number) < test_share:
                tests = sa.select(_questions.c.id).where(_questions.c.known.is_not(None), _questions.c.id.not_in(seen))
                found = connection.scalar(tests.order_by(_questions.c.place).limit(1))
            if found is None:
                elsewhere = (
                    sa.select(sa.func.count())
                    .where(
                        _tasks.c.question == _questions.c.id,
                        _tasks.c.finished.is_(None),
                        _tasks.c.given > now - lease_seconds,
                    )
                    .scalar_subquery()
                )
                open_ones = sa.select(_questions.c.id).where(
                    sa.text("answered < wanted AND known IS NULL"),
                    _questions.c.answered + elsewhere < _questions.c.wanted,
                    _questions.c.id.not_in(seen),
                )
                found = connection.scalar(open_ones.order_by(_questions.c.place).limit(1))
            if found is None:
                return None
            turned = uniform(self._setting("salt", connection), labeller.id, found) < 0.5
            row = {"question": found, "labeller": labeller.id, "turned": turned, "given": now}
            made = connection.execute(sa.insert(_tasks).values(**row)).inserted_primary_key
            assert made is not None
            return self._task(connection, made[0])

    # labels

    def say(self, labeller: Labeller, task: int, said: Said, key: str, seconds: float, mark: str | None = None) -> bool:
        """Stores an answer and returns after it is on the disk; False where this key, or this task, has one already.

        Args:
            mark: of the question that was answered (`mark`): numbers of tasks are another database's, too, and may be
                given anew.

        Raises:
            RunError: the task is none of the labeller's, or another question's.
        """
        with self._writing() as connection:
            row = connection.execute(sa.select(_tasks).where(_tasks.c.id == task)).one_or_none()
            if row is None or row.labeller != labeller.id:
                raise RunError("this question isn't yours", hint="load the page again")
            asked = connection.scalar(sa.select(_questions.c.key).where(_questions.c.id == row.question))
            if mark is not None and not hmac.compare_digest(mark, self.mark(task, str(asked))):
                raise RunError("it was an answer to another question", hint="load the page again")
            again = connection.scalar(sa.select(_labels.c.id).where(_labels.c.key == key))
            if again is not None or row.finished is not None:
                return False
            now = self._now()
            values = {"key": key, "task": task, "verdict": said.verdict, "said": _content(said), "stored": now}
            connection.execute(sa.insert(_labels).values(**values, seconds=seconds))
            connection.execute(sa.update(_tasks).where(_tasks.c.id == task).values(finished=now))
            if said.verdict != "skip":
                self._count_answer(connection, row.question, 1)
            return True

    def tell(self, name: str, question: Question, said: Said, key: str | None = None) -> bool:
        """Stores what somebody says without being asked, as of a served answer; returns after it is on the disk.

        It takes the place of what the same person said of the same question before; of that stays what is left out
        now. False where it stands already, or this key has stored it.

        Raises:
            RunError: the key has stored something else.
        """
        with self._writing() as connection:
            self._keep_settings(connection)
            number = self._stored(connection, question).id
            row = connection.execute(sa.select(_labellers).where(_labellers.c.name == name)).one_or_none()
            person = self._new_person(connection, name) if row is None else _person(row)
            told = sa.select(_labels, _tasks.c.labeller, _tasks.c.question).join(_tasks, _tasks.c.id == _labels.c.task)
            if key is not None and (row := connection.execute(told.where(_labels.c.key == key)).one_or_none()):
                stored = Said(row.verdict, **row.said)
                if (row.labeller, row.question) != (person.id, number) or _joined(stored, said) != stored:
                    raise RunError("this key has stored something else", where="key", allowed="one key for each")
                return False
            mine = told.where(_tasks.c.labeller == person.id, _tasks.c.question == number, _labels.c.undone.is_(None))
            now = self._now()
            for row in connection.execute(mine).all():
                before = Said(row.verdict, **row.said)
                said = _joined(before, said)
                if said == before:
                    return False
                connection.execute(sa.update(_labels).where(_labels.c.id == row.id).values(undone=now))
                self._count_answer(connection, number, -1)
            label = Label(key or secrets.token_urlsafe(24), question, person, said, False, 0.0, now)
            self._insert(connection, label, person, number)
            return True

    def undo(self, labeller: Labeller) -> Task | None:
        """Takes the labeller's last answer back; that question is open for them again. None where there is none.

        Raises:
            RunError: they have seen what reward models make of it.
        """
        with self._writing() as connection:
            last = self._last(connection, labeller)
            if last is None:
                return None
            label, verdict, task, question = last
            mine = (_explained.c.labeller == labeller.id, _explained.c.question == question)
            if connection.execute(sa.select(_explained).where(*mine)).first() is not None:
                raise RunError("You have seen how your last answer is scored, so that it stays.")
            now = self._now()
            connection.execute(sa.update(_labels).where(_labels.c.id == label).values(undone=now))
            # What was open meanwhile goes back to everybody; what was taken back before stays open, too.
            taken_back = sa.select(_labels.c.task).where(_labels.c.task == _tasks.c.id).exists()
            mine = (_tasks.c.labeller == labeller.id, _tasks.c.finished.is_(None), ~taken_back)
            connection.execute(sa.delete(_tasks).where(*mine))
            connection.execute(sa.update(_tasks).where(_tasks.c.id == task).values(finished=None, given=now))
            if verdict != "skip":
                self._count_answer(connection, question, -1)
            return self._task(connection, task)

    def explainable(self, labeller: Labeller) -> Task:
        """The labeller's last task, if they may know what reward models make of its answers.

        Raises:
            RunError: they may not, in a sentence for the page. Nothing tells a hidden test from other such questions.
        """
        with self._reading() as connection:
            task, _ = self._explainable(connection, labeller)
            return self._task(connection, task)

    def explained(self, labeller: Labeller, task: Task) -> None:
        """Notes, before it is shown, that the labeller knows: the answer stays, and no question about these is asked.

        Raises:
            RunError: as `explainable`; it isn't their last answer any more.
        """
        with self._writing() as connection:
            number, alike = self._explainable(connection, labeller)
            if number != task.id:
                raise RunError("That isn't your last answer any more. Ask again.")
            for question in alike:
                values = {"labeller": labeller.id, "question": question, "shown": self._now()}
                connection.execute(sa.insert(_explained).prefix_with("OR IGNORE").values(**values))

    def labels(self, skips: bool = False) -> list[Label]:
        """All labels that stand, in the order in which they were stored."""
        joined = (
            sa.select(_labels, _tasks.c.turned, _tasks.c.labeller, _tasks.c.question)
            .join(_tasks, _tasks.c.id == _labels.c.task)
            .where(_labels.c.undone.is_(None))
            .order_by(_labels.c.id)
        )
        with self._reading() as connection:
            people = {person.id: person for person in self._people(connection)}
            asked = {row.id: _question(row) for row in connection.execute(sa.select(_questions))}
            return [
                Label(
                    row.key,
                    asked[row.question],
                    people[row.labeller],
                    Said(row.verdict, **row.said),
                    row.turned,
                    row.seconds,
                    row.stored,
                )
                for row in connection.execute(joined)
                if skips or row.verdict != "skip"
            ]

    def progress(self) -> tuple[int, int]:
        """Labels so far, and labels that are wanted in all; hidden tests count in neither."""
        with self._reading() as connection:
            sums = sa.select(
                sa.func.coalesce(sa.func.sum(sa.func.min(_questions.c.answered, _questions.c.wanted)), 0),
                sa.func.coalesce(sa.func.sum(_questions.c.wanted), 0),
            ).where(_questions.c.known.is_(None))
            done, wanted = connection.execute(sums).one()
            return int(done), int(wanted)

    # people

    def labeller(self, name: str) -> Labeller:
        """The person of this name; made if there is none."""
        with self._writing() as connection:
            found = [person for person in self._people(connection) if person.name == name]
            return found[0] if found else self._new_person(connection, name)

    def person(self, number: int) -> Labeller | None:
        """The person with this number."""
        with self._reading() as connection:
            return next((person for person in self._people(connection) if person.id == number), None)

    def people(self) -> list[Labeller]:
        """Everybody, in the order in which they came."""
        with self._reading() as connection:
            return self._people(connection)

    def answered_by(self, labeller: Labeller) -> int:
        """Questions that this person has answered and not skipped, hidden tests among them."""
        stands = (_tasks.c.labeller == labeller.id, _labels.c.undone.is_(None), _labels.c.verdict != "skip")
        counted = sa.select(sa.func.count()).select_from(_labels.join(_tasks, _tasks.c.id == _labels.c.task))
        with self._reading() as connection:
            return connection.scalar(counted.where(*stands)) or 0

    def invite(self, name: str, owner: bool | None = None) -> str:
        """A new token of this person, made if there is none; any older one no longer opens the page, nor does a browser
        that it let in.

        Args:
            owner: whether they see the owner's page; None leaves that as it is.
        """
        token = secrets.token_urlsafe(24)
        with self._writing() as connection:
            found = [person for person in self._people(connection) if person.name == name]
            person = found[0] if found else self._new_person(connection, name)
            values = {"token_hash": _hashed(token), "owner": person.owner if owner is None else owner}
            connection.execute(sa.update(_labellers).where(_labellers.c.id == person.id).values(**values))
        return token

    def by_token(self, token: str) -> Labeller | None:
        """Whose token it is."""
        with self._reading() as connection:
            number = connection.scalar(sa.select(_labellers.c.id).where(_labellers.c.token_hash == _hashed(token)))
            return next((person for person in self._people(connection) if person.id == number), None)

    def leave_out(self, name: str, left_out: bool = True) -> None:
        """Whether this person's labels are used."""
        with self._writing() as connection:
            connection.execute(sa.update(_labellers).where(_labellers.c.name == name).values(left_out=left_out))

    def take(self, labels: Sequence[Label]) -> int:
        """Stores labels of another copy, all or none; returns how many were new.

        Those that are here already stay as they are. Of what one person said of one question what was stored last
        stands, wherever it was said: an older label isn't taken, a newer one takes the older's place.

        Raises:
            DataError: a question's key is that of another question.
        """
        with self._writing() as connection:
            if labels:
                self._keep_settings(connection)
            everybody = self._people(connection)
            people = {one.name: one for one in everybody} | {one.pseudonym: one for one in everybody}
            return sum(self._take(connection, label, people) for label in labels)

    def back_up(self, output: Path) -> None:
        """A copy of the file as it is now, also while others write.

        Raises:
            StorageError: `output` can't be written; nothing half-written is left there.
        """
        with (
            contextlib.closing(sqlite3.connect(self.path)) as here,
            contextlib.closing(sqlite3.connect(":memory:")) as copy,
        ):
            here.backup(copy)
            write_atomic(output, copy.serialize())

    # inside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with _errors(self.path), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _errors(self.path), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection

    def _setting(self, key: str, connection: sa.Connection | None = None) -> str:
        if connection is None:
            with self._reading() as own:
                return self._setting(key, own)
        return str(connection.scalar(sa.select(_project.c.value).where(_project.c.key == key)))

    def _task(self, connection: sa.Connection, number: int) -> Task:
        joined = sa.select(_questions, _tasks.c.turned, _tasks.c.given).join(_tasks).where(_tasks.c.id == number)
        row = connection.execute(joined).one()
        return Task(number, _question(row), row.turned, row.given)

    def _last(self, connection: sa.Connection, labeller: Labeller) -> sa.Row[Any, Any, Any, Any] | None:
        """Label, verdict, task and question of the labeller's last answer on the page that stands."""
        return connection.execute(
            sa.select(_labels.c.id, _labels.c.verdict, _tasks.c.id, _tasks.c.question)
            .join(_tasks, _tasks.c.id == _labels.c.task)
            .join(_questions, _questions.c.id == _tasks.c.question)
            .where(_tasks.c.labeller == labeller.id, _labels.c.undone.is_(None), _questions.c.drawn != SERVED)
            .order_by(_labels.c.id.desc())
            .limit(1)
        ).one_or_none()

    def _explainable(self, connection: sa.Connection, labeller: Labeller) -> tuple[int, list[int]]:
        """The labeller's last task, and its question with all that share an answer with it."""
        last = self._last(connection, labeller)
        if last is None or last.verdict == "skip":
            raise RunError("Scores are explained after an answer: answer a question first.")
        _, _, task, question = last
        own = connection.execute(sa.select(_questions).where(_questions.c.id == question)).one()
        group = connection.execute(sa.select(_questions).where(_questions.c.group == own.group))
        alike = [row for row in group if _shares_an_answer(row.body, own.body)]
        given = sa.select(_tasks.c.question, _tasks.c.finished).where(_tasks.c.labeller == labeller.id)
        mine = {row.question: row.finished for row in connection.execute(given)}
        to_ask = [
            row
            for row in alike
            if mine.get(row.id) is None and (row.id in mine or row.known is not None or row.answered < row.wanted)
        ]
        if own.known is not None or to_ask:
            raise RunError("There is no explanation for this question, or not yet.")
        return task, [row.id for row in alike]

    def _insert(self, connection: sa.Connection, label: Label, person: Labeller, question: int) -> None:
        """A label with a task that is finished."""
        row = {"question": question, "labeller": person.id, "turned": label.turned}
        times = {"given": label.stored - label.seconds, "finished": label.stored}
        made = connection.execute(sa.insert(_tasks).values(**row, **times)).inserted_primary_key
        assert made is not None
        values = {"key": label.key, "task": made[0], "verdict": label.said.verdict, "said": _content(label.said)}
        connection.execute(sa.insert(_labels).values(**values, seconds=label.seconds, stored=label.stored))
        if label.said.verdict != "skip":
            self._count_answer(connection, question, 1)

    def _take(self, connection: sa.Connection, label: Label, people: dict[str, Labeller]) -> bool:
        """Whether a label of another copy was new."""
        asked = self._stored(connection, label.question)
        if _texts(asked.body) != _texts(_row(label.question)["body"]):
            what = f"the question of the label {label.key!r:.60} is here with another prompt or other answers"
            raise DataError(what, where=f"question.key {asked.key!r:.80}", allowed="a key for each question")
        if connection.scalar(sa.select(_labels.c.id).where(_labels.c.key == label.key)) is not None:
            return False
        name, pseudonym = label.labeller.name, label.labeller.pseudonym
        person = people.get(pseudonym) or people.get(name)
        if person is None:
            # Another copy's pseudonym stays, so that what its labeller says later is theirs in every copy.
            person = self._new_person(connection, name, pseudonym if _PSEUDONYM.fullmatch(pseudonym) else None)
            people |= {name: person, person.pseudonym: person}
        mine = (_tasks.c.labeller == person.id, _tasks.c.question == asked.id)
        standing = (
            sa.select(_labels).join(_tasks, _tasks.c.id == _labels.c.task).where(*mine, _labels.c.undone.is_(None))
        )
        before = connection.execute(standing).all()
        if any(row.stored >= label.stored for row in before):
            return False
        for row in before:
            connection.execute(sa.update(_labels).where(_labels.c.id == row.id).values(undone=self._now()))
            if row.verdict != "skip":
                self._count_answer(connection, asked.id, -1)
        # A question that is open on the labeller's page has its answer now.
        waiting = sa.update(_tasks).where(*mine, _tasks.c.finished.is_(None))
        connection.execute(waiting.values(finished=label.stored))
        self._insert(connection, label, person, asked.id)
        return True

    def _stored(self, connection: sa.Connection, question: Question) -> Any:
        """The row of a question, which is stored unless it is there."""
        connection.execute(sa.insert(_questions).prefix_with("OR IGNORE").values(**_row(question)))
        return connection.execute(sa.select(_questions).where(_questions.c.key == question.key)).one()

    def _keep_settings(self, connection: sa.Connection) -> None:
        """Keeps what `settle` was given, before a question is stored.

        Raises:
            RunError: others are kept: the project was changed after this process had read it.
        """
        if self._settled and self._kept(connection) != self._settled:
            what = "the project's settings were changed after this was started"
            raise RunError(what, where=str(self.path.parent), hint="start it again")

    def _kept(self, connection: sa.Connection) -> dict[str, str]:
        """The settings that are kept; those that aren't are from now on."""
        for key, value in self._settled.items():
            connection.execute(sa.insert(_project).prefix_with("OR IGNORE").values(key=key, value=value))
        kept = sa.select(_project).where(_project.c.key.in_(self._settled))
        return {row.key: row.value for row in connection.execute(kept)}

    def _people(self, connection: sa.Connection) -> list[Labeller]:
        rows = connection.execute(sa.select(_labellers).order_by(_labellers.c.id))
        return [_person(row) for row in rows]

    def _new_person(self, connection: sa.Connection, name: str, pseudonym: str | None = None) -> Labeller:
        row = {"name": name, "pseudonym": pseudonym or f"labeller-{secrets.token_hex(4)}", "since": self._now()}
        made = connection.execute(sa.insert(_labellers).values(**row)).inserted_primary_key
        assert made is not None
        return Labeller(made[0], name, row["pseudonym"])

    def _count(self, connection: sa.Connection) -> int:
        return connection.scalar(sa.select(sa.func.count()).select_from(_questions)) or 0

    def _count_answer(self, connection: sa.Connection, question: int, by: int) -> None:
        more = {"answered": _questions.c.answered + by}
        connection.execute(sa.update(_questions).where(_questions.c.id == question).values(more))


def _person(row: Any) -> Labeller:
    return Labeller(row.id, row.name, row.pseudonym, row.owner, row.left_out, row.token_hash or "")


def _row(question: Question) -> dict[str, Any]:
    names = ("key", "group", "source", "place", "drawn", "wanted", "known")
    own = {name: getattr(question, name) for name in names}
    return own | {"body": {"prompt": question.prompt, "answers": question.answers}}


def _content(said: Said) -> dict[str, Any]:
    return {"reason": said.reason, "span": said.span, "edit": said.edit, "grades": said.grades}


def _joined(before: Said, now: Said) -> Said:
    """What somebody says now; what is left out stays as it was."""
    verdict = before.verdict if now.verdict == "edited" else now.verdict
    return replace(now, verdict=verdict, reason=now.reason or before.reason, edit=now.edit or before.edit)


def _question(row: Any) -> Question:
    answers = tuple(row.body["answers"])
    return Question(
        row.key, row.body["prompt"], answers, row.group, row.source, row.place, row.drawn, row.wanted, row.known
    )


def _texts(body: Any) -> str:
    """What is asked, as text that is the same for the same."""
    return json.dumps(body, sort_keys=True)


def _shares_an_answer(one: Any, other: Any) -> bool:
    return one["prompt"] == other["prompt"] and any(answer in other["answers"] for answer in one["answers"])


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by us
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """What SQLite refuses, as one of our errors."""
    try:
        yield
    except exc.DatabaseError as error:
        reason = str(error.orig or error).splitlines()[0]
        if "malformed" in reason or "not a database" in reason:
            hint = "take a copy that `perlhf label backup` made"
            raise RunError(f"the labels can't be read: {reason}", where=str(path), hint=hint) from error
        raise StorageError(f"can't write: {reason}", where=str(path), hint="free some disk space") from error
