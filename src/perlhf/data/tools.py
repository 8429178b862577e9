"""What `perlhf data validate | inspect | split | convert | formats` do."""

import itertools
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from perlhf.config.stages import DataConfig
from perlhf.data import files, read
from perlhf.data.fields import Row, Skipped, checked
from perlhf.data.files import FOR_TRAINING, Choice, DataFile
from perlhf.data.read import FORMATS
from perlhf.data.records import (
    Comparison,
    Demonstration,
    Rating,
    Record,
    Text,
    completions_of,
    content_of,
    text_of,
)
from perlhf.data.splits import SPLITS, choice_of, kind_of, sides_of
from perlhf.data.store import (
    Facts,
    Records,
    Tally,
    contradictions,
    count_groups,
    duplicates,
    hold,
    warnings,
)
from perlhf.errors import DataError
from perlhf.system.files import storage_errors, write_atomic
from perlhf.system.progress import counted

MAX_PROBLEMS = 100
EXAMPLE_CHARACTERS = 400
ROWS_AT_ONCE = 50_000
"""Rows of a Parquet file that are in memory at one time."""
_OUTPUTS = (".jsonl", ".parquet")


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
    paths: Sequence[str], format: str = "auto", root: Path | None = None, choice: Choice = FOR_TRAINING
) -> Validation:
    """Reads every row of every path and collects what is wrong (at most MAX_PROBLEMS), instead of stopping at the
    first.

    Raises:
        DataError: unknown format, or nothing has one of the names.
    """
    read.check_format(format)
    tally, skipped, problems, kinds = Tally(), Counter[str](), list[DataError](), Counter[str]()
    count = 0
    for path in paths:
        data_files = [None] if read.is_builtin(path) else files.find(path, root, choice)
        for file in data_files:
            count += 1
            for outcome in read.read(path, choice=choice) if file is None else _records_or_problems(file, format):
                if isinstance(outcome, DataError):
                    problems.append(outcome)
                elif isinstance(outcome, Skipped):
                    skipped[outcome.reason] += 1
                else:
                    kinds[kind_of(outcome)] += 1
                    tally.add(outcome)
    found = tuple(warnings(tally.facts()))
    return Validation(count, dict(kinds), dict(skipped), tuple(problems[:MAX_PROBLEMS]), found)


def inspect(
    paths: Sequence[str],
    format: str = "auto",
    root: Path | None = None,
    config: DataConfig | None = None,
    choice: Choice = FOR_TRAINING,
) -> dict[str, Any]:
    """Summary of some files, ready for a table or JSON.

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
    for record in (record for path in paths for record in read.stream(path, format, root, choice, into=reading)):
        tally.add(record)
        kinds[kind_of(record)] += 1
        lengths["prompt"].append(_length(record.prompt))
        lengths["completion"].extend(map(_length, completions_of(record)))
        example = example or _example(record)
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
        DataError: a file or row is wrong, or a side is empty; nothing is written then.
        StorageError: the files can't be written.
    """
    every = (record for path in config.paths for record in read.stream(path, config.format, choice=choice_of(config)))
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
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    for side, members in wanted.items():
        write_atomic(output / f"{side}.jsonl", jsonl_lines(counted(members, f"writing {side}.jsonl", len(members))))
    return {side: {"records": len(members), "groups": count_groups(members.facts)} for side, members in wanted.items()}


def convert(
    path: str,
    output: Path,
    format: str = "auto",
    root: Path | None = None,
    choice: Choice = FOR_TRAINING,
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
    records = hold(read.stream(path, format, root, choice))
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
        yield (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _write_parquet(records: Records, file: IO[bytes]) -> None:
    """Parquet with TRL's column names, in row groups of ROWS_AT_ONCE."""
    import pyarrow
    import pyarrow.parquet

    chat = any(not isinstance(record.prompt, str) for record in records)
    columns = dict.fromkeys(name for record in records for name in _trl_row(record, chat))

    def tables() -> Iterator[Any]:
        for start in range(0, len(records), ROWS_AT_ONCE):
            rows = [_trl_row(record, chat) for record in records[start : start + ROWS_AT_ONCE]]
            yield pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in columns})

    # A column that is empty in some rows has its type from the others.
    schema = pyarrow.unify_schemas([table.schema for table in tables()])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for table in tables():
            writer.write_table(table.cast(schema))


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
    row |= {"group": record.group, "source": record.source or None}
    return {name: cell for name, cell in row.items() if cell is not None}


