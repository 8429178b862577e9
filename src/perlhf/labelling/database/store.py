"""What people were asked and what they said, in one SQLite file.

An answer is acknowledged after its transaction is on the disk (WAL, `synchronous=FULL`). A label has a key that the
page made: a page that sends an answer twice, because it never saw the acknowledgement, stores it once. Nothing is
deleted: a label that is undone is kept with the time at which it was.
"""

import contextlib
import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from perlhf.errors import RunError
from perlhf.labelling.database import answers, asking, people
from perlhf.labelling.database.connection import Database
from perlhf.labelling.database.tables import (
    EXPLAINED,
    LABELLERS,
    LABELS,
    LABELS_GIVEN,
    METADATA,
    PROJECT,
    QUESTIONS,
    TASKS,
    VERSION,
    label_of,
    question_of,
    row_of,
)
from perlhf.labelling.labels import Label, Labeller, Said, Task
from perlhf.labelling.questions import SERVED, Question, uniform
from perlhf.system.files import write_atomic


class Store:
    """The labels of one project. Each call is one transaction; threads and processes may share the file.

    Raises:
        RunError: the file is no database of ours, or was written by a newer perlhf.
        StorageError: it can't be written.
    """

    def __init__(self, path: Path, now: Any = time.time):
        self.path, self._now = path, now
        self._database = Database(path)
        with self._database.writing() as connection:
            METADATA.create_all(connection)
            found = connection.scalar(sa.select(PROJECT.c.value).where(PROJECT.c.key == "version"))
            if found is None:
                values = {"version": str(VERSION), "secret": secrets.token_hex(32), "salt": secrets.token_hex(16)}
                connection.execute(sa.insert(PROJECT), [{"key": k, "value": v} for k, v in values.items()])
            elif int(found) > VERSION:
                raise RunError(
                    f"it was written by a newer perlhf (version {found} of the database)",
                    where=str(path),
                    allowed=f"version {VERSION}",
                    hint="pip install --upgrade perlhf",
                )
            kept = {row.key: row.value for row in connection.execute(sa.select(PROJECT))}
        self._secret, self._salt = str(kept["secret"]), str(kept["salt"])
        self._settled: dict[str, str] = {}

    def close(self) -> None:
        """Lets go of the file; it may be used again."""
        self._database.close()

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
        with self._database.writing() as connection:
            return self._kept(connection) if self._count(connection) else {}

    def want(self, wanted: Callable[[str, str], int]) -> None:
        """Sets how many labels each question of the page wants, never fewer than it has of those it wanted.

        Args:
            wanted: that number, by a question's key and source.
        """
        of = QUESTIONS.c
        asked = sa.select(of.id, of.key, of.source, of.wanted, of.answered)
        with self._database.writing() as connection:
            for row in connection.execute(asked.where(of.known.is_(None), of.drawn != SERVED)).all():
                number = max(wanted(row.key, row.source), min(row.answered, row.wanted))
                if number != row.wanted:
                    values = {"wanted": number}
                    connection.execute(sa.update(QUESTIONS).where(of.id == row.id).values(**values))

    def add(self, questions: Iterable[Question]) -> int:
        """Stores questions that aren't there yet; returns how many they were."""
        rows = [row_of(question) for question in questions]
        with self._database.writing() as connection:
            before = self._count(connection)
            if rows:
                self._keep_settings(connection)
            for row in rows:
                connection.execute(sa.insert(QUESTIONS).prefix_with("OR IGNORE").values(**row))
            return self._count(connection) - before

    def questions(self, after: int = 0) -> dict[int, Question]:
        """By their numbers in the database, those above `after`."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(QUESTIONS).where(QUESTIONS.c.id > after).order_by(QUESTIONS.c.id))
            return {row.id: question_of(row) for row in rows}

    def keys(self) -> set[str]:
        """Of the questions that are there."""
        with self._database.reading() as connection:
            return set(connection.scalars(sa.select(QUESTIONS.c.key)))

    def next_task(
        self, labeller: Labeller, lease_seconds: float, test_share: float = 0.0, seed: int = 0
    ) -> Task | None:
        """The labeller's open task, or else the first question that nobody else has; None where none is left."""
        with self._database.writing() as connection:
            now = self._now()
            waiting = asking.waiting_task(connection, labeller)
            if waiting is not None:
                connection.execute(sa.update(TASKS).where(TASKS.c.id == waiting).values(given=now))
                return asking.task(connection, waiting)
            found = asking.next_question(connection, labeller, now - lease_seconds, test_share, seed)
            if found is None:
                return None
            turned = uniform(self._salt, labeller.id, found) < 0.5
            row = {"question": found, "labeller": labeller.id, "turned": turned, "given": now}
            made = connection.execute(sa.insert(TASKS).values(**row)).inserted_primary_key
            assert made is not None
            return asking.task(connection, made[0])

    # labels

    def say(self, labeller: Labeller, task: int, said: Said, key: str, seconds: float, mark: str | None = None) -> bool:
        """Stores an answer and returns after it is on the disk; False where this key, or this task, has one already.

        Args:
            mark: of the question that was answered (`mark`): numbers of tasks are another database's, too, and may be
                given anew.

        Raises:
            RunError: the task is none of the labeller's, or another question's.
        """
        with self._database.writing() as connection:
            given = sa.select(TASKS, QUESTIONS.c.key).join(QUESTIONS).where(TASKS.c.id == task)
            row = connection.execute(given).one_or_none()
            if row is None or row.labeller != labeller.id:
                raise RunError("this question isn't yours", hint="load the page again")
            if mark is not None and not hmac.compare_digest(mark, self.mark(task, row.key)):
                raise RunError("it was an answer to another question", hint="load the page again")
            again = connection.scalar(sa.select(LABELS.c.id).where(LABELS.c.key == key))
            before, now = answers.standing(connection, labeller.id, row.question), self._now()
            if again is not None or any(label.task == task for label in before):
                return False
            for label in before:  # of another copy, taken while the question was open here
                answers.take_back(connection, label.id, row.question, label.verdict, now)
            answers.store(connection, row.id, row.question, said, key, seconds, now)
            return True

    def tell(self, name: str, question: Question, said: Said, key: str | None = None) -> bool:
        """Stores what somebody says without being asked, as of a served answer; returns after it is on the disk.

        It takes the place of what the same person said of the same question before; of that stays what is left out
        now. False where it stands already, or this key has stored it.

        Raises:
            RunError: the key has stored something else.
        """
        with self._database.writing() as connection:
            self._keep_settings(connection)
            now = self._now()
            return answers.tell(connection, people.named(connection, name, now), question, said, key, now)

    def undo(self, labeller: Labeller) -> Task | None:
        """Takes the labeller's last answer back; that question is open for them again. None where there is none.

        Raises:
            RunError: they have seen what reward models make of it.
        """
        with self._database.writing() as connection:
            last = asking.last_answer(connection, labeller)
            if last is None:
                return None
            mine = (EXPLAINED.c.labeller == labeller.id, EXPLAINED.c.question == last.question)
            if connection.execute(sa.select(EXPLAINED).where(*mine)).first() is not None:
                raise RunError("You have seen how your last answer is scored, so that it stays.")
            now = self._now()
            answers.take_back(connection, last.label, last.question, last.verdict, now)
            # What was open meanwhile goes back to everybody; what was taken back before stays open, too.
            taken_back = sa.select(LABELS.c.task).where(LABELS.c.task == TASKS.c.id).exists()
            mine = (TASKS.c.labeller == labeller.id, TASKS.c.finished.is_(None), ~taken_back)
            connection.execute(sa.delete(TASKS).where(*mine))
            connection.execute(sa.update(TASKS).where(TASKS.c.id == last.task).values(finished=None, given=now))
            return asking.task(connection, last.task)

    def explainable(self, labeller: Labeller) -> Task:
        """The labeller's last task, if they may know what reward models make of its answers.

        Raises:
            RunError: they may not, in a sentence for the page. Nothing tells a hidden test from other such questions.
        """
        with self._database.reading() as connection:
            task, _ = asking.explainable(connection, labeller)
            return asking.task(connection, task)

    def explained(self, labeller: Labeller, task: Task) -> None:
        """Notes, before it is shown, that the labeller knows: the answer stays, and no question about these is asked.

        Raises:
            RunError: as `explainable`; it isn't their last answer any more.
        """
        with self._database.writing() as connection:
            number, alike = asking.explainable(connection, labeller)
            if number != task.id:
                raise RunError("That isn't your last answer any more. Ask again.")
            for question in alike:
                values = {"labeller": labeller.id, "question": question, "shown": self._now()}
                connection.execute(sa.insert(EXPLAINED).prefix_with("OR IGNORE").values(**values))

    def labels(self, skips: bool = False) -> list[Label]:
        """All labels that stand, in the order in which they were stored."""
        given = LABELS_GIVEN.order_by(LABELS.c.id)
        if not skips:
            given = given.where(LABELS.c.verdict != "skip")
        with self._database.reading() as connection:
            by_id = {person.id: person for person in people.everybody(connection)}
            asked = {row.id: question_of(row) for row in connection.execute(sa.select(QUESTIONS))}
            return [label_of(row, asked[row.question], by_id[row.labeller]) for row in connection.execute(given)]

    def progress(self) -> tuple[int, int]:
        """Labels so far, and labels that are wanted in all; hidden tests count in neither."""
        with self._database.reading() as connection:
            sums = sa.select(
                sa.func.coalesce(sa.func.sum(sa.func.min(QUESTIONS.c.answered, QUESTIONS.c.wanted)), 0),
                sa.func.coalesce(sa.func.sum(QUESTIONS.c.wanted), 0),
            ).where(QUESTIONS.c.known.is_(None))
            done, wanted = connection.execute(sums).one()
            return int(done), int(wanted)

    # people

    def labeller(self, name: str) -> Labeller:
        """The person of this name; made if there is none."""
        with self._database.writing() as connection:
            return people.named(connection, name, self._now())

    def person(self, number: int) -> Labeller | None:
        """The person with this number."""
        with self._database.reading() as connection:
            return next((person for person in people.everybody(connection) if person.id == number), None)

    def people(self) -> list[Labeller]:
        """Everybody, in the order in which they came."""
        with self._database.reading() as connection:
            return people.everybody(connection)

    def answered_by(self, labeller: Labeller) -> int:
        """Questions that this person has answered and not skipped, hidden tests among them."""
        stands = (TASKS.c.labeller == labeller.id, LABELS.c.undone.is_(None), LABELS.c.verdict != "skip")
        counted = sa.select(sa.func.count()).select_from(LABELS.join(TASKS, TASKS.c.id == LABELS.c.task))
        with self._database.reading() as connection:
            return connection.scalar(counted.where(*stands)) or 0

    def invite(self, name: str, owner: bool | None = None) -> str:
        """A new token of this person, made if there is none; any older one no longer opens the page, nor does a browser
        that it let in.

        Args:
            owner: whether they see the owner's page; None leaves that as it is.
        """
        token = secrets.token_urlsafe(24)
        with self._database.writing() as connection:
            person = people.named(connection, name, self._now())
            values = {"token_hash": _hashed(token), "owner": person.owner if owner is None else owner}
            connection.execute(sa.update(LABELLERS).where(LABELLERS.c.id == person.id).values(**values))
        return token

    def by_token(self, token: str) -> Labeller | None:
        """Whose token it is."""
        with self._database.reading() as connection:
            number = connection.scalar(sa.select(LABELLERS.c.id).where(LABELLERS.c.token_hash == _hashed(token)))
            return next((person for person in people.everybody(connection) if person.id == number), None)

    def leave_out(self, name: str, left_out: bool = True) -> None:
        """Whether this person's labels are used."""
        with self._database.writing() as connection:
            connection.execute(sa.update(LABELLERS).where(LABELLERS.c.name == name).values(left_out=left_out))

    def take(self, labels: Sequence[Label]) -> int:
        """Stores labels of another copy, all or none; returns how many were new.

        Those that are here already stay as they are. Of what one person said of one question what was stored last
        stands, wherever it was said: an older label isn't taken, a newer one takes the older's place.

        Raises:
            DataError: a question's key is that of another question.
        """
        with self._database.writing() as connection:
            if labels:
                self._keep_settings(connection)
            everybody, now = people.everybody(connection), self._now()
            known = {one.name: one for one in everybody} | {one.pseudonym: one for one in everybody}
            return sum(answers.take(connection, label, known, now) for label in labels)

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
            connection.execute(sa.insert(PROJECT).prefix_with("OR IGNORE").values(key=key, value=value))
        kept = sa.select(PROJECT).where(PROJECT.c.key.in_(self._settled))
        return {row.key: row.value for row in connection.execute(kept)}

    def _count(self, connection: sa.Connection) -> int:
        return connection.scalar(sa.select(sa.func.count()).select_from(QUESTIONS)) or 0


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
