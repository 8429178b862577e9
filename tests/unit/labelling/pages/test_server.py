"""The page over real HTTP: who may ask what, and what becomes of hostile texts."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from forks import forked
from labelling_load import Load

from perlhf.config.labelling import ProjectConfig
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.pages.explained import Explainer
from perlhf.labelling.pages.server import BODY_BYTES, Limit, Page, application
from perlhf.labelling.project import LABELS
from perlhf.labelling.questions import SERVED, Question

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> [a](javascript:alert(3)) ![b](http://c/d.png)"


@dataclass
class Browser:
    """Keeps its cookie, as a browser does."""

    port: int
    cookie: str = ""
    host: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        own = {"Host": self.host or f"127.0.0.1:{self.port}", "Origin": f"http://127.0.0.1:{self.port}"}
        own |= {"Cookie": self.cookie} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {name: value for name, value in own.items() if value})
        answer = connection.getresponse()
        text = answer.read().decode()
        if given := answer.headers.get("Set-Cookie"):
            self.cookie = given.partition(";")[0]
        connection.close()
        return answer.status, text, answer.headers

    def enter(self, name: str) -> "Browser":
        assert self.ask("POST", "/name", f"name={quote(name)}")[0] == 303
        return self

    def say(self, **content: Any) -> tuple[int, Any]:
        if "task" not in content:
            found = re.search(r'data-task="([\w.]+)"', self.ask("GET", "/")[1])
            assert found is not None
            content["task"] = found.group(1)
        whole = {"key": f"the-key-of-{content['task']}", "verdict": "first", "seconds": 1.0} | content
        status, text, _ = self.ask("POST", "/answer", json.dumps(whole))
        return status, json.loads(text)


@dataclass
class Served:
    store: Store
    port: int
    page: Page

    def browser(self) -> Browser:
        return Browser(self.port)


def serve(
    directory: Path, explainer: Explainer | None = None, tokens: bool = False, **settings: Any
) -> Iterator[Served]:
    store = Store(directory / "labels.sqlite")
    answers = (HOSTILE, "**second**") if settings.get("kind", "comparison") == "comparison" else (HOSTILE,)
    store.add(Question(f"k{i}", f"{HOSTILE} {i}", answers, HOSTILE, HOSTILE, i / 10) for i in range(5))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    port = listening.getsockname()[1]
    hosts = frozenset({f"127.0.0.1:{port}"})
    page = Page(ProjectConfig(title=HOSTILE[:100], **settings), store, hosts, tokens, explainer)
    server = uvicorn.Server(uvicorn.Config(application(page), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Served(store, port, page)
    finally:
        server.should_exit = True
        thread.join()
        store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    yield from serve(tmp_path)


@pytest.fixture
def with_tokens(tmp_path: Path) -> Iterator[Served]:
    yield from serve(tmp_path, tokens=True)


def test_answers_and_takes_back(served: Served) -> None:
    ana = served.browser().enter("Ana")
    status, found = ana.say(verdict="second", reason="why", edit="better")
    assert (status, found["done"], found["wanted"]) == (200, 1, 5)
    (label,) = served.store.labels()
    assert (label.said.verdict, label.said.reason, label.said.edit) == ("second", "why", "better")
    assert ana.ask("POST", "/undo", "{}")[0] == 200
    assert served.store.labels() == []
    assert ana.ask("POST", "/undo", "{}")[0] == 409


def test_texts_are_text_in_every_field(served: Served) -> None:
    ana = served.browser().enter(HOSTILE[:59])
    pages = [ana.ask("GET", "/")[1]]
    ana.say(reason=HOSTILE, span=HOSTILE, edit=HOSTILE)
    pages += [ana.ask("GET", "/owner")[1], ana.ask("GET", "/next")[1]]
    for page in pages:
        assert "&lt;script&gt;" in page
        tags = re.findall(r"<(script|img|a)\b[^>]*>", page)
        assert "img" not in tags and tags.count("script") <= 1  # the page's own
        assert not re.findall(r'(?:src|href|action)="(?!/|data:,)', page)


def test_the_owner_sees_what_was_said_about_served_answers(served: Served) -> None:
    ana = served.browser().enter("Ana")
    ana.say()
    assert "served answers" not in ana.ask("GET", "/owner")[1]
    question = Question("own", "p", ("a",), "g", f"serve:{HOSTILE}@1", 0.5, SERVED, wanted=0)
    assert served.store.tell("Ana", question, Said("up"))
    page = ana.ask("GET", "/owner")[1]
    assert "Said about served answers, besides: 1 of serve:&lt;script&gt;" in page
    assert ana.ask("POST", "/undo", "{}")[0] == 200
    assert [label.said.verdict for label in served.store.labels()] == ["up"], "the page takes back what was said on it"


def test_the_owner_sees_whose_labels_are_left_out(served: Served) -> None:
    ana, bo = served.browser().enter("Ana"), served.browser().enter("Bo")
    ana.say(verdict="equal")
    bo.say(verdict="both_bad")
    page = ana.ask("GET", "/owner")[1]
    assert "2 of 5 labels" in page and "both bad" in page and "left out:" not in page
    served.store.leave_out("Bo")
    page = ana.ask("GET", "/owner")[1]
    assert "2 of 5 labels" in page
    assert "1 is of people who are left out" in page
    assert "about equal" in page and "both bad" not in page


def test_pages_load_nothing_from_elsewhere_and_run_their_own_script_alone(served: Served) -> None:
    status, text, headers = served.browser().ask("GET", "/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert not re.findall(r'(?:src|href|action)="(?!/|data:,)', text)
    for name in ("label.css", "label.js"):
        assert served.browser().ask("GET", f"/files/{name}")[0] == 200
    for path in ("/files/server.py", "/files/..%2fserver.py", "/files/%2e%2e/server.py", "/docs", "/openapi.json"):
        assert served.browser().ask("GET", path)[0] == 404


def test_other_names_and_other_origins_are_refused(served: Served) -> None:
    ana = served.browser().enter("Ana")
    for host in ("evil.example", "evil.example:80", f"127.0.0.1.evil.example:{served.port}"):
        assert ana.ask("GET", "/", Host=host)[0] == 421
    for origin in (
        "http://evil.example",
        "null",
        "",
        "http://[",
        "http://127.0.0.1",
        f"http://localhost:{served.port}",
    ):
        assert ana.ask("POST", "/undo", "{}", Origin=origin)[0] == 403
    assert ana.ask("PUT", "/answer", "{}")[0] == 405


def test_a_cookie_that_was_not_given_opens_nothing(served: Served) -> None:
    ana = served.browser().enter("Ana")
    number, signature = ana.cookie.partition("=")[2].split(".")
    for forged in (f"2.{signature}", f"{number}.", f"{number}.{'0' * 64}", "x.y", f"{number}.{signature}é"):
        other = Browser(served.port, ana.cookie.partition("=")[0] + "=" + quote(forged))
        assert other.ask("POST", "/answer", "{}")[0] == 403


def test_a_browser_keeps_cookie_and_answer_for_each_project_alone(served: Served, tmp_path: Path) -> None:
    ana = served.browser().enter("Ana")
    (tmp_path / "other").mkdir()
    for other in serve(tmp_path / "other"):
        at_other = other.browser().enter("Ana")
        assert at_other.cookie.partition("=")[0] != ana.cookie.partition("=")[0]
        waiting = re.search(r'data-task="([\w.]+)"', ana.ask("GET", "/")[1])
        assert waiting is not None
        assert at_other.ask("GET", "/")[0] == 200  # their task has the same number
        status, found = at_other.say(task=waiting.group(1))
        assert status == 400 and "another question" in found["problem"]
        assert other.store.labels() == []
    assert ana.say(task=waiting.group(1))[0] == 200


def test_a_new_link_ends_what_the_older_opened_and_leaves_the_owner_one(with_tokens: Served) -> None:
    owner, store = with_tokens.browser(), with_tokens.store
    status, _, headers = owner.ask("GET", f"/join?token={store.invite('Olga', owner=True)}")
    assert status == 303 and "SameSite=lax" in headers["Set-Cookie"], "a link in a mail comes from another site"
    assert owner.ask("GET", "/owner")[0] == 200
    token = store.invite("Olga")
    assert owner.ask("GET", "/")[0] == 403
    assert owner.ask("GET", f"/join?token={token}")[0] == 303
    assert owner.ask("GET", "/owner")[0] == 200
    assert owner.ask("GET", f"/join?token={store.invite('Olga', owner=False)}")[0] == 303
    assert owner.ask("GET", "/owner")[0] == 403


def test_made_up_cookies_dont_get_around_the_limit(with_tokens: Served) -> None:
    name = with_tokens.page.cookie
    found = [Browser(with_tokens.port, f"{name}={n}.x").ask("GET", "/join?token=wrong")[0] for n in range(1, 200)]
    assert 429 in found


def test_what_people_write_is_masked_where_the_project_masks(tmp_path: Path) -> None:
    for served in serve(tmp_path, redact=True):
        assert served.browser().enter("Ana").say(reason="as a@b.org says", edit="Call 0151 12345678.")[0] == 200
        (label,) = served.store.labels()
        assert (label.said.reason, label.said.edit) == ("as [mail address] says", "Call [phone number].")


def test_the_count_doesnt_tell_a_hidden_test(tmp_path: Path) -> None:
    questions = {"tests": ("tests.jsonl",), "test_share": 0.5}
    for served in serve(tmp_path, questions=questions):
        served.store.add([Question("t", "2 + 2?", ("4", "5"), "g", "tests", 0.0, known="first")])
        ana, counts = served.browser().enter("Ana"), []
        for _ in range(6):
            status, found = ana.say()
            assert status == 200 and found["wanted"] is None
            counts.append(found["done"])
        assert counts == [1, 2, 3, 4, 5, 6]
        assert sum(label.question.known is not None for label in served.store.labels()) == 1
        page = ana.ask("GET", "/")[1]
        assert "6 answered" in page and "<progress" not in page


def test_without_a_link_nobody_comes_in(with_tokens: Served) -> None:
    stranger = with_tokens.browser()
    assert stranger.ask("GET", "/")[0] == 403
    assert stranger.ask("POST", "/name", "name=Ana")[0] == 403
    assert stranger.ask("GET", "/join?token=wrong")[0] == 403
    token = with_tokens.store.invite("Ana")
    ana = with_tokens.browser()
    assert ana.ask("GET", f"/join?token={token}")[0] == 303
    assert ana.ask("GET", "/")[0] == 200
    assert ana.ask("GET", "/owner")[0] == 403
    assert ana.ask("POST", "/owner/leave-out", "name=Ana")[0] == 403
    owner = with_tokens.browser()
    owner.ask("GET", f"/join?token={with_tokens.store.invite('Olga', owner=True)}")
    assert owner.ask("GET", "/owner")[0] == 200
    assert owner.ask("POST", "/owner/leave-out", "name=Ana&out=1")[0] == 303
    assert [person.left_out for person in with_tokens.store.people()] == [True, False]


@pytest.mark.parametrize(
    "content",
    [
        {"verdict": "up"},
        {"verdict": 1},
        {"verdict": ["first"]},
        {"task": "1"},
        {"task": 1},
        {"task": True},
        {"task": f"{2**80}.{'0' * 16}"},
        {"task": f"4711.{'0' * 16}"},
        {"task": f"1.{'0' * 16}"},
        {"key": "short"},
        {"key": None},
        {"key": "half \ud83d a pair"},
        {"seconds": "1"},
        {"seconds": 10**400},
        {"reason": 1},
        {"reason": "x" * 20_001},
        {"grades": {"helpful": 3}},
        {"grades": [1]},
    ],
)
def test_what_no_page_sends_is_refused_and_stores_nothing(served: Served, content: dict[str, Any]) -> None:
    status, found = served.browser().enter("Ana").say(**content)
    assert status == 400 and found["problem"]
    assert served.store.labels() == []


def test_bodies_of_any_shape_are_refused(served: Served) -> None:
    ana = served.browser().enter("Ana")
    for body in (
        "",
        "[]",
        "null",
        "{",
        '"x"',
        "[" * 100_000,
        "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"),
    ):
        assert ana.ask("POST", "/answer", body)[0] == 400
    assert ana.ask("POST", "/answer", "x" * (BODY_BYTES + 1))[0] == 413
    status, _ = ana.say(reason="half \ud83d a pair and \0", seconds=float("nan"))
    assert status == 200
    (label,) = served.store.labels()
    assert label.said.reason == "half ? a pair and " and label.seconds == 0.0


def test_a_full_disk_keeps_the_answer_on_the_page(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from perlhf.errors import StorageError

    def full(*_: Any) -> bool:
        raise StorageError("can't write: database or disk is full")

    ana = served.browser().enter("Ana")
    with monkeypatch.context() as patched:
        patched.setattr(served.store, "say", full)
        status, found = ana.say()
        assert status == 507 and found["again"] and "full" in found["problem"]
    assert ana.say()[0] == 200


def test_grades_of_all_criteria_are_needed(tmp_path: Path) -> None:
    for served in serve(tmp_path, kind="scale", criteria=("helpful", "honest")):
        ana = served.browser().enter("Ana")
        assert ana.say(verdict="graded", grades={"helpful": 3})[0] == 400
        assert ana.say(verdict="graded", grades={"helpful": 3, "honest": 6})[0] == 400
        assert ana.say(verdict="graded", grades={"helpful": 3, "honest": 5})[0] == 200


class Explains:
    """Stands where the process is."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ready, self.models = False, 1

    def ask(self, question: Question) -> Any:
        self.asked.append(question.key)
        parts = [{"text": HOSTILE, "effect": -0.5}, {"text": "fine", "effect": 1.0}]
        row = {"score": 0.25, "sentences": parts, "tokens": [[HOSTILE, 0.5], ["fine", 0.25]]}
        return [row, None] if self.ready else None