def _written(text: Text, role: str, chat: bool) -> str | list[dict[str, str]]:
    if isinstance(text, str):
        return [{"role": role, "content": text}] if chat else text
    return [dict(message) for message in text]


Outcome = Record | Skipped | DataError


def _records_or_problems(file: DataFile, format: str) -> Iterator[Outcome]:
    """Every record of a file, with an error in place of each row that can't be read."""
    try:
        rows = _rows(file)
        for where, row in rows:
            if isinstance(row, DataError):
                yield row
                continue
            name = read.detect(row) if format == "auto" else format
            reader, source = read.reader_of(name, file), itertools.chain([(where, row)], rows)
            if name in read.WHOLE_FILE:
                yield from _of_whole_file(reader, source, file)
            else:
                yield from _of_each_row(reader, source)
            return
    except DataError as error:
        yield error


def _rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    return counted(files.rows_or_errors(file), f"reading {file.name}", read.about_rows(file))


def _of_each_row(reader: read.Reader, rows: Iterator[tuple[str, dict[str, Any] | DataError]]) -> Iterator[Outcome]:
    """What a reader makes of rows that stand each for itself; it goes on after one that it refuses.

    A row counts with all its records or not at all, so what it gave waits until the reader asks for the next one.
    """
    waiting: list[Outcome] = []
    began, refused = 0, False  # where the outcomes of the newest row begin, and whether it was refused

    def readable() -> Iterator[Row]:
        nonlocal began, refused
        for where, row in rows:
            if isinstance(row, DataError):
                waiting.append(row)
            else:
                began, refused = len(waiting), False
                yield where, row
                began = len(waiting)  # all that it gave has come

    def refuse(error: DataError) -> None:
        nonlocal refused
        refused = True
        waiting[began:] = [error]

    source, going_on = readable(), True
    while going_on:
        try:
            for outcome in reader(source):
                if began:
                    yield from waiting[:began]
                    del waiting[:began]
                    began = 0
                if refused:
                    continue
                waiting.append(outcome)
                if (problem := _problem(outcome)) is not None:
                    refuse(problem)
            going_on = False
        except DataError as error:
            refuse(error)
    yield from waiting


def _of_whole_file(
    reader: read.Reader, rows: Iterator[tuple[str, dict[str, Any] | DataError]], file: DataFile
) -> Iterator[Outcome]:
    """What a reader makes of all the rows that it doesn't refuse alone; the file is read twice for that."""
    refused: set[str] = set()
    for where, row in rows:
        alone = [row] if isinstance(row, DataError) else _of_each_row(reader, iter([(where, row)]))
        for problem in (outcome for outcome in alone if isinstance(outcome, DataError)):
            refused.add(where)
            yield problem
    usable = ((where, row) for where, row in _rows(file) if where not in refused and not isinstance(row, DataError))
    for outcome in reader(usable):
        yield _problem(outcome) or outcome


def _problem(outcome: Record | Skipped) -> DataError | None:
    """Why a record can't be trained on."""
    try:
        if not isinstance(outcome, Skipped):
            checked(outcome, outcome.source or "")
    except DataError as error:
        return error
    return None


def _example(record: Record) -> dict[str, Any]:
    row = _trl_row(record, chat=False)
    return {"kind": kind_of(record)} | {name: _shortened(cell) for name, cell in row.items()}


def _shortened(cell: Any) -> Any:
    """Text of at most EXAMPLE_CHARACTERS, the end kept; chat messages as `role: content` lines."""
    if isinstance(cell, list):
        cell = text_of(cell)
    return f"...{cell[-EXAMPLE_CHARACTERS:]}" if isinstance(cell, str) and len(cell) > EXAMPLE_CHARACTERS else cell


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
