"""A SQLite file that several threads and processes write, each answer on the disk before it is acknowledged."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from perlhf.errors import RunError, StorageError

_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000")


class Database:
    """Transactions on one file.

    Raises:
        RunError: the file is no database.
        StorageError: it can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30.0})
        event.listen(self._engine, "connect", _set_up)
        weakref.finalize(self, self._engine.dispose)  # at the latest when nobody has it any more

    def close(self) -> None:
        """Lets go of the file; it may be used again."""
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that nobody else writes beside; it is on the disk when this ends, or not at all."""
        with self._errors(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees the file as it was when it began."""
        with self._errors(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What SQLite refuses, as one of our errors."""
        try:
            yield
        except exc.DatabaseError as error:
            where, reason = str(self.path), str(error.orig or error).splitlines()[0]
            if "malformed" in reason or "not a database" in reason:
                hint = "take a copy that `perlhf label backup` made"
                raise RunError(f"the labels can't be read: {reason}", where=where, hint=hint) from error
            raise StorageError(f"can't write: {reason}", where=where, hint="free some disk space") from error


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by us
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
