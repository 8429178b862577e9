"""What an output can't show is replaced; it never ends a command."""

import os
import subprocess
import sys

import pytest

PRINTS = """
import sys
from rich.console import Console
from rich.table import Table
from perlhf.system.console import show_anything

show_anything()
print("a · b ☕ café \\udcff")
table = Table("größe", title="→ 5 ×")
table.add_row("☕")
Console().print(table)
print("loss 3 · ETA", file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_an_output_lacks(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, error = done.stdout.decode(encoding).splitlines()[0], done.stderr.decode(encoding)
    assert first == {"ascii": "a - b ? cafe ?", "utf-8": "a · b ☕ café ?"}.get(encoding, "a · b ? café ?")
    assert error.strip() == ("loss 3 - ETA" if encoding == "ascii" else "loss 3 · ETA")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_output(closed: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}>&-', sys.executable, PRINTS]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_a_command_that_prints_a_unicode_figure() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}
    for arguments, code in ((["data", "formats"], 0), (["data", "inspect", "größe ☕"], 2)):
        command = [sys.executable, "-m", "perlhf", *arguments]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
        assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr
