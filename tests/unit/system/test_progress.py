import os
import re
import sys
import threading

import pytest

from perlhf.system import progress
from perlhf.system.progress import Progress, clock


def gigabyte() -> int:
    return 1_000_000_000


def test_plain_lines_come_at_most_every_so_often_and_the_last_state_always(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(50, 40, "reward", gigabyte)
    with bar.shown():
        bar.advance({"loss": 0.693147, "auc": 0.5, "note": "text", "grad_norm": 3.0, "tokens_per_second": 12345.6})
        for _ in range(5):
            bar.advance({"loss": 0.25})
        now[0] += progress.PLAIN_SECONDS
        bar.advance()
        bar.advance({"auc": 0.75})
    lines = capsys.readouterr().err.splitlines()
    starts = [line.rsplit(" · ETA", 1)[0] for line in lines]
    assert starts == [
        "reward 41/50 · loss 0.6931 · AUC 0.5 · tokens/s 12,346 · memory 1.00 GB",
        "reward 47/50 · loss 0.25 · AUC 0.5 · tokens/s 12,346 · memory 1.00 GB",
        "reward 48/50 · loss 0.25 · AUC 0.75 · tokens/s 12,346 · memory 1.00 GB",
    ]


def test_eta_is_the_pace_of_this_session_times_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(110, 100, "policy", gigabyte)
    assert bar.eta_seconds() is None
    now[0] = 3.0
    bar.advance()
    bar.advance()
    # Two updates took 3 s; the eight left take four times as long.
    assert bar.eta_seconds() == 12.0


def test_nothing_done_still_shows_where_it_stands(capsys):
    bar = Progress(5, 5, "sft", gigabyte)
    with bar.shown():
        pass
    assert capsys.readouterr().err == "sft 5/5 · memory 1.00 GB · ETA -:--:--\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--:--"), (0.4, "0:00:00"), (61, "0:01:01"), (36000, "10:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_real_terminal_gets_a_bar(monkeypatch):
    leader, follower = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(leader, 65536):
                chunks.append(chunk)
        except OSError:  # the terminal's other end was closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = Progress(3, 1, "policy", gigabyte)
        with bar.shown():
            bar.advance({"reward_mean": 0.5, "kl": 0.125, "end_rate": 1.0})
    reader.join(timeout=120)
    os.close(leader)
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(chunks).decode())
    assert "policy" in seen and "2/3" in seen and "━" in seen and "ETA 0:00:0" in seen
    assert "reward 0.5 · KL 0.125 · ends 1 · memory 1.00 GB" in seen


class TestCounted:
    def test_what_is_over_soon_is_silent(self, capsys):
        assert list(progress.counted(range(1000), "reading", 1000)) == list(range(1000))
        assert capsys.readouterr().err == ""

    def test_what_takes_long_says_where_it_is(self, capsys, monkeypatch):
        monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
        assert list(progress.counted(range(200), "reading", 190)) == list(range(200))
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("reading 64/190 · memory") and " · ETA 0:00:0" in first
        assert last.startswith("reading 200/200 · ")
        assert list(progress.counted(iter(range(64)), "reading")) == list(range(64))
        assert "reading 64 · memory" in (err := capsys.readouterr().err) and "ETA -:--:--" in err

    def test_an_error_ends_it(self, capsys, monkeypatch):
        monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)

        def failing():
            yield from range(100)
            raise ValueError

        with pytest.raises(ValueError):
            list(progress.counted(failing(), "reading"))
        assert capsys.readouterr().err.startswith("reading 64")