def test_scores_are_explained_to_who_has_answered_alone(tmp_path: Path) -> None:
    explainer: Any = Explains()
    for served in serve(tmp_path, explainer, explain=("runs/reward",)):
        ana, bo = served.browser().enter("Ana"), served.browser().enter("Bo")
        assert served.browser().ask("POST", "/why", "{}")[0] == 403
        assert ana.ask("GET", "/why")[0] == 405
        assert ana.ask("POST", "/why", "{}", Origin="http://evil.example")[0] == 403
        ana.say(verdict="skip")
        for browser in (ana, bo):
            status, text, _ = browser.ask("POST", "/why", "{}")
            assert status == 400 and "answer a question first" in text
        assert explainer.asked == []
        ana.say(verdict="second")
        assert ana.ask("POST", "/why", "{}")[0] == 202
        explainer.ready = True
        status, text, _ = ana.ask("POST", "/why", "{}")
        assert status == 200
        html = json.loads(text)["html"]
        assert "&lt;script&gt;" in html and not re.findall(r"<(script|img|a)\b", html)
        assert "−0.50" in html and "+1.00" in html and "too long for the model" in html
        assert bo.ask("POST", "/why", "{}")[0] == 400
        status, text, _ = ana.ask("POST", "/undo", "{}")
        assert status == 400 and "it stays" in json.loads(text)["problem"]
        assert len(served.store.labels()) == 1
        assert explainer.asked == ["k1", "k1"]
        assert 'id="show-why"' in ana.ask("GET", "/")[1]


