"""One request carried out: from its prompts to its answers, whole or as they grow."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Histogram
from starlette.requests import Request

from perlhf.data.records import Text
from perlhf.method.packing import Ids
from perlhf.rollout.local import Ends
from perlhf.rollout.rows import Wish
from perlhf.serving.engine import Ask, Engine, Failed, Refused, Sampled, Ticket
from perlhf.serving.feedback import Answers
from perlhf.serving.models import Judge, Models, Speaker
from perlhf.serving.openai import answers, scores
from perlhf.serving.openai.answers import Growing
from perlhf.serving.openai.requests import Wanted

GONE_SECONDS = 0.25
"""How often it is seen whether a client is still there."""
GONE = Failed("the client has gone", 499)


@dataclass
class Desk:
    """What carrying out a request needs."""

    models: Models
    engine: Engine
    served: Answers | None
    """Keeps what was answered, so that feedback can name it; None where there is no feedback."""
    longest: int
    """Tokens of an answer where the request names no length."""
    first_token: Histogram
    whole: Histogram
    encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))
    """Makes prompts into tokens beside the event loop."""


class Over(Exception):
    """A request ended without its tokens."""

    def __init__(self, failed: Failed):
        super().__init__(failed.what)
        self.failed = failed


class Completing:
    """One request for completions, from its prompts to its answers."""

    def __init__(self, desk: Desk, wanted: Wanted, speaker: Speaker):
        self.desk, self.wanted, self.speaker = desk, wanted, speaker
        self.id = ("chatcmpl-" if wanted.chat else "cmpl-") + secrets.token_hex(16)
        self.created, self._began, self._ended = answers.now(), time.monotonic(), False
        self.ends = Ends.of(speaker.encoder, wanted.stop or speaker.stop)
        self.events: asyncio.Queue[Sampled | Failed] = asyncio.Queue()
        self.tickets: list[Ticket] = []
        self.prompted = 0
        self.growing = [
            Growing(self.ends, wanted.chat, wanted.tools is not None)
            for _ in range(wanted.candidates * len(wanted.prompts))
        ]

    async def submit(self) -> None:
        """Puts the request into the queue.

        Raises:
            Refused, Busy: it can't be, or not now.
        """
        wanted, speaker, loop = self.wanted, self.speaker, asyncio.get_running_loop()
        ids = await loop.run_in_executor(self.desk.encoding, self._encoded)
        heat = speaker.temperature if wanted.temperature is None else wanted.temperature
        wish = Wish(heat, wanted.top_p, wanted.logprobs or 0)
        seed = secrets.randbits(62) if wanted.seed is None else wanted.seed
        for number, prompt in enumerate(ids):
            longest = self._longest(len(prompt))
            first, count = number * wanted.candidates, wanted.candidates
            # Prompts of one request draw differently, the first one as if it were alone.
            own = seed if number == 0 else seed + number * 1_000_003
            ask = Ask(speaker, prompt, count, longest, wish, own, self.ends, first)
            self.tickets.append(self.desk.engine.submit(ask, loop, self.events))
            self.prompted += len(prompt)

    def end(self) -> None:
        """Nobody waits for it any more."""
        if not self._ended:
            self._ended = True
            for ticket in self.tickets:
                if ticket.left:
                    self.desk.engine.cancel(ticket)
            self.desk.models.end(self.speaker)
            self.desk.whole.observe(time.monotonic() - self._began)

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer as one object.

        Raises:
            Over: there is none.
        """
        async with _watched(request, self.events):
            async for _ in self._new():
                pass
        chosen = list(range(len(self.growing)))
        if self.wanted.candidates > self.wanted.count:
            chosen = await self._best()
        logprobs = self.wanted.logprobs is not None
        make = answers.chat_choice if self.wanted.chat else answers.text_choice
        choices = [make(self.growing[at], index, logprobs) for index, at in enumerate(chosen)]
        self._remember(chosen)
        kind = "chat.completion" if self.wanted.chat else "text_completion"
        return self._about(kind) | {"choices": choices, "usage": self._usage()}

    async def stream(self, request: Request) -> AsyncIterator[bytes]:
        """The answer in server-sent events, as it grows; an error is the last of them."""
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        logprobs, begun = self.wanted.logprobs is not None, set[int]()
        about = self._about(kind) | ({"usage": None} if self.wanted.usage else {})
        try:
            async with _watched(request, self.events):
                async for new in self._new():
                    for index, tokens in new.items():
                        growing, first = self.growing[index], index not in begun
                        begun.add(index)
                        if self.wanted.chat:
                            choices = answers.chat_pieces(growing, index, tokens, logprobs, first)
                        else:
                            choices = answers.text_pieces(growing, index, tokens, logprobs)
                        for choice in choices:
                            yield event(about | {"choices": [choice]})
            self._remember(range(len(self.growing)))
            if self.wanted.usage:
                yield event(about | {"choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        except Over as over:
            if over.failed is not GONE:
                yield event(answers.said(over.failed.what, "server_error", code=str(over.failed.status)))
        finally:
            self.end()

    # inside

    async def _new(self) -> AsyncIterator[dict[int, list[Sampled]]]:
        """What has come since it was asked last, by completion, until all are at their end."""
        left = len(self.growing)
        while left:
            events = [await self.events.get()]
            while not self.events.empty():
                events.append(self.events.get_nowait())
            new: dict[int, list[Sampled]] = {}
            for event in events:
                if isinstance(event, Failed):
                    raise Over(event)
                growing = self.growing[event.index]
                if not growing.tokens and event.index == 0:
                    self.desk.first_token.observe(time.monotonic() - self._began)
                growing.tokens.append(event)
                new.setdefault(event.index, []).append(event)
                left -= event.finish is not None
            yield new

    async def _best(self) -> list[int]:
        """Numbers of the completions that score best, the best first, of each prompt."""
        wanted = self.wanted
        names = [wanted.reward] if wanted.reward else list(self.desk.models.judges)[:1]
        if not names:
            raise Refused("best_of needs a reward run", where="best_of", allowed="a server that serves one")
        chosen: list[int] = []
        for number, prompt in enumerate(wanted.prompts):
            if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
                raise Refused("best_of of tokens", where="best_of", allowed="prompts that are texts")
            first = number * wanted.candidates
            texts = [growing.text for growing in self.growing[first : first + wanted.candidates]]
            whole = [at for at, text in enumerate(texts) if text.strip()]
            asked = scores.Scoring(tuple(names), _as_text(prompt), tuple(texts[at] for at in whole), tools=wanted.tools)
            found = (await scored(self.desk, asked))[0] if whole else []
            by = {at: one.row(0)["score"] for at, one in zip(whole, found, strict=True)}
            order = sorted(range(len(texts)), key=lambda at: (-by.get(at, float("-inf")), at))
            chosen += [first + at for at in order[: wanted.count]]
        return chosen

    def _encoded(self) -> list[Ids]:
        encoder = self.speaker.encoder
        found: list[Ids] = []
        for prompt in self.wanted.prompts:
            if self.wanted.chat:
                found.append(encoder.prompt(_as_text(prompt), self.wanted.tools))
            elif isinstance(prompt, str):
                found.append(list(encoder.tokenizer(prompt)["input_ids"]))  # pyright: ignore[reportArgumentType]
            else:
                vocabulary = self.desk.models.model.vocabulary or len(encoder.tokenizer)
                if any(not isinstance(token, int) or token >= vocabulary for token in prompt):
                    raise Refused("a token that there isn't", where="prompt", allowed=f"numbers below {vocabulary}")
                found.append([int(token) for token in prompt if isinstance(token, int)])
        return found

    def _longest(self, prompt: int) -> int:
        """Tokens that an answer to so many of a prompt may have."""
        context, wanted = self.speaker.encoder.max_tokens, self.wanted.longest
        room = context - prompt
        if prompt < 1:
            raise Refused("the prompt is empty", where="prompt", allowed="at least one token")
        if room < 1 or (wanted or 0) > room:
            asked = f"{prompt} tokens of prompt" + (f" and {wanted} of the answer" if wanted else "")
            hint = None if room < 1 else f"max_completion_tokens: {room}"
            raise Refused(asked, where="context", allowed=f"{context} in all", hint=hint)
        return wanted or min(room, self.desk.longest)

    def _remember(self, chosen: Sequence[int]) -> None:
        if self.desk.served is None:
            return
        for index, at in enumerate(chosen):
            prompt = self.wanted.prompts[at // self.wanted.candidates]
            if isinstance(prompt, str) or self.wanted.chat:
                text, who = self.growing[at].text, self.speaker
                self.desk.served.remember(self.id, index, _as_text(prompt), text, who.name, who.version)

    def _about(self, kind: str) -> dict[str, Any]:
        return answers.about(kind, self.speaker, self.id, self.created)

    def _usage(self) -> dict[str, int]:
        return answers.usage(self.prompted, sum(len(growing.tokens) for growing in self.growing))


async def scored(desk: Desk, asked: scores.Scoring) -> tuple[list[scores.Scored], list[Judge]]:
    """Scores of a request's answers, and the versions of the reward runs that gave them.

    Raises:
        ConfigError, Refused, Busy: it can't be, or not now.
    """
    judges: list[Judge] = []
    try:
        for name in asked.models:
            judge = desk.models.begin(name, Judge)
            assert isinstance(judge, Judge)
            judges.append(judge)
        found: list[scores.Scored] = []
        for part in scores.parts(asked):
            job = scores.job(desk.models.model, judges, asked, part)
            found += await asyncio.wrap_future(desk.engine.run(job))
            desk.engine.counts.scored += len(part)
        return found, judges
    finally:
        for judge in judges:
            desk.models.end(judge)


@contextlib.asynccontextmanager
async def _watched(request: Request, events: "asyncio.Queue[Sampled | Failed]") -> AsyncIterator[None]:
    """Tells by an event when the client has gone."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(GONE_SECONDS)
        events.put_nowait(GONE)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def _as_text(prompt: Text | list[int]) -> Text:
    return prompt  # pyright: ignore[reportReturnType] -- tokens were seen to be none


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
