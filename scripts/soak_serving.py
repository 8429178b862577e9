"""Mixed load on `perlhf serve` at a fixed memory, then kills in the middle of streams: nothing may be lost.

    python scripts/soak_serving.py [--minutes 20] [--clients 24] [--kills 5] [--seed 0]

A server in a process of its own serves a tiny base with two policies and a reward model. Clients chat, stream,
complete, score, rerank and give feedback; some vanish in the middle, read slowly, or send what is no request; a policy
gets new versions on disk meanwhile. Whoever stays must have the whole answer, or be told to come again (429); no answer
is a 500; at the end nothing runs or waits, and the server's resident memory is within 32 MiB of what it was after the
first fifth of the time (half a minute at least). Then the server gets SIGKILL while it streams: clients see the
connection break off, and what was acknowledged is in the database, once. One line is printed; the exit code is 1 when
anything failed.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "unit"))
GROWTH_BYTES = 32 * 2**20
VERSION_SECONDS = 10.0
"""Between two versions of a policy."""


class Server:
    """`perlhf serve` in a process of its own, always at the same port."""

    def __init__(self, words: list[str]):
        self._words, self.port = words, 0
        self._process = self._started()
        assert self._process.stdout is not None
        address = next(found for line in self._process.stdout if (found := re.match(r"http://\S+:(\d+)/", line)))
        self.port = int(address.group(1))

    @property
    def memory_bytes(self) -> int:
        """Resident, of its process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def kill(self) -> None:
        """Kills it and starts another."""
        self.stop()
        self._process = self._started()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _started(self) -> "subprocess.Popen[str]":
        words = [*self._words, "--port", str(self.port)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def main() -> int:
    """Exit code: 0 when nothing was lost, and memory stayed where it was."""
    from serving_load import Load
    from serving_world import make_runs
    from tiny_base import make_tiny_base

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    for name, default in (("clients", 24), ("kills", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        runs = make_runs(place, make_tiny_base(place / "base"))
        words = [sys.executable, "-m", "perlhf", "serve", *(str(place / name) for name in ("kind", "curt", "judge"))]
        words += ["--base", str(place / "base"), "--project", str(place / "project"), "--threads", "1"]
        words += ["--max-rows", "16", "--max-waiting", "24", "--max-tokens", "8000", "--refresh-seconds", "1"]
        server = Server(words)
        load = Load(server.port, Random(options.seed))
        try:
            grown = asyncio.run(_soaked(load, server, runs, options.clients, options.minutes * 60))
            asyncio.run(_killed(load, server, options.kills))
        finally:
            server.stop()
        load.wrong += load.missing(place / "project" / "labels.sqlite")
    done = ", ".join(f"{name} {count:,}" for name, count in sorted(load.done.items()))
    print(
        f"{options.minutes:g} minutes: {done}; {len(load.versions)} versions, {len(load.acknowledged):,} pieces of "
        f"feedback, memory {grown / 2**20:+.1f} MiB: {'; '.join(load.wrong[:20]) or 'nothing lost'}"
    )
    return 1 if load.wrong else 0


async def _soaked(load: Any, server: Server, runs: Any, clients: int, seconds: float) -> int:
    """Bytes by which the server's memory grew once it was warm."""
    from tiny_models import randomise

    began, versions, before = time.monotonic(), 0, 0
    warm = min(max(seconds / 5, 30), seconds / 2)
    working = asyncio.create_task(load.everything(clients))
    while (now := time.monotonic() - began) < seconds and not working.done():
        if now > warm and not before:
            before = server.memory_bytes
        if now > (versions + 1) * VERSION_SECONDS:
            versions += 1
            randomise(runs.model, "kind", 100 + versions)
            await asyncio.to_thread(runs.save, "kind")
        await asyncio.sleep(0.2)
    load.over = True
    await working
    left = await _left(load)
    grown = server.memory_bytes - before
    if left["perlhf_running"] or left["perlhf_waiting"]:
        load.wrong.append(f"{left['perlhf_running']:g} run and {left['perlhf_waiting']:g} wait at the end")
    if failed := sum(count for name, count in left.items() if re.search(r'requests_total.*status="5', name)):
        load.wrong.append(f"{failed:g} answers of 500 and above")
    if grown > GROWTH_BYTES:
        load.wrong.append(f"memory grew by {grown / 2**20:.1f} MiB")
    if versions and len({name for name in load.versions if name.startswith("kind@")}) < 2:
        load.wrong.append("no new version was served")
    return grown


async def _left(load: Any) -> dict[str, float]:
    """The server's numbers once nothing runs any more, or after half a minute."""
    for _ in range(300):
        found = await load.metrics()
        if not found["perlhf_running"] and not found["perlhf_waiting"]:
            break
        await asyncio.sleep(0.1)
    return found


async def _killed(load: Any, server: Server, kills: int) -> None:
    from serving_load import kill_in_the_middle

    for _ in range(kills):
        await kill_in_the_middle(load, server.kill)
        for _ in range(600):  # the next one loads
            try:
                assert await load.chat() is not None
                break
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
        else:
            load.wrong.append("no server came back")


if __name__ == "__main__":
    sys.exit(main())
