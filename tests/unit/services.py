"""A real HTTP service on this machine, for the tests of what asks one."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest


class Asked(NamedTuple):
    """One request as the service got it."""

    path: str
    headers: Mapping[str, str]
    body: Any


class Answer(NamedTuple):
    """What the service sends back: JSON, or bytes as they are."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = {}


Serve = Callable[[Callable[[Asked], Any]], str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """`serve(answer)` starts a service that answers each POST with `answer(asked)`; returns its address.

    `asked` has `path`, `headers` and the JSON `body`. `answer` returns a body, or a tuple (body, status, headers).
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(answer: Callable[[Asked], Any]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(answer))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(answer: Callable[[Asked], Any]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            found = answer(Asked(self.path, dict(self.headers), json.loads(raw)))
            reply = Answer(*found) if isinstance(found, tuple) else Answer(found)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the client gave up waiting, as the tests of time-outs make it
                self.close_connection = True

        def log_message(self, format: str, *_: Any) -> None:
            pass

    return Handler
