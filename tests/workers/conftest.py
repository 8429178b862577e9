"""Fixtures of the tests that start several workers: `make test-workers`."""

from pathlib import Path

import pytest
from toy import write_feedback


@pytest.fixture(scope="session")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ratings, comparisons, demonstrations and prompts, and the module toy_reward; not to be changed."""
    return write_feedback(tmp_path_factory.mktemp("feedback"))
