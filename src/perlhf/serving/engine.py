"""The thread that computes for all requests: completions by steps of one token, and between steps what else is asked.

A request for completions waits in one queue until there is room, joins the rows that are being sampled, and is told
each token as it is drawn. It ends on the version of the adapter that it began with. Scores, and the loading of
adapters, are jobs between two steps: nothing else touches the model meanwhile.
"""

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from perlhf.errors import PerlhfError, ServiceError
from perlhf.method.packing import Ids
from perlhf.model.model import Model
from perlhf.rollout.local import Ends
from perlhf.rollout.rows import Groups, Row, Rows, Token, Wish
from perlhf.serving.elsewhere import Elsewhere
from perlhf.serving.models import Models, Speaker
from perlhf.system.console import note

T = TypeVar("T")
JOBS_BETWEEN = 1
"""Jobs that are done between two steps: each holds up everybody's next token."""


class Busy(PerlhfError):
    """Too many requests wait; or the server is ending."""


class Refused(PerlhfError, ValueError):
    """A request that can't be honoured: `where` is its key."""


@dataclass(frozen=True)
class Limits:
    """How much is taken at a time."""

    rows: int = 32
    """Completions sampled together."""
    waiting: int = 256
    """Requests that wait; further ones are turned away."""
    tokens: int = 32_768
    """Tokens whose keys and values are kept: of all rows, and of earlier conversations."""
    seconds: float = 600.0
    """Of one request, waiting and all."""


@dataclass(frozen=True)
class Ask:
    """A request for completions of one prompt."""

    speaker: Speaker
    prompt: Ids
    count: int
    longest: int
    """Tokens of a completion."""
    wish: Wish
    seed: int
    ends: Ends
    first: int = 0
    """Number of its first completion among those of the whole request."""


@dataclass(frozen=True)
class Sampled:
    """One token of one completion."""

    index: int
    id: int
    logprob: float
    likeliest: list[tuple[int, float]]
    finish: Literal["stop", "length"] | None
    """Why it is the last one."""


@dataclass(frozen=True)
class Failed:
    """The request is over, without all of its tokens."""

    what: str
    status: int
    """As HTTP says it."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken."""

    ask: Ask
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Sampled | Failed]"
    deadline: float
    rows: list[Row] = field(default_factory=list[Row])
    begun: bool = False
    left: int = 0
    """Completions that aren't at their end."""
    cancelled: bool = False


@dataclass
class Counts:
    """What was done so far, for `/metrics`."""

    sampled: int = 0
    prompted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    steps: int = 0
    scored: int = 0


