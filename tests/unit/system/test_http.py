"""JSON over HTTP against real services on this machine, well-behaved and not."""

import gzip
import json
import signal
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from perlhf.errors import ConfigError, Interrupted, ServiceError
from perlhf.system import http, waiting
from perlhf.system.http import Service, post_all, proxy_of
from perlhf.system.waiting import STOP_ASKED, finish

Connection = socket.socket


def post_json(address: str, body: object, *, key: str | None = None, **limits: Any) -> object:
    """To a service that is called by its address without the query."""
    return http.post_json(Service(address, address.split("?")[0], key), body, **limits)


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[Connection], None]], str]]:
    """`raw(answer)` starts a server that lets `answer` write whatever it likes once a request came; its address."""
    listening: list[socket.socket] = []

    def start(answer: Callable[[Connection], None]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def one(connection: Connection) -> None:
            with connection:
                connection.settimeout(10)
                try:
                    _read_request(connection)
                    answer(connection)
                except OSError:  # the client has gone, which is what most of these tests are about
                    pass

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        server.close()


def _read_request(connection: Connection) -> bytes:
    """The head of a request; its body, too, where it says how long it is."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = connection.recv(65536)
        if not part:
            raise OSError("gone")
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head


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
    assert raised.value.status == 500 and raised.value.passing, "a later attempt may do better"
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
    with pytest.raises(ServiceError, match=r"answered 404 .*no such model") as raised:
        post_json(address, {}, backoff_seconds=0)
    assert len(asked) == 1
    assert raised.value.status == 404 and not raised.value.passing


def test_answers_that_are_no_json_are_given_as_text(serve):
    service = Service(address := serve(lambda asked: (b"Success: added", 200)), address)
    assert finish(http.all_answers(service, [{}], timeout_seconds=9, as_text=True)) == ["Success: added"]


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
    assert "sk-1234" not in str(raised.value) and "wrong key [hidden]" in str(raised.value)
    assert raised.value.hint == "is the key right?"


def test_a_service_that_wants_a_key_names_where_it_goes(serve):
    address = serve(lambda asked: (b"who are you?", 401))
    with pytest.raises(ServiceError, match="put the service's key into MY_KEY"):
        http.post_json(Service(address, address, None, "MY_KEY"), {})


def test_a_key_that_breaks_the_header_is_refused_unseen():
    with pytest.raises(ConfigError) as raised:
        post_json("http://127.0.0.1:9", {}, key="sk-1234\n")
    assert "sk-1234" not in str(raised.value)


@pytest.mark.parametrize("pause", [0.05, 60.0])
def test_a_request_has_one_deadline_however_its_answer_drips(raw, pause):
    """One byte at a time, before and after the headers end; or none at all."""
    asked = []

    def drip(connection: Connection) -> None:
        asked.append(1)
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    began = time.monotonic()
    with pytest.raises(ServiceError) as raised:
        post_json(raw(drip), {}, timeout_seconds=0.4, backoff_seconds=0)
    assert 0.4 <= time.monotonic() - began < 45, "a whole answer takes more than 50"
    assert "no whole answer within 0.4 seconds; not asked again" in str(raised.value)
    assert raised.value.hint == "raise timeout_seconds, or see why the service is slow"
    assert len(asked) == 1, "a time-out was paid for, and is not tried again"


def test_the_deadline_holds_while_the_body_drips(raw):
    def drip(connection: Connection) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1\r\n \r\n")
            time.sleep(0.02)

    with pytest.raises(ServiceError, match=r"within 0\.3 seconds"):
        post_json(raw(drip), {}, timeout_seconds=0.3)


def test_an_endless_answer_is_left_early(raw, monkeypatch):
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 2**20)
    sent = []

    def flood(connection: Connection) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3000):
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent.append(65536)

    with pytest.raises(ServiceError, match="answered more than 1 MiB; the rest wasn't read"):
        post_json(raw(flood), {})
    assert sum(sent) < 50 * 2**20


def test_a_long_error_is_left_early(raw):
    def flood(connection: Connection) -> None:
        connection.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: 99999999\r\n\r\nwrong " + b"x" * 2**20)
        time.sleep(60)

    with pytest.raises(ServiceError, match="answered 400 wrong x"):
        post_json(raw(flood), {})


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 65 + b"]" * 65, b'{"a": [' * 33 + b"]}" * 33]
)
def test_deep_json_is_refused(serve, body):
    with pytest.raises(ServiceError, match="nested more than 64 deep"):
        post_json(serve(lambda asked: body), {})


def test_brackets_in_text_are_not_depth(serve):
    answer = {"text": "[" * 1000 + '"\\' + "{" * 1000, "list": json.loads("[" * 60 + "]" * 60)}
    assert post_json(serve(lambda asked: answer), {}) == answer


def test_several_are_asked_at_once_and_come_in_order(serve):
    under_way, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(2, timeout=60)

    def answer(asked):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        both.wait()
        with lock:
            under_way[0] -= 1
        return {"number": asked.body}

    address = serve(answer)
    found = post_all(Service(address, address), list(range(6)), at_once=2)
    assert found == [{"number": number} for number in range(6)] and most == [2]


def test_the_first_failure_cancels_the_rest(serve):
    release = threading.Event()
    address = serve(lambda asked: ({}, 400) if asked.body == 0 else release.wait(60))
    began = time.monotonic()
    try:
        with pytest.raises(ServiceError, match="answered 400"):
            post_all(Service(address, address), [0, 1, 2, 3], at_once=2)
    finally:
        release.set()
    assert time.monotonic() - began < 45


class TestStopping:
    """Signals while a service is waited for."""

    def wait_for_nothing(self, raw, **limits: Any) -> float:
        address = raw(lambda connection: time.sleep(60))
        began = time.monotonic()
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            post_json(address, {}, **limits)
        return time.monotonic() - began

    def test_ctrl_c_is_heard_at_once(self, raw):
        # A shell starts what runs in its background without Python's handler.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()  # the handler runs in the main thread
        try:
            assert self.wait_for_nothing(raw) < 45
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_stop_gives_the_answer_a_little_time(self, raw, monkeypatch):
        monkeypatch.setattr(waiting, "GRACE_SECONDS", 0.3)
        token = STOP_ASKED.set(lambda: True)
        try:
            assert 0.3 <= self.wait_for_nothing(raw) < 45
        finally:
            STOP_ASKED.reset(token)

    def test_a_stop_ends_the_pause_between_attempts(self, serve):
        asked = []
        address = serve(lambda request: (asked.append(1), ({}, 503))[1])
        token = STOP_ASKED.set(lambda: bool(asked))
        began = time.monotonic()
        try:
            with pytest.raises(Interrupted, match="run the same command to continue"):
                post_json(address, {}, backoff_seconds=60)
        finally:
            STOP_ASKED.reset(token)
        assert time.monotonic() - began < 45 and len(asked) == 1


def test_nobody_listening():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            ServiceError, match=r"no answer: Connection refused \(attempt 2 of 2\)\n.*is the service running"
        ):
            post_json(address, {}, attempts=2, backoff_seconds=0)


def test_a_cut_answer_is_tried_again(serve):
    replies = [(b"{}", 200, {"Content-Length": "100"}), {"whole": True}]
    address = serve(lambda asked: replies.pop(0))
    assert post_json(address, {}, backoff_seconds=0) == {"whole": True}


def test_an_answer_that_is_no_json(serve):
    address = serve(lambda asked: b"<html>")
    with pytest.raises(ServiceError, match="answered no JSON: '<html>'"):
        post_json(address, {})


class TestProxies:
    @pytest.fixture(autouse=True)
    def none_of_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)

    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST.", "[::1]", "[::ffff:127.0.0.1]"]
    )
    def test_none_for_this_machine(self, monkeypatch, host):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, "http://proxy.example:3128")
        assert proxy_of(f"http://{host}:8000/x") is None and proxy_of(f"https://{host}:8000/x") is None
        assert proxy_of("http://host.example/x") == "http://proxy.example:3128"

    def test_the_environment_decides(self, monkeypatch):
        assert proxy_of("http://a.example/") is None
        monkeypatch.setenv("all_proxy", "proxy.example:1")
        monkeypatch.setenv("https_proxy", "http://secure.example:2")
        monkeypatch.setenv("no_proxy", "b.example,10.0.0.0/8,c.example:9")
        assert proxy_of("http://a.example/") == "http://proxy.example:1"
        assert proxy_of("https://a.example/") == "http://secure.example:2"
        for direct in ("http://b.example/", "https://sub.b.example/", "http://10.1.2.3:80/", "http://c.example:9/"):
            assert proxy_of(direct) is None
        assert proxy_of("http://11.1.2.3/") and proxy_of("http://c.example/")

    def test_a_service_here_is_reached_although_a_proxy_is_set(self, serve, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        assert post_json(serve(lambda asked: {"here": True}), {}) == {"here": True}

    def test_a_refusing_proxy_is_named_without_its_password(self, serve, monkeypatch):
        proxy = serve(lambda asked: (b"access denied by policy", 403))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("http_proxy", proxy.replace("http://", "http://me:hunter2@"))
        with pytest.raises(ServiceError) as raised:
            post_json("http://192.0.2.1/score", {})
        assert f"answered 403 access denied by policy, through the proxy {proxy}" in str(raised.value)
        assert "no_proxy" in str(raised.value) and "hunter2" not in str(raised.value)

    def test_a_proxy_that_refuses_a_tunnel(self, raw, monkeypatch):
        proxy = raw(lambda connection: connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"))
        monkeypatch.setenv("https_proxy", proxy.replace("http://", "http://me:hunter2@"))
        with pytest.raises(ServiceError) as raised:
            post_json("https://192.0.2.1/score", {})
        assert f"the proxy {proxy} refused: 403 Forbidden" in str(raised.value) and "hunter2" not in str(raised.value)

    def test_a_proxy_that_is_not_there(self, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:9")
        with pytest.raises(ServiceError) as raised:
            post_json("http://192.0.2.1/score", {}, attempts=2, backoff_seconds=0)
        assert "Connection refused, through the proxy http://127.0.0.1:9" in str(raised.value)
        assert "hunter2" not in str(raised.value)

    def test_a_proxy_of_another_kind(self, monkeypatch):
        monkeypatch.setenv("http_proxy", "ftp://me:hunter2@proxy.example")
        with pytest.raises(ConfigError, match=r"the proxy ftp://proxy\.example isn't one that can be used"):
            post_json("http://192.0.2.1/score", {})


def test_what_was_hidden_is_blotted_out(serve):
    address = serve(lambda asked: (f"no such hook: {asked.path} sk-1".encode(), 404))
    service = Service(f"{address}/T0/B1", f"{address}/${{HOOK}}", "sk-1", None, ("T0/B1",))
    with pytest.raises(ServiceError) as raised:
        http.post_json(service, {})
    assert str(raised.value) == f"{address}/${{HOOK}}: answered 404 no such hook: /[hidden] [hidden]"
    assert "T0" not in repr(service) and "sk-1" not in repr(service)


@pytest.mark.parametrize(("form", "pause"), [("date", 3), ("past", 0), ("nonsense", 0)])
def test_retry_after_may_be_a_date(serve, form, pause):
    asked: list[float] = []

    def answer(_):
        asked.append(time.time())
        ahead = formatdate(time.time() + (4 if form == "date" else -60), usegmt=True)
        return ({}, 429, {"Retry-After": "soon" if form == "nonsense" else ahead}) if len(asked) == 1 else {"ok": 1}

    assert post_json(serve(answer), {}, backoff_seconds=0.01) == {"ok": 1}
    assert pause - 0.1 <= asked[1] - asked[0] < pause + 2


class TestPackedAnswers:
    def test_one_packing_is_undone(self, serve):
        for encoding, pack in {"gzip": gzip.compress, "deflate": zlib.compress}.items():
            address = serve(lambda _, e=encoding, p=pack: (p(b'{"ok": 1}'), 200, {"Content-Encoding": e}))
            assert post_json(address, {}) == {"ok": 1}

    def test_a_bomb_is_unpacked_as_far_as_the_limit(self, serve, monkeypatch):
        monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 2**20)
        bomb = gzip.compress(b" " * 2**28)
        address = serve(lambda _: (bomb, 200, {"Content-Encoding": "gzip"}))
        post_json(serve(lambda _: {}), {})
        tracemalloc.start()
        with pytest.raises(ServiceError, match="more than 1 MiB"):
            post_json(address, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * 2**20

    @pytest.mark.parametrize("encoding", ["gzip, gzip", "br"])
    def test_other_encodings_are_named(self, serve, encoding):
        address = serve(lambda _: (b"x", 200, {"Content-Encoding": encoding}))
        with pytest.raises(ServiceError, match=f"answered in the encoding '{encoding}'"):
            post_json(address, {})

    def test_what_cannot_be_unpacked(self, serve):
        with pytest.raises(ServiceError, match="can't be unpacked"):
            post_json(serve(lambda _: (b"x" * 99, 200, {"Content-Encoding": "gzip"})), {})


def test_text_that_never_ends_is_read_once(serve):
    address, began = serve(lambda _: b'"' + b'\\"' * 2**20), time.monotonic()
    with pytest.raises(ServiceError, match="no JSON"):
        post_json(address, {})
    assert time.monotonic() - began < 120, "a reader that goes back would take hours"


def test_what_a_server_says_cannot_steer_the_terminal(serve):
    with pytest.raises(ServiceError) as raised:
        post_json(serve(lambda _: (b"\x1b[31mred\x07", 400)), {})
    assert "answered 400 ?[31mred?" in str(raised.value)


class TestOddProxies:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch):
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)

    @pytest.mark.parametrize("proxy", ["http://[::1", "http://me:my#word@127.0.0.1:1", "http://me:my/word@127.0.0.1:1"])
    def test_one_that_cannot_be_used_is_named_without_its_password(self, monkeypatch, proxy):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(ConfigError, match="isn't one that can be used") as raised:
            post_json("http://service.example/x", {})
        assert "my" not in str(raised.value)

    def test_one_that_repeats_its_password(self, serve, monkeypatch):
        monkeypatch.setenv("http_proxy", serve(lambda _: (b"no, pass word", 403)).replace("//", "//me:pass%20word@"))
        with pytest.raises(ServiceError) as raised:
            post_json("http://service.example/x", {})
        assert "answered 403 no, [hidden], through the proxy" in str(raised.value)

    def test_no_proxy_may_name_the_usual_port(self, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://proxy.example:1")
        monkeypatch.setenv("no_proxy", "service.example:80")
        assert proxy_of("http://service.example/x") is None
        assert proxy_of("http://service.example:81/x") == "http://proxy.example:1"
