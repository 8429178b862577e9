"""What `perlhf data validate | inspect | split | convert | formats` do."""

import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from perlhf.config.stages import DataConfig, LayoutConfig
from perlhf.data import files, read
from perlhf.data.fields import Skipped
from perlhf.data.readers.formats import FORMATS, check_format
from perlhf.data.records import (
    Comparison,
    Demonstration,
    Prompt,
    Rating,
    Record,
    Text,
    completions_of,
    content_of,
    text_of,
)
from perlhf.data.splits import SPLITS, check_sides, kind_of, oddities, sides_of, write_sides
from perlhf.data.store import (
    Facts,
    Records,
    Tally,
    contradictions,
    count_groups,
    duplicates,
    hold,
)
from perlhf.errors import DataError
from perlhf.system.console import note
from perlhf.system.files import storage_errors, write_atomic
from perlhf.system.progress import counted

MAX_PROBLEMS = 100
EXAMPLE_CHARACTERS = 400
ROWS_AT_ONCE = 50_000
"""Rows of a Parquet file that are in memory at one time."""
_OUTPUTS = (".jsonl", ".parquet")
_BEGIN_HTML = re.compile(r"\s*<(p|pre|ul|ol|dl|blockquote|h[1-6]|table|div)\b[^<>]*>", re.IGNORECASE)
_END_HTML = re.compile(r"</[a-z0-9]+>\s*$", re.IGNORECASE)
"""Of a text that is HTML as a whole, as answers of StackExchange are; a text about HTML seldom begins and ends so."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What was found in some files.

    `problems` stop training, `warnings` do not; each problem says where and what to try.
    """

    files: int
    records: dict[str, int]
    skipped: dict[str, int]
    problems: tuple[DataError, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when every row can be used."""
        return not self.problems


def formats() -> list[dict[str, str]]:
    """Name, kind of record and rule of every format, for the table of `perlhf data formats`."""
    return [
        {"name": layout.name, "gives": layout.gives, "rule": " ".join((layout.reader.__doc__ or "").split())}
        for layout in FORMATS
    ]


def validate(
    paths: Sequence[str], format: str = "auto", root: Path | None = None, rules: LayoutConfig | None = None
) -> Validation:
    """Reads every row of every path and collects what is wrong (at most MAX_PROBLEMS), instead of stopping at the
    first.

    Raises:
        DataError: unknown format, or nothing has one of the names.
    """
    check_format(format)
    tally, reading, problems, kinds = Tally(), read.Reading(), list[DataError](), Counter[str]()
    count = html = 0
    for path in paths:
        choice = read.choice_of(rules or LayoutConfig())
        data_files = [None] if read.is_builtin(path) else files.find(path, root, choice)
        for file in data_files:
            count += 1
            for outcome in (
                read.read(path, rules=rules) if file is None else read.records_or_problems(file, format, rules)
            ):
                if isinstance(outcome, DataError):
                    problems.append(outcome)
                elif isinstance(outcome, Skipped):
                    reading.leave_out(outcome)
                else:
                    kinds[kind_of(outcome)] += 1
                    tally.add(outcome)
                    html += _holds_html(outcome)
    odd = (*reading.sentences(), *oddities(tally.facts(), reading.skipped), *_of_html(html))
    return Validation(count, dict(kinds), reading.skipped, tuple(problems[:MAX_PROBLEMS]), odd)


def inspect(
    paths: Sequence[str],
    format: str = "auto",
    root: Path | None = None,
    config: DataConfig | None = None,
    rules: LayoutConfig | None = None,
) -> dict[str, Any]:
    """Summary of some files, ready for a table or JSON; a note on standard error tells of records that hold HTML.

    Returns:
        formats (by file), records (by kind), skipped (by reason), groups, splits (records and groups, by `config`),
        labels {up, down}, lengths in characters {prompt, completion: {median, p90, max}}, duplicates, contradictions,
        example (the first record, long text shortened).

    Raises:
        DataError: as `read`.
    """
    config = config or DataConfig()
    reading, tally, kinds = read.Reading(), Tally(config.split_seed), Counter[str]()
    lengths = {"prompt": array("q"), "completion": array("q")}
    example: dict[str, Any] = {}
    html = 0
    for record in (record for path in paths for record in read.stream(path, format, root, rules, reading)):
        tally.add(record)
        kinds[kind_of(record)] += 1
        lengths["prompt"].append(_length(record.prompt))
        lengths["completion"].extend(map(_length, completions_of(record)))
        example = example or _example(record)
        html += _holds_html(record)
    for sentence in _of_html(html):
        note(sentence)
    facts = tally.facts()
    return {
        "formats": reading.formats,
        "records": dict(kinds),
        "skipped": reading.skipped,
        "groups": count_groups(facts),
        "splits": _split_sizes(facts, config),
        "labels": {"up": int((facts.label == 1).sum()), "down": int((facts.label == 0).sum())},
        "lengths": {name: _quantiles(found) for name, found in lengths.items()},
        "duplicates": duplicates(facts),
        "contradictions": contradictions(facts),
        "example": example,
    }


def split(config: DataConfig, output: Path) -> dict[str, dict[str, int]]:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`; records keep their kind, and groups stay whole.

    A side whose share is 0 isn't written. `limit` is ignored.

    Returns:
        {side: {"records": n, "groups": n}} of the written sides.

    Raises:
        DataError: a file or row is wrong, a side is empty, or the sides of an earlier split are in the way
            (`splits.write_sides`); nothing is written then.
        StorageError: the files can't be written.
    """
    every = (r for path in config.paths for r in read.stream(path, config.format, rules=config))
    check_sides(output, config.paths)
    records = hold(every, config.split_seed)
    sides = sides_of(records.facts, config)
    shares = {"train": 1.0, "validation": config.validation, "test": config.test}
    wanted = {side: records.take(sides == number) for number, side in enumerate(SPLITS) if shares[side] > 0}
    for side, members in wanted.items():
        if not members:
            groups = count_groups(records.facts)
            raise DataError(
                f"the {side} side is empty: none of {groups} groups falls into it",
                where=", ".join(config.paths),
                allowed="at least one group on each side",
                hint="change data.validation, data.test or data.split_seed, or give more data",
            )
    lines = (
        (side, jsonl_lines(counted(members, f"writing {side}.jsonl", len(members)))) for side, members in wanted.items()
    )
    write_sides(output, lines, config.paths)
    return {side: {"records": len(members), "groups": count_groups(members.facts)} for side, members in wanted.items()}


def convert(
    path: str, output: Path, format: str = "auto", root: Path | None = None, rules: LayoutConfig | None = None
) -> int:
    """Writes the records of `path` with TRL's column names to a `.jsonl` or `.parquet` file.

    Chat prompts are written as lists of messages and their completions as one assistant message; in Parquet, where a
    column has one type, a plain prompt beside chat prompts is written as one user message.

    Returns:
        Number of records.

    Raises:
        DataError: as `read`, or another suffix.
        StorageError: the file can't be written.
    """
    if output.suffix not in _OUTPUTS:
        raise DataError(
            f"can't write {output.suffix or 'a file without suffix'!r}",
            where=str(output),
            allowed=" or ".join(_OUTPUTS),
        )
    records = hold(read.stream(path, format, root, rules))
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        write_atomic(output, jsonl_lines(counted(records, f"writing {output.name}", len(records))))
    else:
        with storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as written:
            _write_parquet(records, written)
            written.seek(0)
            write_atomic(output, iter(lambda: written.read(2**20), b""))
    return len(records)


def jsonl_lines(records: Iterable[Record]) -> Iterator[bytes]:
    """JSON lines with TRL's column names, one a record."""
    for record in records:
        row = _trl_row(record, chat=not isinstance(record.prompt, str))
        yield _json_line(row)


def _json_line(row: Mapping[str, Any]) -> bytes:
    """One row; what Parquet has and JSON hasn't (dates) as text, half a surrogate pair in a reward's column escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, default=str) + "\n").encode()


def _write_parquet(records: Records, file: IO[bytes]) -> None:
    """Parquet with TRL's column names, in row groups of ROWS_AT_ONCE; tools and the arguments of calls, which have no
    one type, as JSON text.

    Raises:
        DataError: a column holds values of several types, or objects without a key.
    """
    import pyarrow
    import pyarrow.parquet

    chat = any(not isinstance(record.prompt, str) for record in records)
    columns = dict.fromkeys(name for record in records for name in _trl_row(record, chat))

    def tables() -> Iterator[Any]:
        for start in range(0, len(records), ROWS_AT_ONCE):
            part = (_trl_row(record, chat) for record in records[start : start + ROWS_AT_ONCE])
            rows = [{name: _typed(name, cell) for name, cell in row.items()} for row in part]
            yield pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in columns})

    try:
        # A column that is empty in some rows has its type from the others.
        schema = pyarrow.unify_schemas([table.schema for table in tables()])
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for table in tables():
                writer.write_table(table.cast(schema))
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"a column can't be written as Parquet: {str(error).splitlines()[0]}",
            where="output",
            allowed="one type in a column, no empty objects",
            hint="write .jsonl",
        ) from error


def _trl_row(record: Record, chat: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": _written(record.prompt, "user", chat)}
    match record:
        case Comparison():
            row |= {
                "chosen": _written(record.chosen, "assistant", chat),
                "rejected": _written(record.rejected, "assistant", chat),
            }
            row |= {"weight": record.weight, "margin": record.margin, "annotator": record.annotator}
        case Rating():
            row |= {"completion": _written(record.completion, "assistant", chat), "label": record.label}
            row |= {"weight": record.weight, "annotator": record.annotator}
        case Demonstration():
            row |= {"completion": _written(record.completion, "assistant", chat), "weight": record.weight}
        case Prompt():
            row |= record.columns
    row |= {"tools": list(record.tools) if record.tools else None}
    row |= {"group": record.group, "source": record.source or None}
    return {name: cell for name, cell in row.items() if cell is not None}


def _typed(name: str, cell: Any) -> Any:
    """A cell as a column of one type can hold it."""
    if name == "tools":
        return json.dumps(cell)
    if not isinstance(cell, list) or not any(isinstance(part, dict) and "tool_calls" in part for part in cell):
        return cell
    return [
        part | {"tool_calls": json.dumps(part["tool_calls"])}
        if isinstance(part, dict) and "tool_calls" in part
        else part
        for part in cell
    ]


def _written(text: Text, role: str, chat: bool) -> str | list[dict[str, str]]:
    if isinstance(text, str):
        return [{"role": role, "content": text}] if chat else text
    return [dict(message) for message in text]


def _holds_html(record: Record) -> bool:
    texts = (record.prompt, *completions_of(record))
    return any(_is_html(text if isinstance(text, str) else content_of(text[-1])) for text in texts if text)


def _is_html(text: str) -> bool:
    return _BEGIN_HTML.match(text) is not None and _END_HTML.search(text, max(0, len(text) - 40)) is not None


def _of_html(count: int) -> Iterator[str]:
    if count:
        yield f"{count:,} records hold texts that are HTML (such as <p>...</p>); they are learned as they stand"


def _example(record: Record) -> dict[str, Any]:
    row = _trl_row(record, chat=False)
    return {"kind": kind_of(record)} | {name: _shortened(cell) for name, cell in row.items()}


def _shortened(cell: Any) -> Any:
    """Text of at most EXAMPLE_CHARACTERS, its end kept; chat messages as `role: content` lines, then other keys."""
    if isinstance(cell, list):
        cell = "\n".join(_shown_message(part) for part in cell)
    return f"...{cell[-EXAMPLE_CHARACTERS:]}" if isinstance(cell, str) and len(cell) > EXAMPLE_CHARACTERS else cell


def _shown_message(message: Any) -> str:
    if not isinstance(message, dict) or "role" not in message:
        return str(message)
    others = {name: part for name, part in message.items() if name not in ("role", "content")}
    return text_of([message]) + (f" {json.dumps(others, ensure_ascii=False, default=str)}" if others else "")


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(content_of(message)) for message in text)


def _quantiles(lengths: "array[int]") -> dict[str, int]:
    """Median, 90th percentile (both elements of the list: the lower one where the place is between two) and maximum."""
    ordered = np.sort(np.frombuffer(lengths, dtype=np.int64))
    if not len(ordered):
        return {"median": 0, "p90": 0, "max": 0}
    places = {"median": (len(ordered) - 1) // 2, "p90": (len(ordered) - 1) * 9 // 10, "max": -1}
    return {name: int(ordered[place]) for name, place in places.items()}


def _split_sizes(facts: Facts, config: DataConfig) -> dict[str, dict[str, int]]:
    sides = sides_of(facts, config)
    members = {side: facts.take(np.flatnonzero(sides == number)) for number, side in enumerate(SPLITS)}
    return {side: {"records": len(own), "groups": count_groups(own)} for side, own in members.items()}
