"""Somebody at a page of ours, and what shuts people out there."""

from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Page

AXE = Path(__file__).resolve().parents[2] / "build" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
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
    """What axe finds that is serious or critical, once the page is loaded anew."""
    page.add_init_script(path=str(AXE))
    page.reload()
    return serious_now(page)


def serious_now(page: Page) -> list[str]:
    """The same of the page as it is, to which `serious` has given axe before."""
    found = page.evaluate("() => axe.run()")
    return [
        f"{fault['id']}: {node['html'][:120]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
