"""Live progress of a stage on standard error: a bar with ETA on a terminal, else a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from perlhf.errors import visible
from perlhf.system.machine import peak_memory_bytes

Item = TypeVar("Item")

PLAIN_SECONDS = 15.0
"""Least time between two plain lines."""
PATIENCE_SECONDS = 2.0
"""What is over sooner shows no progress (`counted`)."""
COUNTED_AT_ONCE = 64
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


def counted(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items as they come; once PATIENCE_SECONDS have passed, progress is shown while they do.

    Args:
        total: how many there will be, or about so many; None, where nobody knows, shows no ETA.
    """
    began, done, shown = time.monotonic(), 0, 0
    bar: Progress | None = None
    with ExitStack() as stack:
        for item in items:
            yield item
            done += 1
            if done % COUNTED_AT_ONCE:
                continue
            if bar is None and time.monotonic() - began > PATIENCE_SECONDS:
                bar = Progress(total, 0, description, peak_memory_bytes, began)
                stack.enter_context(bar.shown())
            if bar is not None:
                bar.advance(count=done - shown)
                shown = done
        if bar is not None:
            bar.advance(count=done - shown)


class Progress:
    """Progress from update `start` to `total`; made by `Run.progress`.

    Args:
        total: number of updates of the whole run, or about so many; None where nobody knows.
        start: updates done before, by earlier sessions.
        description: name of the stage.
        memory: gives the bytes to show as memory.
        began: when it began, by `time.monotonic`; None is now.
    """

    def __init__(
        self, total: int | None, start: int, description: str, memory: Callable[[], int], began: float | None = None
    ):
        self._total, self._start, self._done, self._description = total, start, start, visible(description)
        self._memory = memory
        self._values: dict[str, float] = {}
        self._began = time.monotonic() if began is None else began
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

    def advance(self, values: Mapping[str, float | int | str] | None = None, count: int = 1) -> None:
        """One update is done, or `count`; `values` are shown as in `show`."""
        self._done += count
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
        if done_here <= 0 or self._total is None:
            return None
        return max((self._advanced - self._began) / done_here * (self._total - self._done), 0.0)

    def _count(self) -> str:
        return str(self._done) if self._total is None else f"{self._done}/{max(self._total, self._done)}"

    def _metrics(self) -> list[str]:
        shown = [f"{LABELS[key]} {_number(value)}" for key, value in self._values.items()]
        return [*shown, f"memory {self._memory() / 1e9:.2f} GB"]

    def _line(self) -> str:
        parts = [
            f"{self._description} {self._count()}",
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
        grid.add_row(Text(self._description), bar, self._count(), elapsed, f"ETA {clock(self.eta_seconds())}")
        return Group(grid, Text("  " + " · ".join(self._metrics()), style="dim"))


def clock(seconds: float | None) -> str:
    """Seconds as `h:mm:ss`; `-:--:--` for None."""
    if seconds is None:
        return "-:--:--"
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
