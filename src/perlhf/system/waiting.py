"""Waiting for coroutines (requests to services, a user's async functions) so that Ctrl-C and SIGTERM always work."""

import asyncio
import contextlib
import functools
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, wait
from contextvars import ContextVar
from typing import Any, TypeVar

from perlhf.errors import Interrupted

Result = TypeVar("Result")

GRACE_SECONDS = 5.0
"""How long an answer is still waited for once a stop was asked."""
_POLL_SECONDS = 0.1


def _never() -> bool:
    return False


PARENT = "PERLHF_PARENT_PIPE"
"""Environment variable with the number of a pipe that is closed when the process that started this one ends."""

STOP_ASKED: ContextVar[Callable[[], bool]] = ContextVar("STOP_ASKED", default=_never)
"""Whether a signal asked the open run to stop; `runs.run.open_run` sets it."""


def finish(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result, and what it raises.

    It runs in a thread of its own, so that a signal's handler runs at once whatever it waits for, and in one event
    loop for all calls of this process: what it opened there (a client kept in a global) works at the next call, and it
    can be called where a loop runs already, as in a notebook.

    Raises:
        Interrupted: a stop was asked and no result came within `GRACE_SECONDS` after it; the coroutine is cancelled.
    """
    stop_asked, asked_at = STOP_ASKED.get(), None
    future = asyncio.run_coroutine_threadsafe(_with_exits(coroutine), _loop(os.getpid()))
    try:
        while not wait((future,), _POLL_SECONDS).done:
            if asked_at is None and stop_asked():
                asked_at = time.monotonic()
            if asked_at is not None and time.monotonic() - asked_at > GRACE_SECONDS:
                raise stopped()
        result, ended_by = future.result()
    finally:
        future.cancel()
    if ended_by is not None:
        raise ended_by
    assert result is not None
    return result[0]


def end_with_parent() -> None:
    """Where whoever started this process gave it a pipe: once that process has ended, however, this one gets SIGTERM.

    A killed comparison ends its cells so, which save first; no system call for it is the same on Linux and macOS.
    """
    number = os.environ.pop(PARENT, None)
    if number is None:
        return
    descriptor = int(number)
    os.set_inheritable(descriptor, False)

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(descriptor, 1)  # nobody writes: it returns when the last end for writing is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="perlhf-parent", daemon=True).start()


def leave_closed_terminal() -> None:
    """After SIGHUP: what would be printed on a terminal that was closed goes nowhere, instead of failing."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


async def together_or_none(running: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results of coroutines that run at the same time, in order; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in running]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def finish_unless(cancelled: Callable[[], bool], coroutine: Coroutine[Any, Any, Result]) -> Result:
    """As `finish`, unless `cancelled`, which is asked now and then, says that nobody wants the result any more.

    Raises:
        CancelledError: of concurrent.futures.
    """

    async def watched() -> tuple[Result] | None:
        task = asyncio.ensure_future(coroutine)
        try:
            while not (await asyncio.wait({task}, timeout=_POLL_SECONDS))[0]:
                if cancelled():
                    return None
            return (task.result(),)
        finally:
            task.cancel()

    if (result := finish(watched())) is None:
        raise CancelledError
    return result[0]


def stopped() -> Interrupted:
    """What is raised where a stop was asked while something was waited for."""
    return Interrupted("stopped while a reward or a sampler was waited for", hint="run the same command to continue")


async def _with_exits(coroutine: Coroutine[Any, Any, Result]) -> tuple[tuple[Result] | None, BaseException | None]:
    """Hands on what would end the loop's own thread instead of the caller."""
    try:
        return (await coroutine,), None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process; a fork gets one of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run, args=(loop,), name="perlhf-waiting", daemon=True).start()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop for ever; what ends it in a task is left to whoever waits for that task."""
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
