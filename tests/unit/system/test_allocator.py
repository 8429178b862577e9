"""The preloaded allocator: chosen once, never against the user's wish, forgotten by programs that are started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perlhf.commands.cli import main
from perlhf.errors import ConfigError
from perlhf.system import allocator


def test_finds_nothing_where_it_must_not(tmp_path: Path) -> None:
    library = tmp_path / "libmine.so"
    assert allocator.find({"PERLHF_ALLOCATOR": "system"}) is None
    assert allocator.find({"LD_PRELOAD": "/x.so"}) is None
    with pytest.raises(ConfigError, match="no file"):
        allocator.find({"PERLHF_ALLOCATOR": str(library)})
    library.touch()
    assert allocator.find({"PERLHF_ALLOCATOR": str(library)}) == (library if sys.platform == "linux" else None)


def test_prefers_tcmalloc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "lib").mkdir()
    for name in ("libjemalloc.so.2", "libtcmalloc_minimal.so.4"):
        (tmp_path / "lib" / name).touch()
    assert allocator.find({}) == tmp_path / "lib" / "libtcmalloc_minimal.so.4"


def test_restarts_once_with_the_library_and_forgets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libjemalloc.so.2"
    library.touch()
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, env: calls.append((words, dict(env))))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {"PERLHF_ALLOCATOR": str(library)}
    allocator.restart(["-m", "perlhf", "demo"], environment)
    ((words, given),) = calls
    assert words == [sys.executable, "-m", "perlhf", "demo"]
    assert given["LD_PRELOAD"] == str(library) and given["MALLOC_CONF"] == allocator.JEMALLOC_OPTIONS
    allocator.restart(["-m", "perlhf", "demo"], given)
    assert len(calls) == 1 and not {"LD_PRELOAD", "MALLOC_CONF", allocator.STARTED} & set(given)


def test_the_command_works_with_whatever_is_installed() -> None:
    """`score` without a run is a mistake, told by the restarted process with the same exit code."""
    done = subprocess.run([sys.executable, "-m", "perlhf", "score"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "RUN" in done.stderr
    library = allocator.find({})
    program = "from perlhf.system import allocator; print(allocator.in_use())"
    bare = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    environment = bare | (allocator.variables(library) if library else {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "system" if library is None else done.stdout.strip() in library.name


def test_only_the_command_restarts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever calls `main` with words of their own, as tests and notebooks do, keeps the process."""

    def restarted(words: list[str]) -> None:
        raise SystemExit(99)

    monkeypatch.setattr(allocator, "restart", restarted)
    assert main(["demo", "here"]) == 2 and "perlhf demo: unexpected 'here'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["perlhf", "demo", "here"])
    with pytest.raises(SystemExit, match="99"):
        main()
