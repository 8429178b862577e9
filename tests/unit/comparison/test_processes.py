"""The processes of a comparison: what they run, and that they end with whoever started them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perlhf.comparison.processes import processes
from perlhf.system.waiting import PARENT

TRAP = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch(); raise SystemExit(9)"


def test_a_cell_runs_no_file_of_the_working_directory(tmp_path, monkeypatch):
    for name in ("yaml", "json", "perlhf", "pydantic"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    with processes(1) as running:
        assert running.perlhf(["--version"], tmp_path / "log") == (0, "")
    assert (tmp_path / "log").read_text().startswith("perlhf ") and not list(tmp_path.glob("*.ran"))


KILLED = """
import os, signal, sys
from pathlib import Path
from perlhf.comparison import processes

with processes.processes(1) as running:
    running.submit(running.perlhf, ["sft", sys.argv[1]], Path(sys.argv[2]))
    with open(sys.argv[1], "w"):  # returns once the cell reads its recipe
        (cell,) = running._running
        print(cell.pid, flush=True)
        sys.stdin.read()
"""


def test_a_killed_comparison_ends_its_cells(tmp_path):
    """The cell reads its recipe from a pipe that nobody writes: without SIGTERM it would wait for ever."""
    pipe = tmp_path / "a.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", KILLED, str(pipe), str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        cell = int(process.stdout.readline())
        held = os.open(pipe, os.O_RDWR)  # the cell sees no end of the file when the comparison's own end is closed
        process.kill()
    _wait_until_gone(cell)
    os.close(held)


def _wait_until_gone(process: int) -> None:
    """Returns when the process has ended; the test's own limit is that of a command that hangs."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(3000):
        try:
            if status.read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        signal.sigtimedwait([], 0.1)
    os.kill(process, signal.SIGKILL)
    pytest.fail("the cell went on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_processes_and_what_was_there_comes_back(number):
    # Also where these tests run under nohup.
    outside = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), processes(1):
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outside)


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes(1):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert PARENT not in os.environ
