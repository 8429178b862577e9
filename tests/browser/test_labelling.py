"""People at the labelling page: by keyboard, on a phone, in the dark, two at once, while the server dies."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from people import SCREENS, enter, press, serious, serious_now
from playwright.sync_api import Browser, Route, expect
from toy import command, finish, prompts, ratings, write_rows

from perlhf.data.read import read_all
from perlhf.labelling.database.store import Store
from perlhf.labelling.project import made

KEYS = ["ArrowLeft", "ArrowRight", "=", "x", "1", "2", "3", "4", "s"]


def test_twenty_questions_by_keyboard_with_undo_and_a_reload(browser: Browser, label: Any, tmp_path: Path) -> None:
    with label(tmp_path / "project") as command:
        page = enter(browser.new_context(), command.address, "Ana")
        for number in range(20):
            press(page, KEYS[number % len(KEYS)])
            if number == 10:
                last = page.get_attribute("article", "data-task")
                page.reload()  # the question that was open is open still
                assert page.get_attribute("article", "data-task") == last
        expect(page.locator("#count")).to_have_text("18 of 800")
        press(page, "u")
        expect(page.locator("#message")).to_have_text("Your last answer was taken back.")
        expect(page.locator("#count")).to_have_text("17 of 800")
        press(page, "ArrowRight")
        assert command.stop() == 0
    said = Store(tmp_path / "project" / "labels.sqlite").labels(skips=True)
    assert len(said) == 20
    assert said[0].said.verdict == ("second" if said[0].turned else "first")  # the left one
    assert [one.said.verdict for one in said[2:4]] == ["equal", "both_bad"]
    assert said[8].said.verdict == "skip"


def test_a_reason_a_marked_part_and_a_better_answer(browser: Browser, label: Any, tmp_path: Path) -> None:
    with label(tmp_path / "project") as command:
        page = enter(browser.new_context(), command.address, "Ana")
        page.locator(".answer .text p").first.dblclick()
        page.keyboard.press("e")
        page.keyboard.type("because i say so, u see = x")  # keys are letters while one types
        page.click("text=Start from left")
        page.locator("#edit").press("End")
        page.locator("#edit").type(" And more.")
        page.keyboard.press("Escape")
        press(page, "ArrowLeft")
        page.keyboard.press("i")
        expect(page.locator("#instructions")).to_be_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("d")
        expect(page.locator("#differences")).to_have_attribute("aria-pressed", "true")
        command.stop()
    (one,) = Store(tmp_path / "project" / "labels.sqlite").labels()
    left = one.question.answers[1 if one.turned else 0]
    assert isinstance(left, str)
    assert one.said.reason == "because i say so, u see = x"
    assert one.said.span and one.said.span in left.replace("\n", " ")
    assert one.said.edit == left + " And more."


def test_two_people_at_once_get_different_questions(browser: Browser, label: Any, tmp_path: Path) -> None:
    with label(tmp_path / "project") as command:
        pages = [enter(browser.new_context(), command.address, name) for name in ("Ana", "Bo")]
        for _ in range(5):
            for page in pages:
                press(page, "ArrowLeft")
        command.stop()
    keys = [one.question.key for one in Store(tmp_path / "project" / "labels.sqlite").labels()]
    assert len(keys) == len(set(keys)) == 10


def test_answers_that_a_run_gives_while_the_page_is_open_are_asked_about(
    browser: Browser, label: Any, tmp_path: Path, tiny_base: Path
) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", prompts(5))
    made(tmp_path / "project")
    words = [sys.executable, "-m", "perlhf", "label", "answers", str(tmp_path / "answers.jsonl")]
    words += ["--project", str(tmp_path / "project"), "--base", str(tiny_base), "--dtype", "float32"]
    words += ["--data.paths", str(data), "--split", "all", "--max-completion-tokens", "6"]
    with label(tmp_path / "project") as running:
        page = enter(browser.new_context(), running.address, "Ana")
        expect(page.locator(".done")).to_be_visible()
        page.keyboard.press("i")  # what is open stays open
        expect(page.locator("#instructions")).to_be_visible()
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        page.keyboard.press("Escape")
        page.wait_for_selector("article")
        press(page, "ArrowLeft")
        running.stop()
    assert len(Store(tmp_path / "project" / "labels.sqlite").labels()) == 1


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_serious_for_a_screen_reader_and_nothing_wider_than_the_screen(
    browser: Browser, label: Any, tmp_path: Path, screen: str
) -> None:
    rows = [
        {
            "prompt": "# A\n\n`code`\n\n```\n" + "x" * 300 + "\n```",
            "completions": ["y" * 300, "| a | b |\n|-|-|\n| c | d |"],
        }
    ]
    rows += [{"prompt": f"question {i}", "completions": ["*left*", "1. right\n2. left"]} for i in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with label(tmp_path / "project", "--settings.questions.paths", str(file)) as command:
        context = browser.new_context(bypass_csp=True, **SCREENS[screen])
        empty = context.new_page()
        empty.goto(command.address)
        assert serious(empty) == []
        page = enter(context, command.address, "Ana")
        for _ in range(4):
            assert serious(page) == []
            width = page.evaluate("() => document.documentElement.scrollWidth")
            assert width <= SCREENS[screen]["viewport"]["width"]
            press(page, "ArrowLeft")
        expect(page.locator(".done")).to_be_visible()
        assert serious(page) == []
        page.goto(command.address + "owner")
        assert serious(page) == []
        command.stop()


@pytest.mark.parametrize("kind", ["rating", "scale"])
def test_thumbs_and_grades_by_keyboard(browser: Browser, label: Any, tmp_path: Path, kind: str) -> None:
    options = ["--settings.kind", kind, "--settings.questions.paths", "builtin:coffee-bar/rating"]
    options += ["--settings.criteria", "helpful", "polite"] if kind == "scale" else []
    with label(tmp_path / "project", *options) as command:
        page = enter(browser.new_context(bypass_csp=True), command.address, "Ana")
        assert serious(page) == []
        if kind == "scale":
            page.keyboard.press("4")
            page.keyboard.press("Enter")
            expect(page.locator("#message")).to_have_text("1 grade is missing.")
            page.keyboard.press("2")
            press(page, "Enter")
        else:
            press(page, "+")
            press(page, "-")
        command.stop()
    said = Store(tmp_path / "project" / "labels.sqlite").labels()
    if kind == "scale":
        assert [one.said.grades for one in said] == [{"helpful": 4, "polite": 2}]
    else:
        assert [one.said.verdict for one in said] == ["up", "down"]


def test_an_answer_outlives_a_server_that_is_killed(browser: Browser, label: Any, tmp_path: Path) -> None:
    project = tmp_path / "project"
    with label(project) as command:
        port = command.port
        page = enter(browser.new_context(), command.address, "Ana")
        press(page, "ArrowLeft")
        command.stop(signal.SIGKILL)
        page.keyboard.press("ArrowRight")
        expect(page.locator("#message")).to_contain_text("Your answer is kept here and sent again")
        with label(project, "--port", str(port)):
            expect(page.locator("#count")).to_have_text("2 of 800", timeout=60_000)
    said = Store(project / "labels.sqlite").labels()
    assert len(said) == 2


def test_an_answer_outlives_what_a_proxy_says_instead_of_the_server(
    browser: Browser, label: Any, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    ways = ((502, "text/html"), (503, "application/json"), (500, "text/plain"), (200, "text/html"))
    with label(project) as command:
        page = enter(browser.new_context(), command.address, "Ana")
        for number, (status, kind) in enumerate(ways, start=1):
            page.route("**/answer", _saying(status, kind))
            page.keyboard.press("ArrowRight")
            expect(page.locator("#message")).to_contain_text("It is kept here and sent again")
            expect(page.locator("article")).to_be_visible()
            page.unroute("**/answer")
            expect(page.locator("#count")).to_have_text(f"{number} of 800")
    assert len(Store(project / "labels.sqlite").labels()) == len(ways)


def _saying(status: int, kind: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=status, content_type=kind, body="{}")


def test_an_answer_that_waits_cant_be_taken_back_nor_the_one_before_it(
    browser: Browser, label: Any, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    with label(project) as command:
        page = enter(browser.new_context(), command.address, "Ana")
        press(page, "ArrowLeft")
        page.route("**/answer", lambda route: route.fulfill(status=429, content_type="text/plain", body="Wait."))
        page.keyboard.press("ArrowRight")
        expect(page.locator("#message")).to_contain_text("It is kept here and sent again")
        page.keyboard.press("u")
        expect(page.locator("#message")).to_have_text("Your last answer isn’t stored yet.")
        page.unroute("**/answer")
        expect(page.locator("#count")).to_have_text("2 of 800")
    assert len(Store(project / "labels.sqlite").labels()) == 2


def test_an_answer_that_waits_goes_to_no_other_project_and_no_other_person(
    browser: Browser, label: Any, tmp_path: Path
) -> None:
    context = browser.new_context()
    with label(tmp_path / "one") as command:
        port = command.port
        page = enter(context, command.address, "Ana")
        command.stop(signal.SIGKILL)
        page.keyboard.press("ArrowRight")
        expect(page.locator("#message")).to_contain_text("Your answer is kept here and sent again")
        page.close()
    with label(tmp_path / "two", "--port", str(port)) as command:
        page = enter(context, command.address, "Ana")
        press(page, "ArrowLeft")
        expect(page.locator("#count")).to_have_text("1 of 800")
        page.close()
    with label(tmp_path / "one", "--port", str(port)) as command:
        context.clear_cookies()
        page = enter(context, command.address, "Bo")
        press(page, "ArrowLeft")
        page.click("text=Bo, leave")
        page.fill("#name", "Ana")
        page.keyboard.press("Enter")
        expect(page.locator("#count")).to_have_text("2 of 800")
    for project, people in (("one", {"Ana", "Bo"}), ("two", {"Ana"})):
        said = Store(tmp_path / project / "labels.sqlite").labels()
        assert {one.labeller.name for one in said} == people and len(said) == len(people)


def test_exports_what_was_said(browser: Browser, label: Any, tmp_path: Path) -> None:
    from perlhf.commands.cli import main

    with label(tmp_path / "project") as command:
        page = enter(browser.new_context(), command.address, "Ana")
        for _ in range(3):
            press(page, "ArrowLeft")
        # Also while the page is in use.
        assert main(["label", "export", str(tmp_path / "project"), str(tmp_path / "out")]) == 0
        assert main(["data", "validate", str(tmp_path / "out" / "records.jsonl")]) == 0
        command.stop()
    assert len(read_all(str(tmp_path / "out" / "records.jsonl")).records) == 3


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> str:
    """A tiny reward run."""
    directory = tmp_path_factory.mktemp("reward")
    data = write_rows(directory / "ratings.jsonl", ratings())
    words = command("reward", tiny_base, data, directory / "run", "--encoding.max-tokens", "512")
    assert finish(words, directory / "log", directory) == 0
    return str(directory / "run")


def test_what_moved_the_score_is_shown_after_the_answer(
    browser: Browser, label: Any, tmp_path: Path, reward: str
) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>. " + "y" * 200
    rows = [{"prompt": f"tea {i}", "completions": [f"Yes. {hostile}", "A cup. Sugar?\nNo milk."]} for i in range(9)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    options = ("--settings.questions.paths", str(file), "--settings.explain", reward)
    with label(tmp_path / "project", *options) as running:
        for number, (screen, settings) in enumerate(SCREENS.items()):
            page = enter(browser.new_context(bypass_csp=True, **settings), running.address, screen)
            assert serious(page) == []
            page.keyboard.press("w")
            expect(page.locator("#why-message")).to_contain_text("answer a question first")
            page.keyboard.press("ArrowLeft")  # no answer while it is open
            page.keyboard.press("Escape")
            expect(page.locator("#count")).to_have_text(f"{2 * number} of 9")
            press(page, "ArrowLeft")
            if screen == "phone":
                page.tap("#show-why")
            else:
                page.keyboard.press("w")
            expect(page.locator("#why .scored")).to_have_count(2)
            expect(page.locator("#why .sentence")).to_have_count(6)
            expect(page.locator("#why-shown")).to_contain_text("<script>alert(1)</script><img src=x onerror=alert(2)>.")
            expect(page.locator("#why-message")).to_be_empty()
            assert page.locator("#why img, #why script").count() == 0
            assert serious_now(page) == []
            assert page.locator("#why").evaluate("e => e.scrollWidth <= e.clientWidth")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= settings["viewport"]["width"]
            page.keyboard.press("Escape")
            expect(page.locator("#why")).to_be_hidden()
            page.keyboard.press("u")
            expect(page.locator("#message")).to_contain_text("so that it stays")
            press(page, "ArrowRight")
        running.stop()
    assert len(Store(tmp_path / "project" / "labels.sqlite").labels()) == 6
