"""A real Chromium (`PERLHF_CHROMIUM`, else the system's) against the real command."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]
_QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = os.environ.get("PERLHF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "no Chromium: `make test-browser` installs Debian's"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=[*_QUIET, "--disable-component-update"])
        yield started
        started.close()


@dataclass
class Command:
    """`perlhf label`, or a loop with its page, in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def opened(*words: str) -> Iterator[Command]:
    """A command of perlhf, once it has said at which address its page is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "perlhf", *words], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
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


@pytest.fixture(scope="session")
def command() -> Callable[..., object]:
    return opened


@pytest.fixture
def label() -> Callable[..., object]:
    return lambda project, *options: opened("label", str(project), "--port", "0", *options)
