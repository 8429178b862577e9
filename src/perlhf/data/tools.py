"""What `perlhf data validate | inspect | split | convert | formats` do."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlhf.config.stages import DataConfig, LayoutConfig
from perlhf.data import files, read
from perlhf.data.fields import Skipped, checked
from perlhf.data.files import DataFile
from perlhf.data.read import FORMATS, SAME_TEXT
from perlhf.data.readers.layouts import TIE
from perlhf.data.readers.trl import NoRule
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
from perlhf.data.splits import SPLITS, kind_of, prompt_text, record_hash, split_of
from perlhf.errors import DataError
from perlhf.system.files import storage_errors, write_atomic

MAX_PROBLEMS = 100
EXAMPLE_CHARACTERS = 400
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
    paths: Sequence[str], format: str = "auto", root: Path | None = None, rules: LayoutConfig | None = None
) -> Validation:
    """Reads every row of every path and collects what is wrong (at most MAX_PROBLEMS), instead of stopping at the
    first.

    Raises:
        DataError: unknown format, or nothing has one of the names.
    """
    read.check_format(format)
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    problems: list[DataError] = []
    count = 0
    for path in paths:
        if read.is_builtin(path):
            records.extend(read.read(path, rules=rules))
            count += 1
            continue
        for file in files.find(path, root, read.choice_of(rules or LayoutConfig())):
            count += 1
            for outcome in _records_or_problems(file, format, rules or LayoutConfig()):
                if isinstance(outcome, DataError):
                    problems.append(outcome)
                elif isinstance(outcome, Skipped):
                    skipped[outcome.reason] += 1
                else:
                    records.append(outcome)
    kinds = Counter(kind_of(record) for record in records)
    return Validation(
        count, dict(kinds), dict(skipped), tuple(problems[:MAX_PROBLEMS]), tuple(_warnings(records, skipped))
    )


def inspect(
    paths: Sequence[str],
    format: str = "auto",
    root: Path | None = None,
    config: DataConfig | None = None,
    rules: LayoutConfig | None = None,
) -> dict[str, Any]:
    """Summary of some files, ready for a table or JSON.

    Returns:
        formats (by file), records (by kind), skipped (by reason), groups, splits (records and groups, by `config`),
        labels {up, down}, lengths in characters {prompt, completion: {median, p90, max}}, duplicates, contradictions,
        example (the first record, long text shortened).

    Raises:
        DataError: as `read`.
    """
    readings = [read.read_all(path, format, root, rules) for path in paths]
    records = [record for reading in readings for record in reading.records]
    labels = Counter(record.label for record in records if isinstance(record, Rating))
    skipped = sum((Counter(reading.skipped) for reading in readings), Counter[str]())
    return {
        "formats": {name: detected for reading in readings for name, detected in reading.formats.items()},
        "records": dict(Counter(kind_of(record) for record in records)),
        "skipped": dict(skipped),
        "groups": len({record.group for record in records}),
        "splits": _split_sizes(records, config or DataConfig()),
        "labels": {"up": labels[True], "down": labels[False]},
        "lengths": {
            "prompt": _quantiles([_length(record.prompt) for record in records]),
            "completion": _quantiles([len(part) for record in records for part in completions_of(record)]),
        },
        "duplicates": _duplicates(records),
        "contradictions": _contradictions(records),
        "example": _example(records[0]) if records else {},
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
    records = [record for path in config.paths for record in read.read(path, config.format, rules=config)]
    sides = {side: [record for record in records if split_of(record.group, config) == side] for side in SPLITS}
    shares = {"train": 1.0, "validation": config.validation, "test": config.test}
    wanted = {side: members for side, members in sides.items() if shares[side] > 0}
    for side, members in wanted.items():
        if not members:
            groups = len({record.group for record in records})
            raise DataError(
                f"the {side} side is empty: none of {groups} groups falls into it",
                where=", ".join(config.paths),
                allowed="at least one group on each side",
                hint="change data.validation, data.test or data.split_seed, or give more data",
            )
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    for side, members in wanted.items():
        write_atomic(output / f"{side}.jsonl", to_jsonl(members))
    return {
        side: {"records": len(members), "groups": len({record.group for record in members})}
        for side, members in wanted.items()
    }


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
    records = read.read(path, format, root, rules)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, to_jsonl(records) if output.suffix == ".jsonl" else to_parquet(records))
    return len(records)


def to_jsonl(records: Iterable[Record]) -> bytes:
    """JSON lines with TRL's column names."""
    rows = (_trl_row(record, chat=not isinstance(record.prompt, str)) for record in records)
    return b"".join(_json_line(row) for row in rows)


