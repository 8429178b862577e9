"""People at the chat page: by keyboard, on a phone, in the dark, while the server is busy, breaks off or dies."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from people import REPOSITORY, SCREENS, Command, new_page, opened, serious, serious_now, started
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from toy import command, joined, start, write_feedback

from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Label

Serve = Callable[..., AbstractContextManager[Command]]
ORDER = "A large latte to go, please."
SAVED = "perlhf-chat-settings"


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tiny runs that answer, and a reward run of two members."""
    place = tmp_path_factory.mktemp("runs")
    data = write_feedback(place / "feedback")
    started = []
    for stage, name, file, *more in (
        ("sft", "policy", "demonstrations.jsonl", "--seed", "1"),
        ("sft", "sft", "demonstrations.jsonl", "--seed", "2"),
        ("reward", "taste", "ratings.jsonl", "--members", "2"),
    ):
        words = command(stage, tiny_base, data / file, place / name, "--encoding.max-tokens", "512", *more)
        started.append(start(words, place / f"{name}.log", place))
    assert joined(started) == [0, 0, 0]
    return [str(place / name) for name in ("policy", "sft", "taste")]


@pytest.fixture(scope="module")
def serve(runs: list[str]) -> Serve:
    """The real command on these runs."""
    return lambda *more: opened("serve", *runs, "--threads", "1", "--max-completion-tokens", "24", "--port", "0", *more)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the server of all tests: each looks at what its own person said."""
    return tmp_path_factory.mktemp("served") / "project"


@pytest.fixture(scope="module")
def served(serve: Serve, project: Path) -> Iterator[Command]:
    with serve("--project", str(project)) as running:
        yield running


def stand_in(*options: str) -> AbstractContextManager[Command]:
    """A server whose models `policy` and `sft` write what no tiny base does."""
    return started([sys.executable, str(REPOSITORY / "tests/browser/canned.py"), *options])


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[Command]:
    with stand_in("--project", str(tmp_path / "canned")) as running:
        yield running


def entered(context: BrowserContext, address: str, name: str = "") -> Page:
    saved = json.dumps(json.dumps({"name": name}))
    context.add_init_script(f"localStorage.getItem('{SAVED}') || localStorage.setItem('{SAVED}', {saved})")
    page = new_page(context)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(address)
    page.wait_for_selector("#model option", state="attached")
    return page


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def last(page: Page) -> Any:
    return page.locator(".answered").last


def labels(project: Path, name: str) -> list[Label]:
    """What somebody said."""
    store = Store(project / "labels.sqlite")
    found = [label for label in store.labels() if label.labeller.name == name]
    store.close()
    return found


def answered(page: Page, text: str = ORDER) -> None:
    before = page.locator(".answered").count()
    say(page, text)
    expect(page.locator(".answered .opinion:visible")).to_have_count(before + 1)


def test_a_conversation_by_keyboard_alone(browser: Browser, served: Command, project: Path) -> None:
    page = entered(browser.new_context(), served.address, "Ana")

    def reach(name: str) -> None:
        """Tab leads there."""
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("() => (document.activeElement.textContent || '').trim()")
            if focused == name:
                return
        raise AssertionError(f"Tab doesn't lead to {name}")

    page.focus("#text")
    page.keyboard.type("A large latte")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("to go, please.")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_have_text("The answer is complete.")
    expect(page.locator(".turn.own .text")).to_have_text("A large latte\nto go, please.")
    expect(last(page).locator(".opinion")).to_be_visible()
    page.evaluate("() => document.activeElement.blur()")
    reach("Good")
    page.keyboard.press("Enter")
    expect(last(page).locator(".stored")).to_have_text("Stored.")
    reach("Reason, or a better answer")
    page.keyboard.press("Enter")
    page.keyboard.type("It is polite.")
    page.keyboard.press("Tab")
    page.keyboard.type("A large latte, of course.")
    reach("Store")
    page.keyboard.press("Enter")
    expect(page.locator(".better")).to_be_hidden()
    expect(page.locator("#waiting")).to_be_hidden()
    page.evaluate("() => document.activeElement.blur()")
    reach("Score")
    page.keyboard.press("Enter")
    expect(page.locator("#why .scored")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(last(page).locator("[data-thumb=up]")).to_be_disabled()
    (label,) = labels(project, "Ana")
    said = label.said
    assert (said.verdict, said.reason, said.edit) == ("up", "It is polite.", "A large latte, of course.")
    assert label.question.source == "serve:policy@1" and label.question.drawn == "served"


def test_two_answers_are_blind_until_the_choice(browser: Browser, served: Command, project: Path) -> None:
    page = entered(browser.new_context(), served.address, "Bo")
    page.check("#twice")
    page.select_option("#other", "sft")
    lefts: list[str] = []
    verdicts = {"ArrowLeft": "first", "ArrowRight": "second", "=": "equal", "x": "both_bad"}
    for number, key in enumerate(verdicts):
        say(page, f"{ORDER} {number}")
        shown = page.locator(".two-answers").last
        expect(shown.locator(".verdicts")).to_be_visible()
        assert "sft" not in shown.inner_html() and "policy" not in shown.inner_html()
        page.evaluate("() => document.activeElement.blur()")
        page.keyboard.press(key)
        expect(last(page).locator(".stored")).to_have_text("Stored.")
        heads = shown.locator("h4").all_inner_texts()
        lefts.append("policy" if "policy" in heads[0] else "sft")
        side = 1 if key == "ArrowRight" else 0
        assert "goes on" in heads[side] and "goes on" not in heads[1 - side]
        assert page.evaluate("() => turns.length") == 2 * number + 2
    found = labels(project, "Bo")
    for left, label, verdict in zip(lefts, found, verdicts.values(), strict=True):
        first, second = label.question.source.removeprefix("serve:").split(",")
        better = {"first": left, "second": "sft" if left == "policy" else "policy"}.get(verdict)
        chosen = {"first": first, "second": second}.get(label.said.verdict)
        assert chosen is None if better is None else chosen is not None and chosen.startswith(better)
        assert label.said.verdict in (verdict, {"first": "second", "second": "first"}.get(verdict))


def test_no_score_before_an_opinion(browser: Browser, served: Command, project: Path) -> None:
    page = entered(browser.new_context(), served.address, "Cy")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answered(page)
    last(page).locator(".score").press("Enter")
    expect(page.locator("#message")).to_contain_text("Say first what you think")
    expect(page.locator("#why")).to_be_hidden()
    assert not any(url.endswith("/v1/score") for url in asked)
    last(page).locator(".pass").click()
    last(page).locator(".score").click()
    expect(page.locator("#why .scored")).to_have_count(1)
    assert labels(project, "Cy") == []


def test_without_a_project_nothing_is_asked_and_scores_are_shown(browser: Browser) -> None:
    with stand_in() as running:
        page = entered(browser.new_context(), running.address)
        answered(page)
        expect(last(page).locator(".thumbs")).to_be_hidden()
        last(page).locator(".score").click()
        expect(page.locator("#why .scored")).to_have_count(1)


def test_a_busy_server_and_one_that_is_gone_lose_nothing_that_was_typed(browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(), served.address)
    body = json.dumps({"error": {"message": "32 requests wait."}})
    ways: list[tuple[Callable[[Route], None], str]] = [
        (lambda route: route.fulfill(status=429, body=body, content_type="application/json"), "is busy.*32 requests"),
        (lambda route: route.fulfill(status=503, body="Loading."), "can't answer now. Loading."),
        (lambda route: route.abort(), "can't be reached"),
    ]
    for twice in (False, True):
        page.set_checked("#twice", twice)
        for act, said in ways:
            page.route("**/v1/chat/completions", act)
            say(page, ORDER)
            expect(page.locator("#message")).to_have_text(re.compile(said + ".* Your message is kept."))
            assert page.input_value("#text") == ORDER and page.locator(".turn").count() == 0
            page.unroute("**/v1/chat/completions")
    page.uncheck("#twice")
    page.press("#text", "Enter")
    expect(page.locator(".opinion:visible")).to_have_count(1)


def test_a_stream_that_breaks_off_says_so_and_is_asked_for_again(browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(), served.address)
    chunk = {"id": "chatcmpl-0", "choices": [{"index": 0, "delta": {"content": "Half an "}, "finish_reason": None}]}
    half = f"data: {json.dumps(chunk)}\n\n"
    error = "data: " + json.dumps({"error": {"message": "The worker died."}}) + "\n\n"
    for ending, said in (("", "the connection was lost"), (error, "The worker died"), ("data: {\n\n", "broke off")):
        page.route("**/v1/chat/completions", _streaming(half + ending))
        say(page, ORDER)
        expect(last(page).locator(".broken")).to_contain_text(said)
        expect(last(page).locator(".text")).to_have_text("Half an")
        expect(last(page).locator(".opinion")).to_be_hidden()
        page.unroute("**/v1/chat/completions")
        page.fill("#text", "a draft")
        last(page).locator(".retry").click()
        expect(last(page).locator(".opinion")).to_be_visible()
        assert page.input_value("#text") == "a draft"
        page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)


def test_nothing_waits_for_an_answer_to_be_laid_out(browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(), served.address)
    page.route("**/chat/render", lambda route: None)  # no answer ever comes
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half an "}, "finish_reason": None}]}
    page.route("**/v1/chat/completions", _streaming(f"data: {json.dumps(chunk)}\n\n"))
    say(page, ORDER)
    expect(last(page).locator(".retry")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    last(page).locator(".retry").click()
    expect(last(page).locator(".opinion")).to_be_visible()
    answered(page)


def _streaming(body: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=200, body=body, content_type="text/event-stream")


def test_an_empty_answer_is_scored_as_one(browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(), served.address)
    chunk = {"id": "chatcmpl-0", "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
    page.route("**/v1/chat/completions", _streaming(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"))
    answered(page)
    last(page).locator(".pass").click()
    last(page).locator(".score").click()
    expect(page.locator("#why .scored")).to_contain_text("It is empty")


def test_stopping_keeps_what_came_and_asks_for_no_opinion(browser: Browser, canned: Command) -> None:
    page = entered(browser.new_context(), canned.address)
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        say(page, "Tell me slowly.")
        expect(last(page).locator(".text")).to_contain_text("word")
        with page.expect_event("requestfailed") as failed:
            stop()
        assert failed.value.url.endswith("/v1/chat/completions")
        expect(page.locator("#message")).to_have_text("Stopped.")
        expect(page.locator("#send")).to_be_visible()
        expect(last(page).locator(".opinion")).to_be_hidden()
    say(page, "Tell me slowly.")
    expect(last(page).locator(".text")).to_contain_text("word")
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    answered(page)
    expect(page.locator(".turn")).to_have_count(2)


def _saying(status: int, body: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=status, body=body)


def test_feedback_that_cant_be_stored_waits_and_is_stored_once(browser: Browser, serve: Serve, tmp_path: Path) -> None:
    project = tmp_path / "project"
    with stand_in("--project", str(project)) as first:  # another knows its answers no more
        page = entered(browser.new_context(), first.address)
        page.click("#show-settings")
        page.fill("#name", "Ana")
        page.keyboard.press("Escape")
        answered(page)
        expect(last(page).locator("td").first).to_have_text("latte")  # Markdown, which comes after the text
        answer = last(page).locator(".text").inner_text()
        page.route("**/v1/feedback", lambda route: route.fulfill(status=503, body="Full."))
        last(page).locator("[data-thumb=down]").click()
        expect(page.locator("#waiting")).to_contain_text("What you said is kept here")
        expect(last(page).locator(".stored")).to_have_text("Not stored yet.")
        for status in (200, 403):  # what a proxy says in the server's place
            page.route("**/v1/feedback", _saying(status, "<h1>Log in"))
            page.click("#deliver")
            expect(page.locator("#waiting")).to_contain_text(f"The server said {status}. What you said is kept here")
            expect(last(page).locator(".stored")).to_have_text("Not stored yet.")
        first.stop()
    page.unroute("**/v1/feedback")
    page.click("#deliver")
    expect(page.locator("#waiting")).to_contain_text("can't be reached")
    with serve("--project", str(project), "--port", str(first.port)):
        page.reload()
        expect(last(page).locator(".text")).to_have_text(answer, use_inner_text=True)  # the conversation is there still
        expect(last(page).locator(".stored")).to_have_text("Stored.")
        expect(page.locator("#waiting")).to_be_hidden()
    (label,) = labels(project, "Ana")
    assert (label.said.verdict, label.question.source) == ("down", "serve:policy")


def test_hostile_answers_are_text(browser: Browser, canned: Command) -> None:
    page = entered(browser.new_context(), canned.address)
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith(canned.address) else elsewhere.append(r.url))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.select_option("#model", "sft")
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.click("#show-settings")
    page.fill("#system", hostile)
    page.keyboard.press("Escape")
    answered(page, hostile)
    expect(last(page).locator(".text")).to_contain_text("<script>alert(1)</script>")
    page.select_option("#model", "policy")
    answered(page)
    expect(last(page).locator("td").first).to_have_text("latte")  # Markdown, once it is complete
    last(page).locator(".pass").click()
    last(page).locator(".score").click()
    expect(page.locator("#why .scored")).to_have_count(1)
    page.keyboard.press("Escape")
    refused = json.dumps({"error": {"message": hostile}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=refused))
    say(page, hostile)
    expect(page.locator("#message")).to_contain_text("<img")
    page.reload()
    page.wait_for_selector(".answered")
    assert page.locator("#turns img, #turns script, #turns a, #why img, #why script").count() == 0
    assert elsewhere == []


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_shuts_people_out(screen: str, browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(**SCREENS[screen]), served.address)
    assert serious(page) == []
    page.wait_for_selector("#model option", state="attached")
    answered(page)
    last(page).locator("[data-thumb=up]").click()
    last(page).locator(".more").click()
    assert serious_now(page) == []
    last(page).locator(".cancel").click()
    page.check("#twice")
    page.select_option("#other", "sft")
    say(page, ORDER)
    expect(page.locator(".verdicts")).to_be_visible()
    assert serious_now(page) == []
    page.locator("[data-verdict=second]").click()
    last(page).locator(".score").click()
    expect(page.locator("#why .scored")).to_have_count(1)
    assert serious_now(page) == []
    page.keyboard.press("Escape")
    page.click("#show-settings")
    assert serious_now(page) == []
    page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, ORDER)
    expect(page.locator("#message")).to_contain_text("can't be reached")
    assert serious_now(page) == []
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= SCREENS[screen]["viewport"]["width"], "nothing is wider than the screen"
    box = page.locator("#text").bounding_box()
    assert box is not None and box["y"] + box["height"] <= SCREENS[screen]["viewport"]["height"]
