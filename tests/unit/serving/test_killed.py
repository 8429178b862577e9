"""`perlhf serve` in a process of its own that is killed while it streams and takes feedback."""

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from serving_load import Load, kill_in_the_middle
from serving_world import make_runs


def test_a_server_that_is_killed_loses_no_feedback(tiny_base: Path, tmp_path: Path) -> None:
    """Streams break off, so that no client takes half an answer for a whole one; the next process takes the rest."""
    make_runs(tmp_path, tiny_base)
    words = [sys.executable, "-m", "perlhf", "serve", str(tmp_path / "kind"), str(tmp_path / "judge")]
    words += ["--base", str(tiny_base), "--project", str(tmp_path / "project"), "--threads", "1", "--port"]
    processes: list[subprocess.Popen[str]] = []

    def start(port: int) -> None:
        processes.append(subprocess.Popen([*words, str(port)], stdout=subprocess.PIPE, text=True))

    def kill() -> None:
        processes[-1].kill()
        processes[-1].communicate()
        start(load.port)

    async def served() -> None:
        await load.feedback()
        await kill_in_the_middle(load, kill, streams=4)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                assert await load.chat() is not None
                break
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
        await load.feedback()

    try:
        start(0)
        assert processes[0].stdout is not None
        address = next(found for line in processes[0].stdout if (found := re.match(r"http://\S+:(\d+)/", line)))
        load = Load(int(address.group(1)), Random(0), ("kind", "base"))
        asyncio.run(served())
    finally:
        processes[-1].kill()
        processes[-1].communicate()
    assert load.wrong == [] and load.done["broken off"] and load.acknowledged
    assert load.missing(tmp_path / "project" / "labels.sqlite") == []
