"""People at the chat page: by keyboard, on a phone, in the dark, while the server is busy, breaks off or dies."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from people import REPOSITORY, SCREENS, Command, serious, serious_now, started
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from perlhf.labelling.store import Label, Store

Serve = Callable[..., AbstractContextManager[Command]]
ORDER = "A large latte to go, please."


@pytest.fixture
def serve() -> Serve:
    """A server with the models `policy`, `sft` and the reward model `taste`; options are those of `perlhf serve`."""
    return lambda *words: started([sys.executable, str(REPOSITORY / "tests/browser/canned.py"), *words])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tmp_path / "project"


@pytest.fixture
def served(serve: Serve, project: Path) -> Iterator[Command]:
    with serve("--project", str(project)) as running:
        yield running


def entered(context: BrowserContext, address: str) -> Page:
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(address)
    page.wait_for_selector("#model option", state="attached")
    return page


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def last(page: Page) -> Any:
    return page.locator(".answered").last


def labels(project: Path) -> list[Label]:
    store = Store(project / "labels.sqlite")
    found = store.labels()
    store.close()
    return found


def answered(page: Page, text: str = ORDER) -> None:
    before = page.locator(".answered").count()
    say(page, text)
    expect(page.locator(".answered .opinion:visible")).to_have_count(before + 1)


def test_a_conversation_by_keyboard_alone(browser: Browser, served: Command, project: Path) -> None:
    page = entered(browser.new_context(), served.address)

    def reach(name: str, role: str = "button") -> None:
        """Tab leads there."""
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("() => (document.activeElement.textContent || '').trim()")
            if focused == name:
                return
        raise AssertionError(f"Tab doesn't lead to {name}")

    page.focus("#text")
    page.keyboard.type("A large latte\nto go, please.".split("\n")[0])
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("to go, please.")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_have_text("The answer is complete.")
    expect(page.locator(".turn.own .text")).to_have_text("A large latte\nto go, please.")
    expect(last(page).locator("td").first).to_have_text("latte")  # Markdown, once it is complete
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
    served.stop()
    (label,) = labels(project)
    said = label.said
    assert (said.verdict, said.reason, said.edit) == ("up", "It is polite.", "A large latte, of course.")
    assert label.question.source.startswith("serve:policy@") and label.question.drawn == "served"


def test_two_answers_are_blind_until_the_choice(browser: Browser, served: Command, project: Path) -> None:
    page = entered(browser.new_context(), served.address)
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
    served.stop()
    found = labels(project)
    for left, label, verdict in zip(lefts, found, verdicts.values(), strict=True):
        first, second = label.question.source.removeprefix("serve:").split(",")
        better = {"first": left, "second": "sft" if left == "policy" else "policy"}.get(verdict)
        chosen = {"first": first, "second": second}.get(label.said.verdict)
        assert chosen is None if better is None else chosen is not None and chosen.startswith(better)
        assert label.said.verdict in (verdict, {"first": "second", "second": "first"}.get(verdict))


def test_no_score_before_an_opinion(browser: Browser, served: Command, project: Path) -> None:
    page = entered(browser.new_context(), served.address)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answered(page)
    last(page).locator(".score").press("Enter")
    expect(page.locator("#message")).to_contain_text("Say first what you think")
    expect(page.locator("#why")).to_be_hidden()
    assert not any(url.endswith("/v1/score") for url in asked)
    last(page).locator(".pass").click()
    last(page).locator(".score").click()
    expect(page.locator("#why .sentence")).not_to_have_count(0)
    assert labels(project) == []


def test_without_a_project_nothing_is_asked_and_scores_are_shown(browser: Browser, serve: Serve) -> None:
    with serve() as running:
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


def _streaming(body: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=200, body=body, content_type="text/event-stream")


def test_stopping_keeps_what_came_and_asks_for_no_opinion(browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(), served.address)
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


def test_feedback_that_cant_be_stored_waits_and_is_stored_once(browser: Browser, serve: Serve, project: Path) -> None:
    with serve("--project", str(project)) as first:
        page = entered(browser.new_context(), first.address)
        page.click("#show-settings")
        page.fill("#name", "Ana")
        page.keyboard.press("Escape")
        answered(page)
        page.route("**/v1/feedback", lambda route: route.fulfill(status=503, body="Full."))
        last(page).locator("[data-thumb=down]").click()
        expect(page.locator("#waiting")).to_contain_text("What you said is kept here")
        expect(last(page).locator(".stored")).to_have_text("Not stored yet.")
        assert first.stop() is not None
    page.unroute("**/v1/feedback")
    page.click("#deliver")
    expect(page.locator("#waiting")).to_contain_text("can't be reached")
    with serve("--project", str(project), "--port", str(first.port)):
        page.reload()
        expect(last(page).locator(".text")).to_contain_text("Anything else?")  # the conversation is there still
        expect(page.locator("#waiting")).to_be_hidden()
        expect(last(page).locator(".stored")).to_have_text("Stored.")
    (label,) = labels(project)
    assert (label.said.verdict, label.labeller.name, label.question.source) == ("down", "Ana", "serve:policy")


def test_hostile_answers_are_text(browser: Browser, served: Command) -> None:
    page = entered(browser.new_context(), served.address)
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith(served.address) else elsewhere.append(r.url))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.select_option("#model", "sft")
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.click("#show-settings")
    page.fill("#system", hostile)
    page.keyboard.press("Escape")
    answered(page, hostile)
    expect(last(page).locator(".text")).to_contain_text("<script>alert(1)</script>")
    last(page).locator(".pass").click()
    last(page).locator(".score").click()
    expect(page.locator("#why .scored")).to_have_count(1)
    page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=hostile))
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
