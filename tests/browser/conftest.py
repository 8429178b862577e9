"""A real Chromium (`PERLHF_CHROMIUM`, else the system's) against the real command."""

from collections.abc import Callable, Iterator

import pytest
from people import chromium, opened
from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def command() -> Callable[..., object]:
    return opened


@pytest.fixture
def label() -> Callable[..., object]:
    return lambda project, *options: opened("label", str(project), "--port", "0", *options)
