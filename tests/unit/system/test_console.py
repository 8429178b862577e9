"""What an output can't show is replaced; it never ends a command."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import perlhf
from perlhf.system.console import OUTPUT, json_line, note, restart_in_utf8, warn

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


ASCII_NAMES = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "60"}


def test_names_with_umlauts_under_the_locale_c(tmp_path: Path) -> None:
    """As the directory, on the command line, and in files; Python itself would open none of them."""
    directory = tmp_path / "größe maß"
    directory.mkdir()
    (directory / "tee ä.jsonl").write_text('{"prompt": "Tee?", "completion": "für dich"}\n', "utf-8")
    (directory / "rezept ö.yaml").write_text("data: {paths: [kaffee ü.jsonl]}\n", "utf-8")

    def run(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
        environment = {**os.environ, **ASCII_NAMES, "PYTHONPATH": str(Path(perlhf.__file__).parents[1])}
        command = [sys.executable, "-m", "perlhf", *arguments]
        return subprocess.run(command, cwd=directory, capture_output=True, env=environment, timeout=60, check=False)

    done = run("data", "convert", "tee ä.jsonl", "kaffee ü.jsonl")
    assert done.returncode == 0 and done.stdout.decode("ascii") == "kaffee u.jsonl: 1 records\n", done.stderr
    assert "für dich" in (directory / "kaffee ü.jsonl").read_text("utf-8")
    refused = run("data", "split", "rezept ö.yaml", "--output", "teile ß")
    assert refused.returncode == 2 and b"kaffee u.jsonl: the validation side is empty" in refused.stderr, refused.stderr
    refused = run("data", "validate", "kein\udcff.jsonl")
    assert refused.returncode == 2 and b"is not UTF-8" in refused.stderr


def test_a_restart_keeps_what_is_printed_and_happens_where_names_are_ascii_alone(monkeypatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, arguments, environment: started.append((arguments, environment)))
    restart_in_utf8(["-m", "perlhf"], {})
    assert not started, "names are UTF-8 here"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    restart_in_utf8(["-m", "perlhf"], {"A": "1"})
    environment = {"A": "1", OUTPUT: sys.stdout.encoding}
    assert started == [([sys.executable, "-X", "utf8", "-m", "perlhf"], environment)]


@pytest.mark.parametrize(("say", "word"), [(note, "note"), (warn, "warning")])
def test_a_note_holds_nothing_that_a_terminal_obeys(say: Callable[[str], None], word: str, capsys) -> None:
    say("\x1b[2J of a\x9bfile\nand\tmore ☕ \u202e")
    assert capsys.readouterr().err == f"{word}: \\x1b[2J of a\\x9bfile\nand\tmore ☕ \\u202e\n"


def test_json_for_an_output_loses_no_letter_and_holds_nothing_that_a_terminal_obeys(monkeypatch) -> None:
    value, escaped = {"prompt": "größe"}, '{"prompt": "gr\\u00f6\\u00dfe"}'
    assert json_line(value) == '{"prompt": "größe"}'
    assert json_line({"prompt": "\x9b2J é"}) == '{"prompt": "\\u009b2J \\u00e9"}'
    assert json_line({"score": float("nan")}) == '{"score": null}'
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert json_line(value) == escaped
