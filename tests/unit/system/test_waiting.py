"""Coroutines are waited for from anywhere, in one loop, and nothing that they do ends it."""

import asyncio
import subprocess
import sys
from concurrent.futures import CancelledError

import pytest

from perlhf.system.waiting import finish, finish_unless


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def loop_here() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_results_come_from_one_loop():
    assert finish(give(3)) == 3
    assert finish(loop_here()) is finish(loop_here())


def test_it_works_where_a_loop_runs_already():
    async def notebook() -> int:
        return finish(give(4))

    assert asyncio.run(notebook()) == 4


def test_what_is_raised_comes_out_and_the_loop_lives_on():
    async def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(ZeroDivisionError, match="mine"):
        finish(fail(ZeroDivisionError("mine")))
    with pytest.raises(TimeoutError, match="mine"):
        finish(fail(TimeoutError("mine")))
    with pytest.raises(SystemExit):
        finish(fail(SystemExit(1)))
    assert finish(give(5)) == 5


FORKED = """
import asyncio, os
from perlhf.system.waiting import finish

assert finish(asyncio.sleep(0, 1)) == 1
child = os.fork()
if child == 0:
    os._exit(finish(asyncio.sleep(0, 7)))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_fork_has_a_loop_of_its_own():
    """In a process of its own, for Python 3.12 warns of a fork beside threads, and a warning is an error here."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_what_nobody_wants_any_more_is_cancelled():
    ended = []

    async def last(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
            return "done"
        finally:
            ended.append(seconds)

    assert finish_unless(lambda: False, last(0)) == "done"
    with pytest.raises(CancelledError):
        finish_unless(lambda: True, last(3600))
    assert ended[0] == 0
