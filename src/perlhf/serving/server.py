"""The web application: OpenAI's endpoints, scores, feedback, the chat page, and who may ask.

What it relies on: requests are taken under the names that the server is known by alone (against DNS rebinding); from
other pages' scripts only where their origin is allowed; with a token wherever it listens beyond this machine. Bodies
are bounded, and what is asked and answered is written nowhere but into the labelling project, on request.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perlhf.errors import ConfigError, PerlhfError, StorageError
from perlhf.labelling.addresses import is_own
from perlhf.serving.engine import Busy, Engine, Refused
from perlhf.serving.feedback import Answers, Feedback
from perlhf.serving.models import Judge, Models, Speaker
from perlhf.serving.openai import answers, requests, scores
from perlhf.serving.openai.completing import Completing, Desk, Over, scored
from perlhf.serving.openai.requests import Wanted
from perlhf.serving.page import HEADERS, chat_routes

BODY_BYTES = 4 * 2**20
SLOW_SECONDS = 60.0
"""A client that takes no byte of its answer for so long is let go."""
_OPEN = ("/health", "/enter")


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    hosts: frozenset[str]
    """`name:port` and `name` under which the server may be asked, in lower case."""
    token: str | None = None
    """What everybody has to send; None where this machine alone can ask."""
    origins: frozenset[str] = frozenset()
    """Of other pages whose scripts may ask."""
    further: Sequence[str] = ()
    """Names of a proxy before the server, whose pages are its own."""

    @property
    def cookie_name(self) -> str:
        """Of this token alone: browsers send cookies to all ports of a machine."""
        return "perlhf-serve-" + hmac.new((self.token or "").encode(), b"name", hashlib.sha256).hexdigest()[:12]

    @property
    def cookie(self) -> str:
        """What a browser that has shown the token keeps."""
        return hmac.new((self.token or "").encode(), b"chat page", hashlib.sha256).hexdigest()

    def knows(self, headers: Headers, cookies: dict[str, str]) -> bool:
        """Whether the asker has the token."""
        if self.token is None:
            return True
        kind, _, sent = headers.get("authorization", "").partition(" ")
        by_key = kind.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), self.token.encode())
        return by_key or hmac.compare_digest(cookies.get(self.cookie_name, "").encode(), self.cookie.encode())


@dataclass
class Service:
    """The application's parts."""

    models: Models
    engine: Engine
    access: Access
    feedback: Feedback | None = None
    adapters: Path | None = None
    """Directory below which runs may be loaded on request."""
    longest: int = 1024
    """Tokens of an answer where the request names no length."""
    log: bool = False
    served: Answers = field(default_factory=Answers)
    metrics: "Metrics" = field(default_factory=lambda: Metrics())

    @cached_property
    def desk(self) -> Desk:
        """What carrying out a request needs of it."""
        served, metrics = None if self.feedback is None else self.served, self.metrics
        return Desk(self.models, self.engine, served, self.longest, metrics.first_token, metrics.whole)


class Metrics:
    """What `/metrics` tells, in Prometheus' words; nothing of it says what was asked."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        shared: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "perlhf_requests", "Requests by path and status.", ["path", "status"], **shared
        )
        self.first_token = prometheus_client.Histogram(
            "perlhf_first_token_seconds", "From a request to its first token.", **shared
        )
        self.whole = prometheus_client.Histogram("perlhf_request_seconds", "From a request to its end.", **shared)

    def of(self, engine: Engine) -> None:
        """Also tells what the engine counts."""
        self.registry.register(_Collector(engine))  # pyright: ignore[reportArgumentType] -- `collect` is all it needs


class _Collector:
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> list[Any]:
        """The engine's numbers as they are."""
        counts = self._engine.counts
        told: list[Any] = [
            CounterMetricFamily(f"perlhf_{name}", about, value)
            for name, about, value in (
                ("sampled_tokens", "Tokens that were sampled.", counts.sampled),
                ("prompt_tokens", "Tokens of prompts that were begun.", counts.prompted),
                ("finished_completions", "Requests for completions at their end.", counts.finished),
                ("failed_completions", "Requests that ended otherwise.", counts.failed),
                ("cancelled_completions", "Requests whose client left.", counts.cancelled),
                ("refused_requests", "Requests that were turned away because too many waited.", counts.refused),
                ("steps", "Steps of one token for each row.", counts.steps),
                ("scores", "Answers that were scored.", counts.scored),
            )
        ]
        told.append(GaugeMetricFamily("perlhf_waiting", "Requests that wait.", self._engine.waiting))
        told.append(GaugeMetricFamily("perlhf_running", "Completions that are being sampled.", self._engine.running))
        return told


