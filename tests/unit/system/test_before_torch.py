"""The preloaded allocator: chosen once, never against the user's wish, forgotten by programs that are started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perlhf.commands.cli import main
from perlhf.errors import ConfigError
from perlhf.kernels import cpu
from perlhf.system import before_torch


def test_finds_nothing_where_it_must_not(tmp_path: Path) -> None:
    library = tmp_path / "libmine.so"
    assert before_torch.find({"PERLHF_ALLOCATOR": "system"}) is None
    assert before_torch.find({"LD_PRELOAD": "/x.so"}) is None
    with pytest.raises(ConfigError, match="no file"):
        before_torch.find({"PERLHF_ALLOCATOR": str(library)})
    library.touch()
    assert before_torch.find({"PERLHF_ALLOCATOR": str(library)}) == (library if sys.platform == "linux" else None)


def test_prefers_tcmalloc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "lib").mkdir()
    for name in ("libjemalloc.so.2", "libtcmalloc_minimal.so.4"):
        (tmp_path / "lib" / name).touch()
    assert before_torch.find({}) == tmp_path / "lib" / "libtcmalloc_minimal.so.4"


def test_restarts_once_with_the_library_and_forgets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libjemalloc.so.2"
    library.touch()
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, env: calls.append((words, dict(env))))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {"PERLHF_ALLOCATOR": str(library)}
    before_torch.restart(["-m", "perlhf", "demo"], environment)
    ((words, given),) = calls
    assert words == [sys.executable, "-m", "perlhf", "demo"]
    assert given["LD_PRELOAD"] == str(library) and given["MALLOC_CONF"] == before_torch.JEMALLOC_OPTIONS
    before_torch.restart(["-m", "perlhf", "demo"], given)
    assert len(calls) == 1 and not {"LD_PRELOAD", "MALLOC_CONF", before_torch.STARTED} & set(given)


def test_the_command_works_with_whatever_is_installed() -> None:
    """`score` without a run is a mistake, told by the restarted process with the same exit code."""
    done = subprocess.run([sys.executable, "-m", "perlhf", "score"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "RUN" in done.stderr
    library = before_torch.find({})
    program = "from perlhf.system import before_torch; print(before_torch.in_use())"
    bare = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    environment = bare | (before_torch.variables(library) if library else {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "system" if library is None else done.stdout.strip() in library.name


def test_only_the_command_restarts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever calls `main` with words of their own, as tests and notebooks do, keeps the process."""

    def restarted(words: list[str]) -> None:
        raise SystemExit(99)

    monkeypatch.setattr(before_torch, "restart", restarted)
    assert main(["demo", "here"]) == 2 and "perlhf demo: unexpected 'here'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["perlhf", "demo", "here"])
    with pytest.raises(SystemExit, match="99"):
        main()


def test_a_short_spin_is_set_where_the_user_set_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {"OMP_NUM_THREADS": "2"}
    before_torch.spin_shortly(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}
    assert before_torch.waiting(environment) == before_torch.SHORT_SPIN


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_whoever_sets_one_of_them_has_decided(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {name: "active"}
    before_torch.spin_shortly(environment)
    assert environment == {name: "active"} == before_torch.waiting(environment)


def test_nothing_is_set_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    environment: dict[str, str] = {}
    before_torch.spin_shortly(environment)
    assert environment == {}


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP along on Linux alone")
@pytest.mark.parametrize(
    ("program", "given", "spin"),
    [
        ("import perlhf; import torch", {}, "5000"),
        ("import perlhf; import torch", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import torch; import perlhf", {}, None),
        ("from perlhf.commands.cli import main; import torch", {}, "5000"),
    ],
)
def test_torchs_library_reads_it(program: str, given: dict[str, str], spin: str | None) -> None:
    """The library prints what it took from the environment when it is loaded."""
    bare = {name: value for name, value in os.environ.items() if name not in before_torch.SPIN_VARIABLES}
    environment = bare | given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    told = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert told and (told[-1] == spin or (spin is None and told[-1] not in ("5000", "7")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_our_kernels_run_on_torchs_threads() -> None:
    """One OpenMP library in a process that trains: a second one would have threads of its own, which spin as long."""
    if cpu.compiler()[0] is None:
        pytest.skip("no C++ compiler")
    program = (
        "import re; from perlhf.kernels import cpu; assert cpu.library() is not None; "
        "maps = open('/proc/self/maps').read(); "
        r"print(*sorted(set(re.findall(r'/\S*lib(?:gomp|iomp|omp)[^/\s]*', maps))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (library,) = done.stdout.split()
    assert "/torch" in library
