"""Several runs side by side: quality, time and memory, as a table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from perlhf.errors import visible
from perlhf.runs.read import Summary, read_runs, summarise
from perlhf.runs.words import count, duration, interval, memory, number
from perlhf.system.files import storage_errors, write_json

_TEXTS = ("run", "stage", "tuning", "targets", "metric")
_COSTS = ("trainable", "time", "tokens/s", "peak memory")


def tabulate(runs: Sequence[Path], output: Path | None = None) -> list[Summary]:
    """Prints the table of `runs`, writes its rows as JSON to `output` if given, and returns them.

    Raises:
        ConfigError: a path that is no run directory.
        RunError: a file of a run can't be read.
        StorageError: `output` can't be written.
    """
    rows = [summarise(run) for run in read_runs(runs)]
    if output is not None:
        with storage_errors(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, [asdict(row) for row in rows])
    print_rows(rows, Console())
    return rows


def print_rows(rows: Sequence[Summary], console: Console) -> None:
    """Prints the rows: as one table, or where that is too wide as one of quality and one of costs."""
    columns = _columns(rows)
    whole = _framed("runs", columns)
    unbounded = console.options.update(width=10_000)
    if Measurement.get(console, unbounded, whole).maximum <= console.width:
        console.print(whole)
        return
    costs = {name: columns[name] for name in columns if name in ("run", *_COSTS)}
    console.print(_framed("quality", {name: columns[name] for name in columns if name not in _COSTS}))
    console.print(_framed("costs", costs))


def _columns(rows: Sequence[Summary]) -> dict[str, list[str]]:
    """The cells of each column; one that no run fills is left out."""
    columns = {
        "run": [row.name for row in rows],
        "stage": [row.stage for row in rows],
        "tuning": [row.tuning or "–" for row in rows],
        "rank": ["–" if row.rank is None else str(row.rank) for row in rows],
        "targets": [row.targets or "–" for row in rows],
        "metric": [row.quality_name or "–" for row in rows],
        "value": ["–" if row.quality is None else number(row.quality.value) for row in rows],
        "95 % interval": [(row.quality and interval(row.quality)) or "–" for row in rows],
        "trainable": [count(row.trainable_parameters) for row in rows],
        "time": [duration(row.seconds) for row in rows],
        "tokens/s": [count(row.tokens_per_second) for row in rows],
        "peak memory": [memory(row.peak_memory_bytes) for row in rows],
    }
    return {name: cells for name, cells in columns.items() if name in ("run", "stage") or set(cells) != {"–"}}


def _framed(title: str, columns: dict[str, list[str]]) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        text = name in _TEXTS
        made.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for cells in zip(*columns.values(), strict=True):
        # Text, since a run's name may look like markup.
        made.add_row(*(Text(visible(cell)) for cell in cells))
    return made
