"""The processes of a comparison: one for each cell, so that its peak memory is its own, some at a time."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perlhf.system.files import storage_errors
from perlhf.system.machine import available_cores
from perlhf.system.waiting import PARENT

MESSAGE_LINES = 20
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Processes:
    """Runs perlhf's commands, `jobs` at a time; when we are interrupted or ended, they save and end first.

    When we are killed, they find the pipe closed whose other end we have, and save and end as well.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self._alive, self._ours = os.pipe()
        self._pool = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen[str]] = set()
        self._ending = False
        self._lock = threading.Lock()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Has a cell's work, which calls `perlhf`, done by one of `jobs` threads."""
        return self._pool.submit(work, *arguments)

    def perlhf(self, arguments: Sequence[str], log: Path) -> tuple[int, str]:
        """Runs a command; its exit code and error message.

        What it prints goes to `log`, and so does its progress, which is shown where one runs at a time.

        Raises:
            KeyboardInterrupt: it was interrupted, or everything is about to end.
        """
        message: list[str] = []
        with storage_errors(log), log.open("a", encoding="utf-8") as output, self._started(arguments, output) as child:
            assert child.stderr is not None
            for line in child.stderr:
                (sys.stderr if self.jobs == 1 else output).write(line)
                if line.startswith("error: "):
                    message = []
                message.append(line.removeprefix("error: ").rstrip())
            code = child.wait()
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        return code, "\n".join(message[-MESSAGE_LINES:])

    def end(self) -> None:
        """Interrupts what runs, starts nothing more, and waits."""
        with self._lock:
            self._ending = True
            for child in self._running:
                child.send_signal(signal.SIGINT)
        self._pool.shutdown(cancel_futures=True)
        for descriptor in (self._alive, self._ours):
            os.close(descriptor)

    @contextmanager
    def _started(self, arguments: Sequence[str], output: Any) -> Iterator["subprocess.Popen[str]"]:
        with self._lock:
            if self._ending:
                raise KeyboardInterrupt
            child = subprocess.Popen(
                # -P: else a file of the working directory, such as yaml.py, would be run as a library.
                [sys.executable, "-P", "-m", "perlhf", *arguments],
                stdout=output,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=environment_of(self.jobs) | {PARENT: str(self._alive)},
                pass_fds=(self._alive,),
                start_new_session=True,  # a terminal's Ctrl-C reaches it through `end` alone, once
            )
            self._running.add(child)
        try:
            with child:
                yield child
        finally:
            with self._lock:
                self._running.discard(child)


def environment_of(jobs: int) -> dict[str, str]:
    """Ours, in which each of `jobs` processes takes its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    ours = dict(os.environ)
    if jobs > 1:
        ours.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
    return ours


@contextmanager
def processes(jobs: int) -> Iterator[Processes]:
    """Processes for a while, whatever ends it; SIGTERM and a closed terminal end it as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    running = Processes(jobs)
    in_main = threading.current_thread() is threading.main_thread()
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN] if in_main else []
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield running
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # a second one; they are ending already
            running.end()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
