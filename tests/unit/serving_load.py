"""Clients of every kind at one server, that remember what they were promised.

Each that stays must have its whole answer or be told to come again (429). What is wrong is a line of `wrong`.
"""

import asyncio
import contextlib
import hashlib
import json
import socket
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE_SECONDS = 300.0
WORDS = "tea coffee water milk sugar please two large small a the with without hot cold and or to go".split()


@dataclass
class Load:
    """Clients at one port, and what they have seen."""

    port: int
    draw: Random
    speakers: tuple[str, ...] = ("kind", "curt", "base")
    judge: str = "judge"
    done: Counter[str] = field(default_factory=Counter[str])
    """By what they did, and by the status that they were told."""
    versions: set[str] = field(default_factory=set[str])
    wrong: list[str] = field(default_factory=list[str])
    sent: set[str] = field(default_factory=set[str])
    """Keys of all feedback, as the database has them, acknowledged or not."""
    acknowledged: set[str] = field(default_factory=set[str])
    over: bool = False

    async def everything(self, clients: int) -> None:
        """Does what it draws, so many at a time, until it is `over`."""
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self.chat),
            (6, self.stream),
            (3, self.text),
            (2, self.several),
            (3, self.score),
            (2, self.rerank),
            (4, self.feedback),
            (4, self.vanish),
            (1, self.slow),
            (3, self.malformed),
        ]
        acts, weights = [act for _, act in kinds], [weight for weight, _ in kinds]

        async def client() -> None:
            while not self.over:
                (act,) = self.draw.choices(acts, weights)
                try:
                    await asyncio.wait_for(act(), PATIENCE_SECONDS)
                except (OSError, ValueError, KeyError, TypeError, asyncio.IncompleteReadError) as error:
                    self.wrong.append(f"{act.__name__}: {error!r:.200}")
                self.done[act.__name__] += 1

        await asyncio.gather(*(client() for _ in range(clients)))

    # one request each

    async def chat(self, **more: Any) -> Any:
        """A whole answer; None where it was turned away."""
        answer = await self._json(CHAT, self.asked() | more)
        if answer is not None:
            self.versions.add(answer["system_fingerprint"])
            self._check(answer["choices"], more.get("n", 1), "chat")
        return answer

    async def several(self) -> None:
        await self.chat(n=4, logprobs=True, top_logprobs=2)

    async def text(self) -> None:
        body = {"model": self.draw.choice(self.speakers), "prompt": [self.said(), self.said()], "max_tokens": 12}
        if (answer := await self._json(TEXT, body)) is not None:
            self._check(answer["choices"], 2, "text")

    async def stream(self, **more: Any) -> None:
        """All pieces of an answer."""
        ended: list[Any] = []
        last = None
        async for event in self.events(self.asked() | {"n": 2} | more):
            if event is None:
                return
            last = event
            ended += (
                [choice for choice in event.get("choices", ()) if choice["finish_reason"]] if event != "END" else []
            )
        if last != "END":
            self.wrong.append(f"a stream ended with {last!r:.200}")
        self._check(ended, (more | {"n": 2})["n"], "stream")

    async def slow(self) -> None:
        """A client that reads little at a time, of an answer that is larger than what lies between them."""
        await self.stream(slowly=0.02, n=2, max_tokens=100, logprobs=True, top_logprobs=20)

    async def score(self) -> None:
        answers = [self.said() for _ in range(self.draw.randint(1, 12))]
        body = {"model": self.judge, "messages": self.asked()["messages"], "answers": answers}
        found = await self._json("/v1/score", body | {"explain": self.draw.random() < 0.5})
        if found is not None and [row["index"] for row in found["data"]] != list(range(len(answers))):
            self.wrong.append(f"scores of {len(answers)} answers are {len(found['data'])}")

    async def rerank(self) -> None:
        documents = [self.said() for _ in range(6)]
        found = await self._json("/v1/rerank", {"model": self.judge, "query": "Tea?", "documents": documents})
        if found is not None and sorted(row["index"] for row in found["results"]) != list(range(6)):
            self.wrong.append("documents are missing from a rerank")

    async def feedback(self) -> None:
        """A thumb for an answer; a new prompt each time, since a label takes the place of the same person's before."""
        answer = await self.chat()
        if answer is not None and answer["choices"][0]["message"]["content"].strip():
            await self.say({"id": answer["id"], "thumb": self.draw.choice(("up", "down"))})

    async def say(self, body: dict[str, Any], again: bool = False) -> None:
        """Sends feedback; `again` until it is acknowledged, whatever becomes of the server meanwhile."""
        body = body | {"user": f"person {self.draw.randrange(8)}", "key": f"{self.draw.getrandbits(64):x}"}
        key = "serve:" + hashlib.sha256(json.dumps([body["user"], body["key"]]).encode()).hexdigest()
        self.sent.add(key)
        answer = None
        while answer is None:
            try:
                answer = await self._json("/v1/feedback", body)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                if not again:
                    raise
                await asyncio.sleep(0.05)
        self.acknowledged.add(key)

    async def vanish(self) -> None:
        """Leaves in the middle of a request, before its answer, or in the middle of a stream."""
        raw = self._request(CHAT, json.dumps(self.asked() | {"stream": self.draw.random() < 0.5, "max_tokens": 200}))
        raw = raw[: self.draw.choice((20, len(raw) - 5, len(raw), len(raw), len(raw)))]
        async with self._connected() as (reader, writer):
            writer.write(raw)
            await writer.drain()
            await asyncio.sleep(self.draw.uniform(0, 0.3))
            if self.draw.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(100), 1)

    async def malformed(self) -> None:
        """A body that is none, or that asks for what there isn't."""
        body: Any = self.asked()
        match self.draw.randrange(5):
            case 0:
                raw = self.draw.randbytes(self.draw.randrange(200))
            case 1:
                raw = json.dumps(body).encode()[: self.draw.randrange(40)]
            case 2:
                key = self.draw.choice(sorted(body))
                raw = json.dumps(body | {key: self.draw.choice((None, [], {}, -1, ""))}).encode()
            case 3:
                raw = json.dumps(body | {"max_tokens": 10**9, "stream": True}).encode()
            case _:
                raw = b"x" * 5_000_000
        path = self.draw.choice((CHAT, TEXT, "/v1/score", "/v1/rerank", "/v1/feedback"))
        with contextlib.suppress(ConnectionError):  # a body that is too large may be refused before its end
            status, _ = await self._ask(path, raw)
            self.done[str(status)] += 1
            if status >= 500:
                self.wrong.append(f"{status} for {raw[:100]!r} at {path}")

    # what they are made of

    async def events(self, body: dict[str, Any], slowly: float = 0.0) -> AsyncIterator[Any]:
        """Events of a stream, "END" for its end; None alone where it was turned away.

        Raises:
            IncompleteReadError, ConnectionError: the connection broke off.
        """
        slowly = body.pop("slowly", slowly)
        async with self._connected(small=bool(slowly)) as (reader, writer):
            writer.write(self._request(CHAT, json.dumps(body | {"stream": True})))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split()[1])
            self.done[str(status)] += 1
            if status != 200:
                if status != 429:
                    self.wrong.append(f"{status} for {body}")
                yield None
                return
            assert b"transfer-encoding: chunked" in head
            text = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                text += (await reader.readexactly(size + 2))[:-2]
                await asyncio.sleep(slowly)
                *whole, text = text.split(b"\n\n")
                for event in whole:
                    said = event.removeprefix(b"data: ")
                    yield "END" if said == b"[DONE]" else json.loads(said)

    def missing(self, database: Path) -> list[str]:
        """What is wrong with what is stored, read without our code."""
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            stored = Counter(key for (key,) in connection.execute("SELECT key FROM labels"))
        lost, doubled = self.acknowledged - set(stored), [key for key, count in stored.items() if count > 1]
        strange = set(stored) - self.sent
        told = ((len(lost), "lost"), (len(doubled), "doubled"), (len(strange), "that nobody sent"))
        return [f"{count} pieces of feedback {what}" for count, what in told if count]

    async def metrics(self) -> dict[str, float]:
        """The server's own numbers."""
        _, text = await self._ask("/metrics", None)
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def said(self) -> str:
        """Words that nobody said before."""
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(2, 20))) + f" {self.draw.getrandbits(40):x}?"

    def asked(self, **more: Any) -> dict[str, Any]:
        """A request for an answer to something new."""
        turns = [{"role": "user", "content": self.said()}]
        if self.draw.random() < 0.3:
            turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": self.said()}]
        most = self.draw.choice((4, 16, 60))
        return {
            "model": self.draw.choice(self.speakers),
            "messages": turns,
            "max_tokens": most,
            "temperature": 1,
        } | more

    def _check(self, choices: list[Any], count: int, what: str) -> None:
        if sorted(choice["index"] for choice in choices) != list(range(count)):
            self.wrong.append(f"{what}: {len(choices)} answers of {count}")
        if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            self.wrong.append(f"{what}: an answer without its end")

    async def _json(self, path: str, body: dict[str, Any]) -> Any:
        status, text = await self._ask(path, json.dumps(body).encode())
        self.done[str(status)] += 1
        if status == 200:
            return json.loads(text)
        if status != 429:
            self.wrong.append(f"{status} at {path}: {text[:200]!r} for {json.dumps(body)[:200]}")
        await asyncio.sleep(0.2)
        return None if status == 429 else json.loads(text)

    async def _ask(self, path: str, raw: bytes | None) -> tuple[int, bytes]:
        async with self._connected() as (reader, writer):
            writer.write(self._request(path, raw))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split()[0])
            return int(head.split()[1]), await reader.readexactly(length)

    def _request(self, path: str, body: str | bytes | None) -> bytes:
        raw = body.encode() if isinstance(body, str) else body or b""
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        return f"{head}Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw

    @contextlib.asynccontextmanager
    async def _connected(self, small: bool = False) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        plug = socket.socket()
        plug.setblocking(False)
        if small:  # little lies between the two, so that the server waits for whoever reads slowly
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            await asyncio.get_running_loop().sock_connect(plug, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=plug, limit=4096 if small else 2**20)
        except BaseException:
            plug.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def kill_in_the_middle(load: Load, kill: Callable[[], None], streams: int = 6) -> None:
    """Kills the server while it streams and takes feedback, and sees that streams break off and feedback goes on.

    Args:
        kill: kills it and starts another at the same port, which need not answer yet.
    """
    running, broken, over = set[int](), 0, False

    async def stream(number: int) -> None:
        """Reads one stream after another, until one breaks off."""
        nonlocal broken
        while not over:
            seen: list[Any] = []
            try:
                async for event in load.events(load.asked(model="kind", n=4, max_tokens=250)):
                    running.add(number)
                    seen.append(event)
            except (asyncio.IncompleteReadError, ConnectionError):
                broken += bool(seen)
                return
            running.discard(number)
            if seen[-1] not in ("END", None):
                load.wrong.append(f"a stream that was broken off looks whole: {seen[-1]!r:.100}")
                return

    async def person() -> None:
        while not over:
            said = {"prompt": load.said(), "answer": load.said(), "thumb": "up"}
            await load.say(said, again=True)

    talking = [asyncio.create_task(person()) for _ in range(3)]
    reading = [asyncio.create_task(stream(number)) for number in range(streams)]
    while len(running) < streams:
        assert not any(one.done() for one in (*reading, *talking)), load.wrong
        await asyncio.sleep(0.01)
    kill()
    over = True
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*reading, *talking)
    load.done["broken off"] += broken
    if not broken:
        load.wrong.append("no stream was broken off")
