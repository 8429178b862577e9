"""Live progress of a stage on standard error: a bar with ETA on a terminal, else a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 15.0
"""Least time between two plain lines."""
LABELS = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "accuracy": "accuracy",
    "auc": "AUC",
    "pairwise_accuracy": "pairwise",
    "validation_auc": "validation AUC",
    "score_mean": "score",
    "reward_mean": "reward",
    "kl": "KL",
    "entropy": "entropy",
    "completion_tokens": "length",
    "end_rate": "ends",
    "tokens_per_second": "tokens/s",
}
"""Metrics worth watching and what they are called on screen."""


class Progress:
    """Progress from update `start` to `total`; made by `Run.progress`.

    Args:
        total: number of updates of the whole run.
        start: updates done before, by earlier sessions.
        description: name of the stage.
        memory: gives the bytes to show as memory.
    """

    def __init__(self, total: int, start: int, description: str, memory: Callable[[], int]):
        self._total, self._start, self._done, self._description = total, start, start, description
        self._memory = memory
        self._values: dict[str, float] = {}
        self._began = time.monotonic()
        self._advanced = self._began
        self._last_line = ""
        self._printed: float | None = None
        self._console = Console(stderr=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar, or plain lines, while the block runs; the last state stays on screen."""
        if self._console.is_terminal:
            # Only redirect what would land in the middle of the bar, not output that is piped elsewhere.
            redirect = sys.stdout.isatty()
            with Live(get_renderable=self._bar, console=self._console, redirect_stdout=redirect, refresh_per_second=2):
                yield
            return
        try:
            yield
        finally:
            # Nothing is said where an error came before the first update.
            if (self._done > self._start or self._done == self._total) and self._last_line != self._line():
                self._print_line()

    def advance(self, values: Mapping[str, float | int | str] | None = None) -> None:
        """One update is done; `values` are shown as in `show`."""
        self._done += 1
        self._advanced = time.monotonic()
        self.show(values or {})
        if not self._console.is_terminal and (
            self._printed is None or time.monotonic() - self._printed >= PLAIN_SECONDS
        ):
            self._print_line()

    def show(self, values: Mapping[str, float | int | str]) -> None:
        """Puts metrics on screen, those in `LABELS`; one that isn't given again stays."""
        self._values |= {key: value for key, value in values.items() if key in LABELS and not isinstance(value, str)}

    def eta_seconds(self) -> float | None:
        """Time left at the mean pace since `start`; None before the first update."""
        done_here = self._done - self._start
        if done_here <= 0:
            return None
        return max((self._advanced - self._began) / done_here * (self._total - self._done), 0.0)

    def _metrics(self) -> list[str]:
        shown = [f"{LABELS[key]} {_number(value)}" for key, value in self._values.items()]
        return [*shown, f"memory {self._memory() / 1e9:.2f} GB"]

    def _line(self) -> str:
        parts = [
            f"{self._description} {self._done}/{self._total}",
            *self._metrics(),
            f"ETA {clock(self.eta_seconds())}",
        ]
        return " · ".join(parts)

    def _print_line(self) -> None:
        self._last_line, self._printed = self._line(), time.monotonic()
        print(self._last_line, file=sys.stderr, flush=True)

    def _bar(self) -> Group:
        grid = Table.grid(padding=(0, 1))
        elapsed = clock(time.monotonic() - self._began)
        bar = ProgressBar(total=self._total, completed=self._done, width=30)
        grid.add_row(self._description, bar, f"{self._done}/{self._total}", elapsed, f"ETA {clock(self.eta_seconds())}")
        return Group(grid, Text("  " + " · ".join(self._metrics()), style="dim"))


def clock(seconds: float | None) -> str:
    """Seconds as `h:mm:ss`; `-:--:--` for None."""
    if seconds is None:
        return "-:--:--"
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
