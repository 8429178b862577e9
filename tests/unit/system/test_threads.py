"""A short spin is asked for before torch is loaded, and never against the user's wish."""

import os
import subprocess
import sys

import pytest

from perlhf.kernels import cpu
from perlhf.system import threads


def test_a_short_spin_is_set_where_the_user_set_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {"OMP_NUM_THREADS": "2"}
    threads.spin_shortly(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
    assert threads.waiting(environment) == threads.SHORT


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_whoever_sets_one_of_them_has_decided(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {name: "active"}
    threads.spin_shortly(environment)
    assert environment == {name: "active"} == threads.waiting(environment)


def test_nothing_is_set_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    environment: dict[str, str] = {}
    threads.spin_shortly(environment)
    assert environment == {}


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP along on Linux alone")
@pytest.mark.parametrize(
    ("program", "given", "spin"),
    [
        ("import perlhf; import torch", {}, "2000"),
        ("import perlhf; import torch", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import torch; import perlhf", {}, None),
        ("from perlhf.commands.cli import main; import torch", {}, "2000"),
    ],
)
def test_torchs_library_reads_it(program: str, given: dict[str, str], spin: str | None) -> None:
    """The library prints what it took from the environment when it is loaded."""
    bare = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    environment = bare | given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    told = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert told and (told[-1] == spin or (spin is None and told[-1] not in ("2000", "7")))


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
