"""The labelling page: one small web application over a project's store.

What it relies on: cookies of a labeller are signed with the project's secret; requests are taken under the names that
the page is known by alone (against DNS rebinding), and what changes anything from its own pages alone (Origin). Pages
may load nothing from elsewhere and run no script but their own (CSP). All texts are escaped by the templates.
"""

import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from perlhf.config.labelling import ProjectConfig
from perlhf.errors import PerlhfError, RunError, StorageError
from perlhf.labelling import progress
from perlhf.labelling.addresses import is_own
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Labeller, Said, Task
from perlhf.labelling.pages import shown
from perlhf.labelling.pages.explained import Explainer
from perlhf.labelling.redact import redacted

BODY_BYTES = 256 * 1024
TEXT_LETTERS = 20_000
"""Of a reason, a marked part or an edited answer."""
VERDICTS: Mapping[str, Sequence[str]] = {
    "comparison": ("first", "second", "equal", "both_bad", "skip"),
    "rating": ("up", "down", "skip"),
    "scale": ("graded", "skip"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FILES = {"label.css": "text/css", "label.js": "text/javascript"}
_PAGES = resources.files("perlhf.labelling.pages")
_SECONDS_MOST = 24 * 3600.0
_TASK = re.compile(r"([1-9]\d{0,17})\.([0-9a-f]{16})")
"""A question as a page sends it back: its number, and a mark that no other has (`Store.mark`)."""


@dataclass
class Limit:
    """So many requests a second of one sender, after a burst (a token bucket)."""

    rate: float = 20.0
    burst: float = 100.0
    _left: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def allows(self, sender: str, now: float) -> bool:
        """Counts one request."""
        left, since = self._left.get(sender, (self.burst, now))
        left = min(self.burst, left + (now - since) * self.rate)
        if len(self._left) > 10_000:
            self._left.clear()
        self._left[sender] = (max(left - 1, 0.0), now)
        return left >= 1


@dataclass(frozen=True)
class Page:
    """The application's parts."""

    project: ProjectConfig
    store: Store
    hosts: frozenset[str]
    """`name:port` and `name` under which the page may be asked for, in lower case."""
    tokens: bool
    """Whether a labeller needs a link; otherwise a name is enough."""
    explainer: Explainer | None = None
    """What in an answer moved its score, for who has answered; None where the project names no reward runs."""
    further: Sequence[str] = ()
    """Names of a proxy before the page, whose forms are its own."""
    templates: jinja2.Environment = field(default_factory=lambda: _environment())
    limit: Limit = field(default_factory=Limit)

    @property
    def cookie(self) -> str:
        """The name of this project's cookie: browsers send one to all ports of a machine."""
        return f"perlhf-labeller-{self.store.name}"

    def signed(self, person: Labeller) -> str:
        """What a labeller's browser keeps until a new link is made for them."""
        return f"{person.id}.{self.store.signed(f'{person.id} {person.token_hash}')}"

    def person(self, cookies: Mapping[str, str]) -> Labeller | None:
        """Whose browser it is."""
        sent = cookies.get(self.cookie, "")
        number = sent.partition(".")[0]
        if not (number.isascii() and number.isdecimal()) or len(number) > 15:
            return None
        found = self.store.person(int(number))
        return found if found and hmac.compare_digest(sent.encode(), self.signed(found).encode()) else None


def application(page: Page) -> Starlette:
    """The web application, for any ASGI server."""
    here = _Handlers(page)
    routes = [
        Route("/", here.question),
        Route("/join", here.join),
        Route("/name", here.name, methods=["POST"]),
        Route("/leave", here.leave, methods=["POST"]),
        Route("/next", here.next),
        Route("/answer", here.answer, methods=["POST"]),
        Route("/undo", here.undo, methods=["POST"]),
        Route("/why", here.why, methods=["POST"]),
        Route("/owner", here.owner),
        Route("/owner/leave-out", here.leave_out, methods=["POST"]),
        Route("/files/{name}", _file),
        Route("/health", _health),
    ]
    guard = Middleware(BaseHTTPMiddleware, dispatch=_guarded(page))
    handlers: Any = {PerlhfError: _refused}
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


class _Handlers:
    def __init__(self, page: Page):
        self.page, self.store = page, page.store

    async def question(self, request: Request) -> Response:
        person = await self._person(request)
        if person is None:
            return self._render("enter.html.j2", 403 if self.page.tokens else 200, tokens=self.page.tokens)
        task = await run_in_threadpool(self._next, person)
        return self._render("page.html.j2", **await run_in_threadpool(self._shown, person, task))

    async def join(self, request: Request) -> Response:
        person = await run_in_threadpool(self.store.by_token, request.query_params.get("token", "")[:200])
        if person is None:
            return self._render("enter.html.j2", 403, tokens=True)
        return self._signed_in(person)

    async def name(self, request: Request) -> Response:
        if self.page.tokens:
            return self._render("enter.html.j2", 403, tokens=True)
        name = " ".join(parse_qs((await request.body()).decode("utf-8", "replace")).get("name", [""])[0].split())
        if not 1 <= len(name) <= 60 or not name.isprintable():
            return self._render("enter.html.j2", 400, tokens=False, problem="A name has 1 to 60 letters.")
        return self._signed_in(await run_in_threadpool(self.store.labeller, name))

    async def leave(self, _: Request) -> Response:
        response = RedirectResponse("/", 303)
        response.delete_cookie(self.page.cookie, httponly=True, samesite="lax")
        return response

    async def next(self, request: Request) -> Response:
        person = await self._required(request)
        return await self._fragment(person, await run_in_threadpool(self._next, person))

    async def answer(self, request: Request) -> Response:
        person = await self._required(request)
        content = _object(await request.body())
        said, task, mark, key, seconds = self._said(content)
        await run_in_threadpool(self.store.say, person, task, said, key, seconds, mark)
        return await self._fragment(person, await run_in_threadpool(self._next, person))

    async def undo(self, request: Request) -> Response:
        person = await self._required(request)
        task = await run_in_threadpool(self.store.undo, person)
        if task is None:
            return JSONResponse({"problem": "There is no answer to take back."}, 409)
        return await self._fragment(person, task)

    async def why(self, request: Request) -> Response:
        """What moved the scores of the labeller's last answer: no address names a question."""
        person = await self._required(request)
        explainer = self.page.explainer
        if explainer is None:
            return JSONResponse({"problem": "This project explains no scores."}, 404)
        task = await run_in_threadpool(self.store.explainable, person)
        found = explainer.ask(task.question)
        if found is None:
            return JSONResponse({"waiting": True}, 202)
        await run_in_threadpool(self.store.explained, person, task)
        template = self.page.templates.get_template("why.html.j2")
        said = {"explained": shown.explanations(task, found), "models": explainer.models}
        return JSONResponse({"html": template.render(said)})

    async def owner(self, request: Request) -> Response:
        await self._required(request, owner=True)
        numbers = await run_in_threadpool(self._progress)
        learned = await run_in_threadpool(progress.learned, self.store.path.parent)
        return self._render("owner.html.j2", progress=numbers, project=self.page.project, learned=learned)

    async def leave_out(self, request: Request) -> Response:
        await self._required(request, owner=True)
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        name, out = form.get("name", [""])[0], form.get("out", ["1"])[0] == "1"
        await run_in_threadpool(self.store.leave_out, name, out)
        return RedirectResponse("/owner", 303)

    # inside

    def _next(self, person: Labeller) -> Task | None:
        rules = self.page.project.questions
        lease = self.page.project.lease_minutes * 60
        return self.store.next_task(person, lease, rules.test_share, rules.seed)

    def _progress(self) -> progress.Progress:
        labels, people = self.store.labels(skips=True), self.store.people()
        return progress.progress(labels, people, self.store.progress(), self.page.project.up)

    def _shown(self, person: Labeller, task: Task | None) -> dict[str, Any]:
        done, wanted = self.store.progress()
        if self.page.project.questions.tests:  # of which a count that stands still would tell
            done, wanted = self.store.answered_by(person), None
        shared = {"project": self.page.project, "person": person, "task": task, "done": done, "wanted": wanted}
        shared |= {"mark": "" if task is None else self.store.mark(task.id, task.question.key), "own": self.store.name}
        shared |= {"instructions": shown.markdown(self.page.project.instructions), "owner": self._owns(person)}
        if task is None:
            return shared
        return shared | {"turns": shown.conversation(task.question.prompt), "answers": shown.answers(task)}

    async def _fragment(self, person: Labeller, task: Task | None) -> Response:
        values = await run_in_threadpool(self._shown, person, task)
        html = self.page.templates.get_template("question.html.j2").render(values)
        numbers = {"done": values["done"], "wanted": values["wanted"]}
        return JSONResponse({"html": html, "asked": task is not None} | numbers)

    def _said(self, content: Mapping[str, Any]) -> tuple[Said, int, str, str, float]:
        """An answer as a page sends it, checked.

        Raises:
            RunError: a value isn't one that the page would send.
        """
        project = self.page.project
        verdict, task, key, seconds = (content.get(name) for name in ("verdict", "task", "key", "seconds"))
        texts = [content.get(name, "") for name in ("reason", "span", "edit")]
        grades = content.get("grades") or {}
        asked = _TASK.fullmatch(task) if isinstance(task, str) else None
        fits = (
            verdict in VERDICTS[project.kind]
            and asked is not None
            and isinstance(key, str)
            and 8 <= len(key) <= 80
            and key.isascii()
            and isinstance(seconds, int | float)
            and not abs(seconds) > 1e9
            and all(isinstance(text, str) for text in texts)
            and isinstance(grades, dict)
            and all(type(grade) is int and 1 <= grade <= 5 for grade in grades.values())
            and set(grades) == (set(project.criteria) if verdict == "graded" else set())
        )
        if not fits:
            raise RunError("that is no answer to this question", hint="load the page again")
        if max(map(len, texts)) > TEXT_LETTERS:
            raise RunError(f"a reason, a marked part and a better answer have at most {TEXT_LETTERS:,} letters each")
        assert asked is not None and isinstance(key, str) and isinstance(seconds, int | float)
        reason, span, edit = (text.encode("utf-8", "replace").decode().replace("\0", "") for text in texts)
        if project.redact:
            reason, span, edit = map(redacted, (reason, span, edit))
        spent = min(max(float(seconds), 0.0), _SECONDS_MOST) if seconds == seconds else 0.0
        return Said(str(verdict), reason, span, edit, dict(grades)), int(asked[1]), asked[2], key, spent

    async def _person(self, request: Request) -> Labeller | None:
        return request.state.person  # whom `_refusal` has found

    async def _required(self, request: Request, owner: bool = False) -> Labeller:
        person = await self._person(request)
        if person is None or (owner and not self._owns(person)):
            raise _Forbidden("this page isn't open to you", hint="open the link that you were given")
        return person

    def _owns(self, person: Labeller) -> bool:
        return person.owner or not self.page.tokens

    def _signed_in(self, person: Labeller) -> Response:
        response = RedirectResponse("/", 303)
        # "lax", so that a link in a mail opens the page; what changes something is a POST, whose Origin is looked at.
        value = self.page.signed(person)
        response.set_cookie(self.page.cookie, value, httponly=True, samesite="lax", max_age=90 * 24 * 3600)
        return response

    def _render(self, name: str, status: int = 200, **values: Any) -> Response:
        given = {"project": self.page.project, "problem": "", **values}
        return HTMLResponse(self.page.templates.get_template(name).render(given), status)


class _Forbidden(RunError):
    """The asker isn't known, or may not do this."""


def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(lambda name: (_PAGES / name).read_text("utf-8"))
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def _guarded(page: Page) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Looks at each request before anything else does, and puts the headers on each answer."""

    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await _refusal(page, request) or await go_on(request)
        response.headers.update(HEADERS)
        return response

    return guard


async def _refusal(page: Page, request: Request) -> Response | None:
    host = request.headers.get("host", "").lower()
    if host not in page.hosts:
        return PlainTextResponse("This page isn't known by that name.", 421)
    if request.method not in ("GET", "HEAD", "POST"):
        return PlainTextResponse("Not taken.", 405)
    person = await run_in_threadpool(page.person, request.cookies) if page.cookie in request.cookies else None
    request.state.person = person
    sender = str(person.id) if person else f"at {request.client.host}" if request.client else ""
    if not page.limit.allows(sender, time.monotonic()):
        return PlainTextResponse("Too many requests; wait a moment.", 429, {"Retry-After": "2"})
    if request.method == "POST":
        origin = request.headers.get("origin")
        if origin is None or not is_own(origin, host, page.further):
            return PlainTextResponse("Only this page's own forms are taken.", 403)
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > BODY_BYTES:
            return JSONResponse({"problem": f"At most {BODY_BYTES // 1024} KiB are taken."}, 413)
    return None


def _object(body: bytes) -> Mapping[str, Any]:
    """JSON as it came.

    Raises:
        RunError: it is no JSON object.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RunError("that is no answer", hint="load the page again")
    return content


async def _refused(_: Request, error: Exception) -> Response:
    """One sentence for the page to show; the answer stays there until it is stored."""
    assert isinstance(error, PerlhfError)
    status = 507 if isinstance(error, StorageError) else 403 if isinstance(error, _Forbidden) else 400
    if isinstance(error, StorageError):
        return JSONResponse({"problem": "The answer can't be stored now: " + error.what, "again": True}, status)
    return JSONResponse({"problem": error.what}, status)


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        return PlainTextResponse("No such file.", 404)
    return Response((_PAGES / name).read_text("utf-8"), media_type=_FILES[name])


async def _health(_: Request) -> Response:
    return JSONResponse({"ready": True})
