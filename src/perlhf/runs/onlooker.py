"""A run as all workers but the first one see it: they learn from it, and write nothing of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perlhf.errors import RunError
from perlhf.runs.run import Run, hearing_signals


@contextmanager
def look_on(path: Path, finished: bool) -> Iterator["Onlooker"]:
    """The run that another worker has opened. Signals set `stop_requested`, as in `open_run`.

    Args:
        finished: whether it had ended before.
    """
    run = Onlooker(path, finished)
    with hearing_signals(run):
        yield run


class Onlooker(Run):
    """A `Run` whose directory may be on another machine: what is written goes nowhere."""

    writes = False

    def __init__(self, path: Path, finished: bool):
        super().__init__(path, "", {}, {"wall_seconds": 0.0})
        self._finished = finished

    @property
    def finished(self) -> bool:
        """Whether it had ended when it was opened, or has been told so since."""
        return self._finished

    def result(self) -> dict[str, Any]:
        """Nobody may ask for it here: the first worker tells it."""
        raise RunError("the first worker alone has the result", where=str(self.path))

    def rewind(self, step: int) -> None:
        """Nothing."""

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def withdraw(self, step: int, prefix: str) -> None:
        """Nothing."""

    def note(self, key: str, value: dict[str, Any]) -> None:
        """Nothing."""

    def note_session(self, key: str, value: Any) -> None:
        """Nothing."""

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Nothing."""

    def write_rollout(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """Nothing."""
        return self.path

    def finish(self, result: dict[str, Any]) -> None:
        """Nothing but that it has ended."""
        self._finished = True

    def _say_stopping(self) -> None:
        """Nothing: the first worker says it."""
