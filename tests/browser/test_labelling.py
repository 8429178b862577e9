"""People at the labelling page: by keyboard, on a phone, in the dark, two at once, while the server dies."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from perlhf.data.read import read_all
from perlhf.labelling.store import Store

AXE = Path(__file__).resolve().parents[2] / "build" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
KEYS = ["ArrowLeft", "ArrowRight", "=", "x", "1", "2", "3", "4", "s"]
SCREENS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1280, "height": 800}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


def enter(context: BrowserContext, address: str, name: str) -> Page:
    page = context.new_page()
    page.set_default_timeout(30_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    page.wait_for_load_state("load")  # keys are heard from here on
    assert problems == []
    return page


def press(page: Page, key: str) -> str:
    """Presses a key and waits for the next question; gives the old one's number."""
    task = page.get_attribute("article", "data-task")
    page.keyboard.press(key)
    page.wait_for_selector(f"article:not([data-task='{task}']), .done")
    return str(task)


def serious(page: Page) -> list[str]:
    """What axe finds that is serious or critical."""
    page.add_init_script(path=str(AXE))
    page.reload()
    found = page.evaluate("() => axe.run()")
    return [
        f"{fault['id']}: {node['html'][:120]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


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
