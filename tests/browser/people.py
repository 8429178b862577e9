"""Somebody at a page of ours, and what shuts people out there."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]
_QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
expect.set_options(timeout=30_000)  # of a machine that has other things to do
AXE = REPOSITORY / "build" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
SCREENS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1280, "height": 800}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A real one: `PERLHF_CHROMIUM`, else the system's."""
    found = os.environ.get("PERLHF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "no Chromium: `make test-browser` installs Debian's"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=[*_QUIET, "--disable-component-update"])
        yield started
        started.close()


@dataclass
class Command:
    """`perlhf label`, a loop with its page, or a server, in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def opened(*words: str) -> AbstractContextManager[Command]:
    """A command of perlhf, once it has said at which address its page is."""
    return started([sys.executable, "-m", "perlhf", *words])


@contextmanager
def started(words: Sequence[str]) -> Iterator[Command]:
    """The same of any command."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"http://\S+", line):
                yield Command(process, found.group())
                break
        else:
            raise AssertionError(f"ended with {process.wait()}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def new_page(context: BrowserContext) -> Page:
    """A page whose requests a test may catch from here on. A page that was loaded before its first route may send some
    more past it, so there is one beforehand, for an address that no page asks for."""
    context.route("**/asked-by-no-page", lambda route: route.abort())
    page = context.new_page()
    page.set_default_timeout(30_000)
    return page


def enter(context: BrowserContext, address: str, name: str) -> Page:
    page = new_page(context)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("article, .done")
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
