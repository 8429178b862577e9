"""Kills at counted events: a forked process sends itself SIGKILL at the n-th write or update, however slow the machine
is. What it runs knows nothing of it.
"""

import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

from forks import forked

WRITES = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "write"), (os, "unlink"), (shutil, "rmtree"))
"""What writes: bytes to the disk, names, a line of metrics, what is deleted."""


class Count:
    """Calls of functions that are counted, and after how many the process gets a signal (None: never)."""

    def __init__(self, at: int | None = None, number: int = signal.SIGKILL):
        self.events, self._at, self._number = 0, at, number

    def happened(self) -> None:
        """One more event; after SIGKILL the last one that this process sees."""
        self.events += 1
        if self.events == self._at:
            os.kill(os.getpid(), self._number)

    def watch(self, *functions: tuple[Any, str]) -> None:
        """Counts these functions of modules or classes from now on, before and after they do their work.

        Only in a process that ends afterwards: nothing is put back.
        """
        for owner, name in functions:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.happened()
            result = function(*arguments, **named)
            self.happened()
            return result

        return counted


def killed_at(count: int, work: Callable[[], object], *events: tuple[Any, str]) -> bool:
    """Runs `work` in a fork that is killed at the `count`-th event; whether it was, else it had ended before."""

    def run() -> None:
        Count(count).watch(*(events or WRITES))
        work()

    _, status = os.waitpid(forked(run), 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"ended with status {status}"
    return os.WIFSIGNALED(status)
