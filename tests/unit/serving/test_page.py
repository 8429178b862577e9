"""What the chat page is made of, over real HTTP: nothing from elsewhere, no markup of others, no 500."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from perlhf.serving.page import BODY_BYTES, BadRequest, chat_routes, render, why

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> [a](javascript:alert(3)) ![b](http://c/d.png) <http://e>"
)
EXPLANATION = {"score": 0.5, "sentences": [{"text": HOSTILE, "effect": -0.25}], "tokens": [[HOSTILE, 1.0], ["b", 0.5]]}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    app = Starlette(routes=chat_routes(feedback=True, title=HOSTILE))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def post(port: int, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    status, text, _ = ask(port, "POST", path, json.dumps(body).encode())
    return status, json.loads(text)


def test_the_page_loads_its_own_files_alone_and_runs_no_other_script(port: int) -> None:
    status, page, headers = ask(port, "GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert "&lt;script&gt;" in page and "<img" not in page and page.count("<script") == 1
    assert "style=" not in page and not re.search(r"\son\w+=", page.replace(HOSTILE, "").replace("src=x onerror", ""))
    files = re.findall(r'(?:src|href)="(?!data:,)([^"]*)"', page)
    assert len(files) == 3 and all(name.startswith("/chat/files/") for name in files)
    for name in files:
        status, text, headers = ask(port, "GET", name)
        assert status == 200 and headers["Content-Security-Policy"] == policy
        assert not re.search(r"https?://", text)
    for name in ("page.py", "..%2fpage.py", "chat.html.j2", "why.html.j2"):
        assert ask(port, "GET", f"/chat/files/{name}")[0] == 404
    assert '"1"' in page.partition("data-feedback=")[2][:3]


def test_markdown_is_rendered_and_markup_is_text(port: int) -> None:
    status, found = post(port, "/chat/render", {"texts": ["**a** `b`\n\n| c |\n|---|\n| d |", HOSTILE, "\ud800", ""]})
    table, hostile, half, empty = found["html"]
    assert status == 200 and "<strong>a</strong>" in table and "<td>d</td>" in table
    assert "&lt;script&gt;" in hostile and not re.search(r"<(script|img|a)\b", hostile)
    assert half == "<p>?</p>\n" and empty == ""
    assert render({"texts": [HOSTILE * 4000]})["html"][0].startswith('<pre tabindex="0">&lt;script')


def test_what_moved_a_score_is_shown_as_text(port: int) -> None:
    status, found = post(port, "/chat/why", {"explanations": [EXPLANATION, None], "models": 2})
    assert status == 200 and "2 reward models" in found["html"] and "−0.25" in found["html"]
    assert "&lt;script&gt;" in found["html"] and not re.search(r"<(script|img|a)\b", found["html"])
    assert "too long for the model" in found["html"], "an answer that doesn't fit"
    empty = {"score": -0.5, "sentences": [], "tokens": [["<|im_end|>", -0.5]]}
    status, found = post(port, "/chat/why", {"explanations": [empty]})
    assert status == 200 and "−0.50" in found["html"] and "It is empty" in found["html"]
    assert "too long" not in found["html"]


@pytest.mark.parametrize("path", ["/chat/render", "/chat/why"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"texts": [1], "explanations": [{}]}'])
def test_what_is_no_request_of_the_page_is_a_sentence(path: str, body: bytes, port: int) -> None:
    status, text, headers = ask(port, "POST", path, body)
    assert status == 400 and json.loads(text)["problem"] and "Content-Security-Policy" in headers
    assert ask(port, "POST", path, b" " * (BODY_BYTES + 1))[0] == 413
    assert ask(port, "GET", path)[0] == 405


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda more: st.lists(more, max_size=3) | st.dictionaries(st.text(max_size=3), more, max_size=3),
    max_leaves=6,
)
_NUMBERS = st.integers() | st.floats() | _JSON
_PARTS = st.lists(st.fixed_dictionaries({"text": st.text(max_size=5) | _JSON, "effect": _NUMBERS}), max_size=3)
_EXPLAINED = st.fixed_dictionaries(
    {
        "score": _NUMBERS,
        "sentences": _PARTS | _JSON,
        "tokens": st.lists(st.tuples(st.text(), _NUMBERS).map(list)) | _JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(body=st.fixed_dictionaries({"explanations": st.lists(_EXPLAINED | _JSON), "models": _NUMBERS}) | _JSON)
def test_any_json_is_explained_or_refused(body: Any) -> None:
    try:
        assert isinstance(why(body)["html"], str)
    except BadRequest:
        pass
    try:
        render(body)
    except BadRequest:
        pass