class Engine:
    """Takes requests from any thread's event loop; `close` ends it.

    Args:
        opened: opens the models, in the engine's thread. No other thread of the process should compute anything: OpenMP
            gives each thread that does a team of its own, and where the teams are larger than the processor, their
            threads no longer wait for each other awake, which costs a fourth of the rate
            (`benchmarks/serving_thread.py`).
        elsewhere: gives what computes completions instead of this process, and is ended with the engine.

    Raises:
        what `opened` and `elsewhere` do.
    """

    def __init__(
        self,
        opened: Callable[[], Models],
        limits: Limits | None = None,
        elsewhere: Callable[[Models], AbstractContextManager[Elsewhere]] | None = None,
    ):
        self.limits, self.counts = limits or Limits(), Counts()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Row, tuple[Ticket, int]] = {}
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._elsewhere: Elsewhere | None = None
        models: Future[Models] = Future()
        self._thread = threading.Thread(target=self._work, args=(opened, elsewhere, models), name="engine", daemon=True)
        self._thread.start()
        self.models = models.result()

    @property
    def waiting(self) -> int:
        """Requests that haven't begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Completions that are being sampled."""
        return len(self._running)

    def submit(self, ask: Ask, loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Sampled | Failed]") -> Ticket:
        """Takes a request; its tokens come to `events`, which is awaited in `loop`.

        Whoever has begun its speaker (`Models.begin`) ends it when the ticket is at its end.

        Raises:
            Refused: it could never be honoured; Busy: too many wait.
        """
        needed = len(ask.prompt) + ask.count * ask.longest
        if ask.count > self.limits.rows:
            raise Refused(f"{ask.count} completions", where="n", allowed=f"at most {self.limits.rows}")
        if needed > self.limits.tokens:
            what = f"a prompt of {len(ask.prompt)} tokens and {ask.count} x {ask.longest} of completions"
            allowed = f"at most {self.limits.tokens} in all"
            raise Refused(what, where="max_completion_tokens", allowed=allowed, hint="fewer, or shorter completions")
        with self._changed:
            if self._closing:
                raise Busy("the server is ending")
            if len(self._waiting) >= self.limits.waiting:
                self.counts.refused += 1
                raise Busy(f"{len(self._waiting)} requests are waiting", hint="try again in a moment")
            ticket = Ticket(ask, loop, events, time.monotonic() + self.limits.seconds, left=ask.count)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the rest of it any more."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """Does something with the model between two steps.

        Raises:
            Busy: too many jobs wait.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closing:
                raise Busy("the server is ending")
            if len(self._jobs) >= self.limits.waiting:
                self.counts.refused += 1
                raise Busy(f"{len(self._jobs)} scores are waiting", hint="try again in a moment")
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends the thread; whoever still waits is told."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # the thread

    def _work(
        self,
        opened: Callable[[], Models],
        elsewhere: Callable[[Models], AbstractContextManager[Elsewhere]] | None,
        models: "Future[Models]",
    ) -> None:
        with contextlib.ExitStack() as stack:

            def begin() -> Models:
                found = opened()
                if elsewhere is not None:
                    self._elsewhere = stack.enter_context(elsewhere(found))
                self._prepare(found.model)
                return found

            _do(begin, models)
            if models.exception() is None:
                self._serve()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._jobs or self._waiting or self._running)
                if self._closing:
                    break
                jobs = [self._jobs.popleft() for _ in range(min(JOBS_BETWEEN, len(self._jobs)))]
            for job, future in jobs:
                _do(job, future)
            told: list[tuple[Ticket, Sampled | Failed]] = []
            try:
                self._leave(told)
                self._join(told)
                told += self._step()
            except Exception as error:  # noqa: BLE001 -- one step's failure must not end the thread that all wait for
                told += self._failed(error)
            _tell(told)
            self._drop()
        ended = [(ticket, Failed("the server is ending", 503)) for ticket in self._all()]
        _tell(ended)
        for _, future in self._jobs:
            future.set_exception(Busy("the server is ending"))

    def _prepare(self, model: Model) -> None:
        if self._elsewhere is not None:
            self._elsewhere.clear()
        self._rows = Rows(model, self.limits.tokens) if self._elsewhere is None else self._elsewhere
        self._groups = Groups(model, self.limits.rows)

    def _all(self) -> list[Ticket]:
        return list(dict.fromkeys([*self._waiting, *(ticket for ticket, _ in self._running.values())]))

    def _leave(self, told: list[tuple[Ticket, Sampled | Failed]]) -> None:
        """Drops requests that nobody wants any more, or that took too long."""
        now = time.monotonic()
        over = [ticket for ticket in self._all() if ticket.cancelled or now > ticket.deadline]
        for ticket in over:
            for row in ticket.rows:
                if row in self._running:
                    self._end(row)
            with self._changed:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
            if ticket.cancelled:
                self.counts.cancelled += 1
            else:
                self.counts.failed += 1
                told.append((ticket, Failed(f"it took longer than {self.limits.seconds:g} seconds", 504)))

    def _join(self, told: list[tuple[Ticket, Sampled | Failed]]) -> None:
        """Begins with requests that there is room for, in the order in which they came."""
        closed: set[bool] = set()
        for ticket in list(self._waiting):
            ask = ticket.ask
            mixes = ask.speaker.mixes
            if mixes in closed:
                continue
            if len(self._running) + ask.count > self.limits.rows:
                break
            draws = [_generator(ask.seed, number) for number in range(ask.count)]
            to = self._rows if mixes else self._groups
            try:
                rows = to.join(ask.prompt, draws, ask.longest, ask.speaker.under, ask.wish)
            except PerlhfError as error:
                self.counts.failed += 1
                told.append((ticket, _why(error)))
                rows = []
            if rows is None:
                closed.add(mixes)
                continue
            if rows:
                self.counts.prompted += len(ask.prompt)
            ticket.rows, ticket.begun = rows, True
            self._running |= {row: (ticket, index) for index, row in enumerate(rows)}
            with self._changed:
                self._waiting.remove(ticket)

    def _step(self) -> list[tuple[Ticket, Sampled | Failed]]:
        told: list[tuple[Ticket, Sampled | Failed]] = []
        for token in (*self._rows.step(), *self._groups.step()):
            if token.row not in self._running:
                continue  # of a request that another of its rows has just ended
            ticket, index = self._running[token.row]
            if math.isnan(token.logprob):
                for row in ticket.rows:
                    if row in self._running:
                        self._end(row)
                self.counts.failed += 1
                told.append((ticket, Failed("the model gives numbers that are not finite", 500)))
            else:
                told.append((ticket, self._sampled(ticket, index, token)))
        self.counts.steps += bool(told)
        return told

    def _sampled(self, ticket: Ticket, index: int, token: Token) -> Sampled:
        row, ask = token.row, ticket.ask
        finish = "stop" if ask.ends.end(row.ids) else "length" if len(row.ids) == ask.longest else None
        self.counts.sampled += 1
        if finish is not None:
            self._end(row)
            ticket.left -= 1
            self.counts.finished += ticket.left == 0
        return Sampled(ask.first + index, token.id, token.logprob, token.likeliest, finish)

    def _end(self, row: Row) -> None:
        ticket, _ = self._running.pop(row)
        (self._rows if ticket.ask.speaker.mixes else self._groups).leave(row)

    def _failed(self, error: Exception) -> list[tuple[Ticket, Sampled | Failed]]:
        """What is told when a step has failed: everybody who was in it; those who wait begin anew."""
        note(f"a step of {len(self._running)} completions failed: {type(error).__name__}: {error}")
        tickets = list(dict.fromkeys(ticket for ticket, _ in self._running.values()))
        self._running.clear()
        self._prepare(self.models.model)
        self.counts.failed += len(tickets)
        return [(ticket, _why(error)) for ticket in tickets]

    def _drop(self) -> None:
        for served in self.models.drop_unused():
            if isinstance(served, Speaker):
                self._rows.forget(served.under)


def _why(error: Exception) -> Failed:
    what = error.what if isinstance(error, PerlhfError) else "computing it failed"
    return Failed(what, 502 if isinstance(error, ServiceError) else 500)


def _do(job: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except Exception as error:  # noqa: BLE001 -- it is told to whoever asked
        future.set_exception(error)


def _tell(told: Sequence[tuple[Ticket, Sampled | Failed]]) -> None:
    """Puts events where they are awaited: one call for each event loop, since each wakes a thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Sampled | Failed]]] = {}
    for ticket, event in told:
        by_loop.setdefault(ticket.loop, []).append((ticket, event))
    for loop, events in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited with it
            loop.call_soon_threadsafe(_put, events)


def _put(events: Sequence[tuple[Ticket, Sampled | Failed]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)


def _generator(seed: int, number: int) -> np.random.Generator:
    """The draws of one of a request's completions: those of `local.uniforms` of this seed, its first prompt."""
    key = hashlib.sha256(f"{seed}:0:0:{number}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key)))