def _json_line(row: Mapping[str, Any]) -> bytes:
    """One row; what Parquet has and JSON hasn't (dates) as text, half a surrogate pair in a reward's column escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, default=str) + "\n").encode()


def to_parquet(records: Sequence[Record]) -> bytes:
    """Parquet with TRL's column names; tools and the arguments of calls, which have no one type, as JSON text.

    Raises:
        DataError: a column holds values of several types, or objects without a key.
    """
    import pyarrow
    import pyarrow.parquet

    chat = any(not isinstance(record.prompt, str) for record in records)
    rows = [{name: _typed(name, cell) for name, cell in _trl_row(record, chat).items()} for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in columns})
        stream = io.BytesIO()
        pyarrow.parquet.write_table(table, stream)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"a column can't be written as Parquet: {str(error).splitlines()[0]}",
            where="output",
            allowed="one type in a column, no empty objects",
            hint="write .jsonl",
        ) from error
    return stream.getvalue()


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


def _records_or_problems(file: DataFile, format: str, rules: LayoutConfig) -> Iterable[Record | Skipped | DataError]:
    """Every record of a file, with an error in place of each row that can't be read."""
    good: list[tuple[str, dict[str, Any]]] = []
    try:
        for where, row in files.rows_or_errors(file):
            if isinstance(row, DataError):
                yield row
            else:
                good.append((where, row))
        if not good:
            return
        good = list(read.renamed(good, rules, file.name))
        reader = read.reader_of(read.detect(good[0][1]) if format == "auto" else format, file, rules)
    except DataError as error:
        yield error
        return
    usable: list[tuple[str, dict[str, Any]]] = []
    for where, row in good:
        try:
            for found in reader([(where, row)]):
                record = read.settled(found, rules)
                if not isinstance(record, Skipped):
                    checked(record, where)
            usable.append((where, row))
        except NoRule:
            yield from _no_rule(reader, good[len(usable) :])  # said once, with the grades of all rows
            return
        except DataError as error:
            yield error
    for found in reader(usable):
        try:
            record = read.settled(found, rules)
            yield record if isinstance(record, Skipped) else checked(record, record.source)
        except DataError as error:
            yield error


def _no_rule(reader: read.Reader, rows: list[tuple[str, dict[str, Any]]]) -> Iterable[DataError]:
    try:
        for _ in reader(rows):
            pass
    except DataError as error:
        yield error


def _warnings(records: Sequence[Record], skipped: Counter[str]) -> Iterable[str]:
    if duplicates := _duplicates(records):
        yield f"{duplicates} records repeat another one exactly"
    if contradictions := _contradictions(records):
        yield f"{contradictions} judgements are contradicted by another record (both labels, or both orders)"
    if ties := skipped[SAME_TEXT] + skipped[TIE]:
        yield f"{ties} comparisons are ties or have the same text on both sides; they are left out (`data.ties`)"
    if against := sum(isinstance(record, Comparison) and record.margin < 0 for record in records):
        yield f"{against} comparisons have a negative margin: their scores (or `margin`) prefer the rejected side"
    labels = {record.label for record in records if isinstance(record, Rating)}
    if len(labels) == 1:
        yield f"all ratings have the label {str(labels.pop()).lower()}: a reward model can't learn from them alone"
    groups = len({record.group for record in records})
    if 0 < groups < 10:
        yield f"there are only {groups} groups: a split by group may leave a side empty"


def _duplicates(records: Iterable[Record]) -> int:
    return sum(count - 1 for count in Counter(record_hash(record) for record in records).values())


def _contradictions(records: Iterable[Record]) -> int:
    """Number of (prompt, completion) with both labels plus number of pairs judged in both orders."""
    verdicts: dict[tuple[str, ...], set[bool]] = defaultdict(set)
    for record in records:
        if isinstance(record, Rating):
            verdicts[prompt_text(record.prompt), prompt_text(record.completion)].add(record.label)
        elif isinstance(record, Comparison) and record.chosen != record.rejected:
            sides = sorted((prompt_text(record.chosen), prompt_text(record.rejected)))
            verdicts[prompt_text(record.prompt), *sides].add(sides[0] == prompt_text(record.chosen))
    return sum(len(answers) == 2 for answers in verdicts.values())


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


def _quantiles(lengths: list[int]) -> dict[str, int]:
    """Median, 90th percentile (both elements of the list: the lower one where the place is between two) and maximum."""
    ordered = sorted(lengths)
    if not ordered:
        return {"median": 0, "p90": 0, "max": 0}
    return {
        "median": ordered[(len(ordered) - 1) // 2],
        "p90": ordered[(len(ordered) - 1) * 9 // 10],
        "max": ordered[-1],
    }


def _split_sizes(records: Sequence[Record], config: DataConfig) -> dict[str, dict[str, int]]:
    sides: dict[str, list[Record]] = {side: [] for side in SPLITS}
    for record in records:
        sides[split_of(record.group, config)].append(record)
    return {
        side: {"records": len(members), "groups": len({record.group for record in members})}
        for side, members in sides.items()
    }
