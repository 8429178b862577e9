"""What the command line prints: results, plans, data summaries and errors, as tables."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from perlhf.errors import visible

if TYPE_CHECKING:  # plan.py reads data, which help and errors have no use for
    from perlhf.training.plan import Plan


def error(message: str) -> None:
    """One message on standard error; nothing where that can't be written."""
    text = Text.assemble(("error: ", "bold red"), visible(message, lines=True))
    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed, a full disk
        Console(stderr=True).print(text, soft_wrap=True)


def said(text: object) -> None:
    """One line on standard output, such as the path of what was written."""
    print(visible(str(text)))


def result(title: str, values: Mapping[str, Any]) -> None:
    """Numbers and names of a stage's result, nested ones as `a.b`."""
    _table(title, ((key, _shown(key, value)) for key, value in _flat(values)))


def nested(title: str, values: Mapping[str, Any]) -> None:
    """A summary whose parts are counts; parts that are all zero are left out."""
    _table(title, ((key, _shown(key, value)) for key, value in _flat(values) if value != 0))


def plan(settings: BaseModel, planned: "Plan") -> None:
    """The resolved configuration as YAML, then what it comes to."""
    _configuration(settings)
    rows = [(f"records, {split}", f"{count:,}") for split, count in planned.records.items()]
    rows.append(("updates", f"{planned.updates:,}"))
    rows.append(("learning rate", f"{planned.learning_rate:g}"))
    rows.append(("weights of the base", f"{planned.base_parameters:,} ({planned.dtype})"))
    for adapter, count in planned.trainable.items():
        rows.append((f"trainable, {adapter}", f"{count:,} ({count / planned.base_parameters:.2%})"))
    rows.append(("way", planned.way))
    rows += [("note", note) for note in planned.notes]
    hint = "system (libtcmalloc-minimal4 or libjemalloc2 would save memory)"
    rows.append(("allocator", hint if planned.allocator == "system" else planned.allocator))
    rows.append(("kernels of the CPU", planned.kernels))
    rows += [(f"memory, {part}", _mebibytes(size)) for part, size in planned.memory_bytes.items()]
    rows.append(("memory, estimated peak", _mebibytes(planned.total_bytes)))
    _table(f"{planned.stage}: plan; nothing was trained or written", rows)


def cells(settings: BaseModel, rows: Sequence[Sequence[str]]) -> None:
    """The resolved configuration as YAML, then the runs of each side."""
    _configuration(settings)
    total = sum(int(row[-1]) for row in rows)
    columns = ("stage", "side", "learning rates", "seeds", "memory", "runs")
    table = _framed(f"compare: plan of {total} runs; nothing was trained", *columns)
    for row in rows:
        table.add_row(*map(_cell, row))
    Console().print(table)


def formats(readers: Iterable[Mapping[str, str]], sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Formats with a line each (docs/data.md has their rules), and the sets that can be pulled."""
    print("formats (--data.format NAME; rules in docs/data.md)")
    for reader in readers:
        what = reader["rule"].partition(" Rule: ")[0].partition(" Group: ")[0]
        print(f"  {reader['name']:<22} {what} Gives {reader['gives']}.")
    print()
    table = _framed("perlhf data pull NAME", "set", "published by", "licence")
    for name, source in sources.items():
        table.add_row(*map(_cell, (name, str(source["repository"]), str(source["licence"]))))
    Console().print(table)


def validation(
    files: int,
    records: Mapping[str, int],
    skipped: Mapping[str, int],
    problems: Sequence[Exception],
    warnings: Sequence[str],
) -> None:
    """Counts on standard output; problems and warnings, one a line, on standard error."""
    for problem in problems:
        error(str(problem))
    console = Console(stderr=True)
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), visible(warning, lines=True)), soft_wrap=True)
    counts = {"files": files, "records": records, "skipped": skipped, "problems": len(problems)}
    _table("validation", ((key, _shown(key, value)) for key, value in _flat(counts)))


def _configuration(settings: BaseModel) -> None:
    print(visible(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), lines=True))


def _table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = _framed(title)
    for key, value in rows:
        table.add_row(_cell(key), _cell(value))
    Console().print(table)


def _framed(title: str, *columns: str) -> Table:
    headers = (Column(name, overflow="fold") for name in columns)
    return Table(*headers, title=_cell(title), title_justify="left", show_header=bool(columns))


def _cell(text: str) -> Text:
    """Text, since a path may look like markup; where it is too wide it goes on in the next line, and is never cut."""
    return Text(visible(text), overflow="fold")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves that are numbers or text, with dotted keys; lists and nulls are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{key}", value


def _shown(key: str, value: float | str) -> str:
    if isinstance(value, str | bool):
        return str(value)
    if key.endswith("_bytes"):
        return _mebibytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
