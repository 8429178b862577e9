"""Fixtures of the tests that run whole commands, and the option by which golden files are written anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
from services import serve
from toy import Done, command, write_feedback

from perlhf.commands.cli import main

__all__ = ["serve"]

Perlhf = Callable[..., Done]
Stage = Callable[..., tuple[Path, Done]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Only scripts/update_golden.py gives this option."""
    parser.addoption("--update-golden", metavar="REASON", help="write tests/golden anew, for this reason")


@pytest.fixture(scope="session")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ratings, comparisons, demonstrations and prompts, and the module toy_reward; not to be changed."""
    return write_feedback(tmp_path_factory.mktemp("feedback"))


@pytest.fixture(scope="session")
def sft_run(tiny_base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SFT run of rank 4 on all layers."""
    run = tmp_path_factory.mktemp("runs") / "sft"
    assert main(command("sft", tiny_base, feedback / "demonstrations.jsonl", run)) == 0
    return run


@pytest.fixture(scope="session")
def reward_run(tiny_base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reward run that tells polite answers from rude ones."""
    run = tmp_path_factory.mktemp("runs") / "reward"
    assert (
        main(command("reward", tiny_base, feedback / "ratings.jsonl", run, "--max-updates", "12", "--epochs", "3")) == 0
    )
    return run


@pytest.fixture(scope="session")
def other_reward_run(tiny_base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward run with another seed, rank and data."""
    run = tmp_path_factory.mktemp("runs") / "other"
    options = ("--max-updates", "6", "--epochs", "3", "--seed", "5", "--adapter.rank", "2")
    assert main(command("reward", tiny_base, feedback / "comparisons.jsonl", run, *options)) == 0
    return run


@pytest.fixture
def perlhf(capsys: pytest.CaptureFixture[str], feedback: Path, monkeypatch: pytest.MonkeyPatch) -> Perlhf:
    """Runs a command in this process; the module toy_reward can be imported."""
    monkeypatch.syspath_prepend(str(feedback))

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        shown = capsys.readouterr()
        return Done(code, shown.out, shown.err)

    return run


@pytest.fixture
def stage(perlhf: Perlhf, tiny_base: Path, feedback: Path, tmp_path: Path) -> Stage:
    """`stage("sft", "--epochs", "2", data="ratings.jsonl", run="name", base=...)`: the run directory and what was
    shown.
    """
    usual = {
        "sft": "demonstrations.jsonl",
        "reward": "ratings.jsonl",
        "policy": "prompts.jsonl",
    }

    def run(
        name: str, *options: str, data: str | None = None, run: str | None = None, base: Path | None = None
    ) -> tuple[Path, Done]:
        place = tmp_path / (run or name)
        done = perlhf(*command(name, base or tiny_base, feedback / (data or usual[name]), place, *options))
        return place, done

    return run
