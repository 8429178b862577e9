"""Labellers who answer as fast as the page lets them while its server is killed, and remember what it acknowledged.

As the page's own script does, a labeller sends an answer again, with the same key, until it is acknowledged.
"""

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

KEEP_TRYING_SECONDS = 60.0


@dataclass
class Load:
    """Labellers at one port, and what they have sent."""

    port: int
    draw: Random
    sent: set[str] = field(default_factory=set[str])
    """Keys of all answers that were sent, acknowledged or not."""
    acknowledged: set[str] = field(default_factory=set[str])
    repeated: int = 0
    """Answers that had to be sent again."""
    over: bool = False
    _cookies: dict[str, str] = field(default_factory=dict[str, str])

    async def kill_often(self, labellers: int, kills: int, kill: Callable[[], None], seconds: float) -> None:
        """Lets them answer; kills the server so often, each time at a random moment within `seconds` of answers.

        Args:
            kill: kills the server and starts another at the same port; when it returns, that one need not answer yet.
        """
        working = [asyncio.create_task(self._labeller(f"labeller {number}")) for number in range(labellers)]
        try:
            for _ in range(kills):
                before = len(self.acknowledged)
                while len(self.acknowledged) == before:  # it answers again
                    assert not any(one.done() for one in working), "a labeller stopped, or no question is left"
                    await asyncio.sleep(0.01)
                await asyncio.sleep(self.draw.uniform(0, seconds))
                kill()
        finally:
            self.over = True
        await asyncio.gather(*working)

    async def _labeller(self, name: str) -> None:
        status, page = await self._ask("POST", "/name", f"name={name.replace(' ', '+')}", name)
        assert status == 303, page
        while not self.over:
            _, page = await self._ask("GET", "/", "", name)
            found = re.search(r'data-task="([\w.]+)"', page)
            assert found is not None, "no question is left"
            key = f"{name}: {self.draw.getrandbits(64):x}"
            verdict = self.draw.choice(("first", "second", "equal", "both_bad"))
            content = {"task": found.group(1), "verdict": verdict, "seconds": 1.0, "key": key}
            self.sent.add(key)
            status, page = await self._ask("POST", "/answer", json.dumps(content), name)
            assert status == 200, page
            self.acknowledged.add(key)

    async def _ask(self, method: str, path: str, body: str, name: str) -> tuple[int, str]:
        """Asks until there is an answer."""
        for attempt in range(int(KEEP_TRYING_SECONDS / 0.02)):
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
                status, text = await asyncio.wait_for(self._once(method, path, body, name), 30)
                if status != 429:
                    self.repeated += attempt > 0 and path == "/answer"
                    return status, text
            await asyncio.sleep(0.02)
        raise AssertionError("the server doesn't come back")

    async def _once(self, method: str, path: str, body: str, name: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            own = f"Host: 127.0.0.1:{self.port}\r\nOrigin: http://127.0.0.1:{self.port}\r\nConnection: close\r\n"
            own += f"Cookie: {self._cookies.get(name, '')}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(f"{method} {path} HTTP/1.1\r\n{own}{body}".encode())
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}
            if "set-cookie" in headers:
                self._cookies[name] = headers["set-cookie"].partition(";")[0]
            text = (await reader.readexactly(int(headers["content-length"]))).decode()
            return int(lines[0].split()[1]), text
        finally:
            writer.close()

    def wrong(self, database: Path) -> list[str]:
        """What is lost, doubled or made up in the database, looked at without any code of ours; empty if nothing."""
        with contextlib.closing(sqlite3.connect(database)) as raw:
            kept = [key for (key,) in raw.execute("select key from labels where undone is null")]
            twice = (
                "select t.question from labels l join tasks t on l.task = t.id group by t.question having count(*) > 1"
            )
            doubled = [question for (question,) in raw.execute(twice)]
            counted = "select sum(answered), sum(answered > wanted) from questions"
            answered, too_many = raw.execute(counted).fetchone()
            (health,) = raw.execute("pragma integrity_check").fetchone()
        found = {
            "acknowledged and lost": self.acknowledged - set(kept),
            "stored twice": [key for key in set(kept) if kept.count(key) > 1],
            "questions with several labels": doubled,
            "stored and sent by nobody": set(kept) - self.sent,
        }
        said = [f"{name}: {len(those)}" for name, those in found.items() if those]
        said += [f"{answered} answers counted, {len(kept)} labels kept"] if answered != len(kept) or too_many else []
        return said + ([f"the database: {health}"] if health != "ok" else [])
