"""What the command line prints: results, plans, bases, runs side by side, data summaries and errors, as tables."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from perlhf.errors import visible
from perlhf.reports import loop
from perlhf.runs.read import Summary, read_runs, summarise
from perlhf.runs.words import count, duration, interval, memory, number
from perlhf.system.console import json_line
from perlhf.system.files import storage_errors, write_json

if TYPE_CHECKING:  # plan.py reads data, which help and errors have no use for
    from perlhf.training.plan import Plan

_TEXTS = ("run", "stage", "tuning", "targets", "metric")
_COSTS = ("trainable", "time", "tokens/s", "peak memory")


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
    for adapter, size in planned.trainable.items():
        rows.append((f"trainable, {adapter}", f"{size:,} ({size / planned.base_parameters:.2%})"))
    rows.append(("way", planned.way))
    rows += [("note", note) for note in planned.notes]
    hint = "system (libtcmalloc-minimal4 or libjemalloc2 would save memory)"
    rows.append(("allocator", hint if planned.allocator == "system" else planned.allocator))
    rows.append(("kernels of the CPU", planned.kernels))
    rows += _memory(planned.memory.parts())
    rows += _memory(planned.server, "memory of the server") if planned.server else []
    _table(f"{planned.stage}: plan; nothing was trained or written", rows)


def _memory(parts: Mapping[str, int], of: str = "memory") -> list[tuple[str, str]]:
    """A row for each that holds memory, and the peak."""
    rows = [(f"{of}, {part}", _mebibytes(size)) for part, size in parts.items() if part != "total"]
    return [*rows, (f"{of}, estimated peak", _mebibytes(parts["total"]))]


def forecast(facts: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> None:
    """What `commands.base.forecast` says, by stage."""
    if as_json:
        print(json_line(facts))
        return
    for stage, one in facts.items():
        room = one["device_memory_bytes"]
        rows = [
            ("weights of the base", f"{one['parameters']:,} ({one['dtype']})"),
            *((f"trainable, {name}", f"{size:,}") for name, size in one["trainable"].items()),
            ("way", one["way"]),
            ("lengths", "prompts of {prompt:,} tokens, completions of {completion:,}".format(**one["lengths"])),
            ("devices", f"{one['devices']:,}" + ("" if room is None else f" of {_mebibytes(room)}")),
            *_memory(one["memory_bytes"]),
            ("verdict", one["said"]),
            *(_memory(one["server_memory_bytes"], "memory of the server") if one["server_memory_bytes"] else ()),
            *(("with the server", said) for said in [one["server_said"]] if said),
        ]
        for how, size in one["memory_by_shard_bytes"].items():
            if how != one["shard"]:
                rows.append((f"peak with shard: {how}", _mebibytes(size)))
        received = one["exchanged_bytes"]
        if received["total"]:
            rows += [(f"received an update, {what}", _mebibytes(size, 3)) for what, size in received.items()]
        for what, part in one["seconds"].items():
            said = f"{part['seconds']:.3g}, by {part['bound']}" if part["seconds"] else "not counted without --link"
            rows.append((f"seconds an update, {what}", said))
        hourly = one["updates_per_hour"]
        missing = "--flops and --read: this device isn't here" if one["rates"] is None else "--link"
        rows.append(("updates an hour", f"not told without {missing}" if hourly is None else f"{hourly:,.3g}"))
        _table(f"{stage} on {one['base']}: nothing was loaded or trained", rows)


def cells(settings: BaseModel, rows: Sequence[Sequence[str]]) -> None:
    """The resolved configuration as YAML, then the runs of each side."""
    _configuration(settings)
    total = sum(int(row[-1]) for row in rows)
    columns = ("stage", "side", "learning rates", "seeds", "memory", "runs")
    table = _framed(f"compare: plan of {total} runs; nothing was trained", *columns)
    for row in rows:
        table.add_row(*map(_cell, row))
    Console().print(table)


def foretold(settings: BaseModel, rows: Sequence[tuple[str, str]]) -> None:
    """The resolved configuration of a loop as YAML, then what it would do."""
    _configuration(settings)
    _table("loop: plan; nothing was asked, trained or written", rows)


def rounds(found: Mapping[str, Any]) -> None:
    """What the rounds of a loop have shown (`reports.loop`)."""
    table = _framed("loop", "", *(f"round {one['round']}" for one in found["rounds"]))
    for quantity, cells in loop.quantities(found):
        table.add_row(*map(_cell, (quantity, *cells)))
    Console().print(table)
    for sentence in (loop.setting(found), found["curve"]["sentence"], found["verdict"]):
        print(visible(sentence))


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
    whole = _of_runs("runs", columns)
    unbounded = console.options.update(width=10_000)
    if Measurement.get(console, unbounded, whole).maximum <= console.width:
        console.print(whole)
        return
    costs = {name: columns[name] for name in columns if name in ("run", *_COSTS)}
    console.print(_of_runs("quality", {name: columns[name] for name in columns if name not in _COSTS}))
    console.print(_of_runs("costs", costs))


def base(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """What `commands.base.describe` says of a base."""
    if as_json:
        print(json_line(facts))
        return
    vocabulary, tokens = facts["vocabulary"], facts["end_tokens"]
    rows = [
        ("family", f"{facts['family']} ({facts['class']})"),
        ("parameters", f"{facts['parameters']:,}"),
        ("layers", _counted(facts["layers"])),
        ("way", facts["way"]["said"]),
        ("dtype", facts["dtype"]["said"]),
        ("quantisation", facts["quantisation"]),
        ("context", f"{facts['context']:,} tokens" if facts["context"] else "its configuration names no limit"),
        ("vocabulary", f"{vocabulary['rows']:,} rows, {vocabulary['tokens']:,} of them tokens"),
        ("output head", "tied to the embedding" if vocabulary["tied"] else "its own weights"),
        ("chat template", facts["chat_template"]),
        ("an answer ends with", ", ".join(f"{token['text']} ({token['id']})" for token in tokens)),
    ]
    for name, adapted in facts["adapters"].items():
        said = adapted.get("error")
        if said is None:
            share = adapted["parameters"] / facts["parameters"]
            said = f"{_each(adapted['layers'])}: {adapted['parameters']:,} parameters at rank {adapted['rank']}"
            said += f" ({share:.2%})"
        rows.append((f"targets: {name}", said))
    rows += [("note", note) for note in facts["notes"]]
    rows.append(("memory, weights", _mebibytes(next(iter(facts["memory_bytes"].values()))["base"])))
    rows += [(f"memory, {stage}", _mebibytes(parts["total"])) for stage, parts in facts["memory_bytes"].items()]
    _table(f"{facts['base']}: nothing was loaded or trained", rows)


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{often} {name}" for name, often in numbers.items())


def _each(numbers: Mapping[str, int]) -> str:
    """Names by how often there is each: `q_proj, k_proj (30 each), gate_proj (29)`."""
    groups: dict[int, list[str]] = {}
    for name, often in numbers.items():
        groups.setdefault(often, []).append(name)
    return ", ".join(f"{', '.join(names)} ({size}{' each' if names[1:] else ''})" for size, names in groups.items())


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


def _mebibytes(size: float, digits: int = 0) -> str:
    return f"{size / 2**20:,.{digits}f} MiB"


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


def _of_runs(title: str, columns: dict[str, list[str]]) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        text = name in _TEXTS
        made.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for cells in zip(*columns.values(), strict=True):
        # Text, since a run's name may look like markup.
        made.add_row(*(Text(visible(cell)) for cell in cells))
    return made
