"""JSON over HTTP against a real service on this machine."""

import socket
import threading
import time

import pytest

from perlhf.errors import ConfigError, ServiceError
from perlhf.system.http import check_address, post_json


def test_sends_json_and_returns_the_answer(serve):
    address = serve(lambda asked: {"path": asked.path, "type": asked.headers["Content-Type"], "body": asked.body})
    assert post_json(f"{address}/a/b", {"text": "é\ud800"}) == {
        "path": "/a/b",
        "type": "application/json",
        "body": {"text": "é\ud800"},
    }


@pytest.mark.parametrize("status", [429, 500, 503])
def test_tries_again_after_a_busy_or_broken_answer(serve, status):
    statuses = [status, status, 200]
    address = serve(lambda asked: ({"left": len(statuses)}, statuses.pop(0)))
    assert post_json(address, {}, backoff_seconds=0) == {"left": 1}
    assert statuses == []


def test_gives_up_after_the_last_attempt_and_says_what_came_back(serve):
    asked = []
    address = serve(lambda request: (asked.append(request), (b"out of memory\nin layer 3", 500))[1])
    with pytest.raises(ServiceError) as raised:
        post_json(f"{address}/x?token=hidden", {}, attempts=3, backoff_seconds=0)
    assert str(raised.value) == f"{address}/x: answered 500 out of memory in layer 3 (attempt 3 of 3)"
    assert len(asked) == 3


def test_pauses_double(serve):
    moments = []
    address = serve(lambda asked: (moments.append(time.monotonic()), ({}, 500))[1])
    with pytest.raises(ServiceError):
        post_json(address, {}, attempts=3, backoff_seconds=0.1)
    first, second = moments[1] - moments[0], moments[2] - moments[1]
    assert 0.1 <= first < second and second >= 0.2


def test_retry_after_is_heeded(serve):
    moments = []
    replies = [({}, 429, {"Retry-After": "1"}), {}]
    address = serve(lambda asked: (moments.append(time.monotonic()), replies.pop(0))[1])
    post_json(address, {}, backoff_seconds=0)
    assert moments[1] - moments[0] >= 1


def test_a_refused_request_is_not_repeated(serve):
    asked = []
    address = serve(lambda request: (asked.append(request), ({"error": "no such model"}, 404))[1])
    with pytest.raises(ServiceError, match=r"answered 404 .*no such model"):
        post_json(address, {}, backoff_seconds=0)
    assert len(asked) == 1


def test_a_redirect_is_not_followed(serve):
    elsewhere = []
    target = serve(lambda asked: (elsewhere.append(asked), {})[1])
    address = serve(lambda asked: ({}, 302, {"Location": target}))
    with pytest.raises(ServiceError, match="answered 302"):
        post_json(address, {}, key="secret", backoff_seconds=0)
    assert elsewhere == []


def test_key_is_sent_and_never_shown(serve):
    seen = []
    address = serve(lambda asked: (seen.append(asked.headers["Authorization"]), (b"wrong key sk-1234", 401))[1])
    with pytest.raises(ServiceError) as raised:
        post_json(address, {}, key="sk-1234")
    assert seen == ["Bearer sk-1234"]
    assert "sk-1234" not in str(raised.value) and "wrong key [key]" in str(raised.value)
    assert raised.value.hint == "is the key right?"


def test_a_key_that_breaks_the_header_is_refused_unseen():
    with pytest.raises(ConfigError) as raised:
        post_json("http://127.0.0.1:9", {}, key="sk-1234\n")
    assert "sk-1234" not in str(raised.value)


def test_time_out_is_tried_again(serve):
    release = threading.Event()
    asked = []

    def answer(_):
        asked.append(1)
        if len(asked) == 1:
            release.wait(10)
        return {"asked": len(asked)}

    address = serve(answer)
    try:
        assert post_json(address, {}, timeout_seconds=0.2, attempts=2, backoff_seconds=0) == {"asked": 2}
    finally:
        release.set()


def test_time_out_of_every_attempt_is_an_error(serve):
    release = threading.Event()
    address = serve(lambda asked: release.wait(10))
    try:
        with pytest.raises(ServiceError, match=r"no answer: timed out \(attempt 2 of 2\)"):
            post_json(address, {}, timeout_seconds=0.1, attempts=2, backoff_seconds=0)
    finally:
        release.set()


def test_nobody_listening(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServiceError, match=r"refused.* \(attempt 2 of 2\)\n.*is the service running"):
            post_json(address, {}, attempts=2, backoff_seconds=0)


def test_a_cut_answer_is_tried_again(serve):
    replies = [(b"{}", 200, {"Content-Length": "100"}), {"whole": True}]
    address = serve(lambda asked: replies.pop(0))
    assert post_json(address, {}, backoff_seconds=0) == {"whole": True}


def test_an_answer_that_is_no_json(serve):
    address = serve(lambda asked: b"<html>")
    with pytest.raises(ServiceError, match="answered no JSON: '<html>'"):
        post_json(address, {})


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8000",
        "file:///etc/hosts",
        "ftp://host/x",
        "http://",
        "http://host:port/",
        "http://ho st/",
        "http://h/\n",
        "",
    ],
)
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match=r"is no http address\n  allowed: http"):
        check_address(address)


def test_a_password_in_an_address_is_refused_unseen():
    with pytest.raises(ConfigError, match="user name or password") as raised:
        check_address("https://me:hunter2@host/v1")
    assert "hunter2" not in str(raised.value)