def test_nothing_is_explained_where_no_run_is_named(served: Served) -> None:
    ana = served.browser().enter("Ana")
    ana.say()
    assert ana.ask("POST", "/why", "{}")[0] == 404
    assert "why" not in ana.ask("GET", "/")[1]


def test_too_many_requests_wait() -> None:
    limit = Limit(rate=2, burst=3)
    assert [limit.allows("Ana", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.allows("Bo", 0.0)
    assert [limit.allows("Ana", 1.0) for _ in range(3)] == [True, True, False]


def test_a_server_killed_ten_times_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / LABELS)
    store.add(Question(f"k{i}", f"p{i}", ("x", "y"), f"g{i}", f"f:{i}", i / 1000) for i in range(1000))
    store.close()
    listening = socket.socket()  # as a supervisor holds it: who comes while no server is there waits
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    port = listening.getsockname()[1]

    def answer() -> None:
        page = Page(ProjectConfig(), Store(tmp_path / LABELS), frozenset({f"127.0.0.1:{port}"}), False)
        uvicorn.Server(uvicorn.Config(application(page), log_level="error", lifespan="off")).run([listening])

    running = [forked(answer)]

    def kill() -> None:
        os.kill(running[-1], signal.SIGKILL)
        os.waitpid(running[-1], 0)
        running.append(forked(answer))

    load = Load(port, Random(0))
    try:
        asyncio.run(load.kill_often(4, 10, kill, 0.1))
    finally:
        os.kill(running[-1], signal.SIGKILL)
        os.waitpid(running[-1], 0)
        listening.close()
    assert load.wrong(tmp_path / LABELS) == []
    assert len(running) == 11 and load.repeated > 0