def application(service: Service) -> ASGIApp:
    """The web application, for any ASGI server."""
    here = _Handlers(service)
    service.metrics.of(service.engine)
    routes = [
        Route("/v1/models", here.models),
        Route("/v1/models/{name}", here.model),
        Route("/v1/chat/completions", here.chat, methods=["POST"]),
        Route("/v1/completions", here.completion, methods=["POST"]),
        Route("/v1/score", here.score, methods=["POST"]),
        Route("/v1/rerank", here.rerank, methods=["POST"]),
        Route("/v1/feedback", here.feedback, methods=["POST"]),
        Route("/v1/load_lora_adapter", here.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", here.unload, methods=["POST"]),
        Route("/health", here.health),
        Route("/metrics", here.metrics),
        Route("/enter", here.enter, methods=["GET", "POST"]),
        *chat_routes(feedback=service.feedback is not None),
    ]
    handlers: Any = {PerlhfError: _refused, HTTPException: _http_error, ClientDisconnect: _left}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), service)


class _Handlers:
    def __init__(self, service: Service):
        self.service, self.engine, self.of = service, service.engine, service.models

    async def models(self, _: Request) -> Response:
        """What is served, by name."""
        return JSONResponse({"object": "list", "data": [_about(one) for one in self.of.current.values()]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        current = self.of.current
        if name not in current:
            raise ConfigError(f"no model {name!r:.80}", where="model", allowed=", ".join(current))
        return JSONResponse(_about(current[name]))

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        return await self._complete(request, requests.chat(requests.decoded(await _body(request))))

    async def completion(self, request: Request) -> Response:
        """`/v1/completions`."""
        return await self._complete(request, requests.completion(requests.decoded(await _body(request))))

    async def score(self, request: Request) -> Response:
        """`/v1/score`."""
        asked = scores.scoring(requests.Keys(requests.decoded(await _body(request))))
        found, judges = await scored(self.service.desk, asked)
        rows = [one.row(index) for index, one in enumerate(found)]
        versions = {judge.name: judge.version for judge in judges}
        return JSONResponse({"object": "list", "model": list(versions), "versions": versions, "data": rows})

    async def rerank(self, request: Request) -> Response:
        """`/v1/rerank`."""
        asked = scores.reranking(requests.Keys(requests.decoded(await _body(request))))
        found, judges = await scored(self.service.desk, asked)
        rows = [{"index": row["index"], "relevance_score": row["score"]} for row in map(_numbered, enumerate(found))]
        for row in rows if asked.with_documents else ():
            row["document"] = {"text": asked.answers[row["index"]]}
        rows.sort(key=lambda row: -row["relevance_score"])
        return JSONResponse({"model": [judge.name for judge in judges], "results": rows[: asked.top]})

    async def feedback(self, request: Request) -> Response:
        """`/v1/feedback`: acknowledged when it is on the disk."""
        project = self.service.feedback
        body = requests.decoded(await _body(request))
        if project is None:
            what = "this server takes no feedback: start it with --project DIRECTORY"
            return JSONResponse(answers.said(what, "not_found_error"), 404)
        return JSONResponse(await run_in_threadpool(project.take, body, self.service.served, "user"))

    async def load(self, request: Request) -> Response:
        """`/v1/load_lora_adapter`, as vLLM has it: a run below the directory of adapters."""
        given = requests.Keys(requests.decoded(await _body(request)))
        name, path = given.text("lora_name"), given.text("lora_path")
        given.take("load_inplace")
        given.finish()
        directory = self._below(path)
        if not name or not all(sign.isalnum() or sign in "._-" for sign in name):
            raise Refused("lora_name is no name", where="lora_name", allowed="letters, digits, . _ -")
        loaded = await asyncio.wrap_future(self.engine.run(lambda: self.of.load(name, directory)))
        return JSONResponse(_about(loaded))

    async def unload(self, request: Request) -> Response:
        """`/v1/unload_lora_adapter`: requests that have begun with it end on it."""
        given = requests.Keys(requests.decoded(await _body(request)))
        name = given.text("lora_name")
        given.finish()
        self._below(".")
        await asyncio.wrap_future(self.engine.run(lambda: self.of.unload(name or "")))
        return JSONResponse({"object": "model.unloaded", "id": name})

    async def health(self, _: Request) -> Response:
        """Whether it answers."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """Numbers for Prometheus."""
        text = prometheus_client.generate_latest(self.service.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def enter(self, request: Request) -> Response:
        """A form for the token, which a browser then keeps as a cookie."""
        if request.method == "GET":
            return HTMLResponse(_ENTER, headers=HEADERS)
        sent = parse_qs((await _body(request)).decode("utf-8", "replace")).get("token", [""])[0]
        token = self.service.access.token
        if token is not None and not hmac.compare_digest(sent.strip().encode(), token.encode()):
            await asyncio.sleep(0.5)
            return HTMLResponse(_ENTER, 403, headers=HEADERS)
        response = RedirectResponse("/", 303)
        kept = self.service.access.cookie
        # "lax", so that a link in a mail opens the page; what changes something is a POST, whose Origin is looked at.
        name = self.service.access.cookie_name
        response.set_cookie(name, kept, httponly=True, samesite="lax", max_age=90 * 24 * 3600)
        return response

    # inside

    def _below(self, path: str | None) -> Path:
        """A directory that may be loaded.

        Raises:
            Refused: it lies elsewhere, or none may be.
        """
        root = self.service.adapters
        if root is None:
            what = "this server loads no adapters on request"
            raise Refused(what, where="lora_path", allowed="a server started with --adapters DIRECTORY")
        found = (root / (path or "")).resolve()
        if not path or not found.is_relative_to(root.resolve()) or not found.is_dir():
            raise Refused("no such directory below --adapters", where="lora_path", allowed="a run's name there")
        return found

    async def _complete(self, request: Request, wanted: Wanted) -> Response:
        speaker = self.of.begin(wanted.model, Speaker)
        assert isinstance(speaker, Speaker)
        asked = Completing(self.service.desk, wanted, speaker)
        try:
            await asked.submit()
        except BaseException:
            asked.end()
            raise
        if wanted.stream:
            return _Stream(request, asked)
        try:
            return JSONResponse(await asked.whole(request))
        except Over as over:
            return JSONResponse(answers.said(over.failed.what, "server_error"), over.failed.status)
        finally:
            asked.end()


class _Stream(StreamingResponse):
    """A growing answer, at whose end the request is over, even if nobody ever asked for its first piece."""

    def __init__(self, request: Request, asked: Completing):
        headers = {"X-Accel-Buffering": "no"}
        super().__init__(asked.stream(request), media_type="text/event-stream", headers=headers)
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.end()


async def _body(request: Request) -> bytes:
    """The body, as far as it isn't too large.

    Raises:
        HTTPException: it is.
    """
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > BODY_BYTES:
            raise HTTPException(413, f"at most {BODY_BYTES // 2**20} MiB are taken")
    return bytes(found)


def _numbered(pair: tuple[int, scores.Scored]) -> dict[str, Any]:
    return pair[1].row(pair[0])


def _about(one: Speaker | Judge) -> dict[str, Any]:
    said = {"id": one.name, "object": "model", "created": one.created, "owned_by": "perlhf"}
    return said | {"stage": one.stage, "version": one.version, "context": one.encoder.max_tokens}


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, PerlhfError)
    if isinstance(error, StorageError):
        return JSONResponse(answers.said(error.what, "server_error", error.where), 507)
    status, body = answers.problem(error)
    headers = {"Retry-After": "1"} if isinstance(error, Busy) else None
    return JSONResponse(body, status, headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(answers.said(str(error.detail), "invalid_request_error"), error.status_code, error.headers)


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


class _Guard:
    """Looks at each request before anything else does."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service, self._access = app, service, service.access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        headers, began = Headers(scope=scope), time.monotonic()
        origin = headers.get("origin")
        foreign = origin is not None and not is_own(origin, headers.get("host", ""), self._access.further)
        allowed = foreign and origin in self._access.origins
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own.setdefault("X-Content-Type-Options", "nosniff")
                own.setdefault("Cache-Control", "no-store")
                own.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
                own.setdefault("Referrer-Policy", "same-origin")
                if allowed:
                    own["Access-Control-Allow-Origin"] = str(origin)
                    own["Vary"] = "Origin"
            try:
                async with asyncio.timeout(SLOW_SECONDS):
                    await send(message)
            except TimeoutError as error:
                raise ClientDisconnect from error

        app = self._refusal(scope, headers, foreign and not allowed, preflight=allowed) or self._app
        try:
            await app(scope, receive, answer)
        except ClientDisconnect:
            status = 499
        finally:
            path = scope["path"] if scope["path"] in _KNOWN else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()
            if self._service.log:
                print(f"{scope['method']} {path} {status} {time.monotonic() - began:.3f} s", flush=True)

    def _refusal(self, scope: Scope, headers: Headers, foreign: bool, preflight: bool) -> Response | None:
        if headers.get("host", "").lower() not in self._access.hosts:
            return _no("This server isn't known by that name.", 421)
        if foreign and scope["method"] not in ("GET", "HEAD"):
            return _no("Scripts of other pages may not ask.", 403)
        if scope["method"] == "OPTIONS":
            if not preflight:
                return _no("Scripts of other pages may not ask.", 403)
            asked = headers.get("access-control-request-headers", "")
            allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": asked[:500]}
            return PlainTextResponse("", 204, allowed)
        if scope["path"] in _OPEN or scope["path"].startswith("/chat/files/"):
            return None
        cookies = Request(scope).cookies
        if not self._access.knows(headers, cookies):
            if scope["path"] == "/" and scope["method"] == "GET":
                return RedirectResponse("/enter", 303)
            return _no("Send the server's token as the API key: Authorization: Bearer TOKEN.", 401)
        by_cookie = self._access.token is not None and "authorization" not in headers
        if by_cookie and scope["method"] == "POST" and headers.get("origin") is None:
            return _no("Only this server's own page may ask with its cookie.", 403)
        return None


def _no(what: str, status: int) -> Response:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(answers.said(what, kind), status, headers)


_V1 = "models chat/completions completions score rerank feedback load_lora_adapter unload_lora_adapter"
_KNOWN = frozenset(["/", "/health", "/metrics", "/enter", *("/v1/" + name for name in _V1.split())])
_ENTER = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Token</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/chat/files/label.css"></head>
<body><main><h1>This server needs its token</h1><form method="post" action="/enter">
<label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus>
<button>Enter</button></form></main></body></html>"""
